"""``gsearch`` on a tiny model: the recipe keeps its promise, stops and resumes, and leaves the model alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_budget
from fingerprint import fingerprint
from vlm_budget.errors import BudgetError, CalibrationError, JournalError, OptionError, PatchError
from vlm_budget.planning import Methods
from vlm_budget.registry import PRUNERS
from vlm_budget.search.data import prepare
from vlm_budget.search.greedy import greedy_rates
from vlm_budget.search.gsearch import _within
from vlm_budget.search.journal import Journal
from vlm_budget.search.judge import Judge
from vlm_budget.search.metrics import Metric

from .conftest import Case, make_case


def quality_by_hand(case: Case, **patching: Any) -> float:
    """Agreement of the patched with the unpatched model, prompt by prompt."""
    prompts = [{key: value for key, value in one.items() if key != "answer"} for one in case.data]
    with torch.no_grad():
        full = [int(case.model(**one).logits[0, -1].argmax()) for one in prompts]
        with vlm_budget.patch(case.model, **patching):
            found = [int(case.model(**one).logits[0, -1].argmax()) for one in prompts]
    return sum(a == b for a, b in zip(full, found, strict=True)) / len(full)


def test_the_recipe_keeps_its_promise_when_patched_from_its_file(case: Case, tmp_path: Path) -> None:
    recipe = vlm_budget.gsearch(case.model, case.data, tolerance=0.4, progress=False)
    recipe.save(tmp_path / "plan.json")
    judged, (name, options) = recipe.calibration, recipe.spec[0]
    assert judged is not None and judged.full_quality == 1.0
    assert (name, len(options["rates"]), judged.size) == ("gsearch", 3, 6)
    assert options["rates"][2] < 1
    assert judged.quality >= 0.6
    assert quality_by_hand(case, plan=tmp_path / "plan.json") == pytest.approx(judged.quality)


def test_every_layer_sees_what_the_recipe_says(case: Case) -> None:
    recipe = vlm_budget.gsearch(case.model, case.data, tolerance=0.4, progress=False)
    rates = recipe.spec[0][1]["rates"]
    plans = []
    with vlm_budget.patch(case.model, plan=recipe) as handle:
        for one in case.data:
            plans.append(handle.plan(**{key: value for key, value in one.items() if key != "answer"}))
            assert plans[-1].row_tokens(0, 3) == [math.ceil(rate * plans[-1].total) for rate in rates]
    mean = sum(plan.mean_tokens(3) / plan.total for plan in plans) / len(plans)
    assert recipe.cost["share"] == pytest.approx(mean)


def test_a_lower_rate_than_found_is_not_good_enough(case: Case) -> None:
    recipe = vlm_budget.gsearch(case.model, case.data, metric="kl", tolerance=0.05, progress=False)
    rates = recipe.spec[0][1]["rates"]
    judge = Judge(case.model, prepare(case.model, case.data), Metric("kl"))

    def quality(last: float) -> float:
        method = PRUNERS.get("gsearch")(rates=(*rates[:2], last))
        return judge.score(Methods(None, method), None).mean

    assert 0 < rates[2] < 1
    assert quality(rates[2]) >= -0.05
    assert quality(rates[2] - 1 / 32) < -0.05


def test_the_model_is_left_as_it_was(case: Case) -> None:
    case.model.train()
    case.model.model.vision_tower.eval()
    before, modes = fingerprint(case.model), [module.training for module in case.model.modules()]
    vlm_budget.gsearch(case.model, case.data, tolerance=0.4, progress=False)
    assert fingerprint(case.model) == before
    assert [module.training for module in case.model.modules()] == modes


def test_a_set_that_the_full_model_gets_all_wrong_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every schedule would be as good, and the one that drops everything the best."""
    prompts = [{key: value for key, value in one.items() if key != "answer"} for one in case.data]
    with torch.no_grad():
        right = [int(case.model(**one).logits[0, -1].argmax()) for one in prompts]
    wrong = next(token for token in range(60) if token not in right)
    for one in case.data:
        one["answer"] = [wrong]
    judged: list[Any] = []
    real = Judge._score
    monkeypatch.setattr(Judge, "_score", lambda self, logits: judged.append(0) or real(self, logits))
    searches: list[Any] = [
        lambda: vlm_budget.gsearch(case.model, case.data, metric="accuracy", progress=False),
        lambda: vlm_budget.gsearch(case.model, case.data, metric="accuracy", budget=0.9, progress=False),
        lambda: vlm_budget.psigmoid(case.model, case.data, 0.8, metric="accuracy", trials=2, progress=False),
        lambda: vlm_budget.autotune(
            case.model, case.data, metric="accuracy", methods="uniform", budgets=0.5, progress=False
        ),
    ]
    for search in searches:
        judged.clear()
        with pytest.raises(CalibrationError, match="expected answer to none of the 6 calibration prompts"):
            search()
        assert len(judged) == 1
    case.data[0]["answer"] = [right[0]]  # one right answer is enough to begin
    vlm_budget.gsearch(case.model, case.data, metric="accuracy", progress=False)


