"""Accuracy of every method at every budget on nano's held-out pages.

``python -m vlm_budget.eval.nano.accuracy --out results.json`` measures both published checkpoints; ``--weights``
adds other trainings. Before anything is measured, the short cut of ``pages`` is held against ``patch`` and the stock
forward for every method; the run stops if they differ.

Paired differences are taken per question against the mean of the random draws, with standard errors clustered by page.
Methods inside the language model are compared at the same mean number of visual tokens per decoder layer, with random
dropping before it, on the first ``--inside-pages`` pages; nano has four layers only, so what a method cannot reach
there is recorded as infeasible with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from vlm_budget.budget import Budget
from vlm_budget.errors import BudgetError
from vlm_budget.eval.nano import folder, names
from vlm_budget.eval.nano.data import TASKS, TEST_SEED, Sample, priors, test_set
from vlm_budget.eval.nano.pages import Pages, check_short_cut, encode_pages, right
from vlm_budget.eval.nano.scene import HARD_KINDS
from vlm_budget.eval.record import environment, write_json
from vlm_budget.eval.statistics import clustered
from vlm_budget.pruner import Pruner
from vlm_budget.registry import MERGES, PRUNERS

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

BUDGETS = (0.5, 0.3, 0.2, 0.1)
INSIDE_BUDGETS = (0.75, *BUDGETS)  # schedules that leave two layers alone cannot go below half of nano's four
NEWLINES = ("drop", "keep_all")
POSITIONS = ("packed", "original")
RANDOM_DRAWS = 3
# A second opinion on merging: what becomes of the same selections when the dropped tokens are merged into them.
MERGED = ("hired", "cls_topk", "random")
# The papers' layers are of 32; the first one that ranks at all is what corresponds to them in four.
INSIDE_OPTIONS: dict[str, dict[str, Any]] = {"fastv": {"k": 1}, "dart": {"layer": 1}}
BOTH = (("hired", "pyramiddrop"), ("divprune", "pyramiddrop"), ("hired", "fastv"))


@dataclass(frozen=True)
class Entry:
    """A row of the table before it is measured.

    Attributes:
        name: As the table names it.
        place: ``"before"`` the language model, ``"inside"`` it, or ``"both"``.
        make: Newline and position policy to the method or methods.
    """

    name: str
    place: str
    make: Callable[[str, str], Pruner | list[Pruner]]


def entries() -> Iterator[Entry]:
    """Every registered method, merging behind some of them, and some compositions."""
    inside = {name: PRUNERS.get(name)(**INSIDE_OPTIONS.get(name, {})) for name in stage_names("decoder")}
    for name in stage_names("vision"):
        yield Entry(name, "before", _maker(name))
        if name in MERGED:
            for merge in MERGES:
                yield Entry(f"{name} + {merge}", "before", _maker(name, merge))
    for name, method in inside.items():
        yield Entry(name, "inside", _same(method))
    for before, within in BOTH:
        yield Entry(f"{before} + {within}", "both", _composed(_maker(before), inside[within]))


def _same(method: Pruner) -> Callable[[str, str], Pruner]:
    return lambda newline, positions: method


def _composed(before: Callable[[str, str], Pruner], inside: Pruner) -> Callable[[str, str], list[Pruner]]:
    return lambda newline, positions: [before(newline, positions), inside]


def stage_names(stage: str) -> list[str]:
    """Names of the registered methods of a stage."""
    return [name for name in PRUNERS if PRUNERS.get(name).stage == stage]


def _maker(name: str, merge: str | None = None) -> Callable[[str, str], Pruner]:
    def make(newline: str, positions: str) -> Pruner:
        stage = None if merge is None else MERGES.get(merge)()
        pruner: Pruner = PRUNERS.get(name)(newline=newline, positions=positions, merge=stage)
        return pruner

    return make


def groups(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Which questions count for which row of the table: all, every task on clean pages, and the hard pages."""
    task = np.array([[q.task for q in sample.questions] for sample in samples])
    kind = np.array([[q.hard_kind or "" for q in sample.questions] for sample in samples])
    clean = {name: (task == name) & (kind == "") for name in TASKS}
    hard = {f"hard/{name}": kind == name for name in HARD_KINDS}
    return {"all": np.ones(task.shape, dtype=bool), **clean, "hard": kind != "", **hard}


