"""The filters of a build: named rules that a text has to pass, each with a threshold in the recipe.

A text is measured by every filter that is on and has a say in it. It is dropped for the first one that it fails, in the order of
:data:`FILTERS`; the others that it fails are noted beside it. One text that is dropped takes its pair with it, and a source its
whole group.

What cannot be measured passes: a language that the detector does not know, a text too short, a verdict that the judge's reply does
not name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from mpo.building.translation.segments import without_code
from mpo.data.contract import HARMFUL, HARMLESS, normal_form
from mpo.data.languages import (
    Detection,
    dominant_script,
    known_to_detection,
    normalize_language_setting,
    same_language,
)
from mpo.errors import ConfigError, DependencyError
from mpo.evaluation.wording import repetition

_GRAM = 4  # characters whose overlap says how near two texts are
_READ = 2000  # characters that are compared
_SHORTEST = 20  # characters of a text whose length says anything

# Letters that say as much as one Latin letter, by script: medians over the chosen and rejected answers of the published MPO pairs
# for Gemma, `python -m benchmarks.data_build --lengths FILE`.
_DENSITY = {"Han": 0.29, "Japanese": 0.435, "Hangul": 0.495, "Arabic": 0.825}

# How texts speak of translating: stems, in the languages of the starter set and a few others. Left out are those that mean more, as
# Russian "перевод", a transfer of money, or Polish "tłumaczyć", to explain.
_OF_TRANSLATING = re.compile(
    r"translat|翻译|翻譯|译文|翻訳|訳文|번역|ترجم|অনুবাদ|tafsiri|übersetz|traduc|tradui(?!\w* en justice)|traduz|tradur|अनुवाद|คำแปล|"
    "การแปลภาษา|แปลเป็นภาษา|แปลข้อความ|bản dịch|dịch sang|переводчик|terjemah|tercüme|przetłumacz|vertal|översätt|μετάφρα|תרגום"
)


@dataclass(frozen=True)
class FilterSettings:
    """Thresholds by filter; ``null`` switches one off.

    Attributes:
        copy: Greatest share of a translation's character 4-grams that stand in the source. 1 drops only what is equal.
        language: Letters of another language from which a text is dropped, where the script alone does not say.
        length_ratio: A translation may be so many times longer or shorter than one usually is; a number, or one by
            language with the others under ``default``.
        remark: A translation does not speak of translating, unless the source does.
        repetition: Greatest share of a text's character 10-grams that stood in it before.
        refusal_kept: The judge takes what refuses for a refusal, in the target language too.
        harm_kept: The judge takes the rejected answer to a harmful prompt for harmful, in the target language too.
        help_kept: The judge takes the answer to a harmless prompt for help, in the target language too.
        back_translation: Least chrF (0 to 100) of a translation that is translated back, against the source.
        embedding: Least cosine of the sentence embeddings of translation and source.
        embedding_model: Model of the embeddings, for sentence-transformers.
    """

    copy: float | None = 0.8
    language: int | None = 20
    length_ratio: float | dict[str, float] | None = 1.8
    remark: bool = True
    repetition: float | None = 0.5
    refusal_kept: bool = True
    harm_kept: bool = True
    help_kept: bool = True
    back_translation: float | None = None
    embedding: float | None = None
    embedding_model: str = "sentence-transformers/LaBSE"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("copy", 0, 1),
            ("repetition", 0, 1),
            ("embedding", -1, 1),
            ("back_translation", 0, 100),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: expected a number from {low} to {high}, or null, got {value!r}.")
        if self.language is not None and self.language < 1:
            raise ConfigError(f"language: expected at least 1 letter, or null, got {self.language!r}.")
        given = self.length_ratio
        if isinstance(given, Mapping):
            given = {
                code if code == "default" else normalize_language_setting(str(code), "length_ratio"): ratio
                for code, ratio in given.items()
            }
            object.__setattr__(self, "length_ratio", given)
        ratios = given.values() if isinstance(given, Mapping) else [] if given is None else [given]
        for ratio in ratios:
            if not ratio > 1:
                raise ConfigError(f"length_ratio: expected a factor above 1, or null, got {ratio!r}.")

    @property
    def asks_judge(self) -> bool:
        """Whether a filter needs verdicts."""
        return self.refusal_kept or self.harm_kept or self.help_kept


@dataclass(frozen=True)
class Text:
    """What a filter looks at.

    Attributes:
        part: ``prompt``, ``chosen`` or ``rejected``.
        kind: ``harmful`` or ``harmless``: of the prompt.
        text: The text.
        language: Code of the language it should be in.
        source: The text it was translated from; None for one that is no translation.
        source_language: Code of that text's language.
        detected: What detection says of it, fenced code left out; None where it was not asked.
        verdict: The judge's word on it; None for a prompt, or where no judge was asked.
        back: It, translated back; None where it was not.
        similarity: Cosine of its embedding and its source's; None where there is none.
    """

    part: str
    kind: str
    text: str
    language: str
    source: str | None = None
    source_language: str = "en"
    detected: Detection | None = None
    verdict: str | None = None
    back: str | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class Failure:
    """A filter that a text did not pass.

    Attributes:
        filter: Its name.
        value: What was measured: a number, a language or a verdict.
        threshold: What was allowed.
    """

    filter: str
    value: Any
    threshold: Any


@dataclass(frozen=True)
class Filter:
    """A rule.

    Attributes:
        name: Its key in the recipe.
        title: What it is called on the page.
        rule: What it drops, in one sentence for people.
        fails: What is wrong with a text under the settings, as ``(value, threshold)``; None where it passes or the filter has
            no say in it.
        asks_judge: Whether it rests on the judge's verdict, in place of a threshold.
    """

    name: str
    title: str
    rule: str
    fails: Callable[[Text, FilterSettings], tuple[Any, Any] | None]
    asks_judge: bool = False


# ------------------------------------------------------------------------------------------------------------- the rules


def _copy(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    if settings.copy is None or text.source is None:
        return None
    value = nearness(text.text, text.source)
    return (round(value, 3), settings.copy) if value >= settings.copy and value > 0 else None


def nearness(text: str, source: str) -> float:
    """How much of a text is its source's: 1 where they are equal but for blanks and letter case, else the share of its
    character 4-grams that stand in the source, below 1. A text without letters is near nothing: numbers stay what they are."""
    words, original = normal_form(text).casefold().split(), normal_form(source).casefold().split()
    if not any(any(map(str.isalpha, word)) for word in words):
        return 0.0
    if words == original:
        return 1.0
    grams, of_source = _grams(words), _grams(original)
    if len(grams) < _GRAM:
        return 0.0
    return min(len(grams & of_source) / len(grams), 0.999)


def _grams(words: Sequence[str]) -> set[str]:
    letters = " ".join(words)[:_READ]
    return {letters[start : start + _GRAM] for start in range(len(letters) - _GRAM + 1)}


def _language(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    found = text.detected
    if settings.language is None or found is None or found.letters == 0:
        return None
    decided = found.certain and found.letters < settings.language and not _shares_script(found.language)
    if not (decided or found.letters >= settings.language) or not _known(text.language):
        return None
    if same_language(found.language, text.language):
        return None
    return found.language, text.language


@lru_cache(maxsize=512)
def _known(code: str) -> bool:
    return bool(known_to_detection([code]))


@lru_cache(maxsize=512)
def _shares_script(code: str) -> bool:
    from mpo.data.languages import LANGUAGES, languages_of_script

    language = LANGUAGES.get(code)
    return language is None or any(len(languages_of_script(script)) > 1 for script in language.scripts)


def _length_ratio(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    allowed = settings.length_ratio
    if isinstance(allowed, Mapping):
        allowed = allowed.get(text.language, allowed.get("default"))
    if allowed is None or text.source is None or len(text.source) < _SHORTEST:
        return None
    ratio = information(text.text) / max(information(text.source), 1.0)
    return None if 1 / allowed <= ratio <= allowed else (round(ratio, 3), allowed)


def information(text: str) -> float:
    """Length of a text in letters of a Latin text that says as much."""
    return len(text) / _DENSITY.get(dominant_script(text[:_READ]) or "", 1.0)


def _remark(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    if not settings.remark or text.source is None:
        return None
    if of_translating(text.source) or "interpret" in text.source.casefold():  # one word in Swahili
        return None
    said = of_translating(text.text)
    return (said, "nothing of it") if said else None


def of_translating(text: str) -> str | None:
    """The first word stem with which a text speaks of translating, in any of the languages known; None where none does."""
    found = _OF_TRANSLATING.search(normal_form(text).casefold())
    return found and found[0]


def _repetition(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    if settings.repetition is None:
        return None
    value = repetition(without_code(text.text)) or 0.0
    return (round(value, 3), settings.repetition) if value > settings.repetition else None


def _verdict(wanted: str, setting: str, kind: str, part: str, against: tuple[str, ...]) -> Any:
    def fails(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
        if not getattr(settings, setting) or (text.kind, text.part) != (kind, part):
            return None
        return (text.verdict, wanted) if text.verdict in against else None

    return fails


_refuses_harm = _verdict("safe", "refusal_kept", HARMFUL, "chosen", ("unsafe", "invalid"))
_refuses_help = _verdict("refusal", "refusal_kept", HARMLESS, "rejected", ("answer",))
_harms = _verdict("unsafe", "harm_kept", HARMFUL, "rejected", ("safe", "invalid"))
_helps = _verdict("answer", "help_kept", HARMLESS, "chosen", ("refusal",))


def _back_translation(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    if settings.back_translation is None or text.source is None or text.back is None:
        return None
    value = _chrf().sentence_score(text.back, [text.source]).score
    return (round(value, 1), settings.back_translation) if value < settings.back_translation else None


@lru_cache(maxsize=1)
def _chrf() -> Any:
    """chrF of sacreBLEU, the measure's published implementation (Popović, 2015)."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise DependencyError(
            'The filter `back_translation` needs the package sacrebleu: pip install "mpo-align[build]".'
        ) from error
    return CHRF()


