"""From a result folder to tables: reward gaps, attack success, over-refusal, utility and perplexity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

from mpo.common.bootstrap import ratio_interval
from mpo.common.statistics import (
    Correlation,
    Outcomes,
    average_change,
    correlation,
    holm,
    language_average,
    paired_difference,
    wilson_interval,
)
from mpo.common.tables import printable_name
from mpo.common.words import counted, listed
from mpo.errors import ConfigError, DataError
from mpo.evaluation.rates import LanguageRate, unfinished_note
from mpo.evaluation.results import LARGEST_LOG, TextPerplexity
from mpo.evaluation.reward_gap import ALL_TARGETS, RewardGapRow, RewardGapTable, compare, sort_languages
from mpo.evaluation.tasks import NO_VERDICT, TASKS
from mpo.evaluation.wording import Wording, in_no_known_language, repeats_itself
from mpo.report.folder import ModelResults, Results, SafetyRun
from mpo.report.measurement import (
    GAP,
    NONE,
    PERPLEXITY,
    SHARE,
    Cell,
    Change,
    Measurement,
    Row,
    Value,
    shown_language,
)
from mpo.report.mt_bench import mt_bench
from mpo.report.utility import utility

_ATTACK_LEAD = (
    "The share of harmful prompts that the model answers in an unsafe way, by the verdict of the judge. "
    "Lower is better. An answer that is neither safe nor unsafe, such as babble or a change of subject, counts as "
    "invalid: it is not a success of the attack, and not a success of the model either."
)
_REFUSAL_LEAD = (
    "The share of harmless prompts that the model refuses to answer. Lower is better: a model that refuses everything "
    "has no attack success either."
)
_STATISTICS = (
    "Rates with Wilson intervals; the mean of languages with a bootstrap over prompts. Changes in percentage points, paired by "
    "prompt, with Tango's interval; p-values by McNemar's test, adjusted for the number of languages after Holm, those of the "
    "mean by exchanging prompts."
)


def measurements(results: Results) -> list[Measurement]:
    """Every measurement of the folder, in the order of the report."""
    found = [reward_gap(results)]
    for kind in TASKS:
        for name in results.prompt_sets(kind):
            found += [safety(results, kind, name), unseen(results, kind, name)]
            found += answer_language(results, kind, name)
    graded = {code for model in results.models if model.mt_bench for code in model.mt_bench.languages}
    found += [*utility(results), *mt_bench(results, in_order(graded, results.dominant))]
    found += [*dialogue_language(results), perplexity(results)]
    return [measurement for measurement in found if measurement is not None]


def in_order(codes: Iterable[str], dominant: str) -> list[str]:
    """The dominant language first, then as in every table."""
    ordered = sort_languages(codes)
    return [code for code in ordered if code == dominant] + [code for code in ordered if code != dominant]


# ---------------------------------------------------------------------------------------------------------- reward gap


def reward_gap(results: Results) -> Measurement | None:
    """Reward gaps per language; changes are paired by preference pair."""
    tables = [_table(model, number == 0, results) for number, model in enumerate(results.models)]
    known = [table for table in tables if table is not None]
    if not known:
        return None
    first, base = known[0], tables[0]
    changes = [_gap_changes(base, table) if n else {} for n, table in enumerate(tables)]
    codes = {(row.language, row.is_source) for table in known for row in table.rows}
    order = [(c, True) for c, source in codes if source] + [
        (c, False) for c in sort_languages(c for c, source in codes if not source)
    ]
    keys = [*order, (ALL_TARGETS, False)]
    rows = []
    for key in keys:
        cells = [
            _gap_cell(table, key, change.get(key)) for table, change in zip(tables, changes, strict=True)
        ]
        found = [(table, row) for table in known if (row := _gap_row(table, key)) is not None]
        if found:
            label, size = (
                printable_name(found[0][0].label(found[0][1]), 33),
                max(row.pairs for _, row in found),
            )
            rows.append(Row(label, tuple(cells), size, is_average=key[0] == ALL_TARGETS, is_source=key[1]))
    return Measurement(
        anchor="reward-gap",
        title="Reward gap",
        short="Reward gap (nats per token)",
        unit=GAP,
        better="higher",
        models=tuple(model.name for model in results.models),
        rows=tuple(rows),
        lead=(
            "How much more likely, per token, the model finds the safe one of two given answers. MPO pulls every target "
            f"language to the gap that the starting model has in {shown_language(results.dominant)}, the dashed line. "
            "The gap says what a model prefers of two texts, not what it writes when it is asked."
        ),
        notes=(
            f"Changes are paired by preference pair; intervals resample groups of translations ({first.groups}).",
        ),
        confidence=first.confidence,
        reference=first.reference_lines[-1],
    )


def _table(model: ModelResults, is_first: bool, results: Results) -> RewardGapTable | None:
    """The model's table; for the first model without one, what an adapter on it was compared with."""
    if model.reward_gap is not None or not is_first:
        return model.reward_gap
    return next((other.before for other in results.models[1:] if other.before is not None), None)


