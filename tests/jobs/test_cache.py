"""Showing and clearing the caches: nothing else is counted or removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo.cli.app import main
from mpo.errors import StorageError
from mpo.evaluation.safety import CACHE
from mpo.jobs.cache import clear_caches, find_caches, reference_folder


def write(path: Path, length: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * length)
    return path


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    write(tmp_path / "reference" / ("a" * 32) / "values.npy", 700)
    write(tmp_path / "reference" / f"{'b' * 32}.part" / "values.npy", 20)
    write(tmp_path / "runs" / "one" / CACHE / "0f" / "reply.json", 50)
    write(tmp_path / "runs" / "one" / CACHE / "1a" / "reply.json", 5)
    return [
        write(tmp_path / "reference" / "notes" / "mine.txt", 9),
        write(tmp_path / "reference" / "mine.txt", 9),
        write(tmp_path / "runs" / "one" / CACHE / "mine.txt", 9),
        write(tmp_path / "runs" / "one" / "verdicts.jsonl", 9),
        write(tmp_path / "runs" / "two" / CACHE / "notes.txt", 9),
    ]


def test_caches_are_found_with_their_sizes_and_cleared_without_anything_else(
    kept: list[Path], tmp_path: Path
) -> None:
    entries = find_caches([tmp_path / "runs"], tmp_path / "reference")
    assert [(entry.kind, entry.bytes) for entry in entries] == [
        ("reference", 700),
        ("judge", 55),
        ("reference", 20),
    ]
    clear_caches(entries)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert find_caches([tmp_path / "runs"], tmp_path / "reference") == []


def test_the_command_shows_and_clears_only_when_asked(
    kept: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cache", str(tmp_path / "runs"), "--reference_cache_dir", str(tmp_path / "reference")]
    assert main(words) == 0 and main(words) == 0
    assert capsys.readouterr().out.count("3 caches") == 2
    assert main([*words, "--clear"]) == 0
    assert "Removed" in capsys.readouterr().out
    assert main(words) == 0
    assert "0 caches" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_named_and_an_empty_cache_is_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        find_caches([tmp_path / "nowhere"], tmp_path)
    assert find_caches([], tmp_path / "none") == []
    assert reference_folder().parts[-2:] == ("mpo", "reference")
