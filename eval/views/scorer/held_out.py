"""How well the scorer finds events in clips, and things in rooms, that it has never seen.

A frame counts as positive for a text where it belongs to an event of which the text is true (rooms: where the thing
covers 25 pixels). Texts are judged one by one over the frames of all clips, questions each within its own clip, as a
frame budget reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.labels import picture_labels
from vlm_budget.eval.views.scorer import captions
from vlm_budget.eval.views.world import COLOR_NAMES, KINDS, Picture

Score = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]
"""Frames and texts to ``[T, C]`` in [0, 1]."""

_PAIRS = [(kind, color) for kind in range(len(KINDS)) for color in range(len(COLOR_NAMES))]
TEXTS: dict[str, tuple[tuple[str, int], ...]] = {
    "kinds": tuple((word, captions.kind_concept(kind)) for kind, word in enumerate(KINDS)),
    "colors": tuple((f"{word} thing", captions.color_concept(color)) for color, word in enumerate(COLOR_NAMES)),
    "pairs": tuple(
        (f"a {COLOR_NAMES[color]} {KINDS[kind]}", captions.pair_concept(kind, color)) for kind, color in _PAIRS
    ),
}
"""Texts by group, each with its concept."""
_BINS = 10
_FRAMES, _BEST = 32, 2  # frames spread evenly, and how many of them for every asked event


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores higher than a negative, ties counting half; NaN without both."""
    many, other = int(positive.sum()), int((~positive).sum())
    if not many or not other:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    return float((rank[place[positive]].sum() - many * (many + 1) / 2) / (many * other))


def calibration_error(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean gap between what was said and what was so, over ten bins of [0, 1] weighted by their size."""
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    gaps = [abs(scores[bins == b].sum() - positive[bins == b].sum()) for b in range(_BINS)]
    return float(sum(gaps) / len(scores))


def _images(pictures: Sequence[Picture]) -> list[Image.Image]:
    return [Image.fromarray(picture.pixels) for picture in pictures]


def _group(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Figures of a group of texts: scores and truth ``[frames, texts]``."""
    each = [auc(scores[:, i], truth[:, i]) for i in range(scores.shape[1])]
    positive = scores[truth]
    return {
        "auc": float(np.nanmean(each)),
        "worst_auc": float(np.nanmin(each)),
        "score_where_true": float(positive.mean()),
        "score_elsewhere": float(scores[~truth].mean()),
        "recall_at_half": float((positive >= 0.5).mean()),
        "false_alarms_at_half": float((scores[~truth] >= 0.5).mean()),
        "calibration_error": calibration_error(scores.ravel(), truth.ravel()),
    }


def _question(scores: np.ndarray, frames: Sequence[np.ndarray]) -> dict[str, float]:
    """Figures of one question within its clip: scores ``[FRAMES]``, for every target its frames, bool ``[FRAMES]``."""
    target = np.logical_or.reduce(frames)
    best = np.argsort(-scores, kind="stable")[: int(target.sum())]
    even = np.array(clips.evenly(_FRAMES))
    first = even[np.argsort(-scores[even], kind="stable")[: _BEST * len(frames)]]
    return {
        "auc": auc(scores, target),
        "recall": float(target[best].mean()),
        "found": float(all(event[first].any() for event in frames)),
    }


def _mean(rows: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Means over questions, each with its standard error clustered by clip."""
    summary: dict[str, Any] = {"questions": len(rows)}
    names = np.array([clip for clip, _ in rows])
    for figure in rows[0][1]:
        values = np.array([row[figure] for _, row in rows])
        rest = values - values.mean()
        sums = np.array([rest[names == name].sum() for name in np.unique(names)])
        summary[figure] = float(values.mean())
        summary[f"{figure}_se"] = float(np.sqrt((sums**2).sum()) / len(values))
    return summary


def _texts() -> list[str]:
    return [text for group in TEXTS.values() for text, _ in group]


def _by_group(scores: np.ndarray, seen: np.ndarray) -> dict[str, dict[str, float]]:
    """Scores ``[frames, texts]`` of `_texts` and seen concepts ``[frames, CONCEPTS]`` to figures by group."""
    result, start = {}, 0
    for name, group in TEXTS.items():
        concepts = [concept for _, concept in group]
        result[name] = _group(scores[:, start : start + len(group)], seen[:, concepts])
        start += len(group)
    return result


def measure_clips(score: Score, samples: Sequence[clips.ClipSample]) -> dict[str, Any]:
    """Figures of texts over all frames, and of questions within their clips, raw and taken apart (`captions.clues`)."""
    texts = _texts()
    tables, truths = [], []
    rows: dict[str, dict[str, list[tuple[int, Mapping[str, float]]]]] = {"raw": {}, "decoupled": {}}
    for number, sample in enumerate(samples):
        scene = sample.scene
        asked = [
            (question, {"raw": (question.prompt,), "decoupled": captions.clues(question.prompt)})
            for question in sample.questions
        ]
        words = [*texts, *(word for _, ways in asked for way in ways.values() for word in way)]
        scores = score(_images([scene.frame(i) for i in range(clips.FRAMES)]), words)
        there = np.zeros((len(scene.events), clips.FRAMES), bool)
        seen = np.zeros((clips.FRAMES, captions.CONCEPTS), bool)
        for index, event in enumerate(scene.events):
            there[index, event.start : event.stop] = True
            pair = captions.pair_concept(event.kind, event.color)
            own = [captions.kind_concept(event.kind), captions.color_concept(event.color), pair, captions.ANYTHING]
            seen[event.start : event.stop, own] = True
        tables.append(scores[:, : len(texts)])
        truths.append(seen)
        column = len(texts)
        for question, ways in asked:
            for way, parts in ways.items():
                best = scores[:, column : column + len(parts)].max(1)
                column += len(parts)
                figures = _question(best, [there[index] for index in question.targets])
                for task in (question.task, "all"):
                    rows[way].setdefault(task, []).append((number, figures))
    return {
        "clips": len(samples),
        "frames": len(samples) * clips.FRAMES,
        "texts": _by_group(np.concatenate(tables), np.concatenate(truths)),
        "questions": {
            way: {task: _mean(found) for task, found in sorted(tasks.items())} for way, tasks in rows.items()
        },
    }


def measure_rooms(score: Score, samples: Sequence[rooms.RoomSample]) -> dict[str, Any]:
    """Figures of texts over all views."""
    texts = _texts()
    tables, truths = [], []
    for sample in samples:
        scene = sample.scene
        tables.append(score(_images(scene.pictures), texts))
        truths += [picture_labels(picture, scene.room.things)[2] > 0 for picture in scene.pictures]
    return {
        "rooms": len(samples),
        "views": len(samples) * rooms.VIEWS,
        "texts": _by_group(np.concatenate(tables), np.stack(truths)),
    }
