"""Many questions behind one visual prefix.

The language model reads ``<s>``, the visual tokens, then every question as a block that sees the prefix and
itself but no other question. The logits are those of the stock forward, one question at a time (a test holds
them to 1e-4), at a fraction of the cost. Visual tokens may be left out, as after pruning, and pictures may
come at another resolution, as after a budget per frame.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlm_budget.eval.views.modeling import BOS_ID, FRAME_TOKENS, LAYER, MEAN, STD, VIEW_TOKENS
from vlm_budget.eval.views.questions import PROMPT_WORDS

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

_BANDS = 4


class Prefix(NamedTuple):
    """What stands before the questions.

    Attributes:
        visual: embeddings, ``[B, K, D]``, in sequence order.
        places: their position ids, counted from the first visual token of the whole prompt, ``[B, K]``.
        length: the position id of the first word, counted likewise.
    """

    visual: Tensor
    places: Tensor
    length: int

    def keep(self, slots: Tensor, renumber: bool) -> Prefix:
        """The tokens at ``slots`` ``[B, k]`` (increasing) alone; renumbered 0..k-1 or at their places."""
        visual = self.visual.gather(1, slots[..., None].expand(-1, -1, self.visual.shape[-1]))
        if renumber:
            return whole(visual)
        return Prefix(visual, self.places.gather(1, slots), self.length)


def whole(visual: Tensor) -> Prefix:
    """Tokens ``[B, K, D]`` without gaps."""
    batch, count, _ = visual.shape
    return Prefix(visual, torch.arange(count, device=visual.device).expand(batch, -1), count)


def normalise(pixels: Tensor) -> Tensor:
    """Pixel values as the processors give them: uint8 ``[..., S, S, 3]`` to float32 ``[..., 3, S, S]``."""
    return (pixels.movedim(-1, -3).float() / 255 - MEAN) / STD


def tower_features(model: LlavaOnevisionForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Features of the layer that the language model reads: uint8 ``[N, S, S, 3]`` to ``[N, 36, Dv]``."""
    return model.model.vision_tower(normalise(pixels), output_hidden_states=True).hidden_states[LAYER]


def room_prefix(model: LlavaOnevisionForConditionalGeneration, features: Tensor) -> Prefix:
    """All tokens of several pictures, a newline behind each: features ``[B, V, 36, Dv]``."""
    patches = model.model.multi_modal_projector(features)
    newline = model.model.image_newline.to(patches).expand(*patches.shape[:2], 1, -1)
    return whole(torch.cat([patches, newline], 2).flatten(1, 2))


def clip_prefix(model: LlavaOnevisionForConditionalGeneration, features: Tensor) -> Prefix:
    """All tokens of a video, frames pooled by the model, one newline at the end: features ``[B, T, 36, Dv]``."""
    pooled = model.model.apply_pooling(model.model.multi_modal_projector(features.flatten(0, 1)))
    frames = pooled.unflatten(0, features.shape[:2]).flatten(1, 2)
    newline = model.model.image_newline.to(frames).expand(len(frames), 1, -1)
    return whole(torch.cat([frames, newline], 1))


PREFIX = {"rooms": room_prefix, "haystack": clip_prefix}
NATIVE = {"rooms": VIEW_TOKENS - 1, "haystack": FRAME_TOKENS}
"""Tokens of one picture at full budget, its newline apart."""


