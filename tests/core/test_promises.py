"""Promises are checked at once on the host, and without waiting on a device."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from pretend_device import PretendDevice
from vlm_budget import Pruner, SelectionError
from vlm_budget.decoder import DecoderContext
from vlm_budget.engine.boundary import Boundary
from vlm_budget.engine.clock import Interval
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


def broken(promises: Promises) -> None:
    promises.expect(torch.tensor([0]).to("cuda"), [1], f"{threading.current_thread().name} promised")


def in_another_thread(call: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            with PretendDevice():  # whose modes are a thread's own
                call()
                torch.cuda.synchronize()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, name="Other()")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_a_thread_does_not_fail_of_what_another_was_promised() -> None:
    """In passing; who asks for everything is told everything, once."""
    promises = Promises()
    with PretendDevice():
        in_another_thread(lambda: broken(promises))
        broken(promises)
        torch.cuda.synchronize()
        with pytest.raises(SelectionError, match="^MainThread promised"):
            promises.settle()
        promises.settle()
        with pytest.raises(SelectionError, match=r"^Other\(\) promised"):
            promises.settle(wait=True)
        promises.settle(wait=True)


def test_all_broken_promises_are_told_together() -> None:
    promises = Promises()
    with PretendDevice():
        in_another_thread(lambda: broken(promises))
        broken(promises)
        with pytest.raises(SelectionError, match=r"Other\(\) promised.*\nMainThread promised"):
            promises.settle(wait=True)


def test_what_is_told_late_says_so() -> None:
    promises = Promises()
    with pytest.raises(SelectionError, match=r"kept \[0\]$"):
        promises.expect(torch.tensor([0]), [1], "Careless() promised")
    with PretendDevice():
        promises.expect(torch.tensor([0]).to("cuda"), [1], "Careless() promised")
        with pytest.raises(SelectionError, match=r"kept \[0\] \(told late, .* about an earlier prompt"):
            promises.settle(wait=True)


def test_a_thread_that_only_looks_hides_nothing_from_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    promises, looking, go_on = Promises(), threading.Event(), threading.Event()

    def query(_: object) -> bool:
        looking.set()
        assert go_on.wait(10)
        return False

    with PretendDevice():
        broken(promises)
        monkeypatch.setattr(torch.cuda.Event, "query", query)
        thread = threading.Thread(target=promises.settle)
        thread.start()
        assert looking.wait(10)
        try:
            with pytest.raises(SelectionError, match="MainThread promised"):
                promises.settle(wait=True)
        finally:
            go_on.set()
            thread.join()


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


def test_an_error_in_the_block_is_not_lost_to_a_broken_promise(model: Any) -> None:
    patched, inputs = model
    with pytest.raises(ZeroDivisionError), vlm_budget.patch(patched, METHODS[0], 0.4) as handle:
        patched(**inputs)
        raise ZeroDivisionError
    assert not handle.active
    with pytest.raises(SelectionError, match="promised"):
        handle.report()


def test_a_new_patch_is_in_place_when_a_broken_promise_of_the_old_one_is_told(model: Any) -> None:
    patched, inputs = model
    earlier = vlm_budget.patch(patched, METHODS[0], 0.4)
    patched(**inputs)
    with pytest.warns(UserWarning, match=r"the patch that this one replaces, Twice\(\) promised"):
        handle = vlm_budget.patch(patched, "hired", 0.4)
    assert handle.active and not earlier.active
    patched(**inputs)
    assert handle.report().kept_tokens > 0
    handle.undo()


def test_a_patch_that_fails_leaves_the_old_one_whole_and_its_promise_to_be_told(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched, inputs = model
    handle = vlm_budget.patch(patched, METHODS[0], 0.4)
    patched(**inputs)
    with monkeypatch.context() as patching:
        sound = handle._boundary.hooks()
        patching.setattr(Boundary, "hooks", lambda self: sound if self is handle._boundary else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vlm_budget.patch(patched, "hired", 0.4)
    assert handle.active
    with pytest.raises(SelectionError, match="promised"):
        handle.undo()


def test_a_report_tells_of_other_threads_too(model: Any) -> None:
    patched, inputs = model
    with vlm_budget.patch(patched, "hired", 0.4) as handle:
        in_another_thread(lambda: broken(handle._boundary.accounts.promises))
        patched(**inputs)
        with pytest.raises(SelectionError, match=r"Other\(\) promised"):
            handle.report()
        assert handle.report().kept_tokens > 0


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_a_patched_model_can_be_copied_after_a_prompt(model: Any, duplicate: Callable[[Any], Any]) -> None:
    patched, inputs = model
    handle = vlm_budget.patch(patched, "hired", 0.4)
    logits = patched(**inputs).logits.cpu()
    forget_recorders(patched)
    twin = duplicate(patched)
    handle.undo()
    assert torch.equal(twin(**inputs).logits.cpu(), logits)
    vlm_budget.unpatch(twin)


def forget_recorders(model: torch.nn.Module) -> None:
    """Take away what transformers 5.x leaves behind a forward, which cannot be pickled."""
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "").startswith("transformers."):
                del module._forward_hooks[key]


def test_a_copied_interval_tells_the_same_time() -> None:
    with PretendDevice():
        ended = Interval(torch.device("cuda")).stop()
        torch.cuda.synchronize()
        assert copy.deepcopy(ended).ms == pytest.approx(ended.ms)