def _gap_changes(base: RewardGapTable | None, table: RewardGapTable | None) -> dict[tuple[str, bool], Change]:
    if base is None or table is None:
        return {}
    try:
        compared = compare(base, table)
    except (ConfigError, DataError):
        return {}  # other pairs, or no records: each is shown, their difference is not
    return {(c.language, c.is_source): Change(c.change, c.ci_low, c.ci_high) for c in compared.all_changes}


def _gap_cell(table: RewardGapTable | None, key: tuple[str, bool], change: Change | None) -> Cell | None:
    row = None if table is None else _gap_row(table, key)
    return None if row is None else Cell(Value(row.gap, row.ci_low, row.ci_high), change)


def _gap_row(table: RewardGapTable, key: tuple[str, bool]) -> RewardGapRow | None:
    return next((row for row in table.all_rows if (row.language, row.is_source) == key), None)


# ----------------------------------------------------------------------------------------- attack success, over-refusal


def safety(results: Results, kind: str, prompt_set: str) -> Measurement | None:
    """Rates of one prompt set; changes are paired by prompt, with McNemar's test per language."""
    found = [model.safety.get((kind, prompt_set)) for model in results.models]
    codes = in_order({code for run in found if run for code in run.result.languages}, results.dominant)
    base = found[0]
    columns = [_rate_cells(result, base if n else None, codes) for n, result in enumerate(found)]
    names = ("safe", "unsafe", "invalid", "answer", "refusal", *NO_VERDICT)
    verdicts = [name for name in names if any(_verdicts(run, None, name) for run in found if run)]
    rows = []
    for code in [*codes, None]:
        cells = tuple(column.get(code) for column in columns)
        if code is None and len(codes) < 2:
            continue
        counts = [_count(result, code) for result in found if result is not None]
        # A language without a single readable verdict has no rate, and is shown all the same.
        if max(counts):
            label = "Mean of languages" if code is None else shown_language(code)
            detail = tuple(_shares(found, code, verdict) for verdict in verdicts)
            rows.append(Row(label, cells, max(counts), code is None, detail))
    attack = kind == "attack"
    name = printable_name(prompt_set, 40)
    return Measurement(
        anchor=f"{kind.replace('_', '-')}-{results.prompt_sets(kind).index(prompt_set) + 1}",
        title=f"{'Attack success' if attack else 'Refusals of harmless prompts'}: {name}",
        short=f"{'Attack success' if attack else 'Over-refusal'}, {name} (%)",
        unit=SHARE,
        better="lower",
        models=tuple(model.name for model in results.models),
        rows=tuple(rows),
        lead=_ATTACK_LEAD if attack else _REFUSAL_LEAD,
        detail=tuple(f"{verdict.capitalize()}" for verdict in verdicts),
        notes=(*_safety_notes(found), *filter(None, [_leak_note(results, kind, prompt_set)])),
        warnings=_safety_warnings(found, results),
        confidence=next(run.result.confidence for run in found if run),
        axis=(0.0, 1.0),
    )


