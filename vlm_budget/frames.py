"""Who gets how many tokens among the frames of a video: in proportion to a power of their scores, exactly.

QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension, arXiv 2503.08689, squares
the scores. Its release rounds every share down and so spends less than the budget; here the sum is the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .allocate import split
from .errors import BudgetError, FrameScoreError, OptionError


def allocate_frames(
    scores: Any,
    budget: int,
    *,
    caps: Sequence[int] | int,
    power: float = 2.0,
    floor: Sequence[int] | int = 0,
    separators: int = 0,
) -> list[int]:
    """Share a budget out over frames.

    What a frame's cap refuses is poured over the others in proportion to their weights, until all is given. Frames of
    score 0 get their floor, and what is left once all others are full. Only the proportions of the scores matter; of
    equal claims to a last token the earlier frame's is met.

    Args:
        scores: Relevance of every frame, finite and not negative, of any scale: a sequence, array or tensor. All zero
            means that all are equal.
        budget: Tokens in all.
        caps: The most tokens each frame can have (its grid), or one number for all.
        power: A frame weighs ``score ** power``; 0 makes all equal.
        floor: The least tokens of each frame, as far as its cap allows, or one number for all; with 0, frames may get
            none.
        separators: Tokens that stay besides, paid from the budget.

    Returns:
        Tokens of every frame, summing to ``budget - separators``.

    Raises:
        FrameScoreError: A score is no number, not finite or negative, or there are other frames than scores.
        BudgetError: The frames take less, or more, than the budget; the message names the nearest one.
        OptionError: ``power`` or ``floor`` is not usable.
    """
    if not isinstance(power, int | float) or isinstance(power, bool) or not 0 <= power < math.inf:
        raise OptionError(f"power must be a finite number of at least 0, got {power!r}")
    known = _numbers(scores)
    limits, lows = ([n] * len(known) if isinstance(n, int) else [int(one) for one in n] for n in (caps, floor))
    if min([*limits, *lows], default=0) < 0:
        raise OptionError(f"caps and floor must be numbers of tokens of at least 0, got {caps!r} and {floor!r}")
    if not len(limits) == len(lows) == len(known):
        raise FrameScoreError(f"there are {len(known)} scores for {len(limits)} frames; pass one score per frame")
    floors = [min(low, cap) for low, cap in zip(lows, limits, strict=True)]
    least, most = sum(floors) + separators, sum(limits) + separators
    if not least <= budget <= most:
        raise BudgetError(
            f"cannot spend {budget} tokens on {len(known)} frames: they take between {least} and {most}"
            f"{f', {separators} separators included' if separators else ''}. "
            f"The nearest feasible budget is {min(max(budget, least), most)} tokens."
        )
    return split(budget - separators, frame_weights(known, power), limits, floors)


def frame_weights(scores: Sequence[float], power: float = 2.0) -> list[float]:
    """``(score / highest) ** power`` of every frame, all 1 where no score is above 0."""
    highest = max(scores, default=0.0)
    return [(score / highest) ** power if highest > 0 else 1.0 for score in scores]


def _numbers(scores: Any) -> list[float]:
    try:
        found = [float(score) for score in (scores.tolist() if hasattr(scores, "tolist") else scores)]
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameScoreError(f"scores must be numbers, one per frame, got {scores!r:.80}") from error
    for index, score in enumerate(found):
        if not math.isfinite(score) or score < 0:
            raise FrameScoreError(f"scores must be finite and not negative; that of frame {index} is {score}")
    return found
