"""Patched pipelines of diffusers: which step it is, which forwards are dense, and that everything else works."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import diffusers
import pytest
import torch

import vlm_budget
from tiny_pipelines import PIPELINES, TinyPipeline, tiny_pipeline
from tiny_video import Shuffled, tiny_video
from vlm_budget.video.dit.control import HANDLE

NAMES = sorted(PIPELINES)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def sparse(tiny: TinyPipeline, **options: Any) -> Any:
    method = Shuffled(**{"density": 0.5, "warmup": 0.0, "dense_layers": 0.0, **options})
    return vlm_budget.patch(tiny.pipe, method, force=True)


def ticks(tiny: TinyPipeline) -> list[tuple[str, int, int | None, int, bool]]:
    """Name, step, steps, branch and whether it is dense of every forward to come."""
    seen: list[tuple[str, int, int | None, int, bool]] = []
    for name in ("transformer", "transformer_2"):
        transformer = getattr(tiny.pipe, name, None)
        if transformer is not None:
            attached = vars(transformer)[HANDLE]

            def note(*_: Any, name: str = name, attached: Any = attached) -> None:
                tick = attached._now.tick
                seen.append((name, tick.step, tick.steps, tick.branch, attached._now.why is not None))

            transformer.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_steps_branches_and_warm_up_are_those_of_the_pipeline(name: str) -> None:
    tiny = tiny_pipeline(name)
    with sparse(tiny, warmup=0.5) as handle:
        seen = ticks(tiny)
        for _ in range(2):
            tiny(steps=4)
        # Wan 2.2 hands over where the boundary lies, and counts on.
        names = ["transformer"] * 2 + ["transformer_2"] * 2 if name == "wan_22" else ["transformer"] * 4
        run = [(names[step], step, 4, branch, step < 2) for step in range(4) for branch in range(tiny.forwards)]
        assert seen == run + run
        report = handle.report()
    assert report.steps == 4
    assert report.calls == 4 * tiny.forwards * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_is_bit_identical_at_full_density_and_after_undo(name: str) -> None:
    tiny = tiny_pipeline(name)
    before = tiny(steps=2)
    with vlm_budget.patch(tiny.pipe, "svg2", budget=1.0, force=True):
        assert torch.equal(tiny(steps=2), before)
    handle = sparse(tiny)
    assert not torch.equal(tiny(steps=2), before)
    handle.undo()
    assert torch.equal(tiny(steps=2), before)


@pytest.mark.parametrize("name", NAMES)
def test_everything_computed_in_another_order_gives_the_dense_video(name: str) -> None:
    tiny = tiny_pipeline(name)
    before = tiny(steps=2)
    with sparse(tiny, every=True):
        torch.testing.assert_close(tiny(steps=2), before, **CLOSE)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video_15"])
def test_svg2_runs_with_the_preset_and_repeats_itself(name: str) -> None:
    tiny = tiny_pipeline(name)
    before = tiny()
    with vlm_budget.patch(tiny.pipe, force=True) as handle:
        first = tiny()
        assert torch.equal(tiny(), first)
        assert not torch.equal(first, before)
        report = handle.report()
        assert torch.equal(tiny(num_inference_steps=4), first)
    assert 0 < report.sparse_calls < report.calls or report.dense == ()
    assert report.sparse_density is not None and report.promised is not None


@pytest.mark.parametrize("name", ["wan", "ltx", "mochi"])
def test_a_batch_of_prompts_equals_single_runs(name: str) -> None:
    tiny = tiny_pipeline(name)
    prompts = {key: value.repeat_interleave(2, 0) for key, value in tiny.arguments.items() if "prompt" in key}
    with sparse(tiny):
        both = tiny(**prompts, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
        torch.testing.assert_close(both[1:], tiny(seed=1), **CLOSE)


def test_an_interrupted_run_is_forgotten_by_the_next() -> None:
    tiny = tiny_pipeline("wan")

    def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return given

    with sparse(tiny) as handle:
        expected = tiny()
        with pytest.raises(KeyboardInterrupt):
            tiny(callback_on_step_end=stop)
        assert torch.equal(tiny(), expected)
        assert handle.report().densities[0] == handle.report().densities[1]
        for state in vars(tiny.pipe.transformer)[HANDLE]._states.values():
            assert state["calls"] == 4


def test_video_to_video_counts_the_steps_that_it_runs() -> None:
    tiny = tiny_pipeline("wan")
    tiny.pipe.scheduler.set_timesteps(8)
    # Half of the schedule is skipped, as by strength=0.5: the run begins at its fifth timestep.
    run = tiny.pipe.scheduler.timesteps[4:]
    video = tiny_video("wan")
    tiny.pipe.transformer = video.transformer
    with sparse(tiny, warmup=0.5) as handle, torch.no_grad():
        for timestep in run:
            tiny.pipe._current_timestep = timestep
            video.transformer(**{**video.arguments(0.0), "timestep": timestep.expand(1)})
        report = handle.report()
    assert report.steps == 4
    assert [row[0] == 1.0 for row in report.densities] == [True, True, False, False]


def test_two_pipelines_at_once_do_not_know_each_other() -> None:
    one, two = tiny_pipeline("wan"), tiny_pipeline("ltx")
    with sparse(one):
        alone = one()
    with sparse(two):
        other = two()
    with sparse(one), sparse(two):
        inner: list[torch.Tensor] = []

        def nest(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                inner.append(two())
            return given

        assert torch.equal(one(callback_on_step_end=nest), alone)
        assert torch.equal(inner[0], other)


def test_a_scheduler_that_is_exchanged_after_patching_is_followed() -> None:
    tiny = tiny_pipeline("wan")
    with sparse(tiny, warmup=0.5):
        seen = ticks(tiny)
        tiny.pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        tiny(steps=2)
    assert [step for _, step, *_ in seen] == [0, 0, 1, 1]


def test_a_pipeline_of_the_same_components_is_not_taken_for_the_patched_one() -> None:
    tiny = tiny_pipeline("wan")
    twin = diffusers.WanPipeline(**{**tiny.pipe.components, "scheduler": copy.deepcopy(tiny.pipe.scheduler)})
    twin.set_progress_bar_config(disable=True)
    with sparse(tiny):
        tiny()
        with pytest.raises(vlm_budget.PatchError, match="scheduler of the patched pipeline"):
            twin(**tiny.arguments, num_inference_steps=3)
        tiny()


def test_a_copied_pipeline_has_a_patch_of_its_own() -> None:
    tiny = tiny_pipeline("wan_22")
    before = tiny()
    handle = sparse(tiny, warmup=0.5)
    expected = tiny()
    twin = TinyPipeline(copy.deepcopy(tiny.pipe), tiny.arguments)
    twin.pipe.set_progress_bar_config(disable=True)
    handle.undo()
    assert torch.equal(tiny(), before)
    assert torch.equal(twin(), expected)
    vlm_budget.unpatch(twin.pipe)
    assert torch.equal(twin(), before)
    with pytest.raises(vlm_budget.PatchError, match="is not patched"):
        vlm_budget.unpatch(twin.pipe)


def test_cpu_offload_before_or_after_patching() -> None:
    """Accelerate's hooks replace forwards; on a machine without a GPU they are put on by hand."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    tiny = tiny_pipeline("hunyuan_video")
    with sparse(tiny):
        expected = tiny()
    for first in ("offload", "patch"):
        if first == "offload":
            cpu_offload(tiny.pipe.transformer, torch.device("cpu"))
        handle = sparse(tiny)
        if first == "patch":
            cpu_offload(tiny.pipe.transformer, torch.device("cpu"))
        assert torch.equal(tiny(), expected)
        assert handle.report().sparse_calls == 4 * 2 * 3
        handle.undo()
        remove_hook_from_module(tiny.pipe.transformer, recurse=True)


