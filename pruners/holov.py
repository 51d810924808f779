"""HoloV: spread the budget over the picture by attention and variety, then keep what is attended to most.

Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention (HoloV), arXiv 2510.02912,
written from its formulas. The sequence is cut into contiguous chunks; each gets tokens by the mean score of its own,
and keeps its most attended ones.

Where this differs from the released code, and why:

* Counts are exact for every budget. Released: rounded down, one more for the largest, then cut or padded with zeros.
  Here too quotas are rounded down and the largest shares get one more each; what full chunks cannot hold is split over
  the others in proportion to their shares.
* Tokens keep the order of the image; released, they come in the order of attention.
* The number of chunks is a field for all models; the released file for Qwen derives it from the budget.
* Two readings: the variance is that of a token's cosine similarities to all tokens of its chunk, itself included, and
  is scaled such that its mean over the sequence is that of the (scaled) attention, so that alpha compares like with
  like.

Ours, not the paper's: received attention in towers without a class token; partitions share the budget in proportion to
their tokens and are chunked each on its own. Quotas are worked out by the host, which waits for the device once per
image or video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch.nn.functional import normalize

from vlm_budget.allocate import split
from vlm_budget.errors import OptionError
from vlm_budget.ops import segmented_topk
from vlm_budget.pruner import Attention, Context, Pruner, Tower, saliency
from vlm_budget.transfer import moved


@dataclass(frozen=True, kw_only=True)
class HoloV(Pruner):
    """Quotas per chunk by attention and variety, top attention within.

    Attributes:
        chunks: Contiguous chunks a partition is cut into (as many as it has tokens, where it has fewer).
        alpha: Weight of the variance term beside the attention.
    """

    chunks: int = 16
    alpha: float = 0.09

    paper = "arXiv 2510.02912"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.chunks, bool) or not isinstance(self.chunks, int) or self.chunks < 1:
            raise OptionError(f"chunks must be an int of at least 1, got {self.chunks!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real):
            raise OptionError(f"alpha must be a number, got {self.alpha!r}")
        if not 0 <= self.alpha < float("inf"):
            raise OptionError(f"alpha must be at least 0 and finite, got {self.alpha}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Attention at the layer the language model reads."""
        return (saliency(tower, tower.feature_layer),)

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Quotas per chunk of every partition, then the most attended tokens of each chunk."""
        item = ctx.item
        scores = ctx.there(ctx.token_scores(next(iter(ctx.attention))))
        members = [(item.partition == index).nonzero().flatten() for index in range(len(item.partitions))]
        shown = [(t, n) for t, n in zip(members, split(k, item.shown, item.shown), strict=True) if n]
        chunks = [chunk_of(len(tokens), self.chunks) for tokens, _ in shown]
        places = [ctx.there(tokens) for tokens, _ in shown]
        worth = [
            self.worth(scores[place], ctx.features[place], chunk) for place, chunk in zip(places, chunks, strict=True)
        ]
        known = torch.cat(worth).cpu().split([len(chunk) for chunk in chunks])  # here the host waits for the device
        segment = torch.full((item.size,), -1, device="cpu")
        quotas: list[int] = []
        for (tokens, count), chunk, score in zip(shown, chunks, known, strict=True):
            segment[tokens] = chunk + len(quotas)
            quotas += chunk_quotas(count, chunk_means(score, chunk), torch.bincount(chunk).tolist())
        return segmented_topk(scores, segment, quotas)

    def worth(self, attention: torch.Tensor, features: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """[n] float64 score of every token of a partition.

        Args:
            attention: [n].
            features: [n, D].
            chunk: [n] int64 (CPU), ascending chunk of each token.
        """
        scaled = 1e3 * attention.double()
        variance = similarity_variance(features, chunk).double()
        alike = torch.where(variance.mean() > 0, scaled.mean() / variance.mean(), 1.0)
        return scaled + self.alpha * (variance * alike)


def chunk_means(scores: torch.Tensor, chunk: torch.Tensor) -> list[float]:
    """Mean of the scores in every chunk, both on the CPU."""
    sums = torch.zeros(int(chunk[-1]) + 1, dtype=scores.dtype, device="cpu").index_add_(0, chunk, scores)
    means: list[float] = (sums / torch.bincount(chunk)).tolist()
    return means


def chunk_of(tokens: int, chunks: int) -> torch.Tensor:
    """[tokens] int64 chunk of each token; sizes differ by one at most."""
    return torch.arange(tokens, device="cpu") * min(chunks, tokens) // tokens


def similarity_variance(features: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """[n] float32 variance of each token's cosine similarities to the tokens of its chunk, itself included."""
    sizes = torch.bincount(chunk)
    place = torch.arange(len(chunk), device="cpu") - (sizes.cumsum(0) - sizes)[chunk]
    padded = features.new_zeros(len(sizes), int(sizes.max()), features.shape[-1], dtype=torch.float32)
    chunk, place, sizes = (moved(index, features.device) for index in (chunk, place, sizes))
    padded[chunk, place] = normalize(features.float(), dim=-1)
    similarity = padded @ padded.transpose(1, 2)  # padding is similar to nothing: its products are 0
    count = sizes[:, None]
    mean = similarity.sum(-1) / count
    inside = torch.arange(padded.shape[1], device=features.device) < count
    spread = (similarity - mean[..., None]).square().masked_fill(~inside[:, None], 0.0).sum(-1) / count
    return spread[chunk, place]


def chunk_quotas(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Tokens per chunk: the share rounded down, one more for the largest shares, and the rest where there is room.

    Args:
        total: Tokens to give away, at most the sum of ``caps``.
        weights: Score of every chunk.
        caps: Tokens in every chunk.
    """
    whole = sum(weights)
    shares = [weight / whole if whole > 0 else 1 / len(weights) for weight in weights]
    # Scores are float32 sums: what lies a rounding error below a whole number is one.
    quotas = [min(int(share * total + 1e-6), cap) for share, cap in zip(shares, caps, strict=True)]
    for index in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if sum(quotas) < total and quotas[index] < caps[index]:
            quotas[index] += 1
    rest = split(total - sum(quotas), shares, [cap - quota for cap, quota in zip(caps, quotas, strict=True)])
    return [quota + more for quota, more in zip(quotas, rest, strict=True)]
