"""Where sparse attention enters a diffusers transformer: its own processors, each under a subclass of its class.

A processor keeps its identity and its attributes, and ``inspect.signature``, by which diffusers decides what a
processor is passed, still sees the original. Dense calls run the untouched ``__call__`` on the user's own attention
back end. In a sparse call the same code runs on the native back end, and a ``TorchFunctionMode`` takes its call of
``scaled_dot_product_attention``: nothing of diffusers is copied, and nothing global is changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vlm_budget.errors import PatchError, VideoAttentionError

SITE = "_vlm_budget_site"
"""Attribute of an attention module that says whose it is."""

_NATIVE = "native"
_MISSING = object()
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Owner(Protocol):
    """Who decides on, and computes, the calls of a transformer's attention modules."""

    def wants(self, layer: int) -> bool:
        """Whether the layer's call that begins now is to be sparse; a dense one is taken note of."""

    def lend_mask(self, mask: Any) -> Any:
        """What the processor is given in place of its attention mask."""

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
        """Compute one call."""


class Site:
    """One attention module's place in a patched transformer.

    Args:
        owner: Who computes its calls.
        layer: Which layer it is.
    """

    def __init__(self, owner: Owner, layer: int) -> None:
        self.owner = owner
        self.layer = layer


class SparseProcessor:
    """First base of the class that an attention processor has while its transformer is patched."""

    original: ClassVar[type]
    """The class the processor has else."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the original class and the attributes: the subclass has no name to be found under."""
        return _rebuild, (self.original,), self.__dict__


@functools.cache
def sparse_class(original: type) -> type:
    """The subclass for processors of a class; one for each class."""
    inner: Callable[..., Any] = original.__call__

    @functools.wraps(inner)
    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(inner, self, attn, args, kwargs)

    name = f"Sparse{original.__name__}"
    return type(name, (SparseProcessor, original), {"__call__": call, "original": original, "__module__": __name__})


def _rebuild(original: type) -> Any:
    return object.__new__(sparse_class(original))


class Seam:
    """Puts sites and subclasses in place, and takes them away.

    Args:
        attentions: The self-attention modules, layer by layer.
        owner: Who computes their calls.
    """

    def __init__(self, attentions: list[nn.Module], owner: Owner) -> None:
        self._attentions = attentions
        self._owner = owner
        self._changed: list[Any] = []

    def attach(self) -> None:
        """Put everything in place; a failure on the way takes back what was done.

        Raises:
            PatchError: A processor cannot be given another class, or computes in parallel over devices.
        """
        try:
            for layer, attention in enumerate(self._attentions):
                _refuse_parallel(attention.processor)
                attention.__dict__[SITE] = Site(self._owner, layer)
                self._change(attention.processor)
        except BaseException:
            self.detach()
            raise

    def _change(self, processor: Any) -> None:
        if isinstance(processor, SparseProcessor):
            return  # one processor may serve many modules
        original: Any = type(processor)
        try:
            processor.__class__ = sparse_class(original)
        except TypeError as error:
            raise PatchError(
                f"the attention processor {original.__name__} cannot be extended ({error}). Patch before replacing "
                "processors, or use those that the model came with."
            ) from error
        self._changed.append(processor)

    def detach(self) -> None:
        """Take everything away. Doing so twice is harmless."""
        while self._changed:
            processor = self._changed.pop()
            if isinstance(processor, SparseProcessor):
                processor.__class__ = type(processor).original
        for attention in self._attentions:
            site: Site | None = attention.__dict__.get(SITE)
            if site is not None and site.owner is self._owner:  # not that of a later patch
                del attention.__dict__[SITE]

    def check(self) -> None:
        """Refuse a forward of a transformer that was changed under the patch.

        Raises:
            PatchError: A processor was replaced, or computes in parallel over devices.
        """
        for layer, attention in enumerate(self._attentions):
            processor = attention.processor
            if not isinstance(processor, SparseProcessor):
                raise PatchError(
                    f"the attention processor of layer {layer} was replaced by {type(processor).__name__} after the "
                    "transformer was patched (set_attn_processor and fuse_qkv_projections do so): the patch is no "
                    "longer whole. Undo it, replace the processors, and patch again."
                )
            _refuse_parallel(processor)

    def dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Dense attention of [B, H, L, D] as the first layer computes it, on its own attention back end."""
        processor = self._attentions[0].processor
        if not hasattr(processor, "_attention_backend"):
            return F.scaled_dot_product_attention(query, key, value)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        # Which lays tokens before heads.
        parts = (part.transpose(1, 2) for part in (query, key, value))
        out: torch.Tensor = dispatch_attention_fn(*parts, backend=processor._attention_backend)
        return out.transpose(1, 2)


def _refuse_parallel(processor: Any) -> None:
    if getattr(processor, "_parallel_config", None) is not None:
        raise PatchError(
            "context parallelism splits the video over devices inside the attention processors; sparse attention needs "
            "all of its tokens on one. Patch a transformer without enable_parallelism()."
        )


# Compiled code breaks here, once per block, and nothing of what follows is traced: which calls are sparse changes from
# step to step, and would be compiled anew each time.
@torch.compiler.disable
def _run(
    inner: Callable[..., Any], processor: Any, attn: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    site: Site | None = attn.__dict__.get(SITE)
    if site is None or not site.owner.wants(site.layer):
        return inner(processor, attn, *args, **kwargs)
    args, kwargs = _lent(inner, site.owner, args, kwargs)
    with _native(processor), _Interception(site) as interception:
        out = inner(processor, attn, *args, **kwargs)
    if not interception.calls:
        raise PatchError(
            f"{type(processor).original.__name__} computed its attention without calling scaled_dot_product_attention, "
            "so that nothing of it could be made sparse. Undo the patch, or use the processors that the model came "
            "with."
        )
    return out


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's parameters, found once: they are asked for in every call."""
    return tuple(inspect.signature(function).parameters)


