"""Texts are cut where a translator wants it, and come back with everything that stood between the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.building.stages import Kept
from mpo.building.texts import translate_texts
from mpo.building.translation import Translated, TranslationChoice
from mpo.building.translation.segments import join, split, with_code_of, without_code
from mpo.common.journal import Journal

MARKUP = """# A heading

Take care. Then:

1. Open the *window* (slowly).
2) Close it.
   - one
   * two

> quoted line

```python
print("stay")  # here
```
The end."""


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("longest", [1, 20, 600])
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("aB .!?。！\n\r\t-*#>`1)।'”"), max_size=80))
def test_the_pieces_of_a_text_are_the_text(text: str, lines: bool, longest: int) -> None:
    pieces = split(text, lines=lines, longest=longest)

    assert "".join(piece.text for piece in pieces) == text
    joined = join(pieces, [piece.text for piece in pieces if piece.translate], "en")
    assert "".join(joined.split()) == "".join(text.split())


def test_lines_keep_their_markers_code_and_breaks() -> None:
    pieces = split(MARKUP, lines=True, longest=600)

    asked = [piece.text for piece in pieces if piece.translate]
    assert asked == [
        "A heading",
        "Take care. Then:",
        "Open the *window* (slowly).",
        "Close it.",
        "one",
        "two",
        "quoted line",
        "The end.",
    ]
    assert join(pieces, ["X"] * len(asked), "en") == (
        '# X\n\nX\n\n1. X\n2) X\n   - X\n   * X\n\n> X\n\n```python\nprint("stay")  # here\n```\nX'
    )


def test_passages_go_over_lines_but_not_into_code() -> None:
    asked = [piece.text for piece in split(MARKUP, lines=False, longest=4000) if piece.translate]

    assert len(asked) == 2 and asked[0].startswith("# A heading") and asked[1] == "The end."
    assert [p.text for p in split("one\n\ntwo\n\nthree", lines=False, longest=9) if p.translate] == [
        "one\n\ntwo",
        "three",
    ]


def test_long_lines_are_cut_between_sentences_and_joined_as_the_script_does() -> None:
    text = "The first sentence. The second one! And the third?"
    pieces = split(text, lines=True, longest=20)

    assert [p.text for p in pieces if p.translate] == [
        "The first sentence.",
        "The second one!",
        "And the third?",
    ]
    assert join(pieces, ["一。", "二！", "三？"], "zh") == "一。二！三？"
    assert join(pieces, ["Moja.", "Mbili!", "Tatu?"], "sw") == "Moja. Mbili! Tatu?"
    back = split("一句话。两句话！三句话？", lines=True, longest=4)
    assert join(back, ["One.", "Two!", "Three?"], "en") == "One. Two! Three?"


@pytest.mark.parametrize(
    ("source", "translated", "expected"),
    [
        ("Run `ls -l` now", "Ejecuta `es -l` ahora", "Ejecuta `ls -l` ahora"),
        ("See http://a.b/c?d=e.", "Ve http://un.b/c?d=e.", "Ve http://a.b/c?d=e."),
        ("See https://a.b/the 1", "访问https://a.b/那了解", "访问https://a.b/the那了解"),
        ("`a` or `b`", "`b` u `a`", "`b` u `a`"),  # moved, and whole
        ("`a` or `b`", "`x`", "`x`"),
        ("no code", "con `código`", "con `código`"),
        ("`a` in http://b", "http://be en `un`", "http://be en `un`"),  # nothing says which is which
    ],
)
def test_inline_code_and_addresses_come_back_as_they_were(
    source: str, translated: str, expected: str
) -> None:
    assert with_code_of(translated, source) == expected


def test_code_is_not_read_as_language() -> None:
    assert without_code("你好\n```\nint main() {}\n```\n再见") == "你好\n\n再见"


def test_the_same_piece_is_asked_once_and_a_fault_of_a_piece_is_one_of_its_text(tmp_path) -> None:
    class Upper:
        asked: list[str]

        def translate(self, pieces, source, target, done):
            self.asked = list(pieces)
            for index, piece in enumerate(pieces):
                yield index, Translated(piece.upper(), "cut off" if piece == "bad" else None)

    translator = Upper()
    texts = {"a": "same\nother", "b": "same", "c": "same\nbad", "d": "same\nother"}
    with Journal(tmp_path / "part.jsonl") as journal:
        made = translate_texts(
            texts,
            translator,
            TranslationChoice("command", ["x"]),
            source="en",
            target="sw",
            kept=Kept(journal),
        )

    assert sorted(translator.asked) == ["bad", "other", "same"]
    assert [made[name].text for name in "abcd"] == ["SAME\nOTHER", "SAME", "SAME\nBAD", "SAME\nOTHER"]
    assert [made[name].fault for name in "abcd"] == [None, None, "cut off", None]
