"""The different preference pairs of tokenized groups: found by their tokens, and made into trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from mpo.data.contract import PARTS
from mpo.modeling.trees import Tree

SOURCE, TARGET = "source", "target"


def columns_of(side: str) -> list[str]:
    """Columns of tokenized groups that hold the pairs of a side."""
    return [f"{side}_{part}" for part in PARTS]


def first_of_each(numbers: np.ndarray) -> np.ndarray:
    """``[n]``, True where a number appears for the first time."""
    first = np.zeros(len(numbers), dtype=bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    return first


def source_trees(
    groups: Mapping[str, Sequence[Any]], *, pool: bool = False, keep: bool = False
) -> list[Tree]:
    """The source pairs of tokenized groups as trees that are scored, and pooled or kept if asked for."""
    columns = (groups[column] for column in columns_of(SOURCE))
    return [
        Tree(prompt, chosen, rejected, pool=pool, keep=keep)
        for prompt, chosen, rejected in zip(*columns, strict=True)
    ]


def probe_trees(tokenized: Dataset) -> list[Tree]:
    """A few source trees of a tokenized dataset, for :func:`mpo.modeling.layout.usable_layout`."""
    return source_trees(tokenized[: min(3, len(tokenized))])


@dataclass(frozen=True)
class UniquePairs:
    """The different pairs of one side of tokenized groups.

    Attributes:
        columns: The groups, with the columns of this side.
        side: ``"source"`` or ``"target"``.
        pair_of_row: ``[rows]``, the unique pair of each row: of each group, or of each target in the order of the data.
        first_row: ``[n]``, a row that holds each unique pair.
        lengths: ``[n, 3]``, tokens of prompt, chosen and rejected of each.
        starts: ``[groups + 1]``, where the rows of each group start.
        digest: Hash of all unique pairs' tokens in order.
    """

    columns: Dataset
    side: str
    pair_of_row: np.ndarray
    first_row: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.first_row)

    def of_group(self, group: int) -> np.ndarray:
        """``[K]``, the unique pairs of a group."""
        return self.pair_of_row[self.starts[group] : self.starts[group + 1]]

    def trees(
        self, pairs: Sequence[int] | np.ndarray, *, pool: bool = False, keep: bool = False
    ) -> list[Tree]:
        """Some of the unique pairs as trees that are scored, and pooled or kept if asked for."""
        rows = self.first_row[np.asarray(pairs, dtype=np.int64)]
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        table = self.columns[groups.tolist()]
        if self.side == SOURCE:
            return source_trees(table, pool=pool, keep=keep)
        prompts, chosen, rejected = (table[column] for column in columns_of(TARGET))
        return [
            Tree(prompts[j][slot], chosen[j][slot], rejected[j][slot], pool=pool, keep=keep)
            for j, slot in enumerate((rows - self.starts[groups]).tolist())
        ]


@dataclass(frozen=True)
class MismatchedPairs:
    """Unique pairs of which each has its own prompt and the responses of the one before it in its language.

    KTO estimates how far the policy has moved from the reference on them. The first pair of a language takes the responses
    of its last.

    Attributes:
        own: The pairs.
        other: ``[n]``, whose responses each has.
        max_length: The responses are cut so that prompt plus response is at most this long; None for no limit.
    """

    own: UniquePairs
    other: np.ndarray
    max_length: int | None

    def __len__(self) -> int:
        return len(self.other)

    @property
    def side(self) -> str:
        """Of the pairs."""
        return self.own.side

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[n, 3]``, tokens of prompt and of the other pair's responses."""
        lengths = np.concatenate([self.own.lengths[:, :1], self.own.lengths[self.other, 1:]], axis=1)
        if self.max_length is not None:
            lengths[:, 1:] = np.minimum(lengths[:, 1:], self.max_length - lengths[:, :1])
        return lengths

    @cached_property
    def digest(self) -> str:
        """Hash of the pairs' tokens and of what is paired with what."""
        digest = xxhash.xxh3_128(self.own.digest.encode())
        digest.update(np.ascontiguousarray(self.other, dtype=np.int64).tobytes())
        digest.update(str(self.max_length).encode())
        return digest.hexdigest()

    def trees(
        self, pairs: Sequence[int] | np.ndarray, *, pool: bool = False, keep: bool = False
    ) -> list[Tree]:
        """Some of the pairs as trees that are scored, and pooled or kept if asked for."""
        numbers = np.asarray(pairs, dtype=np.int64)
        own, other = self.own.trees(numbers), self.own.trees(self.other[numbers])
        return [
            Tree(a.prompt, b.chosen[: length[1]], b.rejected[: length[2]], pool=pool, keep=keep)
            for a, b, length in zip(own, other, self.lengths[numbers].tolist(), strict=True)
        ]