def _lent(
    inner: Callable[..., Any], owner: Owner, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Arguments of a processor with its attention mask exchanged."""
    if "attention_mask" in kwargs:
        return args, {**kwargs, "attention_mask": owner.lend_mask(kwargs["attention_mask"])}
    names = parameters(inner)[2:]
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    if place >= len(args):
        return args, kwargs
    return (*args[:place], owner.lend_mask(args[place]), *args[place + 1 :]), kwargs


@contextmanager
def _native(processor: Any) -> Iterator[None]:
    """The processor's attention back end is the native one, which calls ``scaled_dot_product_attention``."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    own = processor.__dict__.get("_attention_backend", _MISSING)
    processor._attention_backend = _NATIVE
    try:
        yield
    finally:
        if own is _MISSING:
            del processor._attention_backend
        else:
            processor._attention_backend = own


def _cast_as_autocast_does(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors in the element type to which autocast, where it is on, casts the inputs of attention."""
    kind = tensors[0].device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    for tensor in tensors:
        yield tensor if cast is None or tensor.dtype == torch.float64 else tensor.to(cast)


class _Interception(TorchFunctionMode):
    """Takes calls of ``scaled_dot_product_attention``; all other functions run as ever."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._site = site
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        query, key, value = _cast_as_autocast_does(given["query"], given["key"], given["value"])
        if given.get("is_causal") or given.get("dropout_p"):
            raise VideoAttentionError(
                "causal attention and dropout cannot be computed sparsely, and a video model's self-attention has "
                f"neither; got is_causal={given.get('is_causal')}, dropout_p={given.get('dropout_p')}"
            )
        if not query.shape == key.shape == value.shape or query.ndim != 4:
            shapes = ", ".join(str(list(part.shape)) for part in (query, key, value))
            raise VideoAttentionError(f"self-attention takes query, key and value [B, H, L, D] alike, got {shapes}")
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        part, self.calls = self.calls, self.calls + 1
        return self._site.owner.attend(self._site.layer, part, query, key, value, given.get("attn_mask"), scale)
