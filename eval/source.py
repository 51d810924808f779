"""Where a dataset's records come from: files in a local folder, or a dataset that the ``datasets`` library gives.

Loaders ask for files by name or for the rows of the hub's dataset; what is missing or damaged is said in one way.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError, MissingExtraError
from vlm_budget.eval.sample import Broken, inside

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # pictures stand as base64 text in some tables


@dataclass(frozen=True)
class Source:
    """A dataset.

    Attributes:
        root: Its folder; None for one from the hub, or one that a task makes itself.
        hub: Its name on the hub (or a folder in the hub's format that ``datasets`` reads), with an optional
            configuration behind a comma: ``"lmms-lab/POPE"``, ``"lmms-lab/DocVQA,DocVQA"``.
        split: Which part of it.
        seed: For tasks that draw their samples.
        limit: Samples that are wanted at most; loaders need not heed it.
    """

    root: Path | None = None
    hub: str | None = None
    split: str | None = None
    seed: int | None = None
    limit: int | None = None

    @property
    def folder(self) -> Path:
        """The local folder.

        Raises:
            DataError: None was named, or it is missing.
        """
        if self.root is None:
            raise DataError("this task reads a local folder: name it with --data TASK=FOLDER")
        if not self.root.is_dir():
            raise DataError(f"there is no data folder {str(self.root)!r}")
        return self.root

    def find(self, *names: str) -> Path:
        """The first of some files that is there; patterns such as ``"json/*.json"`` find their first match.

        Raises:
            DataError: None is.
        """
        for name in names:
            for path in sorted(self.folder.glob(name)):
                return inside(self.folder, str(path.relative_to(self.folder)))
        raise DataError(f"{str(self.folder)!r} holds none of {', '.join(names)}: is it the dataset's own layout?")

    def rows(self, default_hub: str | None = None, default_split: str | None = None) -> Iterator[Mapping[str, Any]]:
        """Rows of the dataset that ``datasets`` gives; pictures come undecoded, as ``{"bytes", "path"}``.

        Raises:
            DataError: It is not there, or cannot be read.
            MissingExtraError: ``datasets`` is not installed.
        """
        name = self.hub or default_hub
        if name is None:
            raise DataError("no dataset is named: pass --data TASK=FOLDER or --data TASK=hub:NAME")
        try:
            import datasets
        except ImportError as error:
            raise MissingExtraError("reading hub datasets needs datasets: pip install 'vlm-budget[eval]'") from error
        path, _, configuration = name.partition(",")
        split = self.split or default_split
        try:
            found = datasets.load_dataset(path, configuration or None, split=split)
            for column, kind in found.features.items():
                if isinstance(kind, datasets.Image):  # a damaged picture is its sample's fault, not the dataset's
                    found = found.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # the library raises anything, and so do foreign files
            raise DataError(f"cannot load dataset {name!r}, split {split!r}: {_first_line(error)}") from error
        rows = iter(found)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(f"cannot read on in dataset {name!r}, split {split!r}: {_first_line(error)}") from error
            yield row


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {str(path)!r}: {_first_line(error)}") from error


def read_list(path: Path, *keys: str) -> list[Any]:
    """A list in a JSON file, under some keys.

    Raises:
        DataError: The file or the list is missing.
    """
    data = read_json(path)
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise DataError(f"{path.name} has no {key!r}")
        data = data[key]
    if not isinstance(data, list):
        raise DataError(f"{path.name} holds a {type(data).__name__} where a list of records is expected")
    return data


def read_lines(path: Path) -> Iterator[Mapping[str, Any] | Broken]:
    """Records of a file of JSON lines; lines that are none come as :class:`Broken`.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {_first_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            yield Broken(f"{path.name} line {number}", f"no record: {_first_line(error)}")
            continue
        yield row


def read_table(path: Path, delimiter: str = "\t") -> Iterator[Mapping[str, str]]:
    """Rows of a table with a header line.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter=delimiter)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {str(path)!r}: {_first_line(error)}") from error


def require(record: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Fields of a record.

    Raises:
        DataError: Some are missing; for loaders, which turn it into a :class:`Broken`.
    """
    missing = [name for name in names if record.get(name) is None]
    if missing:
        raise DataError(f"the record has no {' and no '.join(missing)}; it has {', '.join(map(str, record))}")
    return [record[name] for name in names]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
