"""Assigners: a grid becomes any number of tokens, as torch would where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate

from vlm_budget.pruners.assigners import ASSIGNERS, bands, merged, places, resampled
from vlm_budget.pruners.pool import cells_of

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def as_image(features: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    return features.T.reshape(1, -1, rows, cols)


@pytest.mark.parametrize(
    ("how", "torchs"),
    [
        ("bilinear", lambda image, size: interpolate(image, size, mode="bilinear", align_corners=False)),
        ("average", adaptive_avg_pool2d),
    ],
)
@pytest.mark.parametrize(
    ("rows", "cols", "count", "size"),
    [
        (27, 27, 196, (14, 14)),  # LLaVA-OneVision's own pooling
        (27, 27, 81, (9, 9)),
        (24, 24, 25, (5, 5)),
        (16, 24, 96, (8, 12)),
        (8, 20, 40, (4, 10)),
        (5, 3, 15, (5, 3)),
        (7, 7, 1, (1, 1)),
        (1, 9, 4, (1, 4)),
        (9, 1, 4, (4, 1)),
    ],
)
def test_products_are_resampled_as_torch_does(
    how: Any, torchs: Callable[..., torch.Tensor], rows: int, cols: int, count: int, size: tuple[int, int]
) -> None:
    features = torch.randn(rows * cols, 5, generator=torch.Generator().manual_seed(0))
    want = torchs(as_image(features, rows, cols), size)[0].flatten(1).T
    torch.testing.assert_close(resampled(features, rows, cols, count, how), want)


@given(grids, st.data())
def test_cells_are_near_squares_in_exact_number(grid: tuple[int, int], data: st.DataObject) -> None:
    rows, cols = grid
    count = data.draw(st.integers(1, rows * cols))
    cut = bands(rows, cols, count)
    assert sum(cut) == count and len(cut) <= rows
    assert min(cut) >= 1 and max(cut) <= cols and max(cut) - min(cut) <= 1
    found = places(rows, cols, count)
    assert found.shape == (count,) and (found[1:] > found[:-1]).all() and found[0] >= 0 and found[-1] < rows * cols
    pooled = cells_of(torch.arange(rows * cols), cols, count).reshape(rows, cols)
    assert len(cut) == len({tuple(line) for line in pooled.tolist()}), "as many bands as pooling makes"


@given(grids, st.data())
def test_tokens_are_sampled_at_the_centres_and_averaged_over_the_cells(
    grid: tuple[int, int], data: st.DataObject
) -> None:
    """Shown on features that say where they stand."""
    rows, cols = grid
    count = data.draw(st.integers(1, rows * cols))
    where = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()
    cut = bands(rows, cols, count)

    def centre(index: int, parts: int, length: int) -> float:
        return max((index + 0.5) / parts * length - 0.5, 0.0)

    def middle(index: int, parts: int, length: int) -> float:
        touched = [at for at in range(length) if at < (index + 1) * length / parts and at + 1 > index * length / parts]
        return sum(touched) / len(touched)

    for how, place in (("bilinear", centre), ("average", middle)):
        want = [
            [place(band, len(cut), rows), place(cell, cells, cols)]
            for band, cells in enumerate(cut)
            for cell in range(cells)
        ]
        torch.testing.assert_close(resampled(where, rows, cols, count, how), torch.tensor(want))  # type: ignore[arg-type]
    strided = resampled(where, rows, cols, count, "stride")
    nearest = (
        strided
        - torch.tensor([[centre(b, len(cut), rows), centre(c, n, cols)] for b, n in enumerate(cut) for c in range(n)])
    ).abs()
    assert nearest.max() <= 0.5


def merged_by_hand(features: torch.Tensor, count: int) -> tuple[list[torch.Tensor], list[int]]:
    """Matching by loops, and running means weighted by size."""
    tokens, sizes, names = list(features), [1] * len(features), list(range(len(features)))
    while len(tokens) > count:
        pairs = []
        for even in range(0, len(tokens), 2):
            close = [float(cosine_similarity(tokens[even], tokens[odd], 0)) for odd in range(1, len(tokens), 2)]
            best = max(range(len(close)), key=close.__getitem__)
            pairs.append((-close[best], even, 2 * best + 1))
        gone = sorted(pairs)[: min(len(tokens) - count, len(tokens) // 2)]
        heavy = [token * size for token, size in zip(tokens, sizes, strict=True)]
        for _, even, odd in gone:
            heavy[odd], sizes[odd] = heavy[odd] + heavy[even], sizes[odd] + sizes[even]
        left = [index for index in range(len(tokens)) if index not in {even for _, even, _ in gone}]
        tokens, names = [heavy[index] / sizes[index] for index in left], [names[index] for index in left]
        sizes = [sizes[index] for index in left]
    return tokens, names


@pytest.mark.parametrize(("length", "count"), [(24, 23), (24, 12), (24, 11), (25, 12), (25, 5), (9, 1), (2, 1), (6, 6)])
def test_merging_is_the_matching_of_tome_in_exact_number(length: int, count: int) -> None:
    features = torch.randn(length, 6, generator=torch.Generator().manual_seed(length + count))
    values, kept = merged(features, count)
    tokens, names = merged_by_hand(features, count)
    assert kept.tolist() == names and len(names) == count
    torch.testing.assert_close(values, torch.stack(tokens))


def test_a_mean_over_all_is_a_mean_over_all() -> None:
    features = torch.randn(35, 3)
    for how in ("average", "merge"):
        torch.testing.assert_close(resampled(features, 5, 7, 1, how), features.mean(0, keepdim=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ASSIGNERS)
def test_gradients_reach_the_features_and_the_dtype_stays(how: Any) -> None:
    features = torch.randn(20, 3, requires_grad=True)
    resampled(features, 4, 5, 7, how).square().sum().backward()
    assert features.grad is not None and (features.grad != 0).any()
    assert resampled(features.bfloat16(), 4, 5, 7, how).dtype == torch.bfloat16
