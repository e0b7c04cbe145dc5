"""Hashed n-grams and the search over them, against plain Python sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data.shingles import Shingles, SimilarTexts, character_shingles, normalised, word_shingles

TEXTS = st.lists(
    st.text(alphabet="abc é ক্ষি你我他たか한국", max_size=24).map(normalised), min_size=1, max_size=12
)


def character_set(text: str) -> set[str]:
    letters = text.replace(" ", "")
    ideographic = 2 * sum(letter >= "\u2e80" for letter in letters) > len(letters)
    padded, n = f" {text} ".ljust(5), 2 if ideographic else 5
    return {padded[place : place + n] for place in range(len(padded) - n + 1)}


def word_set(text: str) -> set[tuple[str, str]]:
    words = text.split()
    return set(zip(["", *words], words, strict=False))


MEASURES = [(character_shingles, character_set), (word_shingles, word_set)]
Measure = tuple[Callable[[Sequence[str]], Shingles], Callable[[str], set]]


def similarity(first: set, second: set) -> Fraction:
    return Fraction(len(first & second), max(len(first | second), 1))


@pytest.mark.parametrize("measure", MEASURES, ids=["characters", "words"])
@settings(max_examples=60, deadline=None)
@given(texts=TEXTS)
def test_hashes_are_as_many_and_as_shared_as_the_n_grams(measure: Measure, texts: list[str]) -> None:
    shingles, plain = measure
    found = shingles(texts)
    hashed = [set(found.hashes[found.rows == row].tolist()) for row in range(len(texts))]
    sets = [plain(text) for text in texts]
    assert list(map(len, hashed)) == list(map(len, sets)) == found.sizes.tolist()
    for first in range(len(texts)):
        for second in range(len(texts)):
            assert len(hashed[first] & hashed[second]) == len(sets[first] & sets[second])


@pytest.mark.parametrize("threshold", [0.2, 0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("measure", MEASURES, ids=["characters", "words"])
@settings(max_examples=40, deadline=None)
@given(known=TEXTS, texts=TEXTS)
def test_the_search_finds_all_pairs_from_the_threshold_on_and_no_others(
    measure: Measure, threshold: float, known: list[str], texts: list[str]
) -> None:
    shingles, plain = measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpo.data.shingles._PAIRS_AT_ONCE", 3)
        left, right, scores = SimilarTexts(known, shingles, threshold).find(texts)
    found = {(int(a), int(b)): score for a, b, score in zip(left, right, scores, strict=True)}
    expected = {
        (a, b): float(score)
        for a, text in enumerate(texts)
        for b, other in enumerate(known)
        if plain(text) and (score := similarity(plain(text), plain(other))) >= threshold - 1e-9
    }
    assert found.keys() == expected.keys()
    assert np.allclose([found[pair] for pair in expected], list(expected.values()))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Why did you HIT me?", "why  did you\nhit me"),
        ("\uff37\uff48\uff59?", "why"),
        ("Stra\u00dfe", "STRASSE"),
        ("e\u0301tude", "\u00e9tude"),
        ("\u201cWhy?\u201d \u2026", "why"),
        ("\u4f60\u4e3a\u4ec0\u4e48\u6253\u6211\uff1f", "\u4f60\u4e3a\u4ec0\u4e48\u6253\u6211"),
    ],
)
def test_case_blanks_punctuation_and_unicode_forms_make_no_difference(first: str, second: str) -> None:
    assert normalised(first) == normalised(second)


def test_vowel_signs_stay_in_their_words() -> None:
    assert normalised("কীভাবে তালা খুলব?") == "কীভাবে তালা খুলব"


def test_nothing_known_and_nothing_asked_find_nothing() -> None:
    for known, texts in (([], ["why"]), (["why"], []), ([""], ["", "why"])):
        left, right, scores = SimilarTexts(known, word_shingles, 0.5).find(texts)
        assert len(left) == len(right) == len(scores) == 0
