"""From what a user holds to the parts a patch works on: the unwrapped model, its family, the layout of its inputs."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import nn

from .errors import LayoutError, UnsupportedModelError
from .families.base import Family
from .layout import Modality, VisualItem, VisualLayout, group_rows
from .registry import FAMILIES, VIT_METHODS

_SAMPLES = 16  # numbers per weight that tell one checkpoint from another


def find_family(model: Any) -> tuple[nn.Module, nn.Module, Family]:
    """The unwrapped model, its inner model, and what is known about its class.

    Raises:
        UnsupportedModelError: No family matches; the message lists the supported classes.
    """
    outer = _unwrap(model)
    names = {cls.__name__ for cls in type(outer).__mro__}
    supported: list[str] = []
    for name in FAMILIES:
        family: Family = FAMILIES.get(name)()
        if names.intersection(family.models):
            return outer, family.base(outer), family
        supported.append(family.models[0])
    raise UnsupportedModelError(
        f"{type(outer).__name__} is not a supported model. Supported: {', '.join(sorted(supported))}; and for "
        f"{', '.join(VIT_METHODS)} without a language model, timm's VisionTransformer."
    )


def layout_of(base: nn.Module, family: Family, inputs: dict[str, Any]) -> VisualLayout:
    """Where the visual tokens of a processor's output are, without running the model.

    Raises:
        LayoutError: Prompts and pixels do not fit together, or there are no ``input_ids``.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise LayoutError("a layout needs the processor's input_ids tensor")
    rows: list[list[VisualItem]] = [[] for _ in range(len(ids))]
    tokens = family.token_ids(base.config)
    for modality in family.given_modalities(inputs):
        items = encoder_items(base, family, modality, inputs)
        grouped = group_rows(items, (ids == tokens[modality]).sum(1).tolist())
        if grouped is None:
            raise LayoutError(
                f"the prompts hold {(ids == tokens[modality]).sum(1).tolist()} {modality} tokens, the pixels make "
                f"items of {[item.size for item in items]}"
            )
        for row, members in zip(rows, grouped, strict=True):
            row += members
    return VisualLayout(tuple(tuple(row) for row in rows))


def text_tokens(base: nn.Module, family: Family, inputs: dict[str, Any]) -> list[int]:
    """Text tokens of every prompt of a processor's output, padding left out."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.ndim != 2 else mask.bool()
    for token in family.token_ids(base.config).values():
        valid = valid & (ids != token)
    counts: list[int] = valid.sum(1).tolist()
    return counts


def weights_fingerprint(base: nn.Module) -> str:
    """A fingerprint of a model's weights: shapes, format and a few numbers of each."""
    digest = hashlib.sha256()
    for name, weight in base.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        if not weight.is_meta:  # offloaded weights are not read in for this
            flat = weight.detach().flatten()
            few = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]
            digest.update(few.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def encoder_items(base: nn.Module, family: Family, modality: Modality, inputs: dict[str, Any]) -> list[VisualItem]:
    """Layout of one modality from the processor's inputs, read under the names the encoder gives them."""
    try:
        return family.items(base, modality, encoder_inputs(base, family, modality, inputs))
    except KeyError as missing:
        raise LayoutError(f"a layout needs {missing} from the processor; got {sorted(inputs)}") from missing


def encoder_inputs(base: nn.Module, family: Family, modality: Modality, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a modality's encoder takes of the processor's inputs, under the names it gives them."""
    names = list(inspect.signature(getattr(base, family.encoders[modality])).parameters)
    return family.encoder_inputs(modality, inputs, names)


def _unwrap(model: Any) -> nn.Module:
    # Pipelines and DDP hold the model in an attribute, PEFT behind a method, torch.compile in _orig_mod.
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
            model = model.model
        else:
            break
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model or a pipeline, got {type(model).__name__}")
    return model
