from __future__ import annotations

from dataset_files import parquet, split, write_lines
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import read_task


def math_row(**changes) -> dict:
    row = {
        "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.",
        "solution": "We have that $r = 3.$ Therefore \\[\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.\\]",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    return {**row, **changes}


def test_math500_from_a_folder_and_from_the_hub(tmp_path):
    rows = [math_row(), math_row(unique_id="test/b.json", level=5, answer="5", problem="{x} + {0}?")]
    write_lines(tmp_path / "test.jsonl", [*rows, "{broken", {"problem": "?"}, math_row(answer=None, unique_id="c")])
    good, broken = split(read_task("math500").samples(Source(tmp_path)))
    assert [one.id for one in good] == ["test/precalculus/807.json", "test/b.json"] and len(broken) == 3
    assert good[1].prompt == ("{x} + {0}?\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert good[0].facts == {"subject": "Precalculus", "level": "2"} and not good[0].images and good[0].clip is None
    parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows)
    again, _ = split(read_task("math500").samples(Source(hub=str(tmp_path / "hub"))))
    assert [(one.id, one.answers) for one in again] == [(one.id, one.answers) for one in good]
    task = read_task("math500")
    assert task.scores("So it is $\\boxed{(3,\\pi/2)}$.", good[0]) == {"accuracy": 1.0, "readable": 1.0}
    assert task.scores("It is $(3,\\pi/2)$.", good[0]) == {"accuracy": 0.0, "readable": 0.0}
    rows = [(task.scores("\\boxed{5}", good[1]), good[1].facts), (task.scores("\\boxed{0}", good[0]), good[0].facts)]
    assert task.figures(rows)["accuracy, level 5"] == 1.0 and task.figures(rows)["accuracy"] == 0.5
