"""Shared first layers: the same values as whole runs, to the last bit, and fewer layers run."""

from __future__ import annotations

import copy
import inspect
import itertools
from functools import cache
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from fingerprint import fingerprint
from tiny_parts import finish, row_inputs
from vlm_budget.errors import PatchError
from vlm_budget.families.base import Family
from vlm_budget.models import find_family
from vlm_budget.planning import Methods
from vlm_budget.registry import PRUNERS
from vlm_budget.search.data import prepare
from vlm_budget.search.gsearch import RateSearch
from vlm_budget.search.journal import Journal
from vlm_budget.search.judge import Judge
from vlm_budget.search.metrics import Metric
from vlm_budget.search.prefix import PrefixJudge

LAYERS = 6
SLIDING = ("gemma3",)
FAMILIES = [name for name in tiny_models.SETUPS if name not in (*SLIDING, "llava_right_padded")]


@cache
def deep(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A set-up's model with six decoder layers, and its two prompts, each twice."""
    tiny = tiny_models.build(name)
    config = copy.deepcopy(tiny.model.config)
    text = config.get_text_config()
    text.num_hidden_layers = LAYERS
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = ["full_attention"] * LAYERS
    torch.manual_seed(0)
    model = finish(type(tiny.model)(config))
    data = [row_inputs(tiny, row) for row in (0, 0, 1, 1)]
    for one in data[1::2]:
        one["input_ids"] = torch.where(one["input_ids"] < 60, (one["input_ids"] + 7) % 60, one["input_ids"])
    return model, data


def judges(name: str, **options: Any) -> tuple[Judge, PrefixJudge]:
    model, data = deep(name)
    judge = Judge(copy.deepcopy(model), prepare(model, data), Metric("kl"))
    return judge, PrefixJudge(judge, "instruction", judge.first, **options)


def whole(judge: Judge, rates: tuple[float, ...]) -> float:
    return judge.score(Methods(None, PRUNERS.get("gsearch")(rates=rates)), None).mean


def schedules(first: int) -> list[tuple[int, tuple[float, ...]]]:
    """Fixed layers and rates, in a search's order: trials at each layer, then a restart from the top."""
    found = []
    for settled in [*range(first, LAYERS), first]:
        fixed = (1.0,) * first + tuple(0.8**n for n in range(1, settled - first + 1))
        for rate in (0.5, 0.3, 0.0):
            found.append((settled, fixed + (fixed[-1] * rate,) * (LAYERS - settled)))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_those_of_whole_runs_to_the_last_bit(name: str) -> None:
    judge, prefix = judges(name)
    # Where transformers 4.x cannot do without the other logits, one row of the head's product rounds differently.
    alone = "logits_to_keep" in inspect.signature(judge.model.forward).parameters
    for settled, rates in schedules(judge.first):
        prefix.fix(rates[:settled])
        expected = whole(judge, rates)
        assert prefix.score(rates).mean == (expected if alone else pytest.approx(expected, abs=1e-6)), (settled, rates)
    assert all(each is not None for each in prefix._prefixes)


def test_prompts_whose_prefixes_find_no_room_run_whole() -> None:
    judge, prefix = judges("llava", room=1)
    for settled, rates in schedules(2):
        prefix.fix(rates[:settled])
        assert prefix.score(rates).mean == whole(judge, rates)
    assert prefix._prefixes == [None, None]


def test_prompts_that_find_room_share_while_others_run_whole() -> None:
    judge, prefix = judges("llava")
    rates = schedules(2)[0][1]
    prefix.score(rates)
    first, second = prefix._start
    assert first is not None and second is not None
    small = PrefixJudge(judge, "instruction", 2, room=2 * (first.nbytes + 1))
    assert small.score(rates).mean == whole(judge, rates)
    assert small._start[0] is not None and small._start[1] is None


def test_the_last_token_may_rank() -> None:
    model, data = deep("llava")
    judge = Judge(model, prepare(model, data), Metric("kl"))
    prefix = PrefixJudge(judge, "last", 2)
    rates = (1.0, 1.0, 0.7, 0.5, 0.5, 0.25)
    prefix.fix(rates[:4])
    method = PRUNERS.get("gsearch")(rates=rates, queries="last")
    assert prefix.score(rates).mean == judge.score(Methods(None, method), None).mean


def counted(judge: Judge) -> list[int]:
    """Every call of a decoder layer, from now on."""
    calls: list[int] = []
    family: Family = find_family(judge.model)[2]
    for index, layer in enumerate(family.language_model(judge.base).layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    return calls


def test_only_the_layers_behind_the_settled_ones_run() -> None:
    judge, prefix = judges("llava_next")
    assert judge.reference and len(judge.batches) == 2
    calls = counted(judge)
    trials = schedules(2)[:-3]  # without the restart
    for settled, rates in trials:
        prefix.fix(rates[:settled])
        prefix.score(rates)
    prefixes, settling = 2, LAYERS - 1 - 2
    assert len(calls) == 2 * (prefixes + settling + sum(LAYERS - settled for settled, _ in trials))
    assert len(calls) < 0.55 * 2 * LAYERS * len(trials)


def test_a_search_finds_the_same_either_way() -> None:
    found, judged, calls = [], [], []
    for shared in (True, False):
        judge, prefix = judges("llava_next")
        calls.append(counted(judge))
        search = RateSearch(judge, Journal(None, judge.identity), "instruction", prefix if shared else None)
        found.append(search.search(0.05, None, lambda *_: None))
        judged.append(search.journal.new)
    assert found[0] == found[1] != (1.0,) * LAYERS
    assert judged[0] == judged[1]
    assert len(calls[0]) < len(calls[1])


def test_the_model_is_left_as_it_was() -> None:
    model, data = copy.deepcopy(deep("llava"))
    before = fingerprint(model)
    vlm_budget.gsearch(model, data, metric="kl", tolerance=0.3, progress=False)
    assert fingerprint(model) == before


def test_a_failing_layer_leaves_no_run_behind() -> None:
    judge, prefix = judges("llava")
    rates = (1.0, 1.0, 0.5, 0.5, 0.5, 0.5)
    layer = judge.base.language_model.layers[4]
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    with pytest.raises(RuntimeError, match="out of luck"):
        prefix.score(rates)
    handle.remove()
    assert prefix.score(rates).mean == whole(judge, rates)
    assert "_vlm_budget_handle" not in judge.base.__dict__


def test_rates_are_nested_in_every_trial_of_a_search() -> None:
    judge, prefix = judges("llava")
    asked: list[tuple[float, ...]] = []
    real = prefix.score
    prefix.score = lambda rates: asked.append(rates) or real(rates)  # type: ignore[func-returns-value, method-assign]
    RateSearch(judge, Journal(None, judge.identity), "instruction", prefix).search(0.3, None, lambda *_: None)
    assert asked
    assert all(deep <= shallow for rates in asked for shallow, deep in itertools.pairwise(rates))


def test_plans_are_those_of_a_patched_model_whose_features_are_still_added() -> None:
    """Qwen3-VL adds visual features behind its first layers, three in the released models; only planning runs here."""
    model, data = deep("qwen3_vl")
    model = copy.deepcopy(model)
    model.config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    judge = Judge(model, prepare(model, data), Metric("kl"))
    for name in ("psigmoid", "pyramiddrop"):
        plans = judge.plans(Methods(None, PRUNERS.get(name)()), vlm_budget.Budget(0.7))
        with vlm_budget.patch(model, name, 0.7) as handle:
            assert plans == [handle.plan(**one) for one in data]
        assert min(min(plan.drop_layers) for plan in plans) >= 3
    with pytest.raises(PatchError, match="Pass k=3"):
        judge.plans(Methods(None, PRUNERS.get("fastv")()), vlm_budget.Budget(0.7))
