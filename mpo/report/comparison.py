"""The page of ``mpo compare``: the plane with a point per run, and every measure with its two kinds of doubt."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpo.common.files import write_text
from mpo.common.tables import TextTable, escape_markdown, printable_name
from mpo.common.typed_json import read_typed
from mpo.common.words import counted, duration, listed, number, size
from mpo.errors import MPOError
from mpo.evaluation.comparison import (
    ATTACK,
    GAP,
    LANGUAGE,
    LOWER_IS_BETTER,
    MEASURES,
    PERPLEXITY,
    REFUSAL,
    UTILITY,
    ComparisonResult,
    Estimate,
    Point,
    Row,
    Run,
)
from mpo.evaluation.results import LEAKS, LeaksResult
from mpo.report import plane
from mpo.report.measurement import GAP as GAP_UNIT
from mpo.report.measurement import NONE, SHARE, Unit, p_text, shown_language
from mpo.report.measurement import PERPLEXITY as PERPLEXITY_UNIT
from mpo.report.rendering import Section, html, page
from mpo.report.tables import Shown, bare

PAGE, TABLE = "index.html", "compare.md"
MEASURED = "measured"  # folder of the results beside the page

UNITS: dict[str, Unit] = {
    ATTACK: SHARE,
    REFUSAL: SHARE,
    LANGUAGE: SHARE,
    GAP: GAP_UNIT,
    UTILITY: SHARE,
    PERPLEXITY: PERPLEXITY_UNIT,
}
TITLES = {
    ATTACK: "Attack success, %",
    REFUSAL: "Harmless refused, %",
    LANGUAGE: "In language asked, %",
    GAP: "Reward gap",
    UTILITY: "Utility, %",
    PERPLEXITY: "Perplexity",
}

_MOST_BARS = 8  # runs: the bars of more hide their marks
_UNTESTED = (
    "Reward gap and perplexity have no test: bold, they have an interval that leaves zero out and is not adjusted for the number "
    "of settings, and every seed moved the same way."
)
_SHORT = {
    ATTACK: "attack",
    REFUSAL: "refused",
    LANGUAGE: "in language",
    GAP: "gap",
    UTILITY: "utility",
    PERPLEXITY: "perplexity",
}


def write_comparison(
    comparison: ComparisonResult, folder: str | Path, *, details: Path | None = None
) -> tuple[Path, Path]:
    """Write ``index.html`` and ``compare.md``.

    Args:
        comparison: What was measured.
        folder: Where the two go.
        details: A page of every run, to be linked to.

    Raises:
        StorageError: They cannot be written.
    """
    folder = Path(folder)
    link = None if details is None else os.path.relpath(details, folder)
    sections = [
        _plane_section(comparison, link),
        _glance_section(comparison),
        _measures_section(comparison, "Attack success and refusals", "measures", (ATTACK, REFUSAL)),
        _measures_section(
            comparison, "What else has changed", "others", (LANGUAGE, GAP, UTILITY, PERPLEXITY)
        ),
        *_language_sections(comparison),
        _cost_section(comparison),
        _settings_section(comparison),
        _search_section(comparison),
        Section(
            "reading",
            "How to read this page",
            html("comparison_reading.html", several=_seeds(comparison) > 1),
        ),
    ]
    shown = page(
        "comparison.html",
        comparison.title,
        base=comparison.base,
        summary=_summary(comparison),
        failed=[(run.name, run.error) for run in comparison.runs if run.state == "failed"],
        findings=[*_leaks(folder / MEASURED / LEAKS, details is not None), *_findings(comparison)],
        sections=[section for section in sections if section is not None],
        details=link,
    )
    return (
        write_text(folder / PAGE, shown),
        write_text(folder / TABLE, f"# {escape_markdown(comparison.title)}\n\n{_markdown(comparison)}\n"),
    )


# ------------------------------------------------------------------------------------------------------------ in words


def _seeds(comparison: ComparisonResult) -> int:
    return len({run.seed for run in comparison.runs})


def _summary(comparison: ComparisonResult) -> str:
    done = [run for run in comparison.runs if run.state == "done"]
    settings = len({run.setting for run in comparison.runs})
    budget = f" {comparison.budget} each." if comparison.budget else ""
    return (
        f"{counted(settings, 'setting')}, {counted(_seeds(comparison), 'seed')}: {len(done)} of "
        f"{counted(len(comparison.runs), 'run')} measured.{budget}"
    )


def _leaks(file: Path, details: bool) -> list[str]:
    """That measured prompts stand in the training data, one line; nothing where none does or nobody has looked."""
    if not file.is_file():
        return []
    try:
        leaks = read_typed(file, LeaksResult)
    except MPOError:
        return []
    found = [
        f"{len(leaked.found):,} of {leaked.prompts:,} in {name}"
        for name, leaked in leaks.sets.items()
        if leaked.found
    ]
    if not found:
        return []
    data = printable_name(listed(leaks.training), 80)
    without = " The page of every run has the rates without them." if details else ""
    return [
        f"Measured prompts stand in the training data ({data}), which flatters the runs that were trained on it: "
        f"{listed(found)}.{without}"
    ]


def _findings(comparison: ComparisonResult) -> list[str]:
    """What the intervals bear out, one sentence a setting."""
    out = []
    for row in comparison.rows[1:]:
        better: list[str] = []
        worse: list[str] = []
        for measure in (m for m in MEASURES if m in row.measures and m != GAP):
            found = row.measures[measure]
            if found.clear:
                words = f"{TITLES[measure].removesuffix(', %').lower()} {_change(found, measure)}"
                (better if verdict(found, measure) == "better" else worse).append(words)
        if not better and not worse:
            if row.measures:
                out.append(f"{row.name}: nothing that can be told from the base model.")
            continue
        parts = [
            text
            for text in (better and f"better in {listed(better)}", worse and f"worse in {listed(worse)}")
            if text
        ]
        out.append(f"{row.name}: {'; '.join(parts)}.")
    return out


def verdict(found: Estimate, measure: str) -> str:
    """``better`` or ``worse`` where a change is clear, else nothing."""
    if not found.clear:
        return ""
    return "better" if (found.clear < 0) == (measure in LOWER_IS_BETTER) else "worse"


def _value(found: Estimate, measure: str) -> str:
    return bare(UNITS[measure].write(found.value))


def _change(found: Estimate, measure: str) -> str:
    return UNITS[measure].write_change(found.change)


def _interval(found: Estimate, measure: str) -> str:
    return "" if found.interval is None else UNITS[measure].write_interval(*found.interval)


def _change_interval(found: Estimate, measure: str) -> str:
    ends = found.change_interval
    return "" if ends is None else UNITS[measure].write_change_interval(*ends)


def spread(seeds: Sequence[float], unit: Unit) -> str:
    """Standard deviation over seeds, and the range; nothing with one seed."""
    if len(seeds) < 2:
        return ""
    values = [value * unit.scale for value in seeds]
    low, high = (number(value, unit.digits, unit.signed) for value in (min(values), max(values)))
    return (
        f"\N{PLUS-MINUS SIGN}\N{THIN SPACE}{number(statistics.stdev(values), unit.digits)} ({low} to {high})"
    )


def worst(row: Row, measure: str) -> str:
    """The language in which a share is worst, with its value; a dash where all are alike."""
    code = _worst_code(row, measure)
    return code if code == NONE else f"{shown_language(code)} {number(100 * row.languages[measure][code], 0)}"


def _worst_code(row: Row, measure: str) -> str:
    values = row.languages.get(measure, {})
    if len(set(values.values())) < 2:
        return NONE
    choose = max if measure in LOWER_IS_BETTER else min
    return choose(values, key=lambda language: values[language])


# ----------------------------------------------------------------------------------------------------------- the sections


def _place(point: Point, label: str, group: str, bars: bool) -> plane.PlanePoint:
    ends = (_within(point.refusal_interval), _within(point.attack_interval)) if bars else (None, None)
    return plane.PlanePoint(label, point.refusal, point.attack, ends, group)


def _within(ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if ends is None else (max(0.0, ends[0]), min(1.0, ends[1]))


def _plane_section(comparison: ComparisonResult, details: str | None) -> Section | None:
    runs = [run for run in comparison.runs if run.point is not None]
    if comparison.base_point is None and not runs:
        return None
    alone, bars = _seeds(comparison) == 1, len(runs) < _MOST_BARS
    points = [] if comparison.base_point is None else [_place(comparison.base_point, "base", "base", bars)]
    points += [
        _place(run.point, run.setting if alone else run.name, run.setting, bars) for run in runs if run.point
    ]
    drawn = plane.draw(
        points,
        title="Attack success against refusals of harmless prompts, a point per run",
        frontier=True,
    )
    lead = (
        "Every run is a point: the mean over languages of the share of harmful prompts with an unsafe answer, and of the "
        "share of harmless prompts that are refused. The lower left is where one wants to be. A run that moves along a thin "
        "line has paid a point of one for a point of the other: it has learnt to refuse, not to tell apart. "
    )
    if bars:
        lead += f"Bars are {100 * comparison.confidence:g} % intervals over prompts."
    elif alone:
        lead += "The intervals over prompts are in the tables below."
    body = html("comparison_plane.html", lead=lead, drawn=drawn, details=None if bars or alone else details)
    return Section("plane", "What a run costs and what it brings", body)


def _table(
    anchor: str,
    title: str,
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Shown | str]]],
    notes: Sequence[str] = (),
) -> Section:
    """A section of one table; a row is a setting's name and its cells."""
    shown = [
        (name, False, [Shown(cell) if isinstance(cell, str) else cell for cell in cells])
        for name, cells in rows
    ]
    header = ["Setting", *head]
    body = html("comparison_table.html", name=title, header=header, rows=shown, notes=notes)
    return Section(anchor, title, body)


