"""What the host reads of a call at its start, and what it works out from that instead of asking again."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from pretend_device import PretendDevice
from vlm_budget.engine.prompts import CallShape, Prompts, Rows
from vlm_budget.engine.reading import on_host, read_call, read_together
from vlm_budget.families.llava import Llava
from vlm_budget.families.llava_next import LlavaNext
from vlm_budget.families.smolvlm import SmolVLM
from vlm_budget.layout import Modality

TOKENS: dict[Modality, int] = {"image": 7, "video": 8}
IMAGE: frozenset[Modality] = frozenset({"image"})
IDS = torch.tensor([[0, 0, 1, 7, 7, 7, 2, 3], [1, 7, 7, 8, 8, 2, 2, 7]])
MASK = (IDS != 0).long()


def read(prompts: Prompts, given: Sequence[Modality] = ("image",)) -> Prompts:
    return prompts.counted(TOKENS, given, prompts.to_read(TOKENS, given))


def of_forward(ids: torch.Tensor = IDS, mask: torch.Tensor | None = MASK, cached: int = 0) -> Prompts:
    return read(Prompts.of_forward({"input_ids": ids, "attention_mask": mask}, cached))


def test_tensors_of_a_device_are_read_with_one_wait() -> None:
    given = [torch.arange(6).reshape(2, 3), torch.tensor([True, False]), torch.tensor(5, dtype=torch.int32)]
    with PretendDevice() as device:
        there = [*(tensor.to("cuda") for tensor in given), given[0]]
        with device.watch() as waits:
            found = read_together(there)
    assert [wait.kind for wait in waits] == ["read"]
    assert [tensor.tolist() for tensor in found] == [*(tensor.tolist() for tensor in given), given[0].tolist()]
    assert found[3] is given[0]


def test_what_is_on_the_host_is_not_copied() -> None:
    given = [torch.arange(3), torch.zeros(0, dtype=torch.long)]
    assert all(a is b for a, b in zip(read_together(given), given, strict=True))
    assert read_together([]) == []


def test_sizes_are_read_once_and_known_by_their_tensor() -> None:
    with PretendDevice() as device:
        sizes = torch.tensor([[336, 672]]).to("cuda")
        counts, known = read_call(
            {"text": torch.ones(2).long().to("cuda")}, LlavaNext(), ["image"], {"image_sizes": sizes}
        )
        with device.watch() as waits:
            same = on_host(LlavaNext(), "image", {"image_sizes": sizes, "more": 1}, known)
            other = on_host(LlavaNext(), "image", {"image_sizes": sizes.clone()}, known)
    assert counts["text"].tolist() == [1, 1]
    assert [wait.kind for wait in waits] == ["read"]  # of the clone, which might be anything
    assert same["image_sizes"].device.type == other["image_sizes"].device.type == "cpu"
    assert same["image_sizes"].tolist() == other["image_sizes"].tolist() == [[336, 672]] and same["more"] == 1


def test_sizes_that_were_written_to_are_read_again() -> None:
    with PretendDevice():
        sizes = torch.tensor([[336, 672]]).to("cuda")
        _, known = read_call(None, LlavaNext(), ["image"], {"image_sizes": sizes})
        sizes.copy_(torch.tensor([[5, 6]]).to("cuda"))
        assert on_host(LlavaNext(), "image", {"image_sizes": sizes}, known)["image_sizes"].tolist() == [[5, 6]]


def test_an_interrupted_call_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs no hook behind a forward that Ctrl-C ended; the next call with the same tensors is another one."""
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    tiny = tiny_models.build("llava_next")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with PretendDevice(), torch.no_grad():
        model, inputs = tiny.model.to("cuda"), {name: value.to("cuda") for name, value in tiny.clone().items()}
        sizes, pixels = inputs["image_sizes"], inputs["pixel_values"]
        with vlm_budget.patch(model, "hired", 0.5) as handle:
            boom = model.model.language_model.layers[1].register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
            boom.remove()
            sizes.copy_(sizes.flip(0))
            seen = []
            for given in (sizes, sizes.clone()):
                model.model.get_image_features(pixel_values=pixels.flip(0), image_sizes=given)
                seen.append([item.size for item in handle._boundary._local.latest["image"].items])
            assert seen[0] == seen[1] != seen[0][::-1]
            sizes.copy_(sizes.flip(0))
            again = model(**inputs).logits.cpu()
            assert torch.equal(model(**{name: value.clone() for name, value in inputs.items()}).logits.cpu(), again)


