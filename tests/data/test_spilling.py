"""Data that are more than memory should hold: the same groups, from files without names."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from mpo.data import check_data, fingerprint_groups, load_groups, spilling
from mpo.data.loading import LoadedGroups
from mpo.data.spilling import release, to_disk


def _rows(seed: int, number: int) -> list[dict[str, Any]]:
    """Rows whose sources come back in any order, in two normal forms; one row in twenty is bad."""
    draw = random.Random(seed)
    words = ["rain", "door", "key", "house", "night", "river", "stone", "light", "winter", "bread"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, 9)))

    made = []
    for index in range(number):
        source = draw.randrange(number // 3)
        made.append(
            {
                "source_prompt": f"cafe\u0301 {source}" if draw.random() < 0.5 else f"caf\u00e9 {source}",
                "source_chosen": f"no {source}",
                "source_rejected": f"yes {source}",
                "target_prompt": text(),
                "target_chosen": f"{text()} {index}",
                "target_rejected": text(),
                "target_language": draw.choice(["bn", "sw", "zh", "ko"]),
            }
        )
    for index in draw.sample(range(number), number // 20):
        made[index]["target_chosen"] = made[index]["target_rejected"]
    return made


def _summary(loaded: LoadedGroups) -> tuple[Any, ...]:
    content = hashlib.sha256(json.dumps(loaded.groups.to_list()).encode()).hexdigest()[:16]
    return (
        len(loaded.groups),
        len(loaded.dropped),
        loaded.fingerprint[:16],
        loaded.groups._fingerprint,
        content,
    )


# What a loader that keeps all pairs in memory, and whole texts apart by their written form, makes of these rows.
EXPECTED: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({}, (1249, 200, "2f28aeb6e139ed1c", "8699a855836e9d79", "a7bd01f8bddd5f91")),
    ({"group_by_source": False}, (3800, 200, "1df96e8fa732206c", "b31518f2c11c67ce", "5e389cdc249cca6c")),
    (
        {"max_targets_per_group": 2, "limit": 500},
        (1040, 200, "7ae6173870332332", "6158cdff4c98ef65", "594837fb41598ff9"),
    ),
]


@pytest.mark.parametrize("part", [200_000, 64 << 20])
@pytest.mark.parametrize(("settings", "expected"), EXPECTED)
def test_groups_order_rows_and_fingerprints_do_not_depend_on_where_the_texts_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: int,
    settings: dict[str, Any],
    expected: tuple[Any, ...],
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(spilling, "SPILL_BYTES", part)
    loaded = load_groups(_rows(7, 4000), bad_rows="drop", **settings)
    assert _summary(loaded) == expected
    assert fingerprint_groups(loaded.groups) == loaded.fingerprint
    assert (tmp_path / "cache").exists() == (part < 64 << 20)
    assert not any(tmp_path.rglob("*.*")) and sum(len(files) for *_, files in os.walk(tmp_path)) == 0


def test_a_report_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(3, 1500)
    expected = check_data(rows).to_dict()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(spilling, "SPILL_BYTES", 1)
    assert check_data(rows).to_dict() == expected


def test_pages_that_were_given_back_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    table = pa.table({"text": [f"line {number}" for number in range(5000)]})
    held = pa.total_allocated_bytes()
    mapped = to_disk(table)
    assert pa.total_allocated_bytes() - held < table.nbytes / 4
    release()
    assert mapped.equals(table) and list(tmp_path.iterdir()) == []


def test_without_room_on_the_disk_the_data_stay_in_memory_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    monkeypatch.setattr(spilling, "SPILL_BYTES", 1)
    with caplog.at_level(logging.WARNING, "mpo"):
        loaded = load_groups(_rows(7, 4000), bad_rows="drop")
    assert _summary(loaded) == EXPECTED[0][1]
    said = [record.getMessage() for record in caplog.records if "stay in memory" in record.getMessage()]
    assert len(said) == 1 and "HF_DATASETS_CACHE" in said[0]
