"""What acts on a terminal is escaped; what people write in any script stays."""

from __future__ import annotations

import logging
import sys
import unicodedata
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.cli.app import main
from mpo.common.characters import half_character, printable, without_halves
from mpo.common.files import write_json, write_text
from mpo.common.progress import quiet_libraries
from tests.data.rows import TEXTS

HOSTILE = "a\x1b[31mb\x9b2Jc\u202ed\u2066e\rf\x07g\u2028h\ufeffi\ud800j\U000e0041k"
ESCAPED = r"a\x1b[31mb\x9b2Jc\u202ed\u2066e\rf\x07g\u2028h\ufeffi\ud800j\U000e0041k"


def test_what_acts_on_a_terminal_is_escaped() -> None:
    assert printable(HOSTILE) == printable(HOSTILE, lines=False) == ESCAPED
    assert printable("a\n\tb") == "a\n\tb" and printable("a\n\tb", lines=False) == r"a\n\tb"


@pytest.mark.parametrize(
    "text",
    [
        *("\n".join(texts) for texts in TEXTS.values()),
        "می\u200cخواهم",
        "ক্\u200dষ",
        "\u3000全角",
        "10\u202f000\xa0€",
        "🎉👩\u200d💻",
        "e\u0301",
    ],
)
def test_texts_of_every_script_stay(text: str) -> None:
    assert printable(text) == without_halves(text) == text and half_character(text) is None


@given(st.text())
def test_what_is_printable_has_no_control_character_and_stays_so(text: str) -> None:
    once = printable(text, lines=False)
    assert printable(once) == once
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in once)
    once.encode("utf-8")


@given(st.text(st.characters(codec=None), max_size=20))
def test_half_a_surrogate_pair_is_found_with_its_place_and_replaced(text: str) -> None:
    whole = without_halves(text)
    assert whole.encode("utf-8") and len(whole) == len(text) if text else whole == ""
    try:
        text.encode("utf-8")
        assert half_character(text) is None and whole == text
    except UnicodeEncodeError as error:
        assert f"U+{ord(text[error.start]):04X}) at character {error.start}," in (half_character(text) or "")


def test_half_a_surrogate_pair_does_not_keep_a_file_from_being_written(tmp_path: Path) -> None:
    assert write_text(tmp_path / "a.txt", "a\ud83db").read_text(encoding="utf-8") == "a\ufffdb"
    assert '"\ufffd"' in write_json(tmp_path / "a.json", {"a": ["\udc00"]}).read_text(encoding="utf-8")


def test_an_error_or_a_warning_cannot_act_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPO_DEBUG", raising=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text('"learning\\e[31m\\u202erate": 1\n')
    assert main(["train", str(recipe)]) == 2
    assert main(["data", "check", str(tmp_path / "\x1b[2Jgone\u202e.jsonl")]) == 2
    quiet_libraries()
    logging.getLogger("mpo.test").warning("The template says %s", HOSTILE)
    shown = capsys.readouterr().err
    assert r"learning\x1b[31m\u202erate" in shown and f"Warning: The template says {ESCAPED}\n" in shown
    assert "gone" in shown
    assert printable(shown) == shown


def test_a_text_that_the_terminal_cannot_show_does_not_end_in_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main([]) == 0
    print("\udcff.jsonl", "বা")
    terminal.seek(0)
    assert terminal.read().endswith(r"\udcff.jsonl \u09ac\u09be" + "\n")