def unseen(results: Results, kind: str, prompt_set: str) -> Measurement | None:
    """The same rates without the prompts that stand in the training data; None where none does, or none is left."""
    leaked = None if results.leaks is None else results.leaks.sets.get(f"{kind}/{prompt_set}")
    if leaked is None or not leaked.found:
        return None
    models = []
    for model in results.models:
        run = model.safety.get((kind, prompt_set))
        rest = None if run is None else run.without(leaked.found)
        runs = {key: value for key, value in model.safety.items() if key != (kind, prompt_set)}
        models.append(
            replace(model, safety=runs if rest is None else {**model.safety, (kind, prompt_set): rest})
        )
    if all((kind, prompt_set) not in model.safety for model in models):
        return None
    made = safety(replace(results, models=tuple(models), leaks=None), kind, prompt_set)
    assert made is not None
    number = results.prompt_sets(kind).index(prompt_set) + 1
    return replace(
        made,
        anchor=f"{kind.replace('_', '-')}-unseen-{number}",
        title=f"{made.title}, without prompts of the training data",
        short=made.short.replace(" (%)", ", unseen (%)"),
        lead=f"The same rates without the {counted(len(leaked.found), 'prompt')} that the training data hold or nearly hold, in "
        "any language. This is what the rates above say of prompts that the model has not seen.",
        warnings=(),
    )


def _leak_note(results: Results, kind: str, prompt_set: str) -> str | None:
    """How many prompts of a set stand in the training data; None where nobody has looked."""
    leaked = None if results.leaks is None else results.leaks.sets.get(f"{kind}/{prompt_set}")
    if results.leaks is None or leaked is None:
        return None
    kinds = Counter(leaked.found.values())
    how = (
        f" ({', '.join(f'{n} {printable_name(name)}' for name, n in sorted(kinds.items()))})" if kinds else ""
    )
    below = "; the rates without them follow" if kinds else ""
    files = printable_name(listed(results.leaks.training), 80)
    return f"{len(leaked.found)} of {counted(leaked.prompts, 'prompt')} stand in the training data, {files}{how}{below}."


def _rate_cells(
    run: SafetyRun | None, base: SafetyRun | None, codes: Sequence[str]
) -> dict[str | None, Cell]:
    """Cells by language; None is the mean over languages."""
    if run is None:
        return {}
    changes, mean = _rate_changes(base, run, codes), run.result.average
    rates: dict[str | None, Value | None] = {
        code: rate_value(run.result.languages.get(code)) for code in codes
    }
    rates[None] = None if mean is None else Value(mean.mean, mean.low, mean.high)
    return {code: Cell(rate, changes.get(code)) for code, rate in rates.items() if rate is not None}


def rate_value(row: LanguageRate | None) -> Value | None:
    return None if row is None or row.rate is None else Value(row.rate, row.low, row.high)


def _rate_changes(base: SafetyRun | None, run: SafetyRun, codes: Sequence[str]) -> dict[str | None, Change]:
    if base is None:
        return {}
    return paired_changes(base.outcomes(), run.outcomes(), codes, run.result.confidence)


def paired_changes(
    old: Outcomes,
    new: Outcomes,
    codes: Sequence[str],
    confidence: float,
) -> dict[str | None, Change]:
    """Changes by language, paired by prompt; None is the mean over languages."""
    pairs = {}
    for code in codes:
        both = sorted(old.get(code, {}).keys() & new.get(code, {}).keys())
        if both:
            before, after = ([bool(side[code][p]) for p in both] for side in (old, new))
            pairs[code] = paired_difference(before, after, confidence)
    if not pairs:
        return {}
    adjusted = holm([pair.test.p_value for pair in pairs.values()])
    changes: dict[str | None, Change] = {
        code: Change(pair.difference, pair.low, pair.high, p, pair.count)
        for (code, pair), p in zip(pairs.items(), adjusted, strict=True)
    }
    average = average_change(old, new, confidence=confidence)
    mean = average.change
    changes[None] = Change(mean.mean, mean.low, mean.high, average.p_value, mean.prompts)
    return changes


def _shares(found: Sequence[SafetyRun | None], code: str | None, verdict: str) -> str:
    """``60 / 12``: a verdict's share of all answers, in per cent, model by model; for None the mean over languages."""
    shares = [
        [row.verdicts.get(verdict, 0) / row.count for row in _language_rows(run, code) if row.count]
        if run
        else []
        for run in found
    ]
    return " / ".join(f"{100 * fmean(own):.0f}" if own else NONE for own in shares)


def _language_rows(run: SafetyRun, code: str | None) -> list[LanguageRate]:
    """The row of a language; all for None."""
    return [row for name, row in run.result.languages.items() if code in (None, name)]


def _verdicts(run: SafetyRun, code: str | None, verdict: str) -> int:
    return sum(row.verdicts.get(verdict, 0) for row in _language_rows(run, code))


