"""Groups made on disk are what training reads, and everything that is done with them is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import scaling
from mpo.data.tokenization import TOKENIZED_FEATURES
from mpo.training.unique_pairs import unique_sources
from mpo.training.workload import group_tokens
from tests import processes


def test_groups_on_disk_have_the_columns_and_types_of_tokenized_groups(tmp_path: Path) -> None:
    groups = scaling.write_groups(tmp_path / "groups.arrow", 25, targets=3)
    assert groups.cache_files, "the groups are mapped from the file, not held in memory"
    expected = {name: kind for name, kind in TOKENIZED_FEATURES.items() if name != "errors"}
    assert {name: groups.features[name] for name in groups.column_names} == expected
    rows = groups.to_list()
    assert [row for group in rows for row in group["row"]] == list(range(75))
    for group in rows:
        parts = [group[f"source_{part}"] for part in ("prompt", "chosen", "rejected")]
        assert all(parts)
        assert {len(group[f"target_{part}"]) for part in ("prompt", "chosen", "rejected")} == {3}
    sizes = [
        sum(
            len(group[f"source_{part}"]) + sum(map(len, group[f"target_{part}"]))
            for part in ("prompt", "chosen", "rejected")
        )
        for group in rows
    ]
    assert group_tokens(groups).tolist() == sizes
    assert len(unique_sources(groups)[1]) == 25


def take_memory(out: Path) -> None:
    records: list[dict[str, Any]] = []
    with scaling.watched(records, "taken"):
        held = np.ones(40 << 20, dtype=np.uint8)
    with scaling.watched(records, "nothing"):
        assert held[-1] == 1
    out.write_text(json.dumps([record["grown_bytes"] for record in records]))


def test_memory_that_is_taken_in_a_block_is_seen(tmp_path: Path) -> None:
    if scaling.anonymous_bytes() is None:
        pytest.skip("memory is read from Linux's /proc")
    # In a process of its own: what earlier tests held may be given back while the block runs.
    process = processes.start(take_memory, tmp_path / "grown.json", output=tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    taken, nothing = json.loads((tmp_path / "grown.json").read_text())
    assert 39 << 20 <= taken < 60 << 20
    assert nothing < 10 << 20


def test_the_command_measures_a_run_of_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.json"
    arguments = ["scaling", "--parts", "groups", "--groups", "30", "50", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    scaling.main()
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())["groups"]
    assert set(result) == {"30", "50"}
    for record in result["30"]["measured"]:
        assert record["what"] in printed
    assert any("reference pass" in record["what"] for record in result["30"]["measured"])
    monkeypatch.setattr(sys, "argv", [*arguments, "--no_reference"])
    scaling.main()
    result = json.loads(out.read_text())["groups"]
    assert not any("reference" in record["what"] for record in result["30"]["measured"])


def test_a_part_varies_one_size_and_holds_the_others() -> None:
    for part in ("targets", "length", "vocabulary"):
        found = scaling.points(part, [1, 2])
        assert [value for value, _, _ in found] == [1, 2]
        sizes = [(vocabulary, len(g.targets), g.targets[0].chosen) for _, vocabulary, g in found]
        changed = [first != second for first, second in zip(*sizes, strict=True)]
        assert changed == [part == "vocabulary", part == "targets", part == "length"]
