"""What every method keeps on every video model, whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_video import BUILDERS, TinyVideo, tiny_video
from vlm_budget.registry import VIDEO_METHODS

CLUSTERS = {"query_clusters": 4, "key_clusters": 9}
SMALL: dict[str, dict[str, Any]] = {
    "block_topk": {"extent": (1, 2, 2)},
    "dense": {},
    "oracle": CLUSTERS,
    "radial": {"block_size": 4},
    "sliding_tile": {"extent": (1, 2, 2)},
    "svg1": {"block_size": 4},
    "svg2": CLUSTERS,
}
"""Blocks that are small enough for the tiny grids; one entry per method."""
DENSITY = 0.7

each = pytest.mark.parametrize(("name", "method"), [(name, method) for name in BUILDERS for method in VIDEO_METHODS])


def sparse(video: TinyVideo, method: str, **options: Any) -> Any:
    given = {**SMALL[method], "warmup": 0.0, "dense_layers": 0.0, "density": DENSITY, **options}
    if method == "dense":
        del given["density"]
    return vlm_budget.patch(video.transformer, method, force=True, **given)


@each
def test_full_density_is_bit_identical_and_undo_is_exact(name: str, method: str) -> None:
    video = tiny_video(name, batch=2)
    before, whole = video(), fingerprint(video.transformer)
    with sparse(video, method, density=1.0):
        assert torch.equal(video(), before)
    with sparse(video, method):
        video()
    assert changes(whole, fingerprint(video.transformer)) == []
    assert torch.equal(video(), before)


@each
def test_a_batch_gives_what_its_samples_give_alone(name: str, method: str) -> None:
    video, alike = tiny_video(name, batch=2), ("num_frames", "height", "width", "rope_interpolation_scale")
    given = video.arguments(900.0)

    def sample(place: int) -> dict[str, Any]:
        return {
            key: value[place : place + 1] if isinstance(value, torch.Tensor) and key not in alike else value
            for key, value in given.items()
            if not (isinstance(value, torch.Tensor) and len(value) != 2)
        }

    with sparse(video, method) as handle:
        together = video()
        for place in range(2):
            handle.reset()
            assert torch.allclose(video(**sample(place)), together[place : place + 1], atol=2e-5)


@each
def test_the_density_is_kept_that_was_promised(name: str, method: str) -> None:
    video = tiny_video(name)
    with sparse(video, method) as handle:
        video()
        report = handle.report()
    if method == "dense":
        assert report.density == 1.0
        return
    assert report.sparse_calls == video.layers
    assert report.promised == DENSITY and 0 < report.density < 1
    assert not any("more than" in told for told in report.warnings)