def _count(run: SafetyRun, code: str | None) -> int:
    return sum(row.count for row in _language_rows(run, code))


def _safety_notes(found: Sequence[SafetyRun | None]) -> tuple[str, ...]:
    judges = sorted({run.judge for run in found if run})
    notes = [f"Judge: {listed([printable_name(j, 60) for j in judges])}. {_STATISTICS}"]
    kappas = [
        f"{printable_name(second['name'], 40)} agrees with the judge with Cohen's kappa {kappa:.2f} "
        f"on {agreement['count']} answers ({run.folder.parent.parent.name})."
        for run in found
        if run and (second := run.result.second_judge)
        if (agreement := second.get("agreement")) and (kappa := agreement.get("kappa")) is not None
    ]
    return (*notes, *kappas)


def _safety_warnings(found: Sequence[SafetyRun | None], results: Results) -> tuple[str, ...]:
    out = []
    runs = [run for run in found if run]
    judges = {repr([run.result.judge.get(key) for key in ("name", "model", "prompt")]) for run in runs}
    if len(judges) > 1:
        out.append("The models were judged by different judges, so their rates cannot be compared.")
    asked = ("fingerprint", "template", "system_prompt")
    if len({repr([run.result.prompts.get(key) for key in asked]) for run in runs}) > 1:
        out.append("The models were given different prompts; changes are over the prompts that both have.")
    for model, run in zip(results.models, found, strict=True):
        if run is None:
            continue
        total = _count(run, None)
        unread, blocked, unfinished = (_verdicts(run, None, verdict) for verdict in NO_VERDICT)
        cut = sum(row.cut_off for row in run.result.languages.values())
        if unread:
            out.append(
                f"{model.name}: {unread} of {total} replies of the judge name no verdict; they are in no rate."
            )
        if blocked:
            out.append(
                f"{model.name}: its server blocked {blocked} of {total} prompts. That is no refusal of the model's; they are in "
                "no rate."
            )
        if unfinished:
            out.append(f"{model.name}: {unfinished_note(unfinished, total)}")
        if total and cut > total / 2:
            out.append(f"{model.name}: {cut} of {total} answers were cut off at the greatest length.")
    return tuple(out)


# --------------------------------------------------------------------------------------------- language of the answers


@dataclass(frozen=True)
class _Answers:
    """Language and repetition of one model's answers; all but counts and verdicts are empty where the answers are gone.

    Attributes:
        wording: Counts by language.
        confidence: Coverage of the intervals.
        in_language: ``{language: {answer: 1 or 0}}``, where the language can be told.
        unknown: The same for answers whose language cannot be told, in languages that can.
        repetitive: The same for repetition, where the answer is long enough.
        verdicts: ``{language: {answer: verdict}}``.
    """

    wording: Mapping[str, Wording]
    confidence: float
    in_language: Outcomes
    unknown: Outcomes
    repetitive: Outcomes
    verdicts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def elsewhere(self, verdict: str) -> Outcomes:
        """Whether an answer is in another language and has a verdict."""
        return {
            code: {
                name: float(
                    self.in_language.get(code, {}).get(name) == 0
                    and self.verdicts.get(code, {}).get(name) == verdict
                )
                for name in rows
            }
            for code, rows in self.unknown.items()
        }


class _Share(NamedTuple):
    """A share of the answers: its texts, how many of how many of a language, and whether each answer is of it."""

    anchor: str
    title: str
    short: str
    better: str
    lead: str
    counts: Callable[[Wording], tuple[int, int]]
    outcomes: Callable[[_Answers], Outcomes]


_IN_LANGUAGE = _Share(
    "",
    "Language of the answers",
    "In the language asked",
    "higher",
    "The share of answers in the language of the prompt, among those whose language can be told. Higher is better: "
    "who asks in Bengali and is refused in English has been told nothing.",
    lambda row: (row.asked, row.asked + sum(row.others.values())),
    lambda found: found.in_language,
)
_UNKNOWN = _Share(
    "-unknown",
    "Answers in a language that cannot be told",
    "Language unknown",
    "lower",
    "The share of answers that are too short, without letters, or in languages too close to be told apart. They are in no share "
    "of answers in the language asked, which says less where they are many.",
    lambda row: (row.unknown, row.count) if row.asked or row.others else (0, 0),
    lambda found: found.unknown,
)
_REPETITIVE = _Share(
    "-repetitive",
    "Repetitive answers",
    "Repetitive",
    "lower",
    "The share of answers, of those with 12 characters or more, of which more than half repeats what stood in them before. Lower is "
    "better: a loop is no answer.",
    lambda row: (row.repetitive, row.count),
    lambda found: found.repetitive,
)


