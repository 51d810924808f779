"""What all adapters share: batches, stops, likelihoods, and what a question may hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_budget
from vlm_budget.errors import OptionError, RunError, TaskError, UnknownNameError
from vlm_budget.eval.adapters.answerer import Answerer, Setting, _halving
from vlm_budget.eval.adapters.decoding import Decoding, sampling
from vlm_budget.eval.adapters.meter import Meter, check_report, write_report
from vlm_budget.eval.adapters.turn import Prompts, Turn
from vlm_budget.eval.nano import load
from vlm_budget.eval.sample import Clip, Picture
from vlm_budget.prompts import build_inputs

WORD = Decoding(1)


@pytest.fixture(scope="module")
def hired() -> Answerer:
    return Answerer(Setting(method="hired", budget=0.4))


def turn(image: Any, text: str) -> Turn:
    return Turn.marked(text, [Picture("page", image)])


@pytest.mark.parametrize("batch", [1, 8])
def test_answers_are_those_of_a_model_patched_and_asked_by_hand(
    hired: Answerer, asked: Any, direct: dict[str, list[str]], batch: int
) -> None:
    turns = [turn(image, question.prompt) for image, question in asked]
    assert hired.answer(turns, WORD, batch) == direct["hired"]


def test_a_mixed_batch_comes_back_in_its_own_order(hired: Answerer, asked: Any) -> None:
    (first, one), (second, other) = asked[0], asked[7]
    turns = [
        Turn(("what color is digit 7",)),
        turn(first, one.prompt),
        Turn((Picture("a", first), "is", Picture("b", second), one.prompt)),
        turn(second, other.prompt),
    ]
    alone = [hired.answer([each], WORD)[0] for each in turns]
    told: list[int] = []
    assert hired.answer(turns, WORD, 8, told.append) == alone
    assert sum(told) == 4
    assert alone[1] != alone[3]


def test_the_meter_counts_what_the_handle_reports(asked: Any) -> None:
    answerer = Answerer(Setting(method="hired", budget=0.4))
    image, question = asked[0]
    answerer.answer([turn(image, question.prompt)] * 3, WORD, 2)
    facts = answerer.facts()
    assert facts["prompts"] == 3 and facts["visual_tokens"] == 192 and facts["new_tokens"] == 1
    assert facts["kept_tokens"] == facts["kept_tokens_over_layers"] == 77
    assert facts["ms"]["total"] >= facts["ms"]["prefill"] > 0
    json.dumps(facts)


def test_a_method_inside_the_model_counts_what_its_layers_see(asked: Any) -> None:
    answerer = Answerer(Setting(method="fastv", budget=0.75))
    image, question = asked[0]
    answerer.answer([turn(image, question.prompt)], WORD)
    facts = answerer.facts()
    assert facts["kept_tokens"] == 192
    assert facts["kept_tokens_over_layers"] == pytest.approx(144, abs=1)


def test_a_stop_string_ends_an_answer_early_and_is_no_part_of_it(hired: Answerer, asked: Any) -> None:
    turns = [turn(image, question.prompt) for image, question in asked]
    long = hired.answer(turns, Decoding(6), 8)
    texts = [text for text in long if len(text.split()) > 2]
    assert texts, "some answer goes on behind its first word"
    row = long.index(texts[0])
    stop = f" {texts[0].split()[1]}"
    before = hired.meter.sums["new"]
    assert hired.answer([turns[row]], Decoding(6, (stop, "never")))[0] == texts[0].split(stop)[0]
    assert hired.meter.sums["new"] - before == 2


def test_losses_are_the_likelihoods_of_what_would_be_written(hired: Answerer, asked: Any) -> None:
    image, question = asked[0]
    model, processor = load("nano")
    vlm_budget.patch(model, "hired", 0.4)
    inputs = build_inputs(processor, [question.prompt], [[image]], model)
    with torch.inference_mode():
        likely = model(**inputs).logits[0, -1].log_softmax(-1)
    words = ["red", "magenta", "blue"]
    expected = [-float(likely[processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0]]) for word in words]
    found = hired.losses([turn(image, question.prompt)] * 3, [f" {word}" for word in words], 2)
    assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-4)
    said = hired.answer([turn(image, question.prompt)], WORD)[0]
    assert [greedy for _, greedy in found] == [word == said for word in words]


@pytest.mark.parametrize("method", ["hired", "fastv"])
def test_an_answer_of_many_tokens_costs_the_mean_over_them_and_leaks_into_no_selection(method: str, asked: Any) -> None:
    answerer = Answerer(Setting(method=method, budget=0.75))
    image, question = asked[2]
    words = answerer.answer([turn(image, question.prompt)], Decoding(4))[0].split()
    words += ["red", "is", "0"][: 3 - len(words)] if len(words) < 3 else []
    turns = [turn(image, question.prompt)] * 3
    growing = [answerer.losses(turns[:1], ["".join(f" {word}" for word in words[:n])])[0] for n in (1, 2, 3)]
    sums = [loss * n for n, (loss, _) in enumerate(growing, 1)]
    assert sums == sorted(sums)  # each token adds its own share, and changes nothing before it
    together = answerer.losses(turns, ["".join(f" {word}" for word in words[:n]) for n in (1, 2, 3)], 3)
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in growing], abs=1e-4)


def test_an_answer_without_tokens_is_refused(hired: Answerer, asked: Any) -> None:
    with pytest.raises(TaskError, match="no tokens"):
        hired.losses([turn(asked[0][0], asked[0][1].prompt)], [""])


def test_pictures_stand_at_their_markers_and_strange_markers_show_nothing(hired: Answerer, asked: Any) -> None:
    (image, question), picture = asked[0], Picture("page", asked[0][0])
    marked = Turn.marked("<image> what color <image> is digit 7", [picture, picture])
    assert [part if isinstance(part, str) else "*" for part in marked.parts] == [
        "*",
        " what color ",
        "*",
        " is digit 7",
    ]
    assert Turn.marked("<image> <image> red", [picture]).parts == (picture, "  red")
    assert Turn.marked("red <image>", []).parts == ("red ",)
    hostile = Turn((picture, f"<image>{question.prompt}<image>"))
    assert hired.answer([hostile], WORD) == hired.answer([turn(image, question.prompt)], WORD)


def test_a_video_is_its_frames_to_a_model_that_knows_no_videos(hired: Answerer, asked: Any, tmp_path: Path) -> None:
    images = [asked[0][0], asked[7][0]]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    film = Turn((Clip("film", tmp_path), asked[0][1].prompt))
    pictures = Turn((Picture("0", images[0]), Picture("1", images[1]), asked[0][1].prompt))
    before = hired.meter.sums["visual"]
    assert hired.answer([film], WORD, frames=2) == hired.answer([pictures], WORD)
    assert hired.meter.sums["visual"] - before == 4 * 192
    hired.answer([film], WORD, frames=1)
    assert hired.meter.sums["visual"] - before == 5 * 192


def test_a_processor_that_knows_videos_gets_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    class Processor:
        image_token, video_token, chat_template = "<i>", "<v>", None
        tokenizer = SimpleNamespace(padding_side="right", bos_token=None)

        def __call__(self, **arguments: Any) -> Any:
            given.update(arguments)
            return SimpleNamespace(to=lambda *where: "inputs")

    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue", "green")]
    film = Turn((Clip("film", tmp_path), "what <v>happens"))
    assert (film.kind(True), film.kind(False), Turn(("red",)).kind(True)) == ("video", "image", "text")
    prompts = Prompts.of(Processor(), [film, film], "video", lambda clip: frames)
    model = SimpleNamespace(device="cpu", dtype=torch.float32)
    assert prompts.inputs(Processor(), model) == "inputs"
    assert given["text"] == ["<v>what happens"] * 2 and "images" not in given
    assert [video.shape for video in given["videos"]] == [(3, 4, 6, 3)] * 2
    assert np.array_equal(given["videos"][0][1], np.asarray(frames[1]))
    assert Processor.tokenizer.padding_side == "left"


def test_memory_that_runs_out_halves_the_batch_and_one_too_large_rises() -> None:
    sizes: list[int] = []

    def ask(items: Any) -> list[int]:
        sizes.append(len(items))
        if len(items) > 2 or -1 in items:
            raise torch.OutOfMemoryError("no memory")
        return [item * 10 for item in items]

    assert _halving(list(range(5)), ask) == [0, 10, 20, 30, 40]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        _halving([1, -1], ask)


def test_closing_gives_the_model_back_as_it_was(asked: Any, direct: dict[str, list[str]]) -> None:
    answerer = Answerer(Setting(method="hired", budget=0.1))
    turns = [turn(image, question.prompt) for image, question in asked]
    pruned = answerer.answer(turns, WORD, 8)
    answerer.close()
    plain = Answerer(Setting(method="unpatched")).answer(turns, WORD, 8)
    assert plain == direct["unpatched"] != pruned


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "hirde", "budget": 0.2}, UnknownNameError, "Did you mean 'hired'"),
        ({"method": "hired", "budget": 0.2, "options": {"alpa": 0.3}}, UnknownNameError, "Did you mean 'alpha'"),
        ({"method": "hired(alpha=0.3)", "budget": 0.2, "options": {"alpha": 0.3}}, OptionError, "leave out alpha"),
        ({"method": "unpatched", "budget": 0.2}, OptionError, "leave out budget"),
        ({"method": "hired"}, vlm_budget.BudgetError, "pass either a budget"),
        ({"method": "hired", "budget": 0.2, "dtype": "int8"}, OptionError, "dtype"),
        ({"method": "hired", "budget": 0.2, "device": "cuda:99"}, OptionError, "CUDA devices"),
        ({"method": "hired", "budget": 0.2, "device": "tpu"}, OptionError, "device must be"),
        ({"method": "hired", "budget": 0.2, "frames": 0}, OptionError, "frames"),
        ({"model": "nanoo", "method": "unpatched"}, vlm_budget.ModelLoadError, "Did you mean 'nano'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_said(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Answerer(Setting(**given))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"temperature": 0, "top_p": 0.9, "num_beams": 1, "do_sample": False}, {}),
        ({"temperature": 0.0, "do_sample": True}, {}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, {}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "temperature": 1.0, "top_k": 5}),
        ({"num_beams": 3, "temperature": None}, {"num_beams": 3}),
    ],
)
def test_what_harnesses_say_about_decoding(given: dict[str, Any], told: dict[str, Any]) -> None:
    assert dict(sampling(given)) == told


def test_reports_of_processes_add_up_and_an_empty_one_has_no_means(tmp_path: Path) -> None:
    meter = Meter()
    assert meter.summary()["kept_tokens"] is None and meter.line() == "no prompt ran"
    meter.add(2, 100, 6, 30.0, 4, None)
    whole = meter.merge([meter.sums, meter.sums]).summary()
    assert whole["prompts"] == 4 and whole["visual_tokens"] == 50 and whole["ms"] == {"total": 15.0}
    write_report(tmp_path / "report.json", whole)
    assert json.loads((tmp_path / "report.json").read_text()) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing" / "report.json"):
        with pytest.raises(RunError, match="cannot write report"):
            check_report(place)
    with pytest.raises(RunError, match="cannot write report"):
        write_report(tmp_path / "missing" / "report.json", {})


def test_the_adapters_import_no_harness(tmp_path: Path) -> None:
    code = (
        "import sys, vlm_budget, vlm_budget.eval.adapters\n"
        "print(sorted({'lmms_eval', 'vlmeval', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
