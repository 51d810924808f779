"""G-Search itself, on any function that judges a schedule.

From shallow to deep, the smallest keep rate of each layer that is still good enough, with all deeper layers at the
same rate (assumption A4, ours): tokens once dropped cannot return, so that is the most they could keep, every accepted
prefix is a schedule in its own right, and each step only tightens the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ..errors import MissingExtraError, OptionError
from .checks import check_seed

Rates = tuple[float, ...]
Smallest = Callable[[Callable[[int], bool], int], int]
Sampler = Literal["tpe", "gp"]

GRID = 32
FIRST = 2  # assumption A2: the ranking of the first layer means nothing yet, so layers 0 and 1 keep everything


def greedy_rates(
    good_enough: Callable[[Rates], bool],
    layers: int,
    *,
    first: int = FIRST,
    grid: int = GRID,
    smallest: Smallest | None = None,
    on_layer: Callable[[int, Rates], None] | None = None,
) -> Rates:
    """The lowest rates, layer by layer.

    Args:
        good_enough: Judges one rate per layer; that all tokens are good enough is taken for granted.
        layers: Decoder layers.
        first: First layer that may keep less than all.
        grid: Rates are multiples of ``1 / grid``.
        smallest: Finds the smallest number from 0 that passes a test which the given largest one is known to pass;
            bisection by default.
        on_layer: Told each layer before its trials, with the rates of all layers before it, which no longer change.

    Returns:
        Rates that never rise, 1 for the layers before ``first``; they were good enough, or are all 1.
    """
    find = smallest or bisect
    rates = [grid] * layers
    for layer in range(first, layers):
        fixed = tuple(rate / grid for rate in rates[:layer])
        if on_layer is not None:
            on_layer(layer, fixed)

        def passes(rate: int, fixed: Rates = fixed) -> bool:
            return good_enough(fixed + (rate / grid,) * (layers - len(fixed)))

        found = find(passes, rates[layer - 1])
        rates[layer:] = [found] * (layers - layer)
        if not found:
            break
    return tuple(rate / grid for rate in rates)


def bisect(passes: Callable[[int], bool], most: int) -> int:
    """The smallest passing number in [0, most], where ``most`` passes and whatever is above a passing one does too."""
    fails = -1
    while most - fails > 1:
        middle = (fails + most) // 2
        fails, most = (fails, middle) if passes(middle) else (middle, most)
    return most


def bayesian(evaluations: int, sampler: Sampler, seed: int) -> Smallest:
    """Bayesian optimisation in place of bisection: needs no order among the rates, and more evaluations.

    Args:
        evaluations: Trials per layer.
        sampler: ``"tpe"``, or ``"gp"`` (a Gaussian process with a Matern 5/2 kernel and expected improvement).
        seed: Makes the trials the same every time, so that a resumed search asks for what the journal holds.
    """

    def smallest(passes: Callable[[int], bool], most: int) -> int:
        best = most
        study = new_study(sampler, seed, "minimize")
        for _ in range(min(evaluations, most)):
            trial = study.ask()
            rate = trial.suggest_int("rate", 0, max(most - 1, 0))
            passed = passes(rate)
            best = min(best, rate) if passed else best
            # A rate that fails is worse than any that passes, and the worse the lower it is.
            study.tell(trial, rate if passed else 2 * most - rate)
        return best

    return smallest


def new_study(sampler: Sampler, seed: int, direction: Literal["minimize", "maximize"], startup: int = 8) -> Any:
    """An optuna study that keeps quiet.

    Raises:
        MissingExtraError: optuna is not installed, or scipy for ``"gp"``.
        OptionError: Unknown sampler, or no seed.
    """
    if sampler not in ("tpe", "gp"):
        raise OptionError(f"sampler must be 'tpe' or 'gp', got {sampler!r}")
    check_seed(seed)
    try:
        import optuna

        if sampler == "gp":
            import scipy  # noqa: F401 - optuna imports it at the first trial behind the random ones, and fails there
    except ImportError as error:
        raise MissingExtraError(f"Bayesian search needs {error.name}: pip install 'vlm-budget[search]'") from error
    makers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = makers[sampler](seed=seed, n_startup_trials=startup)
    return optuna.create_study(sampler=chosen, direction=direction)
