"""Forecasts and warnings: what a pass saved, what its budget promised, and why pruning is said not to pay."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import synthetic_items as make
import tiny_models
import vlm_budget
from tiny_encoders import family_of
from tiny_models import row_inputs
from vlm_budget import Budget
from vlm_budget.budget import in_words
from vlm_budget.cost import CostModel, LayerCost
from vlm_budget.errors import LatencyError
from vlm_budget.latency import Latency, Setting
from vlm_budget.layout import VisualLayout
from vlm_budget.payoff import Batch, Measured, forecast, warnings_for
from vlm_budget.plan import ItemPlan, Plan

LAYERS = (LayerCost(1000, 2, 8), LayerCost(1000, 2, 8), LayerCost(1000, 2, 8, window=50))
# A line with a large constant part: 10 ms + 0.3 ms a token over three layers; a step 2 ms + 0.01 ms a cached token.
TIMES = Latency(10.0, 0.1, 0.0, 0.0, 0, 2.0, 0.01, 1000, 0.0, ())


def uncalibrated() -> Latency:
    raise LatencyError("not calibrated")


def cost(latency: Callable[[], Latency] = uncalibrated) -> CostModel:
    return CostModel(LAYERS, 77, lambda items: 10 * sum(item.size for item in items), latency)


def batch(
    keep: Sequence[int],
    text: Sequence[int],
    steps: Any = (),
    latency: Callable[[], Latency] = uncalibrated,
    side: int = 10,
) -> Batch:
    """Prompts of one image of 100 tokens each."""
    items = tuple(ItemPlan(row, "image", side * side, count, steps) for row, count in enumerate(keep))
    layout = VisualLayout(tuple((make.single(side),) for _ in keep))
    return Batch(cost(latency), Plan("m", "b", items, len(keep)), layout, text)


SEEN = Measured(
    encode_ms=22.0,
    probe_ms=2.0,
    select_ms=1.0,
    compact_ms=0.5,
    prefill_ms=20.0,
    drop_ms=1.0,
    decode_ms=0.0,
    decode_steps=0,
    rows=1,
    kv_bytes=0,
)


def told(of: Batch, seen: Measured) -> str:
    return "\n".join(warnings_for(of, forecast(of, None, seen), seen))


# --- forecasts -------------------------------------------------------------------------------------------------------


def flops(*lengths: int) -> int:
    return sum(1000 * n + 2 * n * n for n in lengths)


def test_flops_are_of_all_prompts_with_what_was_kept_and_with_all() -> None:
    found = forecast(batch([20, 40], [5, 7], ((1, 10),)), None, SEEN)
    assert found.prefill_flops == flops(25, 15, 15, 47, 17, 17)
    assert found.prefill_flops_unpruned == flops(105, 105, 105, 107, 107, 107)
    assert found.encoder_flops == 2000


def test_without_a_calibration_times_are_scaled_by_flops() -> None:
    found = forecast(batch([20], [5]), None, SEEN)
    ratio = flops(105, 105, 105) / flops(25, 25, 25)
    assert found.prefill_ms_unpruned == pytest.approx(19 * ratio) and not found.calibrated
    assert found.overhead_ms == 4.5
    assert found.saved_ms == pytest.approx(19 * ratio - 19 - 4.5)
    assert found.saved_share == pytest.approx(found.saved_ms / (20 + 19 * ratio))


def test_with_one_by_calibrated_times_and_a_shorter_cache_saves_in_decoding_too() -> None:
    seen = replace(SEEN, decode_ms=50.0, decode_steps=20)
    found = forecast(batch([20], [5], latency=lambda: TIMES), None, seen)
    ratio = (10 + 0.3 * 105) / (10 + 0.3 * 25)
    assert found.calibrated and found.prefill_ms_unpruned == pytest.approx(19 * ratio)
    decode = 20 * 0.01 * 80
    assert found.saved_ms == pytest.approx(19 * ratio - 19 + decode - 4.5)
    assert found.saved_share == pytest.approx(found.saved_ms / (20 + 19 * ratio + 50 + decode))


def test_prompts_longer_than_calibrated_fall_back_on_flops_and_say_so() -> None:
    found = forecast(batch([20], [1], latency=lambda: replace(TIMES, longest=100)), None, SEEN)
    assert not found.calibrated


def test_text_only_rows_count_for_nothing() -> None:
    both = batch([20, 40], [5, 7])
    mixed = Batch(
        both.cost,
        Plan("m", "b", (both.plan.items[0], replace(both.plan.items[1], row=2)), 3),
        VisualLayout((both.layout.rows[0], (), both.layout.rows[1])),
        [5, 900, 7],
    )
    assert forecast(mixed, None, SEEN) == forecast(both, None, SEEN)


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, Budget(0.2), Budget.parse("20 tokens")])
def test_only_budgets_in_real_units_promise_anything(budget: Budget | None) -> None:
    assert forecast(batch([20], [5]), budget, SEEN).promise is None


def test_flops_are_promised_for_the_dearest_prompt_and_achieved_by_count() -> None:
    promise = forecast(batch([20, 40], [5, 7]), Budget(0.5, "flops"), SEEN).promise
    assert promise is not None
    assert promise.allowed == 0.5 * flops(107, 107, 107)
    assert promise.planned == promise.achieved == flops(47, 47, 47)
    assert str(promise).endswith(f"{in_words(promise.achieved, 'flops')} by the tokens kept")


def test_bytes_are_measured_per_row() -> None:
    seen = replace(SEEN, rows=4, kv_bytes=4 * 999)
    promise = forecast(batch([20, 40], [5, 7]), Budget(900, "bytes", relative=False), seen).promise
    assert promise is not None
    assert (promise.allowed, promise.planned, promise.achieved) == (900, 8 * (47 + 47 + 47), 999)
    no_cache = forecast(batch([20], [5]), Budget(900, "bytes", relative=False), SEEN).promise
    assert no_cache is not None and no_cache.achieved is None and "not measurable" in str(no_cache)


def test_milliseconds_are_measured_without_the_choosing_and_only_for_a_prompt_alone() -> None:
    alone, several = batch([20], [5], latency=lambda: TIMES), batch([20, 40], [5, 7], latency=lambda: TIMES)
    promise = forecast(alone, Budget(18, "ms", relative=False), SEEN).promise
    assert promise is not None
    assert (promise.allowed, promise.planned, promise.achieved) == (18, pytest.approx(17.5), 19)
    assert str(promise) == "18 ms allowed, 17.5 ms planned, took 19 ms"
    for of, rows in ((several, 2), (alone, 3)):
        promise = forecast(of, Budget(0.9, "ms"), replace(SEEN, rows=rows)).promise
        assert promise is not None and promise.achieved is None


# --- warnings --------------------------------------------------------------------------------------------------------


def test_what_pays_is_not_warned_about() -> None:
    assert told(batch([20], [5]), SEEN) == ""


def test_what_drops_nothing_is_told_in_one_sentence() -> None:
    text = told(batch([100, 100], [5, 7]), replace(SEEN, select_ms=1000.0))
    assert text == "nothing is dropped: all 200 visual tokens stay, so that nothing is saved"


@pytest.mark.parametrize(("took", "warned"), [(19.9, True), (19.7, False), (5.0, False)])
def test_a_prefill_well_over_its_milliseconds_is_told_with_what_to_do(took: float, warned: bool) -> None:
    of, seen = batch([20], [5], latency=lambda: TIMES), replace(SEEN, prefill_ms=took + 1)
    text = "\n".join(warnings_for(of, forecast(of, Budget(18, "ms", relative=False), seen), seen))
    assert ("missed budget: the prefill took" in text) == warned
    if warned:
        assert "took 19.9 ms, 11% more than the 18 ms allowed" in text and "vlm_budget.calibrate(model)" in text
    in_flops = forecast(of, Budget(0.1, "flops"), seen)
    assert not any("missed budget" in warning for warning in warnings_for(of, in_flops, seen))


def test_a_missed_promise_is_told_also_where_nothing_is_dropped() -> None:
    of, seen = batch([100], [5], latency=lambda: TIMES), replace(SEEN, prefill_ms=1000.0)
    first, second = warnings_for(of, forecast(of, Budget(100, "ms", relative=False), seen), seen)
    assert first.startswith("missed budget: the prefill took 999 ms") and second.startswith("nothing is dropped")


def test_overhead_that_eats_the_saving_is_named_with_both() -> None:
    text = told(batch([20], [5]), replace(SEEN, prefill_ms=2.0, drop_ms=0.0, select_ms=30.0))
    assert text.splitlines()[0].startswith("pruning is predicted not to pay: it makes a call of ")
    assert "ms slower" in text and "by FLOPs" in text
    assert "probes, selection, compaction and drops took 32.5 ms, the shorter prefill saves 7.68 ms" in text
    assert len(text.splitlines()) == 3  # the encoder takes most of the rest


def test_a_prompt_of_text_with_a_small_picture_is_named() -> None:
    text = told(batch([5], [900], side=4), replace(SEEN, encode_ms=2.0))
    assert "few visual tokens: the 16 of this prompt make 3% of the prefill's FLOPs" in text
    assert "little is dropped: the prefill has" in text


@pytest.mark.parametrize(("text", "few"), [(680, True), (600, False)])
def test_the_line_for_few_visual_tokens_lies_at_a_fifth_of_the_flops(text: int, few: bool) -> None:
    share = 1 - flops(text) / flops(text + 100)
    assert few == (share < 0.2) and 0.18 < share < 0.22
    found = told(batch([99], [text]), replace(SEEN, select_ms=1000.0))
    assert ("few visual tokens: the 100 of this prompt" in found) == few


def test_decode_bound_calls_say_how_much_there_is_to_save_at_most() -> None:
    text = told(batch([20], [5]), replace(SEEN, decode_ms=20_000.0, decode_steps=500))
    (first, second) = text.splitlines()
    assert "only 6" in first and "ms faster" in first
    assert second.startswith(
        "decode-bound: 500 decoding steps take 99% of the call; a shorter prefill can save 0% at most"
    )


def test_encoder_bound_calls_are_named() -> None:
    text = told(batch([20], [5]), replace(SEEN, encode_ms=9000.0))
    assert "encoder-bound: the vision encoder takes 99% of the call and runs in full" in text


def test_a_device_that_is_not_filled_is_named_where_a_calibration_shows_it() -> None:
    flat = replace(TIMES, fixed_ms=50.0, token_ms=0.001)
    text = told(batch([20], [5], latency=lambda: flat), SEEN)
    assert "by calibrated times" in text
    assert "short prompt: 79% fewer FLOPs make only 0% less time" in text
    assert "short prompt" not in told(batch([20], [5]), replace(SEEN, prefill_ms=1.0, drop_ms=0.0))


@pytest.mark.parametrize("saved", [0.049, 0.051])
def test_the_line_lies_at_a_twentieth_of_the_unpruned_call(saved: float) -> None:
    of = batch([20], [5])
    gross = 19 * (flops(105) / flops(25) - 1)
    # encode - probe + unpruned prefill = (gross - overhead) / saved
    encode = (gross - 4.5) / saved - (gross + 19) + 2
    assert (told(of, replace(SEEN, encode_ms=encode)) == "") == (saved > 0.05)


def test_a_pass_that_took_no_time_at_all_is_no_error() -> None:
    nothing = Measured(0, 0, 0, 0, 0, 0, 0, 0, 1, 0)
    assert forecast(batch([20], [5]), None, nothing).saved_share == 0
    assert "predicted not to pay" in told(batch([20], [5]), nothing)


# --- in reports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "unit"), [("60% flops", "flops"), ("60% kv", "bytes"), ("80% ms", "ms")])
@pytest.mark.parametrize("method", ["uniform", ["uniform", "fastv"]])
def test_a_report_tells_promise_and_achievement(
    method: Any, budget: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path))
    tiny = tiny_models.build("llava")
    base, family = tiny.model.model, family_of(tiny)
    replace(TIMES, samples=((1000, 100.0),)).save(Setting.of(base, family))
    with vlm_budget.patch(tiny.model, method, budget) as handle, torch.no_grad():
        tiny.model.generate(**row_inputs(tiny, 0), max_new_tokens=3, do_sample=False)
        report = handle.report()
        tiny.model.generate(**tiny.clone(), max_new_tokens=3, do_sample=False)
        assert handle.report().forecast is not None
    found = report.forecast
    assert found is not None and found.promise is not None and found.calibrated
    prices = CostModel.of(base, family)
    text = row_inputs(tiny, 0)["input_ids"].numel() - 72
    assert found.prefill_flops_unpruned == prices.prefill_flops(text, [72] * 3)
    assert found.prefill_flops == prices.prefill_flops(text, report.plan.row_tokens(0, 3))
    assert found.promise.unit == unit and found.promise.planned <= found.promise.allowed
    if unit == "bytes":
        assert found.promise.achieved == report.kv_bytes == found.promise.planned
    if unit == "ms":
        assert found.promise.achieved == report.prefill_ms - report.drop_ms
    assert str(found.promise) in str(report) and "predicted saving" in str(report)
    assert report.to_dict()["forecast"]["promise"]["allowed"] == found.promise.allowed
    assert all(f"warning: {warning}" in str(report) for warning in report.warnings)


def test_text_only_prompts_and_further_turns_have_no_forecast() -> None:
    tiny = tiny_models.build("llava")
    inputs = row_inputs(tiny, 0)
    with vlm_budget.patch(tiny.model, "uniform", "60% flops") as handle, torch.no_grad():
        cache = tiny.model(**inputs).past_key_values
        assert handle.report().forecast is not None
        ids = torch.cat([inputs["input_ids"], torch.tensor([[3, 4]])], 1)
        tiny.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
        assert handle.report().forecast is None and handle.report().warnings == ()
        tiny.model(input_ids=torch.tensor([[3, 4, 5]]))
        assert handle.report().forecast is None
