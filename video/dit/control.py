"""What a patched pipeline has in common: method, budget and run; and each of its transformers, forward by forward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlm_budget.budget import Budget
from vlm_budget.errors import PatchError, VideoAttentionError
from vlm_budget.ops.block_sparse_attention import Backend

from .account import FIRST_LAYERS, FULL, SHORT, WARMUP, Account, RunInfo
from .attend import attend, check, pairs
from .call import Call, Grid, Moment
from .clock import Clock, Tick
from .density import Run, Times, density_for, time_calls
from .masks import MaskReader
from .method import SparseAttention
from .models.base import VideoModel
from .seam import Seam, parameters
from .setting import Forward, Setting

HANDLE = "_vlm_budget_video"
"""Attribute of a patched transformer."""

MAX_HEAD = 128
_SMALL_STEP = 1e-9  # 0.29 of 100 steps are 29, though 0.29 * 100 is a little less


class Control:
    """What the transformers of a pipeline share.

    Attributes:
        method: As the user configured it.
        budget: What sparse attention may spend; None where the method or the preset says.
        force: Be sparse below the break-even length too.
        break_even: Tokens of the video below which dense attention is faster.
        backend: What computes sparse calls.
        clock: Of the pipeline, or of the bare transformer.
        account: What the calls of the last run computed.
        suspended: Everything runs dense, and nothing is taken note of.
        run: Counts runs.
        running: The transformer of the last forward.
    """

    def __init__(
        self,
        method: SparseAttention,
        budget: Budget | None,
        clock: Clock,
        force: bool,
        break_even: int,
        backend: Backend = "auto",
    ) -> None:
        self.method = method
        self.budget = budget
        self.clock = clock
        self.force = force
        self.break_even = break_even
        self.backend = backend
        self.account = Account()
        self.suspended = False
        self.run = 0
        self.running: Attached | None = None
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without a transformer that a copy of another one would take along."""
        return {**self.__dict__, "running": None}

    def reset(self) -> None:
        """Forget the run."""
        self.clock.reset()
        self.run += 1

    def is_short(self, grid: Grid) -> bool:
        """The video is too short for sparse attention to pay."""
        return not self.force and grid.tokens < self.break_even

    def tell(self, text: str) -> None:
        """Warn, and put it into the report; once for each text."""
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=2)
        self.account.warn(text)


