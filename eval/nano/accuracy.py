"""Accuracy of every method at every budget on nano's held-out pages.

``python -m vlm_budget.eval.nano.accuracy --out results.json`` measures both published checkpoints; ``--weights``
adds other trainings. Vision features and attention scores are taken once per page by the library's own observer;
every method then selects through the library's own :func:`select`, and all questions of a page are answered behind
one pruned prefix (``packing``). Before anything is measured, the answers of that short cut are held against ``patch``
and the stock forward; the run stops if they differ.

Paired differences are taken per question against the mean of the random draws, with standard errors clustered by page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track

from vlm_budget.budget import Budget
from vlm_budget.engine.observe import Observer
from vlm_budget.engine.selection import Observation, Seen, make_plan, select
from vlm_budget.eval.nano import folder, names
from vlm_budget.eval.nano.data import TASKS, TEST_SEED, Sample, priors, test_set
from vlm_budget.eval.nano.modeling import build_processor
from vlm_budget.eval.nano.packing import answer_logits, encode
from vlm_budget.eval.nano.scene import HARD_KINDS
from vlm_budget.eval.record import environment, write_json
from vlm_budget.layout import VisualLayout
from vlm_budget.patching import find_family
from vlm_budget.pruner import Pruner
from vlm_budget.registry import PRUNERS

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

BUDGETS = (0.5, 0.3, 0.2, 0.1)
NEWLINES = ("drop", "keep_all")
POSITIONS = ("packed", "original")
RANDOM_DRAWS = 3


@dataclass(frozen=True, eq=False)
class Pages:
    """Held-out pages, encoded once.

    Attributes:
        samples: The pages.
        tokens: [N, Q, 6] prompts and answers.
        seen: Per page, what the vision tower showed.
    """

    samples: list[Sample]
    tokens: torch.Tensor
    seen: list[Seen]


@torch.no_grad()
def encode_pages(model: LlavaNextForConditionalGeneration, samples: Sequence[Sample], batch: int = 50) -> Pages:
    """Run the vision tower under the library's probes, for the needs of all registered methods."""
    _, base, family = find_family(model)
    tower = family.tower(base)
    needs = tuple(dict.fromkeys(need for name in PRUNERS for need in PRUNERS.get(name)().needs(tower)))
    observer = Observer(base, family, needs)
    process = build_processor().image_processor
    probes = observer.attach()
    seen: list[Seen] = []
    try:
        for start in range(0, len(samples), batch):
            inputs = process(images=[s.image for s in samples[start : start + batch]], return_tensors="pt")
            keywords = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
            encoder: Callable[..., Any] = getattr(base, family.encoders["image"])
            _, observation = observer.observe("image", encoder, (), keywords)
            seen += list(_per_page(observation))
    finally:
        for probe in probes:
            probe.detach()
    return Pages(list(samples), encode([s.questions for s in samples]), seen)


def _per_page(observation: Observation) -> Iterator[Seen]:
    for index, (item, features) in enumerate(zip(observation.items, observation.features, strict=True)):
        yield Seen(item, features, {need: rows[index] for need, rows in observation.attention.items()})


@torch.no_grad()
def answers(
    model: LlavaNextForConditionalGeneration, pages: Pages, pruners: Sequence[Pruner], budget: Budget, batch: int = 50
) -> torch.Tensor:
    """[N, Q, V] logits at the answer; page ``i`` is a prompt of its own, pruned by ``pruners[i]``."""
    needs = pruners[0].needs(find_family(model)[2].tower(model.model))
    kept = []
    for seen, pruner in zip(pages.seen, pruners, strict=True):
        mine = Seen(seen.item, seen.features, {need: seen.attention[need] for need in needs})
        plan = make_plan(pruner, budget, VisualLayout(((seen.item,),)))
        kept.append(select(pruner, plan, [[mine]], seen.features.device).keep["image"][0].nonzero().flatten())
    visual = torch.stack([seen.features[index] for seen, index in zip(pages.seen, kept, strict=True)])
    renumber = pruners[0].positions == "packed"
    parts = (visual.split(batch), torch.stack(kept).split(batch), pages.tokens.split(batch))
    return torch.cat([answer_logits(model, *part, renumber=renumber)[:, :, 0] for part in zip(*parts, strict=True)])


def right(model: LlavaNextForConditionalGeneration, pages: Pages, pruner: Pruner, budget: Budget) -> np.ndarray:
    """[N, Q] bool, which answers are right."""
    pruners = [pruner] * len(pages.seen)
    if isinstance(pruner, PRUNERS.get("random")):
        # The method draws the same places for every prompt; a fair baseline draws anew for every page.
        pruners = [replace(pruner, seed=pruner.seed * len(pages.seen) + page) for page in range(len(pages.seen))]
    found: np.ndarray = (answers(model, pages, pruners, budget).argmax(-1) == pages.tokens[:, :, -1]).numpy()
    return found


