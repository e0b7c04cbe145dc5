"""Where the marks of the page's charts stand: the templates draw them as SVG that takes its colours from the page.

Places are given in per cent of the picture, sizes in pixels, so that a telephone shows the same marks closer together
instead of smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression

from mpo.common.figures import round_ticks
from mpo.common.words import ARROW
from mpo.report.measurement import GAP, SHARE, Cell, Measurement, Row, shown_language
from mpo.report.measurements import GapAgainstAttack
from mpo.report.tables import bare


class _Scale:
    """From numbers to per cent."""

    def __init__(self, low: float, high: float, start: float = 3, end: float = 97) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, scale: float, signed: bool) -> list[tuple[float, str]]:
        """Places and labels of round numbers."""
        found = round_ticks(self.low * scale, self.high * scale, signed)
        return [(self(value / scale), label) for value, label in found]


@dataclass(frozen=True)
class Strip:
    """One row: a mark per model, as ``(model, place)``, and its band, as ``(model, start, end, pixels down)``."""

    label: str
    is_average: bool
    values: str
    marks: list[tuple[int, float]]
    bands: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Dumbbells:
    """One strip per row, over an axis with ticks; `reference` is ``(place, label, text-anchor)``."""

    name: str
    ticks: list[tuple[float, str]]
    reference: tuple[float, str, str] | None
    rows: list[Strip]


def dumbbells(measurement: Measurement) -> Dumbbells:
    """One line per row from the first model's value to the others', with their intervals as bands."""
    unit = measurement.unit
    place = _Scale(*_range(measurement))
    reference = None
    if measurement.reference is not None:
        value, label = measurement.reference
        at = place(value)
        reference = (at, label, "start" if at < 25 else "end" if at > 75 else "middle")
    return Dumbbells(
        f"{measurement.title}, {unit.name}: the table below has the numbers",
        place.ticks(unit.scale, unit.signed),
        reference,
        [_strip(row, measurement, place) for row in measurement.rows],
    )


def _strip(row: Row, measurement: Measurement, place: _Scale) -> Strip:
    shown = [(n, cell.value) for n, cell in enumerate(row.cells) if cell is not None]
    between = 9 / max(len(row.cells) - 1, 1)  # bands lie beside each other, so that none hides another
    first = -4.5 if len(row.cells) > 1 else 0
    return Strip(
        row.label,
        row.is_average,
        from_to(row.cells if len(row.cells) < 3 else (row.cells[0], row.cells[-1]), measurement),
        [(n, place(value.value)) for n, value in shown],
        [
            (n, place(value.low), place(value.high), first + n * between)
            for n, value in shown
            if value.low is not None and value.high is not None
        ],
    )


def from_to(cells: Iterable[Cell | None], measurement: Measurement) -> str:
    """The cells' values without their unit."""
    values = (None if cell is None else cell.value.value for cell in cells)
    return f" {ARROW} ".join(bare(measurement.unit.write(value)) for value in values)


def _range(measurement: Measurement) -> tuple[float, float]:
    if measurement.axis is not None:
        return measurement.axis
    values = [measurement.reference[0]] if measurement.reference is not None else []
    for row in measurement.rows:
        for cell in row.cells:
            if cell is not None:
                values += [v for v in (cell.value.value, cell.value.low, cell.value.high) if v is not None]
    low, high = min(values), max(values)
    if measurement.unit.signed:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.04 * ((high - low) or 1.0)
    return low - margin, high + margin


@dataclass(frozen=True)
class Scatter:
    """Fits are ``(model, x, y, x, y)``, marks ``(model, x, y, pixels from the mark down to its label, label, title)``."""

    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    fits: list[tuple[int, float, float, float, float]]
    marks: list[tuple[int, float, float, int, str, str]]


def scatter(series: Sequence[GapAgainstAttack], models: Sequence[str]) -> Scatter:
    """Languages by reward gap and attack success, a mark per model, with the least-squares line of each.

    Args:
        series: ``(model, [(language code, reward gap, attack success)], correlation)``.
        models: All models of the page, for their colours.
    """
    every = [x for _, points, _ in series for _, x, _ in points]
    margin = 0.12 * ((max(every) - min(every)) or 1.0)
    across, up = _Scale(min(every) - margin, max(every) + margin, 0, 100), _Scale(0.0, 1.0, 90, 5)
    out = Scatter(
        f"Reward gap ({GAP.name})",
        f"Attack success ({SHARE.name})",
        [(x, label) for x, label in across.ticks(GAP.scale, GAP.signed) if 6 < x < 94],
        up.ticks(SHARE.scale, SHARE.signed),
        [],
        [],
    )
    for name, points, found in series:
        model = models.index(name)
        xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
        if found.pearson is not None:
            slope, start = linear_regression(xs, ys)
            first, last = min(xs), max(xs)
            out.fits.append(
                (model, across(first), up(start + slope * first), across(last), up(start + slope * last))
            )
        for rank, (language, x, y) in enumerate(sorted(points, key=lambda point: point[1])):
            title = f"{shown_language(language)}, {name}: {GAP.write(x)}, {SHARE.write(y)}"
            # Labels of neighbours stand above and below them in turn.
            out.marks.append((model, across(x), up(y), -10 if rank % 2 else 19, language, title))
    return out
