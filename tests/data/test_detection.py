"""Detecting many texts at once: the same answers as one at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data import check_data, languages, load_groups
from mpo.data.detection import detect_all, expect
from mpo.errors import DataError
from tests.data.rows import TEXTS, flat

LATIN = [
    "Je ne peux pas vous aider avec cela, désolé.",
    "Lo siento, pero no puedo ayudarte con eso.",
    "Das kann ich leider nicht beantworten.",
    "Saya tidak dapat membantu dengan itu.",
    "Не могу помочь вам с этим.",
    "मैं इसमें आपकी मदद नहीं कर सकता।",
    "لا أستطيع مساعدتك في ذلك",
    "من نمی‌توانم در این مورد کمک کنم",
    "מצטער, אינני יכול לעזור",
]
words = st.sampled_from([word for text in (*LATIN, *sum(TEXTS.values(), ())) for word in text.split()])
odd = st.text(st.characters(codec=None), max_size=8)
mixtures = st.lists(st.one_of(words, odd), max_size=30).map(" ".join)


@pytest.fixture(autouse=True)
def nothing_expected() -> Iterator[None]:
    yield
    languages.EXPECTED.clear()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(mixtures, mixtures.map(str.upper), st.sampled_from(LATIN)), max_size=12))
def test_random_mixtures_of_languages_scripts_and_odd_characters(texts: list[str]) -> None:
    assert detect_all(texts) == [languages.detect_alone(text) for text in texts]


def test_slices_of_real_texts_alone_and_joined(data_folder: Path) -> None:
    draw = random.Random(11)
    texts = []
    for row in json.loads((data_folder / "mpo" / "llama_mpo_data.json").read_text(encoding="utf-8"))[::6]:
        whole = row["target_chosen"]["value"] + row["source_rejected"]["value"]
        start = draw.randrange(len(whole))
        texts += [whole[start : start + draw.randrange(1, 900)], row["target_chosen"]["value"]]
    texts += [a[:40] + b[:40] for a, b in zip(texts, texts[3:], strict=False)]
    assert detect_all(texts) == [languages.detect_alone(text) for text in texts]


def test_near_ties_are_left_to_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    # With a margin that no text reaches, every answer is the classifier's own.
    monkeypatch.setattr("mpo.data.detection._ROUNDING", 1e9)
    assert detect_all(LATIN) == [languages.detect_alone(text) for text in LATIN]


def test_what_was_expected_is_not_detected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expect(LATIN)
    found = [languages.detect(text) for text in LATIN]
    monkeypatch.setattr(languages, "detect_alone", lambda text: pytest.fail(f"detected again: {text}"))
    assert [languages.detect(text) for text in LATIN] == found
    rows = [flat(None, number=n) for n in range(5)]
    assert len(load_groups(rows).groups) == 5  # without a text detected alone
    assert check_data(rows).pairs == 5


def test_the_first_fault_of_a_file_is_still_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [flat(None), flat(None, number=1, target_chosen=""), flat(None, number=2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"source_prompt": "', encoding="utf-8")
    with pytest.raises(DataError, match="row 1"):
        load_groups(path)
    cut = tmp_path / "b.json"
    cut.write_text(json.dumps(rows)[:-40], encoding="utf-8")
    with pytest.raises(DataError, match="row 1"):
        load_groups(cut)