def _question_mask(prefix: int, blocks: int, length: int, device: torch.device) -> Tensor:
    """True where a word may look, ``[blocks * length, prefix + blocks * length]``: the prefix, and its own block."""
    words = blocks * length
    block = torch.arange(words, device=device).div(length, rounding_mode="floor")
    causal = torch.ones(words, words, dtype=torch.bool, device=device).tril()
    own = causal & (block[None] == block[:, None])
    return torch.cat([torch.ones(words, prefix, dtype=torch.bool, device=device), own], 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention ``[B, H, L, d]`` over keys ``[B, H, N, d]`` where ``mask`` ``[L, N]`` allows it.

    Written out: torch's fused kernel for CPUs takes more than twice as long forward and backward in bfloat16 on a
    processor that multiplies matrices in it (24 against 54 ms for 8 x 4 heads of 445 positions).
    """
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
    rows, keys = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(bias.expand(len(rows), -1, -1), rows, keys, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(value.dtype), value.flatten(0, 1)).unflatten(0, query.shape[:2])


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in bands of rows, each over the keys that its last row may see."""
    size = query.shape[2]
    ones = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    edges = [size * band // _BANDS for band in range(_BANDS + 1)]
    bands = [
        _attend(query[:, :, low:high], key[:, :, :high], value[:, :, :high], ones[low:high, :high])
        for low, high in pairwise(edges)
        if high > low
    ]
    return torch.cat(bands, 2)


def _tails(language: Any, hidden: Tensor, positions: Tensor, prefix: int, mask: Tensor, wanted: Tensor) -> Tensor:
    """Final hidden states of some words: the decoder layers' own modules, called in their own order.

    Two things are left out that change no wanted state: what lies above the diagonal of the prefix, and, in the
    last layer, all states that nothing asks for. Together they are about half of a stock forward.

    Args:
        language: the Qwen2 decoder.
        hidden: embeddings of prefix and words, ``[B, N, D]``.
        positions: position ids, ``[B, N]``.
        prefix: length of the prefix.
        mask: `_question_mask`.
        wanted: indices of the wanted words, counted from the first word.

    Returns:
        ``[B, len(wanted), D]``.
    """
    cos, sin = (x[:, None] for x in language.rotary_emb(hidden, positions))

    def turned(x: Tensor, rows: slice | Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos[:, :, rows] + torch.cat([-two, one], -1) * sin[:, :, rows]

    for layer in language.layers:
        last, attention = layer is language.layers[-1], layer.self_attn
        rows = prefix + wanted if last else slice(None)
        normed = layer.input_layernorm(hidden)

        def heads(project: Any, x: Tensor, width: int = attention.head_dim) -> Tensor:
            return project(x).unflatten(-1, (-1, width)).transpose(1, 2)

        query = turned(heads(attention.q_proj, normed[:, rows]), rows)
        key, value = turned(heads(attention.k_proj, normed), slice(None)), heads(attention.v_proj, normed)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if last:
            mixed = _attend(query, key, value, mask[wanted])
        else:
            seen = _causal(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix])
            mixed = torch.cat([seen, _attend(query[:, :, prefix:], key, value, mask)], 2)
        hidden = hidden[:, rows] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return language.norm(hidden)


def answer_logits(model: LlavaOnevisionForConditionalGeneration, prefix: Prefix, tokens: Tensor) -> Tensor:
    """Logits at the last prompt word (the answer) and at the answer (the end of sequence).

    Args:
        model: the model.
        prefix: the visual tokens.
        tokens: ids of prompts and answers, ``[B, Q, PROMPT_WORDS + 1]``.

    Returns:
        ``[B, Q, 2, V]``.
    """
    (batch, kept), (blocks, length) = prefix.places.shape, tokens.shape[1:]
    device = prefix.visual.device
    embed = model.get_input_embeddings()
    start = embed(torch.full((batch, 1), BOS_ID, device=device))
    inputs = torch.cat([start, prefix.visual, embed(tokens.flatten(1))], 1)
    words = (1 + prefix.length + torch.arange(length, device=device)).repeat(blocks).expand(batch, -1)
    positions = torch.cat([torch.zeros(batch, 1, dtype=torch.long, device=device), prefix.places + 1, words], 1)
    mask = _question_mask(1 + kept, blocks, length, device)
    wanted = torch.arange(blocks * length, device=device).view(blocks, length)[:, PROMPT_WORDS - 1 :].flatten()
    tails = _tails(model.model.language_model, inputs, positions, 1 + kept, mask, wanted)
    return model.lm_head(tails.unflatten(1, (blocks, -1)))
