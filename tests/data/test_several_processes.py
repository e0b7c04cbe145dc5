"""Large files are read and looked through in several processes: groups, reports and errors are those of one."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo.common import processes
from mpo.data import check, check_data, load_groups, loading, survey
from mpo.errors import DataError, ProcessLostError
from tests.data.rows import TEXTS, flat, group, messages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def _rows(seed: int, number: int) -> list[Any]:
    """Rows in all forms, with sources and targets that come back, texts that are flagged, and bad rows."""
    draw = random.Random(seed)
    made: list[Any] = []
    for index in range(number):
        label = draw.choice([None, None, "bn", "ko", "sw", "zh"])
        row = flat(label, number=draw.randrange(number // 2))
        row["target_chosen"] += draw.choice(["", "", f" {index}", " caf\u00e9", " cafe\u0301"])
        if label is None:
            texts = TEXTS[draw.choice(["bn", "ja", "sw", "ar"])]
            row |= {"target_prompt": texts[0], "target_rejected": f"{texts[2]} {draw.randrange(5)}"}
        change: Callable[[], Any] = draw.choice(
            [
                *[lambda row=row: row] * 12,
                lambda row=row: {**row, "target_prompt": row["source_prompt"]},
                lambda row=row: {**row, "target_chosen": f"<think>hm</think> {row['target_chosen']}"},
                lambda row=row: {**row, "target_chosen": "<think>never ends"},
                lambda row=row: {**row, "target_rejected": "Human: one\n\nAssistant: two"},
                lambda row=row: {**row, "source_prompt": messages(row["source_prompt"], "user")},
                lambda row=row: {**row, "kind": "harmless"},
                lambda row=row: {**row, "source_chosen": f"{row['source_chosen']} Again."},
                lambda row=row: {**row, "target_chosen": row["target_rejected"]},
                lambda row=row: {**row, "target_prompt": "\u200b"},
                lambda row=row: {**row, "target_chosen": "broken \ufffd \ud800"},
                lambda row=row: {**row, "target_language": "Klingonese"},
                lambda: group(*draw.choices(["bn", "ko", "zh", "en"], k=3)),
                lambda: 7,
            ]
        )
        made.append(change())
    return made


def _write(folder: Path, seed: int, suffix: str) -> Path:
    rows, path = _rows(seed, 300), folder / f"pairs{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
        lines[7:7], lines[90:90] = ["", '{"a": 1, "a": 2}'], ['{"broken', "  "]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        columns = list(flat("bn"))
        with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                if isinstance(row, dict) and "source_prompt" in row:
                    writer.writerow([row.get(column) or "" for column in columns][: draw_cells(row)])
    return path


def draw_cells(row: dict[str, Any]) -> int:
    return 3 if row.get("kind") else 7


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many processes work on a file of any size, in parts of a few rows."""
    monkeypatch.setattr(loading, "SEVERAL_FROM", 0)
    monkeypatch.setattr(check, "SEVERAL_FROM", 0)
    monkeypatch.setattr(loading, "CHUNK", 32)
    monkeypatch.setattr(survey, "_AT_ONCE", 20)
    return lambda number: monkeypatch.setattr(processes, "available", lambda: number)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("seed", [0, 1])
def test_groups_and_reports_are_the_same(
    tmp_path: Path, use: Callable[[int], None], suffix: str, seed: int
) -> None:
    path = _write(tmp_path, seed, suffix)
    found = []
    for number in (1, 2, 3):
        use(number)
        report = check_data([path], show_texts=True)
        other = check_data(path, source_language="ko", limit=40)
        loaded = load_groups(path, bad_rows="drop", max_targets_per_group=2, drop_untranslated=True)
        with pytest.raises(DataError) as refused:
            load_groups(path)
        error = f"{refused.type.__name__} {refused.value} {refused.value.row} {refused.value.field}"
        assert not multiprocessing.active_children()
        found.append(
            (
                json.dumps([report.to_dict(), other.to_dict()]),
                report.to_text() + other.to_text(),
                loaded.groups.to_list(),
                loaded.groups._fingerprint,
                loaded.fingerprint,
                loaded.dropped,
                error,
            )
        )
    assert len(found[0][5]) > 10 and "bad_rows='drop'" in found[0][-1]
    assert all(f'"{finding}": [' in found[0][0] for finding in ("same_target", "same_prompt", "dialog"))
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.parametrize(
    "content", ["[" + json.dumps(flat()) + ", ", "Human: hello", "[]", '{"prompt": "x"}\n' * 99]
)
@pytest.mark.parametrize("rows", [0, 100])
def test_a_file_that_cannot_be_read_ends_in_the_same_error(
    tmp_path: Path, use: Callable[[int], None], content: str, rows: int
) -> None:
    path = tmp_path / ("list.json" if content[0] == "[" else "lines.jsonl")
    good = [json.dumps(flat(number=number)) for number in range(rows)]
    if content[0] == "[" and rows:
        path.write_text("[" + ",\n".join(good) + ",\n" + content[1:])
    else:
        path.write_text("\n".join([*good, content]))
    errors = []
    for number in (1, 2):
        use(number)
        try:
            errors.append(check_data(path).to_text())
        except DataError as error:
            errors.append(f"{type(error).__name__} {error}")
    assert errors[0] == errors[1]


@pytest.mark.parametrize("stage", ["mpo.data.loading.parse_row", "mpo.data.survey.is_blank"])
def test_a_process_that_is_killed_ends_the_check_with_a_clear_error(
    tmp_path: Path, use: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(flat(number=number)) for number in range(200)))
    use(2)

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(stage, die)
    with pytest.raises(ProcessLostError, match="ended by SIGKILL"):
        check_data(path)


def test_small_files_and_rows_in_memory_are_read_in_one_process(tmp_path: Path) -> None:
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    small.write_text("{}")
    with open(large, "wb") as file:
        file.truncate(loading.SEVERAL_FROM)
    assert loading._processes(str(small)) == loading._processes([flat()]) == 1
    assert loading._processes([small, large]) == loading._processes(large) == processes.available()
    assert loading._processes([small, large.rename(tmp_path / "large.json")]) == 1
