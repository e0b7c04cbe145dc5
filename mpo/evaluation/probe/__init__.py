"""The probe set: a hundred short prompts in thirteen languages that show what a model does, not how well it does it.

Three kinds, written and translated for this project (``prompts.jsonl``, one row per prompt):

- ``harmless``: everyday questions and requests;
- ``looks_harmful``: harmless, but in words that also stand in harmful requests ("kill time at the airport");
- ``harmful``: mildly harmful requests that a safe assistant refuses.

Twenty harmful and twenty harmless prompts are minimal pairs: one topic, one form, and harm as the difference. The
set is for watching a model while it is trained. It is no benchmark, and no row of it may be trained on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import zip_longest
from typing import TypeVar

from mpo.common.checks import check_limit
from mpo.data.languages import normalize_language_setting
from mpo.errors import ConfigError
from mpo.evaluation.contrast import KINDS, ContrastRow, prompt_rows
from mpo.evaluation.prompts import Prompt, PromptSet

__all__ = ["KINDS", "PROBE", "PROBE_LANGUAGES", "VERSION", "ProbeRow", "load_probe", "probe_rows"]

PROBE = "probe"
"""Its name, where commands and recipes take a prompt set."""

VERSION = 1
"""Number of the set, which grows whenever a text changes; it stands in every result, in the prompts' ``origin``."""

PROBE_LANGUAGES = ("en", "zh", "ja", "ko", "ar", "bn", "sw", "de", "fr", "es", "hi", "th", "vi")
"""Codes of the languages, in the order of the file."""

_Item = TypeVar("_Item")


ProbeRow = ContrastRow


@lru_cache(maxsize=1)
def probe_rows() -> tuple[ProbeRow, ...]:
    """All rows, in the order of the file."""
    return prompt_rows(files("mpo.evaluation.probe").joinpath("prompts.jsonl"))


def load_probe(
    languages: Iterable[str] = PROBE_LANGUAGES, *, kinds: Iterable[str] = KINDS, limit: int | None = None
) -> PromptSet:
    """The probe set, or a part of it, as a prompt set like any other.

    The same part has the same order and the same ``fingerprint``, however ``languages`` and ``kinds`` are ordered.

    Args:
        languages: Codes or names of languages.
        kinds: Of :data:`KINDS`.
        limit: Keep so many prompts, each with all its translations: the kinds take turns, and within a kind its
            categories. A smaller limit keeps some of what a larger one keeps.

    Raises:
        ConfigError: The set lacks a language, there is no such kind, no language or kind is given, or the limit is not
            a whole number of at least 1.
    """
    check_limit(limit)
    wanted = {normalize_language_setting(code, "languages") for code in languages}
    kept_languages = _known(wanted, PROBE_LANGUAGES, "languages", "language")
    kept_kinds = _known(set(kinds), KINDS, "kinds", "kind")
    rows = [row for row in probe_rows() if row.kind in kept_kinds]
    if limit is not None:
        by_kind = [
            _by_turns(_grouped(of_kind, [row.category for row in of_kind]))
            for of_kind in _grouped(rows, [row.kind for row in rows])
        ]
        first = {row.id for row in _by_turns(by_kind)[:limit]}
        rows = [row for row in rows if row.id in first]
    prompts = tuple(Prompt(row.id, code, row.texts[code]) for row in rows for code in kept_languages)
    return PromptSet("probe", prompts, f"probe set, version {VERSION}")


def _known(wanted: set[str], known: Sequence[str], setting: str, noun: str) -> list[str]:
    """``wanted`` in the order of ``known``."""
    if unknown := sorted(wanted - set(known)):
        raise ConfigError(
            f"{setting}: the probe set has no {noun} {', '.join(map(repr, unknown))}. It has {', '.join(known)}."
        )
    if not wanted:
        raise ConfigError(f"{setting}: expected at least one of {', '.join(known)}, got none.")
    return [each for each in known if each in wanted]


def _grouped(items: Sequence[_Item], keys: Sequence[Hashable]) -> list[list[_Item]]:
    """Items with the same key, groups in the order of their first items."""
    groups: dict[Hashable, list[_Item]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _by_turns(groups: Sequence[Sequence[_Item]]) -> list[_Item]:
    """The first item of each group, then the second of each that has one, and so on."""
    return [item for turn in zip_longest(*groups) for item in turn if item is not None]
