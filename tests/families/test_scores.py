"""Probed attention and keys of tokens, against what the eager tower attends with, reduced here by other means."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional

from tiny_encoders import arguments, family_of, modalities, observe
from tiny_models import SETUPS, Tiny, build
from tiny_parts import FLOOR
from vlm_budget.errors import LayoutError
from vlm_budget.families.base import flatten_features
from vlm_budget.pruner import Attention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # scores are about 1 / 150
KEY_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # keys are about 1


def needs_of(tiny: Tiny) -> tuple[Attention, ...]:
    """All kinds, those of the class token where the tower has one, at its first and its feature layer."""
    tower = family_of(tiny).tower(tiny.model.model)
    kinds = ("received", "keys", "mean_keys", *(("cls", "joint_cls") if tower.has_cls else ()))
    return tuple(Attention(layer, kind) for layer in (0, tower.feature_layer) for kind in kinds)  # type: ignore[arg-type]


def use(tiny: Tiny, backend: str) -> Tiny:
    """A copy whose vision tower attends by another backend."""
    model = copy.deepcopy(tiny.model)
    family_of(tiny).vision_tower(model.model).set_attn_implementation(backend)
    return Tiny(model, tiny.inputs, tiny.family, tiny.spans)


def encode(tiny: Tiny, modality: str) -> torch.Tensor:
    """Packed features of an unwatched call."""
    with torch.no_grad():
        output = getattr(tiny.model.model, f"get_{modality}_features")(**arguments(tiny, modality))
    packed = getattr(output, "pooler_output", output)
    return flatten_features(packed[0] if tiny.family == "qwen3_vl" and isinstance(packed[0], tuple) else packed)


@dataclass(frozen=True)
class Attended:
    """One call of transformers' own eager attention: [P, H, L, d] queries and keys, and the [P, H, L, L] map."""

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor

    def rows(self, kind: str) -> torch.Tensor:
        """[P, L] scores, or [P, L, C] keys."""
        if kind == "keys":
            return torch.cat(list(self.key.unbind(1)), -1)
        if kind == "mean_keys":
            return torch.stack(list(self.key.unbind(1))).mean(0)
        if kind == "joint_cls":
            heads, width = self.query.shape[1], self.query.shape[3]
            logits = torch.einsum("phd,phld->pl", self.query[:, :, 0], self.key) / (heads * width) ** 0.5
            return logits.softmax(-1)
        mean = self.weights.mean(1)
        return mean[:, 0] if kind == "cls" else mean.mean(1)


