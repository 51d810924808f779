"""The base of methods that drop visual tokens inside the language model, at the input of chosen decoder layers.

At prefill a method is asked once per step and item: which of the tokens still there go on. It sees the queries and keys
of one attention layer, so that it can compute the few attention rows it ranks by, on any attention backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from .errors import OptionError, PatchError
from .ops import attention_rows, runs_kernel
from .pruner import Positions, Pruner, Selection

if TYPE_CHECKING:
    from .layout import VisualItem
    from .triton_kernels.attention_rows import Reduce


@dataclass(frozen=True)
class Step:
    """One drop.

    Attributes:
        layer: 0-based index of the first decoder layer that sees only the kept tokens, at least 1.
        keep: Visual tokens of the prompt that go on.
    """

    layer: int
    keep: int


@dataclass(frozen=True, eq=False)
class Captured:
    """Queries and keys of one attention layer, for one prompt without padding (S columns).

    Attributes:
        query: [H, S, d] after rotary embedding.
        key: [Hkv, S, d] after rotary embedding; grouped heads are not repeated.
        scaling: Factor on the logits.
        visible: [S, S] bool, which column (last axis) a query may see; None for plain causal attention.
        cos: [S, d] of the rotary embedding, None where positions have several axes (M-RoPE).
        sin: [S, d], same.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    visible: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[H, r, S] float32 scaled logits of chosen queries; ``-inf`` where a query may not look."""
        key = self.key
        if len(key) != len(self.query):
            key = key.repeat_interleave(len(self.query) // len(key), 0)
        logits = self.query[:, rows].float() @ key.float().transpose(-1, -2) * self.scaling
        if self.visible is None:
            seen = torch.arange(key.shape[1], device=key.device)[None] <= rows[:, None]
        else:
            seen = self.visible[rows]
        return logits.masked_fill(~seen, float("-inf"))

    def attention(self, rows: torch.Tensor, reduce: Reduce = "none") -> torch.Tensor:
        """[H, r, S] float32 softmax rows of chosen queries; [r, S] where heads are reduced.

        Args:
            rows: [r] int64 columns of the queries.
            reduce: What to do with heads, as for :func:`vlm_budget.ops.attention_rows`.
        """
        query, key = self.query[None, :, rows], self.key[None]
        if self.visible is None:
            found = attention_rows(query, key, self.scaling, stop=rows[None] + 1, reduce=reduce)
        else:
            found = attention_rows(query, key, self.scaling, mask=self.visible[rows][None, None], reduce=reduce)
        return found[0]


@dataclass(frozen=True, eq=False)
class DecoderContext:
    """What a method sees of one item at one step. Columns count the prompt's tokens still there, padding left out.

    Attributes:
        item: Geometry of the item's tokens.
        order: Position of the item among the items of its prompt.
        layer: The step's layer.
        alive: [m] int64 ascending positions in the item of the tokens still there: the candidates.
        columns: [m] int64, the column of each.
        visual: [v] int64 ascending columns of all visual tokens of the prompt.
        text: [t] int64 ascending columns of its text.
        instruction: [i] int64, those of the text behind the last visual token; all text where there is none behind.
        hidden: [S, D] hidden states at the layer's input.
        embeds: [S, D] what entered the language model for the same columns.
        norm: The language model's final norm, for methods that compare normalised states.
        captured: Queries and keys of the layer the method asked for, None for ``scores="none"``.
        device: Where all of this lives.
        behind: How many of ``instruction`` stand behind the last visual token, 0 where none does.
    """

    item: VisualItem
    order: int
    layer: int
    alive: torch.Tensor
    columns: torch.Tensor
    visual: torch.Tensor
    text: torch.Tensor
    instruction: torch.Tensor
    hidden: torch.Tensor
    embeds: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]
    captured: Captured | None
    device: torch.device
    behind: int

    @property
    def last(self) -> torch.Tensor:
        """[1] int64, the last column: the token whose prediction comes next."""
        return torch.full((1,), self.hidden.shape[0] - 1, dtype=torch.long, device=self.device)

    @property
    def readers(self) -> torch.Tensor:
        """Int64 columns of the text that has seen all visual tokens; the last column where no text is behind them."""
        return self.instruction if self.behind else self.last

    def attention(self, rows: torch.Tensor) -> torch.Tensor:
        """[H, r, m] float32: how much the queries at ``rows`` look at each candidate."""
        assert self.captured is not None, "the method asked for no scores"
        return self.captured.attention(rows)[..., self.columns]


_ROWS = 64  # attention rows held at a time: [H, 64, S] float32


def received_from(ctx: DecoderContext, rows: torch.Tensor) -> torch.Tensor:
    """[m] float32: the attention each candidate gets from the queries at ``rows``, mean over heads and queries."""
    seen = ctx.captured
    assert seen is not None, "the method asked for no scores"
    if runs_kernel(seen.query, seen.key):
        total = seen.attention(rows, "sum").sum(0)[ctx.columns]
    else:
        total = torch.stack([ctx.attention(part).sum((0, 1)) for part in rows.split(_ROWS)]).sum(0)
    return total / (len(rows) * len(seen.query))


def most_attended(ctx: DecoderContext, rows: torch.Tensor, k: int) -> torch.Tensor:
    """[k] int64 indices of the candidates that the queries at ``rows`` look at most; ties go to the lower index."""
    return received_from(ctx, rows).argsort(descending=True, stable=True)[:k]


def too_early(who: object, layer: int, first: int, advice: str) -> PatchError:
    """The error for a drop where visual features are still being added."""
    return PatchError(
        f"{who} drops tokens at the input of decoder layer {layer}, but this model adds visual features behind each of "
        f"its first {first} layers, so that tokens can be dropped at layer {first} at the earliest. {advice}"
    )


@dataclass(frozen=True, kw_only=True)
class DecoderPruner(Pruner):
    """Base of methods that drop inside the language model.

    The budget is the mean number of visual tokens over the decoder layers, the field's way of counting: 0.2 means that
    a layer sees 20 % of them on average.

    Attributes:
        positions: ``"original"`` keeps each token's rotary position, ``"packed"`` renumbers after every step, for the
            layers behind it. Models with M-RoPE always use the original positions.
    """

    positions: Positions = "original"

    stage: ClassVar[Literal["vision", "decoder"]] = "decoder"
    scores: ClassVar[Literal["previous", "own", "none"]] = "previous"
    """Whose queries and keys the method sees: of the layer before the step (free), of the step's own layer computed
    from its full input (one more projection of queries and keys), or of none."""
    layer_field: ClassVar[str | None] = None
    """The field that says by number at which layer the first drop is; None where the budget or the depth says so."""

    def __post_init__(self) -> None:
        """Check the common fields."""
        super().__post_init__()
        if self.newline != "drop" or self.merge is not None:
            raise OptionError(
                "newline and merge are for methods before the language model; here all visual tokens rank"
            )

    @property
    def fixed(self) -> bool:
        """The fields alone say the schedule, so the method takes no budget of its own."""
        return False

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """How many visual tokens of a prompt go on at which layer.

        Args:
            tokens: Visual tokens that enter the language model, at least 1.
            spend: Visual tokens summed over all layers that the budget allows, ``tokens * layers`` for all of them;
                None where the method is ``fixed``.
            layers: Decoder layers.

        Returns:
            Steps with ascending layers and never growing counts; empty to keep all.

        Raises:
            BudgetError: The method cannot reach ``spend``; the message names the nearest share it can.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement schedule()")

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """The :meth:`schedule` in a model that may drop at the input of layer ``first`` at the earliest.

        Qwen3-VL adds visual features behind its first layers, which must see all tokens; other models have ``first=1``.
        Methods that can start later than they would override this; the base refuses a numbered layer before ``first``.

        Args:
            first: First layer at whose input tokens may be dropped, at least 1 and below ``layers``.
            tokens: As for :meth:`schedule`.
            spend: Same.
            layers: Same.

        Raises:
            BudgetError: The method cannot reach ``spend``.
            PatchError: A field says to drop before ``first``; the message names it.
        """
        if self.layer_field is not None:
            layer = getattr(self, self.layer_field)
            if layer is not None and layer < first:
                raise too_early(self, layer, first, f"Pass {self.layer_field}={first}, or more.")
        return self.schedule(tokens, spend, layers)

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor | Selection:  # type: ignore[override]
        """Choose ``k`` of the candidates.

        Args:
            ctx: The item at this step.
            k: How many, between 1 and ``len(ctx.alive) - 1``; the base does not ask where all or none stay.

        Returns:
            [k] distinct indices into ``ctx.alive``, in any order, or a :class:`Selection` of them with [k, D] hidden
            states that replace those of the kept tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement pick()")
