"""MT-Bench as two measurements of the report: grades by language, and by category."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from mpo.common.bootstrap import grouped_mean_interval
from mpo.common.tables import printable_name
from mpo.common.words import listed
from mpo.evaluation.results import GradeMean, MTBenchResult
from mpo.report.folder import Results
from mpo.report.measurement import Cell, Change, Measurement, Row, Unit, Value, shown_language

GRADE = Unit("grade", digits=2, change_digits=2)
_Entry = Callable[[MTBenchResult], GradeMean | None]


def _mean_of(result: MTBenchResult, code: str) -> GradeMean | None:
    return result.languages[code].mean if code in result.languages else None


def _category_of(result: MTBenchResult, name: str) -> GradeMean | None:
    return result.categories.get(name)


_LEAD = (
    "Mean grade, from 1 to 10, that an LLM judge gives to the answers in MT-Bench's dialogues of two turns. Higher is better. It "
    "is the judge's taste, in a language that it may read badly."
)


def mt_bench(results: Results, codes: Sequence[str]) -> list[Measurement]:
    """Grades by language and by category; empty where no model was graded.

    Args:
        results: The result folder.
        codes: Languages in the order of the report.
    """
    found = [model.mt_bench for model in results.models]
    known = [result for result in found if result is not None]
    if not known:
        return []
    by_language: list[tuple[str, bool, str | None, _Entry]] = [
        (
            shown_language(code),
            False,
            code,
            partial(_mean_of, code=code),
        )
        for code in codes
    ]
    if len(codes) > 1:
        by_language.append(("Mean of languages", True, None, lambda r: r.average))
    categories = list(dict.fromkeys(name for result in known for name in result.categories))
    by_category: list[tuple[str, bool, str | None, _Entry]] = [
        (printable_name(name, 40), False, None, partial(_category_of, name=name)) for name in categories
    ]
    notes = (
        f"Judge: {listed(sorted({printable_name(str(r.judge['name']), 60) for r in known}))}. Intervals resample questions with both "
        "turns; changes are paired by question.",
    )
    warnings = []
    if len({repr(sorted((k, str(v)) for k, v in r.judge.items())) for r in known}) > 1:
        warnings.append("The models were graded by different judges, so their grades cannot be compared.")
    if len({str(r.questions.get("fingerprint")) for r in known}) > 1:
        warnings.append("The models were asked different questions; changes are over those that both have.")
    made = []
    for anchor, title, rows, changes in (
        ("mt-bench", "MT-Bench", by_language, True),
        ("utility-mt-bench", "MT-Bench by category", by_category, False),
    ):
        shown = []
        for label, is_average, code, entry in rows:
            means = [None if result is None else entry(result) for result in found]
            cells = tuple(
                None
                if mean is None or mean.mean is None
                else Cell(
                    Value(mean.mean, *(mean.interval or ())),
                    _change(found[0], result, code) if n and changes else None,
                )
                for n, (mean, result) in enumerate(zip(means, found, strict=True))
            )
            if any(cells):
                shown.append(Row(label, cells, max(mean.count for mean in means if mean), is_average))
        if shown:
            made.append(
                Measurement(
                    anchor=anchor,
                    title=title,
                    short=title,
                    unit=GRADE,
                    better="higher",
                    models=tuple(model.name for model in results.models),
                    rows=tuple(shown),
                    lead=_LEAD,
                    notes=notes,
                    warnings=tuple(warnings),
                    confidence=known[0].confidence,
                    axis=(1.0, 10.0),
                )
            )
    return made


def _change(base: MTBenchResult | None, result: MTBenchResult | None, code: str | None) -> Change | None:
    """Of the mean over a question's turns, in one language or, for None, over languages that weigh the same."""
    if base is None or result is None:
        return None
    pairs: dict[str, list[tuple[str, float]]] = {}
    for name in (name for name in base.items if name in result.items):
        question, _, language = name.rpartition("/")
        both = [
            (a, b)
            for a, b in zip(base.items[name], result.items[name], strict=False)
            if a is not None and b is not None
        ]
        if both and code in (None, language):
            pairs.setdefault(language, []).append((question, fmean(b - a for a, b in both)))
    if not pairs:
        return None
    change = fmean(fmean(value for _, value in own) for own in pairs.values())
    if len({len(own) for own in pairs.values()}) > 1:
        return Change(change)  # the mean over all would weigh languages by their questions
    names = sorted({question for own in pairs.values() for question, _ in own})
    rows = [(value, names.index(question)) for own in pairs.values() for question, value in own]
    ends = grouped_mean_interval([value for value, _ in rows], [group for _, group in rows])
    low, high = ends or (None, None)
    return Change(change, low, high, count=len(names))