def _percent(share: float | None) -> str:
    return NONE if share is None else number(100 * share, 1)


def _measures_section(
    comparison: ComparisonResult, title: str, anchor: str, wanted: Sequence[str]
) -> Section | None:
    """A table of some measures, with their changes."""
    measures = [m for m in wanted if any(m in row.measures for row in comparison.rows)]
    if not measures:
        return None
    percent = f"[{100 * comparison.confidence:g}\N{NO-BREAK SPACE}%]"
    several = _seeds(comparison) > 1
    head: list[str] = []
    for measure in measures:
        head += [f"{TITLES[measure]} {percent}", f"Change {percent}", *(["Over seeds"] if several else [])]
    rows = []
    for row in comparison.rows:
        cells = []
        for measure in measures:
            cells += _cells(row.measures.get(measure), measure, several)
        rows.append((row.name, cells))
    notes = (
        _notes(comparison) if ATTACK in measures else [_UNTESTED] if {GAP, PERPLEXITY} & {*measures} else []
    )
    return _table(anchor, title, head, rows, notes)


def _glance_section(comparison: ComparisonResult) -> Section | None:
    """The two shares of the plane, what is made of them, and where they are worst."""
    if not any({ATTACK, REFUSAL} & {*row.measures} for row in comparison.rows):
        return None
    several = _seeds(comparison) > 1
    rows = []
    for row in comparison.rows:
        cells: list[Shown | str] = [
            Shown(_value(found, measure), verdict="" if found.change is None else verdict(found, measure))
            if (found := row.measures.get(measure)) is not None
            else NONE
            for measure in (ATTACK, REFUSAL)
        ]
        cells += [_percent(row.balanced), *([spread(row.balanced_seeds, SHARE) or NONE] if several else [])]
        rows.append((row.name, [*cells, worst(row, ATTACK), worst(row, REFUSAL)]))
    head = [
        TITLES[ATTACK],
        TITLES[REFUSAL],
        "Balanced, %",
        *(["Over seeds"] if several else []),
        "Most attacks succeed in",
        "Most is refused in",
    ]
    notes = ["Bold: clearly better or worse than the base model, by the table below."]
    return _table("glance", "At a glance", head, rows, notes)


