"""What a search has evaluated, one JSON line per point, so that Ctrl-C, a crash or a kill loses none.

The first line says what the points belong to: model and weights, calibration data, metric. Every further line is
written at once, with fsync, when its point is known. A last line that was cut off is dropped; any other fault is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import JournalError

Found = dict[str, Any]
_KIND, _VERSION = "journal", 1


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
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, str]) -> None:
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
        self._append({"key": key, "point": dict(point), "found": found})
        self._known[key] = found
        self.new += 1
        return found

    def _key(self, point: Mapping[str, Any]) -> str:
        text = json.dumps([self.identity, point], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _header(self) -> dict[str, Any]:
        return {"kind": _KIND, "version": _VERSION, **self.identity}

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise JournalError(f"cannot write journal {str(self.path)!r}: {error}") from error

    def _open(self, path: Path) -> None:
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise JournalError(f"cannot read journal {str(path)!r}: {error}") from error
        *lines, torn = data.split(b"\n")
        rows = [self._row(line, number, last=number == len(lines)) for number, line in enumerate(lines, 1)]
        if rows and rows[-1] is None:
            rows, torn = rows[:-1], lines[-1] + b"\n" + torn
        if torn:
            with path.open("r+b") as file:
                file.truncate(len(data) - len(torn))
        if not rows:
            self._append(self._header())
            return
        self._check_header(rows[0] or {})
        for number, row in enumerate(rows[1:], 2):
            if row is None or row.get("key") != self._key(row.get("point", {})):
                raise JournalError(f"line {number} of journal {str(path)!r} was edited; start a new journal")
            self._known[row["key"]] = row["found"]

    def _row(self, line: bytes, number: int, last: bool) -> dict[str, Any] | None:
        """A line's content; None for a last one that is damaged."""
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                return row
        except ValueError:
            if last:
                return None
        raise JournalError(f"line {number} of journal {str(self.path)!r} is damaged; start a new journal")

    def _check_header(self, header: Mapping[str, Any]) -> None:
        if header.get("kind") != _KIND or header.get("version") != _VERSION:
            raise JournalError(f"{str(self.path)!r} is no search journal of this version; name another file")
        other = [name for name, mine in self.identity.items() if header.get(name) != mine]
        if other:
            raise JournalError(
                f"journal {str(self.path)!r} belongs to another search: its {' and '.join(other)} differ. Points "
                "of one search say nothing about another; name another file, or delete this one."
            )
