"""MMTok: tokens that cover the instruction and the picture.

MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, arXiv 2508.18264, from the formula. Every token
of the instruction, and every vision feature, spreads one unit over the tokens that resemble it. A set covers each of
them by its largest share in the set; the set that covers most is chosen greedily.

Where this differs from the released code, and why:

* The instruction is read whole, chat template included. The released code leaves stop words out, for which a method
  would need the tokenizer and a list per language.
* Padding and row separators are never candidates, and a prompt does not depend on the others of its batch (the released
  code handles one prompt at a time).

For every token kept, the host waits for the device to say which rows it has raised: to look at all of them would cost
more.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from vlm_budget.errors import OptionError
from vlm_budget.greedy import max_coverage, unit_rows
from vlm_budget.pruner import Context, Pruner


@dataclass(frozen=True, kw_only=True)
class MMTok(Pruner):
    """Greedy maximum coverage of text and vision.

    Attributes:
        text_temperature: Of the softmax of text-to-vision similarities.
        vision_temperature: Of the softmax of vision-to-vision similarities.
        vision_weight: Weight of the picture against the instruction's 1.
    """

    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    vision_weight: float = 0.5

    paper = "arXiv 2508.18264"
    reads_hidden = True
    reads_text = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        for name in ("text_temperature", "vision_temperature", "vision_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise OptionError(f"{name} must be a number, got {value!r}")
        for name in ("text_temperature", "vision_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise OptionError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.vision_weight < float("inf"):
            raise OptionError(f"vision_weight must be non-negative and finite, got {self.vision_weight}")

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Greedy coverage by the patch tokens of the item."""
        assert ctx.hidden is not None and ctx.text is not None
        candidates = ctx.candidates
        hidden = unit_rows(ctx.hidden[candidates])
        text = shares(unit_rows(ctx.text), unit_rows(ctx.features[candidates]), self.text_temperature)
        vision = shares(hidden, hidden, self.vision_temperature).mul_(self.vision_weight)
        return candidates[max_coverage(torch.cat([text, vision]), k)]


def shares(rows: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """How much of each row every token stands for; all shares of all rows sum to one.

    Args:
        rows: [m, C] of length one, what is to be covered.
        tokens: [n, C] of length one.
        temperature: Of the softmax over tokens.

    Returns:
        [m, n] float32 ``softmax_j(cos / temperature) / m``.
    """
    return (rows @ tokens.T).div_(temperature).softmax(1).div_(len(rows))
