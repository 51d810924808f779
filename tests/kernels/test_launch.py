"""Launches: which configuration is taken and when it is timed, and what is said where a kernel cannot be launched."""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelUnavailableError
from vlm_budget.triton_kernels import _launch, compact
from vlm_budget.triton_kernels._launch import Config, Kernel, kernel, recorded, tl

triton = pytest.importorskip("triton", reason="Triton has no wheel for this machine, and launches need it")
if not compact._payload.interpreted:
    pytest.skip("kernels were compiled for a device; `make gpu` launches them there", allow_module_level=True)

PAYLOAD = compact._payload


def doubled(source, target, width, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width * length
    tl.store(target + at, tl.load(source + at, mask=inside) * 2, mask=inside)


def programs(cells: int, meta: dict[str, int]) -> tuple[int]:
    return (_launch.blocks(cells, meta["BLOCK"]),)


class Bench:
    """A stand-in for timing: it counts the configurations that it is given, and one of them is the fastest."""

    def __init__(self, fastest: int = 1) -> None:
        self.fastest = fastest
        self.timed = 0

    def __call__(self, launch: Callable[[], None], quantiles: Any) -> list[float]:
        launch()
        self.timed += 1
        turn = (self.timed - 1) % len(PAYLOAD.configs)
        return [float(turn != self.fastest)] * 3


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel, Any], None]:
    """Make a kernel choose by what a stand-in says, in the interpreter."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    # Triton 3.2's tuner sets options that its own interpreter takes for arguments of the kernel.
    known = [*getattr(interpreter, "RESERVED_KWS", ()), "num_buffers_warp_spec", "num_consumer_groups"]
    known += ["reg_dec_producer", "reg_inc_consumer"]
    monkeypatch.setattr(interpreter, "RESERVED_KWS", known, raising=False)

    def tune(chosen: Kernel, do_bench: Any) -> None:
        def autotune(configs: list[Any], key: list[str]) -> Callable[[Any], Any]:
            # As triton.autotune, whose version 3.2 forgets do_bench.
            make = triton.runtime.Autotuner
            return lambda jit: make(jit, jit.arg_names, configs, key, None, None, do_bench=do_bench)

        monkeypatch.setattr(triton, "autotune", autotune)
        monkeypatch.setattr(chosen, "tunes", True)
        monkeypatch.setattr(chosen, "_fastest", {})

    return tune


def columns(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(length).flip(0)[None]
    return torch.randn(1, length, width), index


def copies(length: int, width: int) -> bool:
    """The kernel's copy is that of plain indexing."""
    values, index = columns(length, width)
    return torch.equal(compact.take_columns_triton(values, index), values[:, index[0]])


def test_another_length_is_not_timed_and_another_width_is(tuned: Callable[[Kernel, Any], None]) -> None:
    bench = Bench()
    tuned(PAYLOAD, bench)
    timed = []
    for length, width in ((7, 48), (7, 48), (63, 48), (1, 48), (7, 80), (111, 80), (63, 48)):
        assert copies(length, width)
        timed.append(bench.timed)
    assert timed == [3, 3, 3, 3, 6, 6, 6]


def test_another_element_size_is_timed(tuned: Callable[[Kernel, Any], None]) -> None:
    bench = Bench()
    tuned(PAYLOAD, bench)
    values, index = columns(7, 48)
    for dtype, timed in ((torch.float32, 3), (torch.bfloat16, 6), (torch.float16, 6)):
        compact.take_columns_triton(values.to(dtype), index)
        assert bench.timed == timed


@pytest.mark.parametrize("fastest", range(len(PAYLOAD.configs)))
def test_what_is_fastest_is_launched_from_then_on(
    tuned: Callable[[Kernel, Any], None], monkeypatch: pytest.MonkeyPatch, fastest: int
) -> None:
    """Whichever it is, the result is the same."""
    tuned(PAYLOAD, Bench(fastest))
    assert copies(7, 48)
    assert list(PAYLOAD._fastest.values()) == [PAYLOAD.configs[fastest]]
    asked = chosen_launches(monkeypatch)
    assert copies(63, 48)
    assert asked == [PAYLOAD.configs[fastest]]


