"""Token Transforming: a many-to-many merge behind any selector, Y = W X.

Token Transforming (arXiv 2506.05709) writes every token reduction as a matrix: pruning has one-hot rows, merging has
averaging rows that share no column, and the proposal lets a token feed several outputs. The paper's abstract fixes no
more than that, and its repository holds no code. So the matrix here is ours: softmax over the cosine similarity of the
keys of the anchors (the tokens the selector keeps) and of all tokens, with a temperature, optionally sparse rows and a
weight on the anchor itself. :func:`transform_matrix` serves plain vision transformers too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch.nn.functional import normalize, one_hot

from vlm_budget.errors import OptionError, PatchError
from vlm_budget.ops import assign, assigned_merge, nearest, softmax_merge, weighted_merge
from vlm_budget.pruner import Attention, Context, Merge, Tower


def transform_matrix(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    *,
    temperature: float = 0.1,
    top: int | None = 16,
    self_weight: float = 0.0,
    exclusive: bool = False,
) -> torch.Tensor:
    """The matrix W that turns N tokens into M.

    ``W = w * onehot(anchor) + (1 - w) * softmax(cos(anchor keys, keys) / temperature)``. A temperature towards 0, or
    ``self_weight=1``, is pruning (but for tokens whose keys equal an anchor's).

    Args:
        keys: [..., N, C], one key per token.
        anchors: [..., M] int64, distinct positions of the anchors among the tokens.
        temperature: Above 0; the smaller, the more an anchor keeps to itself and its likes.
        top: Each anchor takes from so many most similar tokens only (more where similarities tie), itself one of them;
            None for all.
        self_weight: w in [0, 1].
        exclusive: Classic merging instead of the softmax: every token goes to its most similar anchor alone (anchors to
            themselves), and an anchor takes the mean of its own. ``temperature`` and ``top`` are not used.

    Returns:
        [..., M, N] float32; rows sum to 1.
    """
    unit = normalize(keys.float(), dim=-1)
    of_anchors = unit.gather(-2, anchors[..., None].expand(*anchors.shape, unit.shape[-1]))
    similarity = of_anchors @ unit.transpose(-1, -2)
    own = torch.zeros_like(similarity).scatter_(-1, anchors[..., None], 1.0)
    if exclusive:
        similarity = similarity.masked_fill(own.amax(-2, keepdim=True) > 0, -torch.inf).masked_fill(own > 0, torch.inf)
        members = one_hot(similarity.argmax(-2), anchors.shape[-1]).transpose(-1, -2).to(unit.dtype)
        weights = members / members.sum(-1, keepdim=True)
    else:
        if top is not None and top < keys.shape[-2]:
            least = similarity.topk(top, -1).values[..., -1:]
            similarity = similarity.masked_fill((similarity < least) & (own == 0), -torch.inf)
        weights = (similarity / temperature).softmax(-1)
    return self_weight * own + (1 - self_weight) * weights


def project_mix(ctx: Context, mix: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Embeddings of mixtures of an item's tokens, mixed before the projector, which is not linear.

    Args:
        ctx: The item.
        mix: Makes [k, C] mixtures of the [n, C] inputs of the projector, in their dtype and on their device, as the
            operations of :mod:`vlm_budget.ops` do.

    Returns:
        [k, D] in the dtype, and on the device, of the features.

    Raises:
        PatchError: The context does not hold the projector's inputs.
    """
    if ctx.hidden is None:
        raise PatchError("merging needs the inputs of the projector (Context.hidden), and this context has none")
    return ctx.project(mix(ctx.hidden)).to(ctx.features)


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(Merge):
    """Every kept token becomes a mixture of the item's tokens, by the similarity of keys.

    Attributes:
        temperature: Softmax temperature on cosine similarities.
        top: Tokens a kept token may take from; None for all.
        self_weight: Weight in [0, 1] of the kept token itself, beside its share of the softmax.
        exclusive: Every token feeds only its most similar kept token, and those average (classic merging).
        layer: Vision layer (0-based) of the keys; default the layer the language model reads.
    """

    temperature: float = 0.1
    top: int | None = 16
    self_weight: float = 0.0
    exclusive: bool = False
    layer: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("temperature", "self_weight"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), Real):
                raise OptionError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("top", "layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise OptionError(f"{name} must be an int or None, got {value!r}")
        if not 1e-6 <= self.temperature < float("inf"):  # below, logits overflow
            raise OptionError(f"temperature must be at least 1e-6 and finite, got {self.temperature}")
        if self.top is not None and self.top < 1:
            raise OptionError(f"top must be at least 1, or None for all tokens, got {self.top}")
        if not 0 <= self.self_weight <= 1:
            raise OptionError(f"self_weight must lie in [0, 1], got {self.self_weight}")
        if not isinstance(self.exclusive, bool):
            raise OptionError(f"exclusive must be True or False, got {self.exclusive!r}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """The keys."""
        return (Attention(tower.feature_layer if self.layer is None else self.layer, "keys"),)

    def merge(self, ctx: Context, keep: torch.Tensor) -> torch.Tensor:
        """Mix over all the item's candidates: partitions of an any-resolution image share one matrix."""
        need = [need for need in ctx.attention if need.kind == "keys"][-1]  # the stage's own come behind the method's
        keys, among = ctx.there(ctx.in_token_order(need)), ctx.candidates
        if self.exclusive:
            return project_mix(ctx, lambda hidden: self._averages(hidden, keys, keep, among))
        if self.top is None or self.top >= len(among):
            return project_mix(
                ctx,
                lambda hidden: softmax_merge(
                    hidden, keys, keep, self.temperature, among=among, self_weight=self.self_weight
                ),
            )
        index, weights = self._neighbours(keys, keep, among, self.top)
        return project_mix(ctx, lambda hidden: weighted_merge(hidden, index, weights))

    def _averages(
        self, hidden: torch.Tensor, keys: torch.Tensor, keep: torch.Tensor, among: torch.Tensor
    ) -> torch.Tensor:
        """Each token goes to one anchor, which takes the mean of its own."""
        owner = assign(keys, keep, among=among)
        members = owner.new_zeros(len(keep)).scatter_add_(0, owner, torch.ones_like(owner))
        weights = (1 - self.self_weight) / members[owner] + self.self_weight * (among == keep[owner])
        return assigned_merge(hidden, owner, weights, len(keep), among=among)

    def _neighbours(
        self, keys: torch.Tensor, keep: torch.Tensor, among: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[m, t] positions of an anchor and of those like it, and their weights, as :func:`transform_matrix` has them.

        Of the tokens that tie for the last place, one more than that place stays, where the matrix keeps all.
        """
        index, similarity = nearest(keys, keep, top, among=among, exclude_self=True)
        own = normalize(keys[keep].float(), dim=-1).square().sum(-1, keepdim=True)
        least = similarity[:, top - 2 : top - 1] if top > 1 else own
        similarity = torch.cat([own, similarity.masked_fill(similarity < least, -torch.inf)], 1)
        weights = (1 - self.self_weight) * (similarity / self.temperature).softmax(-1)
        weights[:, 0] += self.self_weight
        return torch.cat([keep[:, None], index], 1), weights
