"""Calibration data: every fault is said, before a model runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_parts import IMAGE
from vlm_budget.errors import CalibrationError, ImageError, VLMBudgetError
from vlm_budget.eval import nano
from vlm_budget.eval.nano.data import test_set as posters
from vlm_budget.search.data import load_jsonl, prepare

from .conftest import Case, make_case


@pytest.fixture
def idle(case: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A model that must not run."""

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran before the data was checked")

    for module in (case.model, case.model.model, case.model.model.vision_tower):
        monkeypatch.setattr(module, "forward", fails)
    return case


def test_prompts_tokens_and_answers_are_read(idle: Case) -> None:
    found = prepare(idle.model, idle.data)
    assert len(found.examples) == 6
    for example, given in zip(found.examples, idle.data, strict=True):
        assert example.answer == (3, 4)
        assert example.visual == int((given["input_ids"] == IMAGE).sum())
        assert example.text == given["input_ids"].numel() - example.visual
        assert "answer" not in example.inputs


def test_the_hash_is_of_everything_that_is_judged(idle: Case) -> None:
    found = prepare(idle.model, idle.data).hash
    assert prepare(idle.model, [dict(one) for one in idle.data]).hash == found
    changes: list[Callable[[list[dict[str, Any]]], object]] = [
        lambda data: data[0].update(answer=[3, 5]),
        lambda data: data[5].update(pixel_values=data[5]["pixel_values"] + 1e-6),
        lambda data: data[2].update(input_ids=data[2]["input_ids"] ^ (data[2]["input_ids"] < 60).long()),
        lambda data: data.reverse(),
        lambda data: data.pop(),
    ]
    for change in changes:
        data = [dict(one) for one in idle.data]
        change(data)
        assert prepare(idle.model, data).hash != found


def without_image(one: dict[str, Any]) -> None:
    one["input_ids"] = torch.tensor([[5, 6, 7]])
    one["attention_mask"] = torch.ones(1, 3, dtype=torch.long)
    del one["pixel_values"]


def padded(one: dict[str, Any]) -> None:
    one["attention_mask"] = one["attention_mask"].clone()
    one["attention_mask"][0, 0] = 0


FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (without_image, "prompt 1 has no image or video"),
    (padded, "prompt 1 is padded"),
    (lambda one: one.pop("input_ids"), "prompt 1: input_ids must be .* missing"),
    (lambda one: one.update(input_ids=one["input_ids"][0]), "prompt 1: input_ids must be"),
    (lambda one: one.update(pixel_values=one["pixel_values"][:1]), "prompt 1 does not fit the model"),
    (lambda one: one.update(answer="red"), "prompt 1 has its answer as text: pass the tokenizer"),
    (lambda one: one.update(answer=[0.5]), "prompt 1: an answer is text or token ids"),
    (lambda one: one.update(answer=5), "prompt 1: an answer is text or token ids, .* got 5"),
    (lambda one: one.update(answer=True), "prompt 1: an answer is text or token ids, .* got True"),
    (lambda one: one.update(answer={"a": 1}), "prompt 1: an answer is text or token ids"),
    (lambda one: one.update(answer=[3, 10**6]), "prompt 1: its answer has token 1000000, .* vocabulary ends at"),
    (lambda one: one.update(answer=[-1]), "prompt 1: its answer has token -1"),
    (lambda one: one["input_ids"].view(-1)[:1].fill_(10**6), "prompt 1: its prompt has token 1000000"),
    (lambda one: one.update(input_ids=one["input_ids"].float()), "prompt 1: input_ids must be whole numbers"),
    (lambda one: one["pixel_values"].view(-1)[-1:].fill_(float("nan")), "prompt 1: pixel_values .* not finite"),
    (lambda one: one["pixel_values"].view(-1)[:1].fill_(float("inf")), "prompt 1: pixel_values .* not finite"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_a_prompt_that_cannot_be_used_is_named(
    idle: Case, fault: Callable[[dict[str, Any]], object], message: str
) -> None:
    fault(idle.data[1])
    with pytest.raises(CalibrationError, match=message):
        prepare(idle.model, idle.data)


def test_an_empty_set_is_refused(idle: Case) -> None:
    with pytest.raises(CalibrationError, match="the calibration set is empty"):
        prepare(idle.model, [])
    with pytest.raises(CalibrationError, match="prompt 0 is a str"):
        prepare(idle.model, ["a picture"])  # type: ignore[list-item]
    with pytest.raises(CalibrationError, match="prompt 0 is an int"):
        prepare(idle.model, [1])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("data", "kind"), [(None, "a NoneType"), ("calib.jsonl", "a str"), (5, "an int"), ({}, "a dict")]
)
def test_what_is_no_list_of_prompts_is_refused(idle: Case, data: Any, kind: str) -> None:
    with pytest.raises(CalibrationError, match=f"calibration data is a list of prompts, .* got {kind}"):
        prepare(idle.model, data)


