"""Pairs on their way into groups, and the groups' fingerprint: Arrow tables, of which memory holds a part."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any

from mpo.data import spilling
from mpo.data.contract import HARMFUL, HARMLESS, PARTS, Pair

if TYPE_CHECKING:
    from datasets import Dataset, Features

CHUNK = 1024  # pairs held as Python objects before they are stored as Arrow, and groups per Arrow chunk


def group_features(*, kinds: bool = False) -> Features:
    """The schema of a dataset of groups.

    Args:
        kinds: Whether some of them are harmless; a dataset of harmful groups alone has no column for it.
    """
    from datasets import Features, Value

    def pair() -> dict[str, Any]:
        messages = [{"role": Value("string"), "content": Value("string")}]
        parts: dict[str, Any] = {"language": Value("string")}
        parts.update(dict.fromkeys(PARTS, messages))
        parts["row"] = Value("int64")
        return parts

    kind = {"kind": Value("string")} if kinds else {}
    return Features({"source": pair(), "targets": [pair()], "origin": Value("string"), **kind})


def fingerprint_groups(groups: Dataset) -> str:
    """SHA-256 of all kinds, languages, roles and contents, in order; the same for the same groups on every machine.

    Rows and origins are left out, so that a file keeps its fingerprint when it is moved or renamed.
    """
    return hash_groups(groups.with_format("arrow").iter(CHUNK))


def hash_groups(tables: Iterable[Any]) -> str:
    digest = hashlib.sha256(b"mpo groups 1")
    harmless = _number(len(HARMLESS)) + HARMLESS.encode("ascii")
    for table in tables:
        for batch in table.to_batches():
            sources = _pairs_written(batch.column("source"))
            targets = iter(_pairs_written(batch.column("targets").flatten()))
            numbers = batch.column("targets").value_lengths().to_pylist()
            kinds = (
                batch.column("kind").to_pylist()
                if "kind" in batch.schema.names
                else repeat(None, len(sources))
            )
            written: list[bytes] = []
            for kind, source, number in zip(kinds, sources, numbers, strict=True):
                if kind == HARMLESS:
                    written.append(harmless)
                written += (source, _number(number), *islice(targets, number))
            digest.update(b"".join(written))
    return digest.hexdigest()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _pairs_written(pairs: Any) -> list[bytes]:
    """Of each pair in an Arrow array: language, roles and contents."""

    def texts(array: Any) -> list[bytes]:
        # The length before each text keeps "ab", "c" apart from "a", "bc".
        return [_number(len(data)) + data for data in map(str.encode, array.to_pylist())]

    columns = [texts(pairs.field("language"))]
    for part in PARTS:
        messages = pairs.field(part).flatten()
        numbers = pairs.field(part).value_lengths().to_pylist()
        both = zip(texts(messages.field("role")), texts(messages.field("content")), strict=True)
        columns.append(
            [
                b"".join([_number(number), *(data for message in islice(both, number) for data in message)])
                for number in numbers
            ]
        )
    return list(map(b"".join, zip(*columns, strict=True)))


@dataclass
class GroupStore:
    """Pairs on their way into groups.

    They are kept as compact Arrow chunks and not as Python objects, and the groups are put together from slices of
    these chunks. Of a source, memory holds a hash and a few numbers; what is more than a part of the texts is in files.
    """

    group_by_source: bool
    limit: int | None
    _known: dict[bytes, int] = field(default_factory=dict)  # hash of a source -> its first group
    _origins: list[tuple[str, ...]] = field(default_factory=list)  # of each group, in the order of its pairs
    _kinds: list[str] = field(default_factory=list)  # of each group
    _source_of: array[int] = field(default_factory=lambda: array("q"))  # group -> index in _sources
    _group_of: array[int] = field(default_factory=lambda: array("q"))  # target -> group
    _sources: _Chunks = field(default_factory=lambda: _Chunks())
    _targets: _Chunks = field(default_factory=lambda: _Chunks())
    _shared: dict[tuple[str, ...], tuple[str, ...]] = field(
        default_factory=dict
    )  # one object for equal origins

    def add(self, key: bytes, source: Pair, targets: list[Pair], origin: str, kind: str) -> bool:
        """Add a row's pairs, with its source's :func:`pair_digest`; False where that is there as one of another kind."""
        group = self._known.get(key)
        if group is None:
            if self.limit is not None and len(self._known) >= self.limit:
                return True
            group = self._known[key] = self._new_group(self._sources.append(source), kind)
            fresh = True
        elif self._kinds[group] != kind:
            return False
        else:
            fresh = False
        for target in targets:
            if not (self.group_by_source or fresh):
                # Sources repeat then, each with the row it came from.
                group = self._new_group(self._sources.append(source), kind)
            fresh = False
            origins = self._origins[group]
            if origin not in origins:
                more = (*origins, origin)
                self._origins[group] = self._shared.setdefault(more, more)
            self._group_of.append(group)
            self._targets.append(target)
        return True

    def _new_group(self, source: int, kind: str) -> int:
        self._source_of.append(source)
        self._kinds.append(HARMFUL if kind == HARMFUL else HARMLESS)
        self._origins.append(())
        return len(self._source_of) - 1

    def finish(self, max_targets: int | None) -> tuple[Any, str]:
        """The Arrow table of all groups, and its :func:`fingerprint_groups`; the store is empty then."""
        import pyarrow as pa

        self._known.clear()
        parts: list[Any] = []  # of the table, those but the last few on disk
        pending: list[Any] = []
        schema = group_features(kinds=HARMLESS in self._kinds).arrow_schema

        def written() -> Iterator[Any]:
            for table in self._tables(schema, max_targets):
                yield table
                pending.append(table)
                if sum(each.nbytes for each in pending) >= spilling.SPILL_BYTES:
                    parts.append(spilling.to_disk(pa.concat_tables(pending)))
                    pending.clear()
                    spilling.release()

        fingerprint = hash_groups(written())
        self._sources, self._targets = _Chunks(), _Chunks()
        tables = [*parts, *pending]
        return pa.concat_tables(tables) if tables else schema.empty_table(), fingerprint

    def _tables(self, schema: Any, max_targets: int | None) -> Iterator[Any]:
        """The groups in their order, so many at a time."""
        import numpy as np
        import pyarrow as pa

        group_of = np.asarray(self._group_of, dtype=np.int64)
        order = np.argsort(group_of, kind="stable")
        counts = np.bincount(group_of, minlength=len(self._source_of))
        for part in _batches(_pieces(counts, max_targets), CHUNK):
            offsets = np.cumsum([0] + [stop - at for _, at, stop in part]).astype(np.int32)
            targets = self._targets.take(order[part[0][1] : part[-1][2]].tolist())
            columns = [
                self._sources.take([self._source_of[group] for group, _, _ in part]),
                pa.ListArray.from_arrays(pa.array(offsets), targets),
                pa.array([", ".join(self._origins[group]) for group, _, _ in part], pa.string()),
            ]
            if "kind" in schema.names:
                columns.append(pa.array([self._kinds[group] for group, _, _ in part], pa.string()))
            yield pa.Table.from_arrays(columns, names=schema.names).cast(schema)


def _pieces(counts: Any, max_targets: int | None) -> Iterator[tuple[int, int, int]]:
    """Group, first target and one past the last, for every group that comes of so many targets of each source."""
    start = 0
    for group, count in enumerate(map(int, counts)):
        step = max_targets or count
        for at in range(start, start + count, step):
            yield group, at, min(at + step, start + count)
        start += count


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(items, size)):
        yield part


class _Chunks:
    """An append-only list of pairs, stored as Arrow: in memory, and on disk what is more than a part."""

    def __init__(self) -> None:
        self._buffer: list[Pair] = []
        self._chunks: list[Any] = []
        self._spilled = 0  # of the chunks
        self._bytes = 0  # of those in memory

    def append(self, pair: Pair) -> int:
        self._buffer.append(pair)
        index = len(self._chunks) * CHUNK + len(self._buffer) - 1
        if len(self._buffer) == CHUNK:
            self._flush()
        return index

    def _flush(self) -> None:
        import pyarrow as pa

        chunk = pa.array(self._buffer, type=group_features().arrow_schema.field("source").type)
        self._chunks.append(chunk)
        self._buffer = []
        self._bytes += chunk.nbytes
        if self._bytes >= spilling.SPILL_BYTES:
            in_memory = pa.table({"pair": pa.chunked_array(self._chunks[self._spilled :])})
            self._chunks[self._spilled :] = spilling.to_disk(in_memory)["pair"].chunks
            self._spilled, self._bytes = len(self._chunks), 0

    def take(self, indices: list[int]) -> Any:
        import pyarrow as pa

        if self._buffer:
            self._flush()
        slices: list[Any] = []
        run = 0  # neighbours in a chunk are taken together
        for position, index in enumerate(indices):
            following = indices[position + 1] if position + 1 < len(indices) else -1
            run += 1
            if following != index + 1 or following % CHUNK == 0:
                chunk, last = divmod(index, CHUNK)
                slices.append(self._chunks[chunk].slice(last - run + 1, run))
                run = 0
        return pa.concat_arrays(slices)
