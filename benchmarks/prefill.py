"""Does pruning make the prefill faster, selection included?

Three runs in turn, round after round, on one LLaVA-NeXT of real proportions with random weights (CLIP-L/14 at 336
pixels, a 0.5B-class language model, 2 x 2 crops): the unpatched model; the model patched at a budget; and the same
language model natively fed as many tokens as the budget leaves. Reported are medians and ratios of medians:

* ``overhead``: probes, selection and compaction of the patched run over the language-model prefill of the unpatched one
  (and, as ``overhead_of_forward``, over its whole forward with the vision tower);
* ``against_native``: the patched language-model prefill with probes, selection and compaction, over the native one;
* ``speedup``: the whole unpatched forward over the whole patched one, and of the language-model part alone.

The benchmark refuses to run when the patched output differs from the hand-compacted one. Times of a CPU run mean
nothing by themselves; the ratios do.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

import vlm_budget
from vlm_budget.eval.record import environment, write_json
from vlm_budget.eval.sized import SIZES, PrefillClock, Timer, build, build_inputs


def native_inputs(model: Any, inputs: dict[str, torch.Tensor], method: str, budget: float) -> dict[str, Any]:
    """What the language model gets inside the patched model: the kept embeddings, as a plain call."""
    caught: dict[str, Any] = {}

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.update(kwargs)

    with vlm_budget.patch(model, method, budget):
        # Registered after the patch's own hook, so it sees the shortened call.
        hook = model.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            model(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
    return {"inputs_embeds": caught["inputs_embeds"].clone(), "use_cache": True}


def check(model: Any, inputs: dict[str, torch.Tensor], native: dict[str, Any], method: str, budget: float) -> float:
    """Relative difference of the last hidden state, patched against native.

    Raises:
        RuntimeError: It exceeds what rounding explains: nothing may be timed.
    """
    with vlm_budget.patch(model, method, budget):
        patched = model(**inputs, logits_to_keep=1).logits[:, -1].float()
    hidden = model.model.language_model(**native).last_hidden_state[:, -1:]
    expected = model.lm_head(hidden)[:, -1].float()
    difference = float((patched - expected).abs().max() / expected.abs().max())
    limit = 1e-3 if expected.dtype == native["inputs_embeds"].dtype else 5e-2
    if difference > limit:
        raise RuntimeError(f"patched and hand-compacted outputs differ by {difference:.1e}: nothing was timed")
    return difference


@torch.no_grad()
def measure(
    model: Any, inputs: dict[str, torch.Tensor], methods: list[str], budget: float, runs: int, timer: Timer
) -> list[dict[str, Any]]:
    """All methods at one budget: in every round the unpatched, the native and each patched model run once."""
    natives = {method: native_inputs(model, inputs, method, budget) for method in methods}
    differences = {method: check(model, inputs, natives[method], method, budget) for method in methods}
    times: dict[str, dict[str, list[float]]] = {method: {} for method in methods}
    reports = {}
    for run in range(runs + 1):
        clock = PrefillClock(model, timer)
        whole, _ = timer(lambda: model(**inputs, logits_to_keep=1))
        clock.remove()
        # Every method keeps the same number of tokens, so one native run stands for all.
        native, _ = timer(lambda: model.model.language_model(**natives[methods[0]]))
        for method in methods:
            with vlm_budget.patch(model, method, budget) as handle:
                patched, _ = timer(lambda: model(**inputs, logits_to_keep=1))
                report = reports[method] = handle.report()
            row = {
                "unpatched_forward": whole,
                "unpatched_prefill": clock.ms,
                "native_prefill": native,
                "patched_forward": patched,
                "patched_prefill": report.prefill_ms,
                "probe": report.probe_ms,
                "select": report.select_ms,
                "compact": report.compact_ms,
                "extra": report.probe_ms + report.select_ms + report.compact_ms,
            }
            for name, value in row.items():
                if run:  # the first round warms up
                    times[method].setdefault(name, []).append(value)
    return [
        {
            "method": method,
            "budget": budget,
            "visual_tokens": reports[method].visual_tokens,
            "kept_tokens": reports[method].kept_tokens,
            "runs": runs,
            "output_difference": differences[method],
            **summary(times[method]),
        }
        for method in methods
    ]


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians with their spread, and the ratios of medians."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    own = middle["patched_prefill"] + middle["extra"]
    return {
        "ms": {name: {"median": middle[name], "min": min(v), "max": max(v)} for name, v in times.items()},
        "ratios": {
            "overhead": middle["extra"] / middle["unpatched_prefill"],
            "overhead_of_forward": middle["extra"] / middle["unpatched_forward"],
            "against_native": own / middle["native_prefill"],
            "speedup_forward": middle["unpatched_forward"] / middle["patched_forward"],
            "speedup_prefill": middle["unpatched_prefill"] / own,
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU by default")
    parser.add_argument("--size", choices=sorted(SIZES), default="real")
    parser.add_argument("--methods", nargs="+", default=["hired", "uniform", "random", "cls_topk"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.2])
    parser.add_argument("--attention", default=None, help="attn_implementation; transformers' default if not given")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    name = arguments.dtype or ("bfloat16" if cuda else "float32")
    dtype: torch.dtype = getattr(torch, name)
    model = build(arguments.size, arguments.device, dtype)
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    inputs = build_inputs(model, arguments.device, dtype, arguments.batch)
    timer = Timer(arguments.device)
    results: list[dict[str, Any]] = []
    for budget in arguments.budgets:
        for result in measure(model, inputs, arguments.methods, budget, arguments.runs, timer):
            results.append(result)
            print(result["method"], budget, {k: round(v, 3) for k, v in result["ratios"].items()}, flush=True)
    write_json(
        arguments.out / f"prefill_{'cuda' if cuda else 'cpu'}_{arguments.size}.json",
        {
            "environment": environment(arguments.device, name),
            "size": arguments.size,
            "batch": arguments.batch,
            "attention": model.config.text_config._attn_implementation,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
