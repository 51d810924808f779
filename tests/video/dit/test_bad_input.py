"""What cannot work is told: which error, and what to do."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import vlm_budget
from tiny_pipelines import tiny_pipeline
from tiny_video import BUILDERS, Shuffled, TinyVideo, tiny_video, wan_transformer
from vlm_budget.errors import (
    BudgetError,
    InfeasibleBudgetError,
    MissingExtraError,
    OptionError,
    PatchError,
    SelectionError,
    UnknownNameError,
    UnsupportedModelError,
    VideoAttentionError,
)
from vlm_budget.registry import VIDEO_MODELS
from vlm_budget.video.dit import control
from vlm_budget.video.dit.attend import attend
from vlm_budget.video.dit.models.wan import Wan

NAMES = sorted(BUILDERS)


def patch(*args: Any, **options: Any) -> Any:
    return vlm_budget.patch(*args, **{"force": True, "timesteps": 4, **options})


def forward(video: TinyVideo, *args: Any, **options: Any) -> Any:
    with patch(video.transformer, *args, **options):
        return video()


def vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)


def vace() -> Any:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
    return diffusers.WanVACETransformer3DModel(**config, num_layers=1, vace_layers=[0], vace_in_channels=4)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (vae, "AutoencoderKL is not supported"),
        (vace, "WanVACETransformer3DModel is not supported"),
        (
            lambda: diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), vace()),
            "WanVACETransformer3DModel of WanPipeline",
        ),
        (lambda: diffusers.DDPMPipeline(vae(), diffusers.DDPMScheduler()), "DDPMPipeline without a transformer"),
    ],
)
def test_other_models_of_diffusers_are_refused_with_the_supported_ones(model: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as told:
        vlm_budget.patch(model(), "svg2")
    for name in vlm_budget.list_video_models():
        assert VIDEO_MODELS.get(name).transformer in str(told.value)


def test_other_modules_are_still_told_the_supported_language_models() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a supported model"):
        vlm_budget.patch(nn.Linear(2, 2), "svg2", 0.5)


def test_a_method_for_language_models_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown video attention method 'fastv'"):
        patch(wan_transformer(), "fastv")


def test_unknown_names_suggest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'svg2'"):
        patch(wan_transformer(), "svg-2")
    with pytest.raises(UnknownNameError, match="Did you mean 'density'"):
        patch(wan_transformer(), "svg2", densty=0.2)
    with pytest.raises(UnknownNameError, match="Did you mean 'break_even'"):
        patch(wan_transformer(), "svg2", breakeven=2)
    with pytest.raises(UnknownNameError, match="takes .*svg2"):
        patch(wan_transformer(), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"top_p": "0.9"},
        {"density": 0.0},
        {"density": 1.5},
        {"density": -0.1},
        {"warmup": -0.1},
        {"warmup": 2.0},
        {"dense_layers": 1.1},
        {"top_p": 0.9, "density": 0.3},
        {"query_clusters": 0},
        {"break_even": -1},
        {"break_even": "24k"},
        {"timesteps": 0},
        {"timesteps": [1.0, 2.0, 0.0]},
        {"force": "no"},
        {"plan": "plan.json"},
        {"positions": "packed"},
        {"budget": 0.3, "density": 0.3},
        {"budget": 0.3, "top_p": 0.9},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    transformer = wan_transformer()
    with pytest.raises(OptionError):
        patch(transformer, "svg2", **options)
    assert not vars(transformer).get("_vlm_budget_video")


@pytest.mark.parametrize("budget", [0.0, -0.2, 1.5, "20 apples", "128 tokens", 128, "200 MB kv", True, "nan"])
def test_budgets_that_are_none_of_video_are_refused(budget: Any) -> None:
    with pytest.raises(BudgetError):
        patch(wan_transformer(), "svg2", budget=budget)


def test_options_beside_a_configured_method_are_refused() -> None:
    with pytest.raises(PatchError, match="configure the instance"):
        patch(wan_transformer(), Shuffled(), density=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_a_density_below_the_minimum_is_refused_before_anything_runs(name: str) -> None:
    with pytest.raises((OptionError, BudgetError), match="minimum|too little"):
        forward(tiny_video(name), "svg2", density=0.01, warmup=0.0)
    with pytest.raises(InfeasibleBudgetError) as told:
        forward(tiny_video(name), "svg2", budget="1% flops", warmup=0.0)
    nearest = told.value.nearest[0]
    forward(tiny_video(name), "svg2", budget=nearest, warmup=0.0)


def test_a_bare_transformer_with_warm_up_needs_its_steps() -> None:
    with pytest.raises(OptionError, match=r"first 35% of a run's steps are dense.*timesteps="):
        vlm_budget.patch(wan_transformer(), "svg2", force=True)
    vlm_budget.patch(wan_transformer(), "svg2", force=True, warmup=0.0)


def test_a_pipeline_needs_no_timesteps() -> None:
    with pytest.raises(OptionError, match="scheduler tells its steps"):
        vlm_budget.patch(tiny_pipeline("wan").pipe, "svg2", timesteps=10)


def test_a_copied_transformer_without_pipeline_asks_for_steps() -> None:
    import copy

    tiny = tiny_pipeline("wan")
    vlm_budget.patch(tiny.pipe, "svg2", force=True)
    video = tiny_video("wan")
    twin = TinyVideo(copy.deepcopy(tiny.pipe.transformer), video.arguments, 3)
    with pytest.raises(PatchError, match="copied away from the pipeline"):
        twin()


def test_wide_heads_are_refused() -> None:
    with pytest.raises(VideoAttentionError, match="up to 128 dimensions are supported, got 160"):
        patch(wan_transformer(layers=1, heads=1, size=160), "svg2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(name: str, value: float) -> None:
    video = tiny_video(name)
    latents = video.arguments(900.0)["hidden_states"].clone()
    latents.view(-1)[7] = value
    method = Shuffled(density=0.5, warmup=0.0)
    with patch(video.transformer, method), pytest.raises(VideoAttentionError, match="NaN or infinity"):
        video(hidden_states=latents)


@pytest.mark.parametrize("name", NAMES)
def test_queries_that_are_not_finite_are_refused(name: str) -> None:
    """A broken layer, where the latents are fine."""
    video = tiny_video(name)
    method = Shuffled(density=0.5, warmup=0.0, dense_layers=0.0)
    with patch(video.transformer, method):
        weight = vars(video.transformer)["_vlm_budget_video"]._seam._attentions[1].to_k.weight
        with torch.no_grad():
            weight[0] = float("nan")
        with pytest.raises(VideoAttentionError, match="layer 1 in step 0"):
            video()


def test_a_dense_run_does_not_look_at_its_latents() -> None:
    video = tiny_video("wan")
    latents = torch.full_like(video.arguments(900.0)["hidden_states"], float("nan"))
    with patch(video.transformer, "svg2", budget=1.0):
        assert video(hidden_states=latents).isnan().all()


@pytest.mark.parametrize("mask", [torch.ones(72, 72).tril().bool()[None, None], torch.full((1, 1, 1, 72), 0.5)])
def test_masks_of_unknown_form_are_refused(mask: torch.Tensor) -> None:
    video = tiny_video("wan")
    block = video.transformer.blocks[0]
    with patch(video.transformer, Shuffled(density=0.5, warmup=0.0, dense_layers=0.0)):
        hook = block.attn1.register_forward_pre_hook(lambda _, args: (*args[:2], mask, *args[3:]))
        with pytest.raises(VideoAttentionError, match="Known masks are"):
            video()
        hook.remove()
        block.attn1.register_forward_pre_hook(lambda _, args: (*args[:2], mask > 2, *args[3:]))
        with pytest.raises(VideoAttentionError, match="hides tokens of the video"):
            video()


def test_ltx_without_a_grid_is_refused() -> None:
    video = tiny_video("ltx")
    with patch(video.transformer, Shuffled(density=0.5, warmup=0.0)):
        coordinates = torch.zeros(1, 3, 72)
        with pytest.raises(VideoAttentionError, match="LTXPipeline or LTXImageToVideoPipeline"):
            video(num_frames=None, height=None, width=None, video_coords=coordinates)
        with pytest.raises(VideoAttentionError, match="72 tokens and the grid 3x6x5"):
            video(width=5)


def test_attention_over_other_tokens_than_the_grids_is_refused() -> None:
    video = tiny_video("wan")

    def fewer(_: Any, args: Any) -> Any:
        return (args[0][:, :60], *args[1:3], tuple(part[:, :60] for part in args[3]))

    with patch(video.transformer, Shuffled(density=0.5, warmup=0.0)):
        video.transformer.blocks[1].attn1.register_forward_pre_hook(fewer)
        with pytest.raises(VideoAttentionError, match="over 60 tokens, where a grid of 3x6x4 makes 72"):
            video()


def test_unpatching_what_is_not_patched_is_told() -> None:
    with pytest.raises(PatchError, match="WanTransformer3DModel is not patched"):
        vlm_budget.unpatch(wan_transformer())
    with pytest.raises(PatchError, match="WanPipeline is not patched"):
        vlm_budget.unpatch(tiny_pipeline("wan").pipe)


def test_a_method_that_can_only_be_dense_on_a_small_grid_says_so() -> None:
    video = tiny_video("wan")
    before = video()
    with patch(video.transformer, "svg1", warmup=0.0) as handle:
        with pytest.warns(UserWarning, match="SVG1 cannot compute less than everything on a grid of 3x6x4"):
            assert torch.equal(video(), before)
        assert any("SVG1" in text for text in handle.report().warnings)


def test_small_wan_models_get_the_safer_preset() -> None:
    with torch.device("meta"):
        small, large = (Wan().preset(wan_transformer(layers=1, heads=heads, size=128)) for heads in (12, 24))
    assert small.density > large.density
    assert small.warmup > large.warmup
    assert small.dense_layers > large.dense_layers


def test_back_ends_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    video = tiny_video("wan")
    with pytest.raises(OptionError, match="backend must be one of auto, tma, fa4, got 'flash'"):
        patch(video.transformer, "svg2", backend="flash")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(MissingExtraError, match="flash-attn-4"):
        patch(video.transformer, "svg2", backend="fa4", cut="fixed")
    installed = ModuleType("flash_attn.cute")
    installed.flash_attn_func = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", installed)
    with pytest.raises(OptionError, match="fixed blocks of 128"):
        patch(video.transformer, "svg2", backend="fa4")
    with pytest.raises(OptionError, match="fixed blocks of 128"):
        patch(video.transformer, "svg2", backend="fa4", cut="fixed", block_size=64)
    patch(video.transformer, "svg2", backend="fa4", cut="fixed").undo()


def test_the_named_back_end_computes_sparse_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    video, used = tiny_video("wan"), []

    def spy(call: Any, blocks: Any, backend: str) -> Any:
        used.append(backend)
        return attend(call, blocks)

    monkeypatch.setattr(control, "attend", spy)
    forward(video, "svg2", backend="tma", warmup=0.0, dense_layers=0.0, density=0.9)
    assert set(used) == {"tma"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"query_sizes": torch.ones(1, 1, 3, dtype=torch.int32)}, "query_sizes of a method must add up"),
        ({"key_order": torch.zeros(1, 1, 1, dtype=torch.int32)}, "key_order of a method must name each"),
    ],
)
def test_blocks_that_are_none_of_the_video_are_told(changed: dict[str, Any], told: str) -> None:
    class Wrong(Shuffled):
        def blocks(self, call: Any) -> Any:
            tokens = call.grid.tokens
            return replace(
                super().blocks(call),
                **{name: one.expand(1, 1, tokens) if one.shape[2] == 1 else one for name, one in changed.items()},
            )

    video = tiny_video("wan")
    with pytest.raises(SelectionError, match=told):
        forward(video, Wrong(density=0.5, warmup=0.0, dense_layers=0.0))
