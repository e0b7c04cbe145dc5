"""``mpo report``: a result folder as an HTML page that needs nothing else, one of its answers, and a Markdown table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mpo.common.files import write_text
from mpo.common.redaction import redact, redact_text
from mpo.common.statistics import Coefficient
from mpo.common.tables import escape_markdown
from mpo.common.words import listed, number
from mpo.errors import DataError, StorageError
from mpo.report import answers, charts
from mpo.report.build import gap_against_attack, measurements
from mpo.report.folder import Results, read_results
from mpo.report.hidden_space import hidden_space_section
from mpo.report.judge_quality import judge_section
from mpo.report.measurement import FEWEST, NONE, SHARE, Measurement, p_text
from mpo.report.opening import opening, spread_section
from mpo.report.rendering import Section, html, page
from mpo.report.run import training_section
from mpo.report.tables import Shown, cells, finding, header, headline, markdown_table

EXAMPLES = 40
"""Prompts per language and prompt set on the page of answers, unless another number is asked for."""

PAGE = "report.html"
TABLE = "report.md"


def write_report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    models: Sequence[str] | None = None,
    title: str = "Safety in every language",
    examples: int = EXAMPLES,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``, and prompts with their answers to ``answers.html``.

    A page is one file: no scripts, no fonts, no pictures from elsewhere, and a policy that forbids a browser to fetch
    any. Texts of models and data are escaped, and stand in the page of answers alone, folded away.

    Args:
        folder: Result folder; see :mod:`mpo.report.folder`.
        out: Folder of the files; by default the result folder.
        models: Names of the models to show, the one to compare with first; by default all.
        title: Heading of the page.
        examples: Prompts with their answers per language and prompt set; with 0 there is no page of answers, and one that
            was written before is removed.

    Returns:
        The paths of the report's page and of the table.

    Raises:
        ConfigError: A model that was asked for is not there.
        DataError: The folder holds no measurement at all; one of them is enough.
        StorageError: Every file is damaged, or the two cannot be written. What is damaged beside others is left out,
            and both files and standard error say so.
    """
    results = read_results(folder, models)
    found = measurements(results)
    left_out = results.left_out
    hidden_space = left_out.unless(hidden_space_section, results.folder)
    is_empty = not found and hidden_space is None and results.run is None
    if is_empty and left_out:
        raise StorageError(
            f"{folder} holds nothing that can be reported; measure again what is damaged. {' '.join(left_out)}"
        )
    if is_empty:
        raise DataError(
            f"{folder} holds no number to report. Run a measurement of `mpo evaluate` on it first."
        )
    after = [m for m in found if m.anchor.startswith(("utility", "perplexity", "mt-bench"))]
    sections = [
        spread_section(results),
        *(_measurement_section(m) for m in found if m not in after),
        left_out.unless(judge_section, results.folder),
        *_correlation_sections(results),
        left_out.unless(training_section, results.run, _folders(results)),
        hidden_space,
        *(_measurement_section(m) for m in after),
        Section("reading", "How to read this page", html("reading.html", fewest=FEWEST)) if found else None,
        _provenance_section(results) if results.models else None,
    ]
    shown = [section for section in sections if section is not None]
    first, exchanges = opening(results), answers.collect(results, examples)
    if left_out:
        shown.insert(0, _left_out_section(left_out))
    for text in left_out:
        print(f"Left out: {text}", file=sys.stderr)
    target = Path(out) if out is not None else results.folder
    link = None if exchanges is None else answers.PAGE
    shown_page = _page(results, found, first, shown, title, link)
    markdown = _markdown(results, found, [first, *shown], title)
    if exchanges is not None:
        write_text(target / answers.PAGE, _answers_page(results, exchanges, title))
    written = write_text(target / PAGE, shown_page), write_text(target / TABLE, markdown)
    if examples <= 0:
        (target / answers.PAGE).unlink(missing_ok=True)
    return written


def _folders(results: Results) -> dict[str, Path]:
    """Of the models; a run, and a model whose files lie directly there, are the folder itself."""
    root = results.folder
    places = {model.name: root / model.name for model in results.models}
    return {root.resolve().name: root, **{name: path for name, path in places.items() if path.is_dir()}}


def _measurement_section(measurement: Measurement) -> Section:
    """Chart, table and notes of a measurement."""
    rows = [
        (
            row.label,
            row.is_average,
            [*cells(row, measurement, measurement.is_tested), *map(Shown, row.detail)],
        )
        for row in measurement.rows
    ]
    body = html(
        "measurement.html",
        measurement=measurement,
        scale=charts.scale(measurement),
        from_to=charts.from_to,
        header=header(measurement),
        rows=rows,
    )
    return Section(measurement.anchor, measurement.title, body)


# ------------------------------------------------------------------------------------------------------------ the page


def _page(
    results: Results,
    found: Sequence[Measurement],
    first: Section,
    sections: Sequence[Section],
    title: str,
    answers_page: str | None,
) -> str:
    findings = [finding(m, model) for m in found for model in range(1, len(m.models))]
    return page(
        "page.html",
        title,
        models=[model.name for model in results.models],
        opening=first.html,
        tiles=[_tile(measurement) for measurement in found],
        findings=[text for text in findings if text is not None],
        sections=sections,
        answers_page=answers_page,
    )


def _answers_page(results: Results, exchanges: answers.Answers, title: str) -> str:
    return page(
        "answers_page.html",
        f"Prompts and answers: {title}",
        rules=exchanges.rules(),
        models=[model.name for model in results.models],
        report_page=PAGE,
        body=answers.answers_html(exchanges),
    )


