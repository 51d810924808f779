"""The base of methods inside plain vision transformers: what they may see, what they return, how they spend.

Such a method shortens the sequence of patch tokens from block to block. In a block it acts between the attention and
the MLP, and everything it does there is one linear map of the patch tokens, Y = W X: pruning, merging, or both. Prefix
tokens (class token, registers) are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class VitContext:
    """What a method sees inside one block of a batch of images.

    Attributes:
        layer: 0-based index of the block.
        tokens: [B, N, C] patch tokens behind the block's attention.
        query: [B, H, P + N, d] the block's queries, P prefix tokens in front.
        key: [B, H, P + N, d] the block's keys.
        scale: Factor on the attention logits.
        bias: [B, 1, 1, P + N] what was added to the logits, or None.
        prefix: P.
        has_cls: Token 0 is a class token.
        sizes: [B, N] float32, how many of the image's patches each token stands for; None where nothing is merged yet.
    """

    layer: int
    tokens: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    scale: float
    bias: torch.Tensor | None
    prefix: int
    has_cls: bool
    sizes: torch.Tensor | None

    @property
    def patch_keys(self) -> torch.Tensor:
        """[B, H, N, d] keys of the patch tokens."""
        return self.key[:, :, self.prefix :]

    def importance(self) -> torch.Tensor:
        """[B, N] float32: the class token's attention to every patch token, mean over heads.

        Without a class token, the attention every patch token receives, mean over heads and queries.
        """
        if self.has_cls:
            return self._rows(0, 1)[:, 0, self.prefix :]
        length = self.query.shape[2]
        starts = range(0, length, _QUERIES_AT_ONCE)
        return (
            torch.stack([self._rows(s, s + _QUERIES_AT_ONCE).sum(1) for s in starts]).sum(0)[:, self.prefix :] / length
        )

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """[B, n, P + N] float32 attention rows of some queries, mean over heads."""
        logits = self.query[:, :, start:stop].float() @ self.key.float().transpose(-1, -2) * self.scale
        return (logits if self.bias is None else logits + self.bias.float()).softmax(-1).mean(1)


@dataclass(frozen=True)
class Reduced:
    """What a method returns.

    Attributes:
        tokens: [B, M, C] the shorter sequence of patch tokens.
        sizes: [B, M] how many of the image's patches each stands for; None for methods that do not say.
    """

    tokens: torch.Tensor
    sizes: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VitMethod:
    """Base of methods for plain vision transformers. Fields are the configuration; ``str()`` reproduces it."""

    paper: ClassVar[str] = ""

    @property
    def fixed(self) -> bool:
        """The fields alone say how many tokens leave; the method takes no budget."""
        return False

    @property
    def weighs(self) -> bool:
        """Attention counts a merged token as the patches it stands for: log(size) is added to its logits."""
        return False

    def schedule(self, tokens: int, keep: int | None, blocks: int) -> tuple[int, ...]:
        """Patch tokens that leave each block, never rising.

        Args:
            tokens: Patch tokens that enter the first block.
            keep: Patch tokens that shall leave the last block; None for methods that are ``fixed``.
            blocks: Number of blocks.

        Raises:
            BudgetError: The method cannot get there.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement schedule()")

    def reduce(self, ctx: VitContext, keep: int) -> Reduced:
        """Turn the block's patch tokens into ``keep`` of them, fewer than there are; each image on its own."""
        raise NotImplementedError(f"{type(self).__name__} must implement reduce()")

    def __str__(self) -> str:
        """The constructor call that makes an equal method, leaving out defaults."""
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(changed)})"


def equal_steps(tokens: int, keep: int, steps: int) -> list[int]:
    """Tokens left after each of ``steps`` equal steps from ``tokens`` down to ``keep``, in whole tokens."""
    return [tokens - (tokens - keep) * step // steps for step in range(1, steps + 1)]


@dataclass(frozen=True)
class BlockTokens:
    """Patch tokens of one image that enter and leave a block.

    Attributes:
        entered: What the block's attention saw.
        left: What its MLP saw and the next block gets.
    """

    entered: int
    left: int


@dataclass(frozen=True)
class VitReport:
    """The account of one pass through a patched vision transformer.

    Attributes:
        method: ``str()`` of the method.
        budget: The budget as text; None where the method's own fields say what it spends.
        batch: Images of the pass.
        prefix: Class and register tokens, beside the patch tokens and never reduced.
        blocks: Patch tokens per block.
        reduce_ms: Finding what to reduce and reducing it, whole batch, all blocks.
        flops: Floating-point operations of one image, as torch's FlopCounterMode counts them (a multiply-add is two).
        flops_unpatched: The same of the unpatched model.
    """

    method: str
    budget: str | None
    batch: int
    prefix: int
    blocks: tuple[BlockTokens, ...]
    reduce_ms: float
    flops: int
    flops_unpatched: int

    @property
    def tokens(self) -> int:
        """Patch tokens of an image before the first block."""
        return self.blocks[0].entered

    @property
    def kept_tokens(self) -> int:
        """Patch tokens of an image behind the last block."""
        return self.blocks[-1].left

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["blocks"] = [{"entered": block.entered, "left": block.left} for block in self.blocks]
        return {**plain, "tokens": self.tokens, "kept_tokens": self.kept_tokens}

    def __str__(self) -> str:
        """The report as plain text."""
        path = " ".join(str(count) for count in [self.tokens, *(block.left for block in self.blocks)])
        at = "" if self.budget is None else f" at {self.budget}"
        return (
            f"{self.method}{at}\n"
            f"patch tokens: {self.kept_tokens} of {self.tokens}, block by block {path}, and {self.prefix} prefix\n"
            f"operations of an image: {self.flops:,} of {self.flops_unpatched:,}\n"
            f"reducing: {self.reduce_ms:.2f} ms for a batch of {self.batch}"
        )


def weighted_pool(tokens: torch.Tensor, sizes: torch.Tensor, pooling: str) -> torch.Tensor:
    """Average pooling in which a token counts as often as the patches it stands for.

    Args:
        tokens: [B, N, C].
        sizes: [B, N].
        pooling: ``"avg"``, or ``"avgmax"`` for the mean of average and maximum.

    Returns:
        [B, C].
    """
    weights = (sizes / sizes.sum(1, keepdim=True)).to(tokens.dtype)
    mean = (weights[:, None] @ tokens)[:, 0]
    return 0.5 * (tokens.amax(1) + mean) if pooling == "avgmax" else mean
