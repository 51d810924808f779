"""What holds for every operation: two halves in one file, and specimens of every launch."""

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels.compile import OPERATIONS

FOLDER = Path(inspect.getfile(_launch)).parent


def module(operation: str) -> ModuleType:
    return importlib.import_module(f"vlm_budget.triton_kernels.{operation}")


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
    named = [value if isinstance(value, dict) else {"": value} for value in vars(module(operation)).values()]
    own = [value for values in named for value in values.values() if isinstance(value, _launch.Kernel)]
    assert own
    with _launch.recorded() as made:
        for _, call in module(operation).specimens():
            call()
    shipped = [(id(kernel), str(config)) for kernel in own for config in kernel.configs]
    assert {(id(launch.kernel), str(launch.config)) for launch in made} == set(shipped)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_take_lengths_as_they_come(operation: str) -> None:
    """No length is compiled in, and none makes a kernel tune itself anew."""
    tree = ast.parse((FOLDER / f"{operation}.py").read_text())
    lengths = {"n", "L", "N", "length", "queries", "keys", "slots", "total", "tokens", "columns", "rows"}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "kernel":
            key = next((word.value for word in call.keywords if word.arg == "key"), None)
            named = {item.value for item in getattr(key, "elts", []) if isinstance(item, ast.Constant)}
            assert not named & lengths, f"{operation}: autotuned anew for every {named & lengths}"
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for argument in function.args.args:
                if argument.annotation is not None and ast.unparse(argument.annotation) == "tl.constexpr":
                    assert argument.arg not in lengths, f"{operation}.{function.name} compiles {argument.arg} in"
