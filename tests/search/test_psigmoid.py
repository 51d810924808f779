"""``psigmoid``: the best of its trials, within the budget, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vlm_budget
from vlm_budget.errors import BudgetError, MissingExtraError, OptionError
from vlm_budget.search.judge import Judge
from vlm_budget.search.psigmoid import Shape, best_shape

from .conftest import Case

START = Shape(10.0, 0.0)


def hill(shape: Shape) -> float:
    """Best at beta 4 and low 0.1."""
    return -((shape.beta - 4) ** 2) - 400 * (shape.low - 0.1) ** 2


def test_a_planted_best_shape_is_approached() -> None:
    shape, quality = best_shape(hill, START, 0.2, trials=60)
    assert quality == hill(shape) > -1 > hill(START)


def test_the_result_is_never_worse_than_the_default() -> None:
    assert best_shape(lambda shape: float(shape == START), START, 0.2, trials=12) == (START, 1.0)
    assert best_shape(hill, START, 0.2, trials=1) == (START, hill(START))


def test_every_trial_is_in_its_range_and_the_same_every_time() -> None:
    asked: list[list[Shape]] = [[], []]
    for shapes in asked:
        best_shape(lambda shape, shapes=shapes: shapes.append(shape) or hill(shape), START, 0.2, trials=20, seed=3)  # type: ignore[misc]
    assert asked[0] == asked[1]
    assert asked[0][0] == START
    assert all(1 <= shape.beta <= 40 and 0 <= shape.low <= 0.2 for shape in asked[0])
    assert len(set(asked[0])) > 15


def test_shapes_that_cannot_keep_to_the_budget_are_passed_over() -> None:
    shape, quality = best_shape(lambda s: None if s.low > 0.05 else hill(s), START, 0.2, trials=40)
    assert shape.low <= 0.05
    assert quality == hill(shape)


@pytest.mark.parametrize("budget", [0.8, "25 tokens", "90% flops", "90% kv"])
def test_the_recipe_keeps_to_its_budget_and_is_the_best_trial(case: Case, budget: Any, tmp_path: Path) -> None:
    journal, data = tmp_path / "points", case.data[3:]  # prompts of one size, for a budget in tokens
    recipe = vlm_budget.psigmoid(case.model, data, budget, metric="kl", trials=5, journal=journal, progress=False)
    assert recipe.budget == str(vlm_budget.Budget.parse(budget))
    assert recipe.spec[0][0] == "psigmoid"
    judged = recipe.calibration
    assert judged is not None and judged.tolerance is None
    with vlm_budget.patch(case.model, plan=recipe) as handle:
        for one in data:
            plan = handle.plan(**{key: value for key, value in one.items() if key != "answer"})
            if budget == 0.8:
                assert abs(plan.mean_tokens(3) - 0.8 * plan.total) <= 1
            if budget == "25 tokens":
                assert 24 <= plan.mean_tokens(3) <= 25
    if budget == "90% flops":
        assert 0.88 <= recipe.cost["flops"] / recipe.cost["flops_full"] <= 0.9
    if budget == "90% kv":
        assert 0.88 <= recipe.cost["kv_bytes"] / recipe.cost["kv_bytes_full"] <= 0.9
    found = [line.split('"quality": ')[1].split(",")[0] for line in journal.read_text().splitlines()[2:]]
    assert len(found) == 5
    assert judged.quality == max(map(float, found))


def test_a_stopped_search_goes_on_where_it_was(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"metric": "kl", "trials": 6, "progress": False}
    expected = vlm_budget.psigmoid(case.model, case.data, 0.8, **options)
    real, done = Judge.score, []

    def stopped(self: Judge, *arguments: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments)
        return real(self, *arguments)

    monkeypatch.setattr(Judge, "score", stopped)
    journal = tmp_path / "points"
    with pytest.raises(KeyboardInterrupt):
        vlm_budget.psigmoid(case.model, case.data, 0.8, journal=journal, **options)
    done.clear()
    assert vlm_budget.psigmoid(case.model, case.data, 0.8, journal=journal, **options) == expected
    assert len(done) == 7 - 4


def test_an_impossible_budget_is_refused_before_the_model_runs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "score", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(BudgetError, match="nearest feasible budget"):
        vlm_budget.psigmoid(case.model, case.data, 0.5, progress=False)


def test_what_is_missing_is_said_before_the_model_runs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "score", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(OptionError, match="trials must be a number from 1 on, got 0"):
        vlm_budget.psigmoid(case.model, case.data, 0.8, trials=0)
    for options, message in (
        ({"batch": 0}, "batch must be a number from 1 on, got 0"),
        ({"max_spread": 0.5}, "max_spread must be"),
        ({"seed": "a"}, "seed must be"),
        ({"sampler": "cma"}, "sampler must be"),
        ({"trials": True}, "trials must be"),
    ):
        with pytest.raises(OptionError, match=message):
            vlm_budget.psigmoid(case.model, case.data, 0.8, **options)  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="optuna"):
        vlm_budget.psigmoid(case.model, case.data, 0.8)


def test_points_of_another_budget_are_not_taken_for_these(case: Case, tmp_path: Path) -> None:
    journal = tmp_path / "points"
    for budget in (0.8, 0.9):
        vlm_budget.psigmoid(case.model, case.data, budget, metric="kl", trials=2, journal=journal, progress=False)
    assert len(journal.read_text().splitlines()) == 1 + 1 + 2 * 2  # header, the full model, two trials per budget
