"""A patched prefill makes the host wait for the device at most once, on every family and for every method.

Shown on a CUDA device that the CPU plays (``pretend_device``); ``tests/gpu`` shows it on a real one. What transformers
waits for is not ours to count, but a patch must not make it wait more often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from host_waits import CALLS, Asked
from pretend_device import DeviceTensor, PretendDevice, Wait
from tiny_models import Tiny
from tiny_parts import FLOOR
from tiny_vit import images, tiny_vit
from vlm_budget import Pruner
from vlm_budget.pruner import Context
from vlm_budget.pruners.fastv import FastV
from vlm_budget.pruners.hired import HiRED
from vlm_budget.pruners.token_transforming import TokenTransforming
from vlm_budget.registry import VIT_METHODS

from .conftest import GENERATING
from .patched import SAMPLE, unpatched_or_skip

BUDGET = 0.6  # of four layers, the first two of which see all tokens where methods act inside
# One that is asked per crop, one inside the language model, one greedy; one that reads the text, one that merges.
METHODS = ("hired", "fastv", "divprune", "cdpruner", "visionzip")
LEAN = METHODS[:3]
# Gemma 3's sliding windows let nothing be dropped inside.
PAIRS = [(name, method) for name in tiny_models.SETUPS for method in METHODS if (name, method) != ("gemma3", "fastv")]
# Steps of decoding by SAMPLE, times kinds of layers: the outer models of these make the language model's masks; given
# the shortened mask instead, it makes them itself, and looks whether anything is masked in every step of decoding.
MASKS_AGAIN = {"paligemma": 5, "gemma3": 5 * 2}
# Methods that wait more than once, and how often on three images of ``llava_next``; each says why where it is defined.
OFTEN = {
    "holov": 1 + 3,  # once per image
    "sparsevlm": 1 + 2 * 3,  # once per step and image
    "mmtok": 1 + 277,  # once per token kept
}


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel can run on a device that is none."""
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")


@dataclass(frozen=True)
class Twins:
    """The same model on the CPU and on the device; patched and unpatched again.

    Attributes:
        tiny: The one on the CPU, with its batch.
        model: The one on the device.
        inputs: The batch there.
    """

    tiny: Tiny
    model: Any
    inputs: dict[str, Any]


@cache
def twins(name: str) -> Twins:
    """Built once."""
    tiny = tiny_models.build(name, layers=4)
    with PretendDevice(), torch.no_grad():
        model = copy.deepcopy(tiny.model).to("cuda")
        return Twins(tiny, model, {key: value.to("cuda") for key, value in tiny.clone().items()})


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**{name: value.clone() for name, value in inputs.items()}).logits


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    return model.generate(**{name: value.clone() for name, value in inputs.items()}, **SAMPLE, **options)


Call = Callable[[Any, dict[str, Any]], torch.Tensor]


@cache
def unpatched(name: str, call: Call) -> list[Wait]:
    """What the model waits for by itself."""
    known = twins(name)
    with PretendDevice() as device, torch.no_grad(), device.watch() as found:
        call(known.model, known.inputs)
    return found


def waits(name: str, method: Any, call: Call, budget: Any = BUDGET, **options: Any) -> list[Wait]:
    """What the patched model waits for, once it is known to give what it gives on the CPU."""
    known = twins(name)
    with PretendDevice(("vlm_budget", __name__)) as device, torch.no_grad():
        with vlm_budget.patch(known.model, method, budget, **options) as handle, device.watch() as found:
            got = call(known.model, known.inputs)
        assert handle.report().kept_tokens > 0
        assert isinstance(got, DeviceTensor)
        got = got.cpu()
    with torch.no_grad(), vlm_budget.patch(known.tiny.model, method, budget, **options):
        expected = call(known.tiny.model, known.tiny.clone())
    assert torch.equal(got, expected), "the device gives another result than the CPU"
    return found


def ours(found: list[Wait], kind: str) -> list[Wait]:
    """Those that our code caused, references apart, which a real device never runs."""
    return [wait for wait in found if wait.kind == kind and wait.by.owner == "ours" and not wait.by.reference]


