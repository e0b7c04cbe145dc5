"""How time and memory grow: with targets per source, length, vocabulary, and the number of groups on disk.

    python -m benchmarks.scaling --parts targets length vocabulary
    python -m benchmarks.scaling --parts groups --groups 10000 100000 1000000

**targets, length, vocabulary** run training steps on random tokens, all but one size held still. By default the model
is a small Llama-type one that a CPU can run; ``--shape`` takes a real one.

**groups** makes tokenized groups on disk, as training reads them through a memory map, and measures all that happens to
them before and while the model computes: counting languages, starting either sampler, finding unique sources, the
reference pass, opening its cache, and making micro-batches. In the reference pass a stand-in returns zeros in place of
the model, whose time ``benchmarks.step`` measures; hidden states have 16 numbers, so that a million of them fit any disk.
Memory is what the process holds beyond the files it has mapped, at its most, over what it held before.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import LlamaConfig, PretrainedConfig

from benchmarks import command, formulations, lengths, step
from benchmarks.lengths import GroupLengths, PairLengths
from mpo.common.tables import TextTable
from mpo.errors import ConfigError
from mpo.modeling.head import RewardGapOutput
from mpo.modeling.layout import BatchShape
from mpo.planning.known_models import SHAPES, shape_config
from mpo.training.order import GroupBatchSampler, TokenBudgetSampler
from mpo.training.reference import GroupReference, build_or_load
from mpo.training.sampling import GroupCollator, GroupDataset, count_languages
from mpo.training.unique_pairs import unique_sources
from mpo.training.workload import group_tokens

PARTS = ("targets", "length", "vocabulary", "groups")
LANGUAGES = ("ar", "bn", "ja", "ko", "sw", "zh")
_HIDDEN = 16
_CHUNK = 10_000


# ---- Steps ---------------------------------------------------------------------------------------------------------


def small_config(vocabulary: int = 32_000) -> PretrainedConfig:
    """A Llama-type model of 4 layers and hidden size 256."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def points(part: str, values: list[int] | None) -> list[tuple[int, int, GroupLengths]]:
    """Value, vocabulary and group of each point of a part."""

    def group(targets: int, response: int) -> GroupLengths:
        pair = PairLengths(32, response, response)
        return GroupLengths(pair, (pair,) * targets)

    if part == "targets":
        return [(n, 32_000, group(n, 96)) for n in values or (1, 2, 4, 8)]
    if part == "length":
        return [(n, 32_000, group(4, n)) for n in values or (32, 64, 128, 256)]
    return [(n, n, group(4, 96)) for n in values or (32_000, 64_000, 128_000, 256_000)]


