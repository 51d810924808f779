"""The GPU benchmark without a GPU: all of it runs on toys, nothing wrong is timed, and nothing is lost."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from vlm_budget import ops
from vlm_budget.eval import large, op_cases, passes
from vlm_budget.eval.device import Deadline, Stopwatch, graph_size, repetitions
from vlm_budget.eval.op_cases import CASES
from vlm_budget.eval.op_work import DisagreementError, OpCase, Sizes, Work, difference, measured
from vlm_budget.eval.steps import Record
from vlm_budget.eval.video_ops import VIDEO_CASES
from vlm_budget.triton_kernels import _launch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, tables = script("gpu"), script("tables")


def begun(folder: Path, *words: str) -> tuple[Record, argparse.Namespace]:
    """A record before its first step."""
    arguments = gpu.parser().parse_args(["--device", "cpu", "--size", "tiny", "--dtype", "float32", *words])
    arguments.out = folder
    record = Record(folder / "gpu_trial.json")
    gpu.begin(record, arguments)
    return record, arguments


def worked(folder: Path, *words: str, seconds: float = 60) -> dict[str, Any]:
    """The record after one worker."""
    begun(folder)
    out = ["--device", "cpu", "--size", "tiny", "--out", str(folder), *words, "--worker", str(time.time() + seconds)]
    assert gpu.main(out) == 0
    return json.loads((folder / "gpu_trial.json").read_text())


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything once, on toys."""
    plan = {"tiny": [("llava_next", 5, 1, stage) for stage in ("prefill", "decode")] + [("qwen2_5_vl", 2, 2, "decode")]}
    with mock.patch.multiple(gpu, PLAN=plan, LENGTHS={"real": [], "tiny": [63]}):
        return worked(tmp_path_factory.mktemp("trial"))


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_trial_measures_everything_and_says_that_it_is_one(trial: dict[str, Any]) -> None:
    assert trial["trial"] and trial["size"] == "tiny" and trial["environment"]["device_type"] == "cpu"
    assert trial["failed"] == {} and trial["running"] is None
    assert trial["done"] == trial["steps"] and len(trial["done"]) == 1 + len(CASES) + 3
    assert set(trial["not_measured"]) == {"llava_next, 1 tile"}
    assert {row["op"] for row in trial["operations"]} == {case.op for case in CASES}
    assert {row["runs"] for row in trial["operations"]} == {"reference"}
    for row in trial["operations"]:
        assert row["bytes"] > 0 and 1 <= row["ms"]["cold"]["runs"] <= 20 and row["difference"] < 1e-6
        assert row["auto"] == "reference"
        assert row["ms"]["cold"]["q1"] <= row["ms"]["cold"]["median"] <= row["ms"]["cold"]["q3"]
    assert trial["machine"]["copy"]["bytes_per_second"] > 0 and trial["machine"]["matrix"]["flops_per_second"] > 0


def test_models_are_measured_stage_by_stage_beside_the_unpatched_and_the_native_one(trial: dict[str, Any]) -> None:
    first, second = trial["models"]
    assert [(each["method"], each["budget"]) for each in first["variants"]] == [
        (variant.method, variant.budget) for variant in passes.VARIANTS
    ]
    ways = {(each["method"], each["budget"]): each for each in first["variants"]}
    assert first["prompt_tokens"] == 16 + 8 * 9 + 1 + large.PROMPT
    hired = ways["hired", 0.2]
    assert hired["kept_tokens"] == round(0.2 * hired["visual_tokens"])
    assert first["native_tokens"] == first["prompt_tokens"] - hired["visual_tokens"] + hired["kept_tokens"]
    assert {"ttft", "vision_tower", "selection", "prefill", "own_prefill"} <= set(hired["ms"])
    assert set(ways["native", 0.2]["ms"]) == {"prefill", "prefill_ahead"}
    against = {"against_native": "prefill", "against_native_ahead": "prefill_ahead"}
    assert set(hired["ratios"]) == {"ttft_speedup", "overhead", "prefill_speedup", *against}
    for ratio, stage in against.items():
        expected = hired["ms"]["own_prefill"]["median"] / ways["native", 0.2]["ms"][stage]["median"]
        assert hired["ratios"][ratio] == pytest.approx(expected)
    assert set(ways["fastv", 0.2]["ratios"]) == {"ttft_speedup", "overhead", "prefill_speedup"}
    assert "decode" not in ways["native", 0.2] and ways["full", 1.0]["ratios"] == {}
    assert ways["full", 1.0]["decode"]["tokens"] == 4 and ways["full", 1.0]["decode"]["tokens_per_second"] > 0
    assert ways["fastv", 0.2]["ms"]["drop"]["median"] > 0
    # Fewer tiles: a few decoded tokens, from which no throughput is told.
    assert second["batch"] == 2 and "tokens_per_second" not in second["variants"][0]["decode"]
    assert set(trial["shapes"]) == {"llava_next", "qwen2_5_vl"}


