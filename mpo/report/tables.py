"""One measurement as an HTML table, and several as the Markdown table of a paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from mpo.common.tables import escape_markdown
from mpo.report.measurement import NONE, Cell, Change, Measurement, Row, Unit, listed, p_text


def html_table(measurement: Measurement) -> str:
    """The numbers of a measurement: a column per model, and its paired change from the first."""
    models = measurement.models
    percent = f"{100 * measurement.confidence:g}\N{NO-BREAK SPACE}%"
    heads = ['<th scope="col">n</th>']
    for n, model in enumerate(models):
        heads.append(f'<th scope="col">{escape(model)} [{percent}]</th>')
        if n:
            heads.append(f'<th scope="col">Change [{percent}]</th>')
            heads += ['<th scope="col">p</th>'] if measurement.is_tested else []
    heads += [f'<th scope="col">{escape(name)},&nbsp;%</th>' for name in measurement.detail]
    body = "".join(_html_row(row, measurement) for row in measurement.rows)
    first = "Task" if measurement.anchor.startswith("utility") else "Language"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(measurement.title)}, numbers"><table>'
        f'<thead><tr><th scope="col">{first}</th>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _html_row(row: Row, measurement: Measurement) -> str:
    cells = [f"<td>{row.count}</td>"]
    for n, cell in enumerate(row.cells):
        cells.append(f"<td>{_html_value(cell, measurement.unit)}</td>")
        if n:
            cells.append(_html_change(cell.change if cell else None, measurement))
    cells += [f"<td>{escape(text)}</td>" for text in row.detail]
    total = ' class="total"' if row.is_average else ""
    return f'<tr{total}><th scope="row">{escape(row.label)}</th>{"".join(cells)}</tr>'


def _html_value(cell: Cell | None, unit: Unit) -> str:
    if cell is None:
        return NONE
    ends = unit.write_interval(cell.value.low, cell.value.high)
    return f"{escape(_bare(unit.write(cell.value.value)))}{_html_interval(ends)}"


def _html_change(change: Change | None, measurement: Measurement) -> str:
    tested = measurement.is_tested
    if change is None:
        return f"<td>{NONE}</td>" * (2 if tested else 1)
    verdict = measurement.verdict(change)
    kind = f' class="clear {verdict}"' if verdict else ""
    ends = measurement.unit.write_change_interval(change.low, change.high)
    text = escape(measurement.unit.write_change(change.change))
    p_value = f"<td>{escape(p_text(change.p_value))}</td>" if tested else ""
    return f"<td{kind}>{text}{_html_interval(ends)}</td>{p_value}"


def _html_interval(ends: str) -> str:
    return f' <span class="ci">{escape(ends)}</span>' if ends else ""


def _bare(text: str) -> str:
    """Without the unit, which is in the heading."""
    return text.split("\N{NO-BREAK SPACE}")[0]


def markdown_table(measurements: Sequence[Measurement]) -> str:
    """All measurements in one GitHub-flavoured Markdown table. Clear changes are in bold."""
    models = measurements[0].models
    head = ["Measurement", "Language or task", "n"]
    for n, model in enumerate(models):
        head.append(model)
        if n:
            head += [f"Change of {model}" if len(models) > 2 else "Change", "p"]
    lines = [_line(escape_markdown(text) for text in head), "| :-- | :-- |" + " --: |" * (len(head) - 2)]
    for measurement in measurements:
        for number, row in enumerate(measurement.rows):
            name = measurement.short if number == 0 else ""
            lines.append(_line([escape_markdown(name), *_markdown_row(row, measurement)]))
    return "\n".join(lines)


def _markdown_row(row: Row, measurement: Measurement) -> list[str]:
    unit = measurement.unit
    label = escape_markdown(row.label)
    out = [f"*{label}*" if row.is_average else label, str(row.count)]
    for n, cell in enumerate(row.cells):
        out.append(NONE if cell is None else _markdown_value(cell, unit))
        if n:
            change = None if cell is None else cell.change
            out += (
                [NONE, NONE]
                if change is None
                else [_markdown_change(change, measurement), p_text(change.p_value)]
            )
    return [
        text.replace("[", "\\[").replace("]", "\\]") if number > 1 else text
        for number, text in enumerate(out)
    ]


def _markdown_value(cell: Cell, unit: Unit) -> str:
    return f"{_bare(unit.write(cell.value.value))} {unit.write_interval(cell.value.low, cell.value.high)}".strip()


def _markdown_change(change: Change, measurement: Measurement) -> str:
    text = measurement.unit.write_change(change.change)
    if measurement.verdict(change):
        text = f"**{text}**"
    return f"{text} {measurement.unit.write_change_interval(change.low, change.high)}".strip()


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def finding(measurement: Measurement, model: int) -> str | None:
    """What a measurement says of a model against the first one, in plain words; None where nothing was compared."""
    name, unit = measurement.title, measurement.unit
    better, worse = (1, -1) if measurement.better == "higher" else (-1, 1)
    parts = []
    row = measurement.average or (measurement.rows[0] if len(measurement.rows) == 1 else None)
    cell, base = (row.cells[model], row.cells[0]) if row is not None else (None, None)
    if row is not None and cell is not None and cell.change is not None and base is not None:
        over = f" on {'the mean of ' if row.is_average else ''}{_over(measurement, row)}"
        ends = unit.write_change_interval(cell.change.low, cell.change.high)
        p = "" if cell.change.p_value is None else f", p {_p_words(cell.change.p_value)}"
        parts.append(
            f"{unit.write(base.value.value)} \N{RIGHTWARDS ARROW} {unit.write(cell.value.value)}{over} (change "
            f"{unit.write_change(cell.change.change)} {ends}{p})".replace(" )", ")")
        )
    for direction, words in (
        (better, "clearly better in"),
        (worse, "clearly worse in"),
        (0, "no clear change in"),
    ):
        names = measurement.moved(model, direction)
        if names and len(measurement.rows) > 1:
            parts.append(f"{words} {listed(names)}")
    return f"{name}, {measurement.models[model]}: {'; '.join(parts)}." if parts else None


def _over(measurement: Measurement, row: Row) -> str:
    return f"{measurement.averaged} languages" if row.is_average else row.label


def _p_words(p_value: float) -> str:
    return "below 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
