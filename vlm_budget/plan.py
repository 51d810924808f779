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

_VERSION = 1


@dataclass(frozen=True)
class ItemPlan:
    """Counts of one image or video.

    Attributes:
        row: Batch row.
        modality: ``"image"`` or ``"video"``.
        total: Unpruned visual tokens.
        keep: Visual tokens to keep, at least 1.
    """

    row: int
    modality: str
    total: int
    keep: int

    def __post_init__(self) -> None:
        """Check the counts."""
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.row, self.total, self.keep))
        if not whole or self.row < 0 or not 1 <= self.keep <= self.total:
            raise PlanError(f"need row >= 0 and 1 <= keep <= total, got {self}")


@dataclass(frozen=True)
class Plan:
    """Exact counts for one batch.

    Attributes:
        method: The method, as ``str(pruner)``.
        budget: The budget the counts came from, as text.
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
        """Visual tokens kept in the batch."""
        return sum(item.keep for item in self.items)

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
            if version != _VERSION:  # first: another version may differ in everything else
                raise PlanError(f"plan version {version!r} is not supported, expected {_VERSION}")
            items = tuple(ItemPlan(**item) for item in data.pop("items"))
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
