from __future__ import annotations

import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo.common.journal import Journal, read_rows, settle
from mpo.errors import ConfigError, StorageError
from tests.evaluation.scripts import TEXTS


@dataclass(frozen=True)
class Text:
    id: str
    text: str


def rows(path: Path) -> list[dict[str, object]]:
    with Journal(path) as journal:
        return list(journal.rows.values())


def test_rows_are_read_back_in_their_order_and_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    written = [{"id": code, "text": text, "n": [1, None]} for code, text in TEXTS.items()]
    with Journal(path) as journal:
        for row in written:
            journal.append(row)
    assert rows(path) == written == read_rows(path, dict)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=6), min_size=1, max_size=4), data=st.data())
def test_a_file_that_is_cut_anywhere_is_continued(
    tmp_path: Path, texts: list[str], data: st.DataObject
) -> None:
    path = tmp_path / "rows.jsonl"
    path.unlink(missing_ok=True)
    written = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
    with Journal(path) as journal:
        for row in written:
            journal.append(row)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert read_rows(path, dict) == written[: whole[:cut].count(b"\n")]
    with Journal(path) as journal:
        assert list(journal.rows.values()) == written[: whole[:cut].count(b"\n")]
        for row in written:
            if row["id"] not in journal.rows:
                journal.append(row)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_is_a_clear_error_and_leaves_whole_rows(tmp_path: Path, room: int) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"id": "b", "text": "x" * 60}
    with Journal(path) as journal:
        journal.append({"id": "a"})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
        with pytest.raises(StorageError, match=r"Cannot write .*rows.jsonl"), Journal(path) as journal:
            journal.append(row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    with Journal(path) as journal:
        journal.append(row)
    assert rows(path) == [{"id": "a"}, row]


def test_a_row_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "b"}\n')
    assert len(rows(path)) == 2
    with pytest.raises(StorageError, match="line 2, is damaged: expected a JSON object with `id`, `text`"):
        Journal(path, Text)
    path.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "b", "text": ["x"]}\n')
    with pytest.raises(StorageError, match="line 2, is damaged"):
        Journal(path, Text)


def test_rows_that_are_whole_can_be_read_without_the_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"id": "a", "text": "x"}\noops\n{"id": "b", "text": "\\ud83d."}\n{"id": "c"}\n{"id": "unfini'
    )
    damaged: list[str] = []
    assert read_rows(path, Text, damaged) == [Text("a", "x"), Text("b", "\N{REPLACEMENT CHARACTER}.")]
    assert [re.search("line ([0-9])", text)[1] for text in damaged] == ["2", "4"]  # type: ignore[index]
    with pytest.raises(StorageError, match=r"rows\.jsonl, line 2 is no JSON"):
        read_rows(path, Text)


def test_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"id": "a", "text": "\ud83d"})
    assert rows(tmp_path / "rows.jsonl") == [{"id": "a", "text": "\ud83d"}]


def test_every_row_is_in_the_file_before_the_next_is_made(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.append({"id": str(number)})
            assert len(path.read_bytes().splitlines()) == number + 1


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path), pytest.raises(StorageError, match="Another process"):
        Journal(path)
    rows(path)


def test_an_id_is_written_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"id": "a"})
        with pytest.raises(StorageError, match="already"):
            journal.append({"id": "a"})


@pytest.mark.parametrize(
    "line",
    [b"{]", b'"text"', b"[]", b'{"no": "id"}', b"\xff\xfe", b"", b"[" * 5000, b'{"id": 3}', b'{"id": NaN}'],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line + b'\n{"id": "b"}\n')
    with pytest.raises(StorageError, match="line 2, is damaged"):
        Journal(path)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot open"):
        Journal(tmp_path / "file" / "rows.jsonl")


def test_other_settings_are_refused_once_there_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    settle(path, {"length": 5, "of": {"a": 1}}, empty=True)
    settle(path, {"length": 6, "of": {"a": 1}}, empty=True)
    settle(path, {"of": {"a": 1}, "length": 6}, empty=False)
    with pytest.raises(ConfigError, match=r"\(length: 6 there, 7 now; seed: null there, 1 now\)"):
        settle(path, {"length": 7, "of": {"a": 1}, "seed": 1}, empty=False)
    assert json.loads((tmp_path / "rows.settings.json").read_text()) == {"length": 6, "of": {"a": 1}}
    for content in ("[1]", "3", "{", "[" * 5000):
        (tmp_path / "rows.settings.json").write_text(content)
        with pytest.raises(StorageError, match="missing or damaged"):
            settle(path, {}, empty=False)
    (tmp_path / "rows.settings.json").unlink()
    with pytest.raises(StorageError, match="missing or damaged"):
        settle(path, {}, empty=False)
