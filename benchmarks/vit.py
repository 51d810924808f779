"""What shortening the token sequence of a vision transformer costs in accuracy, and what it brings in time.

Accuracy is that of the shipped classifier (:mod:`vlm_budget.eval.vit`) on its test pages, with the standard error of
the mean, and of the paired difference to the unpatched model. Time is that of the same classifier, and of a model with
the proportions of ViT-S/16 at 224 pixels and random weights: in every round the unpatched model and every patched one
run once on the same batch; a speed is the median of the rounds' ratios. Times of a CPU run mean nothing by themselves;
the ratios do. Operations are those that torch's FlopCounterMode counts. Two controls prune at the blocks where Token
Transforming acts: ``pruning`` keeps its anchors as they are, ``random`` any tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_budget.engine.vit import patch_vit
from vlm_budget.eval import vit
from vlm_budget.eval.record import environment, write_json
from vlm_budget.eval.vit.modeling import predict
from vlm_budget.eval.vit.pages import TEST_SEED, images, labels, pages
from vlm_budget.pruners.tome import ToMe
from vlm_budget.pruners.vit_token_transforming import VitTokenTransforming
from vlm_budget.vit import Reduced, VitContext, VitMethod

RATIOS = (0.75, 0.5, 0.35, 0.25)
TIMED_RATIOS = (0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(VitTokenTransforming):
    """The control: tokens drawn anew for every image, at the blocks where Token Transforming acts."""

    def reduce(self, ctx: VitContext, keep: int) -> Reduced:
        """Keep ``keep`` tokens of each image."""
        chosen = torch.rand(ctx.tokens.shape[:2]).argsort(1)[:, :keep].sort(1).values
        return Reduced(ctx.tokens.gather(1, chosen[..., None].expand(-1, -1, ctx.tokens.shape[2])))


METHODS: dict[str, VitMethod] = {
    "tome": ToMe(),
    "tome, proportional=False": ToMe(proportional=False),
    "token_transforming": VitTokenTransforming(),
    "token_transforming, exclusive=True": VitTokenTransforming(exclusive=True),
    "pruning": VitTokenTransforming(self_weight=1.0),
    "random": RandomTokens(),
}


def mean_and_error(values: torch.Tensor) -> dict[str, float]:
    """Mean of [n] values and its standard error."""
    values = values.double()
    return {"mean": float(values.mean()), "se": float(values.std() / len(values) ** 0.5)}


@torch.no_grad()
def accuracy(model: Any, count: int) -> dict[str, Any]:
    """Accuracy of the unpatched model and of every method at every ratio."""
    drawn = pages(count, TEST_SEED)
    pixels, expected = images(drawn), labels(drawn)
    full = (predict(model, pixels) == expected).double()
    rows = []
    for name, method in METHODS.items():
        for ratio in RATIOS:
            torch.manual_seed(0)
            with patch_vit(model, method, ratio=ratio) as handle:
                right = (predict(model, pixels) == expected).double()
                report = handle.report()
            row = {
                "method": name,
                "ratio": ratio,
                "tokens": report.tokens,
                "kept_tokens": report.kept_tokens,
                "flops": report.flops / report.flops_unpatched,
                "accuracy": mean_and_error(right),
                "minus_full": mean_and_error(right - full),
            }
            rows.append(row)
            print(name, ratio, row["kept_tokens"], round(row["flops"], 3), row["accuracy"], flush=True)
    guess = float(torch.tensor([1 / page.digits for page in drawn]).mean())
    return {
        "pages": count,
        "test_seed": TEST_SEED,
        "chance": 1 / model.num_classes,
        "a_digit_of_the_page": guess,
        "full": mean_and_error(full),
        "rows": rows,
    }


def milliseconds(model: Any, pixels: torch.Tensor) -> float:
    """Wall time of a forward."""
    start = time.perf_counter()
    model(pixels)
    return (time.perf_counter() - start) * 1000


@torch.no_grad()
def speed(model: Any, pixels: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Times of the unpatched model and of every method, in turn.

    Raises:
        RuntimeError: A patch that keeps everything changes the output: nothing may be timed.
    """
    plain = model(pixels)
    for method in METHODS.values():
        with patch_vit(model, method, ratio=1.0):
            if not torch.equal(model(pixels), plain):
                raise RuntimeError(f"{method} changes the output at ratio 1: nothing was timed")
    cells = [(name, method, ratio) for name, method in METHODS.items() for ratio in TIMED_RATIOS]
    full: list[float] = []
    times: list[list[float]] = [[] for _ in cells]
    reports: list[Any] = [None] * len(cells)
    for turn in range(rounds + 1):
        unpatched = milliseconds(model, pixels)
        if turn:  # the first round warms up
            full.append(unpatched)
        for index, (_, method, ratio) in enumerate(cells):
            with patch_vit(model, method, ratio=ratio) as handle:
                taken = milliseconds(model, pixels)
                if turn:
                    times[index].append(taken)
                else:
                    reports[index] = handle.report()
    return {
        "batch": len(pixels),
        "rounds": rounds,
        "unpatched_ms": spread(full),
        "rows": [
            {
                "method": name,
                "ratio": ratio,
                "tokens": reports[i].tokens,
                "kept_tokens": reports[i].kept_tokens,
                "flops": reports[i].flops / reports[i].flops_unpatched,
                "ms": spread(times[i]),
                "times_faster": spread([a / b for a, b in zip(full, times[i], strict=True)]),
            }
            for i, (name, _, ratio) in enumerate(cells)
        ],
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def small_sized() -> Any:
    """Proportions of ViT-S/16 at 224 pixels, random weights."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(embed_dim=384, depth=12, num_heads=6).eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pages", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--small-batch", type=int, default=8, help="images per batch of the ViT-S/16-sized model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = vit.load()
    found = accuracy(model, arguments.pages)
    shipped = speed(model, images(pages(arguments.batch, TEST_SEED)), arguments.rounds)
    torch.manual_seed(0)
    small = speed(small_sized(), torch.randn(arguments.small_batch, 3, 224, 224), arguments.rounds)
    for timed in (shipped, small):
        for row in timed["rows"]:
            print(
                row["method"], row["ratio"], round(row["flops"], 3), round(row["times_faster"]["median"], 3), flush=True
            )
    write_json(
        arguments.out / "vit_cpu.json",
        {"environment": environment(), "accuracy": found, "speed": {"shipped": shipped, "small": small}},
    )


if __name__ == "__main__":
    main()
