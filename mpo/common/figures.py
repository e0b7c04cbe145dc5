"""The look of every picture: colours, fonts, sizes, round ticks, and how a figure becomes a file."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo.common.files import write_bytes
from mpo.common.redaction import redact_text
from mpo.common.words import number
from mpo.errors import DependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette ("Color Universal Design", 2008), told apart with every common colour blindness. Its yellow
# is left out: on white it cannot be read.
BLACK = "#000000"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
CYCLE = (BLUE, VERMILION, PURPLE, SKY_BLUE, ORANGE, BLACK)
"""Colours of lines, in this order. More series than these are told apart otherwise, never by yet another colour."""

BEFORE = VERMILION
AFTER = BLUE
REFERENCE = GREEN  # in every picture, and nothing else is green

INK = "#222222"
FAINT_INK = "#6B6B6B"
GRID = "#E4E4E4"
GREY = "#B4B4B4"

WIDTH = 8.6
"""Of every picture, in inches."""

DPI = 200
"""Pixels per inch of what is saved: twice that of a plain screen, so that it is sharp on a fine one and in print."""

# What differs from matplotlib's own defaults. Its font, DejaVu Sans, comes with it.
_RC: dict[str, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a language or model name may hold a dollar sign
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
}


@contextmanager
def project_style() -> Iterator[None]:
    """Draw in the project's style; the caller's own matplotlib settings are back afterwards.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import style as matplotlib_style
    except ImportError as error:
        raise DependencyError(
            "Plots need matplotlib, which is not installed. Install it with: pip install 'mpo-align[plots]'"
        ) from error
    # The caller's matplotlibrc may hold anything; start from matplotlib's own defaults, but leave the backend alone.
    with matplotlib_style.context(["default", _RC]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, on the Agg canvas whatever backend the process uses.

    It is not registered with pyplot, so that nothing needs closing and a notebook does not show it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG of 256 colours, atomically. The same figure gives the same bytes.

    Raises:
        StorageError: The disk is full, or the folder cannot be written.
    """
    from PIL import Image  # matplotlib needs it, too

    buffer, fewer = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(buffer) as picture:
        # A third of the size where thousands of points overlap.
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
            fewer, format="png", optimize=True
        )
    return write_bytes(path, fewer.getvalue())


def add_title(figure: Figure, title: str, subtitle: str, *, left: float) -> None:
    """A left-aligned title that says what is seen, and a line below it that says on what.

    Args:
        figure: The figure; its top 0.6 inch must be free.
        title: The finding.
        subtitle: Unit, data, number of groups.
        left: Left end of both, as a fraction of the width.
    """
    inch = 1 / figure.get_figheight()
    figure.text(left, 1 - 0.13 * inch, redact_text(title), fontsize=12, fontweight="bold", va="top")
    figure.text(left, 1 - 0.37 * inch, redact_text(subtitle), fontsize=9, color=FAINT_INK, va="top")


def round_ticks(low: float, high: float, signed: bool = False) -> list[tuple[float, str]]:
    """Four to seven round numbers from `low` to `high`, and how they are written: with equally many digits."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= 0.999 * rough)
    digits = max(0, -math.floor(math.log10(power)) + (step == 2.5 * power) - (step == 10 * power))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, number(n * step, digits, signed) if n else "0") for n in range(first, last + 1)]
