"""The GPU benchmark of sparse video attention without a GPU: all of it runs on toys, and nothing wrong is timed."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vlm_budget import ops
from vlm_budget.eval import video_calls, video_configs, video_models, video_passes, video_shapes
from vlm_budget.eval.device import Deadline, Stopwatch
from vlm_budget.eval.op_work import DisagreementError, Sizes, difference
from vlm_budget.eval.steps import NotEnoughError, Record
from vlm_budget.eval.video_ops import DENSITY, VIDEO_CASES, attention, block_means_of
from vlm_budget.eval.video_passes import CALLS, CUTS, SHIPPED, VideoBench
from vlm_budget.eval.video_shapes import SHAPES, cut, cut_rows, exact_rows, membership, planted, sampled
from vlm_budget.triton_kernels import block_sparse_attention as kernel_file
from vlm_budget.triton_kernels._launch import Config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TOY = SHAPES["tiny"][0]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, tables = script("gpu"), script("video_tables")


def bench(folder: Path) -> VideoBench:
    """Before the first step."""
    record = Record(folder / "x.json")
    record.data = {**video_passes.EMPTY}
    return VideoBench("tiny", torch.float32, Stopwatch(CPU), record, Deadline(60))


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything once on toys, in as few repetitions as can be."""
    pytest.importorskip("diffusers", reason="whole transformers are diffusers'")
    folder = tmp_path_factory.mktemp("trial")
    words = ["--device", "cpu", "--size", "tiny", "--suite", "video", "--dtype", "float32", "--out", str(folder)]
    few = {
        gpu: {"VIDEO_OPERATIONS": {"tiny": (63,)}},
        video_passes: {"LEAST": 1, "repetitions": lambda ms: 1, "LENGTHS": {"tiny": (384,)}},
        video_calls: {"PERIOD": 1},
        video_models: {"MOST": 2},
    }
    arguments = gpu.parser().parse_args(words)
    gpu.begin(Record(folder / "gpu_video_trial.json"), arguments)
    patches = [mock.patch.multiple(module, **values) for module, values in few.items()]
    with patches[0], patches[1], patches[2], patches[3]:
        assert gpu.main([*words, "--worker", str(time.time() + 100)]) == 0
    return json.loads((folder / "gpu_video_trial.json").read_text())


# --- all of it -------------------------------------------------------------------------------------------------------


def test_a_trial_measures_everything_and_says_that_it_is_one(trial: dict[str, Any]) -> None:
    assert trial["trial"] and trial["size"] == "tiny" and trial["failed"] == {} and trial["running"] is None
    lacking = "backend='fa4' needs FlashAttention-4"
    assert set(trial["not_measured"].values()) <= {"references have no configurations", lacking}
    assert set(trial["done"]) | set(trial["not_measured"]) == set(trial["steps"])
    assert len(trial["kernel"]) == 2 * len(CUTS) and len(trial["calls"]) == 2 * len(CALLS)
    assert {row["op"] for row in trial["operations"]} == {case.op for case in VIDEO_CASES}
    ways = {(row["family"], row["video"], row["way"]) for row in trial["models"]}
    videos = [(family, video) for family, all_of in video_models.LATENTS.items() for video in all_of]
    assert ways == {(*video, way) for video in videos for way in ("dense", "svg2")}
    assert [timing["tokens"] for timing in trial["break_even"]["timings"]] == [384]


def test_every_back_end_is_tried_and_what_cannot_run_says_why(trial: dict[str, Any]) -> None:
    rows = {(row["shape"], row["backend"], row["masked"]): row for row in trial["dense"]}
    names = [shape.name for shape in SHAPES["tiny"]]
    assert {key[:2] for key in rows} == {(name, backend) for name in names for backend in video_calls.BACKENDS}
    assert {key[0] for key in rows if key[2]} == {TOY.name}  # the one with text, whose model masks padding
    assert rows[TOY.name, "cudnn", False]["ms"] is None and rows[TOY.name, "cudnn", False]["why"]
    assert rows[TOY.name, "math", False]["difference"] < 1e-5 and rows[TOY.name, "math", False]["flops_per_second"] > 0


