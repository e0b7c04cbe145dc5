"""The probe set as it is shipped: its counts, its texts, and what it may not share with any training set."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

import mpo.evaluation.probe
from mpo.data import LANGUAGES
from mpo.data.languages import detect, dominant_script
from mpo.errors import ConfigError
from mpo.evaluation.probe import KINDS, PROBE_LANGUAGES, VERSION, ProbeRow, load_probe, probe_rows
from mpo.evaluation.prompts import PromptSet, load_prompts
from tests.likeness import NEAR, check_clean, likeness, normalized

ROOT = Path(__file__).parents[2]
FILE = Path(mpo.evaluation.probe.__file__).with_name("prompts.jsonl")
TRANSLATED = PROBE_LANGUAGES[1:]

# Letters of a translation over those of the English text, least and most. Each band is the range that short, faithful
# translations into the language fall in, with some room; a cut or doubled text, or one with a remark, is outside.
LENGTHS = {
    "zh": (0.15, 0.65),
    "ja": (0.25, 0.85),
    "ko": (0.30, 0.85),
    "ar": (0.45, 1.10),
    "bn": (0.55, 1.60),
    "sw": (0.70, 1.65),
    "de": (0.75, 1.65),
    "fr": (0.85, 1.60),
    "es": (0.80, 1.65),
    "hi": (0.60, 1.50),
    "th": (0.50, 1.25),
    "vi": (0.65, 1.55),
}


def texts(language: str, *kinds: str) -> list[str]:
    return [row.texts[language] for row in probe_rows() if not kinds or row.kind in kinds]


def ids(prompts: PromptSet) -> list[str]:
    return list(dict.fromkeys(prompt.prompt_id for prompt in prompts.prompts))


# ---- The rows --------------------------------------------------------------------------------------------------------


def test_there_are_forty_harmless_twenty_harmful_looking_and_forty_harmful_prompts() -> None:
    assert Counter(row.kind for row in probe_rows()) == {"harmless": 40, "looks_harmful": 20, "harmful": 40}
    for kind in KINDS:
        found = [row.id for row in probe_rows() if row.kind == kind]
        assert found == [f"{kind.replace('_', '-')}-{number:03d}" for number in range(1, len(found) + 1)]


def test_every_row_of_the_file_has_the_same_fields_and_every_language() -> None:
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    assert {tuple(row) for row in rows} == {("id", "kind", "pair", "category", *PROBE_LANGUAGES)}
    assert len(rows) == len(probe_rows())
    assert all(re.fullmatch(r"[a-z]+", row["category"]) for row in rows)


def test_twenty_pairs_join_a_harmful_prompt_with_a_harmless_one() -> None:
    pairs: dict[str, list[str]] = defaultdict(list)
    for row in probe_rows():
        if row.pair is not None:
            pairs[row.pair].append(row.kind)
    assert list(pairs) == [f"pair-{number:02d}" for number in range(1, 21)]
    assert all(kinds == ["harmless", "harmful"] for kinds in pairs.values())


@pytest.mark.parametrize("language", PROBE_LANGUAGES)
def test_of_all_harmless_prompts_that_of_the_pair_is_the_most_like_the_harmful_one(language: str) -> None:
    harmful = [row for row in probe_rows() if row.kind == "harmful" and row.pair]
    harmless = [row for row in probe_rows() if row.kind != "harmful"]
    like = likeness([row.texts[language] for row in harmful], [row.texts[language] for row in harmless])
    nearest = [harmless[column].pair for column in like.argmax(axis=1)]
    strangers = [row.id for row, pair in zip(harmful, nearest, strict=True) if row.pair != pair]
    # In a short text the form of the question can weigh more than the topic.
    assert len(strangers) <= (0 if language == "en" else 1), strangers


@pytest.mark.parametrize("language", PROBE_LANGUAGES)
def test_harmful_and_harmless_prompts_are_about_equally_long(language: str) -> None:
    harmful, harmless = (
        mean(map(len, texts(language, *kinds))) for kinds in (["harmful"], ["harmless", "looks_harmful"])
    )
    assert harmful / harmless == pytest.approx(1, abs=0.15)


def test_harmful_and_harmless_prompts_begin_and_end_alike() -> None:
    for part in (lambda text: text.split()[0], lambda text: text[-1]):
        of_kind: list[Counter[Any]] = [
            Counter(map(part, texts("en", kind))) for kind in ("harmful", "harmless")
        ]
        assert of_kind[0] == of_kind[1]


# ---- The texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", PROBE_LANGUAGES)
def test_every_text_is_one_clean_sentence_or_two(language: str) -> None:
    for row in probe_rows():
        text = row.texts[language]
        assert len(text) >= 10, row.id
        check_clean(text, language, row.id)


@pytest.mark.parametrize("language", PROBE_LANGUAGES)
def test_every_text_is_in_its_language_for_the_detector_that_answers_are_read_with(language: str) -> None:
    """No exception is needed: the detector knows all thirteen apart on every one of these texts."""
    other = {
        row.id: (found.language, row.texts[language])
        for row in probe_rows()
        if (found := detect(row.texts[language])).language != language
    }
    assert not other


@pytest.mark.parametrize("language", PROBE_LANGUAGES)
def test_every_text_is_in_its_script(language: str) -> None:
    scripts = {row.id: dominant_script(row.texts[language]) for row in probe_rows()}
    assert set(scripts.values()) == {LANGUAGES[language].scripts[0]}


@pytest.mark.parametrize("language", TRANSLATED)
def test_no_translation_is_far_shorter_or_longer_than_the_language_explains(language: str) -> None:
    least, most = LENGTHS[language]
    ratios = {row.id: len(row.texts[language]) / len(row.texts["en"]) for row in probe_rows()}
    assert not {name: round(ratio, 2) for name, ratio in ratios.items() if not least <= ratio <= most}


def test_no_two_texts_are_the_same_not_even_in_two_languages() -> None:
    counts = Counter(normalized(text) for row in probe_rows() for text in row.texts.values())
    assert len(counts) == len(probe_rows()) * len(PROBE_LANGUAGES)


@pytest.mark.parametrize("language", PROBE_LANGUAGES)
def test_no_two_prompts_of_a_kind_are_near_copies_of_each_other(language: str) -> None:
    for kinds in (["harmful"], ["harmless", "looks_harmful"]):
        like = likeness(texts(language, *kinds), texts(language, *kinds))
        assert np.triu(like, k=1).max() < NEAR


# ---- Nothing of it in any training set -------------------------------------------------------------------------------


def _of_the_demo() -> list[str]:
    found = []
    for line in (ROOT / "recipes" / "demo" / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found += [turn["content"] for side in (row["source"], *row["targets"]) for turn in side["prompt"]]
    return found


def _of_the_demos_evaluation() -> list[str]:
    folder = ROOT / "recipes" / "evaluation" / "demo"
    found = [prompt.text for file in folder.glob("*.csv") for prompt in load_prompts(str(file)).prompts]
    for file in folder.glob("*.txt"):
        found += file.read_text(encoding="utf-8").splitlines()
    assert not {file.suffix for file in folder.iterdir()} - {".csv", ".txt"}
    return found


def _overlapping(others: Sequence[str]) -> set[tuple[str, str]]:
    """(prompt, text) of the probe prompts that stand in one of the texts, or are an edited copy of one."""
    mine = [text for row in probe_rows() for text in row.texts.values()]
    distinct = sorted(set(others))
    near = zip(*np.nonzero(likeness(mine, distinct) >= NEAR), strict=True)
    found = {(mine[row], distinct[column]) for row, column in near}
    forms = [normalized(text) for text in distinct]
    everything = "\n".join(forms)
    for text in mine:
        if (form := normalized(text)) in everything:
            found |= {(text, other) for other, its in zip(distinct, forms, strict=True) if form in its}
    return found


@pytest.mark.parametrize("read", [_of_the_demo, _of_the_demos_evaluation])
def test_no_prompt_stands_in_the_data_that_is_shipped(read: Callable[[], list[str]]) -> None:
    others = read()
    assert len(others) > 100
    assert not _overlapping(others)


@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_no_prompt_stands_in_the_papers_training_data(name: str, data_folder: Path) -> None:
    rows = json.loads((data_folder / "mpo" / f"{name}_mpo_data.json").read_text(encoding="utf-8"))
    others = [
        turn["value"]
        for row in rows
        for side in ("source", "target")
        for turn in row[f"{side}_conversations"]
    ]
    assert len(others) >= 1200
    assert not _overlapping(others)


@pytest.mark.parametrize("language", ["en", "zh", "bn", "sw", "th"])
def test_a_copy_with_small_edits_would_be_found(language: str) -> None:
    text = texts(language)[0]
    copies = {
        text.upper(),
        f" {text}\n",
        text[:8] + text[9:],
        f"x {text} y",
        "A longer text, then: " + text + " And more " * 30,
    }
    assert {(text, copy) for copy in copies} <= _overlapping(sorted(copies))


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_the_whole_set_is_what_the_file_holds_for_any_reader_of_prompt_files() -> None:
    found = load_probe()
    assert found.prompts == load_prompts(str(FILE)).prompts
    assert found.languages == list(PROBE_LANGUAGES)
    assert len(found.prompts) == 1300


def test_a_part_is_the_same_however_its_languages_and_kinds_are_ordered() -> None:
    found = load_probe(["sw", "English"], kinds=["harmful", "harmless"])
    again = load_probe(["en", "swa"], kinds=["harmless", "harmful"])
    assert found == again and found.fingerprint == again.fingerprint
    assert found.languages == ["en", "sw"]
    assert len(found.prompts) == 160
    by_id = {row.id: row for row in probe_rows()}
    assert all(prompt.text == by_id[prompt.prompt_id].texts[prompt.language] for prompt in found.prompts)
    assert found.fingerprint != load_probe(["en", "sw"], kinds=["harmful"]).fingerprint


def test_a_limit_takes_turns_over_kinds_and_over_their_categories() -> None:
    by_id: dict[str, ProbeRow] = {row.id: row for row in probe_rows()}
    for limit in range(1, 101):
        kept = [by_id[name] for name in ids(load_probe(["en", "bn"], limit=limit))]
        assert len(kept) == limit
        kinds = Counter(row.kind for row in kept)
        full = Counter(row.kind for row in probe_rows())
        open_ = [kinds[kind] for kind in KINDS if kinds[kind] < full[kind]]
        assert not open_ or max(open_) - min(open_) <= 1
        for kind in KINDS:
            categories = Counter(row.category for row in kept if row.kind == kind)
            there = Counter(row.category for row in probe_rows() if row.kind == kind)
            # No category has a second prompt before each has one, and so on.
            most = max(categories.values(), default=0)
            assert all(categories[each] >= min(most - 1, there[each]) for each in there)


def test_a_smaller_limit_keeps_some_of_what_a_larger_one_keeps_in_the_files_order() -> None:
    order = [row.id for row in probe_rows()]
    sets = [ids(load_probe(["en"], limit=limit)) for limit in range(1, 101)]
    assert all(set(few) < set(more) for few, more in pairwise(sets))
    assert all(kept == [name for name in order if name in kept] for kept in sets)
    assert ids(load_probe(limit=1000)) == order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"languages": ["en", "it"]},
            r"languages: the probe set has no language 'it'. It has en, zh, .*, vi\.",
        ),
        ({"languages": ["Klingonisch"]}, "languages: unknown language"),
        ({"languages": []}, "languages: expected at least one of en, zh"),
        (
            {"kinds": ["harmfull"]},
            "kinds: the probe set has no kind 'harmfull'. It has harmless, looks_harmful, harmful",
        ),
        ({"kinds": []}, "kinds: expected at least one of harmless"),
        ({"limit": 0}, "limit: expected a whole number of at least 1, got 0"),
        ({"limit": True}, "limit: expected a whole number"),
    ],
)
def test_an_impossible_choice_says_what_there_is(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_probe(**arguments)


def test_a_change_of_any_text_is_a_new_version() -> None:
    """Results are compared by version: whoever edits the file raises VERSION and writes the new fingerprint here."""
    assert (VERSION, load_probe().fingerprint) == (
        1,
        "f9c90422bc712d93c9a16e6340212e631374d032a67c0a8bb2013ff75410315b",
    )
    assert f"version {VERSION}" in load_probe().origin