def chosen_launches(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Filled with the configuration of each launch that follows."""
    found, choose = [], PAYLOAD._chosen

    def noted(*args: Any) -> Config:
        found.append(choose(*args))
        return found[-1]

    monkeypatch.setattr(PAYLOAD, "_chosen", noted)
    return found


def test_a_graph_under_capture_takes_what_was_found_or_the_first(
    tuned: Callable[[Kernel, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(fastest=2)
    tuned(PAYLOAD, bench)
    asked = chosen_launches(monkeypatch)
    assert copies(7, 48)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert copies(7, 48) and copies(7, 80)
        assert bench.timed == 3
    assert copies(7, 80)
    assert asked == [PAYLOAD.configs[i] for i in (2, 2, 0, 2)]
    assert bench.timed == 6, "a width first seen under capture is timed when it can be"


def test_no_memory_for_timing_is_no_failure(tuned: Callable[[Kernel, Any], None]) -> None:
    def full(launch: Callable[[], None], quantiles: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tuned(PAYLOAD, full)
    assert copies(7, 48)
    assert not PAYLOAD._fastest


def test_the_interpreter_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "autotune", refused)
    assert len(PAYLOAD.configs) > 1 and not PAYLOAD.tunes
    assert copies(7, 48)


def refused(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("0 active drivers ([]). There should only be one.")


def test_results_are_those_of_the_reference_in_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = torch.rand(2, 63) < 0.5
    slots = int(keep.sum(1).max())
    index, valid, _ = ops.compaction_index(keep, slots, right_padded=False)
    visual, positions = torch.rand(2, 63) < 0.5, torch.randint(0, 99, (3, 2, 63))
    rows = int((visual & keep).sum())
    levels = [torch.randn(int(visual.sum()), 80) for _ in range(3)]
    given = (torch.randn(2, 63, 80), index, valid, keep, positions, visual, levels, rows)
    expected = compact.compact_reference(*given)
    for config in PAYLOAD.configs:
        monkeypatch.setattr(PAYLOAD, "configs", (config,))
        for found, wanted in zip(compact.compact_triton(*given), expected, strict=True):
            assert torch.equal(found, wanted)


def test_configurations_with_other_tiles_are_tuned_and_right(tuned: Callable[[Kernel, Any], None]) -> None:
    """As a kernel would ship them; none does today."""
    tiles = [Config(meta={"BLOCK": block}) for block in (16, 32, 64)]
    made = kernel(*tiles, key=("width",), sizes=("length",))(doubled)
    bench = Bench(fastest=2)
    tuned(made, bench)
    for length in (5, 9):
        source, target = torch.randn(length, 7), torch.empty(length, 7)
        made.launch(partial(programs, source.numel()), source, target, 7, length)
        assert torch.equal(target, source * 2)
    assert bench.timed == 3
    assert made._fastest == {(7, torch.float32, torch.float32): tiles[2]}


def test_recorded_launches_hold_every_configuration() -> None:
    with recorded() as made:
        compact.take_columns_triton(*columns(7, 48))
    assert [launch.config for launch in made] == list(PAYLOAD.configs)
    assert {launch.kernel for launch in made} == {PAYLOAD}


def test_several_configurations_need_no_driver_until_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.2 looks for a driver when its tuner is made; a machine that only imports may have none."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "autotune", refused)
    made = kernel(Config(), Config(warps=8), key=("width",), sizes=("length",))(doubled)
    assert made.tunes and not made.interpreted
    with recorded() as launches:
        made.launch((1,), torch.ones(4), torch.ones(4), 2, 2, BLOCK=16)
    assert len(launches) == 2
    monkeypatch.setattr(_launch, "require_runnable", lambda *_: None)
    with pytest.raises(KernelUnavailableError, match="driver.*VLM_BUDGET_KERNELS=reference"):
        made.launch((1,), torch.ones(4), torch.ones(4), 2, 2, BLOCK=16)


class Broken:
    """A compiled kernel whose launch fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            raise self.error

        return launch


def failed(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PAYLOAD, "jit", Broken(error))
    monkeypatch.setattr(_launch, "require_runnable", lambda *_: None)
    compact.take_columns_triton(*columns(7, 48))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "no C compiler.*CC"),
        (RuntimeError("0 active drivers ([]). There should only be one."), "no driver of an NVIDIA GPU"),
        (CalledProcessError(1, ["gcc"]), "python3-dev"),
    ],
    ids=["compiler", "driver", "headers"],
)
def test_what_a_launch_lacks_is_said(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelUnavailableError, match=f"_payload.*{said}.*VLM_BUDGET_KERNELS=reference") as raised:
        failed(error, monkeypatch)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("words", ["2 active drivers", "CUDA error: an illegal memory access was encountered"])
def test_other_failures_of_a_launch_stay_what_they_are(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError(words)
    with pytest.raises(RuntimeError) as raised:
        failed(error, monkeypatch)
    assert raised.value is error


def test_triton_still_says_it_in_these_words() -> None:
    import triton.runtime.build
    import triton.runtime.driver

    assert "Failed to find C compiler" in Path(inspect.getfile(triton.runtime.build)).read_text()
    source = Path(sys.modules["triton.runtime.driver"].__file__ or "").read_text()
    assert "active drivers (" in source
