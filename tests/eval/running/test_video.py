"""Videos and text reach the model as its processor means them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny_models
from vlm_budget.cli.loading import Loaded
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.driver import Driver
from vlm_budget.eval.sample import Clip, Sample
from vlm_budget.eval.task import Task

av = pytest.importorskip("av", reason="videos are written and read with PyAV")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    " {{ part['text'] }}{% else %} <|vision_start|> <|{{ part['type'] }}_pad|> <|vision_end|>{% endif %}{% endfor %}"
    "{% endfor %} go"
)


def qwen() -> Loaded:
    """A tiny Qwen2-VL with a processor that knows a few words."""
    tiny = tiny_models.build("qwen2_vl_video")
    config = tiny.model.config
    special = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    free = [i for i in range(128) if i not in special.values()]
    words = ["<unk>", "<pad>", "what", "happens", "go", *(f"w{i}" for i in range(len(free) - 5))]
    backend = Tokenizer(models.WordLevel({**special, **dict(zip(words, free, strict=True))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=list(special)
    )
    vision = config.vision_config
    sizes: dict[str, Any] = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
    sizes |= {"temporal_patch_size": vision.temporal_patch_size, "min_pixels": 4 * pixels, "max_pixels": 16 * pixels}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**sizes, do_sample_frames=False),
        chat_template=TEMPLATE,
    )
    return Loaded("tiny", False, "qwen2_vl", tiny.model.eval(), processor)


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    """Two videos of different lengths."""
    found = []
    for number, length in enumerate((8, 12)):
        path = tmp_path / f"{number}.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("mpeg4", rate=Fraction(4))
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for index in range(length):
                pixels = np.full((64, 64, 3), 20 * index + number, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        found.append(Clip(path.name, path))
    return found


def task(**changes: Any) -> Task:
    return Task(
        **{
            "name": "t",
            "version": 1,
            "title": "",
            "modality": "video",
            "load": "",
            "score": "",
            "metric": "",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    yield qwen()


def test_videos_go_in_as_videos_and_are_pruned(loaded: Loaded, clips: list[Clip]) -> None:
    cells = [Cell(), Cell("hired", "40%"), Cell("fastv(k=1)", "80%")]
    samples = [
        Sample(clip.name, question, (), (), clip)
        for clip, question in zip(clips, ("what happens", "what"), strict=True)
    ]
    shared, apart = Driver(loaded, cells), Driver(loaded, cells, share=False)
    said = task(frames=4, max_new_tokens=3)
    batch, other = shared.prepare(said, samples), apart.prepare(said, samples)
    assert "pixel_values_videos" in batch.inputs
    assert [len(frames) for frames in batch.pictures] == [4, 4]
    assert all(len(sizes) == 1 for sizes in batch.sizes)
    for cell in cells:
        found, want = shared.answer(batch, cell, draw=True), apart.answer(other, cell)
        assert found.texts == want.texts
        assert found.costs == want.costs
        visual = [sum(sizes) for sizes in batch.sizes]
        assert [cost["visual"] for cost in found.costs] == visual
        expected = visual if cell.methods != "hired" else [round(0.4 * count) for count in visual]
        assert [cost["kept"] for cost in found.costs] == expected
    alone = [shared.answer(shared.prepare(said, [one]), cells[1]).texts[0] for one in samples]
    assert alone == shared.answer(batch, cells[1]).texts


def test_a_model_without_videos_gets_frames_as_pictures(clips: list[Clip]) -> None:
    from vlm_budget.cli.loading import load

    nano = load("nano", "cpu", "float32", lambda name: None)
    torch.set_num_threads(1)
    driver = Driver(nano, [Cell(), Cell("hired", "40%")])
    batch = driver.prepare(task(frames=3, max_new_tokens=1), [Sample("a", "what color is digit 7", (), (), clips[0])])
    assert len(batch.pictures[0]) == len(batch.sizes[0]) == 3
    assert driver.answer(batch, Cell("hired", "40%")).costs[0]["kept"] == round(0.4 * sum(batch.sizes[0]))


def test_text_alone_runs_unpruned(loaded: Loaded) -> None:
    cells = [Cell(), Cell("hired", "40%")]
    driver = Driver(loaded, cells)
    samples = [Sample("a", "what happens", ()), Sample("b", "what", ())]
    batch = driver.prepare(task(modality="text", max_new_tokens=3), samples)
    found = [driver.answer(batch, cell) for cell in cells]
    assert found[0].texts == found[1].texts
    assert found[0].costs == found[1].costs
    assert found[1].costs[0]["visual"] == 0
