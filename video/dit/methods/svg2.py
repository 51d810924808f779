"""SVG2: tokens that mean alike are put side by side, and blocks chosen by what their means promise.

Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation, arXiv:2505.18875
(NeurIPS 2025), written from the paper's description. Queries and keys of every head are clustered apart, by k-means
after RoPE, warm from step to step; the mass of a pair of clusters is estimated by their centroids, weighted by the
keys' number; and every cluster of queries takes the clusters of keys of the highest mass.

The centroid correction is that of SVG-EAR (arXiv:2603.08982): a dropped cluster still counts as so many keys at its
mean, with its mean value, inside the same softmax.

Where this differs, and why:

* Blocks may be taken by ``density``, the same share of keys for every row, instead of top-p.
* Key clusters larger than a few times the mean are cut into pieces, so that a density can be promised from above.
* First centroids are the same pseudo-random tokens for every sample and head, so that a batch equals single runs; the
  released code draws them anew, with replacement, and takes one sample only.
* Iterations are counted and never tested for convergence, which makes the host wait.
* ``cut="fixed"`` numbers clusters so that neighbours are alike and cuts the tokens into blocks of one size, which run
  faster and mix two clusters where they meet; their means are those of the blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.clusters import Clusters, cluster, first_clusters, pieces
from vlm_budget.video.dit.method import (
    SparseAttention,
    require_count,
    require_one_of,
    require_share,
)
from vlm_budget.video.dit.selection import Rule, all_pairs, estimated, require_blocks, tokens_within
from vlm_budget.video.dit.tiles import Cut, drawn, fixed_blocks, per_grid

FLOOR = 0.1
"""Least share of keys with top-p, as published (there a share of the clusters)."""
LARGEST = 8
"""A block of keys has at most this many times the mean of a cluster."""
SMALLEST, SHORT = 8, 150
"""Tokens of a query cluster, and clusters, in short videos: more clusters cost no pairs, and tiles are not filled there
anyway. On our small model's tokens (1,200, density 0.25) the error fell from 0.17 with 40 to 0.09 with 150."""
MOST_CLUSTERS = 2048
"""Cut into pieces, as many clusters of keys make at most twice as many blocks, of which one row can choose."""


class Remembered(NamedTuple):
    """What a layer keeps from step to step.

    Attributes:
        step: When labels were found.
        tokens: How many were clustered.
        query: Clusters of queries; their order is empty where nothing reuses it.
        key: Clusters of keys, likewise.
    """

    step: int
    tokens: int
    query: Clusters
    key: Clusters


