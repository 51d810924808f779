"""The adapter under the installed lmms-eval, on local tasks; `make test-harness` installs what it needs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make test-harness` runs this with it")

import pyarrow  # noqa: E402 - comes with lmms-eval's own requirements
import pyarrow.parquet  # noqa: E402
import torch  # noqa: E402
from lmms_eval.models import get_model, list_available_models  # noqa: E402

import vlm_budget  # noqa: E402
from vlm_budget.errors import OptionError, RunError, TaskError, UnknownNameError  # noqa: E402
from vlm_budget.eval.adapters.lmms_eval import VLMBudget  # noqa: E402
from vlm_budget.eval.nano import load  # noqa: E402
from vlm_budget.prompts import build_inputs  # noqa: E402

TASKS = Path(__file__).parent / "task_folder"
CHOICES = {
    "retrieval": ["red", "green", "blue", "magenta"],
    "count": ["0", "1", "2", "3", "4"],
    "place": ["topleft", "topright", "bottomleft", "bottomright"],
    "existence": ["yes", "no"],
}


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def choices(question: Any) -> list[str]:
    return list(dict.fromkeys([*CHOICES.get(question.task, []), question.answer]))


@pytest.fixture(scope="module")
def folder(asked: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for image, question in asked:
        options = choices(question)
        rows.append(
            {
                "image": {"bytes": png(image), "path": None},
                "question": question.prompt,
                "answer": question.answer,
                "choices": options,
                "gold": options.index(question.answer),
            }
        )
    place = tmp_path_factory.mktemp("lmms")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "posters.parquet")
    return place


def lmms_eval(folder: Path, arguments: str, tasks: str, *more: str) -> str:
    """Run the harness's own command in a folder."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlm_budget", "--model_args", arguments, "--tasks", tasks]
    command += ["--include_path", str(TASKS), "--output_path", "out", "--log_samples", *more]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def newest(folder: Path, pattern: str) -> Path:
    return max((folder / "out").rglob(pattern), key=lambda path: path.stat().st_mtime_ns)


def test_lmms_eval_lists_the_model_that_the_entry_point_names() -> None:
    assert "vlm_budget" in list_available_models()
    assert get_model("vlm_budget") is VLMBudget


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "arguments", "kept"),
    [("hired", "method=hired,budget=0.4", 77), ("unpatched", "method=unpatched", 192)],
)
def test_its_command_says_what_a_model_patched_by_hand_says(
    folder: Path, asked: Any, direct: dict[str, list[str]], method: str, arguments: str, kept: int
) -> None:
    model = f"pretrained=nano,{arguments},report={method}.json"
    log = lmms_eval(folder, model, "nano_posters", "--batch_size", "8")
    rows = [json.loads(line) for line in newest(folder, "*samples_nano_posters.jsonl").read_text().splitlines()]
    said = {row["doc_id"]: row["filtered_resps"] for row in rows}
    assert [said[number] for number in range(len(asked))] == direct[method]
    right = sum(text == question.answer for text, (_, question) in zip(direct[method], asked, strict=True))
    results = json.loads(newest(folder, "*results.json").read_text())
    assert results["results"]["nano_posters"]["accuracy,none"] == pytest.approx(right / len(asked))
    assert 0 < right < len(asked)
    report = json.loads((folder / f"{method}.json").read_text())
    assert (report["prompts"], report["visual_tokens"], report["kept_tokens"]) == (len(asked), 192, kept)
    assert report["ms"]["total"] > 0 and report["batch_size"] == 8
    assert results["throughput"]["avg_kept_tokens"] == kept
    assert f"kept {kept}.0" in log


