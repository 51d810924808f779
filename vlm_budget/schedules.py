"""Schedules that methods inside the language model share: one drop, or several stages, solved for a budget.

Spending is visual tokens summed over the decoder layers. Every schedule here spends at most what it is given, and no
layer sees fewer tokens when it is given more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Real

from .budget import Budget
from .decoder import Step
from .errors import InfeasibleBudgetError, OptionError


def require_layer(who: object, layer: int, layers: int) -> None:
    """A drop at the input of ``layer`` makes sense in a model of ``layers`` decoder layers.

    Raises:
        OptionError: It does not: the model has no such layer.
    """
    if layer >= layers:
        raise OptionError(
            f"{who} drops at the input of decoder layer {layer}, but the model has only {layers} (0 to {layers - 1}). "
            f"Choose a layer between 1 and {max(layers - 1, 1)}."
        )


def nearest_share(least: int, full: int) -> Budget:
    """The share of ``full`` that pays for ``least``, rounded up to a hundredth of a percent, so that it can be met."""
    return Budget.parse(f"{min(math.ceil(least / full * 1e4 - 1e-6) / 100, 100):g}%")


def out_of_reach(who: object, spend: int, least: int, tokens: int, layers: int) -> InfeasibleBudgetError:
    """The error for a budget below what a method must spend.

    Args:
        who: The method.
        spend: What it was given.
        least: What it needs.
        tokens: Visual tokens that enter the language model.
        layers: Decoder layers.
    """
    return InfeasibleBudgetError(
        f"{who} cannot keep to {spend / layers:.4g} of {tokens} visual tokens, mean over {layers} decoder layers: its "
        "first layers see all of them.",
        [nearest_share(least, tokens * layers)],
    )


def one_drop(who: object, layer: int, tokens: int, spend: int, layers: int) -> tuple[Step, ...]:
    """All tokens before ``layer``, and from there on as many as the rest of ``spend`` allows.

    Raises:
        BudgetError: Not even one token is left for each layer behind.
        OptionError: The model has no such layer.
    """
    require_layer(who, layer, layers)
    if spend >= tokens * layers:
        return ()
    behind = layers - layer
    keep = (spend - layer * tokens) // behind
    if keep < 1:
        raise out_of_reach(who, spend, layer * tokens + behind, tokens, layers)
    return (Step(layer, keep),)


def stage_layers(who: object, at: Sequence[float], layers: int, first: int = 1) -> tuple[tuple[int, int], ...]:
    """Which stage begins at which layer: depths ``at`` in (0, 1) to the nearest layer from ``first`` on.

    In a shallow model several stages may meet at one layer; the last of them, which keeps the least, counts.

    Returns:
        Pairs of layer and index of the stage, ascending.

    Raises:
        OptionError: The model has a single layer, in front of which nothing can be dropped.
    """
    require_layer(who, first, layers)
    nearest = (min(max(math.floor(depth * layers + 0.5), first), layers - 1) for depth in at)
    return tuple({layer: stage for stage, layer in enumerate(nearest)}.items())


def fixed_stages(
    who: object, at: Sequence[float], ratios: Sequence[float], tokens: int, layers: int, first: int = 1
) -> tuple[Step, ...]:
    """Stages that keep given shares of all tokens, at least one token each.

    Raises:
        OptionError: See :func:`stage_layers`.
    """
    stages = stage_layers(who, at, layers, first)
    return _changing([Step(layer, max(1, round(tokens * ratios[stage]))) for layer, stage in stages], tokens)


@lru_cache(maxsize=4096)  # planning in FLOPs or milliseconds asks for the same counts again and again
def solved_stages(
    who: object,
    stages: tuple[tuple[int, int], ...],
    shape: Callable[[float], Sequence[float]],
    tokens: int,
    spend: int,
    layers: int,
) -> tuple[Step, ...]:
    """Stages whose shares follow a one-parameter shape, for the largest parameter that ``spend`` allows.

    Args:
        who: The method, for the message.
        stages: Pairs of layer and index of the stage, ascending, from :func:`stage_layers`.
        shape: Parameter in [0, 1] to the share of all tokens that each stage keeps; continuous, no share ever falls
            with the parameter or grows with the stage; all 0 at 0 and all 1 at 1.
        tokens: Visual tokens that enter the language model.
        spend: Visual tokens summed over the layers.
        layers: Decoder layers.

    Raises:
        BudgetError: Not even one token is left for each layer behind the first stage.
    """
    if spend >= tokens * layers:
        return ()
    starts = [layer for layer, _ in stages]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], layers], strict=True)]
    room = spend - starts[0] * tokens
    if room < sum(lengths):
        raise out_of_reach(who, spend, starts[0] * tokens + sum(lengths), tokens, layers)

    def counts(parameter: float) -> list[int]:
        shares = shape(parameter)
        return [max(1, math.floor(tokens * shares[stage])) for _, stage in stages]

    def spent(keep: Sequence[int]) -> int:
        return sum(count * length for count, length in zip(keep, lengths, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(counts(middle)) <= room else (low, middle)
    keep = counts(low)
    # Stages that would get their next token at the same parameter get it one by one, the shallow ones first.
    for stage, count in enumerate(counts(high)):
        if count > keep[stage]:
            if spent(keep) + (count - keep[stage]) * lengths[stage] > room:
                break
            keep[stage] = count
    return _changing([Step(start, count) for start, count in zip(starts, keep, strict=True)], tokens)


def check_stages(at: object, ratios: object) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Depths and shares of stages as tuples.

    Raises:
        OptionError: Not ascending depths in (0, 1), or not as many shares in (0, 1] that never grow.
    """
    depths = _numbers(at)
    if not depths or list(depths) != sorted(set(depths)) or not 0 < depths[0] <= depths[-1] < 1:
        raise OptionError(f"at must be ascending shares of the depth between 0 and 1, such as (0.25, 0.5), got {at!r}")
    if ratios is None:
        return depths, None
    shares = _numbers(ratios)
    if not shares or len(shares) != len(depths) or list(shares) != sorted(shares, reverse=True):
        raise OptionError(f"ratios must be {len(depths)} shares that never grow, one per stage of at, got {ratios!r}")
    if not 0 < shares[-1] <= shares[0] <= 1:
        raise OptionError(f"ratios must lie above 0 and not above 1, got {ratios!r}")
    return depths, shares


def _numbers(values: object) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or any(isinstance(v, bool) or not isinstance(v, Real) for v in values):
        return ()
    return tuple(float(value) for value in values)


def _changing(steps: Sequence[Step], tokens: int) -> tuple[Step, ...]:
    """Steps without those that drop nothing."""
    before = [tokens, *(step.keep for step in steps)]
    return tuple(step for step, count in zip(steps, before, strict=False) if step.keep < count)
