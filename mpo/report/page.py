"""``mpo report``: a result folder as one HTML page that needs nothing else, and as one Markdown table."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path

import mpo
from mpo.common.files import write_text
from mpo.common.redaction import redact, redact_text
from mpo.common.statistics import Coefficient
from mpo.common.tables import escape_markdown
from mpo.errors import DataError, StorageError
from mpo.report import charts
from mpo.report.build import GapAgainstAttack, gap_against_attack, measurements
from mpo.report.examples import examples_section
from mpo.report.folder import Results, read_results
from mpo.report.hidden_space import hidden_space_section
from mpo.report.measurement import GAP, NONE, SHARE, Measurement, Row, listed, number, p_text
from mpo.report.sections import Section
from mpo.report.tables import finding, html_table, markdown_table

PAGE = "report.html"
TABLE = "report.md"

_MORE_SECTIONS: tuple[Callable[[Path], Section | None], ...] = (hidden_space_section,)
"""Sections that other parts of the package make from a result folder."""

_READING = (
    "A clear change is one whose interval leaves zero out and whose test, adjusted for the number of languages, rejects. "
    "Anything else is not evidence of no change: with few prompts only large changes are clear.",
    "Attack success is only as good as its judge. Judges err more often in languages they know less well; compare with "
    "a second judge, and read some answers.",
    "Fewer unsafe answers may be more refusals, or more babble: look at the invalid answers, at the refusals of harmless "
    "prompts and at utility before calling a model safer.",
    "Prompts are translations of each other. The mean over languages treats a prompt with its translations as one.",
    "A benchmark's prompts are known attacks of one turn. A model that passes is not safe against others.",
)


def write_report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    models: Sequence[str] | None = None,
    title: str = "Safety in every language",
    examples: int = 2,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``.

    The page is one file: no scripts, no fonts, no pictures from elsewhere, and a policy that forbids a browser to fetch
    any. Texts of models and data are escaped and folded away.

    Args:
        folder: Result folder; see :mod:`mpo.report.folder`.
        out: Folder of the two files; by default the result folder.
        models: Names of the models to show, the one to compare with first; by default all.
        title: Heading of the page.
        examples: Prompts with their answers per language and prompt set; 0 for a page without them.

    Returns:
        The paths of the page and of the table.

    Raises:
        ConfigError: A model that was asked for is not there.
        DataError: The folder holds no measurement at all; one of them is enough.
        StorageError: Every file is damaged, or the two cannot be written. What is damaged beside others is left out,
            and both files and standard error say so.
    """
    results = read_results(folder, models)
    found = measurements(results)
    left_out = results.left_out
    more = [s for make in _MORE_SECTIONS if (s := left_out.unless(make, results.folder)) is not None]
    if not found and not more and left_out:
        raise StorageError(f"{folder} holds nothing that can be reported. {' '.join(left_out)}")
    if not found and not more:
        raise DataError(
            f"{folder} holds no number to report. Run a measurement of `mpo evaluate` on it first."
        )
    sections = [
        *(measurement_section(m) for m in found if not m.anchor.startswith(("utility", "perplexity"))),
        *_correlation_sections(results),
        *more,
        *(measurement_section(m) for m in found if m.anchor.startswith(("utility", "perplexity"))),
        *([_reading_section()] if found else []),
        *([section] if (section := examples_section(results, examples)) else []),
        *([_provenance_section(results)] if results.models else []),
    ]
    if left_out:
        sections.insert(0, _left_out_section(left_out))
    for text in left_out:
        print(f"Left out: {text}", file=sys.stderr)
    target = Path(out) if out is not None else results.folder
    page = _page(results, found, sections, title)
    markdown = _markdown(results, found, sections, title)
    return write_text(target / PAGE, page), write_text(target / TABLE, markdown)


def measurement_section(measurement: Measurement) -> Section:
    """Chart, table and notes of a measurement."""
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in measurement.warnings)
    notes = "".join(f'<p class="faint small">{escape(redact_text(text))}</p>' for text in measurement.notes)
    html = (
        f"<p>{escape(measurement.lead)}</p>{warnings}{charts.legend(measurement.models)}"
        f"{charts.dumbbells(measurement)}{html_table(measurement)}{notes}"
    )
    return Section(measurement.anchor, measurement.title, html, "")


# ------------------------------------------------------------------------------------------------------------ the page


