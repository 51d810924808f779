"""Calibrations: what is measured, how it is fitted, kept, found again and refused."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
import vlm_budget.calibration as calibration
from tiny_encoders import family_of
from tiny_models import Tiny, row_inputs
from vlm_budget.errors import BudgetError, LatencyError, PatchError
from vlm_budget.latency import Latency, SavedLatency, Setting

LATENCY = Latency(5.0, 0.01, 1e-5, 0.02, 64, 1.5, 0.001, 512, 0.03, ((64, 7.0), (512, 60.5)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny() -> Tiny:
    return tiny_models.build("llava")


def setting_of(tiny: Tiny) -> Setting:
    return Setting.of(tiny.model.model, family_of(tiny))


def quick(tiny: Tiny) -> Latency:
    return vlm_budget.calibrate(tiny.model, longest=128, repeats=1)


# --- the model of time -----------------------------------------------------------------------------------------------


def test_a_prediction_adds_up_the_layers() -> None:
    by_hand = 5.0 + sum(0.01 * n + 1e-5 * n * n + 0.02 * max(0, n - 64) for n in (500, 100, 10))
    assert LATENCY.prefill_ms([500, 100, 10]) == pytest.approx(by_hand)
    assert LATENCY.decode_ms(300) == pytest.approx(1.8)


def test_a_prompt_longer_than_measured_is_refused_with_what_to_run() -> None:
    LATENCY.prefill_ms([512] * 3)
    with pytest.raises(LatencyError, match=r"513 tokens is longer .* \(512\)\. Run .*calibrate\(model, longest=513\)"):
        LATENCY.prefill_ms([3, 513])


LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def fitted(times: Sequence[float], layers: int = 4) -> Latency:
    return calibration.fit(list(zip(LENGTHS, times, strict=True)), [(16, 2.0), (1024, 3.0)], layers)


@pytest.mark.parametrize(
    "truth",
    [
        lambda n: 3 + 0.02 * n + 1e-5 * n * n,
        lambda n: 0.05 * n,
        lambda n: 7.0,
        lambda n: 1e-4 * n * n,
        lambda n: 20 + 0.1 * max(0, n - 256),
        lambda n: 20 + 2e-5 * n * n + 0.1 * max(0, n - 128),
    ],
)
def test_a_fit_finds_what_made_the_times(truth: Any) -> None:
    found = fitted([truth(n) for n in LENGTHS])
    assert found.worst < 1e-6
    for n in (20, 100, 200, 400, 900):
        if not 100 <= n <= 300:  # the bend lies at one of the lengths
            assert found.prefill_ms([n] * 4) == pytest.approx(truth(n), rel=1e-6)


def test_a_fit_of_noisy_times_grows_with_every_token_and_says_how_far_off_it_is() -> None:
    noise = [1.1, 0.9, 1.08, 0.93, 1.05, 0.95, 1.1]
    times = [(4 + 0.03 * n + 2e-5 * n * n) * wrong for n, wrong in zip(LENGTHS, noise, strict=True)]
    found = fitted(times)
    grid = [found.prefill_ms([n] * 4) for n in range(1, 1025)]
    assert grid == sorted(grid) and min(found.token_ms, found.pair_ms, found.knee_ms, found.fixed_ms) >= 0
    off = [abs(found.prefill_ms([n] * 4) / ms - 1) for n, ms in zip(LENGTHS, times, strict=True)]
    assert found.worst == pytest.approx(max(off)) and 0.02 < found.worst < 0.15


def test_times_that_fall_with_the_length_are_fitted_by_a_constant() -> None:
    found = fitted([9, 8, 7, 6, 5, 4, 3])
    assert found.prefill_ms([16] * 4) == found.prefill_ms([1000] * 4) > 3


@pytest.mark.parametrize("layers", [1, 4, 40])
def test_a_uniform_prompt_costs_the_same_however_many_layers_share_it(layers: int) -> None:
    times = [3 + 0.02 * n + 1e-5 * n * n for n in LENGTHS]
    assert fitted(times, layers).prefill_ms([300] * layers) == pytest.approx(3 + 6 + 0.9)


def test_decoding_steps_are_a_line_that_never_falls() -> None:
    points = [(n, 1.0 * n) for n in LENGTHS]
    rising = calibration.fit(points, [(16, 2.0), (1024, 3.008)], 2)
    assert rising.step_token_ms == pytest.approx(0.001) and rising.decode_ms(1024) == pytest.approx(3.008)
    assert calibration.fit(points, [(16, 2.0), (1024, 1.0)], 2).decode_ms(5000) == 2.0


# --- measuring -------------------------------------------------------------------------------------------------------


def test_calibrate_measures_halves_down_from_the_longest_and_keeps_the_result(tiny: Tiny, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = vlm_budget.calibrate(tiny.model, longest=200, repeats=2, progress=lambda *done: seen.append(done))
    assert [n for n, _ in found.samples] == [25, 50, 100, 200] and found.longest == 200
    assert all(ms > 0 for _, ms in found.samples) and found.step_ms > 0
    assert seen == [(run + 1, 12) for run in range(12)]
    assert Latency.load(setting_of(tiny)) == found
    assert [file.parent for file in folder.rglob("*") if file.is_file()] == [folder / "latency"]


def test_no_prompt_is_longer_than_the_model_has_positions_for(tiny: Tiny) -> None:
    tiny.model.config.text_config.max_position_embeddings = 96
    assert vlm_budget.calibrate(tiny.model, repeats=1).longest == 96


def test_medians_are_taken_round_by_round(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def run(decoder: Any, embeds: torch.Tensor, cache: Any) -> tuple[float, Any]:
        calls.append(embeds.shape[1])
        warm = 1000.0 if len(calls) <= 3 else 0.0
        return warm + embeds.shape[1] + {0: 0.0, 1: 50.0, 2: -1.0}[(len(calls) // 3) % 3], None

    monkeypatch.setattr(calibration, "_run", run)
    found = vlm_budget.calibrate(tiny.model, longest=64, repeats=3)
    assert calls[:6] == [16, 32, 64, 16, 32, 64]
    assert all(ms < 1000 for _, ms in found.samples)


def test_the_model_is_left_exactly_as_it_was(tiny: Tiny) -> None:
    from fingerprint import fingerprint

    tiny.model.train()
    tiny.model.model.language_model.layers[1].eval()
    modes = [module.training for module in tiny.model.modules()]
    before, state = fingerprint(tiny.model), torch.get_rng_state()
    quick(tiny)
    assert [module.training for module in tiny.model.modules()] == modes
    assert fingerprint(tiny.model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_a_failure_on_the_way_leaves_it_so_too(tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model.train()

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_run", fail)
    with pytest.raises(KeyboardInterrupt):
        quick(tiny)
    assert all(module.training for module in tiny.model.modules()) and torch.is_grad_enabled()
    assert not any(file.is_file() for file in folder.rglob("*"))


def test_a_patched_model_is_refused_and_stays_patched(tiny: Tiny) -> None:
    with vlm_budget.patch(tiny.model, "uniform", 0.5) as handle:
        with pytest.raises(PatchError, match=r"unpatched model.*handle\.undo\(\)"):
            quick(tiny)
        assert handle.active
    quick(tiny)


@pytest.mark.parametrize(
    "arguments", [{"longest": 63}, {"longest": 4096.0}, {"longest": True}, {"repeats": 0}, {"repeats": "3"}]
)
def test_arguments_that_cannot_be_used_are_refused(tiny: Tiny, arguments: dict[str, Any]) -> None:
    with pytest.raises(LatencyError, match=f"{next(iter(arguments))} must be a whole number of at least"):
        vlm_budget.calibrate(tiny.model, **arguments)


def test_a_prompt_that_does_not_fit_is_told_with_a_way_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(tiny.model.model.language_model, "forward", full)
    with pytest.raises(LatencyError, match=r"does not fit into the memory of cpu.*smaller longest="):
        quick(tiny)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "idefics3", "paligemma", "gemma3", "internvl"])
def test_every_kind_of_language_model_can_be_calibrated(name: str) -> None:
    assert quick(tiny_models.build(name)).longest == 128


# --- kept and found --------------------------------------------------------------------------------------------------


def test_a_budget_in_milliseconds_finds_the_calibration_of_this_machine(tiny: Tiny) -> None:
    LATENCY.save(setting_of(tiny))
    inputs = row_inputs(tiny, 0)  # 72 visual tokens and 5 of text, 3 layers
    full = LATENCY.prefill_ms([77] * 3)
    with vlm_budget.patch(tiny.model, "uniform", "7 ms") as handle, torch.no_grad():
        keep = handle.plan(**inputs).keep
        assert LATENCY.prefill_ms([5 + keep] * 3) <= 7 < LATENCY.prefill_ms([5 + keep + 1] * 3) < full
        tiny.model(**inputs)
        assert handle.report().kept_tokens == keep


def test_without_a_calibration_patching_says_what_to_run_and_what_was_looked_for(tiny: Tiny, folder: Path) -> None:
    for budget in ("80 ms", "50% ms"):
        with pytest.raises(BudgetError) as caught:
            vlm_budget.patch(tiny.model, "uniform", budget)
        for part in ("vlm_budget.calibrate(model)", str(folder), "LlamaModel", "float32", "sdpa", "threads", "torch"):
            assert part in str(caught.value)
    assert not hasattr(tiny.model.model, "_vlm_budget_handle")


def test_a_calibration_in_another_setting_is_named_and_not_used(tiny: Tiny) -> None:
    LATENCY.save(replace(setting_of(tiny), threads=7, attention="eager"))
    with pytest.raises(LatencyError, match=r"There is one for attention eager, threads 7\."):
        vlm_budget.patch(tiny.model, "uniform", "80 ms")


@pytest.mark.parametrize(
    "change",
    [
        lambda tiny: tiny.model.to(torch.bfloat16),
        lambda tiny: tiny.model.set_attn_implementation("eager"),
        lambda tiny: tiny.model.model.language_model.layers.append(torch.nn.Linear(2, 2)),
        lambda tiny: setattr(tiny.model.config.text_config, "sliding_window", 5),
    ],
)
def test_what_changes_the_speed_changes_the_setting(tiny: Tiny, change: Any) -> None:
    before = setting_of(tiny).file
    change(tiny)
    assert setting_of(tiny).file != before


def test_what_does_not_change_the_speed_does_not(tiny: Tiny) -> None:
    before = setting_of(tiny)
    tiny.model.train()
    tiny.model.model.language_model.config._name_or_path = "elsewhere"
    with vlm_budget.patch(tiny.model, "uniform", 0.5):
        assert setting_of(tiny) == before


def test_threads_count_on_the_cpu(tiny: Tiny) -> None:
    assert setting_of(tiny).threads == torch.get_num_threads()


def test_a_change_after_the_first_use_is_noticed(tiny: Tiny) -> None:
    LATENCY.save(setting_of(tiny))
    saved = SavedLatency(tiny.model.model, family_of(tiny))
    assert saved() == LATENCY and saved() is saved()
    tiny.model.set_attn_implementation("eager")
    with pytest.raises(LatencyError, match="There is one for attention sdpa"):
        saved()


DAMAGED = [
    "",
    "{",
    "[]",
    "null",
    "{}",
    "\x00\xff",
    lambda data: data | {"version": 99},
    lambda data: {**data, "setting": {**data["setting"], "threads": 99}},
    lambda data: {**data, "latency": {**data["latency"], "extra": 1}},
    lambda data: {**data, "latency": {k: v for k, v in data["latency"].items() if k != "bend"}},
    lambda data: {**data, "latency": {**data["latency"], "samples": [3]}},
    lambda data: {**data, "latency": {**data["latency"], "token_ms": "fast"}},
    lambda data: {**data, "latency": {**data["latency"], "token_ms": -1.0}},
    lambda data: {**data, "latency": {**data["latency"], "longest": float("nan")}},
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_told_and_replaced_by_the_next_calibration(tiny: Tiny, damage: Any) -> None:
    file = LATENCY.save(setting_of(tiny))
    text = damage if isinstance(damage, str) else json.dumps(damage(json.loads(file.read_text())))
    file.write_text(text, encoding="latin-1")
    with pytest.raises(
        LatencyError, match=r"is damaged .*Run vlm_budget\.calibrate\(model\), which replaces it"
    ) as told:
        vlm_budget.patch(tiny.model, "uniform", "80 ms")
    assert str(file) in str(told.value)
    quick(tiny)
    Latency.load(setting_of(tiny))


def test_damaged_neighbours_are_no_matter(tiny: Tiny) -> None:
    file = LATENCY.save(setting_of(tiny))
    (file.parent / "LlamaModel-0123456789abcdef.json").write_text("{")
    assert Latency.load(setting_of(tiny)) == LATENCY
    file.unlink()
    with pytest.raises(LatencyError, match=r"transformers [\d.]+\.$"):
        Latency.load(setting_of(tiny))


def test_a_folder_that_cannot_be_written_is_told_before_the_work_is_lost(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(calibration, "_run", lambda *_: pytest.fail("measured for nothing"))
    with pytest.raises(LatencyError, match=r"cannot keep the calibration in .*\$VLM_BUDGET_CACHE"):
        quick(tiny)


def test_the_folder_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vlm_budget.machine import cache_folder

    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("VLM_BUDGET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "vlm-budget"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vlm-budget"


def test_a_reader_never_sees_half_a_file(tiny: Tiny, folder: Path) -> None:
    setting = setting_of(tiny)
    other = replace(LATENCY, samples=tuple((n, float(n)) for n in range(1, 4000)))
    LATENCY.save(setting)
    done = threading.Event()

    def write() -> None:
        for turn in range(40):
            (other if turn % 2 else LATENCY).save(setting)
        done.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not done.is_set():
        assert Latency.load(setting) in (LATENCY, other)
    for writer in writers:
        writer.join()
    assert [file.suffix for file in (folder / "latency").iterdir()] == [".json"]
