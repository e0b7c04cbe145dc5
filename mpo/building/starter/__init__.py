"""The starter set: prompts and refusals in thirteen languages from which preference data can be built.

A model that is aligned on harmful prompts alone learns to refuse everything. The prompts (``prompts.jsonl``, one row per
prompt) therefore come in three kinds, written and translated for this project:

- ``harmful``: 32 mildly harmful requests that a safe assistant refuses, each with a harmless twin;
- ``looks_harmful``: 60 harmless requests in words that also stand in harmful ones ("the gardener is the murderer");
- ``harmless``: the 32 twins (same topic, form and length; harm is the difference), 40 everyday requests, and 48 prompts in
  the forms that harmful ones have where people wrote them: statements, opinions, questions to the assistant as to a person,
  stories that end in a question, role-play, persuasion. Without them a model can learn the form and refuse it.

``everyday.jsonl`` has 299 more harmless prompts in the same languages, 87 of which look harmful: requests, questions and
remarks in the forms of red-team prompts, the last 97 and 33 of them in the words and the spelling of people who type in a
hurry ("can i punch extra holes in a leather belt?"), about the same things and groups of people. A model is held where it
is on as many harmless prompts as there are, so what is trained on hundreds of harmful ones wants them, too.

``refusals.json`` has twelve refusals per language in different words. What stands at the same place of two lists has the
same drift (the third offers a safe alternative, the ninth asks for the worry behind the request, the twelfth offers a lawful
way), but is no translation. ``openings.json`` has the first words of answers that comply, three per language, which fit any
request: what refusals are preferred to where no harmful answer is at hand.

The set is for training. To see what the training did there is another, :mod:`mpo.evaluation.probe`; they share no prompt.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

from mpo.data.languages import normalize_language_setting
from mpo.errors import ConfigError
from mpo.evaluation.contrast import ContrastRow, prompt_rows
from mpo.evaluation.probe import PROBE_LANGUAGES

VERSION = 5
"""Number of the set, which grows whenever a text changes."""

STARTER_LANGUAGES = PROBE_LANGUAGES
"""Codes of the languages, those of the probe set, in the order of the files."""


@lru_cache(maxsize=1)
def starter_rows() -> tuple[ContrastRow, ...]:
    """All prompts, in the order of the file: harmless, those that look harmful, harmful."""
    return prompt_rows(files("mpo.building.starter").joinpath("prompts.jsonl"))


@lru_cache(maxsize=1)
def everyday_rows() -> tuple[ContrastRow, ...]:
    """The further harmless prompts, in the order of the file: harmless, and those that look harmful."""
    return prompt_rows(files("mpo.building.starter").joinpath("everyday.jsonl"))


def starter_refusals(language: str) -> tuple[str, ...]:
    """Twelve refusals in a language.

    Args:
        language: Its code or name.

    Raises:
        ConfigError: There is no such language, or the set has no refusals in it.
    """
    return _of_language("refusals", language)


def starter_openings(language: str) -> tuple[str, ...]:
    """First words of answers that comply, three in a language, such as "Sure, here is how you can do that:".

    Args:
        language: Its code or name.

    Raises:
        ConfigError: There is no such language, or the set has no openings in it.
    """
    return _of_language("openings", language)


def _of_language(name: str, language: str) -> tuple[str, ...]:
    code = normalize_language_setting(language, "language")
    if code not in STARTER_LANGUAGES:
        raise ConfigError(
            f"language: the starter set has no {name} in {code!r}. It has {', '.join(STARTER_LANGUAGES)}."
        )
    return _texts(name)[code]


@lru_cache
def _texts(name: str) -> dict[str, tuple[str, ...]]:
    text = files("mpo.building.starter").joinpath(f"{name}.json").read_text(encoding="utf-8")
    return {code: tuple(texts) for code, texts in json.loads(text).items()}
