"""Does a budget in milliseconds, FLOPs or megabytes buy what it says?

On one LLaVA-NeXT of real proportions with random weights (CLIP-L/14 at 336 pixels, a 0.5B-class language model, one
image of 1 x 2 crops): the language model is calibrated, then

* budgets in milliseconds run round by round in turn with the unpatched model. Reported is the median prefill time over
  what was promised from the calibration, and over the same share of the unpatched prefill measured in the same rounds,
  which tells a machine that has changed its pace from a wrong prediction;
* FLOPs are counted by ``torch.utils.flop_counter`` in the language model, and cache bytes read off the cache.

Images are encoded once: the vision encoder is no part of these budgets. Exit code 1 where a budget is missed, by more
than 10 % in milliseconds or 1 % otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import vlm_budget
from vlm_budget.eval.record import environment, write_json
from vlm_budget.eval.sized import SIZES, PrefillClock, Timer, build, build_inputs

Method = str | list[str]

TIMED: list[tuple[Method, str]] = [
    ("hired", "50% ms"),
    ("hired", "30% ms"),
    ("fastv", "50% ms"),
    (["hired", "fastv"], "50% ms"),
    ("uniform", "{} ms"),  # filled with 0.4 of the predicted unpruned time
]
COUNTED: list[tuple[Method, str]] = [
    ("hired", "40% flops"),
    ("fastv", "40% flops"),
    (["hired", "fastv"], "25% flops"),
    ("hired", "30% kv"),
    ("pyramiddrop", "50% kv"),
    (["hired", "fastv"], "{} MB kv"),  # filled with 0.3 of the unpruned cache
]
TOLERANCE = {"ms": 0.10, "flops": 0.01, "bytes": 0.01}


class Encoded:
    """The prompt with its image encoded once, with all scores that the methods want."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model = model
        pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        with vlm_budget.patch(model, "hired", 0.5):
            features = model.model.get_image_features(**pixels)
        self.text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self.given = {**self.text, "mm_encoder_outputs": {"image": features}, "logits_to_keep": 1, "use_cache": True}
        self.inputs = inputs

    def __call__(self) -> Any:
        """One forward."""
        return self.model(**self.given)


def name_of(method: Method) -> str:
    """A method, or several, in words."""
    return method if isinstance(method, str) else " + ".join(method)


def timed(encoded: Encoded, cases: Sequence[tuple[Method, str]], runs: int, timer: Timer) -> list[dict[str, Any]]:
    """Budgets in milliseconds, every one in turn with all others and with the unpatched model."""
    unpatched: list[float] = []
    times: list[list[float]] = [[] for _ in cases]
    promises: list[Any] = [None] * len(cases)
    kept: list[Any] = [None] * len(cases)
    for run in range(runs + 1):
        clock = PrefillClock(encoded.model, timer)
        encoded()
        clock.remove()
        unpatched.append(clock.ms)
        for index, (method, budget) in enumerate(cases):
            with vlm_budget.patch(encoded.model, method, budget) as handle:
                timer(encoded)
                report = handle.report()
            assert report.forecast is not None and report.forecast.promise is not None
            times[index].append(report.forecast.promise.achieved)
            promises[index], kept[index] = report.forecast.promise, report.plan
        print(f"round {run}: unpatched {clock.ms:.1f} ms", flush=True)
    full = statistics.median(unpatched[1:])  # the first round warms up
    results = []
    for (method, budget), all_ms, promise, plan in zip(cases, times, promises, kept, strict=True):
        own = all_ms[1:]
        achieved = statistics.median(own)
        share = promise.allowed / _predicted(encoded.model, plan, encoded)
        results.append(
            {
                **_row(encoded.model, method, budget, plan, "ms", promise.allowed, promise.planned, achieved),
                "spread": {"min": min(own), "max": max(own)},
                "unpatched_ms": full,
                "of_unpatched_share": achieved / (share * full),
                "runs": runs,
            }
        )
    return results


def _predicted(model: Any, plan: Any, encoded: Encoded) -> float:
    """The unpruned prefill as predicted."""
    return prices(model).prefill_ms(text_tokens(encoded), [plan.total] * layers_of(model))


