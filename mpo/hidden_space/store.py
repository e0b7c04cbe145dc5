"""Embeddings on disk: written row by row, resumable after a kill, read through a memory map, with their provenance.

A store is a folder::

    index.json     what it holds and where it came from; written last, so a folder that has it is complete
    last.npy       [layers, texts, hidden] float32: a layer is one contiguous part of the file
    mean.npy       the same for the other pooling

While it is written it is called ``NAME.partial`` and has a journal per rank of the rows that are safely on disk. A run
that is started again goes on after them, with any number of ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo.common.files import publish, write_json
from mpo.errors import StorageError
from mpo.hidden_space.resampling import Array

_FORMAT = 1
_INDEX = "index.json"
_IDENTITY = "identity.json"
_PARTIAL = ".partial"


class EmbeddingStore:
    """The embeddings of a set of texts by one model.

    Attributes:
        folder: Where they are.
        identity: What they depend on: weights, tokens, layers, pooling, precision.
        provenance: When, by what and with which settings they were made.
        layers: ``"0"`` (embeddings), ``"1"`` ... (after that block) and ``"norm"``, in order.
        poolings: ``"last"``, ``"mean"``.
        shape: ``(texts, hidden)`` of every layer.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a complete store.

        Raises:
            StorageError: There is none, or it is damaged.
        """
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
            self.identity: dict[str, Any] = index["identity"]
            self.provenance: dict[str, Any] = index["provenance"]
            self.texts: dict[str, list[Any]] = index["texts"]
            self.layers: list[str] = self.identity["layers"]
            self.poolings: list[str] = self.identity["poolings"]
            self.shape: tuple[int, int] = (self.identity["texts"], self.identity["hidden_size"])
            self._arrays = {
                pooling: np.load(self.folder / f"{pooling}.npy", mmap_mode="r", allow_pickle=False)
                for pooling in self.poolings
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self.folder} is no complete store of embeddings ({type(error).__name__}: {error}). Remove it and embed "
                "again."
            ) from error
        for pooling, array in self._arrays.items():
            if array.shape != (len(self.layers), *self.shape) or array.dtype != np.float32:
                raise StorageError(
                    f"{self.folder / pooling}.npy holds {array.dtype} of shape {array.shape}, not float32 of shape "
                    f"{(len(self.layers), *self.shape)}. Remove the folder and embed again."
                )

    def array(self, pooling: str, layer: str) -> Array:
        """``[texts, hidden]`` float32, read from disk as it is used.

        Raises:
            StorageError: The store has no such pooling or layer.
        """
        if pooling not in self.poolings or layer not in self.layers:
            raise StorageError(
                f"{self.folder} has no {pooling} pooling of layer {layer}; it has {', '.join(self.poolings)} of layers "
                f"{', '.join(self.layers)}. Embed again with what is needed."
            )
        found: Array = self._arrays[pooling][self.layers.index(layer)]
        return found


def is_complete(folder: str | Path, identity: Mapping[str, Any]) -> bool:
    """Whether the folder is a complete store with this identity.

    Raises:
        StorageError: It is something else.
    """
    folder = Path(folder)
    if not folder.exists():
        return False
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _INDEX).is_file()):
        raise StorageError(f"{folder} is in the way: it is no store of embeddings. Choose another folder.")
    if not (folder / _INDEX).is_file():
        return False
    _refuse_other(folder, EmbeddingStore(folder).identity, _plain(identity))
    return True


def _refuse_other(folder: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    differing = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
    if differing:
        raise StorageError(
            f"{folder} holds other embeddings: {', '.join(differing)} differ. Choose another folder, or remove it."
        )


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps({**identity, "format": _FORMAT}))
    return plain


class EmbeddingWriter:
    """Writes a store, alone or as one of several ranks that share its folder.

    Rows are written with ``pwrite`` and not through a memory map: a full disk is then an error and not a crash, and ranks
    on different machines do not overwrite each other's pages.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], rank: int = 0) -> None:
        """Open the folder of a rank.

        Args:
            folder: Of the finished store.
            identity: With at least ``layers``, ``poolings``, ``texts`` and ``hidden_size``.
            rank: Of this process.
        """
        self.folder, self.identity, self.rank = Path(folder), _plain(identity), rank
        self.partial = self.folder.with_name(self.folder.name + _PARTIAL)
        self._files: dict[str, int] = {}
        self._offset = 0
        self._uncommitted: list[int] = []

    def prepare(self) -> None:
        """Make the files, or check those that an interrupted run has left. To be called by one rank, before `open`.

        From here to `close` no other process can prepare or open them as the same rank.

        Raises:
            StorageError: The folder holds other embeddings, another process is writing it, it cannot be written, or the
                disk has no room.
        """
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock()
            if (self.partial / _IDENTITY).is_file():
                found = json.loads((self.partial / _IDENTITY).read_text(encoding="utf-8"))
                _refuse_other(self.partial, found, self.identity)
                return
            for leftover in [*self.partial.glob("done.*"), *self.partial.glob("*.npy")]:
                os.truncate(leftover, 0)
            shape = (len(self.identity["layers"]), self.identity["texts"], self.identity["hidden_size"])
            needed = 4 * int(np.prod(shape)) * len(self.identity["poolings"])
            free = shutil.disk_usage(self.partial).free
            if free < needed:
                raise StorageError(
                    f"The embeddings need {needed / 1e9:.1f} GB in {self.folder.parent}, where {free / 1e9:.1f} GB are "
                    "free. Free some space, choose another folder, or fewer layers."
                )
            for pooling in self.identity["poolings"]:
                path = self.partial / f"{pooling}.npy"
                np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()
            write_json(self.partial / _IDENTITY, self.identity)  # last: a folder without it is begun anew
        except (OSError, ValueError) as error:
            self.close()
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"The embeddings cannot be written to {self.partial}: {error}") from error

    def open(self) -> None:
        """Open the files that `prepare` made.

        Raises:
            StorageError: This rank does not see them.
        """
        try:
            for pooling in self.identity["poolings"]:
                path = self.partial / f"{pooling}.npy"
                self._offset = np.load(path, mmap_mode="r").offset
                self._files[pooling] = os.open(path, os.O_RDWR)
            self._lock()
            # A record that was cut off in the middle must not shift those that follow.
            whole = os.fstat(self._files["journal"]).st_size // 8 * 8
            os.truncate(self.partial / f"done.{self.rank}", whole)
        except OSError as error:
            self.close()
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"Rank {self.rank} cannot open {self.partial}: {error}. All ranks need one shared folder."
            ) from error

    def _lock(self) -> None:
        """Open this rank's journal, for this process alone until it is closed."""
        if "journal" in self._files:
            return
        path = self.partial / f"done.{self.rank}"
        self._files["journal"] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._files["journal"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"Another process is writing {self.partial}. Wait for it, or choose another folder."
            ) from error

    def done(self) -> set[int]:
        """Rows that are on disk already, by whichever rank."""
        rows: set[int] = set()
        for journal in self.partial.glob("done.*"):
            content = journal.read_bytes()
            rows.update(np.frombuffer(content[: len(content) // 8 * 8], dtype="<i8").tolist())
        return rows

    def write(self, rows: Sequence[int], values: Mapping[str, Array]) -> None:
        """Write the embeddings of some texts; they count as done after the next `commit`.

        Args:
            rows: Which texts, ``[b]``.
            values: ``[layers, b, hidden]`` for each pooling.

        Raises:
            StorageError: They cannot be written, or hold values that are not finite.
        """
        texts, hidden = self.identity["texts"], self.identity["hidden_size"]
        for pooling, array in values.items():
            if not np.isfinite(array).all():
                layer = self.identity["layers"][int(np.argwhere(~np.isfinite(array))[0][0])]
                raise StorageError(
                    f"The embeddings of layer {layer} hold values that are not finite. In float16, embed with "
                    "`dtype: bfloat16` or `float32`."
                )
            data = np.ascontiguousarray(array, dtype=np.float32)
            for layer_number in range(len(data)):
                for place, row in enumerate(rows):
                    at = self._offset + 4 * hidden * (layer_number * texts + row)
                    self._write_all(self._files[pooling], data[layer_number, place].tobytes(), at)
        self._uncommitted += rows

    def _write_all(self, file: int, content: bytes, at: int) -> None:
        """Write to a place of a file. A system call may take a part only, as when the disk is nearly full."""
        left = memoryview(content)
        try:
            while left:
                written = os.pwrite(file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            raise StorageError(f"The embeddings cannot be written to {self.partial}: {error}") from error

    def commit(self) -> None:
        """Bring what was written to disk, then say so in the journal.

        Raises:
            StorageError: The disk is full or gone.
        """
        try:
            for name, file in self._files.items():
                if name != "journal":
                    os.fsync(file)
            end = os.fstat(self._files["journal"]).st_size
            self._write_all(self._files["journal"], np.asarray(self._uncommitted, dtype="<i8").tobytes(), end)
            os.fsync(self._files["journal"])
        except OSError as error:
            raise StorageError(f"The embeddings cannot be written to {self.partial}: {error}") from error
        self._uncommitted = []

    def finish(self, texts: Mapping[str, Sequence[Any]], provenance: Mapping[str, Any]) -> EmbeddingStore:
        """Turn the partial folder into a store. To be called by one rank, after all have committed.

        Args:
            texts: Columns that say which text a row is, ``[texts]`` each; never the text itself.
            provenance: See :func:`mpo.common.provenance.collect`.

        Raises:
            StorageError: Rows are missing, or the folder cannot be renamed.
        """
        missing = len(set(range(self.identity["texts"])) - self.done())
        if missing:
            raise StorageError(
                f"{missing} of {self.identity['texts']} texts have no embedding in {self.partial}."
            )
        write_json(
            self.partial / _INDEX,
            {
                "identity": self.identity,
                "texts": {k: list(v) for k, v in texts.items()},
                "provenance": dict(provenance),
            },
        )
        try:
            publish(self.partial, self.folder)
            # Only now: without them, what a kill before the renaming leaves behind would be embedded again.
            for leftover in [*self.folder.glob("done.*"), self.folder / _IDENTITY]:
                leftover.unlink()
        except OSError as error:
            raise StorageError(f"{self.partial} cannot be renamed to {self.folder}: {error}") from error
        return EmbeddingStore(self.folder)

    def close(self) -> None:
        """Close the files; what was not committed is embedded again next time."""
        for file in self._files.values():
            os.close(file)
        self._files = {}