@pytest.mark.parametrize("metric", ["accuracy", "agreement", "kl"])
def test_every_metric_is_judged_alike_in_batches_and_alone(case: Case, metric: str) -> None:
    calibration, measure = prepare(case.model, case.data), Metric(metric)  # type: ignore[arg-type]
    together, alone = (Judge(case.model, calibration, measure, batch) for batch in (8, 1))
    assert [len(batch) for batch in together.batches] == [3, 3]
    assert together.score(None, None).mean == pytest.approx(alone.score(None, None).mean, abs=1e-5)


def test_answers_of_several_tokens_are_what_generate_says(case: Case) -> None:
    with torch.no_grad():
        for one in case.data:
            inputs = {key: value for key, value in one.items() if key != "answer"}
            said = case.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            one["answer"] = said.tolist()
    case.data[0]["answer"][2] ^= 1
    case.data[1]["answer"] = case.data[1]["answer"][:2]  # a label may be shorter
    calibration = prepare(case.model, case.data)
    assert Judge(case.model, calibration, Metric("accuracy", 3)).score(None, None).mean == pytest.approx(5 / 6)
    assert Judge(case.model, calibration, Metric("agreement", 3)).score(None, None).mean == 1.0


def test_a_budget_raises_the_tolerance_until_it_fits(case: Case) -> None:
    recipe = vlm_budget.gsearch(case.model, case.data, budget=0.8, tolerance=1e-6, metric="kl", progress=False)
    assert recipe.cost["share"] <= 0.8
    assert recipe.budget is None
    assert recipe.calibration is not None and (recipe.calibration.tolerance or 0) > 1e-6
    flops = vlm_budget.gsearch(case.model, case.data, budget="90% flops", tolerance=0.01, metric="kl", progress=False)
    assert flops.cost["flops"] <= 0.9 * flops.cost["flops_full"]


