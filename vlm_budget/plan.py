"""How many tokens every item keeps: promised before selection, checked after it.

A plan is Budget x Layout: exact integers, frozen, JSON round trip, replayable with ``patch(model, method, plan=plan)``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import PlanError

_VERSION = 2
_READABLE = (1, 2)  # version 1 knew no steps inside the language model

FIXED = "fields"
"""What stands as the budget of a method whose fields alone say the schedule."""


@dataclass(frozen=True)
class ItemPlan:
    """Counts of one image or video.

    Attributes:
        row: Batch row.
        modality: ``"image"`` or ``"video"``.
        total: Unpruned visual tokens.
        keep: Visual tokens that enter the language model, at least 1.
        steps: ``(layer, tokens)`` pairs, layers ascending: from decoder layer ``layer`` (0-based) on, ``tokens`` are
            left. Empty where nothing is dropped inside the language model.
    """

    row: int
    modality: str
    total: int
    keep: int
    steps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check the counts."""
        numbers = [self.row, self.total, self.keep, *(n for step in self.steps for n in step)]
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not whole or self.row < 0 or not 1 <= self.keep <= self.total:
            raise PlanError(f"need row >= 0 and 1 <= keep <= total, got {self}")
        layers, counts = [layer for layer, _ in self.steps], [self.keep, *(count for _, count in self.steps), 0]
        if layers != sorted(set(layers)) or any(layer < 1 for layer in layers):
            raise PlanError(f"steps must name ascending layers from 1 on, got {self.steps}")
        if any(after > before for before, after in zip(counts, counts[1:], strict=False)):
            raise PlanError(f"tokens once dropped cannot return: keep {self.keep}, steps {self.steps}")

    def tokens_at(self, layer: int) -> int:
        """Tokens that a decoder layer (0-based) sees."""
        return next((count for start, count in reversed(self.steps) if start <= layer), self.keep)


@dataclass(frozen=True)
class Plan:
    """Exact counts for one batch.

    Attributes:
        method: The method, as ``str(pruner)``.
        budget: The budget the counts came from, as text; :data:`FIXED` where there was none.
        items: Per item, in row order.
        rows: Number of batch rows, text-only rows included.
    """

    method: str
    budget: str
    items: tuple[ItemPlan, ...]
    rows: int

    def __post_init__(self) -> None:
        """Check that every item stands in a row."""
        if not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 0:
            raise PlanError(f"rows must be a number of batch rows, got {self.rows!r}")
        for item in self.items:
            if item.row >= self.rows:
                raise PlanError(f"an item stands in row {item.row}, but the plan has {self.rows} rows")

    @property
    def total(self) -> int:
        """Unpruned visual tokens of the batch."""
        return sum(item.total for item in self.items)

    @property
    def keep(self) -> int:
        """Visual tokens of the batch that enter the language model."""
        return sum(item.keep for item in self.items)

    @property
    def drop_layers(self) -> list[int]:
        """Decoder layers at whose input tokens of some item are dropped, ascending."""
        return sorted({layer for item in self.items for layer, _ in item.steps})

    def mean_tokens(self, layers: int) -> float:
        """Visual tokens per decoder layer, averaged over ``layers`` layers and summed over the batch."""
        return sum(item.tokens_at(layer) for item in self.items for layer in range(layers)) / layers

    def row_tokens(self, row: int, layers: int) -> list[int]:
        """Visual tokens of one prompt at every one of ``layers`` decoder layers."""
        mine = [item for item in self.items if item.row == row]
        return [sum(item.tokens_at(layer) for item in mine) for layer in range(layers)]

    def row_counts(self, sizes: Sequence[Sequence[int]]) -> list[list[int]]:
        """The counts to keep, arranged like the layout they are applied to.

        Args:
            sizes: Token counts per row and item of the batch at hand.

        Raises:
            PlanError: The batch has other rows, items or sizes than the plan was made for.
        """
        mine = [[item for item in self.items if item.row == row] for row in range(self.rows)]
        if [[item.total for item in row] for row in mine] != [list(row) for row in sizes]:
            raise PlanError(
                f"the plan was made for items of {[[item.total for item in row] for row in mine]} tokens per row, "
                f"the input has {[list(row) for row in sizes]}. Make a plan for this input with handle.plan(**inputs)."
            )
        return [[item.keep for item in row] for row in mine]

    def repeated(self, copies: int) -> Plan:
        """The plan of a batch in which every row stands ``copies`` times, one after the other."""
        items = (
            replace(item, row=row * copies + copy)
            for row in range(self.rows)
            for copy in range(copies)
            for item in self.items
            if item.row == row
        )
        return replace(self, items=tuple(items), rows=self.rows * copies)

    def to_json(self) -> str:
        """The plan as JSON text that :meth:`from_json` reads back to an equal plan."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: Not a plan, or from a version this library does not know.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data.pop("version")
            if version not in _READABLE:  # first: another version may differ in everything else
                raise PlanError(f"plan version {version!r} is not supported, expected one of {_READABLE}")
            items = tuple(
                ItemPlan(**{**item, "steps": tuple((layer, count) for layer, count in item.get("steps", ()))})
                for item in data.pop("items")
            )
            return cls(items=items, **data)
        except PlanError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"not a plan: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: The file cannot be read, or is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read plan {str(path)!r}: {error}") from error
        return cls.from_json(text)
