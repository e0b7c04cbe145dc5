"""Rows per second of loading and checking preference data, by stage, and the memory that it takes.

    python -m benchmarks.data_check --rows 10000

A row is a source and a target pair whose texts have 300 characters each, made of random words in the language's script.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    def text(language: str, number: int) -> str:
        words: list[str] = [str(number)]
        while sum(map(len, words)) + len(words) < _CHARACTERS:
            words.append(draw.choice(_WORDS[language]))
        return " ".join(words)[:_CHARACTERS]

    targets = [language for language in _WORDS if language != "en"]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                f"{side}_{part}": text(language, number)
                for side, language in (("source", "en"), ("target", targets[number % len(targets)]))
                for part in _PARTS
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(path: Path, rows: int) -> dict[str, float]:
    """Processor seconds of each stage. Stages overlap: ``loading`` and ``checking`` are what a user waits for."""
    from mpo.data import check_data, load_groups
    from mpo.data.contract import PARTS, messages_text, parse_row
    from mpo.data.detection import detect_all
    from mpo.data.languages import EXPECTED
    from mpo.data.loading import fingerprint_groups
    from mpo.data.reading import read_file

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
    return seconds


def _memory() -> tuple[float, float]:
    """MiB of this process: its own, and with the pages of mapped files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in status.splitlines() if "kB" in line}
    return found["RssAnon"], found["VmRSS"]


def _measure_check(path: Path) -> None:
    """Prints processor seconds and peaks of memory, looked at ten times a second."""
    import datasets  # noqa: F401, so that the libraries are there already

    from mpo.data import check_data
    from mpo.data.detection import detect_all

    detect_all(["one text to load the classifier with"])
    before = peak = _memory()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            own, whole = _memory()
            peak = max(peak[0], own), max(peak[1], whole)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.process_time()
    check_data(path)
    seconds = time.process_time() - start
    ended.set()
    watcher.join()
    print(f"checking, with loading: {seconds:.1f} s")
    for name, at_first, most in zip(("of its own", "with mapped files"), before, peak, strict=True):
        print(f"memory {name}: {most - at_first:,.0f} MiB beyond the {at_first:,.0f} before")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument(
        "--check_only", action="store_true", help="measure the memory of `mpo data check` alone"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_rows(path, arguments.rows)
        if arguments.check_only:
            _measure_check(path)
            return
        print(
            f"{arguments.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB\n\n{'stage':<26}{'seconds':>10}{'rows/s':>12}"
        )
        for name, seconds in measure(path, arguments.rows).items():
            print(f"{name:<26}{seconds:>10.2f}{arguments.rows / seconds:>12,.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
