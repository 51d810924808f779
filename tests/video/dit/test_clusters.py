"""k-means finds planted clusters, keeps warm, and puts alike clusters side by side."""

from __future__ import annotations

import pytest
import torch

from video_calls import block_of, planted
from vlm_budget.video.dit.clusters import (
    arranged,
    axis,
    chain,
    cluster,
    first_clusters,
    labels_of,
    pieces,
)


def same_partition(labels: torch.Tensor, groups: torch.Tensor) -> bool:
    """Whether two labellings [N] say the same but for the names of the groups."""
    pairs = torch.stack([labels.long(), groups.long()], 1).unique(dim=0)
    return len(pairs) == len(labels.unique()) == len(groups.unique())


@pytest.mark.parametrize("sample", [1.0, 0.4], ids=["all tokens", "a sample"])
@pytest.mark.parametrize("order", ["index", "chain", "axis"])
def test_planted_clusters_are_recovered(order: str, sample: float) -> None:
    call, group = planted(groups=6)
    tokens = call.grid.tokens
    generator = torch.Generator().manual_seed(1)
    starts = torch.stack([(group[0] == wanted).nonzero()[0, 0] for wanted in range(6)])
    subset = None if sample == 1 else torch.randperm(tokens, generator=generator)[: int(sample * tokens)]
    found = first_clusters(call.keys[:, :1], starts, 3, order, subset)
    labels = block_of(found.order, found.sizes, tokens)
    assert same_partition(labels[0, 0], group[0])
    again = cluster(call.keys[:, :1], found.centroids, 1, subset)
    assert torch.equal(again.order, found.order) and torch.equal(again.sizes, found.sizes)


def test_centroids_are_the_means_of_their_clusters_and_empty_ones_stay() -> None:
    points = torch.randn(2, 2, 111, 8)
    far = torch.full((2, 2, 1, 8), 99.0)
    found = cluster(points, torch.cat([points[:, :, :7], far], 2), 2)
    labels = block_of(found.order, found.sizes, 111)
    for b in range(2):
        for h in range(2):
            for place in range(7):
                assert torch.allclose(
                    found.centroids[b, h, place], points[b, h, labels[b, h] == place].mean(0), atol=1e-5
                )
    assert (found.sizes[..., 7] == 0).all() and torch.equal(found.centroids[:, :, 7:], far)


def test_iterations_never_make_clusters_wider() -> None:
    points = torch.randn(1, 2, 200, 8)

    def spread(iterations: int) -> float:
        found = first_clusters(points, torch.arange(9), iterations)
        labels = block_of(found.order, found.sizes, 200)
        own = found.centroids.gather(2, labels[..., None].expand(points.shape))
        return float((points - own).square().sum())

    widths = [spread(iterations) for iterations in (1, 2, 4, 8)]
    assert widths == sorted(widths, reverse=True) and widths[3] < widths[0]


def test_a_sample_of_a_batch_is_clustered_as_it_is_alone() -> None:
    points = torch.randn(3, 2, 100, 8)
    starts = torch.randperm(100)[:8]
    together = first_clusters(points, starts, 4)
    for sample in range(3):
        alone = first_clusters(points[sample : sample + 1], starts, 4)
        assert torch.equal(alone.order[0], together.order[sample])


def test_a_chain_goes_on_to_the_nearest_that_is_left() -> None:
    points = torch.randn(2, 3, 15, 4)
    ranked = chain(points)
    for b in range(2):
        for h in range(3):
            own, order = points[b, h], ranked[b, h].tolist()
            assert sorted(order) == list(range(15))
            assert order[0] == int((own - own.mean(0)).norm(dim=-1).argmax())
            for place in range(14):
                left = order[place + 1 :]
                away = (own[left] - own[order[place]]).norm(dim=-1)
                assert int(away.argmin()) == 0


def test_an_axis_orders_points_of_a_line_and_a_chain_does_too() -> None:
    place = torch.randperm(20).float()
    points = (place[:, None] * torch.tensor([0.5, -1.0, 2.0]) + 3)[None, None]
    for rank in (axis(points), chain(points)):
        along = place[rank[0, 0]]
        assert torch.equal(along, along.sort(descending=bool(along[0] > along[1])).values)


def test_arranging_puts_alike_centroids_side_by_side() -> None:
    points = torch.randn(1, 2, 60, 4)

    def apart(order: str) -> float:
        return float(arranged(points, order).diff(dim=2).norm(dim=-1).mean())

    assert apart("chain") < 0.75 * apart("index") and apart("axis") < 0.95 * apart("index")
    assert torch.equal(arranged(points, "index"), points)


@pytest.mark.parametrize("largest", [1, 3, 10, 1000])
def test_pieces_are_even_and_no_larger_than_asked(largest: int) -> None:
    sizes = torch.tensor([[[0, 7, 25, 1, 0, 10], [43, 0, 0, 0, 0, 0]]], dtype=torch.int32)
    slots = 6 + 43 // largest
    cut = pieces(sizes, largest, slots)
    assert cut.dtype == torch.int32 and cut.shape == (1, 2, slots) and int(cut.max()) <= largest
    for head in range(2):
        want = []
        for size in sizes[0, head].tolist():
            parts = -(-size // largest)
            want += [(at + 1) * size // parts - at * size // parts for at in range(parts)]
        assert cut[0, head].tolist() == want + [0] * (slots - len(want))


def test_labels_of_an_order_and_sizes() -> None:
    order = torch.stack([torch.randperm(20) for _ in range(6)]).view(2, 3, 20).int()
    sizes = torch.tensor([4, 0, 9, 7], dtype=torch.int32)[None, None]
    assert torch.equal(labels_of(order, sizes), block_of(order, sizes, 20))