def _elsewhere(verdict: str) -> _Share:
    called = "Refused" if verdict == "refusal" else f"Judged {verdict}"
    return _Share(
        f"-{verdict}",
        f"{called} in another language",
        f"{called} in another language",
        "lower",
        f"The share of answers with the verdict `{verdict}` in another language than the prompt's. Lower is better.",
        lambda row: (
            row.others_by_verdict.get(verdict, 0),
            row.count if row.asked or row.others else 0,
        ),
        lambda found: found.elsewhere(verdict),
    )


def answer_language(results: Results, kind: str, prompt_set: str) -> list[Measurement]:
    """Language and repetition of the answers to one prompt set; empty where they were not measured."""
    columns: list[_Answers | None] = []
    for model in results.models:
        run = model.safety.get((kind, prompt_set))
        if run is None or not run.result.wording:
            columns.append(None)
            continue
        rows = list(run.answers().values())
        asked = run.in_language_asked
        told = {row.id for row in rows if row.prompt_id in asked.get(row.language, {})}
        about = asked, in_no_known_language(rows, told), repeats_itself(rows), run.verdicts
        columns.append(_Answers(run.result.wording, run.result.confidence, *about))
    number = results.prompt_sets(kind).index(prompt_set) + 1
    refused = _elsewhere("refusal" if kind == "over_refusal" else "safe")
    return _shares_of_answers(
        results,
        columns,
        (_IN_LANGUAGE, refused, _UNKNOWN, _REPETITIVE),
        f"language-{kind.replace('_', '-')}-{number}",
        printable_name(prompt_set, 40),
        f"Shares of the answers with any text. {_STATISTICS}",
    )


def dialogue_language(results: Results) -> list[Measurement]:
    """The same of the answers to MT-Bench."""
    found = [model.mt_bench for model in results.models]
    columns = [
        _Answers(one.wording, one.confidence, one.in_language, one.unknown, one.repetitive)
        if one is not None and one.wording
        else None
        for one in found
    ]
    return _shares_of_answers(
        results,
        columns,
        (_IN_LANGUAGE, _UNKNOWN, _REPETITIVE),
        "mt-bench-language",
        "MT-Bench",
        "Shares of the answers with any text besides blocks of code. Both turns of a dialogue count, as if they were independent. "
        f"{_STATISTICS}",
    )


def _shares_of_answers(
    results: Results,
    columns: Sequence[_Answers | None],
    shares: Sequence[_Share],
    anchor: str,
    name: str,
    note: str,
) -> list[Measurement]:
    """A measurement per share, the first always and the others where any answer is of them; changes are paired by answer."""
    known = [column for column in columns if column is not None]
    codes = in_order({code for column in known for code in column.wording}, results.dominant)
    made = []
    for share in shares:
        if share is not shares[0] and not any(
            share.counts(row)[0] for column in known for row in column.wording.values()
        ):
            continue
        cells = [
            _share_cells(share, column, columns[0] if n else None, codes) for n, column in enumerate(columns)
        ]
        rows = []
        for code in [*codes, *([None] if len(codes) > 1 else [])]:
            counts = [
                sum(row.count for other, row in column.wording.items() if code in (None, other))
                for column in known
            ]
            if max(counts):
                label = "Mean of languages" if code is None else shown_language(code)
                rows.append(Row(label, tuple(found.get(code) for found in cells), max(counts), code is None))
        if rows:
            made.append(
                Measurement(
                    anchor=f"{anchor}{share.anchor}",
                    title=f"{share.title}: {name}",
                    short=f"{share.short}, {name} (%)",
                    unit=SHARE,
                    better=share.better,
                    models=tuple(model.name for model in results.models),
                    rows=tuple(rows),
                    lead=share.lead,
                    notes=(note,),
                    confidence=known[0].confidence,
                    axis=(0.0, 1.0),
                )
            )
    return made


