import re
from dataclasses import replace

from vlm_budget.eval.cells import Cell
from vlm_budget.eval.report import plots, tables
from vlm_budget.eval.report.plots import Point
from vlm_budget.eval.statistics import Comparison, Estimate
from vlm_budget.eval.summary import Result, Summary


def result(mean: float, minus_random: Comparison | None = None) -> Result:
    return Result("nano_count", Cell("hired", "0.2"), Estimate(mean, 0.01, 50), minus_random=minus_random)


def test_a_method_loses_or_beats_only_when_its_interval_says_so() -> None:
    verdicts = []
    for low, high in ((-0.2, -0.1), (-0.2, 0.0), (-0.1, 0.1), (0.0, 0.1), (0.01, 0.1)):
        line = tables.against_random(result(0.5, Comparison((low + high) / 2, low, high, 0.5, 50)))
        assert line is not None
        verdicts.append(line.tone)
    assert verdicts == ["loses", "even", "even", "even", "beats"]
    assert tables.against_random(result(0.5)) is None


def test_headline_has_every_cell_and_task_and_marks_losers(summary: Summary) -> None:
    table = tables.headline(summary)
    assert [row[0][0].text for row in table.rows] == [str(cell) for cell in summary.cells]
    assert all(len(row) == len(table.header) == 3 for row in table.rows)
    marked = {row[0][0].text for row in table.rows for cell in row[1:] for line in cell if line.tone == "loses"}
    assert marked == {"fastv at 0.4", "fastv at 0.2", "fastv at 0.1"}


def test_task_table_leaves_measured_times_out_when_asked(summary: Summary) -> None:
    task = summary.tasks[0]
    timed, plain = (tables.task_table(summary, task, times).header for times in (True, False))
    assert {"prefill with choosing", "decode, ms", "encode, ms"} <= set(timed) - set(plain)
    assert not [name for name in plain if "ms" in name or "prefill" in name]
    assert {"FLOPs of the prompt", "KV cache of the prompt", "visual tokens per layer"} <= set(plain)


def test_a_summary_under_the_metrics_own_name_is_shown_beside_the_mean(summary: Summary) -> None:
    task = summary.tasks[0]
    results = tuple(replace(one, figures={"accuracy": one.main.mean / 2}) for one in summary.results)
    row = tables.task_table(replace(summary, results=results), task, True).rows[0]
    assert [line.text for line in row[1]][1].startswith("as published: 0.4")


def test_equal_cost_bolds_the_best_of_every_share(summary: Summary) -> None:
    table = tables.equal_cost(summary, summary.tasks[0], "flops")
    assert table is not None
    for column in range(1, 4):
        values = {row[column][0].text: row[column][0].tone for row in table.rows}
        assert [text for text, tone in values.items() if tone == "best"] == [max(values)]


def test_equal_cost_is_left_out_where_nothing_was_measured(summary: Summary) -> None:
    bare = replace(summary, results=tuple(replace(one, share={}) for one in summary.results))
    assert tables.equal_cost(bare, bare.tasks[0], "flops") is None


def test_rivals_compare_the_strongest_of_every_budget(summary: Summary) -> None:
    table = tables.rivals(summary, summary.tasks[0])
    assert table is not None
    assert [row[0][0].text for row in table.rows] == ["0.4"] * 3 + ["0.2"] * 3 + ["0.1"] * 3
    means = {one.cell: one.main.mean for one in tables.results_of(summary, summary.tasks[0])}
    for budget, first, other, difference, *_ in table.rows:
        found = difference[0].interval
        assert found is not None
        gap = means[Cell(first[0].text, budget[0].text)] - means[Cell(other[0].text, budget[0].text)]
        assert abs(found.difference - gap) < 1e-9
        assert gap >= 0


def test_errors_are_grouped_by_reason(summary: Summary) -> None:
    table = tables.errors(summary)
    assert table is not None
    rows = [[cell[0].text for cell in row] for row in table.rows]
    reason = "ImageError: picture 'page-29.png' is damaged"
    assert rows == [[name, reason, "every method", "16"] for name in ("nano_count", "nano_retrieval")]


def test_the_front_holds_what_nothing_cheaper_equals() -> None:
    points = [Point(x, result(y)) for x, y in ((0.4, 0.6), (0.1, 0.3), (0.2, 0.7), (0.2, 0.5), (1.0, 0.9), (0.1, 0.2))]
    assert [(one.x, one.y) for one in plots.front(points)] == [(0.1, 0.3), (0.2, 0.7), (1.0, 0.9)]


def test_every_cell_is_drawn_once_against_every_cost(summary: Summary) -> None:
    task = summary.tasks[0]
    assert plots.costs_of(summary, task, True) == ["prefill_ms", "flops", "mean_kept", "kv_bytes"]
    assert plots.costs_of(summary, task, False) == ["flops", "mean_kept", "kv_bytes"]
    for cost in plots.costs_of(summary, task, True):
        assert plots.pareto(summary, task, cost).count('class="mark"') == len(summary.cells)


def test_equal_scores_can_be_drawn(summary: Summary) -> None:
    same = tuple(replace(one, main=Estimate(0.0, float("nan"), 5)) for one in summary.results)
    drawing = plots.pareto(replace(summary, results=same), summary.tasks[0], "flops")
    assert not re.search(r"[^a-z](nan|inf)[^a-z]", drawing)
