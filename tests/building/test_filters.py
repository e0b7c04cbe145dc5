"""Filters on texts that are known: published translations, and one text at a time."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from statistics import median

import pytest

from mpo.building import similarity
from mpo.building.filters import (
    FILTERS,
    FilterSettings,
    Text,
    failures,
    information,
    nearness,
    require_packages,
)
from mpo.data import load_groups
from mpo.data.contract import PARTS, messages_text
from mpo.data.languages import detect
from mpo.errors import ConfigError, DependencyError
from mpo.evaluation.wording import repetition

OFFICIAL = Path(os.environ.get("MPO_TEST_DATA", "nowhere")) / "mpo" / "gemma_mpo_data.json"
ENGLISH = "Wait until nobody is at home, then carry the ladder out by the back door."
OFF = FilterSettings(
    copy=None,
    language=None,
    length_ratio=None,
    remark=False,
    repetition=None,
    refusal_kept=False,
    harm_kept=False,
    help_kept=False,
)


def names(text: Text, settings: FilterSettings | None = None) -> list[str]:
    return [failure.filter for failure in failures(text, settings or FilterSettings())]


def translation(text: str, language: str = "sw", **more) -> Text:
    more = {"part": "chosen", "kind": "harmful", "source": ENGLISH, "detected": detect(text), **more}
    return Text(text=text, language=language, **more)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason="needs the published pairs (MPO_TEST_DATA)")
def test_the_published_pairs_hold_102_texts_that_are_the_english_one_and_the_filter_finds_them() -> None:
    pairs = [
        (part, target["language"], messages_text(group["source"][part]), messages_text(target[part]))
        for group in load_groups(str(OFFICIAL)).groups
        for target in group["targets"]
        for part in PARTS
    ]
    only_equal = FilterSettings(copy=1.0)
    found = Counter(
        part
        for part, code, source, text in pairs
        if "copy" in names(translation(text, code, part=part, source=source), only_equal)
    )
    assert found == {"chosen": 48, "prompt": 22, "rejected": 32}
    nearly = [text for part, code, source, text in pairs if 0.8 <= nearness(text, source) < 1]
    assert len(nearly) == 1
    # What is not a copy is as long as a translation usually is, in every language.
    for code in {code for _, code, *_ in pairs}:
        ratios = [
            information(text) / information(source)
            for part, language, source, text in pairs
            if language == code and part != "prompt" and nearness(text, source) < 0.5
        ]
        assert median(ratios) == pytest.approx(1, abs=0.06), code
        outside = sum(not 1 / 1.8 <= ratio <= 1.8 for ratio in ratios)
        assert outside <= 0.03 * len(ratios), code


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("Subiri hadi mtu yeyote asiwe nyumbani, kisha toa ngazi kupitia mlango wa nyuma.", {}, []),
        (ENGLISH, {}, ["copy", "language"]),
        (ENGLISH.upper() + "  ", {}, ["copy", "language"]),
        ("Attends que personne ne soit à la maison, puis sors l'échelle par la porte de derrière.", {}, ["language"]),
        ("Subiri hadi nyumbani.", {}, ["length_ratio"]),
        ("ngazi ya mlango " * 5, {}, ["repetition"]),
        ("当然，请提供需要翻译的文本，我会将其翻译成中文。", {"language": "zh"}, ["remark"]),
        ("等到没有人在家的时候，再把梯子搬出。TRANSLATION", {"language": "zh"}, ["remark"]),
        ("Il faut traduire en justice celui qui sort l'échelle par la porte de derrière.", {"language": "fr"}, []),
        ("请把这封信翻译成英文。", {"language": "zh", "source": "Please translate this letter."}, []),
        ("等到没有人在家的时候，再把梯子从后门搬出去。", {"language": "zh"}, []),
        ("等到没有人在家。", {"language": "zh"}, ["length_ratio"]),
        ("3141 5926 5358 9793 2384 6264 3383 2795 0288 4197 1693 9937 5105 8209", {}, []),
        ("https://example.org/a", {"source": "https://example.org/a", "part": "prompt"}, ["copy"]),
        ("123", {"source": "123"}, []),
    ],
)  # fmt: skip
def test_a_text_fails_what_is_wrong_with_it(text: str, more: dict, expected: list[str]) -> None:
    assert names(translation(text, **more)) == expected


def test_a_short_text_is_in_another_language_only_where_its_script_says_which() -> None:
    settings = replace(OFF, language=40)
    for text, expected in (("กรุณารอสักครู่", ["language"]), ("Подождите здесь", []), ("Attendez ici", [])):
        assert names(translation(text), settings) == expected, text


def test_as_much_repetition_as_is_allowed_is_kept() -> None:
    text = "ngazi ya mlango " * 3
    found = repetition(text)
    assert found is not None and found > 0
    assert names(translation(text), replace(OFF, repetition=found)) == []
    assert names(translation(text), replace(OFF, repetition=found - 0.01)) == ["repetition"]


@pytest.mark.parametrize(
    ("kind", "part", "verdict", "expected"),
    [
        ("harmful", "chosen", "unsafe", ["refusal_kept"]),
        ("harmful", "chosen", "safe", []),
        ("harmful", "rejected", "safe", ["harm_kept"]),
        ("harmful", "rejected", "unsafe", []),
        ("harmless", "chosen", "refusal", ["help_kept"]),
        ("harmless", "rejected", "answer", ["refusal_kept"]),
        ("harmless", "rejected", "refusal", []),
        ("harmful", "chosen", "unparsed", []),
        ("harmful", "rejected", None, []),
    ],
)
def test_meaning_is_the_judges_word_on_each_part(
    kind: str, part: str, verdict: str | None, expected: list[str]
) -> None:
    text = "Subiri hadi mtu yeyote asiwe nyumbani, kisha toa ngazi kupitia mlango wa nyuma."
    assert names(translation(text, kind=kind, part=part, verdict=verdict)) == expected
    assert names(translation(text, kind=kind, part=part, verdict=verdict), OFF) == []


def test_a_text_that_is_no_translation_is_not_compared_with_a_source() -> None:
    assert names(Text("chosen", "harmless", "Yes.", "sw", source=None, detected=detect("Yes."))) == []


def test_a_translation_that_comes_back_as_something_else_is_found() -> None:
    settings = FilterSettings(back_translation=40)
    text = "Subiri hadi mtu yeyote asiwe nyumbani, kisha toa ngazi kupitia mlango wa nyuma."
    assert (
        names(
            translation(text, back="Wait until no one is home, then take the ladder out the back door."),
            settings,
        )
        == []
    )
    assert names(
        translation(text, back="I do not like bread with seven eggs on Sundays in spring."), settings
    ) == ["back_translation"]
    assert names(translation(text, similarity=0.3), FilterSettings(embedding=0.7)) == ["embedding"]


def test_a_missing_package_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(DependencyError, match="sentence-transformers: pip install"):
        require_packages(FilterSettings(embedding=0.7))
    with pytest.raises(DependencyError, match="sentence-transformers"):
        similarity.import_sentence_transformers()


@pytest.mark.parametrize(
    "settings",
    [
        {"copy": 1.5},
        {"length_ratio": 1},
        {"length_ratio": {"zh": 0.5}},
        {"length_ratio": {"zh": 3, "defualt": 2}},
        {"language": 0},
        {"embedding": 2},
    ],
)
def test_thresholds_that_mean_nothing_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FilterSettings(**settings)


def test_every_filter_has_a_threshold_in_the_recipe_and_a_rule_for_people() -> None:
    assert {*FILTERS} == {f.name for f in fields(FilterSettings)} - {"embedding_model"}
    assert all(each.rule.endswith(".") and each.title for each in FILTERS.values())
    by_language = FilterSettings(length_ratio={"Chinese": 1.1, "default": 9})
    assert names(translation("等到没有人在家的时候，再把梯子从后门。", "zh"), by_language) == ["length_ratio"]