class Attached:
    """One patched transformer.

    Args:
        name: Which of the pipeline's transformers it is.
        transformer: It.
        model: What is known about its class.
        control: What it shares with the pipeline's other ones.
    """

    def __init__(self, name: str, transformer: nn.Module, model: VideoModel, control: Control) -> None:
        attentions = model.attentions(transformer)
        self.name = name
        self.transformer = transformer
        self.model = model
        self.control = control
        self.layers = len(attentions)
        self._seam = Seam(attentions, self)
        self._masks = MaskReader()
        self._hooks: list[Any] = []
        self._settings: dict[Any, Setting] = {}
        self._states: dict[tuple[int, int, int], dict[str, Any]] = {}
        self._belongs: Any = None
        self._now: Forward | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what a copy would begin its own run with, which may be large."""
        return {**self.__dict__, "_states": {}, "_belongs": None, "_now": None}

    @property
    def active(self) -> bool:
        """The patch is in place."""
        return self.transformer.__dict__.get(HANDLE) is self

    def attach(self) -> None:
        """Put everything in place; a failure on the way takes back what was done."""
        self._seam.attach()
        register = self.transformer.register_forward_pre_hook
        self._hooks.append(register(self.before_forward, with_kwargs=True))
        self._hooks.append(self.transformer.register_forward_hook(self.after_forward, always_call=True))
        self.transformer.__dict__[HANDLE] = self

    def detach(self) -> None:
        """Take everything away. Doing so twice is harmless."""
        while self._hooks:
            self._hooks.pop().remove()
        self._seam.detach()
        if self.active:
            del self.transformer.__dict__[HANDLE]
        self._states.clear()
        self._masks = MaskReader()
        self._now = None

    @torch.compiler.disable
    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Find out where in the run the forward is, and what is done in it.

        Raises:
            PatchError: The transformer was changed under the patch, or something else than its pipeline drives it.
            VideoAttentionError: The tokens form no known grid, or the latents are not finite.
            BudgetError: The budget cannot be met by this video.
        """
        self._now = None
        if self.control.suspended:
            return
        self._seam.check()
        names = parameters(type(self.transformer).forward)[1:]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        grid = self.model.grid(self.transformer, arguments)
        tick = self.control.clock.tick(self.name, arguments["timestep"])
        short = self.control.is_short(grid)
        setting = self._setting(grid, arguments, tick, plan=not short)
        if tick.fresh:
            self._begin_run(grid, self.model.text_tokens(arguments), tick, setting, short)
        if setting.remark is not None:
            self.control.tell(setting.remark)
        if short:
            why: str | None = SHORT
        elif setting.full:
            why = FULL
        else:
            why = WARMUP if tick.step < setting.warmup_steps else None
        latents = arguments["hidden_states"]
        if why in (None, WARMUP):
            self._check_latents(latents, tick)
        earlier, self.control.running = self.control.running, self
        if earlier is not None and earlier is not self:
            earlier._states.clear()  # Wan 2.2 does not come back to its first transformer
        belongs = self.control.run, grid, latents.shape[0]
        if belongs != self._belongs:
            self._states.clear()
            self._belongs = belongs
        self._now = Forward(grid, tick, setting, why)

    def after_forward(self, *_: Any) -> None:
        """The forward is over, however it ended: calls from elsewhere are not part of it."""
        self._now = None

    def _check_latents(self, latents: torch.Tensor, tick: Tick) -> None:
        # On other devices this waits for them, which is done once per run.
        if (tick.fresh or latents.device.type == "cpu") and not bool(torch.isfinite(latents).all()):
            raise VideoAttentionError(
                f"the latents of step {tick.step} hold NaN or infinity: no attention can be computed of them. They "
                "came so from the step before, or from the caller."
            )

    def _begin_run(self, grid: Grid, text: int, tick: Tick, setting: Setting, short: bool) -> None:
        control, method = self.control, setting.method
        control.run += 1
        control.account.begin(
            RunInfo(
                method=str(method),
                model=type(self.transformer).__name__,
                grid=grid,
                layers=self.layers,
                steps=tick.steps,
                text=text,
                budget=None if control.budget is None else str(control.budget),
                promised=None if short else 1.0 if setting.full else method.density,
                warmup_steps=setting.warmup_steps,
                dense_layers=setting.dense_layers,
                break_even=control.break_even,
            )
        )

    def _setting(self, grid: Grid, arguments: Mapping[str, Any], tick: Tick, plan: bool) -> Setting:
        """What the shape of video comes to; worked out once for each.

        Args:
            grid: The video's tokens.
            arguments: Of the forward.
            tick: Which tells the number of steps.
            plan: The video will not be dense throughout, so that the budget has to be met.
        """
        text, batch = self.model.text_tokens(arguments), arguments["hidden_states"].shape[0]
        key = grid, text, batch, tick.steps, plan
        if key not in self._settings:
            self._settings[key] = self._worked_out(grid, text, arguments["hidden_states"], tick.steps, plan)
        return self._settings[key]

    def _worked_out(self, grid: Grid, text: int, latents: torch.Tensor, steps: int | None, plan: bool) -> Setting:
        given, budget = self.control.method, self.control.budget
        method = self.model.preset(self.transformer).fill(given, grid)
        warmup, first = method.warmup or 0.0, method.dense_layers or 0.0
        if warmup and steps is None:
            raise PatchError(
                "this transformer was copied away from the pipeline it was patched in, so that nothing says how many "
                "steps a run has. Patch the copy: patch(transformer, ..., timesteps=), or warmup=0."
            )
        setting = Setting(
            method, math.floor(warmup * (steps or 0) + _SMALL_STEP), math.floor(first * self.layers + _SMALL_STEP)
        )
        if not plan:
            short = (
                f"{grid.tokens} video tokens ({grid}) are fewer than the {self.control.break_even} from which on "
                "sparse attention is expected to be faster than dense attention: everything stays dense. force=True "
                "makes it sparse all the same."
            )
            return replace(setting, remark=short)
        if budget is not None:
            heads, width = self.model.heads(self.transformer)
            run = Run(
                grid=grid,
                text=text,
                heads=heads,
                width=width,
                layers=self.layers,
                steps=steps,
                warmup_steps=setting.warmup_steps,
                dense_layers=setting.dense_layers,
                branches=latents.shape[0],
            )
            ask = replace(method, density=None)
            bought = density_for(budget, ask, run, lambda: self._times(grid, text, latents, ask))
            setting = replace(setting, method=replace(method, density=bought))
        density = setting.method.density
        if density is not None and density < 1:
            setting.method.promised(grid)  # which refuses what cannot be kept
        full = density == 1 or setting.method.least_density(grid) >= 1
        remark = None
        if full and budget is None and not given.settled:
            remark = (
                f"{type(method).__name__} cannot compute less than everything on a grid of {grid}: everything stays "
                "dense. Choose another method, or smaller blocks."
            )
        return replace(setting, full=full, remark=remark)

    def wants(self, layer: int) -> bool:
        """Whether a layer's call is to be sparse; a dense one is taken note of."""
        now = self._now
        if now is None:
            return False
        why = now.why or (FIRST_LAYERS if layer < now.setting.dense_layers else None)
        if why is not None:
            self.control.account.dense(self._moment(now, layer, 0), why)
        return why is None

    def lend_mask(self, mask: Any) -> Any:
        """What the processor is given in place of its attention mask."""
        return self.model.lend_mask(mask)

    def _moment(self, now: Forward, layer: int, part: int) -> Moment:
        return Moment(now.tick.step, now.tick.steps, layer, self.layers, now.tick.branch, part)

    def attend(
        self,
        layer: int,
        part: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scale: float,
    ) -> torch.Tensor:
        """Compute one call of self-attention sparsely.

        Raises:
            PatchError: There is more than one call where one was expected.
            SelectionError: The method's blocks are none of the video's tokens (looked at on the CPU only).
            VideoAttentionError: The tokens are not the video's and its text's, a head is too wide, gradients are
                wanted, the mask has an unknown form, or query or key are not finite (looked at on the CPU only).
        """
        now = self._now
        assert now is not None
        batch, _, length, width = query.shape
        if part and not self.model.per_sample:
            raise PatchError(f"{self.model.transformer} computed attention twice in one layer, which is not known here")
        tokens, kind = now.grid.tokens, self.model.text
        if length < tokens or (kind == "none" and length != tokens):
            raise VideoAttentionError(
                f"self-attention over {length} tokens, where a grid of {now.grid} makes {tokens} of the video and the "
                f"text is {'elsewhere' if kind == 'none' else kind}"
            )
        check_head(width)
        if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
            raise VideoAttentionError(
                "sparse attention has no gradients. Run under torch.no_grad(), or undo the patch to train."
            )
        if query.device.type == "cpu" and not (bool(torch.isfinite(query).all()) and bool(torch.isfinite(key).all())):
            raise VideoAttentionError(f"query or key of layer {layer} in step {now.tick.step} hold NaN or infinity")
        first = length - tokens if kind == "first" else 0
        valid, empty_rows = self._masks.read(mask, batch, length, slice(first, first + tokens))
        moment = self._moment(now, layer, part)
        place = layer, moment.branch, part
        state = self._states.setdefault(place, {})
        if moment.steps is not None and moment.step == moment.steps - 1:
            del self._states[place]  # gigabytes at 720p, which the VAE may need
        call = Call(query, key, value, now.grid, first, valid, empty_rows, scale, moment, state)
        blocks = now.setting.method.blocks(call)
        if query.device.type == "cpu":
            check(call, blocks)
        out, _ = attend(call, blocks, self.control.backend)
        self.control.account.sparse(call, blocks, out, pairs(call, blocks))
        return out

    def _times(self, grid: Grid, text: int, latents: torch.Tensor, method: SparseAttention) -> Times:
        """Time dense and sparse attention on random tensors of the shape at hand, before any block runs.

        On the latents' device and in their type: weights that are offloaded are elsewhere, or of another type.
        """
        heads, width = self.model.heads(self.transformer)
        batch = latents.shape[0]
        samples = 1 if self.model.per_sample else batch
        shape = samples, heads, grid.tokens + text, width
        generator = torch.Generator(latents.device).manual_seed(0)
        query, key, value = (
            torch.randn(shape, generator=generator, device=latents.device, dtype=latents.dtype) for _ in range(3)
        )
        first = text if self.model.text == "first" else 0
        moment = Moment(0, None, 0, self.layers)
        call = Call(query, key, value, grid, first, None, False, width**-0.5, moment)
        measured = time_calls(call, method, lambda: self._seam.dense(query, key, value))
        calls = batch // samples
        (low, fast), (high, slow) = measured.low, measured.high
        return Times(calls * measured.dense, (low, calls * fast), (high, calls * slow))


def check_head(width: int) -> None:
    """Refuse heads that no kernel takes.

    Raises:
        VideoAttentionError: They have more than 128 dimensions.
    """
    if width > MAX_HEAD:
        raise VideoAttentionError(f"heads of up to {MAX_HEAD} dimensions are supported, got {width}")
