"""From how many tokens on sparse attention is faster than the best dense one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm_budget.errors import OptionError

from .call import Call, Grid, Moment
from .method import SparseAttention
from .timing import milliseconds, sparse_milliseconds

BREAK_EVEN = 24_000
"""Tokens below which a patch stays dense unless it is forced. An estimate, not a measurement: the cost of clustering
and permuting grows with the tokens, that of dense attention with their square, and published figures for one H100-class
GPU put the crossing at 20,000 to 25,000 tokens. :func:`measure` finds it on the device at hand."""

LENGTHS = (4_096, 8_192, 16_384, 24_576, 32_768, 49_152, 65_536)
_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_COLS = 64


@dataclass(frozen=True)
class Timing:
    """Dense and sparse attention at one length.

    Attributes:
        tokens: Of the video.
        dense_ms: Fastest back end of torch's scaled dot product attention.
        backend: Which one that was.
        sparse_ms: The whole sparse call, clustering and permutation included, mean over steps of one run.
    """

    tokens: int
    dense_ms: float
    backend: str
    sparse_ms: float

    @property
    def speedup(self) -> float:
        """Dense time over sparse time."""
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True)
class BreakEven:
    """Where sparse attention begins to pay.

    Attributes:
        tokens: The length where both take the same time, interpolated between two measured ones; None where sparse
            attention was slower at every length.
        timings: One per length, ascending.
        device: What was measured on.
        note: What the figure does not say; empty on a GPU.
    """

    tokens: int | None
    timings: tuple[Timing, ...]
    device: str
    note: str = ""

    def __str__(self) -> str:
        """One line per length and the verdict."""
        lines = [
            f"{t.tokens:,} tokens: dense {t.dense_ms:.2f} ms ({t.backend}), sparse {t.sparse_ms:.2f} ms, "
            f"{t.speedup:.2f}x"
            for t in self.timings
        ]
        longest = self.timings[-1].tokens
        verdict = f"above {longest:,}" if self.tokens is None else f"{self.tokens:,}"
        return "\n".join([*lines, f"break-even: {verdict} tokens on {self.device}", *filter(None, [self.note])])


def measure(
    heads: int = 24,
    head_dim: int = 128,
    density: float = 0.25,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    method: SparseAttention | None = None,
    lengths: Sequence[int] = LENGTHS,
    steps: int = 8,
) -> BreakEven:
    """Find the break-even length by timing both kinds of attention on growing lengths.

    Tokens are drawn around centres, so that clustering has something to find; what it finds does not change the time.
    A sparse call is the mean over ``steps`` steps that share their state, after a first one: what a method keeps
    from step to step is paid for as in a run. Only meaningful on a GPU: on a CPU the reference implementations are
    timed, and the result says so.

    Args:
        heads: Of the attention.
        head_dim: Of a head.
        density: Of the sparse calls.
        device: Where to measure.
        dtype: Of queries, keys and values.
        method: SVG2 at ``density`` by default.
        lengths: Tokens to measure, ascending; rounded up to whole rows of a grid.
        steps: Measured sparse calls per length, at least.

    Raises:
        OptionError: No lengths, or lengths that do not ascend.
    """
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise OptionError(f"lengths must be ascending numbers of tokens, got {list(lengths)}")
    place = torch.device(device)
    method = method or _default_method(density)
    timings = []
    for tokens in lengths:
        grid = _grid(tokens)
        tensors = _clustered(heads, grid.tokens, head_dim, place, dtype)
        dense_ms, backend = fastest_dense(*tensors)
        call = Call(*tensors, grid, 0, None, False, head_dim**-0.5, Moment(0, None, 0, 1))
        timings.append(Timing(grid.tokens, dense_ms, backend, sparse_milliseconds(call, method, steps)))
    note = "" if place.type == "cuda" else "measured without a GPU: it says nothing of the kernels' break-even"
    from vlm_budget.machine import device_name

    return BreakEven(crossing(timings), tuple(timings), device_name(place), note)


def crossing(timings: Sequence[Timing]) -> int | None:
    """Where the sparse time falls below the dense one for good, interpolated in logarithms of length and speed-up."""
    if timings[-1].speedup < 1:
        return None
    last = max((place for place, timing in enumerate(timings) if timing.speedup < 1), default=None)
    if last is None:
        return timings[0].tokens
    below, above = timings[last], timings[last + 1]
    low, high = math.log(below.speedup), math.log(above.speedup)
    share = -low / (high - low)
    return round(below.tokens * (above.tokens / below.tokens) ** share)


@torch.no_grad()
def fastest_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, repeats: int = 5) -> tuple[float, str]:
    """Milliseconds and name of the fastest back end of torch's attention that can run [B, H, L, D] here."""
    found: list[tuple[float, str]] = []
    for backend in _BACKENDS:
        if backend is SDPBackend.MATH and found:  # holds all weights at once: the last resort
            break
        try:
            with sdpa_kernel([backend]):
                functional.scaled_dot_product_attention(query, key, value)
                run = lambda: functional.scaled_dot_product_attention(query, key, value)  # noqa: E731
                found.append((milliseconds(query.device, run, repeats), backend.name.removesuffix("_ATTENTION")))
        except RuntimeError:  # what torch raises of a back end that is not there, or not for these tensors
            continue
    return min(found)


def _grid(tokens: int) -> Grid:
    """A grid of about as many tokens: 32 x 64 a frame, or less."""
    rows = min(32, math.ceil(tokens / _COLS))
    return Grid(math.ceil(tokens / (rows * _COLS)), rows, _COLS)


def _clustered(
    heads: int, tokens: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values [1, H, N, D] around 256 centres."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    centres = draw(heads, 256, head_dim)
    places = torch.randint(256, (tokens,), generator=generator, device=device)
    query, key = ((centres[:, places] + 0.5 * draw(heads, tokens, head_dim)).to(dtype)[None] for _ in range(2))
    return query, key, draw(1, heads, tokens, head_dim).to(dtype)


def _default_method(density: float) -> SparseAttention:
    from vlm_budget.registry import VIDEO_METHODS

    return VIDEO_METHODS.get("svg2")(density=density)