def test_the_plan_is_every_tile_and_batch_and_ends_with_what_matters_least() -> None:
    assert set(gpu.PLAN["real"]) >= {
        (family, tiles, batch, stage)
        for family, all_tiles in (("llava_next", (2, 3, 4, 5)), ("qwen2_5_vl", (1, 2, 3, 4, 5)))
        for tiles in all_tiles
        for batch in (1, 8)
        for stage in ("prefill", "decode")
    }
    assert len(gpu.PLAN["real"]) == len(set(gpu.PLAN["real"]))
    assert gpu.PLAN["real"][0] == ("llava_next", 5, 1, gpu.HIRED)
    assert sorted(gpu.LENGTHS["real"]) == [2880, 5760, 16384]
    assert {(variant.method, variant.budget) for variant in passes.VARIANTS} >= {
        (method, budget) for method in ("hired", "fastv", "divprune") for budget in (0.1, 0.2, 0.4)
    }


def test_steps_go_from_what_matters_most_to_what_matters_least(tmp_path: Path) -> None:
    record, arguments = begun(tmp_path)
    bench = gpu.Bench(arguments, record, Deadline(60))
    bench.size = "real"
    names = [name for name, _ in bench.steps()]
    assert len(names) == len(set(names)) == 1 + 3 * len(CASES) + len(gpu.PLAN["real"])
    kinds = []
    for name in names:
        what, _, stage = name.partition(": ")
        tokens, tiles = re.search(r"(\d+) tokens$", what), re.search(r"(\d) tiles?, batch", what)
        if tokens:
            kinds.append("2880" if tokens[1] == "2880" else "more tokens")
        elif tiles:
            kinds.append("rest" if tiles[1] != "5" or stage == gpu.OTHER else stage if stage == gpu.HIRED else "five")
    assert list(dict.fromkeys(kinds)) == ["2880", gpu.HIRED, "five", "more tokens", "rest"]
    assert kinds == sorted(kinds, key=list(dict.fromkeys(kinds)).index)
    for family in large.FAMILIES:
        assert names.index(f"{family}, 5 tiles, batch 1: prefill") < names.index(f"{family}, 5 tiles, batch 8: prefill")


def test_every_operation_has_an_entry() -> None:
    public = {name for name, value in vars(ops).items() if callable(value) and name in torch_operators()}
    assert {case.op for case in (*CASES, *VIDEO_CASES)} >= public


def torch_operators() -> set[str]:
    """Names of registered custom operators; helpers with a leading underscore are part of another."""
    return {name for name in dir(torch.ops.vlm_budget) if not name.startswith("_")}


def test_a_model_has_the_released_size() -> None:
    expected = {"llava_next": (7.06e9, 4096, 32), "qwen2_5_vl": (8.29e9, 3584, 28)}
    for family, (weights, width, layers) in expected.items():
        with torch.device("meta"):
            config, make = large._qwen_config("real") if family == "qwen2_5_vl" else large._llava_config("real")
            found = make(config)
        text = found.config.text_config
        assert sum(parameter.numel() for parameter in found.parameters()) == pytest.approx(weights, rel=1e-3)
        assert (text.hidden_size, text.num_hidden_layers) == (width, layers)
        assert sum(large.MROPE["real"]) == 128 // 2