@torch.no_grad()
def check_short_cut(model: LlavaNextForConditionalGeneration, pages: Pages) -> float:
    """Largest logit difference between the packed answers and ``patch`` with the stock forward, on a few pages.

    Raises:
        RuntimeError: They differ by more than 1e-4: nothing may be measured.
    """
    import vlm_budget

    processor = build_processor()
    worst = 0.0
    few = Pages(pages.samples[:3], pages.tokens[:3], pages.seen[:3])
    for name in PRUNERS:
        for newline, positions in (("drop", "packed"), ("keep_all", "original")):
            pruner = PRUNERS.get(name)(newline=newline, positions=positions)
            expected = answers(model, few, [pruner] * len(few.samples), Budget(0.2))
            with vlm_budget.patch(model, pruner, 0.2):
                for page, sample in enumerate(few.samples):
                    texts = [f"<image> {question.prompt}" for question in sample.questions]
                    images = [[sample.image]] * len(texts)
                    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
                    logits = model(**inputs, logits_to_keep=1).logits[:, -1]
                    worst = max(worst, float((logits - expected[page]).abs().max()))
    if worst > 1e-4:
        raise RuntimeError(f"the packed answers differ from the patched model's by {worst:.2e}: nothing was measured")
    return worst


def groups(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Which questions count for which row of the table: all, every task on clean pages, and the hard pages."""
    task = np.array([[q.task for q in sample.questions] for sample in samples])
    kind = np.array([[q.hard_kind or "" for q in sample.questions] for sample in samples])
    clean = {name: (task == name) & (kind == "") for name in TASKS}
    hard = {f"hard/{name}": kind == name for name in HARD_KINDS}
    return {"all": np.ones(task.shape, dtype=bool), **clean, "hard": kind != "", **hard}


def clustered(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean over the questions of a group, and its standard error clustered by page.

    Args:
        values: [N, Q] per question: right or wrong, or a paired difference.
        mask: [N, Q] bool, which questions count.
    """
    asked, sums = mask.sum(1), (values * mask).sum(1)
    pages = int((asked > 0).sum())
    mean = sums.sum() / asked.sum()
    spread = ((sums - mean * asked) ** 2).sum() * pages / max(pages - 1, 1)
    return {"mean": round(float(mean), 5), "se": round(float(spread**0.5 / asked.sum()), 5), "n": int(asked.sum())}


def measure(model: LlavaNextForConditionalGeneration, samples: Sequence[Sample], label: str) -> dict[str, Any]:
    """The whole table of one checkpoint."""
    pages = encode_pages(model, samples)
    difference = check_short_cut(model, pages)
    masks = groups(samples)
    full = right(model, pages, PRUNERS.get("random")(positions="original"), Budget(1.0))
    rows: list[dict[str, Any]] = []
    settings = [(b, n, p) for b in BUDGETS for n in NEWLINES for p in POSITIONS]
    for share, newline, positions in track(settings, description=label):
        common = {"newline": newline, "positions": positions}
        budget = Budget(share)
        draws = [right(model, pages, PRUNERS.get("random")(seed=s, **common), budget) for s in range(RANDOM_DRAWS)]
        random = np.mean(draws, 0)
        for name in PRUNERS:
            values = random if name == "random" else right(model, pages, PRUNERS.get(name)(**common), budget)
            rows.append(
                {
                    "method": name,
                    "budget": share,
                    **common,
                    "tokens": budget.tokens(pages.seen[0].item.size),
                    "accuracy": {group: clustered(values, mask) for group, mask in masks.items()},
                    "minus_random": {group: clustered(values - random, mask) for group, mask in masks.items()},
                }
            )
    return {
        "checkpoint": label,
        "visual_tokens": pages.seen[0].item.size,
        "short_cut_difference": difference,
        "full": {group: clustered(full, mask) for group, mask in masks.items()},
        "rows": rows,
    }


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
    return {row["weights"]: row for row in data["checkpoints"]}


def main() -> None:
    """Command line."""
    from transformers import LlavaNextForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nano_accuracy.json"))
    parser.add_argument("--images", type=int, default=500, help="pages of six questions each")
    parser.add_argument("--weights", nargs="*", default=[], metavar="LABEL=DIR", help="further trainings")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds of the same weights and pages")
    arguments = parser.parse_args()
    folders = {name: folder(name) for name in names()}
    folders |= {label: Path(path) for label, path in (pair.split("=", 1) for pair in arguments.weights)}
    samples = test_set(arguments.images)
    masks = groups(samples)
    chosen = {name: [samples[i].questions[j] for i, j in np.argwhere(mask)] for name, mask in masks.items()}
    known = measured_before(arguments.out, arguments.images) if arguments.resume else {}
    measured: list[dict[str, Any]] = []
    for label, path in folders.items():
        weights = fingerprint(path)
        if weights not in known:
            model = LlavaNextForConditionalGeneration.from_pretrained(path).eval()
            known[weights] = measure(model, samples, label) | {"weights": weights, "environment": environment()}
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
