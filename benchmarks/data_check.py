"""Rows per second of loading and checking preference data, by stage, and the memory that it takes.

    python -m benchmarks.data_check --rows 10000
    python -m benchmarks.data_check --rows 1000000 --check_only
    python -m benchmarks.data_check --rows 10000 --model MODEL

A row is a source and a target pair whose texts have 300 characters each, made of random words in the language's script. With a
model, its tokenizer makes training data of them, and is timed by itself on the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

_CHARACTERS = 300
_PARTS = ("prompt", "chosen", "rejected")
_WORDS = {
    "en": [
        "how",
        "can",
        "the",
        "door",
        "of",
        "this",
        "house",
        "be",
        "opened",
        "when",
        "nobody",
        "has",
        "its",
        "key",
        "and",
        "rain",
        "is",
        "near",
    ],
    "sw": [
        "jinsi",
        "gani",
        "mlango",
        "wa",
        "nyumba",
        "hii",
        "unaweza",
        "kufunguliwa",
        "wakati",
        "hakuna",
        "mtu",
        "mwenye",
        "ufunguo",
        "na",
        "mvua",
    ],
    "bn": [
        "এই",
        "বাড়ির",
        "দরজা",
        "কীভাবে",
        "খোলা",
        "যায়",
        "যখন",
        "কারও",
        "কাছে",
        "চাবি",
        "নেই",
        "এবং",
        "বৃষ্টি",
        "কাছে",
    ],
    "zh": [
        "这",
        "房子",
        "的",
        "门",
        "怎么",
        "打开",
        "如果",
        "没有",
        "人",
        "有",
        "钥匙",
        "而且",
        "快",
        "要",
        "下雨",
        "了",
    ],
    "de": [
        "wie",
        "kann",
        "die",
        "Tür",
        "dieses",
        "Hauses",
        "geöffnet",
        "werden",
        "wenn",
        "niemand",
        "den",
        "Schlüssel",
        "hat",
        "und",
        "Regen",
        "kommt",
    ],
}


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Writes a JSON Lines file of ``rows`` unlabelled flat rows, all with another source."""
    draw = random.Random(seed)
    # Texts are pieces of a long one, since drawing every word of a million rows takes longer than checking them.
    long = {language: " ".join(draw.choices(words, k=1 << 16)) for language, words in _WORDS.items()}

    def text(language: str, part: str, number: int) -> str:
        start = long[language].index(" ", draw.randrange(1 << 16))
        # No two texts are the same, whatever is drawn.
        return f"{number}{part[0]}{long[language][start : start + _CHARACTERS]}"[:_CHARACTERS]

    targets = [language for language in _WORDS if language != "en"]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                f"{side}_{part}": text(language, part, number)
                for side, language in (("source", "en"), ("target", targets[number % len(targets)]))
                for part in _PARTS
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(path: Path, rows: int, model: str | None = None) -> dict[str, float]:
    """Processor seconds of each stage in one process. Stages overlap: ``loading`` and ``checking`` are what a user waits for."""
    from mpo.common import processes
    from mpo.data import check_data, load_groups
    from mpo.data.contract import PARTS, messages_text, parse_row
    from mpo.data.detection import detect_all
    from mpo.data.grouping import fingerprint_groups
    from mpo.data.languages import EXPECTED
    from mpo.data.reading import read_file

    vars(processes)["available"] = lambda: 1
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[name] = time.process_time() - start

    detect_all(["one text to load the classifier with"])
    with stage("reading"):
        read = [row for _, row in read_file(path, path.name)]
    with stage("contract (labelled)"):
        for number, row in enumerate(read):
            parse_row({**row, "target_language": "xx"}, file=path.name, index=number)
    with stage("detection (three texts)"):
        detect_all([row[f"target_{part}"] for row in read for part in _PARTS])
    del read
    EXPECTED.clear()
    with stage("loading, all of it"):
        groups = load_groups(path).groups
    with stage("fingerprint"):
        fingerprint_groups(groups)
    assert len(messages_text(groups[0]["source"][PARTS[0]])) == _CHARACTERS and len(groups) == rows
    del groups
    with stage("checking, with loading"):
        check_data(path)
    if model is not None:
        from transformers import AutoTokenizer

        from mpo.data.tokenization import tokenize_groups

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = AutoTokenizer.from_pretrained(model)
        groups = load_groups(path).groups
        pairs = [pair for group in groups for pair in (group["source"], *group["targets"])]
        texts = [messages_text(pair[part]) for pair in pairs for part in PARTS]
        with stage("the tokenizer alone"):
            for start in range(0, len(texts), 1000):
                tokenizer(texts[start : start + 1000], add_special_tokens=False)
        with stage("tokenizing"):
            tokenize_groups(groups, tokenizer)
    return seconds


def _memory() -> tuple[float, float]:
    """MiB of this process and those it has begun, pages that several share counted once: all of it, and without files."""
    whole = own = 0.0
    for task in [Path("/proc/self"), *(Path(f"/proc/{child.pid}") for child in active_children())]:
        try:
            lines = (task / "smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:  # it has ended
            continue
        found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")}
        whole += found["Pss"]
        own += found.get("Pss_Anon", 0.0)
    return whole, own


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _measure_check(path: Path, rows: int, processes: int | None) -> None:
    """Prints a line of the table in docs/performance.md: times, and peaks of memory, looked at twice a second."""
    import datasets  # noqa: F401, so that the libraries are there already

    import mpo.common.processes
    from mpo.data import check_data

    if processes is not None:
        vars(mpo.common.processes)["available"] = lambda: processes
    peak = _memory()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.5):
            whole, own = _memory()
            peak = max(peak[0], whole), max(peak[1], own)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    busy = os.getloadavg()[0]
    start, used = time.monotonic(), _processor_seconds()
    report = check_data(path)
    seconds, used = time.monotonic() - start, _processor_seconds() - used
    ended.set()
    watcher.join()
    assert report.groups == rows
    print("| rows | MB | processes | s | processor s | MiB, all processes | without files |")
    print(
        f"| {rows:,} | {path.stat().st_size / 1e6:,.0f} | {mpo.common.processes.available()} | {seconds:,.0f} | {used:,.0f} "
        f"| {peak[0]:,.0f} | {peak[1]:,.0f} |"
    )
    print(f"\nProcesses that wanted a core before: {busy:.1f}, of {mpo.common.processes.cores()} cores.")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument(
        "--check_only", action="store_true", help="measure `mpo data check` alone: time and memory"
    )
    parser.add_argument("--processes", type=int, help="for --check_only: so many, whatever the cores")
    parser.add_argument("--model", help="a model whose tokenizer is timed, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_rows(path, arguments.rows)
        if arguments.check_only:
            _measure_check(path, arguments.rows, arguments.processes)
            return
        print(
            f"{arguments.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB\n\n{'stage':<26}{'seconds':>10}{'rows/s':>12}"
        )
        for name, seconds in measure(path, arguments.rows, arguments.model).items():
            print(f"{name:<26}{seconds:>10.2f}{arguments.rows / seconds:>12,.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
