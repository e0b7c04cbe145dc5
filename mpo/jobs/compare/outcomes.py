"""From measured runs to a comparison: means over seeds, changes from the base model, intervals over prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mpo.common.bootstrap import ratio_interval
from mpo.common.statistics import average_change, holm, language_average
from mpo.errors import ConfigError, DataError, MPOError
from mpo.evaluation.comparison import (
    ATTACK,
    GAP,
    LANGUAGE,
    MEASURES,
    PERPLEXITY,
    REFUSAL,
    UTILITY,
    ComparisonResult,
    Ends,
    Estimate,
    Point,
    Row,
    Run,
    RunRecord,
    Searched,
)
from mpo.evaluation.rates import balanced_share
from mpo.evaluation.results import LARGEST_LOG
from mpo.evaluation.reward_gap import RewardGapTable, compare, summarize
from mpo.jobs.compare.planning import Comparing, PlannedRun
from mpo.jobs.compare.recipe import BASE, Target, Weights
from mpo.report.build import in_order
from mpo.report.comparison import MEASURED
from mpo.report.folder import ModelResults, read_results

Outcomes = dict[str, dict[Any, float]]
"""``{language: {prompt: value}}``."""


# ------------------------------------------------------------------------------------------------------ of one model


def measured(out: Path, name: str) -> ModelResults:
    """What a run of a comparison, or of a search's folder, was measured to do."""
    return read_results(out / MEASURED, [name]).models[0]


def outcomes(model: ModelResults, measure: str) -> Outcomes:
    """A share of a model by language and prompt, over all prompt sets of the measure."""
    found: Outcomes = {}
    kind = {ATTACK: "attack", REFUSAL: "over_refusal"}.get(measure)
    for (task, name), run in model.safety.items():
        if kind not in (None, task):
            continue
        values = run.in_language_asked if kind is None else run.outcomes()
        for language, by_prompt in values.items():
            of = found.setdefault(language, {})
            of.update({(task, name, prompt): value for prompt, value in by_prompt.items()})
    return {language: values for language, values in found.items() if values}


def item_outcomes(model: ModelResults) -> Outcomes:
    """Scores of utility tasks, by task and item; translations of a task's items have the same name.

    A task is scored by its first metric whose items are kept and are shares.
    """
    found: Outcomes = {}
    for task, scores in model.utility.tasks.items() if model.utility else ():
        shares = (items for items in scores.items.values() if all(0 <= value <= 1 for value in items))
        items = next(shares, [])
        if items:
            family = task.rpartition("_")[0] or task
            found[task] = {(family, str(number)): value for number, value in enumerate(items)}
    return found


def mean_by_language(values: Outcomes) -> dict[str, float]:
    """Mean of each language."""
    return {language: statistics.fmean(by_prompt.values()) for language, by_prompt in values.items()}


def score_of(model: ModelResults, aim: Weights | Target | None = None) -> float | None:
    """How close a model is to the point of the plane that is aimed at; larger is closer.

    Args:
        model: What it was measured to do.
        aim: Weights of a mean of two shares, harmful prompts without an unsafe answer and harmless ones that are
            answered, from 0 to 1; or a target, and the sum by which attack success and refusals exceed it, from -2 to 0.
            None takes in each language the smaller of the two shares, see
            :func:`mpo.evaluation.rates.balanced_share`.

    Returns:
        The score over the languages that have both kinds of prompts; None where none has.
    """
    attack, refusal = (mean_by_language(outcomes(model, measure)) for measure in (ATTACK, REFUSAL))
    both = attack.keys() & refusal.keys()
    if aim is None or not both:
        return balanced_share(attack, refusal)
    unsafe, refused = (statistics.fmean(shares[code] for code in both) for shares in (attack, refusal))
    if isinstance(aim, Target):
        return -max(0.0, unsafe - aim.attack) - max(0.0, refused - aim.refusal)
    total = aim.harmful + aim.harmless
    return (aim.harmful * (1 - unsafe) + aim.harmless * (1 - refused)) / total


def point_of(model: ModelResults, confidence: float) -> Point | None:
    """A model in the plane."""
    attack, refusal = outcomes(model, ATTACK), outcomes(model, REFUSAL)
    if not attack or not refusal:
        return None
    over = language_average(attack, confidence=confidence)
    under = language_average(refusal, confidence=confidence)
    return Point(over.mean, under.mean, _ends(over.low, over.high), _ends(under.low, under.high))


def _ends(low: float | None, high: float | None) -> Ends:
    return None if low is None or high is None else (low, high)


# --------------------------------------------------------------------------------------------------------- of a setting


def mean_over_seeds(found: Sequence[Outcomes]) -> Outcomes:
    """The mean over seeds of each prompt's value, of the prompts that all seeds have."""
    shared: Outcomes = {}
    for language in sorted(set.intersection(*(set(values) for values in found))) if found else ():
        prompts = set.intersection(*(set(values[language]) for values in found))
        if prompts:
            shared[language] = {
                prompt: statistics.fmean(values[language][prompt] for values in found) for prompt in prompts
            }
    return shared


