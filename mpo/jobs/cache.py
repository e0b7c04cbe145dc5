"""What runs keep to save work later: reference values below the Hugging Face cache, replies of judges beside results."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo.common.characters import printable
from mpo.common.words import counted, duration, size
from mpo.errors import StorageError
from mpo.evaluation.safety import CACHE

_REFERENCE = re.compile(r"[0-9a-f]{32}(\..+)?")  # an entry, or what a killed run left of one
_REPLIES = re.compile(r"[0-9a-f]{2}")


@dataclass(frozen=True)
class CacheEntry:
    """One thing that can be removed without loss but time.

    Attributes:
        path: A folder.
        folders: What of it is removed.
        kind: ``"reference"``, the reference values of one dataset and model; ``"judge"``, all replies beside one result.
        files: Number of files in it.
        bytes: Their size.
        age: Seconds since the newest of them was written.
    """

    path: Path
    folders: tuple[Path, ...]
    kind: str
    files: int
    bytes: int
    age: float


def reference_folder() -> Path:
    """The reference cache of runs that name none: ``mpo/reference`` below ``HF_HOME``."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "mpo" / "reference"


def find_caches(results: Sequence[str | Path] = (), reference: str | Path | None = None) -> list[CacheEntry]:
    """The caches there are, the largest first.

    Args:
        results: Folders of results, in which and below which judges' replies are looked for.
        reference: Folder of the reference cache; None for the usual one.

    Raises:
        StorageError: A folder of results is not there.
    """
    found = []
    folder = reference_folder() if reference is None else Path(reference).expanduser()
    if folder.is_dir():
        found = [
            _entry(path, "reference", path)
            for path in folder.iterdir()
            if path.is_dir() and _REFERENCE.fullmatch(path.name)
        ]
    for result in map(Path, results):
        if not result.is_dir():
            raise StorageError(f"There is no folder {result}; expected one with results of `mpo evaluate`.")
        found += _judge_caches(result)
    return sorted(found, key=lambda entry: (-entry.bytes, str(entry.path)))


def clear_caches(entries: Sequence[CacheEntry]) -> int:
    """Removes caches and returns how many bytes that freed. What is computed again is computed alike.

    Raises:
        StorageError: A folder cannot be removed.
    """
    for entry in entries:
        try:
            for path in entry.folders:
                shutil.rmtree(path)
        except OSError as error:
            raise StorageError(f"{entry.path} cannot be removed: {error.strerror or error}.") from error
    return sum(entry.bytes for entry in entries)


def caches_text(entries: Sequence[CacheEntry]) -> str:
    """The caches for a person, one a line, and their sum."""
    lines = [
        f"{entry.kind:<9}  {size(entry.bytes):>9}  {counted(entry.files, 'file'):>12}  {duration(entry.age)} old  "
        f"{printable(str(entry.path), lines=False)}"
        for entry in entries
    ]
    return "\n".join(
        [*lines, f"{counted(len(entries), 'cache')}, {size(sum(entry.bytes for entry in entries))}"]
    )


def _judge_caches(result: Path) -> Iterator[CacheEntry]:
    for folder, names, _ in os.walk(result):
        if CACHE in names:
            names.remove(CACHE)
            path = Path(folder) / CACHE
            replies = [part for part in path.iterdir() if part.is_dir() and _REPLIES.fullmatch(part.name)]
            if replies:
                yield _entry(path, "judge", *replies)


def _entry(path: Path, kind: str, *folders: Path) -> CacheEntry:
    files = [file.stat() for folder in folders for file in folder.rglob("*") if file.is_file()]
    newest = max((file.st_mtime for file in files), default=path.stat().st_mtime)
    age = max(time.time() - newest, 0.0)
    return CacheEntry(path, folders, kind, len(files), sum(file.st_size for file in files), age)