def _cells(found: Estimate | None, measure: str, several: bool) -> list[Shown]:
    if found is None:
        return [Shown(NONE)] * (3 if several else 2)
    return [
        Shown(_value(found, measure), _interval(found, measure)),
        Shown(_change(found, measure), _change_interval(found, measure), verdict(found, measure)),
        *([Shown(spread(found.seeds, UNITS[measure]) or NONE)] if several else []),
    ]


def _notes(comparison: ComparisonResult) -> list[str]:
    texts = [
        "Values are means over seeds of means over languages. Changes are from the base model, paired by prompt (by pair, item "
        "or text for the last three); a perplexity's is relative. Intervals resample prompts with all their translations.",
        "Bold: the interval leaves zero out, the test that exchanges prompts rejects after Holm's adjustment for the number "
        "of settings, and every seed moved the same way. What is not bold may be chance.",
    ]
    tests = [
        f"{row.name} {TITLES[measure].removesuffix(', %').lower()} {p_text(found.p_value)}"
        for row in comparison.rows[1:]
        for measure in (ATTACK, REFUSAL)
        if (found := row.measures.get(measure)) is not None and found.p_value is not None
    ]
    return texts + ([f"Adjusted p: {'; '.join(tests)}."] if tests else [])


def _language_sections(comparison: ComparisonResult) -> list[Section]:
    out = []
    for measure in (ATTACK, REFUSAL, LANGUAGE):
        codes = list(
            dict.fromkeys(code for row in comparison.rows for code in row.languages.get(measure, {}))
        )
        if len(codes) < 2:
            continue
        rows = [
            (row.name, [_percent(row.languages[measure].get(code)) for code in codes])
            for row in comparison.rows
            if measure in row.languages
        ]
        title = f"{TITLES[measure].removesuffix(', %')} by language"
        head = [f"{shown_language(code)}, %" for code in codes]
        out.append(_table(f"languages-{measure.replace('_', '-')}", title, head, rows))
    return out


