"""Stages of a build: files of rows, one per row of the input and in its order, that a killed run goes on with.

A stage works through its rows block by block. What a block has got so far lies in a journal of its own, and becomes the rows of
the stage in one write when the block is complete. So the file of a stage is the same whatever was killed on the way, memory holds
one block, and nothing that was answered is asked again but what was under way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from mpo.common.characters import without_halves
from mpo.common.files import write_json
from mpo.common.journal import Journal, settle
from mpo.common.progress import CountProgress
from mpo.common.redaction import redact
from mpo.errors import StorageError

Row = dict[str, Any]

_BETWEEN_LINES = 30.0  # seconds
T = TypeVar("T")


class Kept:
    """What the block under way has got, by name; kept as soon as it is there."""

    def __init__(self, journal: Journal, title: str = "") -> None:
        """Keep results in a journal.

        Args:
            journal: Where it is kept.
            title: What is under way; a block that takes long says so now and then.
        """
        self._journal, self._title, self._spoken = journal, title, time.monotonic()

    def __contains__(self, name: str) -> bool:
        return name in self._journal.rows

    def __getitem__(self, name: str) -> Any:
        return self._journal.rows[name]["value"]

    def keep(self, name: str, value: Any) -> None:
        """Keeps a value, ready for JSON.

        Raises:
            StorageError: It cannot be written.
        """
        self._journal.append({"id": name, "value": value})
        if self._title and time.monotonic() - self._spoken > _BETWEEN_LINES:
            self._spoken = time.monotonic()
            tqdm.write(f"{self._title}: {len(self._journal.rows):,} texts so far", file=sys.stderr)


@dataclass(frozen=True)
class Stage:
    """One step of a build.

    Attributes:
        path: Its file.
        settings: All that its rows depend on, those of earlier stages included, ready for JSON.
    """

    path: Path
    settings: Mapping[str, Any]

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time."""
        return read_rows(self.path)

    def run(
        self,
        inputs: Iterable[T],
        total: int,
        make: Callable[[Sequence[T], Kept], Sequence[Mapping[str, Any]]],
        *,
        block: int,
        title: str | None,
    ) -> None:
        """Makes the rows that are not there yet.

        Args:
            inputs: What each row is made of; read anew from its beginning.
            total: Number of inputs.
            make: Rows of a block, one per input and in their order.
            block: Inputs at a time.
            title: What it does, for the progress; None for a stage that has nothing to do but to keep the others company.

        Raises:
            ConfigError: The file has rows that were made with other settings.
            MPOError: What ``make`` raises, or the disk is full. What was made before is kept.
        """
        done = self._open()
        if done > total:
            raise StorageError(
                f"{self.path} has {done:,} rows for {total:,} prompts: something else has written into it. Delete the file, and run "
                "the same command again; its rows are then made anew."
            )
        if done == total:
            return
        shown = CountProgress(title, total, done=done, unit="row") if title else nullcontext()
        with shown as progress:
            waiting = islice(inputs, done, None)
            while items := list(islice(waiting, block)):
                part = self.path.with_suffix(f".{done}.part.jsonl")
                with Journal(part) as journal:
                    rows = make(
                        items, Kept(journal, f"{title}, rows {done} to {done + len(items)} of {total}")
                    )
                assert len(rows) == len(items)
                _append(self.path, rows)
                part.unlink()
                done += len(items)
                if progress is not None:
                    progress.advance(len(items))

    def _open(self) -> int:
        """Number of whole rows, after what a killed process left unfinished is gone."""
        done = _whole_rows(self.path)
        own = f"{self.path.stem}."
        parts = [p for p in self.path.parent.glob("*.part.jsonl") if p.name.startswith(own)]
        parts = [p for p in parts if p.name.removeprefix(own).removesuffix(".part.jsonl").isdecimal()]
        settle(self.path, self.settings, empty=not done and not parts)
        for part in parts:
            if part.name != f"{own}{done}.part.jsonl":
                part.unlink()
        return done


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a stage's file.

    Raises:
        StorageError: The file cannot be read, or a line is damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise StorageError(
                        f"{path}, line {number}, is damaged. Delete the file, and run the same command again; its rows are then "
                        "made anew."
                    ) from None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error


def dumped(row: Mapping[str, Any]) -> str:
    """A row as its line. Half a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD."""
    return without_halves(json.dumps(row, ensure_ascii=False)) + "\n"


def note_start(path: Path, name: str, about: Mapping[str, Any]) -> None:
    """Notes in a file of JSON what a run says of ``name``, unless the same is there already: when it began stays true.

    Args:
        path: The file.
        name: What is spoken of.
        about: Ready for JSON, with what tells it from others under ``settings``.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    settings = json.loads(json.dumps(redact(dict(about["settings"]))))
    if name not in found or found[name].get("settings") != settings:
        write_json(path, {**found, name: about})


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    data = "".join(map(dumped, rows)).encode("utf-8")
    try:
        # Without a buffer: what could not be written is not tried again when the file is closed.
        with open(path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                os.truncate(path, end)
                raise
    except OSError as error:
        raise StorageError(
            f"Cannot write {path}: {error.strerror or error}. What is in it is kept; make room, and run the same command again."
        ) from error


def _whole_rows(path: Path) -> int:
    """Number of lines with their break; what follows the last one is cut off."""
    count = size = end = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                found = chunk.count(b"\n")
                if found:
                    count += found
                    end = size + chunk.rindex(b"\n") + 1
                size += len(chunk)
        if end < size:
            os.truncate(path, end)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    return count