def test_a_cache_of_blocks_skips_calls_and_can_be_taken_away() -> None:
    tiny = tiny_pipeline("wan")
    with sparse(tiny) as handle:
        expected = tiny()
        tiny.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        tiny()
        assert handle.report().calls < 4 * 2 * 3
        tiny.pipe.transformer.disable_cache()
        assert torch.equal(tiny(), expected)


def test_a_pipeline_whose_scheduler_cannot_be_read_tells_steps_by_value() -> None:
    """Timesteps that lie elsewhere in memory, and no ``step_index``."""
    tiny = tiny_pipeline("cogvideox")

    def elsewhere(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tiny.pipe._current_timestep = None
        return args, {**given, "timestep": given["timestep"].clone()}

    with sparse(tiny, warmup=0.5):
        seen = ticks(tiny)
        tiny.pipe.transformer.register_forward_pre_hook(elsewhere, with_kwargs=True, prepend=True)
        tiny(steps=2)
    assert [step for _, step, *_ in seen] == [0, 1]


def test_latents_of_a_run_are_looked_at_before_anything_is_computed() -> None:
    tiny = tiny_pipeline("wan")
    noise = torch.full((1, 4, 3, 12, 8), float("nan"))
    with sparse(tiny, warmup=0.5), pytest.raises(vlm_budget.VideoAttentionError, match="latents of step 0 hold NaN"):
        tiny(latents=noise)


def test_below_the_break_even_length_a_pipeline_warns_once_and_stays_dense() -> None:
    tiny = tiny_pipeline("wan")
    before = tiny()
    with vlm_budget.patch(tiny.pipe, "svg2") as handle:
        with pytest.warns(UserWarning, match="72 video tokens .3x6x4. are fewer than the 24000") as told:
            assert torch.equal(tiny(), before)
        assert len([one for one in told if "video tokens" in str(one.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny()
        report = handle.report()
    assert report.sparse_calls == 0
    assert any("video tokens" in text for text in report.warnings)
    with vlm_budget.patch(tiny.pipe, Shuffled(density=0.5, warmup=0.0, dense_layers=0.0), break_even=72) as handle:
        tiny()
        assert handle.report().sparse_calls == handle.report().calls


def test_compare_tells_quality_of_the_sparse_run_and_leaves_its_report() -> None:
    tiny = tiny_pipeline("wan")
    with sparse(tiny) as handle:
        quality = handle.compare(tiny, repeat=True)
        report = handle.report(quality=True)
        assert quality.repeats is True
        assert report.quality is quality
        assert report.sparse_calls == 4 * 2 * 3
    with sparse(tiny, every=True) as handle:
        assert handle.compare(tiny).mean_psnr > 60 > quality.mean_psnr
