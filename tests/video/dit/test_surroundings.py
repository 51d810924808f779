"""What runs around a patched transformer: gradients, autocast, earlier handles, the end of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_budget
from tiny_video import BUILDERS, Shuffled, TinyVideo, tiny_video
from vlm_budget.errors import VideoAttentionError
from vlm_budget.video.dit.control import HANDLE
from vlm_budget.video.dit.handle import VideoHandle

NAMES = sorted(BUILDERS)


def method(**options: Any) -> Shuffled:
    return Shuffled(**{"density": 0.5, "warmup": 0.0, "dense_layers": 0.0, **options})


def sparse(video: TinyVideo, **options: Any) -> VideoHandle:
    handle: VideoHandle = vlm_budget.patch(video.transformer, method(**options), force=True)
    return handle


def test_gradients_are_refused_where_sparse_calls_would_cut_them() -> None:
    video = tiny_video("wan")
    with sparse(video) as handle:
        with pytest.raises(VideoAttentionError, match="no gradients"):
            video.transformer(**video.arguments(900.0), return_dict=False)
        with handle.suspended():
            assert video.transformer(**video.arguments(900.0), return_dict=False)[0].requires_grad
        video.transformer.requires_grad_(False)
        video.transformer(**video.arguments(900.0), return_dict=False)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_what_attention_is_given_as_it_does_in_dense_calls(name: str) -> None:
    video = tiny_video(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = video()
        with sparse(video, every=True):
            found = video()
    assert found.dtype == expected.dtype
    scale = expected.float().abs().max()
    assert (found.float() - expected.float()).abs().max() < 0.05 * scale


def test_undoing_what_was_replaced_leaves_the_later_patch_alone() -> None:
    video = tiny_video("wan")
    first = sparse(video)
    second = sparse(video)
    one = video()
    first.undo()
    second.reset()
    assert torch.equal(video(), one)
    assert second.report().sparse_calls == video.layers


def test_nothing_is_kept_behind_the_last_step_nor_for_a_transformer_that_is_done() -> None:
    video = tiny_video("wan")
    with vlm_budget.patch(video.transformer, method(), force=True, timesteps=2):
        kept = vars(video.transformer)[HANDLE]._states
        video(900.0)
        assert len(kept) == video.layers
        video(800.0)
        assert not kept
