"""The report's section on judges that were measured against labels of people."""

from __future__ import annotations

from pathlib import Path

from mpo.common.tables import escape_markdown, printable_name
from mpo.common.typed_json import read_typed
from mpo.common.words import ARROW, listed
from mpo.errors import MPOError
from mpo.evaluation.judge_quality import judge_tables, uncorrected
from mpo.evaluation.labels import JudgedRun, fingerprints, read_judged
from mpo.evaluation.results import JUDGE, CorrectedRate, JudgeResult, MeasuredJudge
from mpo.evaluation.tasks import NO_VERDICT
from mpo.report.measurement import NONE, SHARE, shown_language
from mpo.report.rendering import Section, html
from mpo.report.tables import Shown, bare

_TASKS = {"attack": "attack success", "over_refusal": "refusals of harmless prompts"}
_TITLE = "The judge against people"


def judge_section(folder: Path) -> Section | None:
    """The section of a result folder, or None where no judge was measured against labels.

    Where answers or verdicts are others than those that were measured, it says so and shows no number.

    Raises:
        StorageError: The measurement is damaged.
    """
    file = folder / JUDGE
    if not file.is_file():
        return None
    result = read_typed(file, JudgeResult)
    if changed := outdated(folder, result):
        runs = listed([printable_name(name, 80) for name in changed])
        text = (
            f"Left out: the answers or verdicts of {runs} have changed, are gone or are of more judges since the judges were measured. To "
            f"measure them anew: mpo evaluate judge FOLDER --gold {printable_name(result.labels_file or 'LABELS', 80)}. Where it is the answers "
            "that were made anew, they need new labels first: mpo evaluate label."
        )
        return Section("judges", _TITLE, html("judges.html", outdated=text), escape_markdown(text))
    percent = f"[{100 * result.confidence:g}\N{NO-BREAK SPACE}%]"
    judges = [_judge(measured, percent) for measured in result.judges]
    body = html("judges.html", outdated=None, labels=result.labels, judges=judges)
    parts = []
    for measured in result.judges:
        for table in judge_tables(measured, result.confidence):
            notes = "\n\n".join(escape_markdown(note) for note in table.notes)
            parts.append(f"**{escape_markdown(table.title)}**\n\n{table.markdown()}\n\n{notes}")
    return Section("judges", _TITLE, body, "\n\n".join(parts))


def outdated(folder: Path, result: JudgeResult) -> list[str]:
    """``TASK/MODEL/PROMPTS`` of what is no longer as it was measured, as far as that can be told.

    It cannot where answers or verdicts are gone. A file without fingerprints is compared by its raw rates.
    """
    try:
        runs = read_judged(folder)
    except MPOError:
        return []
    if result.judged:
        now = fingerprints(runs, [measured.measurement for measured in result.judges])
        return [name for name, mark in result.judged.items() if now.get(name) != mark]
    return [
        f"{run.task.name}/{run.name}"
        for run in runs
        if any(
            measured.measurement == run.task.name and not _has_rates(run, measured)
            for measured in result.judges
        )
    ]


def _has_rates(run: JudgedRun, measured: MeasuredJudge) -> bool:
    """Whether a run's verdicts have the raw rates of a measurement, where it has some of this run."""
    if (verdicts := run.verdicts.get(measured.judge)) is None:
        return True
    for code, row in measured.languages.items():
        own = [
            verdict
            for name, answer in run.answers.items()
            if answer.language == code
            if (verdict := verdicts.get(name)) is not None and verdict not in NO_VERDICT
        ]
        rate = row.rates.get(run.name)
        if rate is not None and (
            len(own) != rate.answers or abs(own.count(measured.counted) - rate.raw * rate.answers) > 1e-6
        ):
            return False
    return True


def _judge(measured: MeasuredJudge, percent: str) -> dict[str, object]:
    every = [(shown_language(code), False, row) for code, row in measured.languages.items()]
    if len(every) > 1:
        every.append(("All together", True, measured.overall))
    quality = [
        (
            label,
            is_all,
            [
                Shown(f"{row.labels} of {row.answers}"),
                _share(row.sensitivity, row.sensitivity_interval),
                _share(row.specificity, row.specificity_interval),
                Shown(
                    NONE if row.kappa is None else f"{row.kappa:.2f}",
                    "" if row.kappa_interval is None else "[{:.2f}, {:.2f}]".format(*row.kappa_interval),
                ),
            ],
        )
        for label, is_all, row in every
    ]
    names = list(measured.means)
    rates = [
        (shown_language(code), False, [_pair(row.rates.get(name)) for name in names])
        for code, row in measured.languages.items()
    ]
    if len(rates) > 1:
        rates.append(("Mean of languages", True, [_pair(measured.means[name]) for name in names]))
    return {
        "judge": measured.judge,
        "task": _TASKS[measured.measurement],
        "counted": measured.counted,
        "header": ["Language", "Labelled", f"Sensitivity {percent}", f"Specificity {percent}", "Kappa"],
        "quality": quality,
        "rates_header": ["Language", *(f"{name}, raw {ARROW} corrected {percent}" for name in names)],
        "rates": rates,
        "uncorrected": uncorrected(measured),
    }


def _share(value: float | None, ends: tuple[float, float] | None) -> Shown:
    return Shown(bare(SHARE.write(value)), SHARE.write_interval(*(ends or (None, None))))


def _pair(rate: CorrectedRate | None) -> Shown:
    if rate is None:
        return Shown(NONE)
    shown = _share(rate.corrected, rate.interval)
    return Shown(f"{bare(SHARE.write(rate.raw))} {ARROW} {shown.text}", shown.interval)