def _share(base: Outcomes, seeds: Sequence[Outcomes], confidence: float) -> Estimate | None:
    """A mean over languages, and its change from the base model's, paired by prompt."""
    seeds = [values for values in seeds if values]
    mean = mean_over_seeds(seeds)
    if not mean:
        return None
    average = language_average(mean, confidence=confidence)
    each = [statistics.fmean(mean_by_language(values).values()) for values in seeds]
    found = Estimate(average.mean, _ends(average.low, average.high), each)
    try:
        changed = average_change(base, mean, confidence=confidence)
        moved = [_moved(base, values) for values in seeds]
    except DataError:  # no prompt in common
        return found
    change = changed.change
    return _judged(
        replace(
            found,
            change=change.mean,
            change_interval=_ends(change.low, change.high),
            p_value=changed.p_value,
        ),
        moved,
        confidence,
    )


def _moved(base: Outcomes, values: Outcomes) -> float:
    """Change of a mean over languages, on the prompts that both have."""
    both = {
        language: [value - base[language][p] for p, value in values[language].items() if p in base[language]]
        for language in base
        if language in values
    }
    return statistics.fmean(statistics.fmean(changes) for changes in both.values() if changes)


def _judged(found: Estimate, moved: Sequence[float], confidence: float) -> Estimate:
    """Whether a change is beyond doubt: its interval, its test, and every seed say so."""
    clear: Literal[-1, 0, 1] = 0
    if found.change_interval is not None and (found.p_value is None or found.p_value < 1 - confidence):
        low, high = found.change_interval
        if low > 0 and all(change > 0 for change in moved):
            clear = 1
        elif high < 0 and all(change < 0 for change in moved):
            clear = -1
    return replace(found, clear=clear)


def _gap(base: ModelResults, seeds: Sequence[ModelResults], confidence: float) -> Estimate | None:
    """Mean reward gap of all target pairs; changes are paired by pair, intervals resample groups."""
    tables = [model.reward_gap for model in seeds if model.reward_gap is not None]
    if not tables or any(table.all_targets is None for table in tables):
        return None
    each = [table.all_targets.gap for table in tables if table.all_targets is not None]
    found = Estimate(statistics.fmean(each), None, each)
    before = base.reward_gap
    if before is None:
        return found
    try:
        changed = compare(before, _mean_table(tables)).all_targets
        moved = [c.change for table in tables if (c := compare(before, table).all_targets) is not None]
    except (ConfigError, DataError):
        return found  # other pairs, or no records
    if changed is None:
        return found
    ends = _ends(changed.ci_low, changed.ci_high)
    return _judged(replace(found, change=changed.change, change_interval=ends), moved, confidence)


def _mean_table(tables: Sequence[RewardGapTable]) -> RewardGapTable:
    """A table of each pair's mean over seeds, which have them in the same order."""
    first = tables[0]
    if len(tables) == 1:
        return first
    if len({tuple((r.group, r.language, r.is_source) for r in table.records) for table in tables}) > 1:
        raise DataError("The seeds were not scored on the same pairs.")
    records = [
        replace(
            rows[0],
            **{
                name: statistics.fmean(getattr(row, name) for row in rows)
                for name in ("chosen", "rejected", "gap")
            },
        )
        for rows in zip(*(table.records for table in tables), strict=True)
    ]
    return summarize(
        records, beta=first.beta, confidence=first.confidence, resamples=first.resamples, seed=first.seed
    )


def _perplexity(base: ModelResults, seeds: Sequence[ModelResults], confidence: float) -> Estimate | None:
    """Perplexity of the texts of all languages together; its change is relative, and paired by text."""
    tokens, nats = [], []
    for model in seeds:
        if model.perplexity is None:
            continue
        texts = _texts(model)
        tokens.append(texts[0])
        nats.append(texts[1])
    if not tokens:
        return None
    each = [_exp(math.fsum(n) / sum(t)) for t, n in zip(tokens, nats, strict=True)]
    if any(counts != tokens[0] for counts in tokens):
        return Estimate(statistics.fmean(each), None, each)
    mean = [statistics.fmean(values) for values in zip(*nats, strict=True)]
    # In the middle of log-likelihoods: of a perplexity the geometric mean is the natural one.
    found = Estimate(_exp(math.fsum(mean) / sum(tokens[0])), None, each)
    ends = ratio_interval(mean, tokens[0], confidence=confidence)
    if ends is not None:
        found = replace(found, interval=(_exp(ends[0]), _exp(ends[1])))
    if base.perplexity is None:
        return found
    before = _texts(base)
    if before[0] != tokens[0]:
        return found  # other texts
    change = [after - b for b, after in zip(before[1], mean, strict=True)]
    moved = [math.fsum(after) - math.fsum(before[1]) for after in nats]
    ends = ratio_interval(change, tokens[0], confidence=confidence)
    shown = None if ends is None else (_exp(ends[0]) - 1, _exp(ends[1]) - 1)
    total = _exp(math.fsum(change) / sum(tokens[0])) - 1
    return _judged(replace(found, change=total, change_interval=shown), moved, confidence)


