"""From a dataset's records to samples: fields are checked one by one, and a faulty record does not end the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_budget.errors import DataError
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import require

Record = Mapping[str, Any]


def samples(
    records: Iterable[Any], build: Callable[[Record, int], Sample], what: str = "record"
) -> Iterator[Sample | Broken]:
    """A sample for every record.

    A record that is no object, that ``build`` refuses with :class:`DataError`, or whose id was there before, comes as
    :class:`Broken`; so does one that is :class:`Broken` already.

    Args:
        records: In the dataset's order.
        build: Record and its number, from 1 on, to its sample.
        what: What a record is called in errors, such as ``"POPE random, record"``.
    """
    seen: set[str] = set()
    for number, record in enumerate(records, 1):
        if isinstance(record, Broken):
            yield record
            continue
        try:
            if not isinstance(record, Mapping):
                raise DataError(f"a {type(record).__name__} where an object with fields is expected")
            sample = build(record, number)
            if sample.id in seen:
                raise DataError(f"id {sample.id!r} was there before")
        except DataError as error:
            yield Broken(f"{what} {number}", str(error))
            continue
        seen.add(sample.id)
        yield sample


def text(record: Record, name: str) -> str:
    """A field that is a text, kept as it is.

    Raises:
        DataError: It is missing, or no text.
    """
    (value,) = require(record, [name])
    if not isinstance(value, str):
        raise DataError(f"{name!r} is a {type(value).__name__}, a text is expected")
    return value


def texts(record: Record, name: str, count: int | None = None) -> tuple[str, ...]:
    """A field that is a list of texts, one at least.

    Args:
        record: The record.
        name: The field.
        count: How many there must be.

    Raises:
        DataError: It is missing, empty, of another length, or no list of texts.
    """
    (value,) = require(record, [name])
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) for one in value):
        raise DataError(f"{name!r} must be a list of texts, one at least, got {str(value)[:80]!r}")
    if count is not None and len(value) != count:
        raise DataError(f"{name!r} has {len(value)} entries, {count} are expected")
    return tuple(value)


def identifier(record: Record, name: str) -> str:
    """A field that is a number or a text, as text.

    Raises:
        DataError: It is missing, empty, or neither.
    """
    (value,) = require(record, [name])
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{name!r} must be a whole number or a text, got {str(value)[:80]!r}")
    return str(value)


def optional(record: Record, name: str) -> str:
    """A field as text, or the empty text: for what only reports group by."""
    value = record.get(name)
    return value if isinstance(value, str) else ""


def yes_no(record: Record, name: str) -> str:
    """A field that says yes or no, in small letters.

    Raises:
        DataError: It says neither.
    """
    value = text(record, name).strip().rstrip(".").lower()
    if value not in ("yes", "no"):
        raise DataError(f"{name!r} must be yes or no, got {value[:80]!r}")
    return value


def picture(record: Record, name: str, column: str = "image") -> Picture:
    """The picture in a hub dataset's row: decoded, as bytes, or as a mapping with ``bytes``.

    Args:
        record: The row.
        name: What reports call it.
        column: Where it stands.

    Raises:
        DataError: It is missing, or none of these.
    """
    (value,) = require(record, [column])
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if not isinstance(value, bytes | Image.Image):
        raise DataError(f"{column!r} holds no picture but a {type(value).__name__}")
    return Picture(name, value)


def fingerprint(shown: Picture) -> str:
    """A short name for a picture's content, to group questions where a dataset does not name its pictures."""
    data = shown.source.tobytes() if isinstance(shown.source, Image.Image) else shown.source
    return hashlib.blake2b(data if isinstance(data, bytes) else str(data).encode(), digest_size=8).hexdigest()


def first_folder(root: Path, *names: str) -> Path:
    """The first of some folders below a dataset's own that is there.

    It may be a link to elsewhere, as one to COCO's photographs often is: no record chose it.

    Raises:
        DataError: None is.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{str(root)!r} has no folder {' or '.join(names)}: is it the dataset's own layout?")
