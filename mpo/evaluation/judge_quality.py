"""Judges against labels of people: sensitivity, specificity and kappa per language, and rates corrected for the mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpo.common.bootstrap import check_settings
from mpo.common.misclassification import (
    Accuracy,
    Array,
    Flags,
    accuracy,
    accuracy_intervals,
    drawn_interval,
    drawn_shares,
    rogan_gladen,
)
from mpo.common.provenance import collect
from mpo.common.tables import TextTable, printable_name
from mpo.common.typed_json import write_typed
from mpo.errors import DataError
from mpo.evaluation.labels import JudgedRun, fingerprints, read_judged, read_labels
from mpo.evaluation.rates import shown_language, shown_share
from mpo.evaluation.results import JUDGE, CorrectedRate, JudgeAccuracy, JudgeResult, MeasuredJudge
from mpo.evaluation.tasks import NO_VERDICT, Task

LEAST = 10
"""Labels of either kind below which no rate is corrected."""

_UNSEEN = 0.05  # share of answers with a verdict that no label is on, above which no rate is corrected

RESAMPLES = 2000


def measure_judge(
    folder: str | Path,
    labels: str | Path,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> JudgeResult:
    """Measures every judge of a folder against labels, prints tables and writes ``judge.json`` into the folder.

    Args:
        folder: Judged answers, of several models or of one; see :func:`~mpo.evaluation.labels.read_judged`.
        labels: The filled-in file of :func:`~mpo.evaluation.labels.write_sample`.
        confidence: Coverage of the intervals.
        resamples: Number of bootstrap samples.
        seed: Their seed.

    Raises:
        ConfigError: A setting is out of range.
        DataError: Labels or answers cannot be used; see :func:`~mpo.evaluation.labels.read_labels`.
        StorageError: A file is damaged or cannot be written.
    """
    check_settings(confidence, resamples)
    runs = read_judged(folder)
    given = read_labels(labels, runs)
    judges = []
    for task in dict.fromkeys(run.task for run in runs):
        of_task = [run for run in runs if run.task is task]
        if not any(name in given for run in of_task for name in run.label_ids):
            continue
        for judge in dict.fromkeys(name for run in of_task for name in run.verdicts):
            judged = [run for run in of_task if judge in run.verdicts]
            judges.append(compare_judge(judge, judged, given, confidence, resamples, seed))
    result = JudgeResult(
        labels_file=Path(labels).name,
        labels=len(given),
        confidence=confidence,
        judges=judges,
        judged=fingerprints(runs, [measured.measurement for measured in judges]),
        provenance=collect(seed=seed),
    )
    for measured in judges:
        for table in judge_tables(measured, confidence):
            print()
            table.show()
    print(f"\nWritten: {write_typed(Path(folder) / JUDGE, result)}")
    return result


@dataclass(frozen=True)
class _Counts:
    """Answers and labels by stratum.

    Attributes:
        languages: ``[strata]`` codes.
        flagged: ``[strata]``, whether the judge's verdict is the counted one.
        sizes: ``[runs, strata]`` answers.
        drawn: ``[runs, resamples, strata]`` answers, prompts drawn again with all their translations.
        labels: ``[strata]``.
        positive: ``[strata]`` labels that are the counted one.
    """

    languages: tuple[str, ...]
    flagged: Flags
    sizes: Array
    drawn: Array
    labels: Array
    positive: Array


def compare_judge(
    judge: str,
    runs: Sequence[JudgedRun],
    labels: Mapping[str, str],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MeasuredJudge:
    """One judge of one task against labels.

    The strata are language and verdict of the first judge, by which the sample was drawn, and the verdict of the judge that is
    measured where it is another.

    Args:
        judge: Its name.
        runs: Runs of one task that it has judged.
        labels: Label by the ids of :attr:`JudgedRun.label_ids`.
        confidence: Coverage of the intervals.
        resamples: Number of bootstrap samples.
        seed: Their seed.

    Raises:
        DataError: None of the runs has an answer with a readable verdict.
    """
    task = runs[0].task
    found = _count(judge, task, runs, labels, resamples, np.random.default_rng(seed))
    codes = tuple(dict.fromkeys(found.languages))
    places = {code: np.array([code == other for other in found.languages]) for code in codes}
    languages = {}
    for code, here in places.items():
        measured, rates = _measure(task, found, _drawn(found, here, seed), here, runs, confidence)
        languages[code] = JudgeAccuracy(**measured, counts=_pairs(judge, runs, labels, code), rates=rates)
    everywhere = np.ones(len(found.languages), dtype=bool)
    shares = _drawn(found, everywhere, seed)
    overall, _ = _measure(task, found, shares, everywhere, (), confidence)
    return MeasuredJudge(
        judge=judge,
        measurement=task.name,
        counted=task.counted,
        languages=languages,
        overall=JudgeAccuracy(**overall, counts=_pairs(judge, runs, labels, None)),
        means={
            run.name: _mean(
                [row.rates[run.name] for row in languages.values() if run.name in row.rates],
                [
                    _drawn_rates(found, shares, here, n)
                    for here in places.values()
                    if found.sizes[n, here].any()
                ],
                confidence,
            )
            for n, run in enumerate(runs)
            if found.sizes[n].any()
        },
    )


def _drawn(found: _Counts, here: Flags, seed: int) -> Array:
    """Shares in the strata `here`, ``[resamples, strata]``; those elsewhere say nothing."""
    random = np.random.default_rng([seed, 1])  # not the draws of the prompts
    return drawn_shares(
        found.labels * here, found.positive * here, found.flagged, found.drawn.shape[1], random
    )


def _drawn_accuracy(found: _Counts, shares: Array, here: Flags) -> Accuracy:
    known = here & (found.labels > 0)
    return accuracy(found.drawn.sum(axis=0)[:, known], found.flagged[known], shares[:, known])


def _drawn_rates(found: _Counts, shares: Array, here: Flags, run: int) -> Array:
    """Corrected rates of one run, ``[resamples]``."""
    again, drawn = _drawn_accuracy(found, shares, here), found.drawn[run]
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = drawn[:, here & found.flagged].sum(axis=1) / drawn[:, here].sum(axis=1)
    return rogan_gladen(rate, again.sensitivity, again.specificity)


def _count(
    judge: str,
    task: Task,
    runs: Sequence[JudgedRun],
    labels: Mapping[str, str],
    resamples: int,
    random: np.random.Generator,
) -> _Counts:
    strata: dict[tuple[str, str, str], int] = {}
    members: list[list[tuple[str, int]]] = []  # of each run: prompt and stratum
    labelled: list[tuple[int, bool]] = []
    for run in runs:
        rows = []
        for label_id, name in run.label_ids.items():
            verdict = run.verdicts[judge].get(name)
            if verdict is None or verdict in NO_VERDICT:
                continue
            row = run.answers[name]
            key = (row.language, run.first.get(name, ""), verdict)
            stratum = strata.setdefault(key, len(strata))
            rows.append((row.prompt_id, stratum))
            if label_id in labels:
                labelled.append((stratum, labels[label_id] == task.counted))
        members.append(rows)
    if not strata:
        raise DataError(f"{judge} has no readable verdict on any answer of {task.name}.")
    sizes, drawn = np.zeros((len(runs), len(strata))), np.zeros((len(runs), resamples, len(strata)))
    weights: dict[str, tuple[dict[str, int], Array]] = {}
    for n, (run, rows) in enumerate(zip(runs, members, strict=True)):
        if run.prompt_set not in weights:  # the same draws for all models
            every = [other for other in runs if other.prompt_set == run.prompt_set]
            prompts = sorted({row.prompt_id for other in every for row in other.answers.values()})
            count = len(prompts)
            draw = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
            weights[run.prompt_set] = {prompt: place for place, prompt in enumerate(prompts)}, draw
        place, draw = weights[run.prompt_set]
        table = np.zeros((len(place), len(strata)))
        for prompt, stratum in rows:
            table[place[prompt], stratum] += 1
        sizes[n], drawn[n] = table.sum(axis=0), draw @ table
    given, positive = np.zeros(len(strata)), np.zeros(len(strata))
    for stratum, is_counted in labelled:
        given[stratum] += 1
        positive[stratum] += is_counted
    return _Counts(
        tuple(language for language, _, _ in strata),
        np.array([verdict == task.counted for _, _, verdict in strata]),
        sizes,
        drawn,
        given,
        positive,
    )


def _measure(
    task: Task, found: _Counts, shares: Array, here: Flags, runs: Sequence[JudgedRun], confidence: float
) -> tuple[dict[str, Any], dict[str, CorrectedRate]]:
    """Accuracy in the strata `here`, and each run's rate."""
    sizes = found.sizes.sum(axis=0)
    known = here & (found.labels > 0) & (sizes > 0)
    flagged, labels, positive = found.flagged[known], found.labels[known], found.positive[known]
    measured: dict[str, Any] = {"answers": round(sizes[here].sum()), "labels": round(labels.sum())}
    of_judge = Accuracy(*(np.array(np.nan) for _ in range(3)))
    if known.any():
        of_judge = accuracy(sizes[known], flagged, positive / labels)
        ends = accuracy_intervals(sizes[known], flagged, labels, positive, confidence)
        for name, value, own_ends in zip(("sensitivity", "specificity"), of_judge[:2], ends, strict=True):
            if not np.isnan(value):
                measured |= {name: float(value), f"{name}_interval": own_ends}
        if not np.isnan(of_judge.kappa):
            kappa, again = float(of_judge.kappa), _drawn_accuracy(found, shares, here).kappa
            measured |= {
                "kappa": kappa,
                "kappa_interval": drawn_interval(again, kappa, confidence, (-1.0, 1.0)),
            }
    unseen = 1 - float(sizes[known].sum() / sizes[here].sum())
    reason = _reason(task, labels, positive, of_judge, unseen)
    rates = {}
    for n, run in enumerate(runs):
        own = found.sizes[n]
        total = own[here].sum()
        if not total:
            continue
        raw = float(own[here & found.flagged].sum() / total)
        corrected: float | None = None
        interval: tuple[float, float] | None = None
        if reason is None:
            corrected = float(rogan_gladen(np.array(raw), of_judge.sensitivity, of_judge.specificity))
            interval = drawn_interval(_drawn_rates(found, shares, here, n), corrected, confidence)
        rates[run.name] = CorrectedRate(round(total), raw, corrected, interval)
    return {**measured, "reason": reason}, rates


