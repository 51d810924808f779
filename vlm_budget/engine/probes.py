"""Attention scores without leaving the user's attention backend.

Transformers' attention modules look their function up per call from ``module.config._attn_implementation``. A probe
gives one module a config that delegates everything to the real one and answers another name; the function behind that
name takes what a method needs from the very queries and keys the model made (after rotary embedding, normalisation and
the cache), then calls the real backend, so SDPA, flash, flex and eager all stay on. Masks, other layers and the model's
config are untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import PatchError
from .clock import Interval
from .local import CallLocal
from .precision import exactly

_PREFIX = "vlm_budget_probe|"
_SINK = "_vlm_budget_sink"
_local = CallLocal()

RowKind = Literal["cls", "received", "last", "joint_cls", "keys", "mean_keys", "qk"]


class ProbeStop(BaseException):
    """Raised out of a module whose sink was started with ``stop=True``, once its queries and keys are recorded.

    Whoever started the sink catches it. Not an :class:`Exception`, which a model might catch on its way out.
    """


class ProbeName(str):
    """Name of a probed backend that still answers to the name of the backend itself, eager apart.

    Up to transformers 4.x vision towers ask ``== "flash_attention_2"`` to decide whether sequences come packed. Eager
    is asked for with ``!= "eager"``, to look another function up: there the probe must look different.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (other != "eager" and self.removeprefix(_PREFIX) == other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class ProbeConfig:
    """Delegates to a module's real config, and routes the module's attention through :func:`probe_attention`."""

    def __init__(self, real: Any) -> None:
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        if name == "_real":  # not yet restored while unpickling
            raise AttributeError(name)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)

    @property
    def _attn_implementation(self) -> str:
        real = self._real._attn_implementation
        # While the real backend runs it must see its own name: flash kernels read the config again.
        if getattr(_local, "inside", False):
            return real
        name = ProbeName(_PREFIX + str(real))
        functions = _attention_functions()
        if name not in functions:
            functions.register(name, probe_attention)
        return name

    def __getstate__(self) -> dict[str, Any]:
        return {"_real": self._real}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _attention_functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Show queries and keys to the module's sink, then run the backend the user chose."""
    sink: AttentionSink = getattr(module, _SINK)
    real = module.config._real._attn_implementation  # type: ignore[union-attr]
    if sink.wanted:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # Eager and flex attention see what the mask says, no mask is no limit; SDPA and flash then ask is_causal.
        causal = bool(causal) and real not in (None, "eager", "flex_attention")
        packed = kwargs.get("cu_seq_lens_q")
        with torch.no_grad(), exactly(query.device):
            sink.record(query, key, attention_mask, scaling or query.shape[-1] ** -0.5, packed, causal)
        if sink.stops:
            raise ProbeStop
    function: Callable[..., Any]
    if real in (None, "eager"):
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = _attention_functions()[real]
    _local.inside = True
    try:
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    finally:
        _local.inside = False


@dataclass(frozen=True)
class AttachedProbe:
    """A probe in place. ``detach`` puts the module's own config object back."""

    module: nn.Module
    sink: AttentionSink
    config: Any

    def detach(self) -> None:
        """Undo :func:`attach`."""
        self.module.config = self.config
        delattr(self.module, _SINK)


def attach(module: nn.Module, sink: AttentionSink) -> AttachedProbe:
    """Route an attention module's rows to ``sink``.

    Raises:
        PatchError: The module is probed already, or does not choose its attention function by config.
    """
    config = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise PatchError(
            f"{type(module).__name__} does not look its attention function up by config; the scores this method needs "
            "cannot be taken from it"
        )
    if isinstance(config, ProbeConfig):
        raise PatchError(f"{type(module).__name__} is probed already")
    setattr(module, _SINK, sink)
    module.config = ProbeConfig(config)  # type: ignore[assignment]
    return AttachedProbe(module, sink, config)


