"""One measurement as the cells of the page's table and as a sentence, and several as the Markdown table of a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mpo.common.tables import escape_markdown
from mpo.common.words import ARROW, listed
from mpo.report.measurement import NONE, Measurement, Row, p_text


class Shown(NamedTuple):
    """A cell: its text, the interval behind it, and ``"better"``, ``"worse"`` or ``"moved"`` for a clear change."""

    text: str
    interval: str = ""
    verdict: str = ""


def header(measurement: Measurement) -> list[str]:
    """Headings of the page's table, that of the languages or tasks first; those of the rows' detail are not among them."""
    percent = f"[{100 * measurement.confidence:g}\N{NO-BREAK SPACE}%]"
    first = "Task" if measurement.anchor.startswith("utility") else "Language"
    heads = [first, "n", f"{measurement.models[0]} {percent}"]
    for model in measurement.models[1:]:
        heads += [f"{model} {percent}", f"Change {percent}", *(["p"] if measurement.is_tested else [])]
    return heads


def cells(row: Row, measurement: Measurement, is_tested: bool) -> list[Shown]:
    """A row behind its label: a cell per model, with its paired change from the first and the p-value of that."""
    unit = measurement.unit
    out = [Shown(str(row.count))]
    for n, cell in enumerate(row.cells):
        value = cell.value if cell is not None else None
        change = cell.change if cell is not None else None
        out.append(
            Shown(NONE)
            if value is None
            else Shown(bare(unit.write(value.value)), unit.write_interval(value.low, value.high))
        )
        if n:
            out.append(
                Shown(NONE)
                if change is None
                else Shown(
                    unit.write_change(change.change),
                    unit.write_change_interval(change.low, change.high),
                    measurement.verdict(change, row) or "",
                )
            )
            out += [Shown(p_text(None if change is None else change.p_value))] if is_tested else []
    return out


def bare(text: str) -> str:
    """Without the unit, which is in the heading."""
    return text.split("\N{NO-BREAK SPACE}")[0]


def markdown_table(measurements: Sequence[Measurement]) -> str:
    """All measurements in one GitHub-flavoured Markdown table. Clear changes are in bold."""
    first, *others = measurements[0].models
    head = ["Measurement", "Language or task", "n", first]
    for model in others:
        head += [model, f"Change of {model}" if len(others) > 1 else "Change", "p"]
    lines = [[escape_markdown(text) for text in head], [":--", ":--", *["--:"] * (len(head) - 2)]]
    for measurement in measurements:
        for number, row in enumerate(measurement.rows):
            name, label = (
                escape_markdown(measurement.short if number == 0 else ""),
                escape_markdown(row.label),
            )
            shown = [_markdown(cell) for cell in cells(row, measurement, True)]
            lines.append([name, f"*{label}*" if row.is_average else label, *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(cell: Shown) -> str:
    text = f"**{cell.text}**" if cell.verdict else cell.text
    return f"{text} {cell.interval}".strip().replace("[", "\\[").replace("]", "\\]")


def finding(measurement: Measurement, model: int) -> str | None:
    """What a measurement says of a model against the first one, in plain words; None where nothing was compared."""
    unit = measurement.unit
    better, worse = (1, -1) if measurement.better == "higher" else (-1, 1)
    parts = []
    row = headline(measurement)
    cell, base = (row.cells[model], row.cells[0]) if row is not None else (None, None)
    if row is not None and cell is not None and cell.change is not None and base is not None:
        over = f"the mean of {measurement.averaged} languages" if row.is_average else row.label
        change = unit.write_change(cell.change.change)
        ends = unit.write_change_interval(cell.change.low, cell.change.high)
        p_value = cell.change.p_value
        p = "" if p_value is None else ", p below 0.001" if p_value < 0.001 else f", p = {p_value:.3f}"
        parts.append(
            f"{unit.write(base.value.value)} {ARROW} {unit.write(cell.value.value)} on {over} "
            f"(change {f'{change} {ends}'.strip()}{p})"
        )
    for direction, words in (
        (better, "clearly better in"),
        (worse, "clearly worse in"),
        (0, "no clear change in"),
    ):
        names = measurement.moved(model, direction)
        if names and len(measurement.rows) > 1:
            parts.append(f"{words} {listed(names)}")
    for source in measurement.rows:
        held = source.cells[model] if source.is_source else None
        if held is not None and held.change is not None and measurement.verdict(held.change, source):
            moved = (
                f"{unit.write_change(held.change.change)} "
                f"{unit.write_change_interval(held.change.low, held.change.high)}"
            )
            parts.append(f"{source.label}, which was to stay, moved by {moved.rstrip()}")
    return f"{measurement.title}, {measurement.models[model]}: {'; '.join(parts)}." if parts else None


def headline(measurement: Measurement) -> Row | None:
    """The row that stands for all: the mean over languages, or the only row."""
    return measurement.average or (measurement.rows[0] if len(measurement.rows) == 1 else None)
