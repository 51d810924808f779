"""``run``: both columns, the picture of what was kept, and one JSON object."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from vlm_budget import PatchHandle, patch
from vlm_budget.budget import Budget
from vlm_budget.cli.compare import Setting, compare
from vlm_budget.cli.loading import Loaded, load
from vlm_budget.cli.options import build_methods
from vlm_budget.cli.progress import TokenClock
from vlm_budget.models import find_family
from vlm_budget.prompts import build_inputs, prompt_text
from vlm_budget.recipe import ModelFacts, Recipe
from vlm_budget.registry import PRUNERS
from vlm_budget.report import Report

Cli = Callable[..., Any]

QUICK = ("--repeats", 1, "--max-new-tokens", 3)
QUESTION = "what color is digit 7"
SIDE = {
    "answer": str,
    "visual_tokens": int,
    "mean_tokens": float,
    "new_tokens": int,
    "first_token_ms": float,
    "encode_ms": float,
    "selection_ms": float,
    "compact_ms": (int, float),
    "prefill_ms": float,
    "decode_ms_per_token": float,
    "kv_bytes": int,
}


class Silent:
    """A progress bar that shows nothing."""

    def begin(self, name: str) -> None: ...

    def token(self, count: int) -> None: ...

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    return load(str(tiny_model), "cpu", "float32", lambda name: None)


@pytest.fixture
def facts(cli: Cli, tiny_model: Path, poster: Path) -> dict[str, Any]:
    result = cli("run", poster, "-p", QUESTION, "--model", tiny_model, "--budget", "20%", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_json_is_one_object_with_the_documented_fields(facts: dict[str, Any], poster: Path) -> None:
    assert set(facts) == {
        *("command", "model", "method", "budget", "plan", "prompt", "images", "repeats", "full", "pruned", "ratio"),
        *("positions", "text_only", "promise", "warnings", "kept", "kept_picture"),
    }
    assert facts["model"]["class"] == "LlavaNextForConditionalGeneration"
    assert (facts["model"]["family"], facts["model"]["device"], facts["model"]["dtype"]) == (
        "llava_next",
        "cpu",
        "float32",
    )
    assert (facts["method"], facts["budget"], facts["positions"]) == ("HiRED()", "20%", "packed")
    assert facts["images"] == [{"file": str(poster), "width": 96, "height": 96}]
    for name in ("full", "pruned"):
        assert set(facts[name]) == set(SIDE)
        assert all(isinstance(facts[name][key], kind) for key, kind in SIDE.items()), facts[name]
        assert facts[name]["first_token_ms"] > facts[name]["prefill_ms"] > 0


def test_counts_agree_everywhere(facts: dict[str, Any]) -> None:
    assert (facts["full"]["visual_tokens"], facts["pruned"]["visual_tokens"]) == (192, 38)
    assert facts["ratio"]["visual_tokens"] == pytest.approx(192 / 38)
    assert facts["pruned"]["kv_bytes"] < facts["full"]["kv_bytes"]
    (kept,) = facts["kept"]
    assert (kept["tokens"], kept["kept"], len(kept["positions"])) == (192, 38, 38)
    assert sum(grid["kept"] for grid in kept["partitions"]) == 38
    assert [grid["kind"] for grid in kept["partitions"]] == ["thumbnail"] + ["crop"] * 4
    assert sum(grid["tokens"] for grid in kept["partitions"]) == 180


def test_the_drawing_is_written(facts: dict[str, Any], tmp_path: Path) -> None:
    assert facts["kept_picture"] == "kept.png"
    with Image.open(tmp_path / "kept.png") as page:
        assert page.format == "PNG"
        assert min(page.size) > 400


def test_the_table_shows_what_the_issue_asks_for(cli: Cli, tiny_model: Path, poster: Path, tmp_path: Path) -> None:
    result = cli("run", poster, "--model", tiny_model, "--method", "uniform", "--out", "mine.png", *QUICK)
    assert result.exit_code == 0, result.stderr
    for text in ("100%", "20%", "answer", "visual tokens", "192", "38", "prefill", "decode per token", "selection"):
        assert text in result.stdout
    assert "KV cache of the prompt" in result.stdout
    assert "mine.png" in result.stdout
    assert (tmp_path / "mine.png").is_file()
    assert result.stderr == ""


def test_names_with_brackets_are_shown_as_they_are(cli: Cli, tiny_model: Path, poster: Path) -> None:
    result = cli("run", poster, "--model", tiny_model, "--out", "[bold]x.png", *QUICK)
    assert "What was kept: [bold]x.png" in result.stdout


def test_text_only_runs_unpruned_and_says_so(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    result = cli("run", "-p", QUESTION, "--model", tiny_model, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "nothing to prune" in result.stdout
    facts = json.loads(cli("run", "-p", QUESTION, "--model", tiny_model, "--json", *QUICK).stdout)
    assert facts["text_only"] is True
    assert facts["full"]["answer"] == facts["pruned"]["answer"]
    assert (facts["kept"], facts["kept_picture"]) == ([], None)
    assert not (tmp_path / "kept.png").exists()


def test_several_pictures_share_one_prompt(cli: Cli, tiny_model: Path, poster: Path, tmp_path: Path) -> None:
    tall = tmp_path / "tall.png"
    Image.new("RGB", (50, 90), "red").save(tall)
    result = cli("run", poster, tall, "-p", QUESTION, "--model", tiny_model, "--budget", 100, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [entry["tokens"] for entry in facts["kept"]][0] == 192
    assert len(facts["kept"]) == 2
    assert sum(entry["kept"] for entry in facts["kept"]) == facts["pruned"]["visual_tokens"] == 100


def test_options_and_positions_reach_the_method(cli: Cli, tiny_model: Path, poster: Path) -> None:
    options = ("-o", "alpha=0", "-o", "newline=keep_all", "--positions", "original")
    facts = json.loads(cli("run", poster, "--model", tiny_model, "--json", *options, *QUICK).stdout)
    assert facts["method"] == "HiRED(newline='keep_all', alpha=0.0)"
    assert facts["positions"] == "original"
    assert facts["kept"][0]["partitions"][0]["kept"] == 0


@pytest.mark.parametrize(("budget", "unit"), [("40% flops", "flops"), ("30 kB kv", "bytes")])
def test_a_budget_in_real_units_shows_promise_and_achievement(
    cli: Cli, tiny_model: Path, poster: Path, budget: str, unit: str
) -> None:
    arguments = ("run", poster, "--model", tiny_model, "--budget", budget, *QUICK)
    promise = json.loads(cli(*arguments, "--json").stdout)["promise"]
    assert promise["unit"] == unit and promise["planned"] <= promise["allowed"]
    assert promise["achieved"] == pytest.approx(promise["planned"])
    shown = cli(*arguments).stdout
    took = " by the tokens kept" if unit == "flops" else "took "
    assert f"{Budget.parse(budget)}: " in shown and " allowed, " in shown and " planned, " in shown and took in shown


def test_a_full_budget_gives_the_same_answer(cli: Cli, tiny_model: Path, poster: Path) -> None:
    facts = json.loads(cli("run", poster, "--model", tiny_model, "--budget", "100%", "--json", *QUICK).stdout)
    assert facts["full"]["answer"] == facts["pruned"]["answer"]
    assert facts["full"]["visual_tokens"] == facts["pruned"]["visual_tokens"] == 192


def test_both_columns_are_what_the_library_gives(loaded: Loaded, poster: Path) -> None:
    inputs = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)

    def answer() -> str:
        with torch.no_grad():
            ids = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return loaded.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    setting = Setting(build_methods("hired", []), Budget.parse("10%"), "original", 4, 2)
    found = compare(loaded, inputs, setting, Silent())  # type: ignore[arg-type]
    assert found.full.answer == answer()
    with patch(loaded.model, "hired", 0.1, positions="original") as handle:
        assert found.pruned.answer == answer()
        assert [entry.positions for entry in found.kept] == [entry.positions for entry in handle.kept()]
    assert found.positions == "original"


def test_the_model_is_unpatched_afterwards(loaded: Loaded, poster: Path) -> None:
    hooks = sum(len(module._forward_pre_hooks) for module in loaded.model.modules())
    inputs = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)
    compare(loaded, inputs, Setting(build_methods("random", []), Budget.parse(9), None, 1, 1), Silent())  # type: ignore[arg-type]
    assert sum(len(module._forward_pre_hooks) for module in loaded.model.modules()) == hooks == 0


def test_times_are_medians_over_the_repeats(loaded: Loaded, poster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([900.0, 900.0] + [value for value in (5.0, 1.0, 3.0) for _ in range(3)])

    class FakeClock(TokenClock):
        def __init__(self, on_token: Callable[[int], None]) -> None:
            super().__init__(on_token)
            self.planned = next(times)

        @property
        def first_token_ms(self) -> float:
            return self.planned

        @first_token_ms.setter
        def first_token_ms(self, value: float) -> None: ...

    monkeypatch.setattr("vlm_budget.cli.compare.TokenClock", FakeClock)
    inputs = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)
    setting = Setting(build_methods("random", []), Budget.parse(9), None, 1, 3)
    found = compare(loaded, inputs, setting, Silent())  # type: ignore[arg-type]
    assert (found.full.first_token_ms, found.pruned.first_token_ms) == (3.0, 3.0)
    assert next(times, None) is None, "fewer runs than were announced to the progress bar"


def test_warnings_and_promise_are_of_the_repeat_in_the_middle(
    loaded: Loaded, poster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([(10.0, "one"), (5.0, "two"), (99.0, "three")])
    honest = PatchHandle.report

    def report(handle: PatchHandle) -> Report:
        found = honest(handle)
        if found.kept_tokens == found.visual_tokens:
            return found
        ms, warning = next(told)
        assert found.forecast is not None and found.forecast.promise is not None
        promise = replace(found.forecast.promise, achieved=ms)
        return replace(found, prefill_ms=ms, warnings=(warning,), forecast=replace(found.forecast, promise=promise))

    monkeypatch.setattr(PatchHandle, "report", report)
    inputs = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)
    setting = Setting(build_methods("random", []), Budget.parse("40% flops"), None, 1, 3)
    found = compare(loaded, inputs, setting, Silent())  # type: ignore[arg-type]
    assert found.warnings == ("one",)
    assert found.promise is not None and found.promise.achieved == found.pruned.prefill_ms == 10.0


# --- inside the language model ---------------------------------------------------------------------------------------


def test_a_method_whose_fields_say_it_all_needs_no_budget(
    cli: Cli, tiny_model: Path, poster: Path, tmp_path: Path
) -> None:
    fixed = ("run", poster, "--model", tiny_model, "--method", "fastv", "-o", "k=1", "-o", "r=0.5", *QUICK)
    result = cli(*fixed)
    assert result.exit_code == 0, result.stderr
    assert "FastV(k=1, r=0.5), a fixed schedule" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "mean over the decoder layers" in line)
    assert all(number in row for number in ("192", "144", "1.33x"))
    assert (tmp_path / "kept.png").is_file()
    facts = json.loads(cli(*fixed, "--json").stdout)
    assert facts["budget"] is None and facts["method"] == "FastV(k=1, r=0.5)"
    assert (facts["pruned"]["visual_tokens"], facts["pruned"]["mean_tokens"]) == (192, 144)
    assert facts["ratio"]["mean_tokens"] == pytest.approx(192 / 144)
    assert facts["kept"][0]["steps"] == [{"layer": 1, "kept": 96}]
    refused = cli(*fixed, "--budget", "20%")
    assert refused.exit_code == 1 and "Leave --budget out" in refused.stderr and "Budget(" not in refused.stderr


def test_two_methods_run_within_one_budget(cli: Cli, tiny_model: Path, poster: Path) -> None:
    arguments = ("--method", "hired+fastv", "-o", "k=1", "--budget", "50%", "--json", *QUICK)
    result = cli("run", poster, "--model", tiny_model, *arguments)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["method"] == "HiRED() + FastV(k=1)"
    assert 96 > facts["pruned"]["mean_tokens"] - 1e-9 > 90
    assert 192 > facts["pruned"]["visual_tokens"] > 96
    alone = cli("run", poster, "--model", tiny_model, "--budget", "50%", *QUICK).stdout
    assert "mean over the decoder layers" not in alone


def test_nothing_left_behind_a_layer_is_drawn_as_the_layers_before_it(
    cli: Cli, tiny_model: Path, poster: Path, tmp_path: Path
) -> None:
    result = cli("run", poster, "--model", tiny_model, "--method", "vtw", "--budget", "50%", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "kept.png").is_file()


# --- plans -----------------------------------------------------------------------------------------------------------


def written(loaded: Loaded, file: Path, tokens: int) -> Path:
    """A recipe for prompts of so many visual tokens."""
    _, base, _ = find_family(loaded.model)
    methods = [PRUNERS.get("hired")(alpha=0.2), PRUNERS.get("fastv")(k=1)]
    Recipe.of(methods, Budget(0.4), ModelFacts.of(base, [tokens])).save(file)
    return file


def test_a_plan_says_methods_options_and_budget(
    cli: Cli, loaded: Loaded, tiny_model: Path, poster: Path, tmp_path: Path
) -> None:
    plan = written(loaded, tmp_path / "plan.json", 192)
    result = cli("run", poster, "--model", tiny_model, "--plan", plan, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["method"], facts["budget"], facts["plan"]) == ("HiRED(alpha=0.2) + FastV(k=1)", "40%", str(plan))
    assert facts["pruned"]["mean_tokens"] <= 0.4 * 192 + 1
    assert not any("calibrated on" in warning for warning in facts["warnings"])
    demo = cli("demo", "--model", tiny_model, "--plan", plan, "--repeats", 1, "--max-new-tokens", 1)
    assert demo.exit_code == 0, demo.stderr
    assert "HiRED(alpha=0.2) + FastV(k=1) at 40%, by the plan" in demo.stdout
    assert " tokens a layer" in demo.stdout


def test_a_plan_made_on_other_prompts_is_warned_of(
    cli: Cli, loaded: Loaded, tiny_model: Path, poster: Path, tmp_path: Path
) -> None:
    plan = written(loaded, tmp_path / "plan.json", 20)
    result = cli("run", poster, "--model", tiny_model, "--plan", plan, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "was calibrated on 20" in result.stdout


def test_a_plan_that_cannot_be_used_is_refused_before_the_model_loads(
    cli: Cli, loaded: Loaded, poster: Path, tmp_path: Path
) -> None:
    inputs = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)
    with patch(loaded.model, "hired", 0.2) as handle:
        handle.plan(**inputs).save(tmp_path / "batch.json")
    plan = written(loaded, tmp_path / "plan.json", 192)
    for arguments, message in (
        (("--plan", "gone.json"), "gone.json"),
        (("--plan", "batch.json"), "holds the counts of one batch"),
        (("--plan", plan, "--budget", "20%"), "leave out --budget"),
        (("--plan", plan, "--method", "hired", "-o", "alpha=0"), "leave out --method and --option"),
    ):
        result = cli("run", poster, "--model", "./no-such-model", *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr and result.stderr.count("\n") == 1


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_chat_template_gives_the_prompt_of_training(loaded: Loaded, poster: Path) -> None:
    inputs = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)
    direct = loaded.processor(images=[Image.open(poster)], text=f"<image> {QUESTION}", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], direct["input_ids"])
    assert torch.equal(inputs["pixel_values"], direct["pixel_values"])


def test_without_a_template_image_tokens_go_in_front(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.processor, "chat_template", None)
    assert prompt_text(loaded.processor, "why", 2) == "<image><image>why"
    assert prompt_text(loaded.processor, "why", 0) == "why"


def test_a_prompt_with_image_tokens_is_taken_as_it_is(loaded: Loaded) -> None:
    assert prompt_text(loaded.processor, "USER: <image> why", 1) == "USER: <image> why"


def test_a_template_that_starts_the_text_gets_no_second_start_token(
    loaded: Loaded, poster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.processor, "chat_template", "<s><image>{{ messages[0]['content'][1]['text'] }}")
    ids = build_inputs(loaded.processor, [QUESTION], [[Image.open(poster)]], loaded.model)["input_ids"][0].tolist()
    assert ids.count(loaded.processor.tokenizer.bos_token_id) == 1


def test_a_batch_is_padded_on_the_left(loaded: Loaded, poster: Path) -> None:
    picture = Image.open(poster)
    inputs = build_inputs(loaded.processor, [QUESTION, "digit"], [[picture], [picture]], loaded.model)
    assert inputs["attention_mask"][1].tolist()[0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_pixels_take_the_models_number_format(tiny_model: Path, poster: Path) -> None:
    half = load(str(tiny_model), "cpu", "bfloat16", lambda name: None)
    inputs = build_inputs(half.processor, [QUESTION], [[Image.open(poster)]], half.model)
    assert inputs["pixel_values"].dtype == half.model.dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


def test_every_supported_class_is_one_that_the_loader_makes() -> None:
    from vlm_budget.registry import FAMILIES

    made = set(transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    assert {FAMILIES.get(name).models[0] for name in FAMILIES} <= made
