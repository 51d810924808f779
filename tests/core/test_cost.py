"""Predicted FLOPs and cache bytes against what torch's counter and the caches themselves say, on every family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tiny_models
import vlm_budget
from tiny_encoders import arguments, family_of, modalities
from tiny_models import SETUPS, Tiny, row_inputs
from vlm_budget.cost import CostModel, encoder_flops
from vlm_budget.errors import BudgetError, PatchError
from vlm_budget.families.flops import linear_flops


@pytest.fixture(scope="module", params=SETUPS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return tiny_models.build(request.param)


def cost_of(tiny: Tiny) -> CostModel:
    return CostModel.of(tiny.model.model, family_of(tiny))


def counts_of(tiny: Tiny, inputs: dict[str, Any]) -> tuple[int, int]:
    """Text and visual tokens of a single prompt."""
    tokens = family_of(tiny).token_ids(tiny.model.model.config).values()
    visual = sum(int((inputs["input_ids"] == token).sum()) for token in tokens)
    return inputs["input_ids"].numel() - visual, visual


@contextmanager
def counted(module: nn.Module) -> Iterator[list[FlopCounterMode]]:
    """A counter per call of a module."""
    counters: list[FlopCounterMode] = []

    def begin(*_: Any) -> None:
        counters.append(FlopCounterMode(display=False))
        counters[-1].__enter__()

    hooks = [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(lambda *_: counters[-1].__exit__(None, None, None)),
    ]
    try:
        yield counters
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run(tiny: Tiny, inputs: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of the language model, and bytes of the cache it leaves."""
    with counted(family_of(tiny).language_model(tiny.model.model)) as counters:
        cache = tiny.model(**inputs, use_cache=True).past_key_values
    (counter,) = counters
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return counter.get_total_flops(), sum(tensor.numel() * tensor.element_size() for tensor in held)


def within_a_percent(predicted: float, counted: float) -> bool:
    return abs(predicted / counted - 1) < 0.01


@pytest.mark.parametrize("row", [0, 1])
def test_prefill_and_cache_of_an_unpruned_prompt(tiny: Tiny, row: int) -> None:
    inputs = row_inputs(tiny, row)
    text, visual = counts_of(tiny, inputs)
    flops, held = run(tiny, inputs)
    cost = cost_of(tiny)
    every = [visual] * len(cost.layers)
    assert within_a_percent(cost.prefill_flops(text, every), flops)
    assert cost.kv_bytes(text, every) == held


@pytest.mark.parametrize("budget", [0.1, 0.6])
def test_prefill_and_cache_of_a_prompt_pruned_before_the_language_model(tiny: Tiny, budget: float) -> None:
    inputs = row_inputs(tiny, 0)
    text, _ = counts_of(tiny, inputs)
    with vlm_budget.patch(tiny.model, "uniform", budget) as handle:
        flops, held = run(tiny, inputs)
        kept = handle.report().kept_tokens
    cost = cost_of(tiny)
    every = [kept] * len(cost.layers)
    assert within_a_percent(cost.prefill_flops(text, every), flops)
    assert cost.kv_bytes(text, every) == held


@pytest.mark.parametrize(("method", "budget"), [("fastv", 0.8), (["uniform", "fastv"], "55% flops")])
def test_prefill_and_cache_of_a_prompt_pruned_inside_the_language_model(tiny: Tiny, method: Any, budget: Any) -> None:
    inputs = row_inputs(tiny, 0)
    text, visual = counts_of(tiny, inputs)
    if tiny.family == "gemma3":
        with pytest.raises(PatchError, match="sliding_attention"):
            vlm_budget.patch(tiny.model, method, budget)
        return
    with vlm_budget.patch(tiny.model, method, budget) as handle:
        flops, held = run(tiny, inputs)
        plan = handle.report().plan
    cost = cost_of(tiny)
    counts = plan.row_tokens(0, len(cost.layers))
    assert counts[-1] < counts[0] <= visual
    assert within_a_percent(cost.prefill_flops(text, counts), flops)  # with the attention rows that the method looks at
    assert cost.kv_bytes(text, counts) == held


def test_encoders_with_everything_that_runs_in_them(tiny: Tiny) -> None:
    base, family = tiny.model.model, family_of(tiny)
    for modality in modalities(tiny):
        given = arguments(tiny, modality)
        items = family.items(base, modality, given)  # type: ignore[arg-type]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            getattr(base, f"get_{modality}_features")(**given)
        assert within_a_percent(family.encoder_flops(base, modality, items), counter.get_total_flops())  # type: ignore[arg-type]


