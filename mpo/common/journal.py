"""An append-only file of rows that survives being killed at any point: what took long to compute is kept there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mpo.common.files import write_json
from mpo.common.locks import lock
from mpo.common.redaction import redact
from mpo.common.typed_json import parse_line, read_typed
from mpo.common.words import shown_value
from mpo.errors import ConfigError, StorageError

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """What every row of a journal has.

    Attributes:
        id: Its name in the journal.
    """

    id: str


class Journal:
    """A JSON Lines file with one row per ``id``, open for appending by one process at a time.

    A row is written in one piece, line break last, as soon as it is there. A process that is killed leaves at most one
    line without its break; the next one to open the file cuts that off, so the row counts as never made.

    Attributes:
        path: The file.
        rows: Every row in it, by id, in the order in which they were written.
    """

    def __init__(self, path: str | Path, kind: type[Any] = Row) -> None:
        """Opens the file, or makes it.

        Args:
            path: The file.
            kind: The form of its rows, a dataclass with an ``id``; see :mod:`mpo.common.typed_json`.

        Raises:
            StorageError: It cannot be opened, another process writes to it, or a whole line in it is damaged.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what could not be written is not tried again when the file is closed.
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise StorageError(f"Cannot open {self.path}: {error.strerror or error}.") from error
        try:
            lock(
                self._file,
                f"Another process is writing {self.path}. Let it finish, or choose another folder.",
            )
            self.rows = self._read(kind)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row.

        Raises:
            StorageError: It cannot be written, or its id is in the file already.
        """
        name = str(row["id"])
        if name in self.rows:
            raise StorageError(f"{self.path} has a row with the id {name!r} already.")
        # A text from a model may hold half a surrogate pair, which UTF-8 cannot; JSON's own escapes can.
        text = json.dumps(row, ensure_ascii=False)
        try:
            line = text.encode("utf-8")
        except UnicodeEncodeError:
            line = json.dumps(row).encode("ascii")
        end = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line + b"\n")
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise StorageError(
                f"Cannot write {self.path}: {error.strerror or error}. What is in it is kept; make room, and run the "
                "same command again."
            ) from error
        self.rows[name] = dict(row)

    def clear(self) -> None:
        """Forgets every row.

        Raises:
            StorageError: The file cannot be written.
        """
        try:
            self._file.truncate(0)
        except OSError as error:
            raise StorageError(f"Cannot write {self.path}: {error.strerror or error}.") from error
        self.rows.clear()

    def close(self) -> None:
        """Closes the file and lets others write to it."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, kind: type[Any]) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        *lines, unfinished = self._file.read().split(b"\n")
        rows: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines, start=1):
            try:
                parse_line(line, kind, "")
            except StorageError:
                names = ", ".join(f"`{field.name}`" for field in fields(kind))
                raise StorageError(
                    f"{self.path}, line {number}, is damaged: expected a JSON object with {names}. Delete that line and run "
                    "the same command again; it is then made anew."
                ) from None
            row = json.loads(line)
            rows.setdefault(row["id"], row)
        if unfinished:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        return rows


def read_rows(path: str | Path, kind: type[T], damaged: list[str] | None = None) -> list[T]:
    """Rows of a journal that nobody writes to any more, or that someone else is writing; an unfinished line is left out.

    Args:
        path: The journal.
        kind: The form of its rows; see :mod:`mpo.common.typed_json`.
        damaged: Takes a sentence on each damaged line, which is then left out.

    Raises:
        StorageError: The file cannot be read, or a whole line in it is damaged and `damaged` is not given.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse_line(line, kind, f"{path}, line {number}"))
        except StorageError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
    return rows


def settle(path: str | Path, settings: Mapping[str, Any], *, empty: bool) -> None:
    """Makes sure that a journal is continued with the settings it was begun with, which lie beside it.

    Args:
        path: The journal, ``answers.jsonl``; its settings are in ``answers.settings.json``.
        settings: Those of this run, ready for JSON. They hold all that the rows depend on.
        empty: True while the journal has no rows; then its settings become these.

    Raises:
        ConfigError: The journal has rows that were made with other settings.
        StorageError: The settings cannot be read or written.
    """
    file = Path(path).with_suffix(".settings.json")
    wanted = json.loads(json.dumps(redact(dict(settings))))
    if empty:
        write_json(file, wanted)
        return
    try:
        found = read_typed(file, dict[str, Any])
    except StorageError:
        raise StorageError(
            f"{path} has rows, but {file.name} beside it, which says how they were made, is missing or damaged. Choose "
            "another folder, or delete the rows."
        ) from None
    if found == wanted:
        return
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    differences = "; ".join(
        f"{name}: {shown_value(found.get(name))} there, {shown_value(wanted.get(name))} now" for name in names
    )
    raise ConfigError(
        f"{path} was made with other settings ({differences}). Set them as they were to go on with it, choose another "
        "folder, or delete it to start anew."
    )