def test_a_generator_is_as_good_as_a_list(idle: Case) -> None:
    assert prepare(idle.model, (one for one in idle.data)).hash == prepare(idle.model, idle.data).hash


def test_answers_may_be_any_whole_numbers(idle: Case) -> None:
    for answer in (torch.tensor([3, 4]), (3, 4), np.array([3, 4]), (token for token in (3, 4))):
        idle.data[0]["answer"] = answer
        assert prepare(idle.model, idle.data).examples[0].answer == (3, 4)


def test_labels_are_asked_for_only_by_metrics_that_need_them(idle: Case) -> None:
    del idle.data[2]["answer"]
    assert prepare(idle.model, idle.data).examples[2].answer == ()
    with pytest.raises(CalibrationError, match="1 of 6 calibration prompts have no answer, prompt 2 the first"):
        prepare(idle.model, idle.data, labelled=True)


def test_prompts_of_too_different_sizes_are_refused(idle: Case) -> None:
    least, most = sorted({example.visual for example in prepare(idle.model, idle.data).examples})
    assert most == 2 * least
    prepare(idle.model, idle.data, max_spread=2)
    with pytest.raises(CalibrationError, match=f"between {least} and {most} visual tokens, more than 1.9 times apart"):
        prepare(idle.model, idle.data, max_spread=1.9)


def test_data_of_another_model_is_refused() -> None:
    other = make_case("qwen2_vl")
    with pytest.raises(CalibrationError, match="prompt 0"):
        prepare(make_case("llava").model, other.data)


# --- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: list[Any]) -> Path:
    for index, sample in enumerate(posters(2)):
        sample.image.save(folder / f"{index}.png")
    path = folder / "calib.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_file_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    model, processor = nano.load("nano")
    asked = [sample.questions[0] for sample in posters(2)]
    rows = [{"image": f"{i}.png", "prompt": q.prompt, "answer": q.answer} for i, q in enumerate(asked)]
    data = load_jsonl(write(tmp_path, [rows[0], "", rows[1]]), processor, model)
    found = prepare(model, data, tokenizer=processor.tokenizer, labelled=True)
    assert found.tokens == [192, 192]
    assert [processor.tokenizer.decode(example.answer) for example in found.examples] == [q.answer for q in asked]


GOOD = {"image": "0.png", "prompt": "what"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no prompts"),
        (["", " "], "holds no prompts"),
        ([GOOD, {"image": "0.png"}], "line 2 has no 'prompt'"),
        ([{"prompt": "what"}], "line 1 has no 'image'"),
        ([GOOD, "{"], "line 2 is no calibration prompt"),
        (["[1]"], "line 1 is no calibration prompt: it is a list, not an object with prompt and image"),
        (["[" * 100_000], "line 1 is no calibration prompt"),
        ([{**GOOD, "answer": 5}], "line 1 is no calibration prompt: an answer is text or .* got 5"),
        ([{**GOOD, "answer": True}], "line 1 is no calibration prompt: an answer is text or"),
        ([{"images": [], "prompt": "what"}], "line 1 is no calibration prompt"),
        ([{**GOOD, "prompt": 3}], "line 1 is no calibration prompt"),
        ([{**GOOD, "image": f"gone{i}.png"} for i in range(5)], r"missing: .*gone0\.png, .* and 2 more"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_jsonl(write(tmp_path, rows), None, None)


def test_a_missing_file_and_a_broken_picture_are_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot read calibration file"):
        load_jsonl(tmp_path / "nowhere.jsonl", None, None)
    path = write(tmp_path, [GOOD])
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(ImageError) as caught:
        load_jsonl(path, None, None)
    assert isinstance(caught.value, VLMBudgetError)