def test_a_batch_encodes_the_sum_of_its_items() -> None:
    tiny = tiny_models.build("llava_onevision_video")
    base, family = tiny.model.model, family_of(tiny)
    parts = {m: family.items(base, m, arguments(tiny, m)) for m in ("image", "video")}  # type: ignore[arg-type]
    alone = sum(family.encoder_flops(base, m, [item]) for m, items in parts.items() for item in items)  # type: ignore[arg-type]
    assert encoder_flops(base, family, [*parts["image"], *parts["video"]]) == alone > 0


def test_layers_are_priced_one_by_one() -> None:
    cost = cost_of(tiny_models.build("llava"))
    assert cost.prefill_flops(5, [20, 10, 0]) == sum(
        layer.token_flops * n + layer.pair_flops * n * n for layer, n in zip(cost.layers, (25, 15, 5), strict=True)
    )
    assert cost.kv_bytes(5, [20, 10, 0]) == sum(
        layer.token_bytes * n for layer, n in zip(cost.layers, (25, 15, 5), strict=True)
    )


@pytest.mark.parametrize("visual", [[], [3], [3] * 4])
def test_counts_for_another_number_of_layers_are_refused(visual: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="the decoder has 3"):
        cost_of(tiny_models.build("llava")).prefill_flops(5, visual)


def test_logits_are_counted_apart_and_by_the_row() -> None:
    tiny = tiny_models.build("qwen2_vl")
    inputs = row_inputs(tiny, 0)
    text, visual = counts_of(tiny, inputs)
    cost = cost_of(tiny)
    with torch.no_grad(), counted(tiny.model.lm_head) as counters:
        tiny.model(**inputs)
    rows = inputs["input_ids"].numel()
    added = cost.prefill_flops(text, [visual] * 3, rows) - cost.prefill_flops(text, [visual] * 3)
    assert added == rows * cost.row_flops == counters[0].get_total_flops()


def test_a_sliding_window_bounds_what_a_layer_keeps() -> None:
    tiny = tiny_models.build("gemma3")
    tiny.model.config.text_config.sliding_window = 8
    cost = cost_of(tiny)
    assert [layer.window for layer in cost.layers] == [7, None, 7, None]
    per_token = cost.layers[0].token_bytes
    assert cost.kv_bytes(4, [20] * 4) == per_token * (7 + 24 + 7 + 24)


def test_number_formats_set_the_bytes() -> None:
    tiny = tiny_models.build("llava")
    whole = cost_of(tiny).kv_bytes(1, [1] * 3)
    tiny.model.to(torch.bfloat16)
    assert (
        cost_of(tiny).kv_bytes(1, [1] * 3) * 2 == whole == 3 * 2 * 2 * 16 * 4
    )  # layers, tokens, K and V, Hkv d, float


def test_adapters_are_counted_as_they_run() -> None:
    from peft import LoraConfig, get_peft_model

    tiny = tiny_models.build("llava")
    bare = cost_of(tiny)
    get_peft_model(tiny.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    inputs = row_inputs(tiny, 0)
    text, visual = counts_of(tiny, inputs)
    flops, _ = run(tiny, inputs)
    cost = cost_of(tiny)
    assert cost.layers[0].token_flops > bare.layers[0].token_flops
    assert cost.layers[0].token_bytes == bare.layers[0].token_bytes
    assert within_a_percent(cost.prefill_flops(text, [visual] * 3), flops)


def test_layers_that_pack_their_weights_are_counted_by_their_declared_size() -> None:
    class Packed(nn.Module):
        in_features, out_features = 24, 10

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(30, 1, dtype=torch.uint8), requires_grad=False)

    assert linear_flops(nn.Sequential(Packed(), nn.Linear(3, 5), nn.LayerNorm(5))) == 2 * 24 * 10 + 2 * 3 * 5


def test_amounts_are_asked_for_by_unit() -> None:
    cost = cost_of(tiny_models.build("llava"))
    assert cost.amount("flops", 5, [9] * 3) == cost.prefill_flops(5, [9] * 3)
    assert cost.amount("bytes", 5, [9] * 3) == cost.kv_bytes(5, [9] * 3)
    with pytest.raises(BudgetError, match="not in 'tokens'"):
        cost.amount("tokens", 5, [9] * 3)