def eager_calls(tiny: Tiny, modality: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> list[Attended]:
    """What one layer attends with and to, call by call."""
    eager = use(tiny, "eager")
    attention = family_of(tiny).vision_attention(eager.model.model, layer)
    source = sys.modules[type(attention).__module__]
    original, calls = source.eager_attention_forward, []

    def spy(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "output_attentions" in kwargs:  # CLIP in 4.x throws the map away otherwise
            kwargs["output_attentions"] = True
        output, weights = original(module, query, key, *args, **kwargs)
        if module is attention:
            calls.append(Attended(query, key, weights))
        return output, weights

    with monkeypatch.context() as patch:
        patch.setattr(source, "eager_attention_forward", spy)
        encode(eager, modality)
    return calls


def pooled(tiny: Tiny, modality: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """[P, 1, side, side] scores of patches to [P, 1, rows, cols] scores of tokens."""
    config = tiny.model.config
    if tiny.family == "llava_onevision" and modality == "video":
        return lambda scores: functional.interpolate(scores, size=[3, 3], mode="bilinear")
    if tiny.family == "llava_next_video" and modality == "image":
        return lambda scores: scores
    factor = {
        "llava_next_video": 2,
        "internvl": 2,
        "idefics3": getattr(config, "scale_factor", None),
        "smolvlm": getattr(config, "scale_factor", None),
        "gemma3": 2,
    }.get(tiny.family, 1)
    return lambda scores: functional.avg_pool2d(scores, factor)


def grid_reference(tiny: Tiny, modality: str, kind: str, calls: list[Attended]) -> list[torch.Tensor]:
    """One tensor per partition, for towers that take one square image at a time."""
    (call,) = calls
    rows = call.rows(kind)
    has_cls = family_of(tiny).tower(tiny.model.model).has_cls
    patches = rows[:, 1:] if has_cls else rows
    side = round(patches.shape[1] ** 0.5)
    if patches.ndim == 3:
        tokens = pooled(tiny, modality)(patches.unflatten(1, (side, side)).permute(0, 3, 1, 2))
        return list(tokens.flatten(2).mT)
    tokens = pooled(tiny, modality)(patches.reshape(-1, 1, side, side))
    return list(tokens.flatten(1))


def qwen_reference(tiny: Tiny, modality: str, kind: str, calls: list[Attended]) -> torch.Tensor:
    """All tokens in order; where the tower puts a token is read off the merger, whose outputs are the features."""
    merged = []
    hook = tiny.model.model.visual.merger.register_forward_hook(lambda m, a, output: merged.append(output))
    features = encode(tiny, modality)
    hook.remove()
    same = (merged[0][:, None] == features[None]).all(-1)
    assert (same.sum(0) == 1).all()
    patches = torch.cat([call.rows(kind)[0] for call in calls])
    blocks = torch.stack(patches.split(4)).mean(1)
    return blocks[same.int().argmax(0)]


def check(tiny: Tiny, modality: str, monkeypatch: pytest.MonkeyPatch, needs: tuple[Attention, ...]) -> None:
    observed = observe(tiny, modality, needs)[1]
    for need in needs:
        scores = observed.attention[need]
        for item, parts in zip(observed.items, scores, strict=True):
            assert [len(part) for part in parts] == [grid.rows * grid.cols for grid in item.partitions]
            assert all(part.dtype == torch.float32 for part in parts)
        flat = [part for parts in scores for part in parts]
        tolerance = KEY_TOLERANCE if need.kind.endswith("keys") else TOLERANCE
        calls = eager_calls(tiny, modality, need.layer, monkeypatch)
        if tiny.family.startswith("qwen"):
            expected = qwen_reference(tiny, modality, need.kind, calls)
            torch.testing.assert_close(torch.cat(flat), expected, **tolerance)
        else:
            reference = grid_reference(tiny, modality, need.kind, calls)
            assert len(reference) == len(flat)
            for part, expected in zip(flat, reference, strict=True):
                torch.testing.assert_close(part, expected, **tolerance)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_scores_and_keys_are_those_of_the_eager_tower_reduced(
    setup: Tiny, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = use(setup, backend)
    for modality in modalities(tiny):
        check(tiny, modality, monkeypatch, needs_of(tiny))


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Flash attention's contract on the CPU: sequences lie behind one another, ``cu_seq_lens`` says where they end."""
    packed = kwargs.get("cu_seq_lens_q")
    # 4.x knows the backend by its exact name, which a probe changes: it then calls once per sequence.
    assert attention_mask is None and (packed is not None or FLOOR)
    ends = [0, query.shape[2]] if packed is None else packed.tolist()
    assert ends[-1] == query.shape[2]
    parts = [
        functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scale=kwargs["scaling"]
        )
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.mark.parametrize("name", [name for name in SETUPS if name.startswith("qwen")])
def test_packed_sequences_of_flash_attention_give_the_same_scores_and_keys(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", packed_attention)
    tiny = build(name)
    # Past the check that the flash package is there.
    tiny.model.model.visual.config._attn_implementation_internal = "flash_attention_2"
    for modality in modalities(tiny):
        check(tiny, modality, monkeypatch, needs_of(tiny))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_probes_leave_the_encoders_output_bit_identical(setup: Tiny, backend: str) -> None:
    tiny = use(setup, backend)
    for modality in modalities(tiny):
        before = encode(tiny, modality)
        output, observed = observe(tiny, modality, needs_of(tiny))
        packed = getattr(output, "pooler_output", output)
        probed = packed[0] if tiny.family == "qwen3_vl" and isinstance(packed[0], tuple) else packed
        assert torch.equal(flatten_features(probed), before)
        assert torch.equal(encode(tiny, modality), before)
        assert len(torch.cat(observed.features)) >= len(before)


def test_frames_of_an_odd_side_are_pooled_as_the_model_pools_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released LLaVA-OneVision halves 27 patches to 14 tokens, so its bilinear pooling is no plain average."""
    small = build("llava_onevision_video")
    config = copy.deepcopy(small.model.config)
    config.vision_config.image_size = 56
    pixels = torch.randn(2, 3, 3, 56, 56)
    odd = Tiny(type(small.model)(config).eval(), {"pixel_values_videos": pixels}, small.family, {})
    need = Attention(2, "received")
    observed = observe(odd, "video", (need,))[1]
    assert [item.size for item in observed.items] == [3 * 16 + 1] * 2
    (call,) = eager_calls(odd, "video", need.layer, monkeypatch)
    patches = call.weights.mean(1).mean(1).reshape(6, 1, 7, 7)
    expected = functional.interpolate(patches, size=[4, 4], mode="bilinear").flatten(1)
    found = torch.stack([part for parts in observed.attention[need] for part in parts])
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_scores_belong_to_the_image_they_come_from(setup: Tiny) -> None:
    """The last item alone has the scores it has among the others."""
    need = needs_of(setup)[-1]
    for modality in modalities(setup):
        whole = observe(setup, modality, (need,))[1]
        last = observe(last_item(setup, modality), modality, (need,))[1]
        for alone, among in zip(last.attention[need][0], whole.attention[need][-1], strict=True):
            torch.testing.assert_close(alone, among, **TOLERANCE)


def last_item(tiny: Tiny, modality: str) -> Tiny:
    """The set-up with its last image or video only."""
    inputs = dict(tiny.inputs)
    name = "pixel_values" if modality == "image" else "pixel_values_videos"
    if tiny.family.startswith("qwen"):
        grid = inputs[f"{modality}_grid_thw"][-1:]
        inputs |= {f"{modality}_grid_thw": grid, name: inputs[name][-int(grid.prod()) :]}
    else:
        for key in (name, "image_sizes", "batch_num_images", "pixel_attention_mask"):
            if key in inputs:
                inputs[key] = inputs[key][-1:]
    return Tiny(tiny.model, inputs, tiny.family, tiny.spans)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_tower_that_saw_other_partitions_is_refused(setup: Tiny, more: int) -> None:
    base, family = setup.model.model, family_of(setup)
    modality = modalities(setup)[0]
    items = observe(setup, modality)[1].items
    rows = torch.ones(sum(len(item.partitions) for item in items) + more, 37)
    with pytest.raises(LayoutError, match="the vision tower saw"):
        family.token_attention(base, modality, "received", [rows], items, arguments(setup, modality))  # type: ignore[arg-type]