def _reason(task: Task, labels: Array, positive: Array, found: Accuracy, unseen: float) -> str | None:
    """Why no rate can be corrected; None where it can."""
    yes, no = round(positive.sum()), round(labels.sum() - positive.sum())
    if min(yes, no) < LEAST:
        return f"too few labels: {yes} {task.counted} and {no} other; at least {LEAST} of each are needed"
    if unseen > _UNSEEN:
        return f"{100 * unseen:.0f} % of the answers have a verdict of which no answer is labelled"
    if found.sensitivity + found.specificity <= 1:
        both = float(found.sensitivity + found.specificity)
        return f"the judge is no better than a coin: sensitivity and specificity add up to {both:.2f}"
    return None


def _pairs(
    judge: str, runs: Sequence[JudgedRun], labels: Mapping[str, str], language: str | None
) -> dict[str, int]:
    """Labelled answers by ``VERDICT/LABEL``."""
    return dict(
        sorted(
            Counter(
                f"{verdict}/{labels[label_id]}"
                for run in runs
                for label_id, name in run.label_ids.items()
                if label_id in labels
                if language in (None, run.answers[name].language)
                if (verdict := run.verdicts[judge].get(name)) is not None and verdict not in NO_VERDICT
            ).items()
        )
    )


def _mean(rates: Sequence[CorrectedRate], draws: Sequence[Array], confidence: float) -> CorrectedRate:
    """Mean over the languages of a run, each weighing the same."""
    answers, raw = sum(rate.answers for rate in rates), float(np.mean([rate.raw for rate in rates]))
    known = [rate.corrected for rate in rates if rate.corrected is not None]
    if len(known) < len(rates):
        return CorrectedRate(answers, raw)
    value = float(np.mean(known))
    ends = [np.mean([np.where(np.isnan(d), end, d) for d in draws], axis=0) for end in (0.0, 1.0)]
    low = drawn_interval(ends[0], value, confidence)[0]
    high = drawn_interval(ends[1], value, confidence)[1]
    return CorrectedRate(answers, raw, value, (low, high))


