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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from datasets import Dataset

from mpo.common.files import PART, publish, remove_leftovers, write_text
from mpo.common.log import get_logger
from mpo.common.progress import CountProgress
from mpo.errors import DataError, StorageError
from mpo.modeling.identity import hash_file
from mpo.modeling.layout import BatchShape, call_on_trees
from mpo.training.ranks import Ranks, from_main
from mpo.training.unique_pairs import (
    SOURCE,
    TARGET,
    MismatchedPairs,
    UniquePairs,
    first_of_each,
    mismatched_pairs,
    unique_pairs,
)

logger = get_logger(__name__)

_FORMAT = 1
_INDEX = "index.json"
LOGPS, HIDDEN, SHARED, STATES = "logps", "hidden", "shared", "token_states"
_VISIBLE_WITHIN = 60.0  # seconds after which a folder that another node has made must be seen


@dataclass(frozen=True)
class Stored:
    """What is stored of a dataset's pairs: names of arrays of :class:`ReferenceStore`, none for no pass at all.

    Attributes:
        sources, targets: Of the pairs.
        mismatched: Sides whose pairs are scored with another pair's responses, too.
        max_length: Of these, see :class:`mpo.training.unique_pairs.MismatchedPairs`.
    """

    sources: frozenset[str] = frozenset({LOGPS, HIDDEN})
    targets: frozenset[str] = frozenset()
    mismatched: frozenset[str] = frozenset()
    max_length: int | None = None

    def __bool__(self) -> bool:
        return bool(self.sources or self.targets)

    def __le__(self, other: Stored) -> bool:
        return (
            self.sources <= other.sources
            and self.targets <= other.targets
            and self.mismatched <= other.mismatched
        )

    def __or__(self, other: Stored) -> Stored:
        return Stored(
            self.sources | other.sources,
            self.targets | other.targets,
            self.mismatched | other.mismatched,
            self.max_length,
        )


class ReferenceStore:
    """Memory-mapped results of a reference pass over ``n`` unique pairs with hidden size ``H``.

    Attributes:
        logps: ``[n, 2]`` float32, mean log-likelihood per token of chosen and rejected, nats.
        hidden: ``[n, 2, H]`` float32, pooled final hidden states of prompt + chosen and prompt + rejected, if stored.
        shared: ``[n, 2]`` float32, log-likelihood of as many first tokens of each response as the shorter one has, summed,
            if stored.
        states: ``[tokens, H]`` float32, final hidden states of prompt and both responses but their last tokens, of one pair after
            another, if stored.

    Args:
        folder: That holds them.
        arrays: Names of the arrays.
        starts: ``[n + 1]``, where the states of each pair start.
    """

    def __init__(self, folder: Path, arrays: Iterable[str], starts: np.ndarray) -> None:
        self.folder = folder
        self._starts = starts
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in arrays}
        self.logps = found[LOGPS]
        self.hidden = found.get(HIDDEN)
        self.shared = found.get(SHARED)
        self.states = found.get(STATES)

    def gaps(self) -> np.ndarray:
        """``[n]`` reward gap of every pair under the reference, nats per token."""
        gaps: np.ndarray = self.logps[:, 0] - self.logps[:, 1]
        return gaps

    def rows(self, pairs: np.ndarray, *, states: bool = False) -> list[dict[str, Any]]:
        """What is stored of each of some pairs: ``logps`` and ``shared``, each ``[2]``, and ``token_states`` ``[tokens, H]``; with
        `states` also ``hidden`` ``[2, H]``."""
        arrays = {LOGPS: self.logps} if self.shared is None else {LOGPS: self.logps, SHARED: self.shared}
        if states and self.hidden is not None:
            arrays[HIDDEN] = self.hidden
        found = {name: np.asarray(values[pairs]) for name, values in arrays.items()}
        rows = [{name: values[i] for name, values in found.items()} for i in range(len(pairs))]
        if self.states is not None:
            for row, pair in zip(rows, pairs, strict=True):
                row[STATES] = np.asarray(self.states[self._starts[pair] : self._starts[pair + 1]])
        return rows


