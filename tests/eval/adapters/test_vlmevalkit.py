"""The wrapper as VLMEvalKit calls it, beside the kit's base class and without the kit."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlm_budget.errors import ImageError, TaskError
from vlm_budget.eval.adapters import vlmevalkit

# What the kit's inference loop asks of a local model, from its documentation of BaseModel.
BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def generate(self, message, dataset=None):
        assert all(set(part) == {"type", "value"} and part["type"] in self.allowed_types for part in message)
        return "kit: " + self.generate_inner(message, dataset)
"""


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter where a kit is installed."""
    for folder in ("vlmeval", "vlmeval/vlm"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "vlmeval" / "vlm" / "base.py").write_text(BASE)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location("vlm_budget_beside_a_kit", vlmevalkit.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("vlmeval.vlm.base", "vlmeval.vlm", "vlmeval"):
        sys.modules.pop(name, None)


@pytest.fixture
def alone() -> None:
    if importlib.util.find_spec("vlmeval") is not None:
        pytest.skip("the kit is installed, so the class stands on its base class")


@pytest.fixture(scope="module")
def pages(asked: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pages")
    paths = []
    for number, (image, _) in enumerate(asked):
        paths.append(str(folder / f"{number}.png"))
        image.save(paths[-1])
    return paths


def test_the_kit_gets_the_answers_of_a_model_patched_by_hand(
    kit: ModuleType, asked: Any, pages: list[str], direct: dict[str, list[str]], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    build = partial(kit.VLMBudget, model_path="nano", method="hired", budget=0.4, max_new_tokens=1, report=str(report))
    model = build()
    assert type(model).__mro__[1].__module__ == "vlmeval.vlm.base"
    assert model.INTERLEAVE and not model.use_custom_prompt("MMBench")
    model.set_dump_image(lambda line: [line["path"]])
    said = []
    for page, (_, question) in list(zip(pages, asked, strict=True))[:12]:
        message = [{"type": "image", "value": page}, {"type": "text", "value": question.prompt}]
        said.append(model.generate(message=message, dataset="posters"))
    assert said == [f"kit: {text}" for text in direct["hired"][:12]]
    facts = json.loads(report.read_text())
    assert (facts["prompts"], facts["visual_tokens"], facts["kept_tokens"]) == (12, 192, 77)


def test_without_the_kit_it_answers_all_the_same(
    alone: None, asked: Any, pages: list[str], direct: dict[str, list[str]]
) -> None:
    model = vlmevalkit.VLMBudget("nano", method="unpatched", max_new_tokens=1)
    assert type(model).__mro__[1].__module__ == vlmevalkit.__name__
    model.set_dump_image(lambda line: [line["path"]])
    assert model.dump_image({"path": "a.png"}, "posters") == ["a.png"]
    question = asked[0][1].prompt
    assert model.generate([pages[0], question]) == direct["unpatched"][0]
    assert model.generate(question) == model.generate([{"type": "text", "value": question}])
    parts = [{"type": "text", "value": "is"}, {"type": "image", "value": pages[0]}, {"type": "text", "value": "red"}]
    before = model.answerer.meter.sums["visual"]
    model.generate([*parts, {"type": "image", "value": f"file://{pages[7]}"}])
    assert model.answerer.meter.sums["visual"] - before == 2 * 192


def test_a_video_gives_as_many_frames_as_the_kit_says(alone: None, pages: list[str]) -> None:
    model = vlmevalkit.VLMBudget("nano", method="hired", budget=0.4, max_new_tokens=1)
    assert model.VIDEO_LLM is False  # nano knows no videos: the kit sends pictures, and a video becomes pictures
    model.nframe = 3
    model.generate([{"type": "video", "value": str(Path(pages[0]).parent)}, {"type": "text", "value": "is"}])
    assert model.answerer.meter.sums["visual"] == 3 * 192


def test_what_it_cannot_answer_is_said(alone: None, pages: list[str]) -> None:
    model = vlmevalkit.VLMBudget("nano", method="unpatched")
    with pytest.raises(TaskError, match="got type 'audio'"):
        model.generate([{"type": "audio", "value": "a.wav"}])
    with pytest.raises(TaskError, match="dialogues"):
        model.chat_inner([])
    with pytest.raises(TaskError, match="build_prompt"):
        model.build_prompt({})
    with pytest.raises(ImageError, match="no file"):
        model.generate([{"type": "image", "value": "missing.png"}])
