"""What a search has evaluated, one JSON line per point, so that Ctrl-C, a crash or a kill loses none.

The first line says what the points belong to: model and weights, calibration data, metric. Every further line is
written at once, with fsync, when its point is known, and carries a checksum. A last line that was cut off is dropped;
any other fault is refused. A file whose first line is not a journal's is never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import JournalError, OptionError

Found = dict[str, Any]
_KIND, _VERSION = "journal", 2


class Journal:
    """Points by what was evaluated.

    Args:
        path: The file; made if missing. None keeps points in memory only.
        identity: What all points belong to.

    Attributes:
        new: Points evaluated since the journal was opened.
        reused: Points that were asked for and known already, since then.

    Raises:
        JournalError: The file belongs to another search, was edited, or cannot be read or written.
        OptionError: ``path`` is no path.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, str]) -> None:
        if path is not None and not isinstance(path, str | os.PathLike):
            raise OptionError(f"journal must be a path, got {path!r}")
        self.path = None if path is None else Path(path)
        self.identity = dict(identity)
        self.new = self.reused = 0
        self._known: dict[str, Found] = {}
        if self.path is not None:
            self._open(self.path)

    def __len__(self) -> int:
        return len(self._known)

    def remember(self, point: Mapping[str, Any], evaluate: Callable[[], Found]) -> Found:
        """What is known of a point, evaluated and written down first if nothing is.

        Args:
            point: What is evaluated, as plain data: a schedule, or a method with a budget.
            evaluate: Finds out; its result must be plain data with finite numbers.
        """
        key = self._key(point)
        if key in self._known:
            self.reused += 1
            return self._known[key]
        found = evaluate()
        row = {"key": key, "point": dict(point), "found": found}
        self._append({**row, "checksum": _checksum(row)})
        self._known[key] = found
        self.new += 1
        return found

    def _key(self, point: Mapping[str, Any]) -> str:
        text = json.dumps([self.identity, point], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self._write(self.path, json.dumps(row, allow_nan=False).encode() + b"\n")

    def _write(self, path: Path, text: bytes) -> None:
        try:
            with path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise JournalError(f"cannot write journal {str(path)!r}: {error}") from error

    def _open(self, path: Path) -> None:
        data = _read(path)
        first, newline, _ = data.partition(b"\n")
        header = json.dumps({"kind": _KIND, "version": _VERSION, **self.identity}).encode() + b"\n"
        if not newline and header.startswith(first) and (not first or b"kind" in first):
            self._write(path, header[len(first) :])  # a new file, or the header of this very search cut off
            return
        self._check_identity(_header_of(path, first))
        if not newline:
            raise JournalError(f"line 1 of journal {str(path)!r} is damaged; start a new journal")
        *lines, torn = data.split(b"\n")
        rows = [self._row(line, number, last=number == len(lines)) for number, line in enumerate(lines, 1)]
        if rows[-1] is None:
            rows, torn = rows[:-1], lines[-1] + b"\n" + torn
        for number, row in enumerate(rows[1:], 2):
            if row is None or not self._intact(row):
                raise JournalError(f"line {number} of journal {str(path)!r} was edited; start a new journal")
            self._known[row["key"]] = row["found"]
        if torn:
            self._cut(path, len(data) - len(torn))

    def _intact(self, row: dict[str, Any]) -> bool:
        """A line is what :meth:`remember` wrote."""
        rest = {name: value for name, value in row.items() if name != "checksum"}
        if set(rest) != {"key", "point", "found"} or row.get("checksum") != _checksum(rest):
            return False
        return isinstance(row["found"], dict) and bool(row["key"] == self._key(row["point"]))

    def _row(self, line: bytes, number: int, last: bool) -> dict[str, Any] | None:
        """A line's content; None for a last one that is damaged."""
        row = _parsed(line)
        if row is None and not (last and number > 1):
            raise JournalError(f"line {number} of journal {str(self.path)!r} is damaged; start a new journal")
        return row

    def _cut(self, path: Path, size: int) -> None:
        """Drop what stands behind the last whole line."""
        try:
            with path.open("r+b") as file:
                file.truncate(size)
        except OSError as error:
            raise JournalError(f"cannot write journal {str(path)!r}: {error}") from error

    def _check_identity(self, header: Mapping[str, Any]) -> None:
        other = [name for name, mine in self.identity.items() if header.get(name) != mine]
        if other:
            raise JournalError(
                f"journal {str(self.path)!r} belongs to another search: its {' and '.join(other)} "
                f"{'differs' if len(other) == 1 else 'differ'}. Points of one search say nothing about another; name "
                "another file, or delete this one."
            )


def check_place(path: Path) -> None:
    """Refuse a place where no journal can be kept, without touching it; whose journal it is shows with the model.

    Raises:
        JournalError: It is a folder, its folder is missing, or it is a file of another kind.
    """
    data = _read(path)
    first, newline, _ = data.partition(b"\n")
    if newline:
        _header_of(path, first)
    elif not path.absolute().parent.is_dir():
        raise JournalError(f"cannot write journal {str(path)!r}: there is no folder {str(path.parent)!r}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise JournalError(f"cannot read journal {str(path)!r}: {error}") from error


def _header_of(path: Path, line: bytes) -> dict[str, Any]:
    header = _parsed(line) or {}
    if header.get("kind") != _KIND:
        raise JournalError(f"{str(path)!r} is no search journal; it was left as it is, name another file")
    if header.get("version") != _VERSION:
        raise JournalError(
            f"{str(path)!r} is no search journal of this version, which is {_VERSION}: it has version "
            f"{header.get('version')!r}. Name another file, or delete this one."
        )
    return header


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None where there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _checksum(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
