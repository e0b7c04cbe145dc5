"""The reference pass: what the frozen starting policy says of each source, computed once and kept on disk.

MPO's target is a constant: the reward gap ``RG_ref^d`` and the pooled hidden states ``h_ref^d`` of the starting policy
on every pair in the dominant language. They are computed before the first step, for *unique* sources only and without
gradients, and stored as plain ``.npy`` files that training reads through a memory map, so no reference model is in
memory while training and nothing grows with the size of the data.

A cache belongs to one key: weights, rows (as token ids, so tokenizer, chat template and maximum length are in it),
pooling and precision. Any change of these is another key. A cache is written whole or not at all, as
:mod:`mpo.common.files` does it; its files' checksums are verified whenever it is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_ARRAYS = ("logps", "hidden")
_SOURCE = ("source_prompt", "source_chosen", "source_rejected")
_VISIBLE_WITHIN = 60.0  # seconds after which a folder that another node has made must be seen


class ReferenceStore:
    """Memory-mapped results of a reference pass over ``n`` unique sources with hidden size ``H``.

    Attributes:
        logps: ``[n, 2]`` float32, mean log-likelihood per token of chosen and rejected, nats.
        hidden: ``[n, 2, H]`` float32, pooled final hidden states of prompt + chosen and prompt + rejected.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logps = np.load(folder / "logps.npy", mmap_mode="r", allow_pickle=False)
        self.hidden = np.load(folder / "hidden.npy", mmap_mode="r", allow_pickle=False)

    def gaps(self) -> np.ndarray:
        """``[n]`` reward gap of every source under the reference, nats per token."""
        gaps: np.ndarray = self.logps[:, 0] - self.logps[:, 1]
        return gaps


class SourceReference:
    """The reference values of a dataset's groups: a store and which of its sources each group has."""

    def __init__(self, store: ReferenceStore, source_of_group: np.ndarray) -> None:
        self.store = store
        self.source_of_group = source_of_group
        self.gap = store.gaps()[source_of_group]
        """``[groups]`` reference gap of each group's source, nats per token."""

    def hidden(self, group: int) -> np.ndarray:
        """``[2, H]`` pooled reference states of the group's source."""
        return np.asarray(self.store.hidden[self.source_of_group[group]])

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

    def report(self, min_gap: float | None) -> dict[str, int]:
        """Count the sources: ``sources``, ``not_positive`` (gap of 0 or less), ``dropped`` (not above ``min_gap``).

        Sources that are kept although the model prefers their rejected answer are warned of.
        """
        gaps = self.store.gaps()
        dropped = gaps <= min_gap if min_gap is not None else np.zeros(len(gaps), dtype=bool)
        if count := int(((gaps <= 0) & ~dropped).sum()):
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


def source_trees(groups: Mapping[str, Sequence[Any]], *, pool: bool = False) -> list[Tree]:
    """The source pairs of tokenized groups as trees that are scored, and pooled if asked for."""
    columns = (groups[column] for column in _SOURCE)
    return [
        Tree(prompt, chosen, rejected, pool=pool) for prompt, chosen, rejected in zip(*columns, strict=True)
    ]


def probe_trees(tokenized: Dataset) -> list[Tree]:
    """A few source trees of a tokenized dataset, for :func:`mpo.modeling.layout.usable_layout`."""
    return source_trees(tokenized[: min(3, len(tokenized))])


