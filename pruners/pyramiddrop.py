"""PyramidDrop: fewer visual tokens stage by stage, ranked by the last instruction token.

PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, arXiv 2410.17247
(CVPR 2025), from the paper and the released settings: of 32 layers, those from 8, 16 and 24 on see 50, 25 and 12.5 % of
the image's tokens. Score: head-mean attention of the last instruction token, with the queries and keys that the layer
behind the stage makes of its full input. Positions are renumbered after every stage.

Where this differs: with a budget, the factor from stage to stage is solved such that the mean over the layers meets it
(ours; the released code has the three ratios). Where no text follows the last visual token, the last token asks.
Several images are ranked each on their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlm_budget.decoder import DecoderContext, DecoderPruner, Step, most_attended
from vlm_budget.pruner import Positions
from vlm_budget.schedules import check_stages, fixed_stages, solved_stages, stage_layers


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(DecoderPruner):
    """Keep a shrinking share of the visual tokens, by the last instruction token's attention.

    Attributes:
        at: Where stages begin, as shares of the depth; each goes to the nearest layer that may drop.
        ratios: Share of all visual tokens that each stage keeps, such as ``(0.5, 0.25, 0.125)`` of the paper; the
            method then takes no budget. None: stage ``j`` keeps ``factor ** j``, for the factor that meets the budget.
    """

    positions: Positions = "packed"
    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    ratios: tuple[float, ...] | None = None

    paper = "arXiv 2410.17247"
    scores: ClassVar[Literal["previous", "own", "none"]] = "own"

    def __post_init__(self) -> None:
        """Check the stages."""
        super().__post_init__()
        at, ratios = check_stages(self.at, self.ratios)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "ratios", ratios)

    @property
    def fixed(self) -> bool:
        """``ratios`` say how many stay."""
        return self.ratios is not None

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """One step per stage."""
        return self.schedule_behind(1, tokens, spend, layers)

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """The same; stages that would begin before layer ``first`` begin there."""
        if self.ratios is not None:
            return fixed_stages(self, self.at, self.ratios, tokens, layers, first)
        assert spend is not None
        return solved_stages(self, stage_layers(self, self.at, layers, first), self.curve, tokens, spend, layers)

    def curve(self, factor: float) -> list[float]:
        """Share of all visual tokens per stage."""
        return [factor ** (stage + 1) for stage in range(len(self.at))]

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        """Top ``k`` by the last instruction token's attention."""
        return most_attended(ctx, ctx.readers[-1:], k)
