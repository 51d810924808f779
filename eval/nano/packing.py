"""Many questions behind one visual prefix.

The language model reads ``<s>``, the visual tokens, then every question as a block that sees the prefix and
itself but no other question. The logits are those of the stock forward, one question at a time (a test holds
them to 1e-4), at a fraction of the cost. Some visual tokens may be left out, as after pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_budget.eval.nano.data import PROMPT_WORDS, Question
from vlm_budget.eval.nano.modeling import (
    BOS_ID,
    PARTITIONS,
    PATCHES,
    SIDE,
    VISUAL_TOKENS,
    VOCAB,
    build_image_processor,
)
from vlm_budget.eval.nano.scene import Scene

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor

_ID = {word: i for i, word in enumerate(VOCAB)}


def _patch_slots() -> Tensor:
    thumbnail = torch.arange(PATCHES)
    crop, row, col = torch.meshgrid(torch.arange(PARTITIONS - 1), torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    page_row, page_col = (crop // 2) * SIDE + row, (crop % 2) * SIDE + col
    return torch.cat([thumbnail, (PATCHES + page_row * (2 * SIDE + 1) + page_col).flatten()])


PATCH_SLOTS = _patch_slots()
"""``[180]``: place of every patch (thumbnail, then crops row-major) among the 192 visual tokens."""
NEWLINE_SLOTS = PATCHES + torch.arange(2 * SIDE) * (2 * SIDE + 1) + 2 * SIDE
"""``[12]``: places of the newline tokens."""
ALL_SLOTS = torch.arange(VISUAL_TOKENS)


@cache
def _image_processor() -> LlavaNextImageProcessor:
    return build_image_processor()


def partitions(scenes: Sequence[Scene]) -> Tensor:
    """Thumbnail and crops from the real `LlavaNextImageProcessor`, kept as uint8 ``[B, 5, 3, 48, 48]``.

    The processor resizes in uint8, so that undoing its normalisation loses nothing (`normalise` is the way
    back).
    """
    pages = [torch.from_numpy(scene.pixels).permute(2, 0, 1) for scene in scenes]
    values = _image_processor()(images=pages, return_tensors="pt")["pixel_values"]
    return ((values * 0.25 + 0.5) * 255).round().to(torch.uint8)


def normalise(pixels: Tensor) -> Tensor:
    """Pixel values as the processor gives them, from uint8 partitions of the same shape."""
    return (pixels.float() / 255 - 0.5) / 0.25


def vision_features(model: LlavaNextForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Penultimate patch features of the vision tower.

    Args:
        model: the model.
        pixels: uint8 ``[B, 5, 3, 48, 48]``.

    Returns:
        ``[B, 180, Dv]``, thumbnail first.
    """
    output = model.model.vision_tower(normalise(pixels).flatten(0, 1), output_hidden_states=True)
    hidden = output.hidden_states[-2][:, 1:]
    return hidden.reshape(len(pixels), PARTITIONS * PATCHES, -1)


def project(model: LlavaNextForConditionalGeneration, features: Tensor) -> Tensor:
    """Projected features in sequence order, newlines put in: ``[B, 180, Dv]`` to ``[B, 192, D]``."""
    patches = model.model.multi_modal_projector(features)
    visual = patches.new_empty(len(patches), VISUAL_TOKENS, patches.shape[-1])
    visual = visual.index_copy(1, PATCH_SLOTS.to(patches.device), patches)
    newline = model.model.image_newline.to(patches)[None, None].expand(len(patches), len(NEWLINE_SLOTS), -1)
    return visual.index_copy(1, NEWLINE_SLOTS.to(patches.device), newline)


def encode(questions: Sequence[Sequence[Question]]) -> Tensor:
    """Token ids of prompts and answers, ``[B, Q, 6]``; every image must have the same number of questions."""
    rows = [[[*(_ID[word] for word in q.prompt.split()), _ID[q.answer]] for q in image] for image in questions]
    return torch.tensor(rows)


def _block_mask(prefix: int, blocks: int, length: int, device: torch.device) -> Tensor:
    """True where attention is allowed, ``[N, N]`` with ``N = prefix + blocks * length``."""
    size = prefix + blocks * length
    block = torch.arange(size, device=device).sub(prefix).div(length, rounding_mode="floor").clamp_min(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return causal & ((block[None] < 0) | (block[None] == block[:, None]))


def answer_logits(
    model: LlavaNextForConditionalGeneration,
    visual: Tensor,
    slots: Tensor,
    tokens: Tensor,
    renumber: bool = False,
) -> Tensor:
    """Logits at the last prompt word (the answer) and at the answer (the end of sequence).

    Args:
        model: the model.
        visual: kept visual embeddings, ``[B, K, D]``, in sequence order.
        slots: their places among the 192 visual tokens, ``[B, K]``, increasing.
        tokens: `encode`, ``[B, Q, 6]``.
        renumber: number the kept tokens 1..K instead of keeping their original position ids.

    Returns:
        ``[B, Q, 2, V]``.
    """
    (batch, kept), (blocks, length) = slots.shape, tokens.shape[1:]
    device = visual.device
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch, 1), BOS_ID, device=device))
    inputs = torch.cat([start, visual, embed(tokens.flatten(1))], 1)
    places = torch.arange(kept, device=device).expand(batch, -1) if renumber else slots
    first_word = 1 + (kept if renumber else VISUAL_TOKENS)
    words = (first_word + torch.arange(length, device=device)).repeat(blocks).expand(batch, -1)
    positions = torch.cat([torch.zeros(batch, 1, dtype=torch.long, device=device), places + 1, words], 1)
    mask = _block_mask(1 + kept, blocks, length, device).expand(batch, 1, -1, -1)
    hidden = model.model.language_model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    tails = hidden[:, 1 + kept :].unflatten(1, (blocks, length))[:, :, PROMPT_WORDS - 1 :]
    return model.lm_head(tails)
