"""A rough sign of refusal: does a response open with a refusal phrase?

The phrases are in ``refusal_phrases.json``, three lists per language. The heuristic reads the first 240 characters of a
response, ignoring case, Arabic vowel signs and typographic quotes. A response refuses if one of the phrases in ``refusing`` stands
there ("I cannot"), or one in ``opening``, with which answers begin as well ("I'm sorry", "As an AI"), and no phrase in ``answering``
at or behind it ("but I can", "here are", "I'm sorry to hear").

What it cannot do: see a refusal in other words, or one that comes late; tell a refusal from an answer that quotes one, says of
something else that it cannot be done, or warns of the law and then answers; judge languages without a list. It is good for finding
rows to look at, and no measure of safety.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

_OPENING = 240  # characters of a response that are read
_READING = 2  # raised where the same phrases come to give other verdicts
_QUOTES = (("\u2019", "'"), ("\u2018", "'"), ("\u02bc", "'"), ("\u0640", ""))
_VOWEL_SIGNS = re.compile("[\u064b-\u0652]")


def _normalize(text: str) -> str:
    if text.isascii():
        text = text.lower()
    else:
        text = unicodedata.normalize("NFKC", text).casefold()
        for mark, plain in _QUOTES:
            text = text.replace(mark, plain)
        # Arabic vowel signs are written by some and left out by most.
        text = _VOWEL_SIGNS.sub("", text)
    for mark in "*_#>":
        text = text.replace(mark, " ")
    return " ".join(text.split())


class _Phrases(NamedTuple):
    """Those of a language, as the module says."""

    refusing: tuple[str, ...]
    opening: tuple[str, ...]
    answering: tuple[str, ...]


@lru_cache(maxsize=1)
def _phrases() -> dict[str, _Phrases]:
    raw = json.loads(files("mpo.data").joinpath("refusal_phrases.json").read_text(encoding="utf-8"))
    return {
        language: _Phrases(**{kind: tuple(map(_normalize, phrases)) for kind, phrases in kinds.items()})
        for language, kinds in raw.items()
    }


def refusal_languages() -> frozenset[str]:
    """Codes of the languages there are phrases for."""
    return frozenset(_phrases())


def phrases_fingerprint() -> str:
    """Short hash of all phrases and of how they are read: verdicts that rest on other ones are not comparable."""
    text = json.dumps([_READING, _phrases()], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def opens_with_refusal(text: str, *languages: str) -> bool:
    """True if ``text`` refuses in its first 240 characters, by the phrases of one of these languages."""
    opening = _normalize(text[: 2 * _OPENING])[:_OPENING]
    known = [_phrases()[language] for language in languages if language in _phrases()]
    for phrases in known:  # without generators: this is asked of every response of the data
        for phrase in phrases.refusing:
            if phrase in opening:
                return True
    for phrases in known:
        for phrase in phrases.opening:
            if (place := opening.find(phrase)) >= 0 and not _answers(opening[place:], known):
                return True
    return False


def _answers(text: str, languages: list[_Phrases]) -> bool:
    return any(phrase in text for phrases in languages for phrase in phrases.answering)
