"""A patch through the life of a transformer: copies, files, compilation, other back ends, failures, undoing."""

from __future__ import annotations

import copy
import io
from typing import Any

import diffusers
import pytest
import torch

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_video import BUILDERS, GRID, Shuffled, TinyVideo, tiny_video, wan_transformer
from vlm_budget.video.dit.control import HANDLE
from vlm_budget.video.dit.density import Run, Times, dense_flops, sparse_flops
from vlm_budget.video.dit.handle import VideoHandle
from vlm_budget.video.dit.seam import SparseProcessor

NAMES = sorted(BUILDERS)


def method(**options: Any) -> Shuffled:
    return Shuffled(**{"density": 0.5, "warmup": 0.0, "dense_layers": 0.0, **options})


def sparse(video: TinyVideo, **options: Any) -> VideoHandle:
    handle: VideoHandle = vlm_budget.patch(video.transformer, method(**options), force=True)
    return handle


def twin_of(video: TinyVideo, transformer: Any) -> TinyVideo:
    return TinyVideo(transformer, video.arguments, video.layers)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_patched_by_itself(name: str) -> None:
    video = tiny_video(name)
    before = video()
    handle = sparse(video)
    expected = video()
    twin = twin_of(video, copy.deepcopy(video.transformer))
    assert torch.equal(twin(), expected)
    assert vars(twin.transformer)[HANDLE].transformer is twin.transformer
    handle.undo()
    assert torch.equal(video(), before)
    assert torch.equal(twin(), expected)
    vlm_budget.unpatch(twin.transformer)
    assert torch.equal(twin(), before)
    assert not any(isinstance(vars(part).get("processor"), SparseProcessor) for part in twin.transformer.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_transformer_can_be_saved_and_loaded_whole(name: str) -> None:
    video = tiny_video(name)
    before = video()
    sparse(video)
    expected = video()
    file = io.BytesIO()
    torch.save(video.transformer, file)
    file.seek(0)
    twin = twin_of(video, torch.load(file, weights_only=False))
    assert torch.equal(twin(), expected)
    vlm_budget.unpatch(twin.transformer)
    assert torch.equal(twin(), before)
    assert torch.equal(video(), expected)


def test_what_save_pretrained_writes_is_not_patched(tmp_path: Any) -> None:
    video = tiny_video("wan")
    plain, patched = tmp_path / "plain", tmp_path / "patched"
    video.transformer.save_pretrained(plain)
    with sparse(video):
        video()
        video.transformer.save_pretrained(patched)
    assert (plain / "config.json").read_text() == (patched / "config.json").read_text()
    loaded = diffusers.WanTransformer3DModel.from_pretrained(patched)
    assert loaded.state_dict().keys() == video.transformer.state_dict().keys()
    assert HANDLE not in vars(loaded)


def test_patching_again_replaces_and_undoing_restores_the_unpatched_model() -> None:
    video = tiny_video("wan")
    before, print_before = video(), fingerprint(video.transformer)
    first = sparse(video)
    one = video()
    second = vlm_budget.patch(video.transformer, method(every=True), force=True)
    assert not first.active and second.active
    assert not torch.equal(video(), one)
    first.undo()
    assert second.active
    second.undo()
    assert changes(print_before, fingerprint(video.transformer)) == []
    assert torch.equal(video(), before)


def test_a_patch_that_fails_leaves_the_one_before_in_place() -> None:
    video = tiny_video("wan")
    handle = sparse(video)
    expected = video()
    last = video.transformer.blocks[2].attn1
    good = last.processor

    class Stiff:
        __slots__ = ()

        def __call__(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    last.processor = Stiff()
    with pytest.raises(vlm_budget.PatchError, match="Stiff cannot be extended"):
        vlm_budget.patch(video.transformer, "svg2", timesteps=3, force=True)
    last.processor = good
    handle.undo()
    handle = sparse(video)
    assert torch.equal(video(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_forward_leaves_everything_restorable(name: str) -> None:
    video = tiny_video(name)
    before, print_before = video(), fingerprint(video.transformer)
    handle = sparse(video, fail_at=1)
    inside = fingerprint(video.transformer)
    with pytest.raises(ZeroDivisionError):
        video()
    assert changes(inside, fingerprint(video.transformer)) == []
    assert vars(video.transformer)[HANDLE]._now is None
    handle.undo()
    assert changes(print_before, fingerprint(video.transformer)) == []
    assert torch.equal(video(), before)


def test_a_with_block_undoes_also_after_an_error() -> None:
    video = tiny_video("wan")
    with pytest.raises(ZeroDivisionError), sparse(video, fail_at=0) as handle:
        video()
    assert not handle.active


def test_calls_from_outside_a_forward_are_dense() -> None:
    video = tiny_video("wan")
    attention = video.transformer.blocks[0].attn1
    tokens = torch.randn(1, GRID.tokens, 24)
    before = attention(tokens, None, None, None)
    with sparse(video):
        video()
        assert torch.equal(attention(tokens, None, None, None), before)


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_15", "ltx", "wan"])
def test_a_back_end_is_the_users_in_dense_calls_and_restored_after_sparse_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back end that never calls torch's attention, under the name of one of diffusers'."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    lengths: list[int] = []

    def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **_: Any) -> Any:
        lengths.append(query.shape[1])
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if attn_mask is not None:
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < -1
            logits = logits.masked_fill(hidden, -1e9)
        return (logits.softmax(-1) @ value).transpose(1, 2)

    backend = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, own)
    video = tiny_video(name)
    handle = sparse(video, dense_layers=0.34)
    expected = video()
    processors = [part.processor for part in vars(video.transformer)[HANDLE]._seam._attentions]
    try:
        video.transformer.set_attention_backend(backend.value)
        torch.testing.assert_close(video(), expected, rtol=1e-5, atol=1e-5)
        assert sum(length >= GRID.tokens for length in lengths) == 1 + (name in ("ltx", "wan")) * 3
        assert handle.report().sparse_calls == 4  # of two forwards of one timestep
        assert {it._attention_backend for it in processors} == {backend}
        handle.undo()
        assert {it._attention_backend for it in processors} == {backend}
    finally:  # the process's default, which set_attention_backend changes too
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_fused_projections_before_and_after_patching(name: str) -> None:
    video = tiny_video(name)
    with sparse(video):
        expected = video()
        video.transformer.fuse_qkv_projections()
        torch.testing.assert_close(video(), expected, rtol=1e-5, atol=1e-5)
    with sparse(video):
        torch.testing.assert_close(video(), expected, rtol=1e-5, atol=1e-5)


def test_cogvideox_with_fused_projections_shares_one_processor() -> None:
    video = tiny_video("cogvideox")
    with sparse(video):
        expected = video()
    video.transformer.fuse_qkv_projections()
    assert len({id(block.attn1.processor) for block in video.transformer.transformer_blocks}) == 1
    with sparse(video) as handle:
        torch.testing.assert_close(video(), expected, rtol=1e-5, atol=1e-5)
        assert handle.report().sparse_calls == 3


def test_processors_that_are_replaced_under_the_patch_are_told() -> None:
    video = tiny_video("cogvideox")
    before = video()
    handle = sparse(video)
    video.transformer.fuse_qkv_projections()
    with pytest.raises(vlm_budget.PatchError, match="layer 0 was replaced by FusedCogVideoXAttnProcessor2_0"):
        video()
    handle.undo()
    torch.testing.assert_close(video(), before, rtol=1e-5, atol=1e-5)
    video.transformer.unfuse_qkv_projections()
    assert not any(isinstance(vars(it).get("processor"), SparseProcessor) for it in video.transformer.modules())


def test_context_parallel_transformers_are_refused() -> None:
    video = tiny_video("wan")
    handle = sparse(video)
    processor = video.transformer.blocks[1].attn1.processor
    processor._parallel_config = object()
    with pytest.raises(vlm_budget.PatchError, match="context parallelism"):
        video()
    handle.undo()
    print_before = fingerprint(video.transformer)
    with pytest.raises(vlm_budget.PatchError, match="context parallelism"):
        sparse(video)
    assert changes(print_before, fingerprint(video.transformer)) == []


def test_processors_that_never_call_attention_are_told() -> None:
    class Own(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    video = tiny_video("wan")
    video.transformer.blocks[0].attn1.set_processor(Own())
    with sparse(video), pytest.raises(vlm_budget.PatchError, match="Own computed its attention without calling"):
        video()


@pytest.mark.parametrize("name", ["wan", pytest.param("hunyuan_video", marks=pytest.mark.slow)])
def test_repeated_blocks_can_be_compiled_before_or_after_patching(name: str) -> None:
    video = tiny_video(name)
    with sparse(video):
        expected = [video(900.0), video(800.0)]
    torch._dynamo.reset()
    for first in ("patch", "compile"):
        with sparse(video) as handle:
            if first == "patch":
                video.transformer.compile_repeated_blocks(fullgraph=False, backend="eager")
            torch.testing.assert_close([video(900.0), video(800.0)], expected, rtol=1e-5, atol=1e-5)
            assert handle.report().sparse_calls == 2 * 3
    torch._dynamo.reset()


def test_steps_compile_nothing_anew() -> None:
    video = tiny_video("wan")
    torch._dynamo.reset()
    frames: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        frames.append(graph)
        return graph.forward

    with sparse(video, warmup=0.0):
        video.transformer.compile_repeated_blocks(fullgraph=False, backend=backend)
        video(900.0), video(800.0)
        warm = len(frames)
        for timestep in (700.0, 600.0, 500.0, 400.0):
            video(timestep)
    assert warm and len(frames) == warm
    torch._dynamo.reset()


def test_a_compiled_transformer_is_patched_inside() -> None:
    video = tiny_video("wan")
    with sparse(video):
        expected = video()
    compiled = torch.compile(video.transformer, backend="eager")
    handle = vlm_budget.patch(compiled, method(), force=True)
    torch.testing.assert_close(twin_of(video, compiled)(), expected, rtol=1e-5, atol=1e-5)
    assert handle.report().sparse_calls == 3
    vlm_budget.unpatch(compiled)
    torch._dynamo.reset()


def test_adapters_can_be_added_under_the_patch() -> None:
    from peft import LoraConfig

    video = tiny_video("wan")
    with sparse(video) as handle:
        expected = video()
        video.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        assert torch.equal(video(), expected)  # new adapters begin at zero
        assert handle.report().sparse_calls == 2 * 3


def test_suspended_runs_are_dense_and_not_reported() -> None:
    video = tiny_video("wan")
    before = video()
    with sparse(video) as handle:
        expected = video(900.0), video(800.0)
        report = str(handle.report())
        with handle.suspended():
            assert torch.equal(video(), before)
        assert str(handle.report()) == report
        again = video(900.0), video(800.0)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_reset_begins_a_run() -> None:
    video = tiny_video("wan")
    with sparse(video) as handle:
        video(900.0)
        video(900.0)
        assert handle.report().calls == 6
        handle.reset()
        video(900.0)
        assert handle.report().calls == 3


def test_the_handle_says_what_it_is() -> None:
    transformer = wan_transformer()
    handle = vlm_budget.patch(transformer, "svg2", budget="30%", timesteps=5, query_clusters=8)
    assert repr(handle) == "<VideoHandle SVG2(query_clusters=8) at 30% on WanTransformer3DModel, active>"
    assert handle.model is transformer and str(handle.budget) == "30%"
    with pytest.raises(vlm_budget.PatchError, match="nothing to report"):
        handle.report()
    with pytest.raises(vlm_budget.PatchError, match="compare"):
        handle.report(quality=True)
    handle.undo()
    assert repr(handle).endswith("undone>")
    with pytest.raises(vlm_budget.PatchError, match="was undone"):
        handle.compare(lambda: None)


@pytest.mark.parametrize(("name", "times"), [("wan", 1), ("mochi", 2)])
def test_milliseconds_are_timed_at_the_first_forward_before_any_block_runs(
    name: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a call of the run's shape; Mochi makes one for each sample."""
    video, seen = tiny_video(name, batch=2), []

    def time_calls(call: Any, method: Any, dense: Any) -> Times:
        seen.append((tuple(call.query.shape[:3]), tuple(dense().shape), vars(video.transformer)[HANDLE]._now))
        return Times(dense=10.0, low=(0.2, 2.0), high=(0.8, 8.0))

    monkeypatch.setattr("vlm_budget.video.dit.control.time_calls", time_calls)
    options: dict[str, Any] = {"budget": f"{3 * times * 6} ms", "warmup": 0.0, "dense_layers": 0.0}
    with vlm_budget.patch(video.transformer, "svg2", force=True, timesteps=3, **options) as handle:
        video(900.0), video(800.0)
        assert handle.report().promised == pytest.approx(0.6)
    assert len(seen) == 1
    shape, dense, now = seen[0]
    assert shape == (2 // times, video.transformer.config.num_attention_heads, GRID.tokens + video.text)
    assert dense[:3] == shape and now is None


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_whole_run(name: str) -> None:
    """The density that is solved for costs the share, dense steps and layers, text and clustering counted."""
    video = tiny_video(name)
    lean: dict[str, Any] = {"query_clusters": 2, "key_clusters": 6, "init_iterations": 1, "correction": False}
    options: dict[str, Any] = {"budget": "90% flops", "warmup": 0.25, "dense_layers": 0.34}
    with vlm_budget.patch(video.transformer, "svg2", force=True, timesteps=4, **options, **lean) as handle:
        for timestep in (900.0, 800.0, 700.0, 600.0):
            video(timestep)
        report, used = handle.report(), handle.method
    config = video.transformer.config
    run = Run(GRID, video.text, config.num_attention_heads, config.attention_head_dim, 3, 4, 1, 1)
    assert report.sparse_calls == 3 * 2
    assert report.promised is not None and report.sparse_density is not None
    assert sparse_flops(used, run, report.promised) == pytest.approx(0.9 * dense_flops(run))
    assert report.density < 0.9
