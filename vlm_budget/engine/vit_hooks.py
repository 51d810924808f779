"""How methods act inside plain timm vision transformers: module hooks, and nothing else.

A pre-norm block computes ``x = x + attn(norm1(x))`` and then ``x = x + mlp(norm2(x))``; a method acts on the
``x`` in between. There is no module there to hook, so the second sum is taken over:

* before ``norm2`` the token sequence is reduced to ``y``, and ``norm2`` and the MLP see ``y``;
* what comes out behind ``drop_path2``, ``f(y)``, is put by, and a zero is handed to the block's own sum;
* behind the block, ``y + f(y)`` takes the place of that sum.

That is what the block would compute had it been given ``y``, to the bit. Queries and keys are read behind ``q_norm``
and ``k_norm`` (timm's attention has both, as identities where it does not normalise), and log(size) goes in through the
attention's own ``attn_mask``: the backend stays timm's choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..budget import Budget
from ..errors import InfeasibleBudgetError, PatchError, SelectionError
from ..vit import BlockTokens, VitContext, VitMethod, VitReport, weighted_pool
from .clock import Interval, total_ms
from .local import CallLocal, RunningThreads

_AVERAGES = ("avg", "avgmax")


@dataclass
class Pass:
    """One batch on its way through the blocks.

    Attributes:
        schedule: Patch tokens that shall leave each block.
        batch: Images.
        blocks: What the blocks so far did.
        next_block: The block that is due.
        sizes: [B, N] patches per token, None as long as no method said.
        bias: [B, 1, 1, P + N] log sizes, or None.
        query: [B, H, P + N, d] of the block that is running.
        key: [B, H, P + N, d] of the block that is running.
        reduced: [B, P + M, C] the running block's reduced tokens.
        behind: [B, P + M, C] what its MLP says to them.
        features: [B, P + M, C] the last output of the model's ``norm``, for pooling.
        intervals: What reducing took.
    """

    schedule: tuple[int, ...]
    batch: int
    blocks: list[BlockTokens] = field(default_factory=list)
    next_block: int = 0
    sizes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    reduced: torch.Tensor | None = None
    behind: torch.Tensor | None = None
    features: torch.Tensor | None = None
    intervals: list[Interval] = field(default_factory=list)


class VitEngine:
    """The patch's working part: hooks of the whole model, and the state of every thread's pass.

    Args:
        model: The vision transformer.
        method: What reduces.
        budget: How far; None for methods that are ``fixed``.
    """

    def __init__(self, model: nn.Module, method: VitMethod, budget: Budget | None) -> None:
        self.model: Any = model
        self.method = method
        self.budget = budget
        self.local = CallLocal()
        self.running = RunningThreads()
        self.last: Pass | None = None
        self.image: tuple[Any, ...] | None = None  # shape, dtype and device of the images of the last pass

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts without an account: it holds a device's events.
        return {**self.__dict__, "last": None}

    @property
    def now(self) -> Pass | None:
        """This thread's pass."""
        return getattr(self.local, "now", None)

    @property
    def off(self) -> bool:
        """This thread runs the model unpatched, to count its operations."""
        return getattr(self.local, "off", False)

    def begin(self, tokens: int, batch: int) -> None:
        """Start a pass of ``tokens`` patch tokens.

        Raises:
            BudgetError: The budget cannot be met with so many.
            PatchError: Gradient checkpointing would run blocks again behind the pass.
            SelectionError: The method's schedule is none.
        """
        if getattr(self.model, "grad_checkpointing", False) and torch.is_grad_enabled():
            raise PatchError(
                "a patched vision transformer cannot be checkpointed: call set_grad_checkpointing(False), or run it "
                "under torch.no_grad()"
            )
        blocks = len(self.model.blocks)
        keep = None if self.budget is None else self._keep(tokens)
        schedule = tuple(self.method.schedule(tokens, keep, blocks))
        counts = [tokens, *schedule]
        falling = all(1 <= after <= before for before, after in zip(counts, schedule, strict=False))
        if len(schedule) != blocks or not falling or keep not in (None, schedule[-1]):
            raise SelectionError(f"{self.method} promised to go from {tokens} to {keep} tokens, and planned {schedule}")
        self.running.enter()
        self.local.now = Pass(schedule, batch)

    def _keep(self, tokens: int) -> int:
        assert self.budget is not None
        try:
            return self.budget.tokens(tokens)
        except InfeasibleBudgetError as error:
            if error.nearest[0].amount == 1:  # less than one token: one must be in the method's reach to be named
                self.method.schedule(tokens, 1, len(self.model.blocks))
            raise

    def finish(self) -> None:
        """A pass has left the last block."""
        self.running.leave()
        now = self.now
        if now is not None and not getattr(self.local, "quiet", False):
            # Counts alone: the tensors of a pass, and the graph behind them, shall not outlive it.
            self.last = Pass(now.schedule, now.batch, now.blocks, intervals=now.intervals)

    @torch.compiler.disable
    def before_patch_embed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember what images look like, to count the operations on one."""
        if args and isinstance(args[0], torch.Tensor) and not getattr(self.local, "quiet", False):
            self.image = (args[0].shape[1:], args[0].dtype, args[0].device)

    @torch.compiler.disable
    def after_norm(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Keep the final tokens where pooling will have to weigh them."""
        if self.now is not None and not self.off and self.model.global_pool in _AVERAGES:
            self.now.features = output

    @torch.compiler.disable
    def before_fc_norm(self, module: nn.Module, args: tuple[Any, ...]) -> torch.Tensor | None:
        """Weigh tokens by their sizes where the head averages them.

        Raises:
            PatchError: The head was given other tokens than the model's features.
        """
        pooling = self.model.global_pool
        if self.off or pooling not in _AVERAGES:
            return None
        now, prefix = self.now, 0 if self.model.pool_include_prefix else self.model.num_prefix_tokens
        if now is not None and now.features is not None:
            if now.sizes is None:
                return None
            tokens = now.features[:, prefix:]
            mean = tokens.mean(1)
            plain = 0.5 * (tokens.amax(1) + mean) if pooling == "avgmax" else mean
            if torch.equal(plain, args[0]):
                sizes = _with_prefix(now.sizes, self.model.num_prefix_tokens - prefix)
                return weighted_pool(tokens, sizes, pooling)
        raise PatchError(
            "the head of a patched model averages tokens by their sizes, which are known only of the features this "
            "thread computed last. Call the model itself, or forward_head() with what forward_features() just returned."
        )

    @torch.compiler.disable
    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the pass, also a failed one."""
        self.local.now = None
        self.running.leave()

    def operations(self) -> tuple[int, int]:
        """Floating-point operations of one image like those of the last pass, patched and not."""
        assert self.image is not None, "a pass has set it"
        shape, dtype, device = self.image
        blank = torch.zeros(1, *shape, dtype=dtype, device=device)
        now, counts = self.now, []
        self.local.quiet = True
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                for off in (False, True):
                    self.local.off = off
                    with FlopCounterMode(display=False) as counter:
                        self.model(blank)
                    counts.append(counter.get_total_flops())
        finally:
            self.local.off = self.local.quiet = False
            self.local.now = now
        return counts[0], counts[1]

    def report(self) -> VitReport:
        """The account of the last whole pass.

        Raises:
            PatchError: There was none.
        """
        if self.last is None:
            raise PatchError("nothing to report: no image has run through all blocks of the patched model yet")
        flops, unpatched = self.operations()
        return VitReport(
            method=str(self.method),
            budget=None if self.budget is None else str(self.budget),
            batch=self.last.batch,
            prefix=self.model.num_prefix_tokens,
            blocks=tuple(self.last.blocks),
            reduce_ms=total_ms(self.last.intervals),
            flops=flops,
            flops_unpatched=unpatched,
        )


class BlockHooks:
    """The hooks of one block.

    Args:
        engine: The patch's working part.
        index: 0-based index of the block.
        scale: Factor on the block's attention logits.
    """

    def __init__(self, engine: VitEngine, index: int, scale: float) -> None:
        self.engine = engine
        self.index = index
        self.scale = scale

    def _now(self) -> Pass | None:
        """The pass that is in this block; None where the model runs unpatched."""
        return None if self.engine.off else self.engine.now

    def _reducing(self) -> Pass | None:
        """The same, where the block has something to reduce."""
        now = self._now()
        return now if now is not None and now.schedule[self.index] < now.blocks[-1].entered else None

    @torch.compiler.disable
    def before_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Begin a pass, or see that the pass comes to its next block.

        Raises:
            PatchError: The block is called on its own.
        """
        engine = self.engine
        if engine.off:
            return
        tokens = args[0].shape[1] - engine.model.num_prefix_tokens
        if self.index == 0:
            engine.begin(tokens, len(args[0]))
        now = engine.now
        if now is None or now.next_block != self.index or (now.blocks and now.blocks[-1].left != tokens):
            raise PatchError(
                f"block {self.index} of a patched vision transformer was run on its own; a pass begins at block 0 and "
                "takes every block once"
            )
        now.blocks.append(BlockTokens(tokens, tokens))
        now.query = now.key = now.reduced = now.behind = None

    @torch.compiler.disable
    def before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add log(size) to the attention logits.

        Raises:
            PatchError: The caller has a mask of its own, whose tokens are no longer those of the sequence.
        """
        now = self._now()
        if now is None:
            return None
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise PatchError("a patched vision transformer takes no attn_mask and no is_causal: its tokens change")
        return None if now.bias is None else (args, {**kwargs, "attn_mask": now.bias})

    @torch.compiler.disable
    def on_query(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Read the queries."""
        if now := self._reducing():
            now.query = output

    @torch.compiler.disable
    def on_key(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Read the keys."""
        if now := self._reducing():
            now.key = output

    @torch.compiler.disable
    def before_mlp(self, module: nn.Module, args: tuple[Any, ...]) -> torch.Tensor | None:
        """Reduce the tokens behind the attention."""
        now = self._reducing()
        if now is None:
            return None
        interval = Interval(args[0].device)
        now.reduced = self._reduce(now, args[0])
        now.intervals.append(interval.stop())
        return now.reduced

    def _reduce(self, now: Pass, x: torch.Tensor) -> torch.Tensor:
        """[B, P + M, C] of [B, P + N, C]."""
        engine, prefix, keep = self.engine, self.engine.model.num_prefix_tokens, now.schedule[self.index]
        assert now.query is not None and now.key is not None, "the attention ran before the MLP"
        ctx = VitContext(
            layer=self.index,
            tokens=x[:, prefix:],
            query=now.query,
            key=now.key,
            scale=self.scale,
            bias=now.bias,
            prefix=prefix,
            has_cls=engine.model.cls_token is not None,
            sizes=now.sizes,
        )
        found = engine.method.reduce(ctx, keep)
        if found.tokens.shape != (len(x), keep, x.shape[2]):
            shape = [len(x), keep, x.shape[2]]
            raise SelectionError(f"{engine.method} promised tokens {shape}, and returned {list(found.tokens.shape)}")
        now.sizes = found.sizes
        now.bias = None
        if engine.method.weighs and found.sizes is not None:
            now.bias = _with_prefix(found.sizes, prefix).log().to(x.dtype)[:, None, None]
        now.blocks[-1] = BlockTokens(now.blocks[-1].entered, keep)
        return torch.cat([x[:, :prefix], found.tokens.to(x.dtype)], 1)

    @torch.compiler.disable
    def after_mlp(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Put the MLP's answer by: the block's own sum still runs over the long sequence."""
        now = self._reducing()
        if now is None:
            return None
        now.behind = output
        return output.new_zeros(())

    @torch.compiler.disable
    def after_block(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """The short sequence takes the long one's place."""
        now = self._now()
        if now is None:
            return None
        if now.reduced is not None and now.behind is not None:
            output = now.reduced + now.behind
        now.query = now.key = now.reduced = now.behind = None
        now.next_block += 1
        if now.next_block == len(now.schedule):
            self.engine.finish()
        return output


def _with_prefix(sizes: torch.Tensor, prefix: int) -> torch.Tensor:
    """[B, P + N] sizes of all tokens: a prefix token is one."""
    return torch.cat([sizes.new_ones(len(sizes), prefix), sizes], 1)
