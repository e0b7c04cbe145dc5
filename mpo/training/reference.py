"""The reference pass: what the frozen starting policy says of each pair, computed once and kept on disk.

What an objective compares the policy with is constant: for MPO the reward gap ``RG_ref^d`` and the pooled hidden states
``h_ref^d`` of the starting policy on every pair in the dominant language, for DPO and its relatives the log-likelihoods of
the trained pairs' own responses. They are computed before the first step, for *unique* pairs only and without gradients,
and stored as plain ``.npy`` files that training reads through a memory map, so no reference model is in memory while
training and nothing grows with the size of the data.

A cache belongs to one key: weights, rows (as token ids, so tokenizer, chat template and maximum length are in it), what is
stored, pooling and precision. Any change of these is another key. A cache is written whole or not at all, as
:mod:`mpo.common.files` does it; its files' checksums are verified whenever it is opened.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from accelerate.utils import tqdm
from datasets import Dataset

from mpo.common.files import PART, publish, remove_leftovers, write_text
from mpo.common.log import get_logger
from mpo.errors import DataError, StorageError
from mpo.modeling.identity import hash_file
from mpo.modeling.layout import BatchShape, call_on_trees
from mpo.modeling.trees import Tree
from mpo.training.ranks import Ranks, from_main

logger = get_logger(__name__)

_FORMAT = 1
_INDEX = "index.json"
LOGPS, HIDDEN, SHARED = "logps", "hidden", "shared"
_SIDES = {
    side: tuple(f"{side}_{part}" for part in ("prompt", "chosen", "rejected"))
    for side in ("source", "target")
}
_VISIBLE_WITHIN = 60.0  # seconds after which a folder that another node has made must be seen


@dataclass(frozen=True)
class Stored:
    """What is stored of a dataset's pairs: names of arrays of :class:`ReferenceStore`, none for no pass at all."""

    sources: frozenset[str] = frozenset({LOGPS, HIDDEN})
    targets: frozenset[str] = frozenset()

    def __le__(self, other: Stored) -> bool:
        return self.sources <= other.sources and self.targets <= other.targets

    def __or__(self, other: Stored) -> Stored:
        return Stored(self.sources | other.sources, self.targets | other.targets)


class ReferenceStore:
    """Memory-mapped results of a reference pass over ``n`` unique pairs with hidden size ``H``.

    Attributes:
        logps: ``[n, 2]`` float32, mean log-likelihood per token of chosen and rejected, nats.
        hidden: ``[n, 2, H]`` float32, pooled final hidden states of prompt + chosen and prompt + rejected, if stored.
        shared: ``[n, 2]`` float32, log-likelihood of as many first tokens of each response as the shorter one has, summed,
            if stored.
    """

    def __init__(self, folder: Path, arrays: Iterable[str]) -> None:
        self.folder = folder
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in arrays}
        self.logps = found[LOGPS]
        self.hidden = found.get(HIDDEN)
        self.shared = found.get(SHARED)

    def gaps(self) -> np.ndarray:
        """``[n]`` reward gap of every pair under the reference, nats per token."""
        gaps: np.ndarray = self.logps[:, 0] - self.logps[:, 1]
        return gaps

    def rows(self, pairs: Any) -> dict[str, np.ndarray]:
        """Log-likelihoods of some pairs: ``logps`` and, if stored, ``shared``, each ``[..., 2]``."""
        rows = {"logps": np.asarray(self.logps[pairs])}
        return rows if self.shared is None else {**rows, "shared": np.asarray(self.shared[pairs])}


