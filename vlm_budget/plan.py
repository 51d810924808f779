"""How many tokens every item keeps: promised before selection, checked after it.

A plan is Budget x Layout: exact integers, frozen, JSON round trip, replayable with ``patch(model, method, plan=plan)``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import PlanError

_VERSION = 3
_READABLE = (1, 2, 3)  # version 1 knew no steps inside the language model, version 2 no checksum
_CHECKED = 3
_MODALITIES = ("image", "video")

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
        if self.modality not in _MODALITIES:
            raise PlanError(f"modality must be one of {_MODALITIES}, got {self.modality!r}")
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
        joint: The method shares a prompt's tokens out by what it sees: only the sum over the items of a row is
            promised, and their own counts say what an even hand would give them.
    """

    method: str
    budget: str
    items: tuple[ItemPlan, ...]
    rows: int
    joint: bool = False

    def __post_init__(self) -> None:
        """Check the types, and that every item stands in a row."""
        for name, value in (("method", self.method), ("budget", self.budget)):
            if not isinstance(value, str):
                raise PlanError(f"{name} of a plan is text, got {value!r}")
        if not isinstance(self.rows, int) or isinstance(self.rows, bool) or self.rows < 0:
            raise PlanError(f"rows must be a number of batch rows, got {self.rows!r}")
        if not isinstance(self.joint, bool):
            raise PlanError(f"joint must be true or false, got {self.joint!r}")
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
        content = {"version": _VERSION, **asdict(self)}
        if not self.joint:
            del content["joint"]  # so that plans of other methods read as they always did
        return json.dumps({**content, "checksum": checksum(content)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            PlanError: Not a plan, from a version this library does not know, or edited after it was written.
        """
        data = json_object(text)
        if "version" not in data or "items" not in data:
            raise PlanError("not a plan: it has no 'version' or no 'items'. handle.plan(...).save(path) writes one.")
        version = data["version"]
        if isinstance(version, bool) or version not in _READABLE:  # first: another may differ in everything else
            raise PlanError(f"plan version {version!r} is not supported, expected one of {_READABLE}")
        if version >= _CHECKED and data.pop("checksum", None) != checksum(data):
            raise PlanError(
                "the plan was edited or damaged: its content does not match its checksum. Change a plan with "
                "dataclasses.replace(plan, …) and save it anew."
            )
        del data["version"]
        try:
            items = tuple(
                ItemPlan(**{**item, "steps": tuple((layer, count) for layer, count in item.get("steps", ()))})
                for item in data.pop("items")
            )
            return cls(items=items, **data)
        except PlanError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(f"not a plan: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: The file cannot be read, or is not a plan.
        """
        text = read_text(path)
        with in_file(path):
            return cls.from_json(text)


def json_object(text: str) -> dict[str, Any]:
    """The object that a file of this library holds.

    Raises:
        PlanError: No JSON, cut off, nested out of all measure, or no object.
    """
    try:
        data = json.loads(text)
        checksum(data)  # nested too deep to be written is too deep to be read
    except ValueError as error:
        raise PlanError(f"not a plan: truncated or no JSON ({error})") from error
    except RecursionError as error:
        raise PlanError("not a plan: its JSON is nested too deep") from error
    if not isinstance(data, dict):
        raise PlanError(f"not a plan: the file holds a JSON {type(data).__name__}, not an object")
    return data


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 over what a file says, however it is laid out."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_text(path: str | Path) -> str:
    """The text of a plan's file.

    Raises:
        PlanError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:  # ValueError: a NUL in the path
        raise PlanError(f"cannot read plan {str(path)!r}: {error}") from error


@contextmanager
def in_file(path: str | Path) -> Iterator[None]:
    """Name the file in the message of a :class:`PlanError`."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"plan {str(path)!r}: {error}") from error