def counted(encoded: Encoded, cases: Sequence[tuple[Method, str]]) -> list[dict[str, Any]]:
    """Budgets in FLOPs and bytes; one run each, since counts do not vary."""
    results = []
    for method, budget in cases:
        counters: list[FlopCounterMode] = []

        def begin(*_: Any, found: list[FlopCounterMode] = counters) -> None:
            found.append(FlopCounterMode(display=False))
            found[-1].__enter__()

        def end(*_: Any, found: list[FlopCounterMode] = counters) -> None:
            found[-1].__exit__(None, None, None)

        decoder = encoded.model.model.language_model
        hooks = [decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end)]
        with vlm_budget.patch(encoded.model, method, budget) as handle:
            cache = encoded().past_key_values
            report = handle.report()
        for hook in hooks:
            hook.remove()
        assert report.forecast is not None and report.forecast.promise is not None
        promise = report.forecast.promise
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        measured = {
            "flops": counters[0].get_total_flops(),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
        }[promise.unit]
        amounts = (promise.unit, promise.allowed, promise.planned, measured)
        results.append(_row(encoded.model, method, budget, report.plan, *amounts))
    return results


def _row(
    model: Any, method: Method, budget: str, plan: Any, unit: str, allowed: float, planned: float, achieved: float
) -> dict[str, Any]:
    row = {
        "method": name_of(method),
        "budget": budget,
        "unit": unit,
        "visual_tokens": plan.total,
        "kept_tokens": plan.keep,
        "mean_tokens_per_layer": plan.mean_tokens(layers_of(model)),
        "promised": allowed,
        "planned": planned,
        "achieved": achieved,
        "achieved_of_promised": achieved / allowed,
        "within": abs(achieved / allowed - 1) <= TOLERANCE[unit],
    }
    print(f"{row['method']} at {budget}: {row['achieved_of_promised']:.3f} of what was promised", flush=True)
    return row


def layers_of(model: Any) -> int:
    """Decoder layers."""
    return len(model.model.language_model.layers)


def prices(model: Any) -> Any:
    """The cost model, with the calibration of this machine."""
    from vlm_budget.cost import CostModel
    from vlm_budget.models import find_family

    _, base, family = find_family(model)
    return CostModel.of(base, family)


def text_tokens(encoded: Encoded) -> int:
    """Text tokens of the prompt."""
    ids = encoded.text["input_ids"]
    return int((ids != encoded.model.config.image_token_id).sum())


def filled(encoded: Encoded, cases: Sequence[tuple[Method, str]]) -> list[tuple[Method, str]]:
    """Absolute budgets for the placeholders in the cases."""
    ids = encoded.text["input_ids"]
    cost, text = prices(encoded.model), text_tokens(encoded)
    every = [ids.numel() - text] * layers_of(encoded.model)
    amounts = {"ms": 0.4 * cost.prefill_ms(text, every), "kv": 0.3 * cost.kv_bytes(text, every) / 1e6}
    return [(method, budget.format(f"{amounts.get(budget.split()[-1], 0):.4g}")) for method, budget in cases]


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU by default")
    parser.add_argument("--size", choices=sorted(SIZES), default="real")
    parser.add_argument("--grid", type=int, nargs=2, default=(1, 2), help="crop rows and columns")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--calibration-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    name = arguments.dtype or ("bfloat16" if cuda else "float32")
    dtype: torch.dtype = getattr(torch, name)
    model = build(arguments.size, arguments.device, dtype, tuple(arguments.grid))
    encoded = Encoded(model, build_inputs(model, arguments.device, dtype, 1))
    length = encoded.text["input_ids"].numel()
    latency = vlm_budget.calibrate(model, longest=length, repeats=arguments.calibration_rounds)
    print(f"calibrated up to {length} tokens, worst error {latency.worst:.1%}", flush=True)
    results = timed(encoded, filled(encoded, TIMED), arguments.runs, Timer(arguments.device))
    results += counted(encoded, filled(encoded, COUNTED))
    write_json(
        arguments.out / f"budgets_{'cuda' if cuda else 'cpu'}{'' if arguments.size == 'real' else '_small'}.json",
        {
            "environment": environment(arguments.device, name),
            "size": arguments.size,
            "grid": list(arguments.grid),
            "attention": model.config.text_config._attn_implementation,
            "prompt_tokens": length,
            "calibration": asdict(latency),
            "results": results,
        },
    )
    missed = [f"{row['method']} at {row['budget']}" for row in results if not row["within"]]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