def _page(results: Results, found: Sequence[Measurement], sections: Sequence[Section], title: str) -> str:
    style = resources.files("mpo.report").joinpath("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{escape(s.anchor)}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{escape(s.anchor)}"><h2>{escape(s.title)}</h2>{s.html}</section>' for s in sections
    )
    names = " against ".join(f"<b>{escape(model.name)}</b>" for model in reversed(results.models[:2]))
    others = f" and {len(results.models) - 2} more" if len(results.models) > 2 else ""
    about = f"{names}{others}. " if names else ""
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta name="robots" content="noindex">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="faint">{about}Made on {made} with mpo {escape(mpo.__version__)}.</p>
{_tiles(found)}
{_findings(found)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>This page is complete in itself: it loads nothing and runs no script.</p></footer>
</body>
</html>
"""


def _tiles(found: Sequence[Measurement]) -> str:
    tiles = "".join(_tile(measurement) for measurement in found)
    return f'<ul class="tiles">{tiles}</ul>' if tiles else ""


def _tile(measurement: Measurement) -> str:
    """The one number of a measurement: of the first two models, or of the only one."""
    row = measurement.average or (measurement.rows[0] if len(measurement.rows) == 1 else None)
    what = f'<div class="what">{escape(measurement.title)}</div>'
    if row is None:
        return _tile_of_counts(measurement, what)
    cells = row.cells[:2]
    unit = measurement.unit
    values = " \N{RIGHTWARDS ARROW} ".join(
        NONE if cell is None else unit.write(cell.value.value).split("\N{NO-BREAK SPACE}")[0]
        for cell in cells
    )
    last = cells[-1]
    change = last.change if last is not None else None
    kind = measurement.verdict(change) or ""
    if change is not None:
        how = f"<b>{escape(unit.write_change(change.change))}</b> " + escape(
            unit.write_change_interval(change.low, change.high)
        )
        how += {"better": ", better", "worse": ", worse", "": ", not clear"}[kind]
    else:
        how = "" if last is None else escape(unit.write_interval(last.value.low, last.value.high))
    shown_unit = "%" if unit is SHARE else "" if unit.name in ("score", "perplexity") else unit.name
    return (
        f'<li class="tile {kind}">{what}<div class="from-to">{escape(values)} '
        f'<span class="unit">{escape(shown_unit)}</span></div><div class="how">{how}, {escape(_over(measurement, row))}</div>'
        "</li>"
    )


def _tile_of_counts(measurement: Measurement, what: str) -> str:
    number_of_rows = len(measurement.rows)
    things = "tasks" if measurement.anchor.startswith("utility") else "languages"
    if len(measurement.models) < 2:
        return f'<li class="tile">{what}<div class="from-to">{number_of_rows} <span class="unit">{things}</span></div></li>'
    up, down, same = (len(measurement.moved(1, direction)) for direction in (1, -1, 0))
    if not up + down + same:
        return (
            f'<li class="tile">{what}<div class="from-to">{number_of_rows} <span class="unit">{things}</span></div>'
            '<div class="how">not compared</div></li>'
        )
    better, worse = (up, down) if measurement.better == "higher" else (down, up)
    kind = "worse" if worse else "better" if better else ""
    return (
        f'<li class="tile {kind}">{what}<div class="from-to">{worse} <span class="unit">of {number_of_rows} {things} '
        f'clearly worse</span></div><div class="how">{better} clearly better, {same} without a clear change</div></li>'
    )


def _over(measurement: Measurement, row: Row) -> str:
    return f"{row.label.lower()} ({measurement.averaged})" if row.is_average else row.label


def _findings(found: Sequence[Measurement]) -> str:
    texts = [
        text
        for measurement in found
        for model in range(1, len(measurement.models))
        if (text := finding(measurement, model)) is not None
    ]
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<details><summary>In words</summary><ul class="findings">{items}</ul></details>' if items else ""


# ------------------------------------------------------------------------------------------------------ other sections


def _correlation_sections(results: Results) -> list[Section]:
    out = []
    for prompt_set in results.prompt_sets("attack"):
        series = gap_against_attack(results, prompt_set)
        if series:
            out.append(_correlation_section(results, prompt_set, series))
    return out


def _correlation_section(results: Results, prompt_set: str, series: Sequence[GapAgainstAttack]) -> Section:
    names = [model.name for model in results.models]
    rows = "".join(
        f'<tr><th scope="row">{escape(model)}</th><td>{found.count}</td>'
        + "".join(
            f"<td>{_html_coefficient(c)}</td><td>{p_text(c.p_value) if c else NONE}</td>"
            for c in (found.pearson, found.spearman)
        )
        + "</tr>"
        for model, _, found in series
    )
    html = (
        "<p>MPO rests on one observation: across languages, the smaller the gap between the safe and the unsafe answer, "
        "the more often an attack succeeds. Here it is for these models; a negative correlation is what it predicts. "
        "With this few languages the intervals are rough, and a correlation is no cause.</p>"
        f"{charts.legend(names)}{charts.scatter(series, GAP, SHARE, names)}"
        '<div class="scroll" tabindex="0" role="region" aria-label="Correlation, numbers"><table><thead><tr>'
        '<th scope="col">Model</th><th scope="col">Languages</th><th scope="col">Pearson r [95\N{NO-BREAK SPACE}%]</th>'
        '<th scope="col">p</th><th scope="col">Spearman \N{GREEK SMALL LETTER RHO} [95\N{NO-BREAK SPACE}%]</th>'
        f'<th scope="col">p</th></tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="faint small">Intervals: bootstrap over languages. p-values: permutation test.</p>'
    )
    markdown = "\n".join(
        f"Reward gap and attack success on {escape_markdown(prompt_set)} over {found.count} languages, "
        f"{escape_markdown(model)}: Pearson {_text_coefficient(found.pearson)}; Spearman {_text_coefficient(found.spearman)}."
        for model, _, found in series
    )
    anchor = f"correlation-{results.prompt_sets('attack').index(prompt_set) + 1}"
    return Section(anchor, f"Reward gap and attack success: {prompt_set}", html, markdown)


def _html_coefficient(value: Coefficient | None) -> str:
    if value is None:
        return NONE
    ends = (
        f' <span class="ci">[{number(value.low, 2)}, {number(value.high, 2)}]</span>'
        if value.low is not None and value.high is not None
        else ""
    )
    return f"{number(value.value, 2)}{ends}"


def _text_coefficient(value: Coefficient | None) -> str:
    if value is None:
        return "undefined"
    ends = (
        f" \\[{number(value.low, 2)}, {number(value.high, 2)}\\]"
        if value.low is not None and value.high is not None
        else ""
    )
    return f"{number(value.value, 2)}{ends} (p {p_text(value.p_value)})"


def _left_out_section(left_out: Sequence[str]) -> Section:
    """What the report lacks: files and rows that could not be read."""
    texts = [redact_text(text) for text in left_out]
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return Section(
        "left-out",
        "Left out of this report",
        f'<div class="warning">What follows is without this:<ul>{items}</ul></div>',
        "**Left out of this report:**\n\n" + "\n".join(f"- {escape_markdown(text)}" for text in texts),
    )


def _reading_section() -> Section:
    items = "".join(f"<li>{escape(text)}</li>" for text in _READING)
    return Section("reading", "How to read this page", f'<ul class="findings">{items}</ul>', "")


def _provenance_section(results: Results) -> Section:
    parts = []
    for model in results.models:
        entries: dict[str, str] = {}
        about = redact(dict(model.about))
        for key in ("model", "adapter", "revision"):
            if about.get(key) is not None:
                entries[key.capitalize()] = str(about[key])
        for provenance in model.provenances():
            entries.setdefault("Measured", str(provenance.get("created", "")))
            versions = provenance.get("libraries") or {}
            entries.setdefault(
                "Made with", ", ".join(f"{name} {version}" for name, version in versions.items())
            )
            devices = provenance.get("devices") or {}
            entries.setdefault("Hardware", str(devices.get("accelerators") or devices.get("cpu") or ""))
        rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items() if v)
        parts.append(f"<h3>{escape(model.name)}</h3><dl class='about'>{rows}</dl>")
    return Section(
        "provenance",
        "Where the numbers come from",
        f"<details><summary>Models, versions and hardware</summary>{''.join(parts)}</details>",
        "",
    )


# ------------------------------------------------------------------------------------------------------- the Markdown


def _markdown(results: Results, found: Sequence[Measurement], sections: Sequence[Section], title: str) -> str:
    parts = [f"# {escape_markdown(title)}"]
    if found:
        parts += [markdown_table(found), _brackets(found)]
    if found and len(results.models) > 1:
        parts.append(_how_compared(results.models[0].name))
    return "\n\n".join([*parts, *(s.markdown for s in sections if s.markdown)]) + "\n"


def _brackets(found: Sequence[Measurement]) -> str:
    by_confidence: dict[float, list[str]] = {}
    for measurement in found:
        by_confidence.setdefault(measurement.confidence, []).append(measurement.short)
    first, *others = by_confidence
    percent = f"{100 * first:g} % intervals" + "".join(
        f", {100 * other:g} % for {escape_markdown(listed(by_confidence[other]))}" for other in others
    )
    return f"Brackets: {percent}; Wilson's for rates, bootstrap over prompts for means of languages and reward gaps."


def _how_compared(base: str) -> str:
    return (
        f"Changes are paired against {escape_markdown(base)}, with Tango's interval for rates; clear ones are in bold. p: "
        "McNemar's test, adjusted over languages after Holm; for means of languages a test that exchanges prompts."
    )
