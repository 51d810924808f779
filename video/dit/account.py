"""What the self-attention calls of a run computed, collected without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from vlm_budget.errors import PatchError

from .call import Blocks, Call, Grid, Moment
from .clusters import labels_of
from .quality import Quality
from .report import DenseCalls, VideoReport

WARMUP = "warm-up steps"
FIRST_LAYERS = "first layers"
SHORT = "below the break-even length"
FULL = "density 1"
SUSPENDED = "suspended"

_CHUNK = 2**20
"""Numbers of keys that one chunk of sampled attention holds: 4 MiB of float32."""
_SLACK = 0.005
"""By how much, relative to it, a promised density may be exceeded before the report warns of it."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known of a run when it begins.

    Attributes:
        method: ``str()`` of the method.
        model: Class of the transformer.
        grid: The video's tokens.
        layers: Layers of the transformer.
        steps: Denoising steps; None where nothing says how many.
        text: Text tokens beside the video's, padding included.
        budget: The budget as text, where one was given.
        promised: Density that sparse calls may reach at most; None where the method promises none (top-p).
        warmup_steps: First steps that stay dense.
        dense_layers: First layers that stay dense.
        break_even: Tokens below which sparse attention is expected not to pay.
    """

    method: str
    model: str
    grid: Grid
    layers: int
    steps: int | None = None
    text: int = 0
    budget: str | None = None
    promised: float | None = None
    warmup_steps: int = 0
    dense_layers: int = 0
    break_even: int = 0


@dataclass(frozen=True)
class RowSample:
    """How close a sparse call came to dense attention on a few rows, scalars on the device.

    Attributes:
        error: ``|out - dense| / |dense|``, norms over the sampled rows, heads and samples.
        recall: Share of the rows' attention mass that lies on computed keys, corrections not counted.
    """

    error: torch.Tensor
    recall: torch.Tensor


@dataclass
class _Calls:
    """Calls of one run.

    Attributes:
        moments: Where each call happened.
        densities: Its density: 1.0 of a dense call, else a scalar on the device.
        reasons: Why it was dense; None of a sparse call.
        samples: Sampled rows, by the call's place in the lists.
    """

    moments: list[Moment] = field(default_factory=list)
    densities: list[float | torch.Tensor] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    samples: dict[int, RowSample] = field(default_factory=dict)


class Account:
    """Collects what each call of a run computed; :meth:`report` alone waits for the device.

    Args:
        rows: Query rows of a sampled call that are compared with dense attention; 0 samples none.
        heads: Heads of them.
        steps: Denoising steps whose calls are sampled, spread over the sparse ones.
    """

    def __init__(self, rows: int = 8, heads: int = 2, steps: int = 3) -> None:
        self._rows, self._heads, self._steps = rows, heads, steps
        self._info: RunInfo | None = None
        self._calls = _Calls()
        self._sampled: frozenset[int] = frozenset()
        self._told: dict[str, bool] = {}

    @property
    def info(self) -> RunInfo | None:
        """The run that is being collected, None before the first one."""
        return self._info

    def begin(self, info: RunInfo) -> None:
        """A run begins; the account forgets the one before."""
        self._info = info
        self._calls = _Calls()
        self._sampled = frozenset(sampled_steps(info.warmup_steps, info.steps, self._steps))
        self._told = {text: lasting for text, lasting in self._told.items() if lasting}

    def dense(self, moment: Moment, why: str) -> None:
        """A call ran dense, for a reason such as :data:`WARMUP`."""
        self._note(moment, 1.0, why)

    def sparse(self, call: Call, blocks: Blocks, out: torch.Tensor, density: torch.Tensor | float) -> None:
        """A call ran sparse.

        Args:
            call: The call.
            blocks: What was computed of it.
            out: [B, H, L, D], its output.
            density: Share of all pairs that were computed, a scalar on any device; it is not read here.
        """
        self._note(call.moment, density, None)
        moment = call.moment
        if self._rows and moment.branch == moment.part == 0 and moment.step in self._sampled:
            sample = sample_rows(call, blocks, out, self._rows, self._heads)
            self._calls.samples[len(self._calls.moments) - 1] = sample

    def _note(self, moment: Moment, density: torch.Tensor | float, why: str | None) -> None:
        self._calls.moments.append(moment)
        self._calls.densities.append(density.detach() if isinstance(density, torch.Tensor) else float(density))
        self._calls.reasons.append(why)

    def warn(self, text: str, lasting: bool = False) -> None:
        """Put a warning into the report, once; a lasting one is told of every later run too."""
        self._told[text] = self._told.get(text, False) or lasting

    def report(self, quality: Quality | None = None) -> VideoReport:
        """What the last run computed. Waits for the device.

        Args:
            quality: Of :meth:`VideoHandle.compare`, to be told along.

        Raises:
            PatchError: No call ran since the patch, or since :meth:`begin`.
        """
        info, calls = self._info, self._calls
        if info is None or not calls.moments:
            raise PatchError("nothing to report: no video has run through the patched transformer yet")
        moments, densities, reasons = _whole(calls.moments, _numbers(calls.densities), calls.reasons)
        samples = list(calls.samples.values())
        errors = _numbers([sample.error for sample in samples])
        recalls = _numbers([sample.recall for sample in samples])
        places = [calls.moments[place] for place in calls.samples]
        sparse = [value for value, why in zip(densities, reasons, strict=True) if why is None]
        rows = self._rows * self._heads * len(samples)
        return VideoReport(
            method=info.method,
            model=info.model,
            grid=str(info.grid),
            tokens=info.grid.tokens,
            text=info.text,
            budget=info.budget,
            steps=info.steps,
            layers=info.layers,
            calls=len(densities),
            sparse_calls=len(sparse),
            density=_mean(densities) or 0.0,
            sparse_density=_mean(sparse),
            promised=info.promised,
            densities=_by_step_and_layer(moments, densities),
            dense=tuple(_dense(moments, reasons)),
            error=_mean(errors),
            recall=_mean(recalls),
            errors=_by_layer(places, errors),
            sampled_rows=rows,
            warnings=(*self._told, *_doubts(info, sparse, reasons)),
            quality=quality,
        )


def sampled_steps(first: int, steps: int | None, wanted: int) -> list[int]:
    """Steps whose calls are compared with dense attention: ``wanted`` of the sparse ones, the first and the last too.

    Where nobody knows how many steps there are, the powers of two from the first sparse one on.
    """
    if steps is None:
        return [first, *(first + 2**power for power in range(wanted - 1))][:wanted]
    left = steps - 1 - first
    if wanted < 2 or left < 1:
        return [first][:wanted]
    return sorted({first + round(left * place / (wanted - 1)) for place in range(wanted)})


@torch.no_grad()
def sample_rows(call: Call, blocks: Blocks, out: torch.Tensor, rows: int = 8, heads: int = 2) -> RowSample:
    """Compare a few rows of a sparse call with dense attention, in float32 and a few megabytes, without a sync.

    Keys are read in chunks, with the online softmax of dense attention: nothing of the size of ``rows x L x D`` exists.
    Rows and heads lie evenly; the rows' distance is prime to N, so that they do not fall into one column of the grid.

    Args:
        call: The call.
        blocks: What was computed of it.
        out: [B, H, L, D], its output.
        rows: Query rows.
        heads: Heads.
    """
    batch, all_heads, length, _ = call.query.shape
    tokens = call.grid.tokens
    apart, stride = max(1, all_heads // heads), _stride(tokens, rows)
    offset = (7 * call.moment.layer) % stride  # other rows in each layer

    def some_heads(part: torch.Tensor) -> torch.Tensor:
        return part if part.shape[1] == 1 else part[:, ::apart][:, :heads]

    query = some_heads(call.queries)[:, :, offset::stride][:, :, :rows].float() * call.scale
    given = some_heads(out[:, :, call.video])[:, :, offset::stride][:, :, :rows].float()
    key, value = some_heads(call.key), some_heads(call.value)
    kept, labels = _kept_of_rows(blocks, some_heads, tokens, slice(offset, offset + stride * rows, stride), rows)
    kept = kept.expand(batch, query.shape[1], *kept.shape[2:])
    peak = torch.full_like(query[..., :1], -math.inf)
    mass, seen, total = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(query)
    step = max(64, _CHUNK // (batch * query.shape[1] * query.shape[3]))
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        logits = query @ key[:, :, part].float().transpose(-1, -2)
        if call.valid is not None:
            logits = logits.masked_fill(~call.valid[:, None, None, part], -math.inf)
        higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
        fall = torch.exp(peak - higher).nan_to_num(0.0)  # nothing was seen yet: -inf - -inf
        weights = torch.exp(logits - higher).nan_to_num(0.0)
        mass = mass * fall + weights.sum(-1, keepdim=True)
        seen = seen * fall + (weights * _is_kept(call, kept, labels, part)).sum(-1, keepdim=True)
        total = total * fall + weights @ value[:, :, part].float()
        peak = higher
    dense = total / mass
    error = (given - dense).square().sum().sqrt() / dense.square().sum().sqrt().clamp_min(1e-20)
    return RowSample(error, (seen / mass).mean())


def _stride(tokens: int, rows: int) -> int:
    """The largest distance of rows that is prime to the number of tokens and leaves room for all of them."""
    widest = max(1, tokens // (rows + 1))
    return next(stride for stride in range(widest, 0, -1) if math.gcd(stride, tokens) == 1)


def _kept_of_rows(
    blocks: Blocks, some_heads: Callable[[torch.Tensor], torch.Tensor], tokens: int, rows: slice, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept key blocks [B|1, h|1, R, Ck] of sampled rows, and the key block [B|1, h|1, N] of every video token."""
    sizes, order = some_heads(blocks.query_sizes), blocks.query_order
    query_labels = _labels(sizes, None if order is None else some_heads(order), tokens)[:, :, rows][:, :, :count]
    sizes, order = some_heads(blocks.key_sizes), blocks.key_order
    labels = _labels(sizes, None if order is None else some_heads(order), tokens)
    kept = some_heads(blocks.kept)
    batch, heads = (max(kept.shape[dim], query_labels.shape[dim]) for dim in (0, 1))
    place = query_labels[..., None].expand(batch, heads, -1, kept.shape[3])
    return kept.expand(batch, heads, -1, -1).gather(2, place), labels