def mismatched_pairs(own: UniquePairs, dataset: Dataset, max_length: int | None) -> MismatchedPairs:
    """Give each unique pair the responses of the one before it in its language, in the order of the data.

    Args:
        own: The pairs of one side.
        dataset: The tokenized groups they are of.
        max_length: Limit of prompt plus response, in tokens.
    """
    other = np.empty(len(own), dtype=np.int64)
    languages = np.zeros(len(own), dtype=object)
    if own.side == TARGET:
        table = dataset.with_format("arrow").select_columns(["target_language"])
        found = [np.asarray(pc.list_flatten(t["target_language"])) for t in table.iter(batch_size=10_000)]
        languages = np.concatenate(found)[own.first_row]
    for language in dict.fromkeys(languages):
        places = np.flatnonzero(languages == language)
        other[places] = np.roll(places, 1)
    return MismatchedPairs(own, other, max_length)


def unique_pairs(dataset: Dataset, side: str) -> UniquePairs:
    """Find the rows of tokenized groups (:data:`mpo.data.tokenization.TOKENIZED_FEATURES`) that hold the same pair.

    Args:
        dataset: Tokenized groups.
        side: ``"source"`` or ``"target"``.
    """
    seen: dict[bytes, int] = {}
    pair_of_row: list[int] = []
    first_row: list[int] = []
    lengths: list[list[int]] = []
    rows_of_group = [np.zeros(1, dtype=np.int64)]
    total = xxhash.xxh3_128()
    columns = dataset.select_columns(columns_of(side))
    for table in columns.with_format("arrow").iter(batch_size=1000):
        fields = []
        for column in columns_of(side):
            lists = table[column].combine_chunks()
            rows = np.ones(len(table), dtype=np.int64)
            if side == TARGET:
                rows, lists = np.asarray(pc.list_value_length(lists), dtype=np.int64), lists.flatten()
            tokens = np.ascontiguousarray(lists.flatten(), dtype=np.int32).data
            fields.append((np.concatenate([[0], np.cumsum(pc.list_value_length(lists))]).tolist(), tokens))
        rows_of_group.append(rows)
        for row in range(int(rows.sum())):
            digest = xxhash.xxh3_128()
            for ends, tokens in fields:
                digest.update((ends[row + 1] - ends[row]).to_bytes(8, "little"))
                digest.update(tokens[ends[row] : ends[row + 1]])
            key = digest.digest()
            if key not in seen:
                seen[key] = len(first_row)
                first_row.append(len(pair_of_row))
                lengths.append([ends[row + 1] - ends[row] for ends, _ in fields])
                total.update(key)
            pair_of_row.append(seen[key])
    return UniquePairs(
        columns,
        side,
        np.asarray(pair_of_row, dtype=np.int64),
        np.asarray(first_row, dtype=np.int64),
        np.asarray(lengths, dtype=np.int64).reshape(-1, 3),
        np.cumsum(np.concatenate(rows_of_group)),
        total.hexdigest(),
    )


def unique_sources(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, str]:
    """Find the groups that share a source.

    Args:
        dataset: Tokenized groups.

    Returns:
        ``source_of_group`` ``[groups]``, ``first_group`` ``[sources]`` (a group that holds each source), and a hash of
        all sources' tokens in order.
    """
    found = unique_pairs(dataset, SOURCE)
    return found.pair_of_row, found.first_row, found.digest


def fingerprint_rows(dataset: Dataset) -> str:
    """Hash of everything in a tokenized dataset, in order; the same wherever and however often it is tokenized."""
    digest = xxhash.xxh3_128()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for column in sorted(table.column_names):
            values = table[column].combine_chunks()
            while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                digest.update(np.asarray(pc.list_value_length(values).to_pylist(), dtype=np.int64).tobytes())
                values = values.flatten()
            if pa.types.is_integer(values.type):
                digest.update(np.asarray(values, dtype=np.int64).tobytes())
            else:
                digest.update("\0".join(values.to_pylist()).encode())
    return digest.hexdigest()