def test_a_budget_below_the_first_layers_is_refused_before_the_model_runs(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "score", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(BudgetError, match="nearest feasible budget is '66.67%'"):
        vlm_budget.gsearch(case.model, case.data, budget=0.5, progress=False)


@pytest.mark.parametrize("budget", [0.1, "7 tokens", "11% flops", "12345 flops", "3% kv", "1.7 kB kv"])
def test_the_nearest_budget_that_is_named_is_accepted(case: Case, budget: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        vlm_budget.gsearch(case.model, case.data, budget=budget, progress=False)
    nearest = str(caught.value).split("nearest feasible budget is '")[1].split("'")[0]
    recipe = vlm_budget.gsearch(case.model, case.data, budget=nearest, progress=False)
    assert recipe.spec[0][1]["rates"][:2] == (1.0, 1.0)


def test_a_budget_never_raises_the_tolerance_above_all_quality() -> None:
    asked: list[float] = []

    def searched(loss: float) -> tuple[float, ...]:
        asked.append(loss)
        return (loss,)

    found = _within(vlm_budget.Budget(0.5), 0.3, 1.0, searched, lambda rates: rates[0] == 1)
    assert found == (1.0, (1.0,)) and max(asked) == 1
    assert _within(vlm_budget.Budget(0.5), 0.3, math.inf, searched, lambda rates: rates[0] > 4)[0] > 4


def test_a_stopped_search_goes_on_without_judging_anything_twice(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"metric": "kl", "tolerance": 0.2, "progress": False}
    expected = vlm_budget.gsearch(case.model, case.data, **options)
    journal = tmp_path / "points"
    judged: list[Any] = []
    real = Journal.remember

    def counted(self: Journal, point: Any, evaluate: Any) -> Any:
        def once() -> Any:
            if len(judged) == 3:
                raise KeyboardInterrupt
            found = evaluate()
            judged.append(point)
            return found

        return real(self, point, once)

    monkeypatch.setattr(Journal, "remember", counted)
    with pytest.raises(KeyboardInterrupt):
        vlm_budget.gsearch(case.model, case.data, journal=journal, **options)
    assert len(journal.read_text().splitlines()) == 4
    first, judged[:] = list(judged), []
    monkeypatch.setattr(Journal, "remember", real)
    opened: list[Journal] = []
    start = Journal.__init__

    def watched(self: Journal, *arguments: Any) -> None:
        start(self, *arguments)
        opened.append(self)

    monkeypatch.setattr(Journal, "__init__", watched)
    resumed = vlm_budget.gsearch(case.model, case.data, journal=journal, **options)
    assert resumed == expected
    again = vlm_budget.gsearch(case.model, case.data, journal=journal, **options)
    assert again == expected
    rows = journal.read_text().splitlines()
    assert opened[0].new == len(rows) - 1 - len(first)
    assert opened[1].new == 0
    assert len(set(rows)) == len(rows)


def test_a_journal_of_other_data_metric_or_weights_is_refused(case: Case, tmp_path: Path) -> None:
    journal = tmp_path / "points"
    vlm_budget.gsearch(case.model, case.data, journal=journal, tolerance=0.4, progress=False)
    with pytest.raises(JournalError, match="its calibration differ"):
        vlm_budget.gsearch(case.model, case.data[:5], journal=journal, progress=False)
    with pytest.raises(JournalError, match="its metric differ"):
        vlm_budget.gsearch(case.model, case.data, metric="kl", journal=journal, progress=False)
    with torch.no_grad():
        case.model.lm_head.weight.add_(0)
        case.model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(JournalError, match="its model differ"):
        vlm_budget.gsearch(case.model, case.data, journal=journal, progress=False)


def test_a_patched_model_is_refused(case: Case) -> None:
    with vlm_budget.patch(case.model, "random", 0.5), pytest.raises(PatchError, match="undo"):
        vlm_budget.gsearch(case.model, case.data, progress=False)


@pytest.mark.parametrize(
    "options", [{"metric": "kl"}, {}, {"answer_tokens": 2}, {"metric": "accuracy"}, {"metric": "accuracy", "batch": 1}]
)
def test_logits_that_are_no_numbers_are_refused(case: Case, options: dict[str, Any]) -> None:
    """The most likely of NaNs is a token too, so all of them would agree."""
    for one in case.data:
        one["answer"] = [0]
    with torch.no_grad():
        case.model.lm_head.weight[1].fill_(float("nan"))
    with pytest.raises(CalibrationError, match="not finite"):
        vlm_budget.gsearch(case.model, case.data, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "grid"}, "search must be 'bisection' or 'bayes', got 'grid'"),
        ({"tolerance": 0.0}, "tolerance must be a number above 0"),
        ({"tolerance": float("nan")}, "tolerance must be a number above 0"),
        ({"metric": "bleu"}, "metric must be one of"),
        ({"queries": "all"}, "queries must be"),
        ({"tolerance": "1%"}, "tolerance must be a number above 0"),
        ({"tolerance": True}, "tolerance must be a number above 0"),
        ({"tolerance": 5.0}, "share of the full model's agreement that may be lost, below 1"),
        ({"search": "bayes", "evaluations": 0}, "evaluations must be a number from 1 on, got 0"),
        ({"search": "bayes", "evaluations": -3}, "evaluations must be a number from 1 on, got -3"),
        ({"search": "bayes", "sampler": []}, "sampler must be"),
        ({"search": "bayes", "seed": -1}, "seed must be"),
        ({"evaluations": 3}, "evaluations is for search='bayes'"),
        ({"sampler": "gp"}, "sampler is for search='bayes'"),
        ({"seed": 0}, "seed is for search='bayes'"),
        ({"batch": 0}, "batch must be a number from 1 on, got 0"),
        ({"batch": -1}, "batch must be a number from 1 on, got -1"),
        ({"max_spread": float("nan")}, "max_spread must be a number from 1 on"),
        ({"max_spread": "4"}, "max_spread must be a number from 1 on"),
        ({"journal": 5}, "journal must be a path"),
    ],
)
def test_options_that_mean_nothing_are_refused(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        vlm_budget.gsearch(case.model, case.data, progress=False, **options)


def test_bayesian_search_finds_a_schedule_within_the_tolerance(case: Case) -> None:
    options: dict[str, Any] = {"metric": "kl", "tolerance": 0.2, "progress": False}
    recipe = vlm_budget.gsearch(case.model, case.data, search="bayes", evaluations=8, **options)
    assert recipe.calibration is not None and recipe.calibration.quality >= -0.2
    assert recipe.spec[0][1]["rates"][2] < 1


def test_layers_whose_visual_features_are_still_added_keep_everything() -> None:
    case = make_case("qwen3_vl")
    case.model.config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    judge = Judge(case.model, prepare(case.model, case.data), Metric("kl"))
    assert judge.first == 3
    assert greedy_rates(lambda _: True, 6, first=judge.first) == (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
