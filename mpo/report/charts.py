"""Charts of the report page: inline SVG that fits any width and takes its colours from the page.

Places are given in per cent of the picture's width, sizes in pixels, so that a telephone shows the same marks closer
together instead of smaller. Nothing but attributes and classes is used: the page's policy allows no inline style.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mpo.common.statistics import Correlation
from mpo.report.measurement import Cell, Measurement, Row, Unit, number, shown_language

SERIES = 6
"""Models that have a colour and a mark of their own; further ones start again."""

_MARKS = (
    "M-5.5,0a5.5,5.5 0 1,0 11,0a5.5,5.5 0 1,0 -11,0Z",  # circle
    "M-5.5,0a5.5,5.5 0 1,0 11,0a5.5,5.5 0 1,0 -11,0Z",
    "M-5,-5H5V5H-5Z",  # square
    "M0,-7L7,0L0,7L-7,0Z",  # diamond
    "M0,-7L6.5,5H-6.5Z",  # triangle
    "M0,7L6.5,-5H-6.5Z",
)
_ROW_HEIGHT = 30
_PLOT_HEIGHT = 340


def dumbbells(measurement: Measurement) -> str:
    """One line per row from the first model's value to the others', with their intervals as bands."""
    low, high = _range(measurement)
    ticks = _ticks(low, high)
    reference = measurement.reference
    place = _Scale(low, high)
    rows = "".join(_strip(row, measurement, place, ticks) for row in measurement.rows)
    head = ""
    if reference is not None:
        at = place(reference[0])
        anchor = "start" if at < 25 else "end" if at > 75 else "middle"
        head = (
            '<div class="strip head"><span></span><svg height="18" aria-hidden="true">'
            f'<text class="reference" x="{at:.2f}%" y="13" text-anchor="{anchor}">{escape(reference[1])}</text></svg>'
            "<span></span></div>"
        )
    labels = "".join(
        f'<text x="{place(tick):.2f}%" y="14" text-anchor="middle">{escape(_tick_text(tick, measurement.unit))}</text>'
        for tick in ticks
    )
    axis = f'<div class="strip axis"><span></span><svg height="20" aria-hidden="true">{labels}</svg><span></span></div>'
    name = f"{measurement.title}, {measurement.unit.name}: the table below has the numbers"
    return f'<div class="chart" role="img" aria-label="{escape(name)}">{head}{rows}{axis}</div>'


def legend(models: Sequence[str]) -> str:
    """The marks' names; nothing for a single model."""
    if len(models) < 2:
        return ""
    items = "".join(
        f'<li><svg width="16" height="16" aria-hidden="true">{mark("8", "8", n)}</svg>{escape(name)}</li>'
        for n, name in enumerate(models)
    )
    return f'<ul class="legend">{items}</ul>'


def mark(x: str, y: str, model: int) -> str:
    """A model's mark; the first is hollow, as what is before in every picture of the project."""
    hollow = " hollow" if model == 0 else ""
    shape = f'<path class="mark s{model % SERIES}{hollow}" d="{_MARKS[model % SERIES]}"/>'
    return f'<svg x="{x}" y="{y}" width="1" height="1" overflow="visible">{shape}</svg>'


def scatter(
    series: Sequence[tuple[str, Sequence[tuple[str, float, float]], Correlation]],
    x_unit: Unit,
    y_unit: Unit,
    models: Sequence[str],
) -> str:
    """Languages by two numbers, a mark per model, with the least-squares line of each.

    Args:
        series: ``(model, [(language code, x, y)], correlation)``.
        x_unit: Unit of the horizontal axis.
        y_unit: Unit of the vertical one, a share.
        models: All models of the page, for their colours.
    """
    xs = [x for _, points, _ in series for _, x, _ in points]
    margin = 0.12 * ((max(xs) - min(xs)) or 1.0)
    across, up = _Scale(min(xs) - margin, max(xs) + margin, 0, 100), _Scale(0.0, 1.0, 90, 5)
    parts = [_grid(across, up, x_unit, y_unit, (min(xs) - margin, max(xs) + margin))]
    for name, points, found in series:
        n = models.index(name)
        parts.append(_fit_line(points, across, up, n) if found.pearson is not None else "")
    places = [(f"{across(x):.2f}%", f"{up(y):.2f}%") for _, points, _ in series for _, x, y in points]
    labels = _label_places([(across(x), up(y)) for _, points, _ in series for _, x, y in points])
    marked = [(n, point) for n, (_, points, _) in enumerate(series) for point in points]
    for (n, (language, x, y)), (left, top), (dx, dy, anchor) in zip(marked, places, labels, strict=True):
        name = series[n][0]
        title = f"{shown_language(language)}, {name}: {x_unit.write(x)}, {y_unit.write(y)}"
        parts.append(
            f"<g><title>{escape(title)}</title>{mark(left, top, models.index(name))}"
            f'<text class="point" x="{left}" y="{top}" dx="{dx}" dy="{dy}" text-anchor="{anchor}">'
            f"{escape(language)}</text></g>"
        )
    return (
        f'<div class="chart plot" role="img" aria-label="Attack success against reward gap, one point per language">'
        f'<svg height="{_PLOT_HEIGHT}">{"".join(parts)}</svg></div>'
    )


