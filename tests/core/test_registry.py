"""Registries: known names, late imports, and a hint for the misspelt."""

import subprocess
import sys

import pytest

from vlm_budget import UnknownNameError, list_families, list_methods
from vlm_budget.pruner import Pruner
from vlm_budget.registry import FAMILIES, PRUNERS, Registry


def shelf(**entries: str) -> Registry:
    return Registry("mapping", "collections.abc:Mapping", entries)


def test_a_name_gives_its_class() -> None:
    from collections import ChainMap

    assert shelf(chain="collections:ChainMap").get("chain") is ChainMap


def test_entries_are_not_imported_before_they_are_asked_for() -> None:
    registry = shelf(chain="collections:ChainMap", ghost="vlm_budget_no_such_module:Ghost")
    assert registry.names() == list(registry) == ["chain", "ghost"]
    assert "ghost" in registry and "nobody" not in registry
    assert registry.target("ghost") == "vlm_budget_no_such_module:Ghost"
    registry.get("chain")
    with pytest.raises(ModuleNotFoundError, match="vlm_budget_no_such_module"):
        registry.get("ghost")


def test_listing_methods_and_families_imports_neither_them_nor_torch() -> None:
    code = """
import sys
from vlm_budget.registry import list_families, list_methods
assert list_methods() and list_families()
heavy = [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "numpy")
         or name.startswith(("vlm_budget.pruners", "vlm_budget.families"))]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("typed", "meant"), [("hird", "'hired'"), ("HiRED", "'hired'"), ("clstopk", "'cls_topk'"), ("unifrm", "'uniform'")]
)
def test_a_misspelt_name_is_answered_with_the_near_ones_and_all(typed: str, meant: str) -> None:
    with pytest.raises(
        UnknownNameError, match=f"unknown method '{typed}'. Did you mean .*{meant}.*Available: "
    ) as caught:
        PRUNERS.get(typed)
    assert all(name in str(caught.value) for name in list_methods())


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    for ask in (PRUNERS.get, PRUNERS.target):
        with pytest.raises(UnknownNameError, match="unknown method 'qqq'. Available: cdpruner, ") as caught:
            ask("qqq")
        assert "Did you mean" not in str(caught.value)


def test_an_entry_that_is_no_subclass_of_the_base_is_refused() -> None:
    for target in ("collections:deque", "math:pi", "math:sqrt"):
        with pytest.raises(TypeError, match=f"'wrong' \\({target}\\) is not a subclass of collections.abc:Mapping"):
            shelf(wrong=target).get("wrong")


def test_a_registered_name_is_listed_and_found() -> None:
    from collections import OrderedDict

    registry = shelf()
    registry.register("ordered", "collections:OrderedDict")
    registry.register("ordered", "collections:OrderedDict")  # saying it twice is no mistake
    assert registry.names() == ["ordered"] and registry.get("ordered") is OrderedDict


def test_a_taken_name_is_not_taken_over() -> None:
    registry = shelf(chain="collections:ChainMap")
    with pytest.raises(ValueError, match="mapping 'chain' is already registered as 'collections:ChainMap'"):
        registry.register("chain", "collections:OrderedDict")
    assert registry.get("chain").__name__ == "ChainMap"


@pytest.mark.parametrize("target", ["collections.OrderedDict", "", "a:b:c", ":", "collections:", ":OrderedDict"])
def test_a_target_that_names_no_class_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="must be 'module:Class'"):
        shelf().register("x", target)


def test_a_class_knows_its_name_and_others_have_none() -> None:
    class Own(Pruner):
        pass

    assert [PRUNERS.name_of(PRUNERS.get(name)) for name in list_methods()] == list_methods()
    assert PRUNERS.name_of(Own) is None and PRUNERS.name_of(dict) is None


def test_registries_do_not_share_entries() -> None:
    entries = {"chain": "collections:ChainMap"}
    one, other = Registry("x", "builtins:object", entries), Registry("x", "builtins:object", entries)
    one.register("more", "collections:Counter")
    assert other.names() == list(entries) == ["chain"]


def test_every_method_loads_and_says_its_stage() -> None:
    assert list_methods() == PRUNERS.names()
    for name in list_methods():
        method = PRUNERS.get(name)
        assert issubclass(method, Pruner) and method.stage in ("vision", "decoder")
        # One method, one file, one stem; variants of a paper stand beside it, under its name and one of their own.
        assert name.startswith(method.__module__.rpartition(".")[2])


def test_families_are_listed_in_order() -> None:
    assert list_families() == sorted(list_families()) == list(FAMILIES)
