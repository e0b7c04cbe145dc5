"""Characters that are no text: those that act on a terminal, and halves of a character that was cut in two."""

from __future__ import annotations

import re
import unicodedata

_HALF = re.compile("[\ud800-\udfff]")
# Joiners are invisible too, but Persian, Bengali and others are not spelled right without them.
_JOINERS = "\u200c\u200d"


def printable(text: str, *, lines: bool = True, directions: bool = False) -> str:
    """The text with every character that acts on a terminal, or on the text around it, written as an escape.

    These are control characters (colours, cursor movements), those that turn the direction of writing, other invisible
    ones, and halves of surrogate pairs. Letters, marks, spaces and emoji of all scripts stay.

    Args:
        text: Any text.
        lines: Keep line breaks and tabs; without, the result is one line.
        directions: Keep what turns the direction of writing and other invisible characters: where a text stands in a block of its
            own, they end with it, and Arabic or Hebrew may be written with them.
    """
    acting = ("Cc", "Cs") if directions else ("Cc", "Cf", "Cs", "Zl", "Zp")
    kept = _JOINERS + "\n\t" if lines else _JOINERS
    return "".join(
        c
        if c in kept or unicodedata.category(c) not in acting
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def without_halves(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which UTF-8 cannot hold."""
    return _HALF.sub("\N{REPLACEMENT CHARACTER}", text)


def half_character(text: str) -> str | None:
    """What to say of a text that holds half of a surrogate pair, with its place; None of any other text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        found = _HALF.search(text)
    else:
        return None
    if found is None:  # pragma: no cover - nothing else cannot be encoded
        return None
    return (
        f"holds a lone surrogate (U+{ord(found[0]):04X}) at character {found.start()}, half of a character that was cut in "
        "two. Write the text again from its origin."
    )