def test_figures_are_those_of_everything_computed(trial: dict[str, Any]) -> None:
    for row in trial["kernel"]:
        assert row["share_of_ideal"] == pytest.approx(row["pairs"] * row["dense_ms"] / row["ms"]["median"])
    pairs = {(row["shape"], row["map"], row["tile"], row["corrected"]): row["pairs"] for row in trial["kernel"]}
    for (shape, kind, tile, corrected), share in pairs.items():
        assert not corrected or share > pairs[shape, kind, tile, False]
    for row in trial["calls"]:
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ms"])
        assert row["overhead_ms"] == pytest.approx(row["ms"] - row["kernel_ms"])  # references make no lists of tiles
        asked = DENSITY + (0.05 if row["shape"] == TOY.name else 0)  # text is dense
        assert 0 < row["pairs"] <= asked and row["difference"] < 1e-4
        named = {"kmeans_assign", "counting_sort", "block_means", "block_map", "permute_tokens", "unpermute_tokens"}
        assert set(row["parts_ms"]) == {*named, "block_sparse_attention", "other"}
    shipped = {row["shape"]: row["output_error"] for row in trial["calls"] if row["what"] == SHIPPED}
    assert all(error < 0.2 for error in shipped.values())  # what is planted is found


def test_steps_go_from_what_matters_most_to_what_matters_least(tmp_path: Path) -> None:
    made = bench(tmp_path)
    made.size = "real"
    names = [name for name, _ in made.steps()]
    assert len(names) == len(set(names))
    kinds = [name.split(",")[0] for name in names]
    assert kinds[:6] == ["dense", "kernel", "call"] * 2  # a goal's figure for either model comes first
    rest = list(dict.fromkeys(kinds[6:]))
    assert rest == ["kernel", "break-even", "HunyuanVideo-13B", "Wan-1.3B", "configurations", "call", "dense"]


def test_shapes_and_models_are_the_released_ones() -> None:
    pytest.importorskip("diffusers", reason="whole transformers are diffusers'")
    hunyuan, wan = SHAPES["real"]
    assert (hunyuan.tokens, hunyuan.text, hunyuan.heads, hunyuan.head_dim) == (118_800, 256, 24, 128)
    assert (wan.tokens, wan.text, wan.heads, wan.head_dim) == (75_600, 0, 40, 128)
    assert hunyuan.flops == pytest.approx(174.2e12, rel=1e-3) and wan.flops == pytest.approx(117.1e12, rel=1e-3)
    for family, weights, layers in (("HunyuanVideo-13B", 12.82e9, 60), ("Wan-1.3B", 1.419e9, 30)):
        model = video_models.build(family, "real", torch.device("meta"), torch.bfloat16)
        assert model.facts["parameters"] == pytest.approx(weights, rel=1e-3) and model.facts["layers"] == layers
    assert model.tokens("480p, 81 frames") == 32_760 and model.tokens("720p, 81 frames") == 75_600


def test_without_diffusers_whole_transformers_are_not_measured(tmp_path: Path) -> None:
    made = bench(tmp_path)
    with (
        mock.patch.dict("sys.modules", diffusers=None),
        pytest.raises(NotEnoughError, match="^diffusers is not installed$"),
    ):
        made.forward("Wan-1.3B", "480p, 81 frames", False)


# --- nothing wrong is timed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["output", "logarithm"])
def test_a_kernel_that_is_wrong_is_not_timed(wrong: str, tmp_path: Path) -> None:
    made, right = bench(tmp_path), ops.block_sparse_attention
    made.dense(TOY, False)

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)
        return (out * 1.01, lse) if wrong == "output" else (out, lse + 0.01)

    with mock.patch.object(ops, "block_sparse_attention", spoiled), pytest.raises(DisagreementError):
        made.sparse(TOY, *CUTS[0])
    assert made.record.data["kernel"] == []


def test_a_call_that_is_wrong_is_not_timed(tmp_path: Path) -> None:
    made, right = bench(tmp_path), video_passes.attend
    made.dense(TOY, False)
    swapped = lambda call, blocks: tuple(part.flip(2) for part in right(call, blocks))  # noqa: E731
    with mock.patch.object(video_passes, "attend", swapped), pytest.raises(DisagreementError):
        made.call(TOY, SHIPPED)
    assert made.record.data["calls"] == []


def test_without_a_dense_time_nothing_is_compared_with_one(tmp_path: Path) -> None:
    made = bench(tmp_path)
    for step in (lambda: made.sparse(TOY, *CUTS[0]), lambda: made.call(TOY, SHIPPED)):
        with pytest.raises(NotEnoughError, match="was not measured"):
            step()


def test_the_baseline_is_the_fastest_unmasked_back_end(tmp_path: Path) -> None:
    made = bench(tmp_path)
    for backend, ms, masked in (("flash", 3.0, False), ("cudnn", 2.0, False), ("math", None, False), ("x", 1.0, True)):
        row = {"shape": TOY.name, "backend": backend, "masked": masked, "ms": ms and {"median": ms}}
        made._add("dense", row, "shape", "backend", "masked")
    assert made.best(TOY) == ("cudnn", 2.0) and made.best(TOY, masked=True) == ("x", 1.0)
    made._add("dense", {**row, "ms": {"median": 0.5}}, "shape", "backend", "masked")
    assert made.best(TOY, masked=True) == ("x", 0.5) and len(made.record.data["dense"]) == 4


