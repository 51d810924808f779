"""``video``: an answer, a timeline in the terminal and as a picture, one JSON object; errors typed and early."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_models
from clips import write_clip
from tiny_clip import save_clip, tiny_clip
from tiny_processors import onevision_processor
from vlm_budget.cli.video import strip
from vlm_budget.video.frames import watch
from vlm_budget.video.frames.answering import answer_frames

Cli = Callable[..., Any]

QUICK = ("--max-new-tokens", 2, "--decouple", "off", "--budget", 30)


@pytest.fixture(scope="session")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-OneVision with random weights, as a hub folder: 9 tokens a frame."""
    folder = tmp_path_factory.mktemp("video-model") / "tiny"
    tiny_models.onevision_model().save_pretrained(folder)
    onevision_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("open_clip", reason="open_clip is not installed (extra 'vision')")
    return f"clip:{save_clip(tiny_clip(-1.0), tmp_path_factory.mktemp('clip') / 'clip')}"


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of twelve greys."""
    return write_clip(tmp_path_factory.mktemp("film") / "film.mp4", [20 * n for n in range(12)], rate=2)


@pytest.mark.parametrize("method", ["quota", "tstar"])
def test_json_is_one_object_whose_counts_agree(
    cli: Cli, video_model: Path, film: Path, scorer: str, method: str
) -> None:
    options = ("--method", method, "--scorer", scorer, "--frames", 6, "--json")
    result = cli("video", film, "-p", "what?", "--model", video_model, *options, *QUICK)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert set(facts) == {
        *("command", "file", "model", "scorer", "answer", "method", "query", "duration", "frames", "tokens"),
        *("seconds", "timeline"),
    }
    assert (facts["method"], facts["scorer"], facts["duration"]) == (method, scorer, 6.0)
    tokens = facts["tokens"]
    assert sum(frame["tokens"] for frame in facts["frames"]) + tokens["separators"] == tokens["spent"] == 30
    assert (len(facts["frames"]) if method == "quota" else tokens["dense"] // 9) == 6
    assert all(0 <= frame["score"] <= 1 for frame in facts["frames"])
    assert {"load", "read", "score", "prepare", "answer"} == set(facts["seconds"])
    with Image.open(facts["timeline"]) as page:
        assert page.format == "PNG" and page.width == 1280
    assert result.stderr == ""


def test_the_timeline_is_printed(cli: Cli, video_model: Path, film: Path, scorer: str, tmp_path: Path) -> None:
    arguments = ("--scorer", scorer, "--target", "mug", "--cue", "[sink", "--timeline", "mine.png", "--frames", 6)
    refused = cli("video", film, "--model", video_model, *arguments, *QUICK)
    assert refused.exit_code == 1 and "'[sink' is nothing to look for" in refused.stderr
    arguments = ("--scorer", scorer, "--target", "mug", "--cue", "sink", "--timeline", "mine.png", "--frames", 6)
    result = cli("video", film, "--model", video_model, *arguments, *QUICK)
    assert result.exit_code == 0, result.stderr
    for text in ("quota: 30 of 55 visual tokens", "looked for: mug, sink", "score  ", "tokens ", "0:00", "took: load"):
        assert text in result.stdout
    assert "frames with the most tokens" in result.stdout and "mine.png" in result.stdout
    assert (tmp_path / "mine.png").is_file()


def test_what_the_model_says_steers_no_terminal(
    cli: Cli, video_model: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "[red]x\x1b]0;title\x07\u202e"
    monkeypatch.setattr(watch, "answer_frames", lambda *given: replace(answer_frames(*given), text=hostile))
    result = cli("video", film, "--model", video_model, "--method", "uniform", "--frames", 4, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "[red]x" in result.stdout and not set(result.stdout) & {"\x1b", "\x07", "\u202e"}


def test_uniform_needs_no_scorer_and_options_reach_quota(cli: Cli, video_model: Path, film: Path, scorer: str) -> None:
    arguments = ("--model", video_model, "--frames", 4, "--json", *QUICK)
    even = json.loads(cli("video", film, "--method", "uniform", *arguments).stdout)
    assert {frame["tokens"] for frame in even["frames"]} == {7, 8} and "score" not in even["frames"][0]
    flat = cli("video", film, "--scorer", scorer, "-o", "power=0", "-o", "assigner=stride", *arguments)
    assert [f["tokens"] for f in json.loads(flat.stdout)["frames"]] == [f["tokens"] for f in even["frames"]]


def test_the_model_may_take_the_question_apart(cli: Cli, video_model: Path, film: Path, scorer: str) -> None:
    arguments = ("--scorer", scorer, "--frames", 2, "--max-new-tokens", 1, "--budget", 9, "--json")
    facts = json.loads(cli("video", film, "--model", video_model, *arguments).stdout)
    assert "decouple" in facts["seconds"]
    assert facts["query"]["note"] and facts["query"]["targets"] == []


def one_line_error(result: Any, message: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "'quota' needs a scorer"),
        (("--scorer", "clap:x"), "Did you mean 'clip'"),
        (("--scorer", "clip:./nowhere"), "no folder of an open_clip model"),
        (("--method", "uniform", "--scorer", "clip:x"), "takes no scorer"),
        (("--method", "uniform", "--budget", "0"), "budget must be above 0"),
        (("--method", "uniform", "--budget", "5000"), "asks for 5000"),
        (("--method", "uniform", "--budget", "40% flops"), "no number of tokens"),
        (("--method", "uniform", "--prompt", "x" * 10_000), "10,000 characters"),
        (("--method", "uniform", "--prompt", "<video> now"), "stands for a picture"),
        (("--method", "uniform", "--prompt", "a \udcff now"), "no text that can be written as UTF-8"),
        (("--method", "uniform", "--target", "<image>"), "nothing to look for"),
        (("--method", "uniform", "--option", "powr=1"), "Did you mean 'power'?"),
        (("--method", "uniform", "--timeline", "nowhere/x.png"), "--timeline 'nowhere/x.png': there is no folder"),
        (("--method", "uniform", "--model", "./missing"), "no model folder './missing'"),
    ],
)
def test_bad_values(cli: Cli, video_model: Path, film: Path, arguments: tuple[str, ...], message: str) -> None:
    one_line_error(cli("video", film, "--model", video_model, "--max-new-tokens", 1, *arguments), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "there is no"),
        (lambda file: file.touch(), "empty"),
        (lambda file: file.write_text("a cat"), "no video"),
    ],
)
def test_bad_videos_are_told_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "x.mp4")
    one_line_error(cli("video", "x.mp4", "--method", "uniform", "--model", "./missing"), message)


def test_usage_errors_have_another_exit_code(cli: Cli) -> None:
    assert cli("video").exit_code == 2
    assert cli("video", "x.mp4", "--method", "best").exit_code == 2
    assert cli("video", "x.mp4", "--frames", 0).exit_code == 2


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [([0, 1, 2, 4, 8], 9, " ▁▂▄█"), ([0, 0], 5, "  "), ([1, 8, 0, 0], 2, "█ "), ([0.001, 1.0], 2, "▁█")],
)
def test_values_as_blocks(values: list[float], width: int, text: str) -> None:
    assert strip(values, width) == text
