"""VTW: visual tokens withdrawal, none of them behind a middle layer.

Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference, arXiv 2405.05803 (AAAI
2025). Layers before K see all visual tokens, the others none. Not checked against the paper's text: that K is about
half the depth is from memory, and the paper's own choice of K by a divergence on sample data is not built here; the
budget chooses K instead (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlm_budget.decoder import DecoderContext, DecoderPruner, Step
from vlm_budget.errors import OptionError, PlanError
from vlm_budget.schedules import out_of_reach, require_layer


@dataclass(frozen=True, kw_only=True)
class VTW(DecoderPruner):
    """Keep all visual tokens up to a layer, and none behind it.

    Attributes:
        layer: K: the first layer (0-based) without visual tokens; the method then takes no budget. None: as many layers
            see them as the budget pays for in full, so that it is met to within one layer; 0.5 gives half the depth.
    """

    layer: int | None = None

    paper = "arXiv 2405.05803"
    scores: ClassVar[Literal["previous", "own", "none"]] = "none"
    layer_field: ClassVar[str | None] = "layer"

    def __post_init__(self) -> None:
        """Check the layer."""
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | None):
            raise OptionError(f"layer must be an int or None, got {self.layer!r}")
        if self.layer is not None and self.layer < 1:
            raise OptionError(f"layer must be at least 1, so that one layer sees the picture, got {self.layer}")

    @property
    def fixed(self) -> bool:
        """``layer`` says it all."""
        return self.layer is not None

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """One step to no tokens."""
        return self._withdrawn(1, tokens, spend, layers)

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """The same; a budget must pay for the first ``first`` layers."""
        if self.layer is not None:
            return super().schedule_behind(first, tokens, spend, layers)
        return self._withdrawn(first, tokens, spend, layers)

    def _withdrawn(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        layer = self.layer
        if layer is None:
            assert spend is not None
            layer = spend // tokens
            if layer >= layers:
                return ()
            if layer < first:
                raise out_of_reach(self, spend, first * tokens, tokens, layers)
        require_layer(self, layer, layers)
        return (Step(layer, 0),)

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        """Never asked by its own schedule.

        Raises:
            PlanError: A plan made for another method asks it to keep some tokens.
        """
        raise PlanError(f"{self} keeps all visual tokens or none; the plan wants {k} of {len(ctx.alive)} at a layer")