class _Tile(NamedTuple):
    """The one number of a measurement, large, with a unit behind it and a line below."""

    what: str
    number: str
    unit: str
    how: str = ""
    strong: str = ""
    kind: str = ""


def _tile(measurement: Measurement) -> _Tile:
    """Of the first two models, or of the only one; where there is no mean, how many rows changed clearly."""
    row = headline(measurement)
    if row is None:
        return _counts(measurement)
    unit = measurement.unit
    last = row.cells[:2][-1]
    change = last.change if last is not None else None
    kind = measurement.verdict(change) or ""
    strong = how = ""
    if change is not None:
        strong = unit.write_change(change.change)
        how = f"{unit.write_change_interval(change.low, change.high)}, {kind or 'not clear'}"
    elif last is not None:
        how = unit.write_interval(last.value.low, last.value.high)
    over = f"{row.label.lower()} ({measurement.averaged})" if row.is_average else row.label
    name = "%" if unit is SHARE else "" if unit.name in ("score", "perplexity") else unit.name
    values = charts.from_to(row.cells[:2], unit)
    return _Tile(measurement.title, values, name, f"{how}, {over}", strong, kind)


def _counts(measurement: Measurement) -> _Tile:
    title, rows = measurement.title, len(measurement.rows)
    things = "tasks" if measurement.anchor.startswith("utility") else "languages"
    if len(measurement.models) < 2:
        return _Tile(title, str(rows), things)
    up, down, same = (len(measurement.moved(1, direction)) for direction in (1, -1, 0))
    if not up + down + same:
        return _Tile(title, str(rows), things, "not compared")
    better, worse = (up, down) if measurement.better == "higher" else (down, up)
    how = f"{better} clearly better, {same} without a clear change"
    kind = "worse" if worse else "better" if better else ""
    return _Tile(title, str(worse), f"of {rows} {things} clearly worse", how, kind=kind)


# ------------------------------------------------------------------------------------------------------ other sections


def _correlation_sections(results: Results) -> list[Section]:
    names = [model.name for model in results.models]
    out = []
    for n, prompt_set in enumerate(results.prompt_sets("attack"), start=1):
        series = gap_against_attack(results, prompt_set)
        if not series:
            continue
        rows = [
            (
                model,
                False,
                [Shown(str(found.count)), *_coefficient(found.pearson), *_coefficient(found.spearman)],
            )
            for model, _, found in series
        ]
        body = html("correlation.html", models=names, chart=charts.scatter(series, names), rows=rows)
        markdown = "\n".join(
            f"Reward gap and attack success on {escape_markdown(prompt_set)} over {found.count} languages, "
            f"{escape_markdown(model)}: Pearson {_in_words(found.pearson)}; Spearman {_in_words(found.spearman)}."
            for model, _, found in series
        )
        out.append(
            Section(f"correlation-{n}", f"Reward gap and attack success: {prompt_set}", body, markdown)
        )
    return out


def _coefficient(value: Coefficient | None) -> list[Shown]:
    """A coefficient with its interval, and its p-value."""
    if value is None:
        return [Shown(NONE), Shown(NONE)]
    low, high = value.low, value.high
    ends = f"[{number(low, 2)}, {number(high, 2)}]" if low is not None and high is not None else ""
    return [Shown(number(value.value, 2), ends), Shown(p_text(value.p_value))]


def _in_words(value: Coefficient | None) -> str:
    if value is None:
        return "undefined"
    shown, p_value = _coefficient(value)
    ends = shown.interval.replace("[", " \\[").replace("]", "\\]")
    return f"{shown.text}{ends} (p {p_value.text})"


def _left_out_section(left_out: Sequence[str]) -> Section:
    """What the report lacks: files and rows that could not be read."""
    texts = [redact_text(text) for text in left_out]
    lines = "\n".join(f"- {escape_markdown(text)}" for text in texts)
    return Section(
        "left-out",
        "Left out of this report",
        html("left_out.html", texts=texts),
        f"**Left out of this report:**\n\n{lines}",
    )


def _provenance_section(results: Results) -> Section:
    models = []
    for model in results.models:
        entries: dict[str, str] = {}
        about = redact(dict(model.about))
        for key in ("model", "adapter", "revision"):
            if about.get(key) is not None:
                entries[key.capitalize()] = str(about[key])
        for provenance in model.provenances():
            entries.setdefault("Measured", str(provenance.get("created", "")))
            versions = provenance.get("libraries") or {}
            made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
            entries.setdefault("Made with", made_with)
            devices = provenance.get("devices") or {}
            entries.setdefault("Hardware", str(devices.get("accelerators") or devices.get("cpu") or ""))
        models.append((model.name, [(key, value) for key, value in entries.items() if value]))
    return Section("provenance", "Where the numbers come from", html("provenance.html", models=models))


# ------------------------------------------------------------------------------------------------------- the Markdown


def _markdown(results: Results, found: Sequence[Measurement], sections: Sequence[Section], title: str) -> str:
    parts = [f"# {escape_markdown(title)}"]
    if found:
        parts += [markdown_table(found), _brackets(found)]
    if found and len(results.models) > 1:
        parts.append(
            f"Changes are paired against {escape_markdown(results.models[0].name)}, with Tango's interval for rates; clear "
            "ones are in bold. p: McNemar's test, adjusted over languages after Holm; for means of languages a test that "
            "exchanges prompts."
        )
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
