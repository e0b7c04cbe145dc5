"""`mpo data`: a report never takes the place of the data it is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo.cli import app
from tests.data.rows import flat


@pytest.mark.parametrize(
    "words",
    [
        ["check", "pairs.json", "--json", "./pairs.json"],
        ["check", "pairs.json", "--json", "link.json"],
        ["leak", "pairs.json", "--against", "other.json", "--output", "pairs.json"],
        ["leak", "other.json", "--against", "pairs.json", "--output", "../{folder}/pairs.json"],
        ["convert", "pairs.jsonl", "--output", "link.jsonl"],
    ],
)
def test_what_is_read_is_not_written_over(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.dumps([flat()])
    for suffix in ("json", "jsonl"):
        (tmp_path / f"pairs.{suffix}").write_text(content, encoding="utf-8")
        (tmp_path / f"link.{suffix}").symlink_to(f"pairs.{suffix}")
    (tmp_path / "other.json").write_text(content, encoding="utf-8")
    assert app.main(["data", *(word.format(folder=tmp_path.name) for word in words)]) == 2
    assert "is an input. Choose another name" in capsys.readouterr().err
    assert (tmp_path / "pairs.json").read_text(encoding="utf-8") == content
    assert not (tmp_path / "pairs.json").is_symlink()