@dataclass(frozen=True, kw_only=True)
class SVG2(SparseAttention):
    """Clusters of queries against clusters of keys.

    Attributes:
        top_p: Take clusters until this share of the estimated mass is reached, in (0, 1], instead of a density.
        floor: With ``top_p``, the least share of keys for every row; a density is the same for all rows anyway. None:
            0.1.
        correction: Dropped blocks count by their mean key and value.
        query_clusters: None: 1.16 times the root of the video's tokens, which is about what is published; in short
            videos more, of 8 tokens and up to 150.
        key_clusters: None: 0.9 times their number to the power of 0.6, likewise.
        init_iterations: k-means iterations of a layer's first sparse step.
        iterations: Those of later steps.
        reuse: Steps for which labels are kept. Means are those of the step's own tokens in any case.
        sample: Share of the tokens that k-means iterates on; all of them get labels.
        cut: ``"clusters"``: blocks are clusters; ``"fixed"``: ``block_size`` tokens each, in the clusters' order.
        block_size: Tokens of a fixed block.
        order: How clusters are put side by side for fixed blocks: ``"chain"`` (the nearest of those left),
            ``"axis"`` (along the direction of the largest spread) or ``"index"`` (as they are).
        seed: Of first centroids and of sampled tokens.
    """

    top_p: float | None = None
    floor: float | None = None
    correction: bool = True
    query_clusters: int | None = None
    key_clusters: int | None = None
    init_iterations: int = 10
    iterations: int = 1
    reuse: int = 2
    sample: float = 1.0
    cut: Literal["clusters", "fixed"] = "clusters"
    block_size: int = 128
    order: Literal["chain", "axis", "index"] = "chain"
    seed: int = 0

    title = "semantic clusters, by their centroids"
    paper = "arXiv 2505.18875"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.top_p is not None:
            require_share("top_p", self.top_p, above_zero=True)
            if self.density is not None:
                raise OptionError(f"give top_p or density, got top_p={self.top_p} and density={self.density}")
        if self.floor is not None:
            require_share("floor", self.floor)
            if self.top_p is None:
                raise OptionError("floor goes with top_p: with a density, every row sees about the same share of keys")
        if not isinstance(self.correction, bool):
            raise OptionError(f"correction must be True or False, got {self.correction!r}")
        for name in ("query_clusters", "key_clusters"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name), most=MOST_CLUSTERS)
        for name in ("init_iterations", "iterations", "reuse", "block_size"):
            require_count(name, getattr(self, name))
        require_count("seed", self.seed, least=0)
        require_share("sample", self.sample, above_zero=True)
        require_one_of("cut", self.cut, ("clusters", "fixed"))
        require_one_of("order", self.order, ("chain", "axis", "index"))

    @property
    def settled(self) -> bool:
        """Whether there is a top-p or a density."""
        return self.density is not None or self.top_p is not None

    def blocks(self, call: Call) -> Blocks:
        """Blocks of this step's clusters, or of those that are reused."""
        grid = call.grid
        rule, largest = self._rule(grid)
        found = self._clusters(call)
        if self.cut == "fixed":
            fixed: Cut = per_grid(fixed_blocks, call.query.device, grid.tokens, self.block_size)
            query, key = fixed._replace(order=found.query.order), fixed._replace(order=found.key.order)
        else:
            sizes = pieces(found.key.sizes, largest, self._key_blocks(grid, largest))
            query, key = Cut(found.query.order, found.query.sizes), Cut(found.key.order, sizes)
        return self.chosen(call, query, key, rule)

    def chosen(self, call: Call, query: Cut, key: Cut, rule: Rule) -> Blocks:
        """The blocks that a rule takes, by the mass that means promise."""
        return all_pairs(query, key) if rule.everything else estimated(call, query, key, rule, self.correction)

    def least_density(self, grid: Grid) -> float:
        """One block of keys, and one column for each block where dropped ones are corrected."""
        if self.cut == "fixed":
            keys = min(self.block_size, grid.tokens) + self._columns(grid, 0)
        else:
            keys = _least_keys(grid.tokens, self._counts(grid)[1], self.correction)
        return min(keys / grid.tokens, 1.0)

    def overhead(self, grid: Grid, width: int, calls: int) -> float:
        """Assignments and means of k-means, means of blocks, and their products."""
        tokens, among = grid.tokens, self._among(grid)
        times = -(-calls // self.reuse)
        if times < 1:
            return 0.0
        iterations = self.init_iterations + (times - 1) * self.iterations
        flops = 0.0
        for clusters in self._counts(grid):
            flops += iterations * among * width * (2 * clusters + 1)
            flops += times * tokens * clusters * width * 2 if among < tokens else 0
        rows, columns = self._counts(grid)[0], self._key_blocks(grid, _bounds(tokens, self._counts(grid)[1])[1])
        if self.cut == "fixed":
            rows = columns
        return flops + calls * width * (tokens * (3 if self.correction else 2) + 2 * rows * columns)

    def _counts(self, grid: Grid) -> tuple[int, int]:
        """Clusters of queries and of keys on a grid.

        Raises:
            OptionError: More than there are tokens.
        """
        tokens = grid.tokens
        query = self.query_clusters or max(round(1.16 * math.sqrt(tokens)), min(-(-tokens // SMALLEST), SHORT))
        key = self.key_clusters or max(1, round(0.9 * tokens**0.6))
        for name, count in (("query_clusters", query), ("key_clusters", key)):
            if count > tokens:
                raise OptionError(f"{name}={count} is more than the {tokens} tokens of a grid of {grid}")
        return min(query, MOST_CLUSTERS), min(key, MOST_CLUSTERS)

    def _rule(self, grid: Grid) -> tuple[Rule, int]:
        """How far blocks are taken on a grid, and the tokens of the largest block of keys."""
        clusters = self._counts(grid)[1]
        largest = _bounds(grid.tokens, clusters)[1]
        if self.top_p is not None:
            return Rule(self.top_p, FLOOR if self.floor is None else self.floor), largest
        density = self.promised(grid)
        if density >= 1:
            return Rule(top_p=1.0), largest
        tokens = tokens_within(density, grid.tokens)
        if self.cut == "clusters":
            largest = _largest(grid.tokens, clusters, tokens, self.correction)
        return Rule(tokens=tokens - self._columns(grid, largest)), largest

    def _key_blocks(self, grid: Grid, largest: int) -> int:
        if self.cut == "fixed":
            count = -(-grid.tokens // self.block_size)
        else:
            count = _blocks(grid.tokens, self._counts(grid)[1], largest)
        require_blocks(count)
        return count

    def _columns(self, grid: Grid, largest: int) -> int:
        return self._key_blocks(grid, largest) if self.correction else 0

    def _among(self, grid: Grid) -> int:
        """Tokens that k-means iterates on: enough for one of every cluster."""
        return min(grid.tokens, max(math.ceil(self.sample * grid.tokens), *self._counts(grid)))

    def _clusters(self, call: Call) -> Remembered:
        """Clusters of an earlier step while they are to be reused, else of this one, started from the last."""
        last: Remembered | None = call.state.get("svg2")
        tokens, step = call.grid.tokens, call.moment.step
        if last is not None and (last.tokens, *last.query.centroids.shape[:2]) != (tokens, *call.query.shape[:2]):
            last = None
        if last is not None and self.reuse > 1 and 0 <= step - last.step < self.reuse:
            if step - last.step == self.reuse - 1:  # for the last time
                call.state["svg2"] = Remembered(step - self.reuse, tokens, *map(_warm, (last.query, last.key)))
            return last
        among = self._among(call.grid)
        starts: torch.Tensor = per_grid(drawn, call.query.device, tokens, among, self.seed)
        subset = starts if among < tokens else None
        counts, before = self._counts(call.grid), (None, None) if last is None else (last.query, last.key)
        found = [
            self._clustered(points, starts[:count], clusters, subset)
            for points, count, clusters in zip((call.queries, call.keys), counts, before, strict=True)
        ]
        now = Remembered(step, tokens, *found)
        # Two orders of 75,600 tokens and 40 heads are 24 MB a layer and branch: kept only for who reuses them.
        call.state["svg2"] = now if self.reuse > 1 else Remembered(step, tokens, *map(_warm, found))
        return now

    def _clustered(
        self, points: torch.Tensor, starts: torch.Tensor, before: Clusters | None, subset: torch.Tensor | None
    ) -> Clusters:
        if before is not None:
            return cluster(points, before.centroids, self.iterations, subset)
        order = self.order if self.cut == "fixed" else "index"
        return first_clusters(points, starts, self.init_iterations, order, subset)


def _warm(clusters: Clusters) -> Clusters:
    """What the next step's k-means begins with, and nothing else."""
    return clusters._replace(order=clusters.order[..., :0].clone())


def _blocks(tokens: int, clusters: int, largest: int) -> int:
    """Room for all clusters cut into pieces."""
    return min(clusters + tokens // largest, tokens)


def _bounds(tokens: int, clusters: int) -> tuple[int, int]:
    """Tokens of the largest block of keys: at least, and at most."""
    mean = -(-tokens // clusters)
    return mean, min(LARGEST * mean, tokens)


@lru_cache(maxsize=256)
def _least_keys(tokens: int, clusters: int, correction: bool) -> int:
    """Keys of a row that takes one block, for the best size of blocks."""
    low, high = _bounds(tokens, clusters)
    return min(size + correction * _blocks(tokens, clusters, size) for size in range(low, high + 1))


@lru_cache(maxsize=256)
def _largest(tokens: int, clusters: int, keys: int, correction: bool) -> int:
    """The largest block of keys of which a row can take one."""
    low, high = _bounds(tokens, clusters)
    fitting = (size for size in range(high, low - 1, -1) if size + correction * _blocks(tokens, clusters, size) <= keys)
    return next(fitting)