def test_weights_are_drawn_in_their_final_type_and_rotary_tables_are_not() -> None:
    made = large.build("qwen2_5_vl", "tiny", CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in made.model.buffers()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
    assert made.inputs(3, 2)["pixel_values"].dtype == torch.bfloat16


# --- nothing wrong is timed ------------------------------------------------------------------------------------------


def planted(answers: Iterator[Any]) -> OpCase:
    """An operation that answers one thing after another: twice as reference, then as kernel."""
    return OpCase("planted", "x", "memory", lambda sizes, tokens, draw: Work(lambda: next(answers), 100))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([0, 0, 0, 1], "numbers differ"),  # a kernel that is wrong on the second input
        ([0] * 10 + [1], "numbers differ"),  # one that is right, and another time is not
        ([0.0, 0.0, 0.0, float("nan")], "finite in one alone"),
    ],
)
def test_an_operation_that_is_wrong_is_not_timed(answers: list[float], message: str, tmp_path: Path) -> None:
    given = iter([torch.tensor([answer]) for answer in answers] + [torch.tensor([answers[-1]])] * 100)
    plan = {"LENGTHS": {"tiny": [7]}, "PLAN": {"tiny": []}, "CASES": [planted(given)]}
    with mock.patch.multiple(gpu, **plan), mock.patch.object(gpu, "COPIED", {"tiny": 2**16}):
        found = worked(tmp_path)
    assert found["operations"] == [] and found["done"] == ["machine"]
    assert message in found["failed"]["planted, x, 7 tokens"]


def test_a_model_whose_pruned_output_is_wrong_is_not_timed() -> None:
    made = large.build("llava_next", "tiny", CPU, torch.float32)
    real, calls = made.model.lm_head.forward, []

    def other(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return real(hidden) + (len(calls) == 2)

    with (
        mock.patch.object(made.model.lm_head, "forward", other),
        pytest.raises(passes.WrongOutputError, match="llava_next, 2 tiles, batch 1: patched and native outputs differ"),
    ):
        passes.Case(made, 2, 1, Stopwatch(CPU))


def test_a_native_run_within_the_model_that_is_wrong_is_not_timed() -> None:
    made = large.build("llava_next", "tiny", CPU, torch.float32)
    with (
        mock.patch.object(passes.Case, "_fed_natively", nullcontext),
        pytest.raises(passes.WrongOutputError, match="llava_next, 2 tiles, batch 1: two native outputs differ"),
    ):
        passes.Case(made, 2, 1, Stopwatch(CPU))


def test_fewer_methods_first_and_all_of_them_later_leave_times_of_one_set_of_rounds() -> None:
    made = large.build("llava_next", "tiny", CPU, torch.float32)
    case = passes.Case(made, 2, 1, Stopwatch(CPU), rounds=(2, 2))
    case.prefills(passes.CORE, Deadline(60))
    assert set(case.rows) == set(passes.CORE)
    case.prefills((*passes.CORE, passes.Variant("divprune", 0.2)), Deadline(60))
    assert {len(times) for row in case.rows.values() for times in row.times.values()} == {2}


def test_long_calls_are_timed_less_often_and_none_for_much_more_than_a_second() -> None:
    assert repetitions(0.01) == 20 and graph_size(0.01) == (20, 20)
    assert repetitions(70) == 3 and graph_size(70) == (1, 3) and repetitions(5000) == 1
    for ms in (0.0, 0.1, 0.6, 2.0, 12.0, 50.0, 120.0):
        length, repeats = graph_size(ms)
        assert 3 * repetitions(ms) * ms + length * (repeats + 1) * ms <= 1100 and repeats == repetitions(ms)


def test_an_operation_says_what_the_default_takes_and_what_has_no_graph() -> None:
    class Loud:
        """A kernel that only says that it was launched."""

    kernel, watch = Loud(), Stopwatch(CPU)

    def call() -> torch.Tensor:
        if ops.mode() == "auto":
            _launch.Kernel.launch(kernel, ())
        return torch.ones(1)

    with mock.patch.object(_launch.Kernel, "launch", lambda *_: None) as plain:
        found = measured([Work(call, 4)], watch, "reference", lists=True)
        assert _launch.Kernel.launch is plain
    assert found["auto"] == "kernel" and found["runs"] == "reference"
    assert found["not_replayed"] == "copies lists from the host" and found["ms"]["replayed"] is None
    assert measured([Work(lambda: torch.ones(1), 4)], watch, "reference")["auto"] == "reference"


def test_difference_is_relative_and_exact_for_whole_numbers() -> None:
    one = torch.ones(4)
    assert difference([one, one], (one, one), 0.0) == 0
    assert difference(one * 1.001, one, 1e-2) == pytest.approx(1e-3, rel=1e-2)
    infinite = torch.tensor([1.0, float("-inf")])
    assert difference(infinite, infinite.clone(), 0.0) == 0
    for wrong in (one * 1.1, one.double(), torch.ones(3), one * float("inf")):
        with pytest.raises(DisagreementError):
            difference(wrong, one, 1e-2)
    with pytest.raises(DisagreementError, match="1 of 4 numbers differ"):
        difference(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4]), 1.0)