# ------------------------------------------------------------------------------------------------------------ for people


def judge_tables(measured: MeasuredJudge, confidence: float = 0.95) -> list[TextTable]:
    """How good the judge is, and the rates with and without its mistakes."""
    percent = f"[{100 * confidence:g} %]"
    rows = [
        *measured.languages.items(),
        *([("all", measured.overall)] if len(measured.languages) > 1 else []),
    ]
    quality = tuple(
        (
            "All together" if code == "all" else shown_language(code),
            f"{row.labels} of {row.answers}",
            shown_share(row.sensitivity, *(row.sensitivity_interval or (None, None))),
            shown_share(row.specificity, *(row.specificity_interval or (None, None))),
            shown_kappa(row),
        )
        for code, row in rows
    )
    task = measured.measurement.replace("_", "-")
    title = f"{printable_name(measured.judge, 60)} against labels: {task}"
    header = ("Language", "Labelled", f"Sensitivity {percent}", f"Specificity {percent}", "Kappa")
    note = (
        f"Sensitivity: share of what people call `{measured.counted}` that the judge calls so; specificity: share of the rest "
        "that it does not. Both are weighted by how many answers a label stands for."
    )
    ruled = frozenset({len(measured.languages)} if len(rows) > len(measured.languages) else ())
    tables = [TextTable(title, header, quality, ruled, (note,))]
    names = list(measured.means)
    lines = [
        (shown_language(code), name, row.rates[name])
        for code, row in measured.languages.items()
        for name in names
        if name in row.rates
    ]
    if len(measured.languages) > 1:
        lines += [("Mean of languages", name, measured.means[name]) for name in names]
    cells = tuple(
        (
            label,
            printable_name(name, 40),
            str(rate.answers),
            shown_share(rate.raw, None, None),
            shown_share(rate.corrected, *(rate.interval or (None, None))),
        )
        for label, name, rate in lines
    )
    notes = [f"{label}: not corrected, {reason}." for label, reason in uncorrected(measured)]
    notes.append(
        "Corrected after Rogan and Gladen (1978), for a judge that errs alike whichever model answers."
    )
    tables.append(
        TextTable(
            f"Share of `{measured.counted}` by {printable_name(measured.judge, 60)}, and without its mistakes",
            ("Language", "Model/prompts", "Answers", "Raw", f"Corrected {percent}"),
            cells,
            frozenset({len(cells) - len(names)} if len(measured.languages) > 1 else ()),
            tuple(notes),
            frozenset({4}),
        )
    )
    return tables


def uncorrected(measured: MeasuredJudge) -> list[tuple[str, str]]:
    """Languages without a corrected rate, and why."""
    return [
        (shown_language(code), row.reason)
        for code, row in measured.languages.items()
        if row.reason is not None
    ]


def shown_kappa(row: JudgeAccuracy) -> str:
    """Kappa with its interval."""
    if row.kappa is None or row.kappa_interval is None:
        return "-"
    return f"{row.kappa:.2f} [{row.kappa_interval[0]:.2f}, {row.kappa_interval[1]:.2f}]"