def _cost_section(comparison: ComparisonResult) -> Section:
    rows = []
    for name in dict.fromkeys(run.setting for run in comparison.runs):
        runs = [run for run in comparison.runs if run.setting == name and run.pairs is not None]
        rows.append((name, _costs(runs)))
    note = (
        "Means over seeds. Pairs are those trained on, each counted as often as it was; tokens those that were run for them, a "
        "prompt once for both answers. Wall time is of the training process, loading the model and the reference pass "
        "included; of a process that was killed, up to the last line of its log. The memory is the accelerator's where there is "
        "one, else the process's."
    )
    head = ["Runs", "Steps", "Pairs", "Tokens", "Wall time", "Peak memory"]
    return _table("cost", "What it took", head, rows, [note])


def _costs(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return ["0", *[NONE] * 5]
    memory = [run.peak_memory for run in runs if run.peak_memory is not None]
    return [
        str(len(runs)),
        f"{statistics.fmean(run.steps for run in runs):,.0f}",
        f"{statistics.fmean(run.pairs or 0 for run in runs):,.0f}",
        f"{statistics.fmean(run.tokens or 0 for run in runs):,.0f}",
        duration(statistics.fmean(run.seconds for run in runs)),
        size(statistics.fmean(memory)) if memory else NONE,
    ]


def _settings_section(comparison: ComparisonResult) -> Section:
    keys = list(dict.fromkeys(key for row in comparison.rows for key in row.changes))
    rows = [
        (
            row.name,
            [
                _setting(row.changes[key]) + (" *" if key in row.searched else "")
                if key in row.changes
                else NONE
                for key in keys
            ],
        )
        for row in comparison.rows[1:]
    ]
    notes = ["A dash: as the base recipe has it, or the objective's published value."]
    if any(row.searched for row in comparison.rows):
        notes.append("* found by the search.")
    return _table("settings", "Settings", keys, rows, notes)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _search_section(comparison: ComparisonResult) -> Section | None:
    rows = []
    for search in comparison.searches:
        scores = [trial.score for trial in search.trials if trial.score is not None]
        failed = sum(trial.score is None for trial in search.trials)
        best = ", ".join(f"{key} {_setting(value)}" for key, value in search.best.items())
        cells = [
            str(len(search.trials)),
            str(failed),
            _percent(max(scores, default=None)),
            _percent(statistics.median(scores) if scores else None),
            best or NONE,
        ]
        rows.append((search.setting, cells))
    if not rows:
        return None
    notes = ["Measured on the prompts of the validation suite, none of which is in the tables above."]
    head = ["Trials", "Failed", "Best score, %", "Median score, %", "Taken"]
    return _table("search", "The search", head, rows, notes)


# --------------------------------------------------------------------------------------------------------- other tables


def comparison_table(comparison: ComparisonResult) -> TextTable:
    """The table for a terminal: a row per setting, clear changes with a mark."""
    measures = [m for m in MEASURES if any(m in row.measures for row in comparison.rows)]
    head = ["Setting"]
    for measure in measures:
        head += [_SHORT[measure], *(["change"] if measure in (ATTACK, REFUSAL) else [])]
    head += ["worst", "pairs", "time", "memory"]
    rows = []
    for row in comparison.rows:
        cells = [printable_name(row.name, 24)]
        for measure in measures:
            found = row.measures.get(measure)
            has_change = measure in (ATTACK, REFUSAL)
            if found is None:
                cells += ["-"] * (1 + has_change)
                continue
            mark = {"better": "*", "worse": "!"}.get(verdict(found, measure), "")
            change = f"{_change(found, measure)} {_change_interval(found, measure)}".strip() + mark
            cells += [_value(found, measure)] if has_change else [_value(found, measure) + mark]
            cells += [change if found.change is not None else "-"] if has_change else []
        cells.append(" ".join(_worst_code(row, measure) for measure in (ATTACK, REFUSAL)))
        costs = _costs([run for run in comparison.runs if run.setting == row.name and run.pairs is not None])
        cells += [costs[2], costs[4], costs[5]]
        rows.append(tuple(cells))
    notes = [
        f"{_summary(comparison)} Attack: harmful prompts with an unsafe answer, %. Refused: of harmless prompts, %.",
        "Worst: languages of the most attack success and the most refusals. Changes are from the base model, paired by",
        "prompt. * better, ! worse beyond doubt: interval, adjusted test and every seed say so; gap and perplexity have no test.",
    ]
    notes += [f"{run.name} failed: {run.error}" for run in comparison.runs if run.state == "failed"]
    return TextTable(comparison.title, tuple(head), tuple(rows), frozenset({1}), tuple(notes))


def _markdown(comparison: ComparisonResult) -> str:
    table = comparison_table(comparison)
    return "\n\n".join([_summary(comparison), table.markdown(), *map(escape_markdown, table.notes)])