# --- nothing is lost -------------------------------------------------------------------------------------------------


def test_too_little_memory_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    def full(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plan = {"LENGTHS": {"tiny": [7]}, "PLAN": {"tiny": []}, "CASES": [OpCase("full", "x", "memory", full), CASES[0]]}
    with mock.patch.multiple(gpu, **plan):
        found = worked(tmp_path)
    assert found["not_measured"]["full, x, 7 tokens"] == "out of memory"
    assert found["failed"] == {} and len(found["operations"]) == 1


def test_variants_that_time_does_not_allow_are_named() -> None:
    made = large.build("llava_next", "tiny", CPU, torch.float32)
    case = passes.Case(made, 2, 1, Stopwatch(CPU), rounds=(1, 1))
    case.prefills(passes.FIRST, Deadline(-1))
    case.generations(passes.FIRST, 3, Deadline(-1), throughput=False)
    assert case.rows == {}
    assert case.left_out[0] == "full (prefill)" and case.left_out[-1] == "fastv at 20% (decode)"


def test_two_workers_results_of_one_case_are_joined() -> None:
    early = {"rounds": 3, "variants": [{"method": "hired", "budget": 0.2, "ms": {"ttft": 1}, "ratios": {"a": 1}}]}
    late = {"rounds": 0, "variants": [{"method": "hired", "budget": 0.2, "ms": {}, "ratios": {}, "decode": {"b": 2}}]}
    (joined,) = gpu.merged(early, late)["variants"]
    assert joined == {**early["variants"][0], "decode": {"b": 2}} and gpu.merged(early, late)["rounds"] == 3
    assert gpu.merged(None, late) is late


def test_a_run_goes_on_only_where_it_was(tmp_path: Path) -> None:
    record, arguments = begun(tmp_path)
    record.save(done=["machine"], not_measured={"a step": "out of time"})
    arguments.resume = True
    gpu.begin(record, arguments)
    assert record.data["done"] == ["machine"] and "a step" not in record.data["not_measured"]
    record.save(environment={**record.data["environment"], "git": "another"})
    with pytest.raises(SystemExit, match="no earlier run of this commit"):
        gpu.begin(record, arguments)


def test_the_command_measures_in_another_process_and_fails_with_a_step(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--size", "tiny", "--only", "quota", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    data = json.loads((tmp_path / "gpu_trial.json").read_text())
    assert {row["op"] for row in data["operations"]} == {"quota"} and data["not_measured"]
    with mock.patch.object(gpu, "supervise", lambda record, *_: record.fail("a step", "why")):
        assert gpu.main(words) == 1


# --- the GPU tests ---------------------------------------------------------------------------------------------------


def test_tests_are_counted_and_stopped_after_their_time(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import time\nimport pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert 0\n"
        "@pytest.mark.skip\ndef test_not(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    found = gpu.run_tests([str(file)], 20, tmp_path / "report.xml", workers=0)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["exit_code"] == "out of time" and found["lacking_hypothesis"] == []
    (failing,) = found["failing"]
    assert failing.endswith("test_some.test_bad")


def test_test_files_are_found_and_those_that_need_a_missing_package_are_named() -> None:
    files = gpu.gpu_test_files()
    assert files[0].startswith("tests/gpu/") and "tests/pruners/test_hired.py" in files
    assert Path(__file__).name not in {Path(file).name for file in files}
    lacking = gpu.needing(files, "hypothesis")
    assert {"tests/pruners/test_hired.py", "tests/pruners/test_random.py"} <= set(lacking)  # the second by a helper
    assert "tests/gpu/test_kernels_on_gpu.py" not in lacking
    assert gpu.counted(Path("nowhere.xml"))["failing"] == ["pytest wrote no report"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_is_recorded_and_without_a_record_that_nothing_is() -> None:
    results = ROOT / "benchmarks" / "results" / "gpu.json"
    recorded = json.loads(results.read_text()) if results.exists() else None
    page = (ROOT / "docs" / "kernels.md").read_text()
    shown = page.split("<!-- gpu:begin -->")[1].split("<!-- gpu:end -->")[0]
    assert shown.strip() == tables.gpu(recorded).strip(), "run `make docs`"
    if recorded is not None:
        assert not recorded["trial"] and recorded["size"] == "real"


def test_the_page_names_every_operation() -> None:
    named = (ROOT / "docs" / "kernels.md").read_text().split("| operation | what it does |")[1].split("\n\n")[0]
    assert {case.op for case in (*CASES, *VIDEO_CASES)} <= set(re.findall(r"`(\w+)`", named))


def test_without_a_record_no_cell_holds_a_figure() -> None:
    text = tables.gpu(None)
    rows = [line.strip("| ").split(" | ") for line in text.split("\n") if tables.NOT_YET in line and "|" in line]
    assert len(rows) == len(CASES) + 6
    assert all(row[-1] == tables.NOT_YET for row in rows if "goal" in text and len(row) == 3)
    assert text.count(tables.NOT_YET) == 1 + len(rows) + 2 * len(large.FAMILIES)


def test_a_record_fills_the_page(trial: dict[str, Any]) -> None:
    data = json.loads(json.dumps(trial))
    for row in data["operations"]:
        row["tokens"] = 2880
    data["operations"][0] |= {"auto": "kernel"}
    data["operations"][0]["ms"]["cold"] |= {"median": 2.0, "runs": 3}
    data["operations"][1]["ms"]["cold"] |= {"median": 2.0, "runs": 20}
    data["models"][0]["variants"][2]["waits"] = {"ours": 3}
    data["models"][0]["variants"][2]["ratios"] |= {"against_native": 1.05, "against_native_ahead": 1.25}
    text = tables.gpu(data)
    assert "| 1.08 x | 1.050 x (1.250 x with native launches issued ahead) |" in text
    assert " (1.050 x, 1.250 x) |" in text and text.count(" issued ahead) |") == 2
    first, second = [line for line in text.split("\n") if "| 2,880" in line][:2]
    assert "| 2,880 | 2000.0 us (3 runs) |" in first
    assert "| 2,880 (`auto` takes the reference) | 2000.0 us |" in second
    assert "| HiRED at 20%, prefill against native | 1.08 x | " in text and "| waits for the device" in text
    assert f"| {op_cases.LENGTHS[0]:,} | " in text and "llava_next, batch 1:\n\n| run |" in text
    (waits,) = [line for line in text.split("\n") if line.startswith("| waits")]
    assert waits.endswith("| 1 | 3 |")
