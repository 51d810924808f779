"""``import vlm_budget`` costs next to nothing and pulls in no other library."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROBE = """
import json, sys
before = set(sys.modules)
import {module}
new = set(sys.modules) - before
ours = sys.modules["{module}"].__file__
print(json.dumps([sorted({{name.split(".")[0] for name in new}} - set(sys.stdlib_module_names)), ours]))
"""
BUDGET_S = 0.3
ROUNDS = 5


def run(code: str, cwd: Path) -> str:
    """The output of a fresh Python that runs ``code`` with the root off its path."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def foreign_imports(module: str, cwd: Path) -> list[str]:
    """Top-level names outside the standard library that ``import module`` loads."""
    names, file = json.loads(run(PROBE.format(module=module), cwd))
    assert file is not None, f"{module} is a namespace package: its __init__.py is missing"
    return names


def seconds(code: str, cwd: Path) -> float:
    start = time.perf_counter()
    run(code, cwd)
    return time.perf_counter() - start


def test_import_loads_no_other_library(tmp_path: Path) -> None:
    assert foreign_imports("vlm_budget", tmp_path) == ["vlm_budget"]


def test_the_probe_sees_a_foreign_library(tmp_path: Path) -> None:
    assert "numpy" in foreign_imports("numpy", tmp_path)


def test_import_adds_less_than_its_budget(tmp_path: Path) -> None:
    seconds("import vlm_budget", tmp_path)  # the first import writes the byte code
    pairs = [(seconds("pass", tmp_path), seconds("import vlm_budget", tmp_path)) for _ in range(ROUNDS)]
    added = statistics.median(ours for _, ours in pairs) - statistics.median(bare for bare, _ in pairs)
    assert added < BUDGET_S, f"import vlm_budget adds {added:.2f} s to a bare start; the budget is {BUDGET_S} s"


def test_every_public_name_resolves_and_an_unknown_one_does_not() -> None:
    import vlm_budget

    assert len(vlm_budget.__all__) == len(set(vlm_budget.__all__)) > 0
    for name in vlm_budget.__all__:
        assert getattr(vlm_budget, name) is not None
        assert name in dir(vlm_budget)
    with pytest.raises(AttributeError, match="no_such_name"):
        vlm_budget.no_such_name  # noqa: B018 - the access is what is under test