def unique_sources(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, str]:
    """Find the groups that share a source.

    Args:
        dataset: Tokenized groups (:data:`mpo.data.tokenization.TOKENIZED_FEATURES`).

    Returns:
        ``source_of_group`` ``[groups]``, ``first_group`` ``[sources]`` (a group that holds each source), and a hash of
        all sources' tokens in order.
    """
    seen: dict[bytes, int] = {}
    source_of_group = np.empty(len(dataset), dtype=np.int64)
    first_group: list[int] = []
    total = xxhash.xxh3_128()
    start = 0
    for table in dataset.with_format("arrow").select_columns(list(_SOURCE)).iter(batch_size=1000):
        fields = []
        for column in _SOURCE:
            lists = table[column].combine_chunks()
            tokens = np.ascontiguousarray(lists.flatten(), dtype=np.int32).data
            fields.append((np.concatenate([[0], np.cumsum(pc.list_value_length(lists))]).tolist(), tokens))
        for row in range(len(table)):
            digest = xxhash.xxh3_128()
            for ends, tokens in fields:
                digest.update((ends[row + 1] - ends[row]).to_bytes(8, "little"))
                digest.update(tokens[ends[row] : ends[row + 1]])
            key = digest.digest()
            if key not in seen:
                seen[key] = len(first_group)
                first_group.append(start + row)
                total.update(key)
            source_of_group[start + row] = seen[key]
        start += len(table)
    return source_of_group, np.asarray(first_group, dtype=np.int64), total.hexdigest()


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
) -> SourceReference:
    """The reference values of a dataset, from the cache or by a pass over its unique sources.

    Every rank calls this with the same arguments and gets the same values.

    Args:
        dataset: Tokenized groups.
        forward: Returns a context manager that yields the reference model's forward; entered only when a pass is
            needed.
        cache_dir: Folder shared by all ranks.
        key: What identifies the reference besides the rows: weights, pooling, precision.
        shape: How sources become model calls.
        hidden_size: H.
        ranks: The process group.
        name: Name of the split, for the progress bar.

    Raises:
        StorageError: The folder cannot be written, is not shared by all ranks, or the disk is full.
    """
    source_of_group, first_group, rows_hash = unique_sources(dataset)
    full_key = {
        **key,
        "rows": rows_hash,
        "sources": len(first_group),
        "pooling": shape.pooling,
        "format": _FORMAT,
    }
    folder = Path(cache_dir) / xxhash.xxh3_128(json.dumps(full_key, sort_keys=True).encode()).hexdigest()
    if ranks.is_main_process and folder.exists():
        problem = _verify(folder)
        if problem is not None:
            logger.warning(f"The reference cache {folder} is damaged ({problem}); it is computed again.")
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                raise StorageError(
                    f"the reference cache '{folder}' is damaged ({problem}) and cannot be removed. Remove it, or set "
                    "`reference_cache_dir` to another folder."
                )
    if not from_main(folder.exists(), ranks):
        _run_pass(dataset, first_group, forward, folder, full_key, shape, hidden_size, ranks, name)
    _require_visible(folder, ranks)
    return SourceReference(ReferenceStore(folder), source_of_group)