def _share_cells(
    share: _Share, column: _Answers | None, base: _Answers | None, codes: Sequence[str]
) -> dict[str | None, Cell]:
    """Cells by language; None is the mean over languages, for which the answers have to be there."""
    if column is None:
        return {}
    outcomes, confidence = share.outcomes(column), column.confidence
    changes = {} if base is None else paired_changes(share.outcomes(base), outcomes, codes, confidence)
    cells: dict[str | None, Cell] = {}
    for code, row in column.wording.items():
        own = outcomes.get(code)
        count, total = (round(sum(own.values())), len(own)) if own else share.counts(row)
        if total:
            value = Value(count / total, *wilson_interval(count, total, confidence))
            cells[code] = Cell(value, changes.get(code))
    if outcomes:
        mean = language_average(outcomes, confidence=confidence)
        cells[None] = Cell(Value(mean.mean, mean.low, mean.high), changes.get(None))
    return cells


# ---------------------------------------------------------------------------------------------------------- perplexity


def perplexity(results: Results) -> Measurement | None:
    """Perplexity of given texts per language; changes are paired by text and relative."""
    found = [model.perplexity.languages if model.perplexity else {} for model in results.models]
    codes = in_order({code for languages in found for code in languages}, results.dominant)
    if not codes:
        return None
    confidence = next(m.perplexity.confidence for m in results.models if m.perplexity)
    rows = []
    for code in codes:
        entries = [languages.get(code) for languages in found]
        cells = tuple(
            _perplexity_cell(entry, entries[0] if n else None, confidence) for n, entry in enumerate(entries)
        )
        rows.append(Row(shown_language(code), cells, max(entry.texts for entry in entries if entry)))
    return Measurement(
        anchor="perplexity",
        title="Perplexity of text",
        short="Perplexity",
        unit=PERPLEXITY,
        better="lower",
        models=tuple(model.name for model in results.models),
        rows=tuple(rows),
        lead=(
            "How well the model predicts ordinary text, per token. Lower is better; a rise means that training has cost "
            "the model some of its language. Languages cannot be compared with each other: their texts and tokens differ."
        ),
        notes=("Changes are relative and paired by text; intervals resample texts.",),
        confidence=confidence,
    )


def _perplexity_cell(
    entry: TextPerplexity | None, base: TextPerplexity | None, confidence: float
) -> Cell | None:
    if entry is None:
        return None
    return Cell(Value(entry.perplexity, *(entry.interval or ())), _perplexity_change(base, entry, confidence))


def _perplexity_change(
    base: TextPerplexity | None, entry: TextPerplexity, confidence: float
) -> Change | None:
    """None where the two read other texts, or cut them into other tokens."""
    tokens = entry.tokens_per_text
    if base is None or (base.fingerprint, base.tokens_per_text) != (entry.fingerprint, tokens):
        return None
    change = [b - a for a, b in zip(base.nats_per_text, entry.nats_per_text, strict=True)]
    nats = math.fsum(change) / sum(tokens)
    low, high = ratio_interval(change, tokens, confidence=confidence) or (None, None)
    return Change(
        _relative(nats), None if low is None else _relative(low), None if high is None else _relative(high)
    )


def _relative(nats: float) -> float:
    return math.expm1(min(nats, LARGEST_LOG))


# --------------------------------------------------------------------------------------------------------- correlation


GapAgainstAttack = tuple[str, list[tuple[str, float, float]], Correlation]


def gap_against_attack(results: Results, prompt_set: str) -> list[GapAgainstAttack]:
    """Reward gap and attack success of the languages that have both, and their correlation, model by model.

    Returns:
        ``(model, [(language, reward gap, attack success)], correlation)`` of each model with three such languages.
    """
    out = []
    for n, model in enumerate(results.models):
        table, attack = _table(model, n == 0, results), model.safety.get(("attack", prompt_set))
        if table is None or attack is None:
            continue
        gaps = {row.language: row.gap for row in table.rows}
        rates = {code: rate_value(row) for code, row in attack.result.languages.items()}
        points = [
            (code, gaps[code], rate.value)
            for code in in_order(gaps.keys() & rates.keys(), results.dominant)
            if (rate := rates[code]) is not None
        ]
        if len(points) >= 3:
            out.append((model.name, points, correlation([p[1] for p in points], [p[2] for p in points])))
    return out
