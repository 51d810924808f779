"""Plans: exact counts that survive a file, and refuse an input they were not made for."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_budget import Plan, PlanError
from vlm_budget.plan import ItemPlan, checksum

PLAN = Plan(
    "HiRED(alpha=0.3)",
    "20%",
    (ItemPlan(0, "image", 577, 63), ItemPlan(0, "video", 111, 1), ItemPlan(2, "image", 7, 7)),
    rows=3,
)


@st.composite
def item_plans(draw: st.DrawFn) -> ItemPlan:
    total = draw(st.integers(1, 5000))
    return ItemPlan(
        draw(st.integers(0, 9)), draw(st.sampled_from(["image", "video"])), total, draw(st.integers(1, total))
    )


plans = st.builds(Plan, st.text(max_size=9), st.text(max_size=9), st.lists(item_plans()).map(tuple), st.just(10))


@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_survives_a_file_with_any_letters_in_it(tmp_path: Path) -> None:
    plan = Plan("Méthode(…)", "20%", PLAN.items, 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")) == plan


def test_a_plan_adds_its_items_up() -> None:
    assert (PLAN.total, PLAN.keep) == (695, 71)
    assert (Plan("m", "b", (), 2).total, Plan("m", "b", (), 2).keep) == (0, 0)


def test_counts_come_per_row_and_item_with_text_only_rows_empty() -> None:
    assert PLAN.row_counts([[577, 111], [], [7]]) == [[63, 1], [], [7]]


@pytest.mark.parametrize(
    "sizes",
    [
        [[577, 111], [], [8]],  # another size
        [[111, 577], [], [7]],  # another order
        [[577, 111], [], [7], []],  # another row
        [[577, 111], [7]],
        [[577, 111, 7]],  # another grouping
        [[577], [111], [7]],
        [],
    ],
)
def test_an_input_the_plan_was_not_made_for_is_refused_with_both_shapes(sizes: list[list[int]]) -> None:
    with pytest.raises(PlanError) as caught:
        PLAN.row_counts(sizes)
    assert "[[577, 111], [], [7]] tokens per row" in str(caught.value)
    assert f"the input has {sizes}" in str(caught.value)
    assert "handle.plan(**inputs)" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"keep": 0},
        {"keep": -1},
        {"keep": 8},
        {"row": -1},
        {"keep": 2.0},
        {"total": "7"},
        {"keep": True},
        {"keep": None},
    ],
)
def test_counts_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="1 <= keep <= total"):
        ItemPlan(**{"row": 0, "modality": "image", "total": 7, "keep": 3, **change})


def test_an_item_of_a_row_the_plan_does_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="row 3.*3 rows"):
        Plan("m", "b", (ItemPlan(3, "image", 7, 3),), rows=3)


def broken(**change: Any) -> str:
    """The plan with a change that its checksum knows of."""
    data = {**json.loads(PLAN.to_json()), **change}
    del data["checksum"]
    data = {name: value for name, value in data.items() if value is not ...}
    return json.dumps({**data, "checksum": checksum(data)})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '"plan"',
        "null",
        "{}",
        broken(version=...),
        broken(items=...),
        broken(rows=...),
        broken(method=...),
        broken(items=7),
        broken(items=[7]),
        broken(items=[{"row": 0}]),
        broken(items=[{"row": 0, "modality": "image", "total": 7, "keep": 3, "colour": "red"}]),
        broken(surprise=1),
        broken(rows="3"),
        broken(budget=0.2),
        broken(method=["Uniform()"]),
        broken(items=[{"row": 0, "modality": "picture", "total": 7, "keep": 3}]),
        broken(items=[{"row": 0, "modality": "image", "total": 7, "keep": 3, "steps": 5}]),
        broken(version=True),
        broken(rows=-1),
        broken(rows=2),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_an_edited_plan_is_refused(tmp_path: Path) -> None:
    text = PLAN.to_json()
    for old, new in (('"keep": 63', '"keep": 64'), ('"20%"', '"30%"'), ("HiRED", "Random"), ('"video"', '"image"')):
        assert old in text
        with pytest.raises(PlanError, match="edited or damaged"):
            Plan.from_json(text.replace(old, new))
    data = json.loads(text)
    with pytest.raises(PlanError, match="edited or damaged"):
        Plan.from_json(json.dumps({name: value for name, value in data.items() if name != "checksum"}))
    (tmp_path / "mine.json").write_text(text.replace('"keep": 63', '"keep": 64'))
    with pytest.raises(PlanError, match=r"plan '.*mine\.json': the plan was edited"):
        Plan.load(tmp_path / "mine.json")


def test_the_layout_of_a_file_may_change() -> None:
    assert Plan.from_json(json.dumps(json.loads(PLAN.to_json()), sort_keys=True)) == PLAN


def test_plans_of_the_second_version_have_no_checksum_and_are_read() -> None:
    old = {**json.loads(PLAN.to_json()), "version": 2}
    del old["checksum"]
    assert Plan.from_json(json.dumps(old)) == PLAN


@pytest.mark.parametrize("depth", [600, 3000, 200_000])
def test_json_nested_out_of_all_measure_is_no_plan(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for around in ("DEEP", '{"version": 2, "items": DEEP}', '{"version": 2, "items": [{"row": DEEP}]}'):
        text = around.replace("DEEP", deep)
        with pytest.raises(PlanError, match="not a plan"):
            Plan.from_json(text)


def test_an_object_that_is_no_plan_is_told_what_it_lacks() -> None:
    with pytest.raises(PlanError, match="it has no 'version' or no 'items'"):
        Plan.from_json("{}")


@pytest.mark.parametrize("future", [{}, {"surprise": 1}, {"items": "elsewhere"}])
def test_a_plan_of_a_later_version_is_refused_as_such(future: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"plan version 4 is not supported, expected one of \(1, 2, 3\)"):
        Plan.from_json(broken(version=4, **future))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read plan .*missing\.json"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot read plan"):
        Plan.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(PlanError, match=r"cannot read plan .*binary\.json"):
        Plan.load(tmp_path / "binary.json")


def test_a_plan_of_the_first_version_reads_as_one_without_steps() -> None:
    old = {
        "version": 1,
        "method": "Uniform()",
        "budget": "25%",
        "items": [{"row": 0, "modality": "image", "total": 36, "keep": 9}],
        "rows": 1,
    }
    assert Plan.from_json(json.dumps(old)) == Plan("Uniform()", "25%", (ItemPlan(0, "image", 36, 9),), 1)


STEPPED = Plan(
    "FastV()",
    "40%",
    (
        ItemPlan(0, "image", 36, 30, ((2, 9), (4, 0))),
        ItemPlan(0, "image", 12, 10, ((2, 3),)),
        ItemPlan(2, "video", 8, 8),
    ),
    3,
)


def test_a_plan_with_steps_tells_what_every_layer_sees_and_survives_json() -> None:
    assert Plan.from_json(STEPPED.to_json()) == STEPPED
    assert STEPPED.drop_layers == [2, 4]
    assert STEPPED.row_tokens(0, 6) == [40, 40, 12, 12, 3, 3]
    assert STEPPED.row_tokens(1, 6) == [0] * 6
    assert STEPPED.mean_tokens(6) == (40 + 40 + 12 + 12 + 3 + 3 + 8 * 6) / 6
    assert STEPPED.repeated(2).row_tokens(1, 6) == STEPPED.row_tokens(0, 6)


@pytest.mark.parametrize(
    "steps", [((0, 3),), ((2, 5), (2, 3)), ((3, 5), (2, 3)), ((2, 3), (3, 5)), ((2, 40),), ((2, -1),)]
)
def test_steps_that_cannot_be_are_refused(steps: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(PlanError):
        ItemPlan(0, "image", 36, 30, steps)
