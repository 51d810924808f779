"""What the vision tower is taught in its first stage: what each patch shows, and what each partition holds.

Marks (letters and discs) are labelled as well, as a caption would name them: the tower has no reason to look
away from what no question is about. No attention map is ever supervised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_budget.eval.nano.modeling import PARTITIONS, PATCH, PATCHES, SIDE
from vlm_budget.eval.nano.scene import CANVAS, COLORS, MARK, Scene

BACKGROUND, MARK_KIND, KINDS = 10, 11, 12
NO_COLOR = len(COLORS)
SUMMARY = 10 + len(COLORS) + 10 * len(COLORS) + len(COLORS)
"""Digits, digit colours, digit-colour pairs, mark colours."""
_MIN_COVER, _MIN_SHARE = 0.05, 0.5


def _coverage(masks: np.ndarray) -> np.ndarray:
    """Share of each patch covered by each mask: bool ``[n, 96, 96]`` to float32 ``[n, 5, 36]``."""
    cells = CANVAS // PATCH
    fine = masks.reshape(-1, cells, PATCH, cells, PATCH).mean((2, 4), dtype=np.float32)
    crops = fine.reshape(-1, 2, SIDE, 2, SIDE).transpose(0, 1, 3, 2, 4).reshape(-1, PARTITIONS - 1, PATCHES)
    coarse = fine.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).reshape(-1, 1, PATCHES)
    return np.concatenate([coarse, crops], 1)


def scene_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of one scene.

    Returns:
        kind int64 ``[5, 36]`` (digit, background or mark), colour int64 ``[5, 36]``, summary float32 ``[5,
        SUMMARY]``.
    """
    owners = [*range(len(scene.items)), *(MARK + i for i in range(len(scene.marks)))]
    kinds = np.array([*(item.digit for item in scene.items), *(MARK_KIND for _ in scene.marks)], np.int64)
    colors = np.array([*(item.color for item in scene.items), *scene.marks], np.int64)
    cover = _coverage(np.stack([scene.owner == owner for owner in owners]))
    best = cover.argmax(0)
    empty = cover.max(0) < _MIN_COVER
    kind, color = np.where(empty, BACKGROUND, kinds[best]), np.where(empty, NO_COLOR, colors[best])
    ink = cover.sum(2)
    ink[:, 0] *= 4  # a thumbnail patch is four times as large, so that its cover counts four times the ink
    shown = ink >= _MIN_SHARE * np.maximum(ink[:, :1], 1e-6)
    summary = np.zeros((PARTITIONS, SUMMARY), np.float32)
    for k, (what, tint) in enumerate(zip(kinds, colors, strict=True)):
        if what == MARK_KIND:
            summary[shown[k], SUMMARY - len(COLORS) + tint] = 1
        else:
            for column in (what, 10 + tint, 10 + len(COLORS) * (what + 1) + tint):
                summary[shown[k], column] = 1
    return kind, color, summary


def batch_labels(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`scene_labels` of many scenes, stacked."""
    kinds, colors, summaries = zip(*map(scene_labels, scenes), strict=True)
    return np.stack(kinds), np.stack(colors), np.stack(summaries)
