"""Fonts for labels in any script: what DejaVu Sans lacks is looked for among the installed fonts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

BASE = "DejaVu Sans"  # comes with matplotlib


def families_for(labels: Iterable[str]) -> list[str]:
    """Font families that together have every character of the labels, as far as this machine has them.

    matplotlib takes a character from the first family of a list that has it. DejaVu Sans, which is always there, has
    Latin, Greek, Cyrillic, Arabic, Hebrew, Armenian and Georgian letters; Chinese, Japanese, Korean and the scripts of
    India need another font, such as Noto.

    Returns:
        ``["DejaVu Sans", ...]``.
    """
    families = [BASE]
    missing = {c for label in labels for c in label if c.isprintable()} - _characters(_path_of(BASE))
    for family, path in _installed():
        if not missing:
            break
        found = missing & _characters(path)
        if found:
            families.append(family)
            missing -= found
    return families


def drawable(label: str, fallback: str) -> str:
    """The label, or the fallback where no installed font has all of its characters."""
    wanted = {c for c in label if c.isprintable()}
    for _, path in [(BASE, _path_of(BASE)), *_installed()]:
        wanted -= _characters(path)
        if not wanted:
            return label
    return fallback


@lru_cache
def _installed() -> tuple[tuple[str, str], ...]:
    from matplotlib import font_manager

    # Regular faces first, Noto before others: it covers most scripts and its families fit together.
    fonts = sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (
            font.style != "normal",
            str(font.weight) not in ("400", "normal"),
            "Noto" not in font.name,
        ),
    )
    seen: dict[str, str] = {}
    for font in fonts:
        seen.setdefault(font.name, font.fname)
    # matplotlib's last resort has a box for every character, which is no letter.
    return tuple(
        (name, path) for name, path in seen.items() if name != BASE and not name.startswith("Last Resort")
    )


@lru_cache
def _path_of(family: str) -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(family))


@lru_cache(maxsize=256)
def _characters(path: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(chr(code) for code in FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a broken font file
        return frozenset()