def check(found: list[Wait], alone: list[Wait], most: int = 1, masks_again: int = 0) -> None:
    """The contract."""
    uploads, reads = ours(found, "upload"), ours(found, "read")
    assert not uploads, told("copies that wait; give them non_blocking", uploads)
    assert len(reads) <= most, told(f"reads the device {len(reads)} times, {most} allowed", reads)
    theirs = [wait for wait in found if wait.by.owner != "ours"]
    known = {str(wait) for wait in alone}
    assert len(theirs) <= len(alone) + masks_again, told(
        f"transformers waits {len(theirs)} times, {len(alone)} without the patch",
        [wait for wait in theirs if str(wait) not in known],
    )


def told(what: str, places: list[Wait]) -> str:
    return "\n".join([what, *map(str, places)])


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_forward_waits_at_most_once(name: str, method: str) -> None:
    check(waits(name, method, forward), unpatched(name, forward))


@pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if pair[0] in GENERATING and pair[1] in LEAN])
def test_a_generate_waits_at_most_once(name: str, method: str) -> None:
    """Once for all of it: decode steps wait for nothing of ours."""
    alone = unpatched(name, generate)
    check(waits(name, method, generate), alone, masks_again=MASKS_AGAIN.get(name, 0))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("hired", {"positions": "original"}, id="original positions"),
        pytest.param("hired", {"budget": 12}, id="tokens"),
        pytest.param("hired", {"budget": "60% flops"}, id="flops, which counts text too"),
        pytest.param(HiRED(merge=TokenTransforming()), {}, id="a merge behind"),
        pytest.param([HiRED(), FastV()], {}, id="a method before and one inside"),
    ],
)
def test_other_ways_to_patch_wait_at_most_once_too(method: Any, options: dict[str, Any]) -> None:
    check(waits("llava_next", method, forward, **options), unpatched("llava_next", forward))


