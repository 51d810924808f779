"""Under autocast the model runs in half precision; scores are computed and tokens chosen in float32 all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import vlm_budget
from vlm_budget.engine import probes
from vlm_budget.pruner import Pruner, Selection
from vlm_budget.registry import PRUNERS

from . import schedules
from .conftest import BUDGET, VISION, case
from .patched import unpatched_or_skip

DECODER = [name for name in vlm_budget.list_methods() if PRUNERS.get(name).stage == "decoder"]
Call = tuple[Callable[[], Any], Any]


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, cls: type[Pruner], name: str) -> Iterator[list[Call]]:
    """The calls of a method: what makes each again, and what it returned."""
    calls: list[Call] = []
    function = getattr(cls, name)

    def recording(self: Pruner, ctx: Any, k: int) -> Any:
        result = function(self, ctx, k)
        calls.append((lambda: function(self, ctx, k), result))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(cls, name, recording)
        yield calls


def forward(model: Any, inputs: dict[str, Any]) -> None:
    """A prefill under autocast, which must be on in the model."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.dtype == torch.bfloat16


def check_same_again(calls: list[Call]) -> None:
    """Without autocast the method chooses the same tokens from what it was shown, and merges nearly the same."""
    assert calls
    for again, found in calls:
        with torch.no_grad():
            want = again()
        if not isinstance(found, Selection):
            found, want = Selection(found), Selection(want)
        assert torch.equal(found.keep, want.keep)
        if want.values is not None:
            # The projector runs as the model does: in bfloat16 then, in float32 now.
            torch.testing.assert_close(found.values.float(), want.values.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("method", VISION)
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "smolvlm"])
def test_methods_before_the_language_model(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case(name).tiny
    unpatched_or_skip(lambda: forward(tiny.model, tiny.clone()), None, "autocast")
    name_of_choice = "select_prompt" if PRUNERS.get(method)().joint else "select"
    seen = recorded(monkeypatch, PRUNERS.get(method), name_of_choice)
    with seen as calls, vlm_budget.patch(tiny.model, method, BUDGET):
        forward(tiny.model, tiny.clone())
    check_same_again(calls)


@pytest.mark.parametrize("method", DECODER)
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_methods_inside_the_language_model(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = schedules.fresh(name)
    chosen = PRUNERS.get(method)()
    seen = recorded(monkeypatch, PRUNERS.get(method), "pick")
    with seen as calls, vlm_budget.patch(tiny.model, chosen, None if chosen.fixed else 0.5):
        forward(tiny.model, tiny.clone())
    if method != "vtw":  # which drops all, and is never asked
        check_same_again(calls)


def test_scores_are_those_of_the_queries_and_keys_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = case("llava").tiny
    rows: list[tuple[Any, ...]] = []
    real = probes.attention_rows

    def recording(query: Any, key: Any, scaling: float, **limits: Any) -> Any:
        found = real(query, key, scaling, **limits)
        rows.append((found, query, key, scaling))
        return found

    monkeypatch.setattr(probes, "attention_rows", recording)
    with vlm_budget.patch(tiny.model, "hired", BUDGET):
        forward(tiny.model, tiny.clone())
    assert rows
    for found, query, key, scaling in rows:
        assert query.dtype == torch.bfloat16
        want = torch.softmax((query.double() @ key.double().transpose(-1, -2)) * scaling, -1).mean(1)
        torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-5)
