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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import PatchError
from ..ops import attention_rows, received_attention, runs_kernel
from ..precision import exactly
from .clock import Interval
from .local import CallLocal

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

    def seen(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which keys the queries ``start:stop`` may see: those that mask and ends both allow.

        Returns:
            Broadcastable to [B, 1, stop - start, Lk] (a mask per head stays [B, H, ...]): bool (True = may be seen), or
            additive float as the backend got it; None where all is seen. And where causality alone limits,
            [1, stop - start] int32, how many keys in front may be seen.
        """
        mask, end = _mask_rows(self.mask, start, stop, self.query, self.key), None
        if self.causal and (self.mask is None or (isinstance(self.mask, torch.Tensor) and self.mask.ndim == 2)):
            behind = self.key.shape[2] - self.query.shape[2] + 1
            end = torch.arange(start + behind, stop + behind, dtype=torch.int32, device=self.query.device)[None]
        return mask, end


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
        shown = QueryKey(_in_rows(query.detach()), _in_rows(key.detach()), mask, scaling, causal)
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
            return _received_packed(shown, self.chunk, packed)
        index = query.shape[2] - 1 if kind == "last" else 0
        mask, end = shown.seen(index, index + 1)
        if kind == "joint_cls":
            return _joint_row(query[:, :, :1], key, mask, end)
        return attention_rows(query[:, :, index : index + 1], key, shown.scaling, stop=end, mask=mask)[:, 0]


def _in_rows(heads: torch.Tensor) -> torch.Tensor:
    """[..., d] as it is where each head lies in one piece, which kernels need, else a copy."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _joint_row(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, stop: torch.Tensor | None
) -> torch.Tensor:
    """[B, L] float32 softmax row of a query [B, H, 1, d] whose heads are taken as one of width ``H * d``."""
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    query, key = (heads.transpose(1, 2).flatten(2)[:, None] for heads in (query, key))
    mask = None if mask is None else mask[:, :1]
    return attention_rows(query, key, query.shape[-1] ** -0.5, stop=stop, mask=mask)[:, 0]


def _received(shown: QueryKey, chunk: int) -> torch.Tensor:
    """[B, L] float32 column means of the attention map."""
    query, key = shown.query, shown.key
    if runs_kernel(query, key) and (shown.mask is None or isinstance(shown.mask, torch.Tensor)):
        mask, end = shown.seen(0, query.shape[2])
        return received_attention(query, key, shown.scaling, stop=end, mask=mask)
    # In chunks, since a reference holds its rows, and a flex mask is a function that is asked for all of its rows.
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], chunk):
        part = slice(start, min(start + chunk, query.shape[2]))
        mask, end = shown.seen(part.start, part.stop)
        total += received_attention(query[:, :, part], key, shown.scaling, stop=end, mask=mask, reduce="sum")
    return total / query.shape[2]


def _received_packed(shown: QueryKey, chunk: int, packed: Any) -> torch.Tensor:
    """The same for sequences packed into one row, each of them on its own."""
    if packed is None:
        return _received(shown, chunk)
    query, key = shown.query, shown.key
    if query.device.type == "cpu" and not runs_kernel(query, key):
        ends = packed.tolist()
        parts = [
            replace(shown, query=query[:, :, start:stop], key=key[:, :, start:stop], mask=None)
            for start, stop in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat([_received(part, chunk) for part in parts], -1)
    # The host does not ask the device where sequences end: each query gets limits, each key its sequence's length.
    columns = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
    ends = packed.to(columns)
    place = torch.searchsorted(ends, columns, right=True).clamp_max(len(ends) - 1)
    first, stop = ends[place - 1], ends[place]
    end = (columns + 1) if shown.causal else stop
    total = received_attention(query, key, shown.scaling, first=first[None], stop=end[None], reduce="sum")
    return total / (stop - first)


def _mask_rows(mask: Any, start: int, stop: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Rows ``start:stop`` of any mask transformers passes: None, 4-D, 2-D padding (flash), or a flex ``BlockMask``."""
    length, device = key.shape[2], query.device
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return (mask if mask.shape[2] == 1 else mask[:, :, start:stop])[..., :length]
    if isinstance(mask, torch.Tensor):
        return mask[:, None, None, -length:].bool()
    rows = torch.arange(start, stop, device=device)[None, None, :, None]
    columns = torch.arange(length, device=device)[None, None, None, :]
    batch = torch.arange(query.shape[0], device=device)[:, None, None, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    return torch.as_tensor(mask.mask_mod(batch, head, rows, columns)).expand(query.shape[0], 1, stop - start, length)
