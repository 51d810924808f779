"""What holds of every supported video model while it is patched, against dense attention under the same mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_video import BUILDERS, GRID, VARIANTS, Shuffled, TinyVideo, tiny_video
from vlm_budget.video.dit.call import Call, Moment

MODELS = sorted({**BUILDERS, **VARIANTS})
HALVED = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_hidden_states_2",
    "pooled_projections",
    "image_embeds",
    "guidance",
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sparse(video: TinyVideo, method: Any = None, **options: Any) -> Any:
    """A patch without dense steps and layers."""
    method = Shuffled(density=0.5, warmup=0.0, dense_layers=0.0) if method is None else method
    return vlm_budget.patch(video.transformer, method, force=True, **options)


class DenseUnderMask(TorchFunctionMode):
    """Dense attention in which video tokens see what a method computes, by a mask of all pairs."""

    def __init__(self, video: TinyVideo, method: Shuffled, parts: int) -> None:
        super().__init__()
        self.video, self.method, self.parts, self.calls = video, method, parts, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs.update(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            args, length = (), kwargs["key"].shape[2]
            if length == kwargs["query"].shape[2] and length >= GRID.tokens:
                shown = self.pairs(kwargs["query"], length - GRID.tokens)
                given = kwargs.get("attn_mask")
                kwargs["attn_mask"] = shown if given is None else shown & given
        return func(*args, **kwargs)

    def pairs(self, query: torch.Tensor, text: int) -> torch.Tensor:
        """[L, L]: text sees and is seen by everything."""
        first = text if self.video.text_first else 0
        moment = Moment(0, None, self.calls // self.parts, self.video.layers)
        self.calls += 1
        call = Call(query, query, query, GRID, first, None, False, 1.0, moment)
        shown = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool)
        shown[call.video, call.video] = self.method.shown(call)
        return shown


def calls_per_layer(name: str, batch: int) -> int:
    return batch if name == "mochi" else 1


def test_every_registered_model_is_tested() -> None:
    assert sorted(BUILDERS) == vlm_budget.list_video_models()


@pytest.mark.parametrize("name", MODELS)
def test_a_full_density_leaves_the_model_bit_identical(name: str) -> None:
    video = tiny_video(name, batch=2)
    before = video()
    with vlm_budget.patch(video.transformer, "svg2", budget=1.0, force=True, timesteps=2) as handle:
        assert torch.equal(video(), before)
        assert handle.report().sparse_calls == 0
    with vlm_budget.patch(video.transformer, "dense", force=True, timesteps=2):
        assert torch.equal(video(), before)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_warm_up_steps_and_first_layers_are_dense_and_warm_up_is_bit_identical(name: str) -> None:
    video = tiny_video(name)
    before, later = video(900.0), video(700.0)
    method = Shuffled(density=0.5, warmup=0.5, dense_layers=0.34)
    with sparse(video, method, timesteps=4) as handle:
        assert torch.equal(video(900.0), before)
        video(800.0)
        assert not torch.equal(video(700.0), later)
        report = handle.report()
    assert [calls.why for calls in report.dense] == ["warm-up steps", "first layers"]
    assert [row[0] for row in report.densities] == [1.0, 1.0, 1.0]
    assert all(value < 1 for value in report.densities[2][1:])


@pytest.mark.parametrize("name", MODELS)
def test_undo_leaves_nothing_behind(name: str) -> None:
    video = tiny_video(name)
    processors = {part: vars(part)["processor"] for part in video.transformer.modules() if "processor" in vars(part)}
    seen = {part: (type(it), dict(vars(it))) for part, it in processors.items()}
    before, print_before = video(), fingerprint(video.transformer)
    handle = sparse(video)
    assert not torch.equal(video(), before)
    handle.undo()
    handle.undo()
    assert changes(print_before, fingerprint(video.transformer)) == []
    for part, it in processors.items():
        assert vars(part)["processor"] is it
        assert (type(it), vars(it)) == seen[part]
    assert torch.equal(video(), before)
    assert not handle.active


@pytest.mark.parametrize("name", MODELS)
def test_permuted_tokens_keep_their_positions(name: str) -> None:
    """Everything is computed, in another order: RoPE was applied before."""
    video = tiny_video(name, batch=2)
    before = video()
    with sparse(video, Shuffled(density=0.5, warmup=0.0, dense_layers=0.0, every=True)) as handle:
        torch.testing.assert_close(video(), before, **CLOSE)
        assert handle.report().sparse_calls == 3


@pytest.mark.parametrize("name", MODELS)
def test_sparse_attention_equals_dense_attention_under_its_mask_with_padding_text(name: str) -> None:
    video = tiny_video(name, batch=3)
    method = Shuffled(density=0.5, warmup=0.0, dense_layers=0.0)
    before = video()
    with DenseUnderMask(video, method, calls_per_layer(name, 3)) as reference:
        expected = video()
    assert reference.calls == 3 * calls_per_layer(name, 3)
    assert (expected - before).abs().max() > 1e-3
    with sparse(video, method):
        torch.testing.assert_close(video(), expected, **CLOSE)


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_15", "mochi"])
def test_padding_text_says_nothing(name: str) -> None:
    video = tiny_video(name, batch=2)
    arguments = video.arguments(900.0)
    padding = (arguments["encoder_attention_mask"] == 0)[..., None]
    noise = arguments["encoder_hidden_states"] + 5 * padding
    with sparse(video):
        torch.testing.assert_close(video(encoder_hidden_states=noise), video(), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_no_other_attention_is_touched(name: str) -> None:
    """Cross-attention and the refiners of text keep their processors' classes; where one serves all, it is dense."""
    video = tiny_video(name)
    own = {id(vars(part)["processor"]) for part in _self_attentions(name, video)}
    others = [vars(part)["processor"] for part in video.transformer.modules() if "processor" in vars(part)]
    others = [it for it in others if id(it) not in own]
    classes = [type(it) for it in others]
    with sparse(video) as handle:
        video()
        assert [type(it) for it in others] == classes
        assert handle.report().calls == 3
    if name.startswith(("wan", "ltx")):
        assert others
        method = Shuffled(density=0.5, warmup=0.0, dense_layers=0.0)
        with sparse(video, method):
            expected = video()
        video.transformer.set_attn_processor(next(iter(video.transformer.attn_processors.values())))
        with sparse(video, method):
            assert torch.equal(video(), expected)


