"""Self-attention of released video models: its shapes, inputs with structure to find, and exact rows to judge by.

Everything is made on the device from a fixed seed. Inputs have planted clusters of uneven size: keys and values of a
cluster lie close together, and every cluster of queries looks at a few clusters of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlm_budget.video.dit.call import Blocks, Call, Grid

TILE = 128
"""Rows of a fixed block."""
SPREAD = 0.7
"""Standard deviation of the logarithm of a cluster's size."""
NEAR = 0.8
"""Share of a token's variance that is its cluster's centre."""
GAIN = 1.5
"""Norm of a query over that of a key."""
ROWS = 48
"""Rows of a result that are judged."""

Kind = Literal["random", "clustered"]


@dataclass(frozen=True)
class Shape:
    """One call of self-attention.

    Attributes:
        name: In words.
        grid: The video's tokens.
        text: Tokens of text behind them, all valid.
        heads: Of queries, keys and values alike.
        head_dim: Width of one.
        clusters: Of queries and of keys, as SVG2 has them for this model.
        warmup: Share of a run's steps that stay dense with this model.
    """

    name: str
    grid: Grid
    text: int
    heads: int
    head_dim: int
    clusters: tuple[int, int]
    warmup: float

    @property
    def tokens(self) -> int:
        """Of the video."""
        return self.grid.tokens

    @property
    def length(self) -> int:
        """Tokens of video and text."""
        return self.tokens + self.text

    @property
    def flops(self) -> int:
        """Of dense attention of one sample."""
        return 4 * self.heads * self.length**2 * self.head_dim

    @property
    def scale(self) -> float:
        """Factor on logits."""
        return float(self.head_dim**-0.5)


HUNYUAN = Shape("HunyuanVideo 720p", Grid(33, 45, 80), 256, 24, 128, (400, 1000), 0.1)
WAN = Shape("Wan-14B 720p", Grid(21, 45, 80), 0, 40, 128, (300, 1000), 0.2)
SHAPES = {
    "real": (HUNYUAN, WAN),
    "tiny": (
        Shape("HunyuanVideo, a toy", Grid(3, 12, 9), 7, 2, 16, (6, 16), 0.1),
        Shape("Wan, a toy", Grid(3, 10, 9), 0, 2, 16, (5, 12), 0.2),
    ),
}

# --- inputs ----------------------------------------------------------------------------------------------------------


