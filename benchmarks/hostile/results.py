"""Tampered results: files that someone edited, that a disk damaged, or that hold what a model made up."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.hostile.cases import EITHER, Case, altered


def cases(draw: random.Random, folder: Path, number: int) -> Iterator[Case]:
    """So many result folders, each with one file tampered with, of each a report."""
    from tests.report.result_folder import write_results

    good = write_results(folder / "good", prompts=2)
    files = sorted(path.relative_to(good) for path in good.rglob("*.json*"))
    for index in range(number):
        name = files[index] if index < len(files) else draw.choice(files)
        place = folder / str(index)
        shutil.copytree(good, place)
        file = place / name
        cut = draw.random() < 0.2
        if cut:
            whole = file.read_bytes()
            file.write_bytes(whole[: draw.randrange(1, len(whole) - 2)])
            done = "cut off"
        elif name.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            row = draw.randrange(len(lines))
            value = json.loads(lines[row])
            done = altered(value, draw)
            lines[row] = json.dumps(value)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            value = json.loads(file.read_text(encoding="utf-8"))
            done = altered(value, draw)
            file.write_text(json.dumps(value), encoding="utf-8")

        def run(place: Path = place, name: Path = name, cut: bool = cut) -> str | None:
            try:
                return _report_says(place, str(name) if cut and name.suffix == ".json" else None)
            finally:
                shutil.rmtree(place, ignore_errors=True)

        yield Case(f"{name.name}: {done}", EITHER, run)


def _report_says(place: Path, damaged: str | None) -> str | None:
    """What is wrong with the report on a folder of which a file may be beyond reading."""
    from mpo.report.page import write_report

    written = [path.read_text(encoding="utf-8") for path in write_report(place)]
    answers = place / "answers.html"
    if answers.is_file():
        written.append(answers.read_text(encoding="utf-8"))
    acting = [mark for mark in ("\x1b", "\u202e", "<script>alert") for text in written if mark in text]
    if acting:
        return f"the report holds {acting}"
    if damaged is not None and not any(Path(damaged).name in text for text in written):
        return f"the report does not say that {damaged} is damaged"
    return None
