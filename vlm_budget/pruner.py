"""The base of every method: what it may see, what it returns, and all that methods must not differ on.

A method is a frozen dataclass whose fields are its configuration, with one small function, :meth:`Pruner.pick`, that
sees one item at a time. The base owns the newline policy, the order and the exact count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from .allocate import split
from .errors import BudgetError, OptionError, SelectionError
from .transfer import moved as moved

if TYPE_CHECKING:
    from .budget import Budget
    from .layout import VisualItem

Positions = Literal["packed", "original"]
Newline = Literal["drop", "keep_all", "keep_used_rows"]


@dataclass(frozen=True)
class Tower:
    """What a method may know about the vision tower.

    Attributes:
        layers: Number of transformer layers.
        feature_layer: 0-based index of the layer whose output the language model gets (-2 of 24 hidden layers is 22).
        has_cls: The tower has a class token.
    """

    layers: int
    feature_layer: int
    has_cls: bool


@dataclass(frozen=True)
class Attention:
    """A need: what the attention of one layer of the vision tower says of every token.

    Attributes:
        layer: 0-based layer index.
        kind: ``"cls"`` is the class token's softmax row, mean over heads; ``"received"`` the column mean of the
            attention map, mean over heads; ``"joint_cls"`` the class token's row with all heads taken as one, scaled by
            the whole width; ``"keys"`` the key vectors themselves, heads side by side; ``"mean_keys"`` their mean over
            heads.
    """

    layer: int
    kind: Literal["cls", "received", "joint_cls", "keys", "mean_keys"]


def saliency(tower: Tower, layer: int) -> Attention:
    """The CLS row where the tower has a class token, else received attention."""
    return Attention(layer, "cls" if tower.has_cls else "received")


@dataclass(frozen=True)
class Finer:
    """The frames of a video before the model pools them.

    Attributes:
        rows: Grid height of a frame in tokens.
        cols: Grid width.
        of: Index of a partition to its [rows * cols, D] features, projected like those the language model gets.
    """

    rows: int
    cols: int
    of: Callable[[int], torch.Tensor]


def unprojected(rows: torch.Tensor) -> torch.Tensor:
    """The projector of a model whose projector is not applied token by token: none."""
    return rows


@dataclass(frozen=True)
class Context:
    """What a method sees of one item.

    Attributes:
        item: Geometry of the item's tokens.
        attention: For every need the method named, one [T] float32 tensor per partition, ``T = rows * cols``; [T, C]
            for ``"keys"`` and ``"mean_keys"``.
        features: [n, D] features as the language model gets them, in the item's token order.
        order: Position of the item among the items of its prompt (not of the batch, so that a batch of prompts equals
            the single prompts).
        device: Where scores and the selection live.
        hidden: [n, C] what the projector was given for every token, zeros for separators; for methods with
            ``reads_hidden``. Where the projector does not work token by token, these are the features.
        project: [k, C] to [k, D], the model's projector; the identity where ``hidden`` are the features.
        text: [t, D] input embeddings of the instruction (the text behind the last image or video of the prompt, all its
            text where there is none behind), for methods with ``reads_text``.
        text_ids: [t] int64 token ids of the same.
        xyz: [n, 3] float32 on the CPU, where every token lies in the world in metres, NaN for those that lie nowhere;
            for methods with ``reads_views``, None where no views were laid beside the prompt.
        scores: [P] float32 on the CPU, relevance of every partition (frame) to the question; for methods with
            ``reads_frames``, None where no scores were laid beside the prompt.
        finer: The frames before they are pooled, for methods that ``reads_unpooled``; None where they are not.
        mrope: Positions have several axes, so that kept tokens keep their own.
    """

    item: VisualItem
    attention: Mapping[Attention, Sequence[torch.Tensor]]
    features: torch.Tensor
    order: int
    device: torch.device
    hidden: torch.Tensor | None = None
    project: Callable[[torch.Tensor], torch.Tensor] = unprojected
    text: torch.Tensor | None = None
    text_ids: torch.Tensor | None = None
    xyz: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    finer: Finer | None = None
    mrope: bool = False

    @cached_property
    def candidates(self) -> torch.Tensor:
        """[m] int64 on ``device``, the item's candidates. On the CPU these are the item's own: do not write into it."""
        return self.there(self.item.candidates)

    @cached_property
    def separators(self) -> torch.Tensor:
        """[n - m] int64 on ``device``, the item's separators."""
        return self.there(self.item.separators)

    @cached_property
    def partition(self) -> torch.Tensor:
        """[n] int64 on ``device``, the partition of every token; -1 for separators."""
        return self.there(self.item.partition)

    def there(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on ``device``; the host does not wait for a copy to CUDA."""
        return moved(tensor, self.device)

    def in_token_order(self, need: Attention) -> torch.Tensor:
        """[n] or [n, C] float32 of a need, partition by partition brought into token order; zeros for separators."""
        flat = torch.cat(list(self.attention[need]))
        rows, separator = self._rows(flat.device)
        return flat[rows] * ~separator.reshape(-1, *[1] * (flat.ndim - 1))

    def token_scores(self, need: Attention) -> torch.Tensor:
        """[n] float32 scores in token order; ``-inf`` for separators."""
        flat = torch.cat(list(self.attention[need]))
        rows, separator = self._rows(flat.device)
        return flat[rows].masked_fill(separator, float("-inf"))

    def _rows(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return moved(self.item.place, device), moved(self.item.partition < 0, device)


@dataclass(frozen=True)
class Selection:
    """What a method returns for one item.

    Attributes:
        keep: [k] int64 positions in the item, ascending.
        values: [k, D] embeddings that replace the kept tokens (merging methods), or None.
    """

    keep: torch.Tensor
    values: torch.Tensor | None = None


class Merge:
    """Base of merging stages: what becomes of the dropped tokens behind any selector (``merge="token_transforming"``).

    A subclass is a frozen, keyword-only dataclass with :meth:`merge`.
    """

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """The attention scores the stage wants from the vision tower."""
        return ()

    def merge(self, ctx: Context, keep: torch.Tensor) -> torch.Tensor:
        """New embeddings of the kept tokens.

        Args:
            ctx: The item.
            keep: [k] int64 positions of the kept patch tokens.

        Returns:
            [k, D].
        """
        raise NotImplementedError(f"{type(self).__name__} must implement merge()")


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """Base of all methods that act before the language model. Fields are the configuration; ``str()`` reproduces it.

    Attributes:
        positions: ``"packed"`` renumbers the kept tokens without gaps; ``"original"`` keeps each token's position id.
            Models with M-RoPE always use the original positions.
        newline: What happens to row separators, which count towards the budget when kept. ``"drop"`` keeps them only
            when the budget exceeds the number of patch tokens; ``"keep_all"`` reserves room for every one;
            ``"keep_used_rows"`` for those of the rows that keep a patch, for which the host waits for the device a few
            times per item.
        merge: A :class:`Merge` that moves what the dropped tokens say into the kept ones, or None to let it go.
    """

    positions: Positions = "packed"
    newline: Newline = "drop"
    merge: Merge | None = None

    stage: ClassVar[Literal["vision", "decoder"]] = "vision"
    paper: ClassVar[str] = ""
    reads_hidden: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    reads_views: ClassVar[bool] = False
    reads_frames: ClassVar[bool] = False
    merges: ClassVar[bool] = False  # the method returns embeddings of its own: no merging stage fits behind it

    def __post_init__(self) -> None:
        """Check the common fields."""
        for name, allowed in (
            ("positions", ("packed", "original")),
            ("newline", ("drop", "keep_all", "keep_used_rows")),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.merge, Merge | None):
            raise OptionError(f"merge must be a Merge or None, got {self.merge!r}")
        if self.merges and self.merge is not None:
            raise OptionError(f"{type(self).__name__} merges on its own; merge={self.merge!r} would have nothing to do")
        if self.joint and self.merge is not None:
            raise OptionError(f"merge={self.merge!r} works item by item, and this method chooses among all of a prompt")

    def all_needs(self, tower: Tower) -> tuple[Attention, ...]:
        """The needs of the method and of its merging stage."""
        more = self.merge.needs(tower) if self.merge is not None else ()
        return tuple(dict.fromkeys([*self.needs(tower), *more]))

    @property
    def wants_hidden(self) -> bool:
        """The projector's inputs are wanted, by the method or by its merging stage."""
        return self.reads_hidden or self.merge is not None

    @property
    def joint(self) -> bool:
        """The method chooses among all items of a prompt at once, by :meth:`pick_prompt`; else item by item."""
        return False

    @property
    def reads_unpooled(self) -> bool:
        """The method wants a video's frames as they are before the model pools them (``Context.finer``)."""
        return False

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """The attention scores the method wants from the vision tower."""
        return ()

    def pick_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        """Choose ``k`` tokens of a prompt, for methods that are :attr:`joint`; separators are theirs to keep or drop.

        Args:
            contexts: Its items, images first, then videos.
            k: How many, less than the items have.

        Returns:
            Positions among the tokens of all items laid end to end, in any order. An item may keep none.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement pick_prompt()")

    def pick(self, ctx: Context, k: int) -> torch.Tensor | Selection:
        """Choose ``k`` of the item's candidates.

        Args:
            ctx: The item.
            k: How many, between 1 and ``len(ctx.item.candidates)``.

        Returns:
            [k] distinct positions in the item, in any order, or a :class:`Selection` when embeddings are merged.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement pick()")

    def tokens(self, budget: Budget, items: Sequence[VisualItem]) -> int:
        """How many tokens a prompt may keep. Ratios are of its unpruned visual tokens."""
        return budget.tokens(sum(item.size for item in items), len(items))

    def shares(self, budget: Budget, items: Sequence[VisualItem]) -> list[int]:
        """Tokens per item of a prompt, summing to :meth:`tokens`: in proportion to size, at least one each."""
        sizes = [item.size for item in items]
        return split(self.tokens(budget, items), sizes, sizes, [1] * len(sizes))

    def select(self, ctx: Context, k: int) -> Selection:
        """Choose exactly ``k`` tokens of the item, newline policy included.

        Raises:
            BudgetError: ``newline="keep_all"`` leaves no room for a patch token.
            SelectionError: :meth:`pick` broke its promise.
        """
        item = ctx.item
        separators = ctx.separators
        available = item.size - len(separators)
        if self.newline == "drop" or not len(separators):
            patches = min(k, available)
            chosen = self._checked_pick(ctx, patches)
            return self._with_separators(ctx, chosen, separators[: k - patches], k)
        if self.newline == "keep_all":
            if k <= len(separators):
                raise BudgetError(
                    f"newline='keep_all' keeps {len(separators)} row separators, which leaves none of {k} tokens for "
                    f"the picture. The nearest feasible count is {len(separators) + 1}; or use newline='drop'."
                )
            return self._with_separators(ctx, self._checked_pick(ctx, k - len(separators)), separators, k)
        return self._select_used_rows(ctx, separators, k, available)

    def select_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        """Exactly ``k`` tokens of a prompt's items laid end to end, ascending; else a SelectionError."""
        selection = self.pick_prompt(contexts, k)
        sizes, width = [ctx.item.size for ctx in contexts], contexts[0].features.shape[-1]
        if fault := _broken_counts(selection, k, sum(sizes), width):
            raise SelectionError(f"{self} promised {k} distinct tokens of the prompt, and returned {fault}")
        keep = contexts[0].there(selection.keep)
        order = keep.argsort()
        return Selection(keep[order], None if selection.values is None else selection.values[order])

    def _select_used_rows(self, ctx: Context, separators: torch.Tensor, k: int, available: int) -> Selection:
        line = ctx.there(ctx.item.line)
        # The most patches whose rows' separators still fit, by bisection: exact for methods whose smaller choice is
        # part of the larger one, close for others. What is left over goes to the separators of unused rows.
        low, high = max(1, k - len(separators)), min(k, available)  # with ``low``, room is left for every separator
        chosen = None
        while low < high:
            middle = (low + high + 1) // 2
            picked = self._checked_pick(ctx, middle)
            if int(torch.isin(line[separators], line[picked.keep]).sum()) <= k - middle:
                low, chosen = middle, picked
            else:
                high = middle - 1
        chosen = chosen or self._checked_pick(ctx, low)
        unused = ~torch.isin(line[separators], line[chosen.keep])
        ranked = separators[torch.argsort(unused, stable=True)]
        return self._with_separators(ctx, chosen, ranked[: k - low], k)

    def _checked_pick(self, ctx: Context, k: int) -> Selection:
        if k == 0:
            return Selection(torch.empty(0, dtype=torch.long, device=ctx.device))
        picked = self.pick(ctx, k)
        selection = picked if isinstance(picked, Selection) else Selection(picked)
        if fault := _broken_promise(selection, ctx, k):
            raise SelectionError(f"{self} promised {k} distinct patch tokens, and returned {fault}")
        keep = ctx.there(selection.keep)
        order = keep.argsort()
        values = None if selection.values is None else selection.values[order]
        if self.merge is not None and values is None:
            values = self.merge.merge(ctx, keep[order])
        return Selection(keep[order], values)

    def _with_separators(self, ctx: Context, chosen: Selection, extra: torch.Tensor, k: int) -> Selection:
        if not len(extra):
            return chosen
        keep, order = torch.cat([chosen.keep, extra]).sort()
        values = None
        if chosen.values is not None:
            values = torch.cat([chosen.values, ctx.features[extra].to(chosen.values)])[order]
        return Selection(keep, values)

    def __str__(self) -> str:
        """The constructor call that makes an equal pruner, leaving out defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def _broken_promise(selection: Selection, ctx: Context, k: int) -> str | None:
    item = ctx.item
    if fault := _broken_counts(selection, k, item.size, ctx.features.shape[-1]):
        return fault
    keep = selection.keep
    return "separators among them" if keep.device.type == "cpu" and (item.partition[keep] < 0).any() else None


def _broken_counts(selection: Selection, k: int, size: int, width: int) -> str | None:
    """What is wrong with a choice of ``k`` among ``size`` tokens."""
    keep, values = selection.keep, selection.values
    if not isinstance(keep, torch.Tensor):
        return f"{type(keep).__name__}, not a tensor"
    if keep.shape != (k,) or keep.dtype != torch.long:
        return f"{list(keep.shape)} of {keep.dtype}"
    if values is not None and values.shape != (k, width):
        return f"values of shape {list(values.shape)}, not {[k, width]}"
    if keep.device.type != "cpu":
        return None  # looking inside would stop the host; the engine's count still catches a token taken twice
    if keep.min() < 0 or keep.max() >= size:
        return f"positions {int(keep.min())} to {int(keep.max())} in an item of {size}"
    return "some of them twice" if len(keep.unique()) < k else None
