"""Promises are checked at once on the host, and without waiting on a device."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from pretend_device import PretendDevice
from vlm_budget import Pruner, SelectionError
from vlm_budget.decoder import DecoderContext
from vlm_budget.engine.promises import Promises
from vlm_budget.pruner import Context
from vlm_budget.pruners.fastv import FastV


def test_the_host_knows_at_once() -> None:
    promises = Promises()
    promises.expect(torch.tensor([3, 1]), [3, 1], "Careful() promised")
    with pytest.raises(SelectionError, match=r"^Careless\(\) promised \[3, 1\] tokens and kept \[3, 0\]$"):
        promises.expect(torch.tensor([3, 0]), [3, 1], "Careless() promised")
    promises.settle(wait=True)  # told once


def test_a_device_is_waited_for_only_when_someone_asks() -> None:
    promises = Promises()
    with PretendDevice() as device:
        kept = torch.tensor([3, 0]).to("cuda")
        with device.watch() as waits:
            promises.expect(kept, [3, 1], "Careless() promised")
        assert not waits
        with (
            device.watch() as waits,
            pytest.raises(SelectionError, match=r"promised \[3, 1\] tokens and kept \[3, 0\]"),
        ):
            promises.settle(wait=True)
        assert len(waits) == 1
        promises.settle(wait=True)


def test_what_has_arrived_is_compared_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    promises = Promises()
    with PretendDevice():
        promises.expect(torch.tensor([2]).to("cuda"), [2], "Careful() promised")
        promises.expect(torch.tensor([0]).to("cuda"), [1], "Careless() promised")
        arrived = [True, False]
        monkeypatch.setattr(torch.cuda.Event, "query", lambda _: arrived.pop(0))
        torch.cuda.synchronize()
        promises.settle()  # the first has, the second has not
        arrived = [True]
        with pytest.raises(SelectionError, match="Careless"):
            promises.settle()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_copies_start_empty(duplicate) -> None:
    promises = Promises()
    with PretendDevice():
        promises.expect(torch.tensor([0]).to("cuda"), [1], "Careless() promised")
        duplicate(promises).settle(wait=True)


# --- methods that take a token twice, which a device is not asked about at once ---------------------------------------


@dataclass(frozen=True, kw_only=True)
class Twice(Pruner):
    """The first token, over and over."""

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        return ctx.candidates[:1].repeat(k)


@dataclass(frozen=True, kw_only=True)
class TwiceInside(FastV):
    """The same, inside the language model."""

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        return torch.zeros(k, dtype=torch.long, device=ctx.device)


METHODS = (Twice(), TwiceInside(k=1))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, Any]]]:
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    tiny = tiny_models.build("llava_next", layers=4)
    with PretendDevice(), torch.no_grad():
        yield tiny.model.to("cuda"), {name: value.to("cuda") for name, value in tiny.clone().items()}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("asked", ["report", "kept"])
def test_a_broken_promise_is_told_by_whoever_reports(model: Any, method: Pruner, asked: str) -> None:
    patched, inputs = model
    with vlm_budget.patch(patched, method, 0.4) as handle:
        patched(**inputs)
        with pytest.raises(SelectionError, match=r"promised .*\[\d.* and kept \[\d"):
            getattr(handle, asked)()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_broken_promise_is_told_when_the_patch_goes_at_the_latest(model: Any, method: Pruner) -> None:
    patched, inputs = model
    before = patched(**inputs).logits.cpu()
    handle = vlm_budget.patch(patched, method, 0.4)
    patched(**inputs)
    with pytest.raises(SelectionError, match="promised"):
        handle.undo()
    assert not handle.active and torch.equal(patched(**inputs).logits.cpu(), before)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_generate_tells_of_a_broken_promise_by_itself(model: Any, method: Pruner) -> None:
    patched, inputs = model
    with vlm_budget.patch(patched, method, 0.4), pytest.raises(SelectionError, match="promised"):
        patched.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[2, 3])
