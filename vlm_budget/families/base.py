"""What the engine must know about a family of VLMs.

A family answers where things are (towers, decoder, placeholders) and how the model packs its visual tokens; it never
prunes. Most families are the class attributes below and one method, :meth:`Family.items`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn

from ..errors import LayoutError, PatchError
from ..geometry import Fit
from ..layout import Modality, Partition, PartitionKind, VisualItem
from ..pruner import Tower
from ..transfer import moved
from . import flops

# Torch types the attributes of a module as tensors or modules; those of transformers' models are much else besides.
Model: TypeAlias = Any

_PIXELS: dict[Modality, tuple[str, ...]] = {
    "image": ("pixel_values", "image_hidden_states"),
    "video": ("pixel_values_videos",),
}


class Family:
    """Base of all families: the answers for "patch encoder, projector, decoder" models such as LLaVA.

    Attributes:
        models: Names of the transformers classes, outer and inner.
        encoders: Per modality, the method of the inner model that encodes it.
        sizes: Per modality, what numbers among the encoder's arguments decide the layout: the name that :meth:`items`
            has for them, and the argument that :meth:`measure` reads them from.
        mrope: Position ids have several axes, so kept tokens always keep their original positions.
        cls: The vision tower has a class token.
    """

    models: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[Mapping[Modality, str]] = {"image": "get_image_features"}
    sizes: ClassVar[Mapping[Modality, Mapping[str, str]]] = {}
    mrope: ClassVar[bool] = False

    # --- where things are ------------------------------------------------------------------------------------------

    def base(self, model: Model) -> Model:
        """The inner model that holds vision tower and language model."""
        return model.model if type(model).__name__.endswith("ForConditionalGeneration") else model

    def language_model(self, base: Model) -> nn.Module:
        """The decoder whose inputs are shortened."""
        return base.language_model

    def deepstack_levels(self, base: Model) -> int:
        """How many of the decoder's first layers have visual features added to their output."""
        return len(getattr(base.config.vision_config, "deepstack_visual_indexes", ()))

    def vision_tower(self, base: Model) -> nn.Module:
        """The patch encoder."""
        return base.vision_tower

    def vision_layers(self, base: Model) -> Sequence[nn.Module]:
        """The transformer layers of the vision tower."""
        tower = self.vision_tower(base)
        inner: Model = getattr(tower, "vision_model", tower)
        return inner.encoder.layers

    def vision_attention(self, base: Model, layer: int) -> nn.Module:
        """The attention module of a vision layer.

        Raises:
            PatchError: There is no such layer.
        """
        layers = self.vision_layers(base)
        if not 0 <= layer < len(layers):
            raise PatchError(f"the vision tower has layers 0 to {len(layers) - 1}, there is no layer {layer}")
        return self.layer_attention(layers[layer])

    def layer_attention(self, layer: Model) -> nn.Module:
        """The attention module inside a vision layer."""
        return layer.self_attn

    def projector(self, base: Model, modality: Modality) -> nn.Module | None:
        """The module whose input rows are the projector's inputs, one for each token before packing.

        None where there is no such row for a token, because tokens are pooled behind the projector.
        """
        return base.multi_modal_projector

    def unpooled(self, base: Model, modality: Modality) -> nn.Module | None:
        """The module whose input are frames before they are pooled, [frames, patches, C] as :meth:`project` takes them.

        None where the language model gets every frame as the projector gives it.
        """
        return None

    def project(self, base: Model, rows: torch.Tensor) -> torch.Tensor:
        """[k, C] rows as :meth:`projector` is given them, to [k, D] features as the language model gets them."""
        module = self.projector(base, "image")
        assert module is not None, "every family projects images"
        return module(rows)

    def tower(self, base: Model) -> Tower:
        """What methods may know about the vision tower."""
        layers = len(self.vision_layers(base))
        return Tower(layers, self.feature_layer(base.config, layers), self.has_cls(base))

    def feature_layer(self, config: Any, layers: int) -> int:
        """0-based index of the layer whose output the language model gets (the deepest, if several)."""
        chosen = getattr(config, "vision_feature_layer", -1)
        indices = [chosen] if isinstance(chosen, int) else list(chosen)
        # hidden_states[0] is the embedding, hidden_states[i] the output of layer i - 1.
        return max((i - 1 if i >= 0 else layers + i) for i in indices)

    def has_cls(self, base: Model) -> bool:
        """The vision tower has a class token in front."""
        tower = self.vision_tower(base)
        embeddings = getattr(getattr(tower, "vision_model", tower), "embeddings", None)
        return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))

    def token_ids(self, config: Any) -> dict[Modality, int]:
        """Placeholder token per modality."""
        found: dict[Modality, int] = {}
        for modality in self.encoders:
            for name in (f"{modality}_token_id", f"{modality}_token_index"):
                if getattr(config, name, None) is not None:
                    found[modality] = getattr(config, name)
        return found

    def given_modalities(self, kwargs: Mapping[str, Any]) -> list[Modality]:
        """Modalities this call of the inner model brings: as pixels, or encoded before (transformers >= 5.19)."""
        encoded = kwargs.get("mm_encoder_outputs") or {}
        return [
            modality
            for modality in self.encoders
            if encoded.get(modality) is not None or any(kwargs.get(name) is not None for name in _PIXELS[modality])
        ]

    def encoder_inputs(self, modality: Modality, inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Processor output under the names of the encoder's parameters."""
        chosen = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if modality == "video" and "pixel_values" in names:
            chosen["pixel_values"] = inputs["pixel_values_videos"]
        return chosen

    # --- what encoding costs ---------------------------------------------------------------------------------------

    def encoder_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """FLOPs of encoding items: vision tower and projector, which run in full whatever is pruned."""
        return flops.encoder_flops(self, base, modality, items)

    def tower_patches(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> list[int]:
        """Patches of every picture that the tower is given."""
        vision = base.config.vision_config
        return [(vision.image_size // vision.patch_size) ** 2 for item in items for _ in item.partitions]

    def tower_sequences(self, base: Model, modality: Modality, items: Sequence[VisualItem], layer: int) -> list[int]:
        """Lengths of the sequences within which a layer of the tower attends, class tokens included."""
        return [patches + self.has_cls(base) for patches in self.tower_patches(base, modality, items)]

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """FLOPs from the tower's output to the language model's input; by default, every patch is projected."""
        return flops.linear_flops(base.multi_modal_projector) * sum(self.tower_patches(base, modality, items))

    # --- how tokens are packed -------------------------------------------------------------------------------------

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """Layout of every image or video of an encoder call, from the processor's inputs alone.

        Args:
            base: The inner model.
            modality: Which encoder is called.
            inputs: Its arguments by name. A patched model hands over on the host what ``sizes`` names.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement items()")

    def measure(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """What the host must know of an argument, in whole numbers on the device of the argument.

        Args:
            name: As :meth:`items` has it.
            given: The argument.
        """
        return given

    def fit(self, base: Model, modality: Modality, item: VisualItem) -> Fit:
        """What the family's processor does to a picture or frame, as released models have it set.

        By default it is squeezed into the tower's square, of which a rest that is no whole patch is not looked at.
        """
        pixels, patch = (
            side if isinstance(side, int) else side[0]
            for side in (base.config.vision_config.image_size, base.config.vision_config.patch_size)
        )
        return Fit(covered=pixels // patch * patch / pixels)

    def features(self, base: Model, modality: Modality, output: Any, items: Sequence[VisualItem]) -> list[torch.Tensor]:
        """The encoder's output per item, [n, D] in token order.

        Raises:
            LayoutError: Its length is not what the items say.
        """
        packed = flatten_features(getattr(output, "pooler_output", output))
        # What is seen of an output is tied to it. A view would hold the output in turn, out of sight of Python's
        # collector, and neither would ever be freed.
        packed = packed.clone() if packed.requires_grad else packed.detach()
        sizes = [item.size for item in items]
        if len(packed) != sum(sizes):
            raise LayoutError(
                f"{type(base).__name__} encoded {len(packed)} {modality} tokens, its layout says {sizes}. This is a "
                "bug in the family, or a transformers version it does not know."
            )
        return list(packed.split(sizes))

    def token_attention(
        self,
        base: Model,
        modality: Modality,
        kind: str,
        calls: Sequence[torch.Tensor],
        items: Sequence[VisualItem],
        inputs: Mapping[str, Any],
    ) -> list[list[torch.Tensor]]:
        """Probe rows as scores (or keys) of tokens; tokens made of several patches take the mean over them.

        Args:
            base: The inner model.
            modality: Which encoder ran.
            kind: Of the need, see :class:`vlm_budget.pruner.Attention`.
            calls: [P, N] rows over the tower's own sequence (class token included), one tensor per call of the module;
                [P, N, C] keys.
            items: The layout of the call.
            inputs: The encoder's arguments by name.

        Returns:
            Per item, per partition, [rows * cols] float32, or [rows * cols, C] keys.

        Raises:
            LayoutError: The tower saw other partitions or patches than the layout has.
        """
        rows = torch.cat(list(calls))
        count = sum(len(item.partitions) for item in items)
        if len(rows) != count:
            raise LayoutError(f"the vision tower saw {len(rows)} partitions, the layout has {count}")
        patches = rows[:, 1:] if self.has_cls(base) else rows
        if patches.ndim == 3:
            channels = patches.transpose(1, 2)
            pooled = self.pool_attention(base, modality, channels.flatten(0, 1))
            tokens = pooled.unflatten(0, channels.shape[:2]).transpose(1, 2)
        else:
            tokens = self.pool_attention(base, modality, patches)
        queue = iter(tokens)
        return [[next(queue) for _ in item.partitions] for item in items]

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """[P, N] scores of tower patches to [P, T] scores of tokens; models that merge patches average their scores.

        Linear in the scores, so that it also takes the channels of keys, one row each.
        """
        return patches

    def token_hidden(
        self, base: Model, calls: Sequence[torch.Tensor], items: Sequence[VisualItem]
    ) -> list[torch.Tensor | None]:
        """The projector's inputs in token order.

        Args:
            base: The inner model.
            calls: What :meth:`projector` was given, [..., C] per call, partition by partition.
            items: The layout of the encoder call.

        Returns:
            Per item [n, C], zeros for separators; None for items that are resampled behind the projector.

        Raises:
            LayoutError: The projector was not called, or saw other rows than the layout has.
        """
        sizes = [sum(grid.rows * grid.cols for grid in item.partitions) for item in items]
        seen = sum(call.shape[:-1].numel() for call in calls)
        if seen != sum(sizes):
            raise LayoutError(
                f"the projector was seen to get {seen} rows, the layout has {sum(sizes)}. A vision tower or projector "
                "that was compiled on its own hides them; else this is a transformers version the family does not know."
            )
        rows = self.from_tower_order(base, torch.cat([call.reshape(-1, call.shape[-1]) for call in calls]), items)
        parts = zip(items, rows.split(sizes), strict=True)
        return [None if item.resampled else _by_token(item, part) for item, part in parts]

    def tower_order(self, base: Model, items: Sequence[VisualItem]) -> torch.Tensor | None:
        """[N] int64, for each token in the tower's order its place among the tokens; None when they are the same."""
        return None

    def from_tower_order(self, base: Model, rows: torch.Tensor, items: Sequence[VisualItem]) -> torch.Tensor:
        """[N, ...] rows per token, from the tower's order into that of the items' partitions."""
        order = self.tower_order(base, items)
        return rows if order is None else rows[moved(order.argsort(), rows.device)]


def _by_token(item: VisualItem, rows: torch.Tensor) -> torch.Tensor:
    """[T, C] rows, partition by partition, to [n, C] in token order."""
    if torch.equal(item.place, torch.arange(len(rows))):
        return rows
    separator = moved(item.partition < 0, rows.device)
    return rows[moved(item.place, rows.device)].masked_fill(separator[:, None], 0)


def flatten_features(features: Any) -> torch.Tensor:
    """Encoder output in any of transformers' containers to [N, D]."""
    if isinstance(features, torch.Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def grid_item(modality: Modality, partitions: Sequence[Partition]) -> VisualItem:
    """An item whose tokens are its partitions' grids one after the other, with no separators."""
    sizes = [grid.rows * grid.cols for grid in partitions]
    partition = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    patch = torch.cat([torch.arange(size) for size in sizes])
    return VisualItem(modality, tuple(partitions), partition, patch, torch.full_like(patch, -1))


def square_item(kind: PartitionKind, side: int) -> VisualItem:
    """An image that is one square grid."""
    return grid_item("image", [Partition(kind, side, side)])


def mean_pool(scores: torch.Tensor, side: int, factor: int) -> torch.Tensor:
    """[P, side * side] patch scores to [P, (side // factor) ** 2] means of ``factor x factor`` neighbourhoods."""
    small = side // factor
    blocks = scores.reshape(-1, small, factor, small, factor)
    return blocks.mean((2, 4)).reshape(-1, small * small)
