"""The result file of every measurement: what it holds.

::

    suite.json                                 SuiteIndex
    MODEL/reward_gap.json                      RewardGapResult
    MODEL/attack/PROMPTS/result.json           SafetyResult, and so over_refusal/PROMPTS/result.json
    MODEL/attack/PROMPTS/answers.jsonl         rows of mpo.evaluation.answers.AnswerRow
    MODEL/attack/PROMPTS/verdicts.JUDGE.jsonl  rows of mpo.evaluation.verdicts.VerdictRow
    MODEL/utility.json                         UtilityResult
    MODEL/perplexity.json                      PerplexityResult
    MODEL/mt_bench.json                        MTBenchResult
    MODEL/mt_bench/answers.jsonl               rows of mpo.evaluation.mt_bench.TurnRow
    MODEL/mt_bench/grades.JUDGE.jsonl          rows of mpo.evaluation.mt_bench.GradeRow
    hidden_space/hidden_space.json             mpo.hidden_space.results.HiddenSpace
    metrics.json                               TrainingMetrics, beside a trained model
    leaks.json                                 LeaksResult, beside suite.json and beside a trained model
    judge.json                                 JudgeResult, beside suite.json

All are written by :func:`~mpo.common.typed_json.write_typed` and read by :func:`~mpo.common.typed_json.read_typed`, the
reward gap by :func:`write_reward_gap` and :func:`read_reward_gap`. ``version`` is the version of a file's form; a file
without it is older than this key and has version 1. That of ``result.json`` holds for the rows beside it, too. It rises
when an older reader would misunderstand a file; a new key needs no new version.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from mpo.common.files import write_json
from mpo.common.provenance import Provenance, Result
from mpo.common.typed_json import (
    FROM_LIST,
    NO_KEY_IF_EMPTY,
    Confidence,
    Count,
    Number,
    Share,
    named_by_key,
    open_mapping,
    read_typed,
)
from mpo.evaluation.probe.change import BehaviorChange
from mpo.evaluation.rates import RateTable
from mpo.evaluation.reward_gap import Comparison, RewardGapTable
from mpo.evaluation.tasks import TASKS
from mpo.evaluation.wording import Wording

REWARD_GAP = "reward_gap.json"
HARMLESS_GAP = "reward_gap_harmless.json"
SAFETY = "result.json"
UTILITY = "utility.json"
PERPLEXITY = "perplexity.json"
MT_BENCH = "mt_bench.json"
SUITE = "suite.json"
METRICS = "metrics.json"
LEAKS = "leaks.json"
JUDGE = "judge.json"

Model = Annotated[
    dict[str, Any], open_mapping(name=str, model=str | None, adapter=str | None, revision=str | None)
]
"""What was measured: names, and whatever else identifies it."""


# ---------------------------------------------------------------------------------------------------------- reward gap

Table = Annotated[RewardGapTable, PlainSerializer(lambda table: table.to_dict(records=True))]


@dataclass(frozen=True, kw_only=True)
class RewardGapResult(Result):
    """``reward_gap.json``.

    Attributes:
        after: The model's table.
        before: That of its base model on the same pairs, where the model is an adapter.
    """

    after: Table
    before: Table | None = None


def write_reward_gap(
    path: str | Path, measured: RewardGapTable | Comparison, provenance: Provenance | None = None
) -> Path:
    """Write ``reward_gap.json``: the keys of a table, or of a comparison, with the scores of every pair.

    Raises:
        StorageError: It cannot be written.
    """
    made = Result(provenance=provenance or {})
    return write_json(
        path,
        {"version": made.version, **measured.to_dict(records=True), "provenance": made.provenance},
    )


def read_reward_gap(path: str | Path) -> RewardGapResult:
    """Read ``reward_gap.json``.

    Raises:
        StorageError: It cannot be read, or is damaged; see :func:`~mpo.common.typed_json.read_typed`.
    """
    made = read_typed(path, Result)
    if "after" in read_typed(path, dict[str, Any]):
        return read_typed(path, RewardGapResult)
    return RewardGapResult(after=read_typed(path, RewardGapTable), provenance=made.provenance)


@dataclass(frozen=True, kw_only=True)
class TrainingMetrics(Result):
    """``metrics.json``: what a training run measured of itself.

    Attributes:
        beta: Scale of the target gap.
        held_out_groups: Number of groups that were measured on; with 0 the four after it are None.
        before: Table before training.
        after: Table after it.
        change: The paired change, as :meth:`Comparison.to_dict` gives it.
        harmless: Tables of the held-out harmless groups, ``before`` and ``after``, where there are some; the others are then
            of the harmful ones.
        retention_loss: The retention term on the held-out sources ``before`` and ``after``; None where it was not computed.
        sources: How many sources were trained on and left out.
        steps: Number of optimizer steps.
        train_runtime: Seconds.
        pairs: Pairs trained on, each counted as often as it was; None in older files, as the next two.
        tokens: Tokens that were run for them.
        peak_memory: Most bytes held at once: on the accelerator of the main process, or by it where there is none.
        behavior: What the model does with the probe prompts, before and after; None where it was not asked.
    """

    beta: Number | None = None
    held_out_groups: Count = 0
    before: Annotated[Table | None, NO_KEY_IF_EMPTY] = None
    after: Annotated[Table | None, NO_KEY_IF_EMPTY] = None
    change: Annotated[dict[str, Any] | None, NO_KEY_IF_EMPTY] = None
    harmless: Annotated[dict[str, Table], NO_KEY_IF_EMPTY] = field(default_factory=dict)
    retention_loss: Annotated[dict[str, Number | None], NO_KEY_IF_EMPTY] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    steps: Count = 0
    train_runtime: Number | None = None
    pairs: Count | None = None
    tokens: Count | None = None
    peak_memory: Count | None = None
    behavior: Annotated[BehaviorChange | None, NO_KEY_IF_EMPTY] = None


# -------------------------------------------------------------------------------------------- attack and over-refusal

Judge = Annotated[dict[str, Any], open_mapping("name", name=str, unparsed=Count)]
"""Name and settings of a judge, and how many of its replies name no verdict."""

SecondJudge = Annotated[
    dict[str, Any],
    open_mapping(
        "name",
        name=str,
        unparsed=Count,
        languages=dict[str, Any],
        agreement=Annotated[
            dict[str, Any], open_mapping("count", count=Count, agreement=Share, kappa=Number | None)
        ]
        | None,
    ),
]
"""The same, with its rates and its agreement with the first."""


@dataclass(frozen=True, kw_only=True)
class SafetyResult(Result, RateTable):
    """``result.json`` of one model on one prompt set; beside it are the answers and the verdicts.

    Attributes:
        measurement: Name of the task.
        prompt_set: Name of the prompts.
        prompts: Where they came from, how many there are, their fingerprint, and what was put around them.
        model: What answered.
        engine: What ran it, and how it answered.
        judge: What judged.
        second_judge: A second opinion on the same answers.
        wording: Language and repetition of the answers, by the prompts' language; empty in older files.
    """

    measurement: Annotated[str, Field(pattern=f"^({'|'.join(TASKS)})$")]
    prompt_set: str = ""
    prompts: dict[str, Any] = field(default_factory=dict)
    model: Model = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    judge: Judge
    second_judge: Annotated[SecondJudge | None, NO_KEY_IF_EMPTY] = None
    wording: Annotated[dict[str, Wording], named_by_key("language"), NO_KEY_IF_EMPTY] = field(
        default_factory=dict
    )


# ----------------------------------------------------------------------------------------------- judges against labels

_Interval = Annotated[tuple[Share, Share], FROM_LIST] | None
_KappaInterval = Annotated[tuple[Number, Number], FROM_LIST] | None


@dataclass(frozen=True)
class CorrectedRate:
    """A rate as the judge gave it, and without the judge's mistakes.

    Attributes:
        answers: Answers with a readable verdict.
        raw: Share of the counted verdict.
        corrected: The same by Rogan and Gladen; None where the labels do not allow it.
        interval: Its bootstrap interval, over labels and prompts; None with `corrected`.
    """

    answers: Count
    raw: Share
    corrected: Share | None = None
    interval: _Interval = None


@dataclass(frozen=True)
class JudgeAccuracy:
    """A judge against labels in one language, weighted by how many answers each label stands for.

    Attributes:
        answers: Answers with a readable verdict, of all models.
        labels: How many of them have a label.
        counts: Labelled answers by ``VERDICT/LABEL``.
        sensitivity: Share of the answers with the counted label that got the counted verdict; None without such a label.
        sensitivity_interval: Wilson's, with an effective number of answers.
        specificity: Share of the others that did not get it; None where all labels are the counted one.
        specificity_interval: The same.
        kappa: Cohen's, counted or not; None where verdicts and labels are all alike.
        kappa_interval: Its bootstrap interval.
        reason: Why no rate is corrected; None where rates are.
        rates: By ``MODEL/PROMPTS``.
    """

    answers: Count
    labels: Count
    counts: dict[str, Count] = field(default_factory=dict)
    sensitivity: Share | None = None
    sensitivity_interval: _Interval = None
    specificity: Share | None = None
    specificity_interval: _Interval = None
    kappa: Number | None = None
    kappa_interval: _KappaInterval = None
    reason: str | None = None
    rates: dict[str, CorrectedRate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MeasuredJudge:
    """One judge of one task against labels.

    Attributes:
        judge: Its name.
        measurement: Name of the task.
        counted: The verdict whose share is the rate.
        languages: By code.
        overall: All languages together, each answer weighing the same.
        means: Means of the languages' rates by ``MODEL/PROMPTS``, corrected where each of them could be.
    """

    judge: str
    measurement: Annotated[str, Field(pattern=f"^({'|'.join(TASKS)})$")]
    counted: str
    languages: dict[str, JudgeAccuracy]
    overall: JudgeAccuracy
    means: dict[str, CorrectedRate] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JudgeResult(Result):
    """``judge.json``: judges against labels of people.

    Attributes:
        labels_file: Name of the file with the labels.
        labels: Number of labels in it.
        confidence: Coverage of the intervals.
        judges: One per judge and task.
        judged: Hashes of the answers with their verdicts that the judges were measured on, by ``TASK/MODEL/PROMPTS``; empty in
            older files.
    """

    measurement: Literal["judge"] = "judge"
    labels_file: str = ""
    labels: Count = 0
    confidence: Confidence = 0.95
    judges: list[MeasuredJudge]
    judged: Annotated[dict[str, str], NO_KEY_IF_EMPTY] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------- utility and perplexity


@dataclass(frozen=True)
class Score:
    """One metric of a task with its standard error; None where it is not finite or was not given."""

    value: Annotated[float, Field(ge=-1e300, le=1e300)] | None
    stderr: Annotated[float, Field(ge=0, le=1e300)] | None = None


@dataclass(frozen=True)
class TaskScores:
    """One task of lm-evaluation-harness.

    Attributes:
        count: Number of items.
        metrics: Scores by ``METRIC,FILTER``.
        items: Each item's value of a metric, in order, where the metric is their mean.
    """

    metrics: dict[str, Score]
    count: Count | None = None
    items: dict[str, list[Number]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class UtilityResult(Result):
    """``utility.json``: scores by task."""

    measurement: Literal["utility"] = "utility"
    model: Model = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskScores]


LARGEST_LOG = 690.0
"""Of a number whose exponential is taken: the perplexity of a ruined model that no float could hold is e^690."""

Perplexity = Annotated[float, Field(gt=0, le=1e300)]


@dataclass(frozen=True)
class TextPerplexity:
    """Perplexity of the texts of one language.

    Attributes:
        texts: Number of texts.
        tokens: Number of tokens that are predicted, the first of each text left out.
        perplexity: ``exp`` of the mean negative log-likelihood per token.
        interval: Its confidence interval, which resamples texts; None with fewer than two.
        fingerprint: Hash of the texts.
        tokens_per_text: ``[texts]``.
        nats_per_text: ``[texts]`` negative log-likelihoods.
        cut: Texts longer than the limit.
        bits_per_byte: By which models with different tokenizers can be compared; None where texts were cut.
    """

    texts: Count
    tokens: Count
    perplexity: Perplexity
    interval: Annotated[tuple[Perplexity, Perplexity], FROM_LIST] | None
    fingerprint: str
    tokens_per_text: Annotated[list[Annotated[int, Field(ge=1, le=10**9)]], Field(min_length=1)]
    nats_per_text: list[Number]
    cut: Count = 0
    bits_per_byte: Number | None = None

    def __post_init__(self) -> None:
        if len(self.nats_per_text) != len(self.tokens_per_text):
            raise ValueError("as many `nats_per_text` as `tokens_per_text`")


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(Result):
    """``perplexity.json``: perplexity by language."""

    measurement: Literal["perplexity"] = "perplexity"
    model: Model = field(default_factory=dict)
    max_length: Count | None = None
    confidence: Confidence = 0.95
    languages: dict[str, TextPerplexity]


GradeOf10 = Annotated[float, Field(ge=1, le=10)]
# The mean of tens may be ten and a rounding error.
_MeanGrade = Annotated[float, Field(ge=1 - 1e-9, le=10 + 1e-9)]


@dataclass(frozen=True)
class GradeMean:
    """A mean grade.

    Attributes:
        count: Answers that have a grade; for a mean of languages, questions.
        mean: None without any.
        interval: Bootstrap interval over questions; None with fewer than two.
    """

    count: Count
    mean: _MeanGrade | None = None
    interval: Annotated[tuple[_MeanGrade, _MeanGrade], FROM_LIST] | None = None


@dataclass(frozen=True)
class LanguageGrades:
    """Grades in one language.

    Attributes:
        questions: Number of questions.
        ungraded: Answers without a grade: blocked, or the judge's reply names none.
        mean: Of all graded answers.
        turns: Of the first and of the second turn.
        categories: By category.
    """

    questions: Count
    ungraded: Count
    mean: GradeMean
    turns: list[GradeMean]
    categories: dict[str, GradeMean]


@dataclass(frozen=True, kw_only=True)
class MTBenchResult(Result):
    """``mt_bench.json``.

    Attributes:
        model: What answered.
        questions: Where they came from, how many there are, their fingerprint.
        engine: What ran the model, and how it answered.
        judge: What graded.
        confidence: Coverage of the intervals.
        languages: By code.
        categories: By category, over all languages.
        average: Mean of the languages, each weighing the same.
        items: Grades of a question's turns, by ``QUESTION_ID/LANGUAGE``.
        wording: Language and repetition of the answers, by the questions' language; empty in older files, as the next three.
        in_language: ``{language: {QUESTION_ID/TURN: 1 or 0}}``: is the answer in the language of its question? Left out where
            that cannot be told.
        unknown: The same for answers whose language cannot be told, in languages that can.
        repetitive: The same for repetition, where the answer is long enough.
    """

    measurement: Literal["mt_bench"] = "mt_bench"
    model: Model = field(default_factory=dict)
    questions: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    judge: Annotated[dict[str, Any], open_mapping("name", name=str)]
    confidence: Confidence = 0.95
    languages: dict[str, LanguageGrades]
    categories: dict[str, GradeMean] = field(default_factory=dict)
    average: GradeMean
    items: dict[str, list[GradeOf10 | None]] = field(default_factory=dict)
    wording: Annotated[dict[str, Wording], named_by_key("language"), NO_KEY_IF_EMPTY] = field(
        default_factory=dict
    )
    in_language: Annotated[dict[str, dict[str, Share]], NO_KEY_IF_EMPTY] = field(default_factory=dict)
    unknown: Annotated[dict[str, dict[str, Share]], NO_KEY_IF_EMPTY] = field(default_factory=dict)
    repetitive: Annotated[dict[str, dict[str, Share]], NO_KEY_IF_EMPTY] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------------- suite


@dataclass(frozen=True, kw_only=True)
class SuiteIndex(Result):
    """``suite.json``.

    Attributes:
        models: Names of the models in the order of every table.
        done: Fingerprint of the settings of each measurement that is complete.
    """

    models: list[str]
    done: dict[str, str] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------------- leaks


@dataclass(frozen=True)
class LeakedPrompts:
    """One prompt set's prompts that stand in training data.

    Attributes:
        prompts: Number of prompts of the set, translations counted once.
        found: How each that was found was found, by its id; see :data:`mpo.data.leaks.KINDS`.
        pairs: Each with the training row it was found in, as :meth:`mpo.data.leaks.Leak.to_dict` gives it.
    """

    prompts: Count
    found: dict[str, str] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LeaksResult(Result):
    """``leaks.json``: evaluation prompts that stand in training data.

    Attributes:
        training: Names of the training files.
        rows: Training rows, or groups, that were read.
        sets: By prompt set; in a suite by ``MEASUREMENT/PROMPTS``.
    """

    training: list[str] = field(default_factory=list)
    rows: Count = 0
    sets: dict[str, LeakedPrompts] = field(default_factory=dict)
