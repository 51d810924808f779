"""What a prompt costs the language model: FLOPs, bytes of KV cache, and milliseconds where there is a calibration.

All three are of the language model's pass over *one* prompt, layer by layer, so that dropping before it and inside it
are priced alike. FLOPs are multiply-adds counted as two, the way ``torch.utils.flop_counter`` counts them: causal
attention as the full square. The output head is counted apart, since ``generate`` runs it on the last token only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .budget import Unit
from .errors import BudgetError
from .families.flops import linear_flops, pair_flops
from .latency import SavedLatency

if TYPE_CHECKING:
    from .families.base import Family
    from .latency import Latency
    from .layout import VisualItem


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer.

    Attributes:
        token_flops: FLOPs of the linear layers per token.
        pair_flops: FLOPs of attention per pair of tokens.
        token_bytes: Keys and values of one token.
        window: Tokens that a growing cache keeps at most; None without a sliding window.
    """

    token_flops: int
    pair_flops: int
    token_bytes: int
    window: int | None = None


@dataclass(frozen=True)
class CostModel:
    """Prices of one model; the ``Cost`` that plans are made with.

    Attributes:
        layers: The decoder's layers in order.
        row_flops: FLOPs of the output head per row of logits.
        encoder: FLOPs of encoding images and videos.
        latency: Gives the latency model of this machine, when milliseconds are asked for.
    """

    layers: tuple[LayerCost, ...]
    row_flops: int
    encoder: Callable[[Iterable[VisualItem]], int]
    latency: Callable[[], Latency]

    @classmethod
    def of(cls, base: Any, family: Family, latency: Callable[[], Latency] | None = None) -> CostModel:
        """Read the prices off a model.

        Args:
            base: The inner model, with vision tower and language model.
            family: What is known about its class.
            latency: Gives the times to use; by default the calibration that is kept on this machine.
        """
        text = base.config.get_text_config()
        decoder: Any = family.language_model(base)
        windows = _windows(text)
        size = decoder.dtype.itemsize
        layers = tuple(_layer_cost(layer, size, window) for layer, window in zip(decoder.layers, windows, strict=True))
        return cls(
            layers=layers,
            row_flops=2 * text.hidden_size * text.vocab_size,
            encoder=partial(encoder_flops, base, family),
            latency=latency or SavedLatency(base, family),
        )

    def prefill_flops(self, text: int, visual: Sequence[int], logits_rows: int = 0) -> int:
        """FLOPs of the language model over one prompt.

        Args:
            text: Text tokens of the prompt.
            visual: Visual tokens at every decoder layer.
            logits_rows: Rows of logits to count with it; ``generate`` computes one.
        """
        pairs = self._with_tokens(text, visual)
        inner = sum(layer.token_flops * n + layer.pair_flops * n * n for layer, n in pairs)
        return inner + logits_rows * self.row_flops

    def kv_bytes(self, text: int, visual: Sequence[int]) -> int:
        """Bytes that the prompt leaves in a growing cache.

        Args:
            text: Text tokens of the prompt.
            visual: Visual tokens at every decoder layer.
        """
        pairs = self._with_tokens(text, visual)
        return sum(layer.token_bytes * (n if layer.window is None else min(n, layer.window)) for layer, n in pairs)

    def prefill_ms(self, text: int, visual: Sequence[int]) -> float:
        """Predicted milliseconds of the language model over one prompt.

        Args:
            text: Text tokens of the prompt.
            visual: Visual tokens at every decoder layer.

        Raises:
            BudgetError: This model was never calibrated on this machine, or not for prompts this long.
        """
        return self.latency().prefill_ms([n for _, n in self._with_tokens(text, visual)])

    def amount(self, unit: Unit, text: int, visual: Sequence[int]) -> float:
        """The prompt pass in the unit of a budget.

        Args:
            unit: ``"flops"``, ``"ms"`` or ``"bytes"``.
            text: Text tokens of the prompt.
            visual: Visual tokens at every decoder layer.

        Raises:
            BudgetError: Milliseconds cannot be predicted, or the unit is one of tokens.
        """
        if unit == "flops":
            return self.prefill_flops(text, visual)
        if unit == "bytes":
            return self.kv_bytes(text, visual)
        if unit == "ms":
            return self.prefill_ms(text, visual)
        raise BudgetError(f"a cost is in flops, ms or bytes, not in {unit!r}")

    def _with_tokens(self, text: int, visual: Sequence[int]) -> list[tuple[LayerCost, int]]:
        if len(visual) != len(self.layers):
            raise ValueError(f"got visual tokens for {len(visual)} layers, the decoder has {len(self.layers)}")
        return [(layer, text + count) for layer, count in zip(self.layers, visual, strict=True)]


def encoder_flops(base: Any, family: Family, items: Iterable[VisualItem]) -> int:
    """FLOPs of encoding images and videos: vision tower and projector, the same whatever is pruned later."""
    by_modality: dict[Any, list[VisualItem]] = {}
    for item in items:
        by_modality.setdefault(item.modality, []).append(item)
    return sum(family.encoder_flops(base, modality, members) for modality, members in by_modality.items())


def _layer_cost(layer: Any, size: int, window: int | None) -> LayerCost:
    attention = layer.self_attn
    held = int(attention.k_proj.out_features) + int(attention.v_proj.out_features)
    return LayerCost(linear_flops(layer), pair_flops(attention), held * size, window)


def _windows(text: Any) -> list[int | None]:
    """Per layer, the tokens that transformers' growing cache keeps of a sliding window: one less than it is wide."""
    width = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if width is not None else "full_attention"] * text.num_hidden_layers
    return [width - 1 if kind == "sliding_attention" and width is not None else None for kind in kinds]
