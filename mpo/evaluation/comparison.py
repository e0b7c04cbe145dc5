"""``compare.json``: runs of several settings, measured alike, with their changes from the model they all started from.

::

    compare.json            ComparisonResult
    runs/RUN/run.json       RunRecord: one training run and its measurement
    measured/MODEL/...      the results of the suite, as mpo.evaluation.results has them

Two kinds of doubt are kept apart. An *interval* is over prompts: which of them happened to be asked. The *spread* is over
seeds: what another order of the data and another adapter would have given. Neither contains the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mpo.common.provenance import Result
from mpo.common.typed_json import FROM_LIST, NO_KEY_IF_EMPTY, Confidence, Count, Number

COMPARISON = "compare.json"
RUN = "run.json"

ATTACK, REFUSAL, LANGUAGE = "attack_success", "over_refusal", "in_language"
GAP, UTILITY, PERPLEXITY = "reward_gap", "utility", "perplexity"
MEASURES = (ATTACK, REFUSAL, LANGUAGE, GAP, UTILITY, PERPLEXITY)
"""What a comparison may hold, in the order of its tables."""

LOWER_IS_BETTER = frozenset({ATTACK, REFUSAL, PERPLEXITY})

Ends = Annotated[tuple[Number, Number], FROM_LIST] | None


@dataclass(frozen=True, kw_only=True)
class RunRecord(Result):
    """``run.json``: where a run stands, and what decides its result.

    Attributes:
        state: ``started``, ``trained`` (and not measured yet), ``done``, or ``failed``.
        settings: Settings of its recipe, with the fingerprint of its data.
        suite: Settings of the suite that has measured it, with the fingerprints of its prompts; empty before.
        steps, pairs, tokens: What it has trained on; 0 before it is trained.
        seconds: Wall time of its training processes, reading the model and the reference pass included.
        peak_memory: Bytes; see :class:`~mpo.evaluation.results.TrainingMetrics`.
        kept: Whether its trained weights are still there.
        error: Why it failed.
    """

    state: Literal["started", "trained", "done", "failed"]
    settings: dict[str, Any]
    suite: Annotated[dict[str, Any], NO_KEY_IF_EMPTY] = field(default_factory=dict)
    steps: Count = 0
    pairs: Count | None = None
    tokens: Count | None = None
    seconds: Number = 0.0
    peak_memory: Count | None = None
    kept: bool = True
    error: str = ""


@dataclass(frozen=True)
class Estimate:
    """A measure of a model, or of a setting: the mean of its seeds.

    Attributes:
        value: A share, nats per token, a score or a perplexity.
        interval: Over prompts, pairs, items or texts; None where there is none.
        seeds: Value of each seed, in order; empty for the model that is not trained.
        change: From the base model on the same prompts; relative for a perplexity. None where they are not the same.
        change_interval: Of the change, paired by prompt.
        p_value: Of the paired test, adjusted after Holm for the number of settings; None where there is none.
        clear: 1 or -1 where the change is up or down beyond doubt: its interval leaves zero out, its test, if there is one,
            rejects, and every seed moved that way. Else 0.
    """

    value: Number
    interval: Ends = None
    seeds: list[Number] = field(default_factory=list)
    change: Number | None = None
    change_interval: Ends = None
    p_value: Number | None = None
    clear: Literal[-1, 0, 1] = 0


@dataclass(frozen=True)
class Row:
    """A setting, or the base model.

    Attributes:
        name: Its name.
        changes: What it changes of the base recipe.
        searched: Those of them that a search has found.
        measures: By name.
        languages: Mean over seeds of each measure that has languages, by measure and language.
        balanced: Mean over seeds of :func:`mpo.evaluation.rates.balanced_share`; None where one of the two was not measured.
        balanced_seeds: That of each seed, in order; empty for the model that is not trained.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list)
    measures: dict[str, Estimate] = field(default_factory=dict)
    languages: dict[str, dict[str, Number]] = field(default_factory=dict)
    balanced: Number | None = None
    balanced_seeds: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """A run in the plane: mean over languages of two shares, each with its interval over prompts.

    Attributes:
        attack: Attack success.
        refusal: Harmless prompts refused.
    """

    attack: Number
    refusal: Number
    attack_interval: Ends = None
    refusal_interval: Ends = None


@dataclass(frozen=True)
class Run:
    """One seed of a setting.

    Attributes:
        name: Its folder.
        setting: Name of its row.
        seed: Its seed.
        state: As in :class:`RunRecord`.
        point: None where one of the two shares was not measured.
        error: Why it failed.
    """

    name: str
    setting: str
    seed: Count
    state: str
    steps: Count = 0
    pairs: Count | None = None
    tokens: Count | None = None
    seconds: Number = 0.0
    peak_memory: Count | None = None
    kept: bool = False
    point: Point | None = None
    error: str = ""


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        values: What was tried.
        score: What is made as large as possible; None where the trial failed.
        error: Why it failed.
    """

    values: dict[str, Any]
    score: Number | None = None
    error: str = ""


@dataclass(frozen=True)
class Searched:
    """The search of one setting.

    Attributes:
        setting: Its name.
        trials: In order.
        best: The values that were taken.
    """

    setting: str
    trials: list[Trial]
    best: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ComparisonResult(Result):
    """``compare.json``.

    Attributes:
        title: Heading of the page.
        base: The model that all runs start from.
        budget: What every run was given.
        confidence: Coverage of the intervals.
        rows: The base model, then the settings.
        runs: Every run, also those that failed.
        base_point: The base model in the plane.
        searches: What was searched before.
    """

    title: str
    base: str
    budget: str = ""
    confidence: Confidence = 0.95
    rows: list[Row]
    runs: list[Run]
    base_point: Point | None = None
    searches: list[Searched] = field(default_factory=list)