def planted(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [1, H, L, D] with clusters to find; text is noise.

    Args:
        shape: Which.
        device: Where to.
        dtype: Of the result.
        seed: Of everything.
    """
    draw = torch.Generator(device).manual_seed(seed)
    heads, width, groups = shape.heads, shape.head_dim, max(2, shape.tokens // 150)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(heads, *size, width, generator=draw, device=device)

    def members() -> torch.Tensor:
        weights = torch.randn(heads, groups, generator=draw, device=device).mul_(SPREAD).exp_()
        return torch.multinomial(weights, shape.tokens, replacement=True, generator=draw)

    def near(centres: torch.Tensor, group: torch.Tensor, share: float) -> torch.Tensor:
        made = centres.gather(1, group[:, :, None].expand(-1, -1, width)).mul_(share**0.5)
        made.add_(normal(shape.tokens), alpha=(1 - share) ** 0.5)
        return torch.cat([made, normal(shape.text)], 1)[None].to(dtype)

    centres, sought = normal(groups), max(1, groups // 64)
    seen = torch.randint(groups, (heads, groups * sought), generator=draw, device=device)
    wanted = centres.gather(1, seen[:, :, None].expand(-1, -1, width)).unflatten(1, (groups, sought)).sum(2)
    query = near(wanted.mul_(GAIN * sought**-0.5), members(), NEAR)
    own = members()
    return query, near(centres, own, NEAR), near(normal(groups), own, 0.5)


@dataclass(frozen=True)
class Cut:
    """Blocks of tokens that follow each other, text as the last one, and the pairs that are computed.

    Attributes:
        query_sizes: [1, H or 1, Cq] int32.
        key_sizes: [1, H or 1, Ck] int32.
        kept: [1, H, Cq, Ck] bool.
        video: Key blocks of the video; the first ones.
        tile: Size of every block of the video but the last, where all are alike.
    """

    query_sizes: torch.Tensor
    key_sizes: torch.Tensor
    kept: torch.Tensor
    video: int
    tile: int | None

    def pairs(self, corrected: bool) -> float:
        """Share of all pairs that is computed; a correction costs every row of the video a column per block."""
        rows, columns = self.query_sizes.double(), self.key_sizes.double()
        length = float(columns[0, 0].sum())
        computed = float((rows * (self.kept.double() @ columns[..., None])[..., 0]).sum(-1).mean())
        text = float(columns[0, 0, self.video :].sum())
        return (computed + corrected * self.video * (length - text)) / length**2


def cut(shape: Shape, kind: Kind, tile: int | None, density: float, device: torch.device, seed: int = 0) -> Cut:
    """Blocks of uneven sizes or of one size, and a map of so many pairs of the video; text sees and is seen by all.

    Args:
        shape: Of the call.
        kind: ``random``: every pair of blocks as likely as any. ``clustered``: neighbouring blocks of queries keep
            neighbouring blocks of keys, and all keep a few: what maps look like where clusters are ordered.
        tile: Size of a block; None: uneven, as many as the shape has clusters.
        density: Share of the video's keys that a row keeps at most, its first block in any case.
        device: Where to.
        seed: Of sizes and map.
    """
    draw = torch.Generator(device).manual_seed(seed)
    rows, columns = (_sizes(shape, count, tile, draw) for count in shape.clusters)
    size = (shape.heads, rows.shape[1], columns.shape[1])
    if kind == "random":
        liked = torch.rand(size, generator=draw, device=device)
    else:
        places = [torch.linspace(0, 1, count, device=device) for count in size[1:]]
        liked = -(places[0][:, None] - places[1]).abs() + torch.randn(size, generator=draw, device=device) * 0.1
        liked = liked + torch.randn(shape.heads, 1, size[2], generator=draw, device=device) * 0.2
    order = liked.argsort(-1, descending=True)
    held = columns[:, None].expand(size).gather(-1, order).cumsum(-1) <= density * shape.tokens
    held[..., 0] = True
    kept = torch.zeros(size, dtype=torch.bool, device=device).scatter_(-1, order, held)
    if shape.text:
        rows, columns = (torch.nn.functional.pad(sizes, (0, 1), value=shape.text) for sizes in (rows, columns))
        kept = torch.nn.functional.pad(kept, (0, 1, 0, 1), value=True)
    return Cut(rows[None], columns[None], kept[None], size[2], tile)


def _sizes(shape: Shape, count: int, tile: int | None, draw: torch.Generator) -> torch.Tensor:
    """[H or 1, C] int32 that add up to the tokens of the video."""
    if tile is not None:
        full, rest = divmod(shape.tokens, tile)
        return torch.tensor([[tile] * full + [rest] * bool(rest)], dtype=torch.int32, device=draw.device)
    weights = torch.randn(shape.heads, count, generator=draw, device=draw.device).mul_(SPREAD).exp_().double()
    sizes = (weights / weights.sum(-1, keepdim=True) * shape.tokens).floor().int()
    left = shape.tokens - sizes.sum(-1, keepdim=True)  # below the number of blocks, since each lost less than one
    return sizes + (torch.arange(count, device=draw.device) < left).int()


# --- exact rows ------------------------------------------------------------------------------------------------------


def sampled(length: int, device: torch.device, rows: int = ROWS) -> torch.Tensor:
    """Rows over the whole length, the first and the last among them."""
    return torch.linspace(0, length - 1, min(rows, length), dtype=torch.float64, device=device).round().long()


def membership(sizes: torch.Tensor, length: int) -> torch.Tensor:
    """[H, L] the block at each place, of [H, C] sizes; C behind the last."""
    places = torch.arange(length, device=sizes.device).expand(len(sizes), length).contiguous()
    return torch.searchsorted(sizes.long().cumsum(-1), places, right=True)


def exact_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    allowed: torch.Tensor | None = None,
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[H, R, D] output and [H, R] log-sum-exp of some rows of the first sample, in float32.

    Args:
        query: [1, H, L, D].
        key: [1, H, L, D].
        value: [1, H, L, D].
        rows: [R] which.
        scale: Factor on logits.
        allowed: [H, R, L] bool, the pairs that count; all by default.
        means: Keys [H, C, D] and values [H, C, D] that stand for dropped blocks, and [H, R, C] how many keys each
            stands for: 0 where it does not.
    """
    logits = query[0, :, rows].float() @ key[0].float().transpose(1, 2) * scale
    if allowed is not None:
        logits.masked_fill_(~allowed, -torch.inf)
    values = value[0].float()
    if means is not None:
        keys, more, counts = means
        columns = query[0, :, rows].float() @ keys.float().transpose(1, 2) * scale + counts.log()
        logits, values = torch.cat([logits, columns], -1), torch.cat([values, more.float()], 1)
    total = logits.logsumexp(-1)
    return (logits - total[..., None]).exp_() @ values, total


def cut_rows(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    blocks: Cut,
    means: tuple[torch.Tensor, torch.Tensor] | None,
    rows: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What block-sparse attention must give for some rows; ``means`` are [1, H, C, D] mean keys and values, if any."""
    heads, length = tensors[0].shape[1:3]
    row, column = (membership(sizes[0].expand(heads, -1), length) for sizes in (blocks.query_sizes, blocks.key_sizes))
    kept = blocks.kept[0].gather(1, row[:, rows, None].expand(-1, -1, blocks.kept.shape[-1]))
    allowed = kept.gather(2, column[:, None].expand(-1, len(rows), -1))
    return exact_rows(*tensors, rows, scale, allowed, _standing(kept, blocks.key_sizes[0], means, blocks.video))


def attended_rows(call: Call, blocks: Blocks, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a sparse call must give for some rows, of a call whose video comes first and whose text is all valid."""
    heads, tokens = call.query.shape[1], call.grid.tokens
    video = rows[rows < tokens]
    row, column = (
        _labels(sizes, order, heads, tokens)
        for sizes, order in ((blocks.query_sizes, blocks.query_order), (blocks.key_sizes, blocks.key_order))
    )
    kept = blocks.kept[0].expand(heads, -1, -1)
    kept = kept.gather(1, row[:, video, None].expand(-1, -1, kept.shape[-1]))
    allowed = torch.ones(heads, len(rows), call.query.shape[2], dtype=torch.bool, device=rows.device)
    allowed[:, : len(video), :tokens] = kept.gather(2, column[:, None].expand(-1, len(video), -1))
    means = None if blocks.mean_keys is None or blocks.mean_values is None else (blocks.mean_keys, blocks.mean_values)
    standing = _standing(kept, blocks.key_sizes[0], means, blocks.key_sizes.shape[-1])
    if standing is not None:
        counts = torch.nn.functional.pad(standing[2], (0, 0, 0, len(rows) - len(video)))  # text sees all that there is
        standing = (*standing[:2], counts)
    return exact_rows(call.query, call.key, call.value, rows, call.scale, allowed, standing)


def _labels(sizes: torch.Tensor, order: torch.Tensor | None, heads: int, tokens: int) -> torch.Tensor:
    """[H, N] the block of each token of the first sample."""
    block = membership(sizes[0].expand(heads, -1), tokens)
    if order is None:
        return block
    return torch.empty_like(block).scatter_(1, order[0].expand(heads, -1).long(), block)


def _standing(
    kept: torch.Tensor, sizes: torch.Tensor, means: tuple[torch.Tensor, torch.Tensor] | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Mean keys, mean values, and how many keys each stands for in each of the rows [H, R, C]."""
    if means is None:
        return None
    keys, values = (mean[0, :, :count].expand(kept.shape[0], -1, -1) for mean in means)
    return keys, values, (sizes[:, None, :count] * ~kept[..., :count]).float()
