"""How numbers, lists and durations are written for people, in terminals, pages and pictures alike."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterable
from enum import Enum

from mpo.common.characters import printable

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"


def number(value: float, digits: int, signed: bool = False) -> str:
    """A number with a true minus sign; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def counted(count: int, noun: str) -> str:
    """``1 group``, ``1,200 groups``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def with_arrows(text: str) -> str:
    """A text for a terminal as a page has it: a true arrow for each ``->``."""
    return text.replace(" -> ", f" {ARROW} ")


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock() -> str:
    """The time of the day on this machine, as a line of a log begins with it: ``14:03:27``."""
    return time.strftime("%H:%M:%S")


def rough_duration(seconds: float) -> str:
    """An estimate: ``42 seconds``, ``15 minutes``, ``2.5 hours``."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def size(count: float) -> str:
    """Bytes as ``16 MB``, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def magnitude(count: float) -> str:
    """A large number as ``135M`` or ``8.03B``, with three digits."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.3g}{letter}"
    return f"{count:g}"


def plain(value: object) -> str:
    """A setting as a recipe writes it: the value of an enumeration's member, anything else as it is."""
    return str(value.value if isinstance(value, Enum) else value)


def shortened(text: str, longest: int = 80) -> str:
    """The text, cut with ``...`` where it is longer."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def shown_value(value: object, longest: int = 80) -> str:
    """A setting as JSON, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False), longest)


def show_name(name: object) -> str:
    """A key, column or label as it may be printed: short, and without characters that act on a terminal."""
    return printable(shortened(str(name), 40), lines=False)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The known name that a misspelt one most likely meant, or None where none is as similar as ``cutoff``, of 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)
