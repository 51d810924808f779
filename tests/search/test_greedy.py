"""G-Search on toy models whose right schedule is known: it is found, step by step, and with few evaluations."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_budget.errors import MissingExtraError, OptionError
from vlm_budget.search import greedy
from vlm_budget.search.greedy import GRID, Rates, bayesian, bisect, greedy_rates


class Toy:
    """A model that is good enough as long as no layer keeps less than it needs."""

    def __init__(self, needs: Sequence[int]) -> None:
        self.needs = tuple(needs)
        self.asked: list[Rates] = []

    def __call__(self, rates: Rates) -> bool:
        assert len(rates) == len(self.needs)
        assert all(deep <= shallow for shallow, deep in itertools.pairwise(rates)), "dropped tokens would return"
        self.asked.append(rates)
        return all(rate * GRID >= need for rate, need in zip(rates, self.needs, strict=True))


def best(needs: Sequence[int]) -> Rates:
    """The lowest never rising rates that hold every need: the most any deeper layer needs."""
    return tuple(max(needs[layer:]) / GRID for layer in range(len(needs)))


planted = st.lists(st.integers(0, GRID), min_size=1, max_size=10).map(lambda deep: [GRID, GRID, *deep])


@settings(max_examples=200)
@given(planted)
def test_a_planted_schedule_is_found(needs: list[int]) -> None:
    assert greedy_rates(Toy(needs), len(needs)) == best(needs)


@given(planted)
def test_bisection_asks_at_most_six_times_per_layer(needs: list[int]) -> None:
    toy = Toy(needs)
    greedy_rates(toy, len(needs))
    assert len(toy.asked) <= 6 * (len(needs) - 2)  # 33 outcomes, 0 to 32


@given(planted)
def test_every_accepted_prefix_is_a_schedule_that_was_judged_good(needs: list[int]) -> None:
    toy, prefixes = Toy(needs), []
    rates = greedy_rates(toy, len(needs), on_layer=lambda layer, fixed: prefixes.append((layer, fixed)))
    for layer, fixed in prefixes:
        assert len(fixed) == layer
        assert fixed == rates[:layer]
        whole = fixed + (fixed[-1],) * (len(needs) - layer)
        assert whole in toy.asked or set(whole) == {1.0}


def test_a_model_that_needs_everything_keeps_everything() -> None:
    assert greedy_rates(lambda rates: set(rates) == {1.0}, 6) == (1.0,) * 6


def test_zero_ends_the_search() -> None:
    toy = Toy([GRID, GRID, 16, 0, 0, 0, 0])
    assert greedy_rates(toy, 7) == (1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    assert not any(len(set(rates)) > 3 for rates in toy.asked)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_two_layers_are_never_tried(layers: int) -> None:
    toy = Toy([0] * layers)
    assert greedy_rates(toy, layers) == (1.0,) * layers
    assert toy.asked == []


@given(st.integers(0, 40), st.data())
def test_bisection_finds_the_smallest_passing_number(most: int, data: st.DataObject) -> None:
    edge = data.draw(st.integers(0, most))
    assert bisect(lambda number: number >= edge, most) == edge


@pytest.mark.parametrize(("sampler", "evaluations"), [("tpe", GRID), ("gp", 12)])
def test_bayesian_search_comes_near_a_planted_schedule(sampler: greedy.Sampler, evaluations: int) -> None:
    needs = [GRID, GRID, 20, 5]
    found = greedy_rates(Toy(needs), len(needs), smallest=bayesian(evaluations, sampler, seed=0))
    assert Toy(needs)(found)
    assert all(abs(a - b) <= 2 / GRID for a, b in zip(found, best(needs), strict=True))


def test_bayesian_search_asks_the_same_again() -> None:
    toys = [Toy([GRID, GRID, 12, 3]) for _ in range(2)]
    for toy in toys:
        greedy_rates(toy, 4, smallest=bayesian(6, "tpe", seed=7))
    assert toys[0].asked == toys[1].asked


def test_a_missing_or_unknown_sampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for unknown in ("cma", ["tpe"]):
        with pytest.raises(OptionError, match="sampler must be 'tpe' or 'gp', got"):
            greedy.new_study(unknown, 0, "minimize")  # type: ignore[arg-type]
    for seed in (-1, 2**32, "a", True, 0.5):
        with pytest.raises(OptionError, match="seed must be"):
            greedy.new_study("tpe", seed, "minimize")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"optuna: pip install 'vlm-budget\[search\]'"):
        greedy.new_study("tpe", 0, "minimize")