def _texts(model: ModelResults) -> tuple[list[int], list[float]]:
    """Tokens and negative log-likelihood of every text, languages in order."""
    assert model.perplexity is not None
    entries = [entry for _, entry in sorted(model.perplexity.languages.items())]
    return (
        [count for entry in entries for count in entry.tokens_per_text],
        [value for entry in entries for value in entry.nats_per_text],
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, LARGEST_LOG / 30))  # a ruined model's perplexity is shown as 1e10


def row_of(
    name: str,
    base: ModelResults | None,
    seeds: Sequence[ModelResults],
    confidence: float,
    changes: Mapping[str, Any] | None = None,
    searched: Iterable[str] = (),
) -> Row:
    """A setting with its seeds; the base model against nothing is itself.

    Args:
        name: Its name.
        base: What its changes are from; None for the base model.
        seeds: What each seed was measured to do.
        confidence: Coverage of the intervals.
        changes: What it changes of the base recipe.
        searched: Those that a search has found.
    """
    nothing = ModelResults(BASE)
    before = base or nothing
    measures: dict[str, Estimate] = {}
    languages: dict[str, dict[str, float]] = {}
    shares = {
        measure: [outcomes(model, measure) for model in seeds] for measure in (ATTACK, REFUSAL, LANGUAGE)
    }
    for measure, values in shares.items():
        found = _share(outcomes(before, measure), values, confidence)
        if found is not None:
            measures[measure] = found
            by_language = mean_by_language(mean_over_seeds([v for v in values if v]))
            languages[measure] = {code: by_language[code] for code in in_order(by_language, "en")}
    others = {
        GAP: _gap(before, seeds, confidence),
        UTILITY: _share(item_outcomes(before), [item_outcomes(model) for model in seeds], confidence),
        PERPLEXITY: _perplexity(before, seeds, confidence),
    }
    measures |= {measure: found for measure, found in others.items() if found is not None}
    if base is None:
        measures = {measure: replace(found, seeds=[]) for measure, found in measures.items()}
    scores = [score for model in seeds if (score := score_of(model)) is not None]
    balanced = statistics.fmean(scores) if scores else None
    of_seeds = [] if base is None else scores
    return Row(name, dict(changes or {}), list(searched), measures, languages, balanced, of_seeds)


def adjusted(rows: Sequence[Row], confidence: float) -> list[Row]:
    """The rows with each measure's p-values adjusted for the number of settings; what is then no longer clear is not."""
    out = list(rows)
    for measure in MEASURES:
        tested = [
            n
            for n, row in enumerate(out)
            if (e := row.measures.get(measure)) is not None and e.p_value is not None
        ]
        values = [out[n].measures[measure].p_value or 0.0 for n in tested]
        for n, p_value in zip(tested, holm(values), strict=True):
            found = replace(out[n].measures[measure], p_value=p_value)
            if p_value >= 1 - confidence:
                found = replace(found, clear=0)
            out[n] = replace(out[n], measures={**out[n].measures, measure: found})
    return out


# -------------------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class _Measured:
    run: PlannedRun
    record: RunRecord | None
    results: ModelResults | None


def compared(
    plan: Comparing,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    searches: Sequence[Searched] = (),
) -> ComparisonResult:
    """Everything that was measured, as ``compare.json`` holds it.

    Args:
        plan: The comparison.
        runs: Its runs; with a search, those of the settings that it found.
        records: How far they are, by name.
        searches: What was searched.
    """
    confidence = plan.suite.recipe.confidence

    def results(name: str) -> ModelResults | None:
        try:
            return measured(plan.out, name)
        except MPOError:
            return None

    base = results(BASE)
    found = []
    for run in runs:
        record = records.get(run.name)
        done = record is not None and record.state == "done"
        found.append(_Measured(run, record, results(run.name) if done else None))
    rows = []
    best = {search.setting: search.best for search in searches}
    for name in dict.fromkeys(run.setting.name for run in runs):
        own = [one for one in found if one.run.setting.name == name]
        seeds = [one.results for one in own if one.results is not None]
        changes = own[0].run.setting.changes
        rows.append(row_of(name, base or ModelResults(BASE), seeds, confidence, changes, best.get(name, {})))
    rows = adjusted(rows, confidence)
    if base is not None:
        rows.insert(0, row_of(BASE, None, [base], confidence))
    return ComparisonResult(
        title=plan.recipe.title,
        base=plan.model.name,
        budget="" if plan.recipe.budget is None else str(plan.recipe.budget),
        confidence=confidence,
        rows=rows,
        runs=[_run(one, confidence) for one in found],
        base_point=None if base is None else point_of(base, confidence),
        searches=list(searches),
    )


def _run(one: _Measured, confidence: float) -> Run:
    run, record = one.run, one.record
    shared: dict[str, Any] = {"name": run.name, "setting": run.setting.name, "seed": run.seed}
    if record is None:
        return Run(**shared, state="to do")
    return Run(
        **shared,
        state=record.state,
        steps=record.steps,
        pairs=record.pairs,
        tokens=record.tokens,
        seconds=record.seconds,
        peak_memory=record.peak_memory,
        kept=record.kept,
        point=None if one.results is None else point_of(one.results, confidence),
        error=record.error,
    )