class GroupReference:
    """The reference values of a dataset's groups.

    Args:
        store: Of the unique sources, or None.
        source_of_group: ``[groups]``, the unique source of each group.
        stored: What of it is stored.
        targets: Of the unique target pairs, with the pair of each target in the order of the data, or None.
        target_starts: ``[groups + 1]``, where the targets of each group start in that order.

    Attributes:
        gap: ``[groups]`` reference gap of each group's source, nats per token; NaN without a store.
        carries_source: ``[groups]``, True for the first group of each unique source.
    """

    def __init__(
        self,
        store: ReferenceStore | None,
        source_of_group: np.ndarray,
        stored: Stored,
        targets: tuple[ReferenceStore, np.ndarray] | None = None,
        target_starts: np.ndarray | None = None,
    ) -> None:
        self.store = store
        self.source_of_group = source_of_group
        self.stored = stored
        self.targets = targets
        self._target_starts = target_starts
        self.gap = (
            np.full(len(source_of_group), np.nan, dtype=np.float32)
            if store is None
            else store.gaps()[source_of_group]
        )
        self.carries_source = first_of_each(source_of_group)

    def hidden(self, group: int) -> np.ndarray:
        """``[2, H]`` pooled reference states of the group's source."""
        assert self.store is not None and self.store.hidden is not None
        return np.asarray(self.store.hidden[self.source_of_group[group]])

    def row(self, group: int) -> dict[str, Any]:
        """What :class:`mpo.training.sampling.GroupCollator` reads of a group with K targets.

        Returns:
            ``reference_gap``; ``carries_source``; and, if stored, ``reference_hidden`` ``[2, H]``, ``source_logps`` and
            ``source_shared`` ``[2]``, ``target_logps`` and ``target_shared`` ``[K, 2]``.
        """
        row: dict[str, Any] = {
            "reference_gap": float(self.gap[group]),
            "carries_source": bool(self.carries_source[group]),
        }
        if self.store is not None:
            of_source = self.store.rows(self.source_of_group[group])
            row |= {f"source_{name}": values for name, values in of_source.items()}
            if self.store.hidden is not None:
                row["reference_hidden"] = self.hidden(group)
        if self.targets is not None:
            assert self._target_starts is not None
            store, pair_of_target = self.targets
            own = pair_of_target[self._target_starts[group] : self._target_starts[group + 1]]
            row |= {f"target_{name}": values for name, values in store.rows(own).items()}
        return row

    def groups_above(self, min_gap: float | None) -> np.ndarray:
        """The groups whose source has a reference gap above a limit (nats per token); all without one.

        Raises:
            DataError: There is no such group.
        """
        if min_gap is None:
            return np.arange(len(self.gap))
        groups = np.flatnonzero(self.gap > min_gap)
        if len(groups) == 0:
            raise DataError(
                f"no source has a reference gap above min_source_gap={min_gap}; the largest is "
                f"{float(self.gap.max()):.3f}. Lower `min_source_gap`, or check that chosen and rejected are not swapped."
            )
        return groups

    def report(self, min_gap: float | None, *, is_goal: bool = True) -> dict[str, int]:
        """Count the sources: ``sources``, ``dropped`` (not above ``min_gap``) and, where their gap is known,
        ``not_positive`` (gap of 0 or less).

        Args:
            min_gap: Nats per token.
            is_goal: Whether targets are trained towards these gaps. Then sources that are kept although the model prefers
                their rejected answer are warned of.
        """
        if self.store is None:
            return {"sources": int(self.carries_source.sum()), "dropped": 0}
        gaps = self.store.gaps()
        dropped = gaps <= min_gap if min_gap is not None else np.zeros(len(gaps), dtype=bool)
        if is_goal and (count := int(((gaps <= 0) & ~dropped).sum())):
            logger.warning(
                f"{count} of {len(gaps)} sources that are trained on have a reference gap of 0 or less: on them the model "
                "prefers the rejected answer in its dominant language, too, and teaches that to the target languages. "
                "`min_source_gap: 0.0` drops them."
            )
        return {
            "sources": len(gaps),
            "not_positive": int((gaps <= 0).sum()),
            "dropped": int(dropped.sum()),
        }


def first_of_each(numbers: np.ndarray) -> np.ndarray:
    """``[n]``, True where a number appears for the first time."""
    first = np.zeros(len(numbers), dtype=bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    return first


def source_trees(groups: Mapping[str, Sequence[Any]], *, pool: bool = False) -> list[Tree]:
    """The source pairs of tokenized groups as trees that are scored, and pooled if asked for."""
    columns = (groups[column] for column in _SIDES["source"])
    return [
        Tree(prompt, chosen, rejected, pool=pool) for prompt, chosen, rejected in zip(*columns, strict=True)
    ]


def probe_trees(tokenized: Dataset) -> list[Tree]:
    """A few source trees of a tokenized dataset, for :func:`mpo.modeling.layout.usable_layout`."""
    return source_trees(tokenized[: min(3, len(tokenized))])


@dataclass(frozen=True)
class UniquePairs:
    """The different pairs of one side of tokenized groups.

    Attributes:
        side: ``"source"`` or ``"target"``.
        pair_of_row: ``[rows]``, the unique pair of each row: of each group, or of each target in the order of the data.
        first_row: ``[n]``, a row that holds each unique pair.
        sizes: ``[n]``, tokens of each: prompt once, both responses.
        starts: ``[groups + 1]``, where the rows of each group start.
        digest: Hash of all unique pairs' tokens in order.
    """

    side: str
    pair_of_row: np.ndarray
    first_row: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.first_row)

    def trees(self, columns: Dataset, pairs: Sequence[int], *, pool: bool) -> list[Tree]:
        """Some of the unique pairs, from the dataset's columns of this side, as trees that are scored."""
        rows = self.first_row[list(pairs)]
        groups = np.searchsorted(self.starts, rows, side="right") - 1
        table = columns[groups.tolist()]
        if self.side == "source":
            return source_trees(table, pool=pool)
        prompts, chosen, rejected = (table[column] for column in _SIDES["target"])
        return [
            Tree(prompts[j][slot], chosen[j][slot], rejected[j][slot], pool=pool)
            for j, slot in enumerate((rows - self.starts[groups]).tolist())
        ]