def _labels(sizes: torch.Tensor, order: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The block [B|1, h|1, N] of every token; without an order, tokens stand as they come."""
    there = torch.arange(tokens, device=sizes.device)[None, None] if order is None else order
    return labels_of(there, sizes)


def _is_kept(call: Call, kept: torch.Tensor, labels: torch.Tensor, part: slice) -> torch.Tensor:
    """[B, h, R, K] of a chunk of keys: 1 where sampled rows computed them. Text always is."""
    found = kept.new_ones(*kept.shape[:3], part.stop - part.start)
    first, last = max(part.start, call.video.start), min(part.stop, call.video.stop)
    if first < last:
        own = labels[:, :, first - call.first : last - call.first]
        place = own[:, :, None].expand(*kept.shape[:3], last - first)
        found[..., first - part.start : last - part.start] = kept.gather(3, place)
    return found.float()


def _numbers(values: list[float | torch.Tensor] | list[torch.Tensor]) -> list[float]:
    """Scalars as Python numbers, with one transfer per device."""
    devices: dict[torch.device, list[int]] = {}
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            devices.setdefault(value.device, []).append(place)
    found = [0.0 if isinstance(value, torch.Tensor) else value for value in values]
    for places in devices.values():
        own = [values[place] for place in places]
        read = torch.stack([value.double().reshape(()) for value in own if isinstance(value, torch.Tensor)]).tolist()
        for place, number in zip(places, read, strict=True):
            found[place] = number
    return found


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _by_step_and_layer(moments: list[Moment], densities: list[float]) -> tuple[tuple[float | None, ...], ...]:
    """Mean density over branches and parts: a row per step, a column per layer."""
    cells: dict[tuple[int, int], list[float]] = {}
    for moment, density in zip(moments, densities, strict=True):
        cells.setdefault((moment.step, moment.layer), []).append(density)
    steps, layers = (1 + max(place[side] for place in cells) for side in (0, 1))
    layers = max(layers, moments[0].layers)
    return tuple(tuple(_mean(cells.get((step, layer), [])) for layer in range(layers)) for step in range(steps))


def _by_layer(moments: list[Moment], errors: list[float]) -> tuple[tuple[int, float], ...]:
    """Mean error of every layer that was sampled."""
    cells: dict[int, list[float]] = {}
    for moment, error in zip(moments, errors, strict=True):
        cells.setdefault(moment.layer, []).append(error)
    return tuple((layer, math.fsum(found) / len(found)) for layer, found in sorted(cells.items()))


def _whole(
    moments: list[Moment], densities: list[float], reasons: list[str | None]
) -> tuple[list[Moment], list[float], list[str | None]]:
    """Calls of a layer that attends to one sample after the other taken as one, which its dense calls are."""
    first: dict[Moment, str | None] = {}
    found: dict[Moment, list[float]] = {}
    for moment, density, why in zip(moments, densities, reasons, strict=True):
        whole = replace(moment, part=0)
        first.setdefault(whole, why)
        found.setdefault(whole, []).append(density)
    return list(found), [math.fsum(parts) / len(parts) for parts in found.values()], list(first.values())


def _dense(moments: list[Moment], reasons: list[str | None]) -> Iterator[DenseCalls]:
    """Dense calls, reason by reason."""
    for why in dict.fromkeys(why for why in reasons if why is not None):
        own = [moment for moment, reason in zip(moments, reasons, strict=True) if reason == why]
        steps, layers = sorted({moment.step for moment in own}), sorted({moment.layer for moment in own})
        yield DenseCalls(why, len(own), tuple(steps), tuple(layers))


def with_text(density: float, tokens: int, text: int) -> float:
    """Share of all pairs that a density of the video's pairs comes to where text, which is dense, stands beside."""
    return (density * tokens**2 + 2 * tokens * text + text**2) / (tokens + text) ** 2


def _doubts(info: RunInfo, sparse: list[float], reasons: list[str | None]) -> Iterator[str]:
    """What a user should know of the densities."""
    if not sparse:
        why = ", ".join(dict.fromkeys(why for why in reasons if why is not None))
        yield f"nothing ran sparse: all {len(reasons)} calls were dense ({why})"
    mean = _mean(sparse)
    promised = None if info.promised is None else with_text(info.promised, info.grid.tokens, info.text)
    if mean is not None and promised is not None and mean > promised * (1 + _SLACK):
        yield f"sparse calls computed {mean:.2%} of all pairs, more than the {promised:.2%} that were promised"
    if mean is not None and mean > 0.999:
        yield "sparse calls computed all pairs: dense attention does the same in less time"