def _self_attentions(name: str, video: TinyVideo) -> list[Any]:
    from vlm_budget.video.dit.handle import find_transformers

    ((_, known),) = find_transformers(video.transformer).values()
    return known.attentions(video.transformer)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("method", ["shuffled", "svg2"])
def test_a_batch_equals_single_runs(name: str, method: str) -> None:
    def run(batch: int) -> torch.Tensor:
        video = tiny_video(name, batch)
        with sparse(video, _method(method)):
            video(900.0)
            return video(800.0)

    torch.testing.assert_close(run(3)[:1], run(1), **CLOSE)
    torch.testing.assert_close(run(3)[:2], run(2), **CLOSE)


def _method(name: str) -> Any:
    if name == "shuffled":
        return Shuffled(density=0.5, warmup=0.0, dense_layers=0.0)
    from vlm_budget.registry import VIDEO_METHODS

    return VIDEO_METHODS.get("svg2")(density=0.6, warmup=0.0, dense_layers=0.0, query_clusters=4, key_clusters=9)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_branches_of_a_step_do_not_know_each_other(name: str) -> None:
    """Two forwards of one timestep, as guidance makes them, equal two runs of one forward each."""
    video = tiny_video(name)
    other = {"hidden_states": -video.arguments(0.0)["hidden_states"]}

    def steps(forwards: list[dict[str, Any]]) -> list[torch.Tensor]:
        with sparse(video, _method("svg2")):
            return [video(timestep, **changes) for timestep in (900.0, 800.0, 700.0) for changes in forwards]

    alone, beside, both = steps([{}]), steps([other]), steps([{}, other])
    for at in range(3):
        assert torch.equal(both[2 * at], alone[at])
        assert torch.equal(both[2 * at + 1], beside[at])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_new_run_starts_from_nothing(name: str) -> None:
    video = tiny_video(name)
    other = {"hidden_states": video.arguments(0.0)["hidden_states"].flip(1)}

    def run(**changes: Any) -> list[torch.Tensor]:
        return [video(timestep, **changes) for timestep in (900.0, 800.0)]

    with sparse(video, _method("svg2")):
        alone = run()
    with sparse(video, _method("svg2")):
        run(**other)
        again = run()
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_state_is_kept_for_each_layer_branch_and_part(name: str) -> None:
    video = tiny_video(name, batch=2)
    parts = calls_per_layer(name, 2)
    with sparse(video):
        for timestep in (900.0, 800.0):
            video(timestep), video(timestep)
        states = vars(video.transformer)["_vlm_budget_video"]._states
        places = {(layer, branch, part) for layer in range(3) for branch in range(2) for part in range(parts)}
        assert set(states) == places
        assert all(state["calls"] == 2 for state in states.values())


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_two_models_at_once_do_not_know_each_other(name: str) -> None:
    def run(videos: list[TinyVideo]) -> list[torch.Tensor]:
        handles = [sparse(video, _method("svg2")) for video in videos]
        out = [video(timestep) for timestep in (900.0, 800.0) for video in videos]
        for handle in handles:
            handle.undo()
        return out

    one, two = tiny_video(name), tiny_video("wan" if name != "wan" else "ltx")
    alone, other, both = run([one]), run([two]), run([one, two])
    assert all(torch.equal(a, b) for a, b in zip(both[::2], alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(both[1::2], other, strict=True))


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_near(name: str, dtype: torch.dtype) -> None:
    video = tiny_video(name)
    video.transformer.to(dtype)

    def half(timestep: float) -> torch.Tensor:
        given = video.arguments(timestep)
        return video(timestep, **{key: value.to(dtype) for key, value in given.items() if key in HALVED})

    before = half(900.0)
    with sparse(video, Shuffled(density=0.5, warmup=0.0, dense_layers=0.0, every=True)):
        after = half(900.0)
    assert after.dtype == before.dtype
    scale = before.float().abs().max().item()
    assert math.isfinite(scale)
    assert (after.float() - before.float()).abs().max() < 0.05 * scale