# --- what it is judged by --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_exact_rows_are_attention_under_the_map(kind: Any, tile: int | None, corrected: bool) -> None:
    tensors, blocks = planted(TOY, CPU, torch.float32), cut(TOY, kind, tile, 0.25, CPU)
    assert blocks.query_sizes.sum(-1).unique().tolist() == blocks.key_sizes.sum(-1).unique().tolist() == [TOY.length]
    assert blocks.kept[..., -1, :].all() and blocks.kept[..., -1].all()  # text sees and is seen
    means = block_means_of(*tensors[1:], blocks) if corrected else None
    rows = sampled(TOY.length, CPU)
    assert rows[0] == 0 and rows[-1] == TOY.length - 1
    found = attention(*tensors, blocks, TOY.scale, means)()
    wanted = cut_rows(tensors, blocks, means, rows, TOY.scale)
    difference((found[0][0][:, rows], found[1][0][:, rows]), wanted, 1e-5)
    own, seen = (membership(sizes[0].expand(2, -1), TOY.length) for sizes in (blocks.query_sizes, blocks.key_sizes))
    mask = torch.stack([blocks.kept[0, head][own[head]][:, seen[head]] for head in range(2)])
    extra = blocks.video * TOY.tokens if corrected else 0
    assert blocks.pairs(corrected) == pytest.approx((float(mask.sum()) / 2 + extra) / TOY.length**2)
    if not corrected:
        dense = scaled_dot_product_attention(*tensors, attn_mask=mask[None])
        difference(wanted[0], dense[0][:, rows], 1e-5)


def test_all_rows_without_a_map_are_dense_attention() -> None:
    tensors = planted(TOY, CPU, torch.float32)
    rows = torch.arange(TOY.length)
    out = exact_rows(*tensors, rows, TOY.scale)[0]
    difference(out, scaled_dot_product_attention(*tensors)[0], 1e-5)