def test_a_family_may_measure_what_it_must_know() -> None:
    pixels = torch.zeros(1, 3, 3, 2, 2)
    pixels[0, 1, 0, 0, 0] = 1
    assert on_host(SmolVLM(), "image", {"pixel_values": pixels}, ())["tiles"] == 1
    assert on_host(SmolVLM(), "image", {"pixel_values": 0 * pixels}, ())["tiles"] == 1
    assert on_host(Llava(), "image", {"pixel_values": pixels}, ()) == {"pixel_values": pixels}
    assert on_host(LlavaNext(), "image", {"image_sizes": [[3, 4]]}, ()) == {"image_sizes": [[3, 4]]}


def test_tokens_of_a_prompt_are_counted() -> None:
    counts = of_forward().counts
    assert counts is not None
    assert counts.visual == {"image": [3, 3], "video": [0, 2]} and counts.given == {"image"}
    assert (counts.tokens, counts.text) == ([6, 8], [3, 3])
    assert (counts.instruction, counts.behind) == ([2, 3], [2, 0])  # nothing is behind the last one: all text asks
    assert not counts.right_padded
    assert of_forward(IDS.flip(1), MASK.flip(1)).counts.right_padded  # type: ignore[union-attr]


KEPT, VISUAL = [1, 2], [3, 3]


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("copies", [1, 3])
def test_lengths_behind_the_drop_are_worked_out(copies: int, extra: int) -> None:
    rows = of_forward().lengths(CallShape(2 * copies, 0, 8 + extra, IMAGE), KEPT, VISUAL)
    lengths = [length + extra for length in (6 - 3 + 1, 8 - 3 + 2) for _ in range(copies)]
    entering = [1] * copies + [2] * copies
    assert rows == Rows(lengths, entering, [2] * copies + [0] * copies, extra, False, 7 + extra)


def test_features_may_serve_fewer_or_more_prompts_than_there_are_rows() -> None:
    one = of_forward(IDS[:1], MASK[:1])
    found = one.lengths(CallShape(4, 0, 8, IMAGE), KEPT, VISUAL)  # 4 beams of one prompt, features encoded twice
    assert found is not None and found.lengths == [4, 4, 5, 5]
    twice = of_forward(IDS[:1].repeat(2, 1), MASK[:1].repeat(2, 1))
    found = twice.lengths(CallShape(2, 0, 8, IMAGE), [1], [3])
    assert found is not None and found.lengths == [4, 4]


def test_a_prompt_on_the_right_of_its_padding_is_not_right_padded_once_drafts_follow() -> None:
    prompts = of_forward(IDS.flip(1), MASK.flip(1))
    alone = prompts.lengths(CallShape(2, 0, 8, IMAGE), KEPT, VISUAL)
    drafted = prompts.lengths(CallShape(2, 0, 9, IMAGE), KEPT, VISUAL)
    assert alone is not None and drafted is not None
    assert (alone.right_padded, drafted.right_padded) == (True, False)


UNKNOWN: dict[str, tuple[dict[str, Any], CallShape]] = {
    "a chunk": ({}, CallShape(2, 0, 4, IMAGE)),
    "a later chunk": ({}, CallShape(2, 4, 4, IMAGE)),
    "another modality": ({}, CallShape(2, 0, 8, frozenset({"image", "video"}))),
    "rows that do not fit": ({}, CallShape(3, 0, 8, IMAGE)),
    "a square mask": ({"mask": torch.ones(2, 1, 8, 8)}, CallShape(2, 0, 8, IMAGE)),
    "a mask over placeholders": ({"mask": MASK * (torch.arange(8) != 4)}, CallShape(2, 0, 8, IMAGE)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_worked_out_is_left_to_be_read(case: str) -> None:
    fields, shape = UNKNOWN[case]
    assert of_forward(**fields).lengths(shape, KEPT, VISUAL) is None


def test_prompts_of_other_pictures_are_not_taken_for_these() -> None:
    assert of_forward().lengths(CallShape(2, 0, 8, IMAGE), KEPT, [3, 4]) is None


def test_without_a_mask_a_forward_has_no_padding_and_generate_makes_its_own() -> None:
    assert of_forward(mask=None).counts.tokens == [8, 8]  # type: ignore[union-attr]
    assert read(Prompts.of_generate((IDS,), {}, 0)).counts.tokens is None  # type: ignore[union-attr]


def test_embeddings_tell_nothing() -> None:
    prompts = read(Prompts.of_forward({"inputs_embeds": torch.ones(2, 8, 4)}, 0))
    assert prompts.counts is None and prompts.lengths(CallShape(2, 0, 8, IMAGE), KEPT, VISUAL) is None