def beams(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return generate(model, inputs, num_beams=2)


def test_beams_wait_at_most_once_too() -> None:
    name = "llava_next_video"  # one input per prompt: up to 4.x, transformers repeats several in the wrong order
    # Up to 4.x, the beams' copies of the prompts are encoded, too, and their placeholders counted once more.
    check(waits(name, "hired", beams), unpatched(name, beams), 1 + int(FLOOR))


def chunks(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return generate(model, inputs, prefill_chunk_size=64)


def test_every_chunk_of_a_prompt_waits_once_more() -> None:
    """Each is a call of the language model; which of its columns are kept decides how long it is."""
    tiny = twins("llava_next").tiny
    unpatched_or_skip(lambda: chunks(tiny.model, tiny.clone()), None, "prefill in chunks")
    length = tiny.inputs["input_ids"].shape[1]
    found = waits("llava_next", "hired", chunks)
    check(found, unpatched("llava_next", chunks), 1 + -(-length // 64))


@pytest.mark.parametrize("method", vlm_budget.list_methods())
def test_every_method_waits_as_often_as_is_said_here(method: str) -> None:
    found = waits("llava_next", method, forward)
    check(found, unpatched("llava_next", forward), OFTEN.get(method, 1))
    assert len(ours(found, "read")) == OFTEN.get(method, 1), "waits less often; say so here"


@pytest.mark.parametrize("method", VIT_METHODS.names())
def test_vision_transformers_wait_for_nothing(method: str) -> None:
    pytest.importorskip("timm", reason="the models under test are timm's")
    model = tiny_vit(7)
    pixels, twin = images(model), copy.deepcopy(model)
    with torch.no_grad(), vlm_budget.patch(model, method, ratio=0.5):
        expected = model(pixels)
    with torch.no_grad(), PretendDevice() as device:
        moved, there = twin.to("cuda"), pixels.to("cuda")
        with vlm_budget.patch(moved, method, ratio=0.5), device.watch() as found:
            got = moved(there)
        assert torch.equal(got.cpu(), expected)
    assert not found, told("waits", found)


# --- that the device finds what it is there to find ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Planted(Pruner):
    """Keeps the first tokens, and does what it is told, most of which no method may."""

    act: str = "nothing else"

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        if self.act == "host":
            return ctx.item.candidates[:k]
        norms = ctx.features.norm(dim=-1)
        if self.act == "item":
            assert norms.max().item() > 0
        elif self.act == "upload":
            norms = norms * torch.ones(len(norms)).to(norms.device)
        elif self.act == "mix":
            norms = norms + torch.ones(len(norms))
        return ctx.item.candidates[:k].to(ctx.device, non_blocking=True)


@pytest.mark.parametrize(
    ("act", "kind", "op"), [("item", "read", "_local_scalar_dense"), ("upload", "upload", "_to_copy")]
)
def test_a_method_that_waits_is_found(act: str, kind: str, op: str) -> None:
    alone = unpatched("llava_next", forward)
    check(waits("llava_next", Planted(), forward), alone)
    found = waits("llava_next", Planted(act=act), forward)
    mine = [wait for wait in found if __file__ in wait.by.place]
    assert [(wait.kind, wait.op) for wait in mine] == 3 * [(kind, op)], "once per image"
    assert all(wait.by.owner == "ours" and wait.by.place.endswith(" pick") for wait in mine)
    with pytest.raises(AssertionError, match="1 allowed" if act == "item" else "non_blocking"):
        check(found, alone)


def test_a_method_may_choose_on_the_host() -> None:
    """Where its choice needs no scores, or is worked out there."""
    check(waits("llava_next", Planted(act="host"), forward), unpatched("llava_next", forward))


def test_devices_do_not_mix() -> None:
    known = twins("llava_next")
    with (
        PretendDevice(),
        torch.no_grad(),
        vlm_budget.patch(known.model, Planted(act="mix"), BUDGET),
        pytest.raises(RuntimeError, match="same device"),
    ):
        known.model(**known.inputs)


@pytest.fixture(name="device")
def entered() -> Iterator[PretendDevice]:
    """The device."""
    with torch.no_grad(), PretendDevice() as device:
        yield device


@pytest.mark.parametrize(("call", "kind"), CALLS)
def test_the_device_knows_what_makes_the_host_wait(device: PretendDevice, call: Asked, kind: str | None) -> None:
    table, numbers = torch.arange(12.0, device="cuda").view(3, 4), torch.arange(3, device="cuda")
    with device.watch() as found:
        call(table, numbers)
    assert {wait.kind for wait in found} == ({kind} if kind else set())


def test_waiting_for_the_device_itself_counts(device: PretendDevice) -> None:
    """Of this, a real one gives no warning."""
    with device.watch() as found:
        torch.cuda.synchronize()
        torch.cuda.current_stream().synchronize()
    assert [wait.kind for wait in found] == ["read", "read"]


def test_what_was_not_waited_for_is_not_there(device: PretendDevice) -> None:
    values = torch.arange(3, device="cuda")
    with device.watch() as found:
        early = values.to("cpu", non_blocking=True)
        assert early.max() < 0
        arrived = torch.cuda.Event()
        arrived.record()
        late = (values + 1).to("cpu", non_blocking=True)
        assert not found and not arrived.query()
        arrived.synchronize()
        assert arrived.query() and [wait.op for wait in found] == ["Event.synchronize"]
    assert early.tolist() == [0, 1, 2] and late.max() < 0, "garbage until it has come"
    values.sum().item()
    assert late.tolist() == [1, 2, 3], "copies arrive in their order"


def test_everything_is_put_back() -> None:
    before = {name: getattr(torch.cuda, name) for name in vars(torch.cuda)}
    with PretendDevice():
        moved = torch.nn.Linear(2, 2).to("cuda")
    assert before == {name: getattr(torch.cuda, name) for name in vars(torch.cuda)}
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert isinstance(torch.ones(1), torch.Tensor) and not isinstance(torch.ones(1), DeviceTensor)
    with pytest.raises(RuntimeError, match="outside"):
        moved(torch.ones(2))