@dataclass(frozen=True, eq=False)
class QueryKey:
    """References to what one call of an attention module attended with; recording it computes nothing.

    Attributes:
        query: [B, H, Lq, d], rotary embedding included.
        key: [B, Hkv, Lk, d], the cached ones in front; grouped heads are not repeated.
        mask: What the backend got: None, 4-D, 2-D padding (flash), or a flex ``BlockMask``.
        scaling: Factor on the logits.
        causal: The backend hides later keys where the mask does not say (None or 2-D).
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: Any
    scaling: float
    causal: bool

    def visible(self, start: int, stop: int) -> torch.Tensor | None:
        """Which keys the queries ``start:stop`` may see.

        Returns:
            Broadcastable to [B, 1, stop - start, Lk] (a mask per head stays [B, H, ...]): bool (True = may be seen), or
            additive float as the backend got it; None where all is seen.
        """
        return _mask_rows(self.mask, start, stop, self.query, self.key, self.causal)


class AttentionSink:
    """Collects what one attention module shows, per thread.

    Args:
        kinds: What to collect. Attention rows [B, L], mean over heads: ``"cls"`` (query 0), ``"last"`` (the last query,
            padding excluded), ``"received"`` (mean over queries, in chunks; packed sequences are taken apart by their
            ``cu_seq_lens``). ``"joint_cls"``: [B, L], query 0 with all heads taken as one, logits scaled by
            ``(H * d) ** -0.5``. ``"keys"``: [B, L, Hkv * d], the keys, heads side by side. ``"mean_keys"``:
            [B, L, d], their mean over heads. All of these float32. ``"qk"``: a :class:`QueryKey`.
        chunk: Queries per chunk of ``"received"``: bounds memory to ``H * chunk * L`` floats.
    """

    def __init__(self, kinds: tuple[RowKind, ...], chunk: int = 256) -> None:
        self.kinds = kinds
        self.chunk = chunk
        self._local = CallLocal()

    @property
    def wanted(self) -> bool:
        """Whether this thread collects rows at the moment."""
        return getattr(self._local, "rows", None) is not None

    @property
    def stops(self) -> bool:
        """Whether this thread wants the module left before it attends."""
        return self.wanted and self._local.stops

    def start(self, stop: bool = False) -> None:
        """Begin to collect on this thread.

        Args:
            stop: Leave the module by :class:`ProbeStop` right after recording, its attention not run.
        """
        self._local.rows = {kind: [] for kind in self.kinds}
        self._local.intervals = []
        self._local.stops = stop

    def stop(self) -> dict[RowKind, list[Any]]:
        """End collecting; per kind, what each call of the module showed, in call order."""
        rows = getattr(self._local, "rows", None)
        self._local.rows = None
        return rows or {kind: [] for kind in self.kinds}

    @property
    def intervals(self) -> list[Interval]:
        """What computing the rows took since :meth:`start`, on this thread."""
        return getattr(self._local, "intervals", [])

    def record(
        self, query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float, packed: Any, causal: bool
    ) -> None:
        """Take what is wanted of ``query`` [B, H, Lq, d] and ``key`` [B, Hkv, Lk, d].

        Args:
            query: Queries, rotary embedding included.
            key: Keys, the cached ones in front.
            mask: What the backend gets: None, 4-D, 2-D padding (flash), or a flex ``BlockMask``.
            scaling: Factor on the logits.
            packed: ``cu_seq_lens`` of sequences packed into one row, or None.
            causal: The backend hides later keys where the mask does not say (None or 2-D).
        """
        interval = Interval(query.device)
        shown = QueryKey(query.detach(), key.detach(), mask, scaling, causal)
        for kind in self.kinds:
            self._local.rows[kind].append(self._take(kind, shown, packed))
        self._local.intervals.append(interval.stop())

    def _take(self, kind: RowKind, shown: QueryKey, packed: Any) -> Any:
        query, key = shown.query, shown.key
        if kind == "qk":
            return shown
        if kind == "keys":
            return key.transpose(1, 2).flatten(2).float()
        if kind == "mean_keys":
            return key.float().mean(1)
        if kind == "received":
            return _received_packed(query, key, shown.mask, shown.scaling, self.chunk, packed, shown.causal)
        index = query.shape[2] - 1 if kind == "last" else 0
        part = shown.visible(index, index + 1)
        if kind == "joint_cls":
            return _joint_row(query[:, :, :1], key, part)
        return attention_rows(query[:, :, index : index + 1], key, shown.scaling, part).mean(1)[:, 0]


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax rows for chosen queries.

    Args:
        query: [B, H, n, d].
        key: [B, Hkv, Lk, d]; grouped heads are repeated.
        scaling: Factor on the logits.
        mask: None, or bool (True = may be seen) or additive float, broadcastable to [B, H, n, Lk].

    Returns:
        [B, H, n, Lk] float32; rows without any visible key are zero.
    """
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query.float() @ key.float().transpose(-1, -2)) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
    return torch.nan_to_num(logits.softmax(-1))


def _joint_row(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, L] float32 softmax row of a query [B, H, 1, d] whose heads are taken as one of width ``H * d``."""
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    query, key = (heads.transpose(1, 2).flatten(2)[:, None] for heads in (query, key))
    return attention_rows(query, key, query.shape[-1] ** -0.5, None if mask is None else mask[:, :1])[:, 0, 0]


def _mask_rows(
    mask: Any, start: int, stop: int, query: torch.Tensor, key: torch.Tensor, causal: bool
) -> torch.Tensor | None:
    """Rows ``start:stop`` of any mask transformers passes: None, 4-D, 2-D padding (flash), or a flex ``BlockMask``."""
    length, device = key.shape[2], query.device
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return (mask if mask.shape[2] == 1 else mask[:, :, start:stop])[..., :length]
    rows = torch.arange(start, stop, device=device)[None, None, :, None]
    columns = torch.arange(length, device=device)[None, None, None, :]
    if mask is None or isinstance(mask, torch.Tensor):
        seen = columns <= rows + (length - query.shape[2]) if causal else None
        flat = None if mask is None else mask[:, None, None, -length:].bool()
        return flat if seen is None else seen if flat is None else seen & flat
    batch = torch.arange(query.shape[0], device=device)[:, None, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    return torch.as_tensor(mask.mask_mod(batch, head, rows, columns)).expand(query.shape[0], 1, stop - start, length)


def _received(
    query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float, chunk: int, causal: bool
) -> torch.Tensor:
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], chunk):
        stop = min(start + chunk, query.shape[2])
        part = _mask_rows(mask, start, stop, query, key, causal)
        total += attention_rows(query[:, :, start:stop], key, scaling, part).sum(2).mean(1)
    return total / query.shape[2]


def _received_packed(
    query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float, chunk: int, packed: Any, causal: bool
) -> torch.Tensor:
    if packed is None:
        return _received(query, key, mask, scaling, chunk, causal)
    ends = packed.tolist()
    parts = [
        _received(query[:, :, a:b], key[:, :, a:b], None, scaling, chunk, causal)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    return torch.cat(parts, -1)