class GroupReference:
    """The reference values of a dataset's groups.

    Args:
        stored: What of it is stored.
        source_of_group: ``[groups]``, the unique source of each group.
        sources, targets: The store of each side's unique pairs and the pairs, or None.
        mismatched: The same for pairs with other responses, by side.

    Attributes:
        store: Of the unique sources, or None.
        gap: ``[groups]`` reference gap of each group's source, nats per token; NaN without a store.
        carries_source: ``[groups]``, True for the first group of each unique source.
    """

    def __init__(
        self,
        stored: Stored,
        source_of_group: np.ndarray,
        sources: ReferenceStore | None,
        targets: tuple[ReferenceStore, UniquePairs] | None = None,
        mismatched: Mapping[str, tuple[ReferenceStore, MismatchedPairs]] | None = None,
    ) -> None:
        self.stored = stored
        self.source_of_group = source_of_group
        self.store = sources
        self._targets = targets
        self._mismatched = mismatched or {}
        unknown = np.full(len(source_of_group), np.nan, dtype=np.float32)
        self.gap = unknown if sources is None else sources.gaps()[source_of_group]
        self.carries_source = first_of_each(source_of_group)

    def hidden(self, group: int) -> np.ndarray:
        """``[2, H]`` pooled reference states of the group's source."""
        assert self.store is not None and self.store.hidden is not None
        return np.asarray(self.store.hidden[self.source_of_group[group]])

    def row(self, group: int) -> dict[str, Any]:
        """What :class:`mpo.training.sampling.GroupCollator` reads of a group with K targets.

        Returns:
            ``reference_gap``; ``carries_source``; and, if stored, ``reference_hidden`` ``[2, H]``; for each side of which
            it is stored a list of what the reference says of each of its pairs, ``source_reference`` and
            ``target_reference``: ``logps`` and ``shared``, each ``[2]``, ``token_states`` ``[tokens, H]``, of targets also ``hidden``
            ``[2, H]``; and, where pairs are mismatched, ``other_responses``, two lists of tokens, and ``other_logps`` ``[2]``.
        """
        row: dict[str, Any] = {
            "reference_gap": float(self.gap[group]),
            "carries_source": bool(self.carries_source[group]),
        }
        found: dict[str, list[dict[str, Any]]] = {}
        if self.store is not None:
            found[SOURCE] = self.store.rows(self.source_of_group[[group]])
            if self.store.hidden is not None:
                row["reference_hidden"] = self.hidden(group)
        if self._targets is not None:
            store, pairs = self._targets
            found[TARGET] = store.rows(pairs.of_group(group), states=True)
        for side, (store, mismatched) in self._mismatched.items():
            own = mismatched.own.of_group(group)
            for values, tree, others in zip(found[side], mismatched.trees(own), store.rows(own), strict=True):
                values |= {"other_responses": (tree.chosen, tree.rejected), "other_logps": others[LOGPS]}
        return {**row, **{f"{side}_reference": values for side, values in found.items()}}

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