@pytest.mark.slow
def test_multiple_choice_takes_the_likeliest_choice_and_a_cache_answers_a_second_run(folder: Path, asked: Any) -> None:
    model, processor = load("nano")
    vlm_budget.patch(model, "hired", 0.4)
    right, some = 0, asked[:12]
    for image, question in some:
        inputs = build_inputs(processor, [question.prompt], [[image]], model)
        with torch.inference_mode():
            scores = model(**inputs).logits[0, -1]
        options = choices(question)
        tokens = [processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in options]
        right += options[int(scores[tokens].argmax())] == question.answer
    arguments = "pretrained=nano,method=hired,budget=0.4,report=choices.json"
    prompts = sum(len(choices(question)) for _, question in some)
    for written in (len(some), 0):  # answers come from the cache the second time; likelihoods are never kept in it
        tasks = "nano_posters,nano_choices"
        lmms_eval(folder, arguments, tasks, "--batch_size", "8", "--limit", "12", "--use_cache", str(folder / "cache"))
        results = json.loads(newest(folder, "*results.json").read_text())["results"]
        assert results["nano_choices"]["acc,none"] == pytest.approx(right / len(some))
        assert json.loads((folder / "choices.json").read_text())["prompts"] == prompts + written


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="posters")


@pytest.fixture(scope="module")
def model(asked: Any) -> VLMBudget:
    made = VLMBudget("nano", "hired", 0.4, batch_size="4", device="cpu")
    documents = [{"image": image, "question": question.prompt} for image, question in asked]
    made.task_dict = {"posters": {"test": documents}}
    return made


def test_requests_of_several_kinds_are_answered_in_their_order(
    model: VLMBudget, asked: Any, direct: dict[str, list[str]]
) -> None:
    def visual(doc: Any) -> list[Any]:
        return [doc["image"]]

    one, more = {"max_new_tokens": 1, "temperature": 0}, {"max_new_tokens": 4, "until": " "}
    requests = [
        request(question.prompt, dict(more if number % 2 else one), visual, number, "posters", "test")
        for number, (_, question) in enumerate(asked[:12])
    ]
    requests.append(request("what color is digit 7", {"max_gen_toks": 1}, None, 0, "posters", "test"))
    said = model.generate_until(requests)
    assert said[:12] == direct["hired"][:12]
    assert len(said) == 13


@pytest.mark.parametrize("shown", [["sound.wav"], [3], [{"type": "audio", "url": "a.mp3"}]])
def test_what_is_neither_picture_nor_video_is_refused(model: VLMBudget, shown: Any) -> None:
    with pytest.raises(TaskError, match="posters 0"):
        model.generate_until([request("what", {}, lambda doc: shown, 0, "posters", "test")])


def test_a_file_of_a_picture_is_a_picture(
    model: VLMBudget, asked: Any, direct: dict[str, list[str]], tmp_path: Path
) -> None:
    asked[0][0].save(tmp_path / "page.png")
    for shown in (str(tmp_path / "page.png"), {"type": "image", "url": str(tmp_path / "page.png")}):
        arguments = (asked[0][1].prompt, {"max_new_tokens": 1}, lambda doc, one=shown: [one], 0, "posters", "test")
        assert model.generate_until([request(*arguments)]) == direct["hired"][:1]


def test_requests_it_cannot_answer_are_refused_by_name(model: VLMBudget) -> None:
    with pytest.raises(TaskError, match="posters asks in several rounds"):
        model.generate_until_multi_round([request()])
    with pytest.raises(TaskError, match="posters wants pictures drawn"):
        model.generate_visual_cot([request()])
    with pytest.raises(TaskError, match="acc_mutual_info"):
        model.loglikelihood([request("", "yes")])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "hired", "budget": 0.2, "alpa": 0.3}, UnknownNameError, "Did you mean 'alpha'"),
        ({"method": "hired", "budget": 0.2, "batch_size": "many"}, OptionError, "batch_size"),
        ({"method": "hired", "budget": 0.2, "report": "no/such/folder/r.json"}, RunError, "cannot write report"),
    ],
)
def test_model_args_that_cannot_be_used_are_said(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        VLMBudget("nano", **given)


def test_after_the_run_the_model_is_gone_and_the_report_is_there(asked: Any, tmp_path: Path) -> None:
    made = VLMBudget("nano", "hired", 0.4, report=str(tmp_path / "r.json"), batch_size="auto", max_batch_size=3)
    assert (made.batch_size, made.rank, made.world_size) == (3, 0, 1)
    made.clean()
    assert json.loads((tmp_path / "r.json").read_text())["prompts"] == 0
    with pytest.raises(TaskError, match="run is over"):
        made.generate_until([request("what", {}, None, 0, "posters", "test")])