def unique_pairs(dataset: Dataset, side: str) -> UniquePairs:
    """Find the rows of tokenized groups (:data:`mpo.data.tokenization.TOKENIZED_FEATURES`) that hold the same pair.

    Args:
        dataset: Tokenized groups.
        side: ``"source"`` or ``"target"``.
    """
    seen: dict[bytes, int] = {}
    pair_of_row: list[int] = []
    first_row: list[int] = []
    sizes: list[int] = []
    counts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    total = xxhash.xxh3_128()
    columns = list(_SIDES[side])
    for table in dataset.with_format("arrow").select_columns(columns).iter(batch_size=1000):
        fields = []
        for column in columns:
            lists = table[column].combine_chunks()
            if side == "target":
                counts += [np.asarray(pc.list_value_length(lists))] if column == columns[0] else []
                lists = lists.flatten()
            elif column == columns[0]:
                counts.append(np.ones(len(table), dtype=np.int64))
            tokens = np.ascontiguousarray(lists.flatten(), dtype=np.int32).data
            fields.append((np.concatenate([[0], np.cumsum(pc.list_value_length(lists))]).tolist(), tokens))
        for row in range(len(fields[0][0]) - 1):
            digest = xxhash.xxh3_128()
            for ends, tokens in fields:
                digest.update((ends[row + 1] - ends[row]).to_bytes(8, "little"))
                digest.update(tokens[ends[row] : ends[row + 1]])
            key = digest.digest()
            if key not in seen:
                seen[key] = len(first_row)
                first_row.append(len(pair_of_row))
                sizes.append(sum(ends[row + 1] - ends[row] for ends, _ in fields))
                total.update(key)
            pair_of_row.append(seen[key])
    return UniquePairs(
        side,
        np.asarray(pair_of_row, dtype=np.int64),
        np.asarray(first_row, dtype=np.int64),
        np.asarray(sizes, dtype=np.int64),
        np.cumsum(np.concatenate(counts)),
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
    found = unique_pairs(dataset, "source")
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


def build_or_load(
    dataset: Dataset,
    forward: Callable[[], Any],
    *,
    cache_dir: str,
    key: Mapping[str, Any],
    shape: BatchShape,
    hidden_size: int,
    ranks: Ranks,
    name: str = "train",
    stored: Stored | None = None,
) -> GroupReference:
    """The reference values of a dataset, from the cache or by a pass over its unique pairs.

    Every rank calls this with the same arguments and gets the same values.

    Args:
        dataset: Tokenized groups.
        forward: Returns a context manager that yields the reference model's forward; entered only when a pass is
            needed.
        cache_dir: Folder shared by all ranks.
        key: What identifies the reference besides the rows: weights, precision.
        shape: How pairs become model calls.
        hidden_size: H.
        ranks: The process group.
        name: Name of the split, for the progress bar.
        stored: What is needed; unset: gaps and states of the sources.

    Raises:
        StorageError: The folder cannot be written, is not shared by all ranks, or the disk is full.
    """
    stored = stored or Stored()

    def store(pairs: UniquePairs, arrays: frozenset[str]) -> ReferenceStore:
        full_key: dict[str, Any] = {**key, "rows": pairs.digest, "sources": len(pairs), "format": _FORMAT}
        if HIDDEN in arrays:
            full_key["pooling"] = shape.pooling
        if (pairs.side, arrays) != ("source", Stored().sources):
            full_key |= {"side": pairs.side, "arrays": sorted(arrays)}
        folder = Path(cache_dir) / xxhash.xxh3_128(json.dumps(full_key, sort_keys=True).encode()).hexdigest()
        shapes = {LOGPS: (len(pairs), 2), HIDDEN: (len(pairs), 2, hidden_size), SHARED: (len(pairs), 2)}
        shapes = {array: size for array, size in shapes.items() if array in arrays}
        if ranks.is_main_process and folder.exists():
            _remove_if_damaged(folder, shapes)
        if not from_main(folder.exists(), ranks):
            _run_pass(dataset, pairs, forward, folder, full_key, shape, shapes, ranks, name)
        _require_visible(folder, ranks)
        return ReferenceStore(folder, shapes)

    sources = unique_pairs(dataset, "source")
    of_sources = store(sources, stored.sources) if stored.sources else None
    if not stored.targets:
        return GroupReference(of_sources, sources.pair_of_row, stored)
    targets = unique_pairs(dataset, "target")
    of_targets = store(targets, stored.targets)
    return GroupReference(
        of_sources, sources.pair_of_row, stored, (of_targets, targets.pair_of_row), targets.starts
    )


def _remove_if_damaged(folder: Path, arrays: Iterable[str]) -> None:
    problem = _verify(folder, arrays)
    if problem is None:
        return
    logger.warning(f"The reference cache {folder} is damaged ({problem}); it is computed again.")
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise StorageError(
            f"the reference cache '{folder}' is damaged ({problem}) and cannot be removed. Remove it, or set "
            "`reference_cache_dir` to another folder."
        )


_Shapes = Mapping[str, tuple[int, ...]]


def _run_pass(
    dataset: Dataset,
    pairs: UniquePairs,
    forward: Callable[[], Any],
    folder: Path,
    key: Mapping[str, Any],
    shape: BatchShape,
    shapes: _Shapes,
    ranks: Ranks,
    name: str,
) -> None:
    # Runs that differ in their settings only share a key and may start together, so each has a folder of its own.
    token = from_main(uuid.uuid4().hex[:12], ranks)
    partial = folder.with_name(f".{folder.name}.{token}{PART}")
    batches = list(_batches(pairs.sizes, shape.tokens_per_batch))
    shares = [_share(batches, rank, ranks.num_processes) for rank in range(ranks.num_processes)]
    mine = shares[ranks.process_index]
    if ranks.is_main_process:
        remove_leftovers(folder)
        _check_space(partial.parent, _bytes_of(shapes) * (2 if len(shares) > 1 else 1))
        _create(partial, shapes)
    ranks.wait_for_everyone()
    own = partial
    if len(shares) > 1:
        # Each rank writes files of its own, which the main process joins: two nodes that write to one file through a
        # memory map overwrite each other's pages on a network file system.
        _require_visible(partial, ranks)
        own = partial / f"rank-{ranks.process_index}"
        _create(own, {array: (len(mine), *size[1:]) for array, size in shapes.items()})
    arrays = _open_arrays(own, shapes)

    columns = dataset.select_columns(list(_SIDES[pairs.side]))
    # Under sharding a forward pass is a collective, so every rank makes the same number of calls.
    rounds = -(-len(batches) // ranks.num_processes)
    written = 0
    with forward() as call, torch.no_grad():
        for step in tqdm(
            range(rounds),
            desc=f"Reference pass over {len(pairs)} {name} {pairs.side}s",
            disable=bool(os.environ.get("TQDM_DISABLE", "")),
        ):
            number = step * ranks.num_processes + ranks.process_index
            batch = batches[min(number, len(batches) - 1)]
            trees = pairs.trees(columns, batch, pool=HIDDEN in shapes)
            output = call_on_trees(call, trees, shape, ranks.device, score_shared=SHARED in shapes)
            if number >= len(batches):
                continue
            places = batch if own == partial else list(range(written, written + len(batch)))
            written += len(batch)
            found = {LOGPS: output.response_logps, HIDDEN: output.pooled, SHARED: output.shared_logps}
            for array, stored in arrays.items():
                values = found[array]
                assert values is not None
                stored[places] = values.float().cpu().numpy()
    _flush(arrays, own)
    del arrays
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        if len(shares) > 1:
            _join(partial, shares, shapes)
        _complete(partial, folder, key, shapes)
    ranks.wait_for_everyone()


def _share(batches: Sequence[list[int]], rank: int, num_ranks: int) -> list[int]:
    """Pairs that a rank computes, in the order it computes them."""
    return [pair for batch in batches[rank::num_ranks] for pair in batch]


def _join(partial: Path, shares: Sequence[Sequence[int]], shapes: _Shapes) -> None:
    """Put the ranks' results in their places."""
    arrays = _open_arrays(partial, shapes)
    for rank, pairs in enumerate(shares):
        own = partial / f"rank-{rank}"
        for array, values in _open_arrays(own, shapes).items():
            for start in range(0, len(pairs), 1000):
                arrays[array][pairs[start : start + 1000]] = values[start : start + 1000]
        shutil.rmtree(own, ignore_errors=True)
    _flush(arrays, partial)


def _open_arrays(folder: Path, shapes: _Shapes) -> dict[str, np.ndarray]:
    return {array: np.load(folder / f"{array}.npy", mmap_mode="r+") for array in shapes}


def _flush(arrays: Mapping[str, np.ndarray], folder: Path) -> None:
    try:
        for array in arrays.values():
            if isinstance(array, np.memmap):  # an array of length 0 is none
                array.flush()
    except OSError as error:
        raise _not_writable(folder, error) from error


def _require_visible(folder: Path, ranks: Ranks) -> None:
    """Wait until this rank sees a folder that the main process has made.

    Raises:
        StorageError: It does not, so the ranks do not share their file system.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not folder.is_dir():
        if ranks.is_main_process or time.monotonic() > deadline:
            raise StorageError(
                f"rank {ranks.process_index} does not see '{folder}', which rank 0 has just created. All ranks need one "
                "shared folder: set `reference_cache_dir` to it."
            )
        time.sleep(0.2)
        if folder.parent.is_dir():
            os.listdir(folder.parent)  # asks the file server instead of this node's memory of it


def _batches(sizes: np.ndarray, tokens_per_batch: int) -> Iterator[list[int]]:
    """Pairs by falling size, cut into batches of at most ``tokens_per_batch`` tokens."""
    batch: list[int] = []
    tokens = 0
    for pair in np.argsort(-sizes, kind="stable"):
        if batch and tokens + sizes[pair] > tokens_per_batch:
            yield batch
            batch, tokens = [], 0
        batch.append(int(pair))
        tokens += int(sizes[pair])
    if batch:
        yield batch


def _bytes_of(shapes: _Shapes) -> int:
    return sum(4 * math.prod(size) for size in shapes.values())


def _check_space(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _not_writable(folder, error) from error
    if free < needed:
        raise StorageError(
            f"the reference cache needs {needed / 1e9:.1f} GB in '{folder}', where {free / 1e9:.1f} GB are free. Free some "
            "space, or set `reference_cache_dir`."
        )


def _create(folder: Path, shapes: _Shapes) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for array, shape in shapes.items():
            path = folder / f"{array}.npy"
            if not shape[0]:
                np.save(path, np.zeros(shape, dtype=np.float32))
                continue
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()
            # A memory map of a sparse file is killed when the disk fills up; reserved space cannot run out.
            if hasattr(os, "posix_fallocate"):  # macOS has none
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise _not_writable(folder.parent, error) from error


def _not_writable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"the reference cache cannot be written to '{folder}' ({error}). Set `reference_cache_dir` to a folder that can."
    )


def _complete(partial: Path, folder: Path, key: Mapping[str, Any], arrays: Iterable[str]) -> None:
    try:
        files = {
            f"{array}.npy": {
                "bytes": (partial / f"{array}.npy").stat().st_size,
                "xxh3_128": hash_file(partial / f"{array}.npy"),
            }
            for array in arrays
        }
        write_text(partial / _INDEX, json.dumps({"key": key, "files": files}, indent=2, sort_keys=True))
        publish(partial, folder)
    except OSError as error:
        # Another run with the same key may have finished first; its result is as good.
        if _verify(folder, arrays) is None:
            shutil.rmtree(partial, ignore_errors=True)
            return
        raise _not_writable(folder, error) from error


def _verify(folder: Path, arrays: Iterable[str]) -> str | None:
    """What is wrong with a cache folder, or None."""
    try:
        with open(folder / _INDEX, encoding="utf-8") as file:
            files = json.load(file)["files"]
        if set(files) != {f"{array}.npy" for array in arrays}:
            return "its index does not list its files"
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if hash_file(path) != expected["xxh3_128"]:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