def measure_part(part: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time and memory of one step at every point."""
    records = []
    for value, vocabulary, sizes in points(part, options.values):
        config: Any = shape_config(options.shape) if options.shape else small_config()
        if part == "vocabulary" or not options.shape:
            config.get_text_config().vocab_size = vocabulary
        torch.manual_seed(0)
        mixed = torch.bfloat16 if device.type == "cuda" else None
        setting = formulations.build_setting(
            config, device=device, dtype=mixed or torch.float32, lora=options.lora, autocast=mixed
        )
        groups = lengths.draw_tokens([sizes], config.get_text_config().vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            found = step.measure(
                setting,
                groups,
                options.formulations,
                rounds=options.rounds,
                warmup=1,
                folder=folder,
                keep_memory=False,
            )
        records += [
            {"value": value, "formulation": name, "seconds": entry.seconds, "peak_bytes": entry.peak_bytes}
            for name, entry in found.items()
        ]
        del setting
    return records


def show_part(part: str, records: list[dict[str, Any]]) -> None:
    """One row for each point and formulation."""
    rows = tuple(
        (
            f"{record['value']:,}",
            record["formulation"],
            f"{np.median(record['seconds']):.3f}" if record["seconds"] else "-",
            f"{record['peak_bytes'] / 2**30:.2f}" if record["peak_bytes"] else "-",
        )
        for record in records
    )
    values = [row[0] for row in rows]
    rules = frozenset(i for i in range(1, len(rows)) if values[i] != values[i - 1])
    TextTable(
        title=f"One step against {part}",
        header=(part.capitalize(), "Formulation", "s / step", "Peak GiB"),
        rows=rows,
        rules=rules,
    ).show()
    print()


# ---- Groups on disk ------------------------------------------------------------------------------------------------


def write_groups(path: Path, count: int, targets: int = 2, seed: int = 0) -> Dataset:
    """
    Tokenized groups with random tokens, in a file that is mapped into memory.

    Args:
        path: Arrow file to write.
        count: groups.
        targets: target pairs of each.
        seed: of lengths and tokens.
    """
    rng = np.random.default_rng(seed)

    def lists(sizes: np.ndarray) -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return pa.ListArray.from_arrays(
            offsets, pa.array(rng.integers(10, 1000, offsets[-1], dtype=np.int32))
        )

    def chunk(first: int, size: int) -> pa.Table:
        nested = np.arange(size + 1, dtype=np.int32) * targets
        columns: dict[str, Any] = {}
        for name, low, high in (("prompt", 6, 12), ("chosen", 6, 16), ("rejected", 6, 24)):
            columns[f"source_{name}"] = lists(rng.integers(low, high, size))
            inner = lists(rng.integers(low, high, size * targets))
            columns[f"target_{name}"] = pa.ListArray.from_arrays(nested, inner)
        languages = pa.array([LANGUAGES[i % len(LANGUAGES)] for i in range(size * targets)])
        columns["target_language"] = pa.ListArray.from_arrays(nested, languages)
        rows = pa.array(np.arange(first * targets, (first + size) * targets))
        columns["row"] = pa.ListArray.from_arrays(nested, rows)
        columns["origin"] = pa.array(["synthetic"] * size)
        return pa.table(columns)

    writer = None
    with contextlib.ExitStack() as stack:
        for first in range(0, count, _CHUNK):
            table = chunk(first, min(_CHUNK, count - first))
            if writer is None:
                file = stack.enter_context(pa.OSFile(str(path), "wb"))
                writer = stack.enter_context(pa.ipc.new_stream(file, table.schema))
            writer.write_table(table)
    return Dataset.from_file(str(path))


def anonymous_bytes() -> int | None:
    """Memory of this process that no file stands for, on Linux."""
    try:
        found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


@contextlib.contextmanager
def watched(records: list[dict[str, Any]], name: str) -> Iterator[None]:
    """Note the seconds that the block takes and the most anonymous memory in it, over what there was before."""
    start_bytes = anonymous_bytes()
    most = [start_bytes or 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most.append(max(most.pop(), anonymous_bytes() or 0))

    watcher = threading.Thread(target=watch, daemon=True)
    if start_bytes is not None:
        watcher.start()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    done.set()
    grown = None
    if start_bytes is not None:
        watcher.join()
        grown = max(most[0], anonymous_bytes() or 0) - start_bytes
    records.append({"what": name, "seconds": seconds, "grown_bytes": grown})


class _SingleProcess:
    num_processes, process_index, is_main_process = 1, 0, True
    device = torch.device("cpu")

    def wait_for_everyone(self) -> None:
        pass


def stand_in(**batch: Any) -> RewardGapOutput:
    """What a model would return for these trees, all zero."""
    return RewardGapOutput(
        response_logps=torch.zeros(len(batch["score_lengths"]) // 2, 2),
        pooled=torch.zeros(len(batch["pool_lengths"]) // 2, 2, _HIDDEN),
    )


def measure_groups(count: int, folder: Path, *, reference_pass: bool = True) -> list[dict[str, Any]]:
    """All that is done with ``count`` groups on disk, in the order of a run; without the reference pass, up to there."""
    records: list[dict[str, Any]] = []
    groups = write_groups(folder / "groups.arrow", count)
    shape = BatchShape("tree", 1 << 20, 0, "mean", 32_768)

    def reference() -> GroupReference:
        return build_or_load(
            groups,
            lambda: contextlib.nullcontext(stand_in),
            cache_dir=str(folder / "reference"),
            key={"weights": "none"},
            shape=shape,
            hidden_size=_HIDDEN,
            ranks=_SingleProcess(),
        )

    def first_batch(make: Callable[[], Any]) -> None:
        next(iter(make()))

    indices = np.arange(count)
    with watched(records, "languages counted"):
        count_languages(groups)
    with watched(records, "sampler by groups, first micro-batch"):
        first_batch(lambda: GroupBatchSampler(indices, 4, seed=0))
    with watched(records, "sampler by tokens, first micro-batch"):
        first_batch(lambda: TokenBudgetSampler(indices, group_tokens(groups), 8192, seed=0))
    with watched(records, "unique sources found"):
        unique_sources(groups)
    if not reference_pass:
        return records
    with watched(records, "reference pass without the model"):
        reference()
    with watched(records, "reference opened from its cache"):
        values = reference()
    dataset = GroupDataset(groups, values)
    shape = BatchShape("tree", 1 << 20, 0, "mean", 1 << 20)
    collator = GroupCollator(LANGUAGES, [1.0] * len(LANGUAGES), shape)
    order = GroupBatchSampler(indices, 4, seed=0)
    with watched(records, "200 micro-batches of 4 groups"):
        for _, batch in zip(range(200), order, strict=False):
            collator(dataset.__getitems__(batch))
    return records


def show_groups(count: int, records: list[dict[str, Any]], size: int) -> None:
    """One row for each thing that was done."""
    rows = tuple(
        (
            record["what"],
            f"{record['seconds']:.2f}",
            f"{record['grown_bytes'] / 2**20:.0f}" if record["grown_bytes"] is not None else "-",
        )
        for record in records
    )
    TextTable(
        title=f"{count:,} groups, {size / 2**20:.0f} MiB on disk",
        header=("What", "Seconds", "MiB beyond files"),
        rows=rows,
    ).show()
    print()


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--values", type=int, nargs="+", help="sizes of a single part")
    parser.add_argument("--groups", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--no_reference", action="store_true", help="leave out the reference pass over the groups"
    )
    parser.add_argument("--shape", help=f"a small model by default, or one of {', '.join(SHAPES)}")
    parser.add_argument("--lora", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--formulations",
        nargs="+",
        choices=formulations.NAMES,
        default=["official", "padded", "trees (tree)"],
    )
    parser.add_argument("--out", default="runs/benchmarks/scaling.json")
    options = parser.parse_args()
    steps = [part for part in options.parts if part != "groups"]
    if options.values and len(steps) != 1:
        raise ConfigError("`--values` are the sizes of one part: name one of targets, length and vocabulary.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"device": str(device), "shape": options.shape or "small", "lora": options.lora}
    for part in steps:
        result[part] = measure_part(part, options, device)
        show_part(part, result[part])
    if "groups" in options.parts:
        result["groups"] = {}
        for count in options.groups:
            with tempfile.TemporaryDirectory() as folder:
                records = measure_groups(count, Path(folder), reference_pass=not options.no_reference)
                size = (Path(folder) / "groups.arrow").stat().st_size
            result["groups"][str(count)] = {"file_bytes": size, "measured": records}
            show_groups(count, records, size)
    command.save(options.out, result)


if __name__ == "__main__":
    command.run(main)
