"""The tokens of one prompt on their way through the decoder layers: which are left, and which a method lets go on.

All columns here count a prompt's own tokens, padding left out; how many there are is known without asking the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ..decoder import Captured, DecoderContext, DecoderPruner
from ..errors import SelectionError
from ..layout import VisualItem
from ..pruner import Selection, moved
from .precision import exactly


@dataclass(frozen=True, eq=False)
class ItemTokens:
    """The tokens of one image or video.

    Attributes:
        item: Its geometry.
        counts: Decoder layer to the tokens that go on from there.
        alive: [m] int64 ascending positions in the item of the tokens still there.
        columns: [m] int64, their columns.
    """

    item: VisualItem
    counts: Mapping[int, int]
    alive: torch.Tensor
    columns: torch.Tensor

    def asks(self, layer: int) -> bool:
        """There is a choice to make at a layer."""
        before = min([len(self.alive), *(count for earlier, count in self.counts.items() if earlier < layer)])
        return 0 < self.counts.get(layer, 0) < before


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """The tokens of one prompt.

    Attributes:
        items: Its images and videos, in the plan's order.
        text: [t] int64 ascending columns of its text.
        instruction: [i] int64, of the text behind its last visual token, all text where there is none behind.
        length: Its tokens.
        extra: Tokens behind it that a call brings along (drafts of assisted decoding); no method sees them.
        behind: How many of ``instruction`` stand behind the last visual token: all or none.
    """

    items: tuple[ItemTokens, ...]
    text: torch.Tensor
    instruction: torch.Tensor
    length: int
    extra: int
    behind: int

    @property
    def total(self) -> int:
        """Its tokens and those behind it."""
        return self.length + self.extra

    def to(self, device: torch.device) -> PromptTokens:
        """The same on another device."""
        if self.text.device == device:
            return self
        items = [
            replace(item, alive=moved(item.alive, device), columns=moved(item.columns, device)) for item in self.items
        ]
        text, instruction = moved(self.text, device), moved(self.instruction, device)
        return replace(self, items=tuple(items), text=text, instruction=instruction)


@dataclass(frozen=True, eq=False)
class Passed:
    """What went on at one step.

    Attributes:
        tokens: The prompt behind the step.
        keep: [length + extra] bool, columns before the step that went on.
        values: Columns behind the step and the [k, D] hidden states that replace those of the tokens there.
    """

    tokens: PromptTokens
    keep: torch.Tensor
    values: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Scene:
    """What a method sees of a prompt at one layer; see :class:`vlm_budget.decoder.DecoderContext`."""

    layer: int
    hidden: torch.Tensor
    embeds: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    captured: Captured | None


def first(flags: torch.Tensor, count: int) -> torch.Tensor:
    """[count] int64 ascending positions of the set flags in [n] bool, whose number is known."""
    return flags.to(torch.uint8).argsort(stable=True, descending=True)[:count]


def step(pruner: DecoderPruner, tokens: PromptTokens, scene: Scene) -> Passed:
    """Let every item's promised number of tokens go on.

    Raises:
        SelectionError: The method broke its promise.
    """
    device = scene.hidden.device
    tokens = tokens.to(device)
    chosen = [_choose(pruner, tokens, order, scene) for order in range(len(tokens.items))]
    keep = torch.ones(tokens.total, dtype=torch.bool, device=device)
    for item, selection in zip(tokens.items, chosen, strict=True):
        flags = torch.zeros(len(item.alive), dtype=torch.bool, device=device).index_fill_(0, selection.keep, True)
        keep[item.columns] = flags
    place = keep.cumsum(0) - 1
    dropped = sum(len(item.alive) - len(selection.keep) for item, selection in zip(tokens.items, chosen, strict=True))
    items, values = [], []
    for item, selection in zip(tokens.items, chosen, strict=True):
        columns = place[item.columns[selection.keep]]
        items.append(replace(item, alive=item.alive[selection.keep], columns=columns))
        if selection.values is not None:
            values.append((columns, selection.values))
    left = replace(
        tokens,
        items=tuple(items),
        text=place[tokens.text],
        instruction=place[tokens.instruction],
        length=tokens.length - dropped,
    )
    return Passed(left, keep, values)


def _choose(pruner: DecoderPruner, tokens: PromptTokens, order: int, scene: Scene) -> Selection:
    """Ascending indices into the item's candidates, and the values for them."""
    item, device = tokens.items[order], scene.hidden.device
    if not item.asks(scene.layer):
        left = min(item.counts.get(scene.layer, len(item.alive)), len(item.alive))
        return Selection(torch.arange(left, device=device))
    k = item.counts[scene.layer]
    visual = torch.cat([each.columns for each in tokens.items]).sort().values
    ctx = DecoderContext(
        item=item.item,
        order=order,
        layer=scene.layer,
        alive=item.alive,
        columns=item.columns,
        visual=visual,
        text=tokens.text,
        instruction=tokens.instruction,
        hidden=scene.hidden,
        embeds=scene.embeds,
        norm=scene.norm,
        captured=scene.captured,
        device=device,
        behind=tokens.behind,
    )
    with exactly(device):
        picked = pruner.pick(ctx, k)
    selection = picked if isinstance(picked, Selection) else Selection(picked)
    if fault := _broken_promise(selection, ctx, k):
        raise SelectionError(
            f"{pruner} promised {k} distinct tokens of {len(ctx.alive)} at layer {scene.layer}, and returned {fault}"
        )
    keep = moved(selection.keep, device)
    rank = keep.argsort()
    return Selection(
        keep[rank], None if selection.values is None else selection.values[rank.to(selection.values.device)]
    )


def _broken_promise(selection: Selection, ctx: DecoderContext, k: int) -> str | None:
    keep, values = selection.keep, selection.values
    if not isinstance(keep, torch.Tensor):
        return f"{type(keep).__name__}, not a tensor"
    if keep.shape != (k,) or keep.dtype != torch.long:
        return f"{list(keep.shape)} of {keep.dtype}"
    if values is not None and values.shape != (k, ctx.hidden.shape[-1]):
        return f"values of shape {list(values.shape)}, not {[k, ctx.hidden.shape[-1]]}"
    if keep.device.type != "cpu":
        return None  # looking inside would stop the host; tokens taken twice are counted behind the last layer
    if keep.min() < 0 or keep.max() >= len(ctx.alive):
        return f"indices {int(keep.min())} to {int(keep.max())}"
    return "some of them twice" if len(keep.unique()) < k else None