def _run_pass(
    dataset: Dataset,
    first_group: np.ndarray,
    forward: Callable[[], Any],
    folder: Path,
    key: Mapping[str, Any],
    shape: BatchShape,
    hidden_size: int,
    ranks: Ranks,
    name: str,
) -> None:
    # Runs that differ in their settings only share a key and may start together, so each has a folder of its own.
    token = from_main(uuid.uuid4().hex[:12], ranks)
    partial = folder.with_name(f".{folder.name}.{token}{PART}")
    batches = list(_source_batches(dataset, first_group, shape.tokens_per_batch))
    shares = [_share(batches, rank, ranks.num_processes) for rank in range(ranks.num_processes)]
    mine = shares[ranks.process_index]
    if ranks.is_main_process:
        remove_leftovers(folder)
        _check_space(partial.parent, _bytes_of(len(first_group), hidden_size) * (2 if len(shares) > 1 else 1))
        _create(partial, len(first_group), hidden_size)
    ranks.wait_for_everyone()
    own = partial
    if len(shares) > 1:
        # Each rank writes files of its own, which the main process joins: two nodes that write to one file through a
        # memory map overwrite each other's pages on a network file system.
        _require_visible(partial, ranks)
        own = partial / f"rank-{ranks.process_index}"
        _create(own, len(mine), hidden_size)
    arrays = _open_arrays(own)

    source_columns = dataset.select_columns(list(_SOURCE))
    # Under sharding a forward pass is a collective, so every rank makes the same number of calls.
    rounds = -(-len(batches) // ranks.num_processes)
    written = 0
    with forward() as call, torch.no_grad():
        for step in tqdm(
            range(rounds),
            desc=f"Reference pass over {len(first_group)} {name} sources",
            disable=bool(os.environ.get("TQDM_DISABLE", "")),
        ):
            number = step * ranks.num_processes + ranks.process_index
            sources = batches[min(number, len(batches) - 1)]
            trees = source_trees(source_columns[[int(first_group[i]) for i in sources]], pool=True)
            output = call_on_trees(call, trees, shape, ranks.device)
            assert output.response_logps is not None and output.pooled is not None
            if number >= len(batches):
                continue
            places = sources if own == partial else list(range(written, written + len(sources)))
            written += len(sources)
            arrays["logps"][places] = output.response_logps.float().cpu().numpy()
            arrays["hidden"][places] = output.pooled.float().cpu().numpy()
    _flush(arrays, own)
    del arrays
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        if len(shares) > 1:
            _join(partial, shares)
        _complete(partial, folder, key)
    ranks.wait_for_everyone()


def _share(batches: Sequence[list[int]], rank: int, num_ranks: int) -> list[int]:
    """Sources that a rank computes, in the order it computes them."""
    return [source for batch in batches[rank::num_ranks] for source in batch]


def _join(partial: Path, shares: Sequence[Sequence[int]]) -> None:
    """Put the ranks' results in their places."""
    arrays = _open_arrays(partial)
    for rank, sources in enumerate(shares):
        own = partial / f"rank-{rank}"
        for array, values in _open_arrays(own).items():
            for start in range(0, len(sources), 1000):
                arrays[array][sources[start : start + 1000]] = values[start : start + 1000]
        shutil.rmtree(own, ignore_errors=True)
    _flush(arrays, partial)


def _open_arrays(folder: Path) -> dict[str, np.ndarray]:
    return {array: np.load(folder / f"{array}.npy", mmap_mode="r+") for array in _ARRAYS}


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


def _source_batches(dataset: Dataset, first_group: np.ndarray, tokens_per_batch: int) -> Iterator[list[int]]:
    """Sources by falling length, cut into batches of at most ``tokens_per_batch`` tokens."""
    lengths = np.zeros(len(first_group), dtype=np.int64)
    table = dataset.with_format("arrow").select_columns(list(_SOURCE))
    for start in range(0, len(first_group), 1000):
        part = table[[int(i) for i in first_group[start : start + 1000]]]
        for column in _SOURCE:
            lengths[start : start + len(part)] += np.asarray([len(ids) for ids in part[column]])
    batch: list[int] = []
    tokens = 0
    for source in np.argsort(-lengths, kind="stable"):
        if batch and tokens + lengths[source] > tokens_per_batch:
            yield batch
            batch, tokens = [], 0
        batch.append(int(source))
        tokens += int(lengths[source])
    if batch:
        yield batch


def _bytes_of(sources: int, hidden_size: int) -> int:
    return sources * 2 * (1 + hidden_size) * 4


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


def _create(folder: Path, sources: int, hidden_size: int) -> None:
    shapes = {"logps": (sources, 2), "hidden": (sources, 2, hidden_size)}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for array, shape in shapes.items():
            path = folder / f"{array}.npy"
            if not sources:
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


def _complete(partial: Path, folder: Path, key: Mapping[str, Any]) -> None:
    try:
        files = {
            f"{array}.npy": {
                "bytes": (partial / f"{array}.npy").stat().st_size,
                "xxh3_128": hash_file(partial / f"{array}.npy"),
            }
            for array in _ARRAYS
        }
        write_text(partial / _INDEX, json.dumps({"key": key, "files": files}, indent=2, sort_keys=True))
        publish(partial, folder)
    except OSError as error:
        # Another run with the same key may have finished first; its result is as good.
        if _verify(folder) is None:
            shutil.rmtree(partial, ignore_errors=True)
            return
        raise _not_writable(folder, error) from error


def _verify(folder: Path) -> str | None:
    """What is wrong with a cache folder, or None."""
    try:
        with open(folder / _INDEX, encoding="utf-8") as file:
            files = json.load(file)["files"]
        if set(files) != {f"{array}.npy" for array in _ARRAYS}:
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
