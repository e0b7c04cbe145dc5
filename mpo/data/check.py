"""A report on preference data: what is in it, and which rows deserve a look before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from typing import Any

from mpo.common import processes
from mpo.data.contract import HARMLESS, messages_text
from mpo.data.detection import detect_all, get_ready
from mpo.data.findings import FINDINGS as FINDINGS
from mpo.data.findings import DataReport
from mpo.data.languages import language_name, same_language
from mpo.data.loading import LoadedGroups, _load, count_kinds, labelled_otherwise
from mpo.data.survey import SEVERAL_FROM, Survey
from mpo.errors import ConfigError

_SAMPLE = 200  # sources whose language is compared with the setting
_LEAST_VOTES = 5


def check_data(
    data: Any,
    *,
    tokenizer: Any = None,
    source_language: str = "en",
    max_length: int | None = 1024,
    max_response_length: int | None = None,
    split: str = "train",
    limit: int | None = None,
    languages: Iterable[str] | None = None,
    show_texts: bool = False,
) -> DataReport:
    """Look through preference data and report what is in it.

    Args:
        data: Anything that :func:`mpo.data.load_groups` takes.
        tokenizer: Tokenizer of the model, for lengths in its tokens and for truncation. Lengths are
            characters without it.
        source_language: Language of sources without a label.
        max_length: Longest prompt plus response in training, in tokens.
        max_response_length: Longest response in training, in tokens.
        split: Split of a Hub dataset.
        limit: Look at the first N sources only.
        languages: Look at these target languages only.
        show_texts: Put the beginning of each flagged text (escaped, 60 characters) into the report. Safety
            data is harmful on purpose, so texts are left out by default.

    Raises:
        DataError: A file as a whole cannot be read. Bad rows are reported instead.
        ConfigError: A setting has an impossible value.
    """
    for name, value, least in (
        ("max_length", max_length, 2),
        ("max_response_length", max_response_length, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name}: expected a whole number of at least {least}, or None, got {value!r}.")
    mistaken: Counter[str] = Counter()
    read = partial(_load, data, split=split, bad_rows="drop", limit=limit, languages=languages)
    loaded, _ = read(source_language=source_language, mistaken=mistaken)
    notes = []
    if (found := labelled_otherwise(loaded.groups, source_language)) is not None:
        notes.append(
            f"Every source is labelled as {language_name(found)}, but the source language is set to {source_language!r}. Set "
            f"`source_language: {found}` if that is their language, or mend the labels; training and measuring refuse the data as they "
            "are."
        )
    elif (found := _other_source_language(loaded, mistaken)) is not None:
        again, _ = read(source_language=found)
        if labelled_otherwise(again.groups, found) is None:
            loaded = again
            notes.append(
                f"The sources are in {language_name(found)}, but the source language is set to {source_language!r}: set "
                f"`source_language: {found}`. The rest of this report is as if it were."
            )
        else:
            notes.append(
                f"The sources are labelled with the source language, {source_language!r}, but most are in {language_name(found)}. "
                "Mend the labels."
            )
    tables = loaded.groups.with_format("arrow")
    number = processes.available() if len(tables) >= SEVERAL_FROM else 1
    if number > 1:
        get_ready()
    survey = Survey(tokenizer, max_length, max_response_length, show_texts)
    parts = processes.in_order(partial(survey.parts, tables), number)
    with closing(parts):
        for part in parts:
            survey.merge(part)
    kinds = count_kinds(loaded.groups)
    return DataReport(
        origin=loaded.origin,
        fingerprint=loaded.fingerprint,
        groups=len(loaded.groups),
        pairs=survey.pairs,
        length_unit=survey.unit,
        max_length=max_length if tokenizer is not None else None,
        languages=survey.reports(),
        bad_rows=loaded.dropped,
        notes=notes,
        kinds=kinds if kinds[HARMLESS] else {},
        reasoning=survey.reasoning,
    )


def _other_source_language(loaded: LoadedGroups, mistaken: Counter[str]) -> str | None:
    """The language that most sources are in, where it is not the one they were taken to be in."""
    votes, seen = mistaken.copy(), mistaken.total()
    sources = loaded.groups[:_SAMPLE]["source"]
    texts = [messages_text([*source["prompt"], *source["chosen"]]) for source in sources]
    for source, found in zip(sources, detect_all(texts), strict=True):
        seen += found.certain
        if found.certain and not same_language(found.language, source["language"]):
            votes[found.language] += 1
    language, number = max(votes.items(), key=lambda vote: vote[1], default=("", 0))
    return language if number >= _LEAST_VOTES and number > 0.5 * seen else None
