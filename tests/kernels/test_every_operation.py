"""What holds for every operation: two halves in one file, and specimens of every launch."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels._launch import Config, Kernel, kernel, tl
from vlm_budget.triton_kernels.compile import OPERATIONS

FOLDER = Path(inspect.getfile(_launch)).parent
LENGTHS = {"n", "k", "L", "N", "length", "queries", "keys", "slots", "total", "tokens", "columns", "rows", "count"}
"""Names that kernels give to numbers of tokens, where these are no tensors."""


def module(operation: str) -> ModuleType:
    return importlib.import_module(f"vlm_budget.triton_kernels.{operation}")


def kernels_of(operation: str) -> list[Kernel]:
    named = [value if isinstance(value, dict) else {"": value} for value in vars(module(operation)).values()]
    return [value for values in named for value in values.values() if isinstance(value, Kernel)]


def test_every_file_with_a_kernel_is_an_operation() -> None:
    files = {
        file.stem for file in FOLDER.glob("*.py") if "@kernel" in file.read_text() or "kernel(" in file.read_text()
    }
    assert files - {"_launch"} == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_and_kernel_stand_side_by_side(operation: str) -> None:
    functions = {name for name, value in vars(module(operation)).items() if inspect.isfunction(value)}
    halves = {name.removesuffix("_triton") for name in functions if name.endswith("_triton")}
    assert halves
    assert halves <= {name.removesuffix("_reference") for name in functions}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_specimens_make_every_launch(operation: str) -> None:
    """Each kernel is compiled by ``make kernels-compile``, in every configuration."""
    own = kernels_of(operation)
    assert own
    with _launch.recorded() as made:
        for _, call in module(operation).specimens():
            call()
    shipped = [(id(kernel), str(config)) for kernel in own for config in kernel.configs]
    assert {(id(launch.kernel), str(launch.config)) for launch in made} == set(shipped)


def faults(made: Kernel, numbers: set[str]) -> list[str]:
    """What makes a kernel depend on a length; ``numbers`` are those of its parameters that take whole numbers."""
    parameters = inspect.signature(made.function).parameters
    compiled_in = {name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)}
    found = [f"{name} is a length, and compiled in" for name in compiled_in & LENGTHS]
    found += [f"{name} is a length, and not among sizes" for name in (numbers & LENGTHS) - set(made.sizes)]
    found += [f"{name} is no parameter" for name in {*made.key, *made.sizes} - set(parameters)]
    found += [f"timed anew for every {name}" for name in set(made.key) & {*made.sizes, *LENGTHS}]
    if (len(made.configs) > 1) != bool(made.key):
        found.append(f"{len(made.configs)} configurations, and the key {made.key}")
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_take_lengths_as_they_come(operation: str) -> None:
    """No length is compiled in, and none makes a kernel tune itself anew."""
    with _launch.recorded() as made:
        for _, call in module(operation).specimens():
            call()
    numbers = {id(own): set[str]() for own in kernels_of(operation)}
    for launch in made:
        numbers[id(launch.kernel)] |= {name for name, value in launch.arguments.items() if type(value) is int}
    assert not [(own.name, fault) for own in kernels_of(operation) for fault in faults(own, numbers[id(own)])]


def test_some_kernel_chooses_by_timing() -> None:
    assert any(len(own.configs) > 1 for operation in OPERATIONS for own in kernels_of(operation))


def scaled(source, width, length, columns, BLOCK: tl.constexpr = 16):
    """Nothing: it is never run."""


def counted(source, rows: tl.constexpr):
    """Nothing: it is never run."""


TWO = (Config(warps=4), Config(warps=8))


@pytest.mark.skipif(tl is None, reason="Triton is not installed, and makes these kernels")
@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (lambda: kernel(*TWO, key=("width",), sizes=("length", "columns"))(scaled), None),
        (lambda: kernel(*TWO, key=("width", "length"), sizes=("length", "columns"))(scaled), "timed anew for every"),
        (lambda: kernel(*TWO, key=("width", "columns"), sizes=("length",))(scaled), "timed anew for every"),
        (lambda: kernel(*TWO, sizes=("length", "columns"))(scaled), "2 configurations, and the key ()"),
        (lambda: kernel(key=("width",), sizes=("length", "columns"))(scaled), "1 configurations, and the key"),
        (lambda: kernel(*TWO, key=("breadth",), sizes=("length", "columns"))(scaled), "breadth is no parameter"),
        (lambda: kernel(sizes=("length",))(scaled), "columns is a length, and not among sizes"),
        (lambda: kernel()(counted), "rows is a length, and compiled in"),
    ],
)
def test_a_kernel_that_depends_on_a_length_is_found(made: Callable[[], Kernel], fault: str | None) -> None:
    found = faults(made(), {"width", "length", "columns"} if made().function is scaled else set())
    assert (not found) if fault is None else any(fault in each for each in found)