def measure(
    model: LlavaNextForConditionalGeneration,
    samples: Sequence[Sample],
    label: str,
    inside_pages: int,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The table of one checkpoint, of all methods or of those named."""
    known = [entry for entry in entries() if not only or entry.name in only]
    before = [entry for entry in known if entry.place == "before"]
    needed = [entry.make("drop", "packed") for entry in before]
    pages = encode_pages(model, samples, needed)  # type: ignore[arg-type]
    checked = [entry.make(*policy) for entry in before for policy in (("drop", "packed"), ("keep_all", "original"))]
    difference = check_short_cut(model, pages, checked)  # type: ignore[arg-type]
    masks = groups(samples)
    full = right(model, pages, PRUNERS.get("random")(positions="original"), Budget(1.0))
    rows: list[dict[str, Any]] = []
    settings = [(b, n, p) for b in BUDGETS for n in NEWLINES for p in POSITIONS]
    for share, newline, positions in track(settings, description=label):
        budget = Budget(share)
        policy = {"budget": share, "newline": newline, "positions": positions}
        random = _random(model, pages, budget, newline, positions)
        for entry in before:
            method = entry.make(newline, positions)
            values = random if entry.name == "random" else right(model, pages, method, budget)
            rows.append({**_named(entry, method), **policy, **_scores(values, random, masks)})
    few = pages.first(inside_pages)
    few_masks = groups(few.samples)
    inside = [entry for entry in known if entry.place != "before"]
    for share in track(INSIDE_BUDGETS if inside else (), description=f"{label}, inside"):
        random = _random(model, few, Budget(share), "keep_all", "original")
        for entry in inside:
            method = entry.make("keep_all", "original")
            row = {**_named(entry, method), "budget": share, "pages": len(few.samples)}
            try:
                rows.append(row | _scores(right(model, few, method, Budget(share)), random, few_masks))
            except BudgetError as error:
                rows.append(row | {"infeasible": str(error)})
    return {
        "checkpoint": label,
        "methods": [entry.name for entry in known],
        "visual_tokens": pages.seen[0].item.size,
        "short_cut_difference": difference,
        "full": {group: clustered(full, mask) for group, mask in masks.items()},
        "full_inside": {group: clustered(full[: len(few.samples)], mask) for group, mask in few_masks.items()},
        "rows": rows,
    }


def _random(model: Any, pages: Pages, budget: Budget, newline: str, positions: str) -> np.ndarray:
    make = PRUNERS.get("random")
    draws = [
        right(model, pages, make(seed=s, newline=newline, positions=positions), budget) for s in range(RANDOM_DRAWS)
    ]
    mean: np.ndarray = np.mean(draws, 0)
    return mean


def _named(entry: Entry, method: Pruner | list[Pruner]) -> dict[str, Any]:
    members = [method] if isinstance(method, Pruner) else method
    return {"method": entry.name, "place": entry.place, "configured": " + ".join(map(str, members))}


def _scores(values: np.ndarray, random: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "accuracy": {group: clustered(values, mask) for group, mask in masks.items()},
        "minus_random": {group: clustered(values - random, mask) for group, mask in masks.items()},
    }


def renewed(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """An earlier table with the rows of some methods measured anew, and where that was."""
    names = set(found["methods"])
    rows = [row for row in earlier["rows"] if row["method"] not in names] + found["rows"]
    note = {"methods": found["methods"], "environment": environment()}
    return {**earlier, "rows": rows, "renewed": [*earlier.get("renewed", []), note]}


def fingerprint(path: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def measured_before(out: Path, images: int) -> dict[str, dict[str, Any]]:
    """Checkpoints that an earlier run of the same test recorded, by the fingerprint of their weights."""
    if not out.exists():
        return {}
    data = json.loads(out.read_text(encoding="utf-8"))
    if (data["test_seed"], data["images"]) != (TEST_SEED, images):
        return {}
    known: dict[str, dict[str, Any]] = {}
    for row in data["checkpoints"]:
        known.setdefault(row["weights"], row)  # the published ones come first; one of the trainings is the same weights
    return known


def main() -> None:
    """Command line."""
    from transformers import LlavaNextForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nano_accuracy.json"))
    parser.add_argument("--images", type=int, default=500, help="pages of six questions each")
    parser.add_argument("--inside-pages", type=int, default=250, help="of these, for methods inside the language model")
    parser.add_argument("--weights", nargs="*", default=[], metavar="LABEL=DIR", help="further trainings")
    parser.add_argument("--only", nargs="*", help="of the published checkpoints, these")
    parser.add_argument("--methods", nargs="*", help="measure these anew in a recorded table, with --resume")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds of the same weights and pages")
    arguments = parser.parse_args()
    folders = {name: folder(name) for name in names() if not arguments.only or name in arguments.only}
    folders |= {label: Path(path) for label, path in (pair.split("=", 1) for pair in arguments.weights)}
    samples = test_set(arguments.images)
    masks = groups(samples)
    chosen = {name: [samples[i].questions[j] for i, j in np.argwhere(mask)] for name, mask in masks.items()}
    known = measured_before(arguments.out, arguments.images) if arguments.resume else {}
    measured: list[dict[str, Any]] = []
    for label, path in folders.items():
        weights = fingerprint(path)
        if weights not in known or arguments.methods:
            model = LlavaNextForConditionalGeneration.from_pretrained(path).eval()
            found = measure(model, samples, label, arguments.inside_pages, arguments.methods)
            if arguments.methods:
                known[weights] = renewed(known[weights], found)
            else:
                known[weights] = found | {"weights": weights, "environment": environment()}
        measured.append(known[weights] | {"checkpoint": label})
        write_json(
            arguments.out,
            {
                "test_seed": TEST_SEED,
                "images": len(samples),
                "questions": int(masks["all"].sum()),
                "random_draws": RANDOM_DRAWS,
                "prior": {name: round(priors(questions)["all"], 4) for name, questions in chosen.items() if questions},
                "checkpoints": measured,
            },
        )
        print(f"{label}: in {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