class _Scale:
    """From numbers to per cent."""

    def __init__(self, low: float, high: float, start: float = 3, end: float = 97) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


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
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Four to six round numbers."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float, unit: Unit) -> str:
    shown = value * unit.scale
    digits = 0 if abs(shown - round(shown)) < 1e-9 else 1 if abs(10 * shown - round(10 * shown)) < 1e-9 else 2
    return number(shown, digits, unit.signed)


def _strip(row: Row, measurement: Measurement, place: _Scale, ticks: Sequence[float]) -> str:
    middle = _ROW_HEIGHT / 2
    lines = "".join(
        f'<line class="grid" x1="{place(t):.2f}%" x2="{place(t):.2f}%" y1="0" y2="{_ROW_HEIGHT}"/>'
        for t in ticks
    )
    if measurement.reference is not None:
        at = place(measurement.reference[0])
        lines += f'<line class="reference" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="{_ROW_HEIGHT}"/>'
    shown = [(n, cell) for n, cell in enumerate(row.cells) if cell is not None]
    bands = "".join(_band(cell, place, middle + _offset(n, len(row.cells)), n) for n, cell in shown)
    ends = [place(cell.value.value) for _, cell in shown]
    way = (
        f'<line class="way" x1="{min(ends):.2f}%" x2="{max(ends):.2f}%" y1="{middle}" y2="{middle}"/>'
        if ends
        else ""
    )
    marks = "".join(mark(f"{place(cell.value.value):.2f}%", f"{middle}", n) for n, cell in shown)
    values = " \N{RIGHTWARDS ARROW} ".join(
        "\N{EN DASH}"
        if cell is None
        else measurement.unit.write(cell.value.value).split("\N{NO-BREAK SPACE}")[0]
        for cell in (row.cells if len(row.cells) < 3 else (row.cells[0], row.cells[-1]))
    )
    total = " total" if row.is_average else ""
    return (
        f'<div class="strip{total}"><span class="name">{escape(row.label)}</span>'
        f'<svg height="{_ROW_HEIGHT}" aria-hidden="true">{lines}{bands}{way}{marks}</svg>'
        f'<span class="values">{escape(values)}</span></div>'
    )


def _offset(model: int, models: int) -> float:
    """Bands of several models lie beside each other, so that none hides another."""
    return 0.0 if models == 1 else 9 * (model - (models - 1) / 2) / (models - 1)


def _band(cell: Cell, place: _Scale, y: float, model: int) -> str:
    low, high = cell.value.low, cell.value.high
    if low is None or high is None:
        return ""
    return f'<line class="band s{model % SERIES}" x1="{place(low):.2f}%" x2="{place(high):.2f}%" y1="{y}" y2="{y}"/>'


def _grid(across: _Scale, up: _Scale, x_unit: Unit, y_unit: Unit, x_range: tuple[float, float]) -> str:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = f"{up(tick):.2f}%"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="0" y="{y}" dy="-3">{escape(_tick_text(tick, y_unit))}</text>')
    inside = [t for t in _ticks(*x_range) if 6 < across(t) < 94]
    for tick in inside:
        x = f"{across(tick):.2f}%"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="5%" y2="90%"/>')
        parts.append(
            f'<text x="{x}" y="90%" dy="15" text-anchor="middle">{escape(_tick_text(tick, x_unit))}</text>'
        )
    parts.append(
        f'<text class="axis-name" x="100%" y="90%" dy="31" text-anchor="end">Reward gap ({escape(x_unit.name)})</text>'
    )
    parts.append(
        f'<text class="axis-name" x="0" y="5%" dy="-24">Attack success ({escape(y_unit.name)})</text>'
    )
    return "".join(parts)


_LABEL_PLACES = ((10, 4, "start"), (-10, 4, "end"), (0, -10, "middle"), (0, 19, "middle"))


def _label_places(points: Sequence[tuple[float, float]]) -> list[tuple[int, int, str]]:
    """Beside, above or below each point, wherever it meets neither a point nor an earlier label, at the usual width.

    Args:
        points: Places in per cent of width and height.
    """
    taken = [(6.0 * x - 7, _PLOT_HEIGHT * y / 100 - 7, 14.0, 14.0) for x, y in points]
    out = []
    for x, y in points:
        boxes = {
            place: (
                6.0 * x + place[0] - {"start": 0, "end": 20, "middle": 10}[place[2]],
                _PLOT_HEIGHT * y / 100 + place[1] - 11,
                20.0,
                14.0,
            )
            for place in _LABEL_PLACES
        }
        clashes = {place: sum(_overlap(box, other) for other in taken) for place, box in boxes.items()}
        best = min(_LABEL_PLACES, key=lambda place: clashes[place])
        taken.append(boxes[best])
        out.append(best)
    return out


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _fit_line(points: Sequence[tuple[str, float, float]], across: _Scale, up: _Scale, model: int) -> str:
    """The least-squares line over the points' own range."""
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / math.fsum(
        (x - mean_x) ** 2 for x in xs
    )
    ends = [(x, mean_y + slope * (x - mean_x)) for x in (min(xs), max(xs))]
    (x1, y1), (x2, y2) = ends
    return (
        f'<line class="fit s{model % SERIES}" x1="{across(x1):.2f}%" y1="{up(y1):.2f}%" x2="{across(x2):.2f}%"'
        f' y2="{up(y2):.2f}%"/>'
    )
