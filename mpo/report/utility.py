"""Scores of lm-evaluation-harness as measurements of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpo.common.bootstrap import grouped_mean_interval
from mpo.common.statistics import holm, paired_difference
from mpo.common.tables import printable_name
from mpo.evaluation.results import Score, TaskScores
from mpo.report.folder import Results
from mpo.report.measurement import SCORE, SHARE, Cell, Change, Measurement, Row, Value

_LIKELIHOOD = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")


def utility(results: Results) -> list[Measurement]:
    """Task scores of lm-evaluation-harness: shares in one table, perplexities in another."""
    keys = list(
        dict.fromkeys(
            (task, metric)
            for model in results.models
            if model.utility
            for task, entry in model.utility.tasks.items()
            for metric in entry.metrics
        )
    )
    likelihoods = [key for key in keys if key[1].split(",")[0] in _LIKELIHOOD]
    shares = [key for key in keys if key not in likelihoods]
    found = [
        _utility(results, shares, "utility", "Utility", "higher"),
        _utility(results, likelihoods, "utility-likelihood", "Likelihood of text (lm-eval)", "lower"),
    ]
    return [measurement for measurement in found if measurement]


def _utility(
    results: Results, keys: Sequence[tuple[str, str]], anchor: str, title: str, better: str
) -> Measurement | None:
    rows = []
    for task, metric in keys:
        tasks = [model.utility.tasks.get(task) if model.utility else None for model in results.models]
        cells = tuple(_utility_cell(one, tasks[0] if n else None, metric) for n, one in enumerate(tasks))
        if any(cells):
            several = sum(other == task for other, _ in keys) > 1
            label = f"{task}, {metric.removesuffix(',none')}" if several else task
            rows.append(Row(printable_name(label, 80), cells, max(one.count or 0 for one in tasks if one)))
    if not rows:
        return None
    shares = all(0 <= c.value.value <= 1 for row in rows for c in row.cells if c) and better == "higher"
    return Measurement(
        anchor=anchor,
        title=title,
        short=f"{title} (%)" if shares else title,
        unit=SHARE if shares else SCORE,
        better=better,
        models=tuple(model.name for model in results.models),
        rows=tuple(_adjusted(rows)),
        lead=(
            "What the model can still do, by the tasks and metrics of lm-evaluation-harness. "
            f"{better.capitalize()} is better."
        ),
        notes=(
            "Intervals: 1.96 standard errors as the harness gives them. Changes are paired by item where its items were "
            "kept: Tango's interval and McNemar's test for right or wrong, else a bootstrap over items.",
        ),
        axis=(0.0, 1.0) if shares else None,
    )


def _utility_cell(task: TaskScores | None, base: TaskScores | None, metric: str) -> Cell | None:
    score = None if task is None else task.metrics.get(metric)
    if task is None or score is None or score.value is None:
        return None
    half = None if score.stderr is None else 1.96 * score.stderr
    value = Value(score.value, *(() if half is None else (score.value - half, score.value + half)))
    return Cell(value, None if base is None else _item_change(base, task, metric))


def _item_change(base: TaskScores, task: TaskScores, metric: str) -> Change | None:
    before, after = (one.metrics.get(metric, Score(None)).value for one in (base, task))
    if before is None or after is None:
        return None
    old, new = base.items.get(metric), task.items.get(metric)
    if not old or not new or len(old) != len(new):
        return Change(after - before)
    if set(old) | set(new) <= {0.0, 1.0}:
        pair = paired_difference([bool(v) for v in old], [bool(v) for v in new])
        return Change(pair.difference, pair.low, pair.high, pair.test.p_value, pair.count)
    changes = [b - a for a, b in zip(old, new, strict=True)]
    return Change(after - before, *(grouped_mean_interval(changes, range(len(changes))) or ()))


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    """The rows with their p-values adjusted for their number, model by model."""
    out = list(rows)
    for model in range(len(rows[0].cells)):
        tested = [n for n, row in enumerate(out) if _p_value(row, model) is not None]
        for n, p in zip(tested, holm([_p_value(out[n], model) or 0.0 for n in tested]), strict=True):
            cell = out[n].cells[model]
            assert cell is not None and cell.change is not None
            changed = replace(cell, change=replace(cell.change, p_value=p))
            out[n] = replace(out[n], cells=(*out[n].cells[:model], changed, *out[n].cells[model + 1 :]))
    return out


def _p_value(row: Row, model: int) -> float | None:
    cell = row.cells[model]
    return cell.change.p_value if cell is not None and cell.change is not None else None