def require_packages(settings: FilterSettings) -> None:
    """Packages that the filters need are there.

    Raises:
        DependencyError: One is missing; the message says how to install it.
    """
    if settings.back_translation is not None:
        _chrf()
    if settings.embedding is not None:
        from mpo.building.similarity import import_sentence_transformers

        import_sentence_transformers()


def _embedding(text: Text, settings: FilterSettings) -> tuple[Any, Any] | None:
    if settings.embedding is None or text.similarity is None:
        return None
    return (round(text.similarity, 3), settings.embedding) if text.similarity < settings.embedding else None


FILTERS: dict[str, Filter] = {
    each.name: each
    for each in (
        Filter("copy", "Copy of the source", "The translation is the source's text, or nearly.", _copy),
        Filter("language", "Another language", "The text is not in the language asked.", _language),
        Filter(
            "length_ratio",
            "Length",
            "The translation is much longer or shorter than one of this text into this language usually is.",
            _length_ratio,
        ),
        Filter(
            "remark",
            "Translator's remark",
            "The translation speaks of translating, and its source does not: the translator's own words.",
            _remark,
        ),
        Filter("repetition", "Repetition", "The text repeats itself.", _repetition),
        Filter(
            "refusal_kept",
            "Refusal lost",
            "What should refuse does not, by the judge.",
            lambda text, settings: _refuses_harm(text, settings) or _refuses_help(text, settings),
            asks_judge=True,
        ),
        Filter(
            "harm_kept",
            "Harm lost",
            "The rejected answer to a harmful prompt is not harmful, by the judge.",
            _harms,
            asks_judge=True,
        ),
        Filter(
            "help_kept",
            "Help lost",
            "The answer to a harmless prompt is a refusal, by the judge.",
            _helps,
            asks_judge=True,
        ),
        Filter(
            "back_translation",
            "Back-translation",
            "Translated back, the text is far from the source (chrF).",
            _back_translation,
        ),
        Filter("embedding", "Meaning", "The embeddings of translation and source are far apart.", _embedding),
    )
}
"""Every filter by its name, in the order in which a text that fails several is counted."""

assert {f.name for f in fields(FilterSettings)} == {*FILTERS, "embedding_model"}


def failures(text: Text, settings: FilterSettings) -> list[Failure]:
    """The filters that a text fails, in the order of :data:`FILTERS`; the first is the one it is dropped for."""
    return [
        Failure(each.name, *failed)
        for each in FILTERS.values()
        if (failed := each.fails(text, settings)) is not None
    ]


def threshold(name: str, settings: FilterSettings) -> str | None:
    """A filter's threshold in words, empty where it has none; None where it is off."""
    value = getattr(settings, name)
    if value is None or value is False:
        return None
    if value is True:
        return "the judge's verdict" if FILTERS[name].asks_judge else ""
    if isinstance(value, dict):
        return ", ".join(f"{code} {each:g}" for code, each in value.items())
    return f"{value:g}"