class MixedReference(GroupReference):
    """The reference values of a dataset some of whose groups are harmless.

    Args:
        harmless: ``[groups]``, True for these.
        references: Of the harmful groups alone and of the harmless ones alone; None where there are none.
    """

    def __init__(
        self, harmless: np.ndarray, references: tuple[GroupReference | None, GroupReference | None]
    ) -> None:
        self._harmless, self._of_kind = harmless, references
        self._place = np.where(harmless, np.cumsum(harmless), np.cumsum(~harmless)) - 1
        self.gap = np.full(len(harmless), np.nan, dtype=np.float32)
        self.carries_source = np.zeros(len(harmless), dtype=bool)
        for kind, part in zip((False, True), references, strict=True):
            if part is not None:
                self.gap[harmless == kind] = part.gap
                self.carries_source[harmless == kind] = part.carries_source

    def of_kind(self, *, harmless: bool) -> GroupReference | None:
        """The values of the groups of one kind, or None where there are none."""
        return self._of_kind[harmless]

    def hidden(self, group: int) -> np.ndarray:
        """``[2, H]`` pooled reference states of the group's source."""
        return self._part(group).hidden(int(self._place[group]))

    def row(self, group: int) -> dict[str, Any]:
        """As :meth:`GroupReference.row`."""
        return self._part(group).row(int(self._place[group]))

    def groups_above(self, min_gap: float | None) -> np.ndarray:
        """The harmful groups whose source has a reference gap above a limit, and all harmless ones.

        Raises:
            DataError: There are harmful groups and none of them is.
        """
        kept = np.ones(len(self.gap), dtype=bool)
        harmful = self.of_kind(harmless=False)
        if harmful is not None:
            place = np.flatnonzero(~self._harmless)
            kept[place] = False
            kept[place[harmful.groups_above(min_gap)]] = True
        return np.flatnonzero(kept)

    def report(self, min_gap: float | None, *, is_goal: bool = True) -> dict[str, int]:
        """As :meth:`GroupReference.report`, of the harmful sources, and the number of ``harmless`` ones."""
        harmful, harmless = self._of_kind
        found = {"sources": 0, "dropped": 0} if harmful is None else harmful.report(min_gap, is_goal=is_goal)
        return {**found, "harmless": 0 if harmless is None else int(harmless.carries_source.sum())}

    def _part(self, group: int) -> GroupReference:
        part = self.of_kind(harmless=bool(self._harmless[group]))
        assert part is not None
        return part


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
    stored = Stored() if stored is None else stored

    def store(pairs: _Pairs, arrays: frozenset[str]) -> ReferenceStore:
        full_key: dict[str, Any] = {**key, "rows": pairs.digest, "sources": len(pairs), "format": _FORMAT}
        if HIDDEN in arrays:
            full_key["pooling"] = shape.pooling
        if (pairs.side, arrays) != (SOURCE, Stored().sources):
            full_key |= {"side": pairs.side, "arrays": sorted(arrays)}
        folder = Path(cache_dir) / xxhash.xxh3_128(json.dumps(full_key, sort_keys=True).encode()).hexdigest()
        starts = _starts(pairs)
        shapes = _shapes_of(pairs, arrays, hidden_size)
        if ranks.is_main_process and folder.exists():
            _remove_if_damaged(folder, shapes)
        if not from_main(folder.exists(), ranks):
            _run_pass(pairs, forward, folder, full_key, shape, shapes, ranks, name)
        _require_visible(folder, ranks)
        return ReferenceStore(folder, shapes, starts)

    sources = unique_pairs(dataset, SOURCE)
    by_side = {SOURCE: sources}
    if stored.targets:
        by_side[TARGET] = unique_pairs(dataset, TARGET)
    others = {side: mismatched_pairs(by_side[side], dataset, stored.max_length) for side in stored.mismatched}
    return GroupReference(
        stored,
        sources.pair_of_row,
        store(sources, stored.sources) if stored.sources else None,
        (store(by_side[TARGET], stored.targets), by_side[TARGET]) if stored.targets else None,
        {side: (store(pairs, frozenset({LOGPS})), pairs) for side, pairs in sorted(others.items())},
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


_Pairs = UniquePairs | MismatchedPairs
_Shapes = Mapping[str, tuple[int, ...]]


def cache_bytes(dataset: Dataset, stored: Stored, hidden_size: int) -> int:
    """What the reference cache takes of the disk for what is stored of the sources and targets of tokenized groups."""
    sides = {SOURCE: stored.sources, TARGET: stored.targets}
    return sum(
        _bytes_of(_shapes_of(unique_pairs(dataset, side), arrays, hidden_size))
        for side, arrays in sides.items()
        if arrays
    )


def _shapes_of(pairs: _Pairs, arrays: frozenset[str], hidden_size: int) -> _Shapes:
    """The arrays that are stored of some pairs."""
    shapes = {
        LOGPS: (len(pairs), 2),
        HIDDEN: (len(pairs), 2, hidden_size),
        SHARED: (len(pairs), 2),
        STATES: (int(_starts(pairs)[-1]), hidden_size),
    }
    return {array: size for array, size in shapes.items() if array in arrays}


def _run_pass(
    pairs: _Pairs,
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
    batches = list(_batches(pairs.lengths.sum(axis=1), shape.tokens_per_batch))
    shares = [_share(batches, rank, ranks.num_processes) for rank in range(ranks.num_processes)]
    mine, starts = shares[ranks.process_index], _starts(pairs)
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
        _create(
            own, {array: (len(_places(array, mine, starts)), *size[1:]) for array, size in shapes.items()}
        )
    arrays = _open_arrays(own, shapes)

    # Under sharding a forward pass is a collective, so every rank makes the same number of calls.
    rounds = -(-len(batches) // ranks.num_processes)
    written = dict.fromkeys(arrays, 0)
    title = f"Reference pass over {len(pairs)} {name} {pairs.side}s"
    shown = CountProgress(title, rounds, unit="call", brief=True) if ranks.is_main_process else None
    with shown or nullcontext(), forward() as call, torch.no_grad():
        for step in range(rounds):
            number = step * ranks.num_processes + ranks.process_index
            batch = batches[min(number, len(batches) - 1)]
            trees = pairs.trees(batch, pool=HIDDEN in shapes, keep=STATES in shapes)
            output = call_on_trees(call, trees, shape, ranks.device, score_shared=SHARED in shapes)
            if shown is not None:
                shown.advance()
            if number >= len(batches):
                continue
            found = {
                LOGPS: output.response_logps,
                HIDDEN: output.pooled,
                SHARED: output.shared_logps,
                STATES: output.kept_states,
            }
            for array, stored in arrays.items():
                values = found[array]
                assert values is not None
                places = _places(array, batch, starts)
                if own != partial:
                    places = np.arange(written[array], written[array] + len(places))
                    written[array] += len(places)
                stored[places] = values.float().cpu().numpy()
    _flush(arrays, own)
    del arrays
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        if len(shares) > 1:
            _join(partial, shares, shapes, starts)
        _complete(partial, folder, key, shapes)
    ranks.wait_for_everyone()


def _starts(pairs: _Pairs) -> np.ndarray:
    """``[n + 1]``, where the states of each pair start: one for each token of prompt and responses but their last ones."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(pairs.lengths.sum(axis=1) - 2)])


def _places(array: str, pairs: Sequence[int], starts: np.ndarray) -> np.ndarray:
    """The rows of an array that hold some pairs."""
    numbers = np.asarray(pairs, dtype=np.int64)
    if array != STATES or not len(numbers):
        return numbers
    return np.concatenate([np.arange(starts[pair], starts[pair + 1]) for pair in numbers])


def _share(batches: Sequence[list[int]], rank: int, num_ranks: int) -> list[int]:
    """Pairs that a rank computes, in the order it computes them."""
    return [pair for batch in batches[rank::num_ranks] for pair in batch]


def _join(partial: Path, shares: Sequence[Sequence[int]], shapes: _Shapes, starts: np.ndarray) -> None:
    """Put the ranks' results in their places."""
    arrays = _open_arrays(partial, shapes)
    for rank, pairs in enumerate(shares):
        own = partial / f"rank-{rank}"
        for array, values in _open_arrays(own, shapes).items():
            places = _places(array, pairs, starts)
            for start in range(0, len(places), 1000):
                arrays[array][places[start : start + 1000]] = values[start : start + 1000]
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
