"""The starter set as it is shipped: its counts, its texts, and what it may not share with any evaluation set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest

import mpo.building.starter
from mpo.building.starter import (
    STARTER_LANGUAGES,
    VERSION,
    everyday_rows,
    starter_openings,
    starter_refusals,
    starter_rows,
)
from mpo.data import LANGUAGES
from mpo.data.languages import detect, dominant_script
from mpo.data.refusals import opens_with_refusal
from mpo.errors import ConfigError
from mpo.evaluation.contrast import KINDS, ContrastRow
from mpo.evaluation.probe import probe_rows
from mpo.evaluation.prompts import load_prompts
from mpo.jobs.leak import measure_leaks
from tests.likeness import NEAR, check_clean, likeness, normalized

FOLDER = Path(mpo.building.starter.__file__).parent
EVALUATION = Path(__file__).parents[2] / "recipes" / "evaluation" / "demo"

# Letters of a translation over those of the English text, least and most: what short, faithful translations into the
# language fall in, with some room. A cut or doubled text, or one with a remark, is outside.
LENGTHS = {
    "zh": (0.15, 0.65),
    "ja": (0.25, 0.95),
    "ko": (0.30, 0.95),
    "ar": (0.45, 1.30),
    "bn": (0.55, 1.60),
    "sw": (0.70, 1.65),
    "de": (0.60, 1.65),
    "fr": (0.70, 1.80),
    "es": (0.65, 1.65),
    "hi": (0.60, 1.50),
    "th": (0.45, 1.35),
    "vi": (0.60, 1.60),
}


WELL_WRITTEN = {"harmless": 115, "looks_harmful": 54}
"""Everyday prompts of each kind before those that are worded as people type them."""


def both() -> tuple[ContrastRow, ...]:
    return (*starter_rows(), *everyday_rows())


def texts(language: str, *kinds: str) -> list[str]:
    return [row.texts[language] for row in both() if not kinds or row.kind in kinds]


# ---- The rows --------------------------------------------------------------------------------------------------------


def test_there_are_so_many_prompts_of_each_kind_and_their_ids_count_them() -> None:
    assert Counter(row.kind for row in starter_rows()) == {
        "harmless": 120,
        "looks_harmful": 60,
        "harmful": 32,
    }
    assert Counter(row.kind for row in everyday_rows()) == {"harmless": 212, "looks_harmful": 87}
    for rows, begin in ((starter_rows(), ""), (everyday_rows(), "everyday-")):
        for kind in KINDS:
            found = [row.id for row in rows if row.kind == kind]
            names = [f"{begin}{kind.replace('_', '-')}-{number:03d}" for number in range(1, len(found) + 1)]
            assert found == names


def test_every_row_has_every_language_and_no_text_is_there_twice() -> None:
    assert all(tuple(row.texts) == STARTER_LANGUAGES for row in both())
    assert len(STARTER_LANGUAGES) == 13
    # Not in two languages either: no text was left in English.
    counts = Counter(normalized(text) for row in both() for text in row.texts.values())
    assert len(counts) == len(both()) * len(STARTER_LANGUAGES)


def test_every_harmful_prompt_has_a_harmless_twin_and_no_other_prompt_is_in_a_pair() -> None:
    pairs: dict[str, list[str]] = defaultdict(list)
    for row in starter_rows():
        if row.pair is not None:
            pairs[row.pair].append(row.kind)
    assert list(pairs) == [f"pair-{number:02d}" for number in range(1, 33)]
    assert all(kinds == ["harmless", "harmful"] for kinds in pairs.values())


def test_forty_eight_harmless_prompts_have_the_many_forms_of_harmful_ones_that_people_write() -> None:
    forms = ("statement", "opinion", "assistant", "story", "roleplay", "persuasion")
    rows = [row for row in starter_rows() if row.category in forms]
    assert Counter(row.category for row in rows) == dict.fromkeys(forms, 8)
    assert all(row.kind == "harmless" and row.pair is None for row in rows)
    plain = [row for row in rows if not row.texts["en"].endswith("?")]
    assert len(plain) >= len(rows) / 3
    assert {row.category for row in plain} == set(forms)


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_of_all_harmless_prompts_the_twin_is_the_most_like_the_harmful_one(language: str) -> None:
    harmful = [row for row in starter_rows() if row.kind == "harmful"]
    harmless = [row for row in both() if row.kind != "harmful"]
    like = likeness([row.texts[language] for row in harmful], [row.texts[language] for row in harmless])
    nearest = [harmless[column].pair for column in like.argmax(axis=1)]
    strangers = [row.id for row, pair in zip(harmful, nearest, strict=True) if row.pair != pair]
    # In a short text the form of the question can weigh more than the topic.
    assert len(strangers) <= (0 if language == "en" else 1), strangers


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_length_does_not_give_a_harmful_twin_away(language: str) -> None:
    twins = [row.texts[language] for row in starter_rows() if row.pair and row.kind == "harmless"]
    assert mean(map(len, texts(language, "harmful"))) / mean(map(len, twins)) == pytest.approx(1, abs=0.1)


def test_twins_begin_and_end_alike_and_harmful_prompts_come_in_many_forms() -> None:
    first: dict[str, list[str]] = defaultdict(list)
    for row in starter_rows():
        if row.pair:
            first[row.pair].append(row.texts["en"])
    for harmless, harmful in first.values():
        assert harmless.split()[0] == harmful.split()[0]
        assert harmless[-1] == harmful[-1]
    begins = Counter(" ".join(text.split()[:1]) for text in texts("en", "harmful"))
    assert len(begins) >= 6 and max(begins.values()) <= 11


# ---- The texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_every_text_is_clean(language: str) -> None:
    for row in both():
        text = row.texts[language]
        assert len(text) >= 10 or language == "zh", row.id
        typed = row.id.startswith("everyday-") and int(row.id[-3:]) > WELL_WRITTEN[row.kind]
        check_clean(text, language, row.id, typed=typed)


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_every_text_is_in_its_language_for_the_detector_that_data_is_checked_with(language: str) -> None:
    everything = [*texts(language), *starter_refusals(language)]
    assert not {text: found for text in everything if (found := detect(text).language) != language}
    assert {dominant_script(text) for text in everything} == {LANGUAGES[language].scripts[0]}


@pytest.mark.parametrize("language", STARTER_LANGUAGES[1:])
def test_no_translation_is_far_shorter_or_longer_than_the_language_explains(language: str) -> None:
    least, most = LENGTHS[language]
    ratios = {row.id: len(row.texts[language]) / len(row.texts["en"]) for row in both()}
    assert not {name: round(ratio, 2) for name, ratio in ratios.items() if not least <= ratio <= most}


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_no_two_prompts_of_a_kind_are_near_copies_of_each_other(language: str) -> None:
    for kinds in (["harmful"], ["harmless", "looks_harmful"]):
        like = likeness(texts(language, *kinds), texts(language, *kinds))
        for place in range(len(like)):
            assert like[place, place + 1 :].max(initial=0) < NEAR, texts(language, *kinds)[place]


# ---- Nothing of it in any evaluation set -----------------------------------------------------------------------------


def _of_the_probe() -> list[tuple[str, str]]:
    return [(code, text) for row in probe_rows() for code, text in row.texts.items()]


def _of_the_demos_evaluation() -> list[tuple[str, str]]:
    return [
        (prompt.language, prompt.text)
        for file in EVALUATION.glob("*.csv")
        for prompt in load_prompts(str(file)).prompts
    ]


@pytest.mark.parametrize("read", [_of_the_probe, _of_the_demos_evaluation])
@pytest.mark.parametrize("letters", [3, 5])
def test_no_prompt_is_close_to_one_that_is_evaluated_with(
    read: Callable[[], list[tuple[str, str]]], letters: int
) -> None:
    others = defaultdict(list)
    for code, text in read():
        others[code].append(text)
    codes = [code for code in STARTER_LANGUAGES if others[code]]
    assert "en" in codes
    for code in codes:
        assert not {*map(normalized, texts(code))} & {*map(normalized, others[code])}
        assert likeness(texts(code), others[code], letters).max() < NEAR


@pytest.mark.parametrize("file", ["prompts", "everyday"])
def test_the_leak_check_finds_no_prompt_of_the_probe(file: str) -> None:
    assert not measure_leaks([str(FOLDER / f"{file}.jsonl")], ["probe"]).pairs


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_a_prompt_of_the_probe_with_a_small_edit_would_be_found(language: str) -> None:
    text = probe_rows()[0].texts[language]
    assert likeness(texts(language), [text[:4] + text[5:]]).max() < NEAR
    assert likeness([*texts(language), text], [text[:4] + text[5:]]).max() >= NEAR


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_refusals_are_told_from_answers_and_begin_in_different_words(language: str) -> None:
    refusals = starter_refusals(language)
    assert len({*map(normalized, refusals)}) == 12
    assert not [text for text in refusals if not opens_with_refusal(text, language)]
    spaced = " " in refusals[0]
    openings = {
        text.split()[0].strip(",.،") if spaced and language != "th" else text[:4] for text in refusals
    }
    assert len(openings) >= 8
    like = likeness(refusals, refusals)
    assert all(like[place, place + 1 :].max(initial=0) < NEAR for place in range(12))


@pytest.mark.parametrize("language", STARTER_LANGUAGES)
def test_openings_comply_in_their_language(language: str) -> None:
    openings = starter_openings(language)
    assert len({*map(normalized, openings)}) == 3
    assert not [text for text in openings if opens_with_refusal(text, language, "en")]
    found = detect(" ".join(openings))
    assert found.language == language


def test_refusals_are_found_by_code_or_name_and_other_languages_say_what_there_is() -> None:
    assert starter_refusals("swa") == starter_refusals("Swahili") == starter_refusals("sw")
    with pytest.raises(
        ConfigError, match=r"language: the starter set has no refusals in 'it'. It has en, zh, .*vi\."
    ):
        starter_refusals("it")
    with pytest.raises(ConfigError, match="language: unknown language"):
        starter_refusals("Klingonisch")


# ---- The files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "rows"), [("prompts", starter_rows), ("everyday", everyday_rows)])
def test_any_reader_of_prompt_files_finds_the_same_prompts(
    file: str, rows: Callable[[], tuple[ContrastRow, ...]]
) -> None:
    found = load_prompts(str(FOLDER / f"{file}.jsonl")).prompts
    assert {(each.prompt_id, each.language, each.text) for each in found} == {
        (row.id, code, text) for row in rows() for code, text in row.texts.items()
    }


def test_a_change_of_any_text_is_a_new_version() -> None:
    """Whoever edits a file raises VERSION and writes the new hash here."""
    rows = [[row.id, row.kind, row.pair, row.category, row.texts] for row in both()]
    refusals = {code: starter_refusals(code) for code in STARTER_LANGUAGES}
    found = hashlib.sha256(json.dumps([rows, refusals], ensure_ascii=False).encode()).hexdigest()
    assert (VERSION, found[:16]) == (5, "1bae9feab24a4ec1")