def test_inputs_are_the_same_again_and_others_with_another_seed() -> None:
    first, again, other = (planted(TOY, CPU, torch.float32, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert planted(TOY, CPU, torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_first_clustering_is_shared_by_the_sparse_steps() -> None:
    assert video_calls.amortised(100.0, 10.0, 45) == pytest.approx((100 + 44 * 10) / 45)
    run = video_calls.Run(mock.Mock(reuse=3), video_shapes.WAN, ())
    assert run.dense_steps == 10 and run.steps == 9  # whole rounds of three, eight steps at least


def test_masks_are_dropped_only_meanwhile() -> None:
    query = torch.randn(1, 1, 4, 8)
    mask = torch.tensor([True, True, False, False])[None, None, None]
    masked, plain = scaled_dot_product_attention(query, query, query, mask), scaled_dot_product_attention(*[query] * 3)
    with video_models.unmasked():
        assert torch.equal(scaled_dot_product_attention(query, query, query, mask), plain)
        assert torch.equal(scaled_dot_product_attention(query, query, query, attn_mask=mask), plain)
    assert torch.equal(scaled_dot_product_attention(query, query, query, mask), masked)


# --- configurations --------------------------------------------------------------------------------------------------


def test_a_configuration_is_in_force_only_meanwhile() -> None:
    kernel, plain = kernel_file.KERNELS["half"], kernel_file.tile_of(torch.bfloat16, 128)
    shipped = kernel.configs, kernel.tunes
    with video_configs.configured(torch.bfloat16, 64, 128, Config(warps=4, stages=5)):
        assert kernel.configs == (Config(warps=4, stages=5),) and not kernel.tunes
        assert kernel_file.tile_of(torch.bfloat16, 128) == (64, 128)
    assert (kernel.configs, kernel.tunes) == shipped and kernel_file.tile_of(torch.bfloat16, 128) == plain


def test_configurations_that_do_not_fit_are_noted_and_other_failures_are_raised() -> None:
    class OutOfResources(Exception):
        """As Triton's."""

    answers: Iterator[Any] = iter([{"ms": 1.0}, OutOfResources("out of shared memory"), ValueError("broken")])

    def time(call: Any) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = video_configs.launched(lambda tma: None, torch.bfloat16, (True, 128, 64), time)
    first, second = next(found), next(found)
    assert first == {"tma": True, "rows": 128, "keys": 64, "warps": 8, "stages": 3, "ms": 1.0}
    assert second["ms"] is None and second["why"] == "out of shared memory"
    with pytest.raises(ValueError, match="broken"):
        next(found)


def test_entries_of_operations_are_judged() -> None:
    """Labels that are not the nearest, and a map that misses its mass, are found out."""
    sizes = Sizes(CPU, torch.float32, heads=2, head_dim=16)
    made = {case.what: case.make(sizes, 577, torch.Generator().manual_seed(0)) for case in VIDEO_CASES}
    labels, kept = made["to clusters of keys"], made["nine tenths of the mass"]
    right = labels.call()
    assert labels.compare(right, right) <= labels.tolerance
    with pytest.raises(DisagreementError):
        labels.compare((right + 1) % 4, right)
    wanted = kept.call()
    assert kept.compare(wanted, wanted) <= kept.tolerance
    for wrong in (torch.zeros_like(wanted), torch.ones_like(wanted)):
        with pytest.raises(DisagreementError):
            kept.compare(wrong, wanted)


# --- the command and the page ----------------------------------------------------------------------------------------


def test_the_command_keeps_the_suites_apart(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--size", "tiny", "--suite", "video", "--only", "unpermute", "--out", str(tmp_path)]
    ran: dict[str, Any] = {}

    def tests(files: Any, seconds: float, report: Path, workers: int = 4, which: str = "") -> dict[str, Any]:
        ran["which"] = which
        return {"exit_code": 0}

    with mock.patch.object(gpu, "run_tests", tests), mock.patch.object(gpu, "supervise", lambda *_: None):
        assert gpu.main([*words, "--test-minutes", "1"]) == 0
        assert ran["which"] == gpu.VIDEO_TESTS and "block_sparse_attention" in gpu.VIDEO_TESTS
        tokens = [word if word != "video" else "tokens" for word in words]
        assert gpu.main([*tokens, "--test-minutes", "1"]) == 0
        assert ran["which"] == f"not ({gpu.VIDEO_TESTS})"
    assert {file.name for file in tmp_path.glob("*.json")} == {"gpu_video_trial.json", "gpu_trial.json"}


def test_the_page_says_what_is_recorded_and_without_a_record_that_nothing_is() -> None:
    results = ROOT / "benchmarks" / "results" / "gpu_video.json"
    recorded = json.loads(results.read_text()) if results.exists() else None
    page = (ROOT / "docs" / "kernels.md").read_text()
    shown = page.split("<!-- gpu-video:begin -->")[1].split("<!-- gpu-video:end -->")[0]
    assert shown.strip() == tables.page(recorded).strip(), "run `make docs`"
    if recorded is not None:
        assert not recorded["trial"] and recorded["size"] == "real"


def test_without_a_record_no_cell_holds_a_figure() -> None:
    text = tables.page(None)
    goals = [line for line in text.split("\n") if line.startswith("|") and tables.NOT_YET in line]
    assert len(goals) == 4 and all(line.count(tables.NOT_YET) == 2 for line in goals)
    assert text.count(tables.NOT_YET) == 1 + 8 + 8


def test_a_record_fills_the_page(trial: dict[str, Any]) -> None:
    text = json.dumps(trial)
    for toy, real in zip(SHAPES["tiny"], SHAPES["real"], strict=True):
        text = text.replace(f'"{toy.name}"', f'"{real.name}"')
    data = json.loads(text)
    for row in data["operations"]:
        row["tokens"] = tables.LENGTHS[0]
    way = {"shape": "HunyuanVideo 720p", "tma": True, "rows": 128, "keys": 64, "warps": 8}
    slow, fast = ({**way, "stages": stages, "ms": {"median": ms}} for stages, ms in ((2, 130.0), (3, 120.0)))
    data["configurations"] = [slow, {**way, "stages": 4, "ms": None, "why": "no room"}, fast]
    shown = tables.page(data)
    assert shown.index("| descriptors | 8 | 3 | 120 |") < shown.index("| descriptors | 8 | 2 | 130 |")
    worst = min(row["share_of_ideal"] for row in data["kernel"] if row["shape"] == "HunyuanVideo 720p")
    assert f"the worst map and blocks | at least 75% | {worst:.0%} |" in shown
    assert "| HunyuanVideo 720p | cudnn | cannot run |  |" in shown and "Break-even:" in shown
    for what in (*CALLS, "480p, 81 frames", "`unpermute_tokens`", "lists of tiles"):
        assert what in shown
    assert shown.count(tables.NOT_YET) == 2 + 2 * len(data["models"]) // 2
