"""A rough sign of refusal: does a response open with a refusal phrase?

The phrases are in ``refusal_phrases.json``, one list per language. The heuristic reads the first 240
characters of a response, ignoring case, Arabic vowel signs and typographic quotes, and looks for any of them.

What it cannot do: see a refusal in other words, or one that comes late; tell a refusal from an answer that
merely begins with regret ("Sorry to hear that. Here is how ..."), quotes a refusal, or warns of the law and
then answers; judge languages without a list. It is good for finding rows to look at, and no measure of safety.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import lru_cache
from importlib.resources import files

_OPENING = 240  # characters of a response that are read
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


@lru_cache(maxsize=1)
def _phrases() -> dict[str, tuple[str, ...]]:
    raw = files("mpo.data").joinpath("refusal_phrases.json").read_text(encoding="utf-8")
    return {language: tuple(map(_normalize, phrases)) for language, phrases in json.loads(raw).items()}


def refusal_languages() -> frozenset[str]:
    """Codes of the languages there are phrases for."""
    return frozenset(_phrases())


def phrases_fingerprint() -> str:
    """Short hash of all phrases: verdicts that rest on other ones are not comparable."""
    text = json.dumps(_phrases(), sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def opens_with_refusal(text: str, *languages: str) -> bool:
    """True if a phrase of one of these languages stands in the first 240 characters of ``text``."""
    opening = _normalize(text[: 2 * _OPENING])[:_OPENING]
    for language in languages:  # without generators: this is asked of every response of the data
        for phrase in _phrases().get(language, ()):
            if phrase in opening:
                return True
    return False
