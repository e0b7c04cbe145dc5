"""The recipe of a suite: which models, which measurements, with which settings. One YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpo.common.checks import check_beta, check_confidence, check_limit, check_max_length
from mpo.common.typed_yaml import Document
from mpo.errors import ConfigError
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.judges import JudgeChoice

PAPER_TASKS = tuple(
    f"{family}_{code}"
    for family, codes in (
        ("mgsm_direct", ("en", "zh", "ja", "bn", "sw")),
        ("global_mmlu", ("en", "zh", "ja", "ko", "ar", "bn", "sw")),
    )
    for code in codes
)
"""Reasoning and knowledge in English and the target languages of Zhao et al. (ACL 2025); MGSM has no Korean and Arabic."""


@dataclass(frozen=True)
class PromptSettings:
    """One prompt set; the names and meanings are those of ``mpo evaluate attack``.

    Attributes:
        prompts: Files (CSV, JSON, JSONL, Parquet), ``multijail``, ``csrt``, or a data set on the Hub.
        languages: Keep only prompts in these languages.
        limit: Keep the first so many prompts, with their translations.
        prompt_column: Column with the prompt; found by its name where it can be.
        language_column: Column with the language.
        prompt_language: Language of prompts without a label.
        dataset_split: Split of a Hub dataset.
        bad_rows: ``error`` stops at the first bad row, ``drop`` leaves such rows out and counts them.
        template: File with the slot ``{prompt}`` to put each prompt into.
        system_prompt: System turn before each prompt.
    """

    prompts: list[str]
    languages: list[str] | None = None
    limit: int | None = None
    prompt_column: str | None = None
    language_column: str | None = None
    prompt_language: str | None = None
    dataset_split: str = "train"
    bad_rows: str = "error"
    template: str | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)


@dataclass(frozen=True)
class RewardGapSettings:
    """As for ``mpo evaluate reward-gap``.

    Attributes:
        data: Files of pairs or groups, or a name on the Hub.
        beta: Scale of the goal in the error column.
        source_language: Code of the dominant language.
        languages: Keep only these target languages.
        limit: Keep the first so many sources, with all their targets.
        dataset_split: Split of a Hub dataset.
        bad_rows: ``error`` stops at the first bad row, ``drop`` leaves such rows out and counts them.
        max_length: Longest prompt plus response, in tokens; longer responses are cut at their end.
        max_response_length: Longest response, in tokens.
    """

    data: list[str]
    beta: float = 1.0
    source_language: str = "en"
    languages: list[str] | None = None
    limit: int | None = None
    dataset_split: str = "train"
    bad_rows: str = "error"
    max_length: int = 1024
    max_response_length: int | None = None

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_limit(self.limit)
        check_max_length(self.max_length)


@dataclass(frozen=True)
class UtilitySettings:
    """As for ``mpo evaluate utility``.

    Attributes:
        tasks: Tasks, groups or tags of lm-evaluation-harness; by default MGSM and Global-MMLU in the paper's languages.
        task_folder: Folder with task files (YAML) of your own.
        num_fewshot: Examples before each question; by default the task's.
        limit: Take the first so many items of each task.
        apply_chat_template: Put each question into the model's chat template.
        seed: Seed of the harness.
    """

    tasks: list[str] = field(default_factory=lambda: list(PAPER_TASKS))
    task_folder: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    seed: int = 1234

    def __post_init__(self) -> None:
        check_limit(self.limit)


@dataclass(frozen=True)
class PerplexitySettings:
    """As for ``mpo evaluate perplexity``.

    Attributes:
        texts: A text file per language, one text per line: ``{en: a.txt, sw: b.txt}``.
        max_length: Cut texts to so many tokens.
        limit: Take the first so many texts of each file.
    """

    texts: dict[str, str]
    max_length: int = 1024
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        check_max_length(self.max_length)


@dataclass(frozen=True)
class MTBenchSettings:
    """As for ``mpo evaluate mt-bench``.

    Attributes:
        questions: Files as MT-Bench's ``question.jsonl`` is published, one per language or all in one.
        judge: Grades the answers; by default the suite's judge, which then has to be an LLM.
        language: Language of files that name none; by default from their names, or English.
        limit: Keep the first so many questions of each language.
        max_new_tokens: Longest answer of a turn, in tokens.
    """

    questions: list[str]
    judge: JudgeChoice | None = None
    language: str | None = None
    limit: int | None = None
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        check_limit(self.limit)
        Generation(self.max_new_tokens)


@dataclass(frozen=True)
class ReportSettings:
    """As for ``mpo report``.

    Attributes:
        title: Heading of the page.
        examples: Prompts with their answers on answers.html, per language and prompt set; 0 for no such page.
    """

    title: str = "Safety in every language"
    examples: int = 40


@dataclass(frozen=True, kw_only=True)
class SuiteRecipe:
    """Everything that a suite measures.

    Attributes:
        models: Models by the name of their folder; the first is what the others are compared with.
        out: Folder of the results.
        generation: How models answer.
        judge: The judge of all answers.
        second_judge: A second opinion, for the agreement of the two.
        over_refusal_judge: Judges over-refusal, where `judge` cannot; then `judge` and `second_judge` are for attacks
            alone.
        over_refusal_second_judge: A second opinion beside it.
        attack: Harmful prompt sets by name.
        over_refusal: Harmless prompt sets by name.
        reward_gap: Preference pairs to measure the reward gap on.
        utility: Tasks of lm-evaluation-harness.
        perplexity: Ordinary text per language.
        mt_bench: Dialogues of two turns, graded by an LLM judge.
        training_data: Files that a model was trained on, to look for the prompts in; those that the runs in `models` name in
            their `recipe.yaml` are looked at, too.
        gold: Labels of people on answers of this suite, as `mpo evaluate label` asks for them, to measure the judges by.
        report: What the page shows.
        confidence: Coverage of all intervals.
    """

    models: dict[str, ModelChoice] = field(default_factory=dict)
    out: str
    generation: Generation = field(default_factory=Generation)
    judge: JudgeChoice = field(default_factory=JudgeChoice)
    second_judge: JudgeChoice | None = None
    over_refusal_judge: JudgeChoice | None = None
    over_refusal_second_judge: JudgeChoice | None = None
    attack: dict[str, PromptSettings] = field(default_factory=dict)
    over_refusal: dict[str, PromptSettings] = field(default_factory=dict)
    reward_gap: RewardGapSettings | None = None
    utility: UtilitySettings | None = None
    perplexity: PerplexitySettings | None = None
    mt_bench: MTBenchSettings | None = None
    training_data: list[str] | None = None
    gold: str | None = None
    report: ReportSettings = field(default_factory=ReportSettings)
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError(
                "there is no model to measure. Expected `models:` with a name and its settings, such as "
                "`base: {model: org/name}`."
            )
        measured = (
            self.attack,
            self.over_refusal,
            self.reward_gap,
            self.utility,
            self.perplexity,
            self.mt_bench,
        )
        if not any(measured):
            raise ConfigError(
                "there is nothing to measure. Expected one or more of `attack`, `over_refusal`, `reward_gap`, `utility`, "
                "`perplexity` and `mt_bench`."
            )
        check_confidence(self.confidence)
        if self.over_refusal_second_judge is not None and self.over_refusal_judge is None:
            raise ConfigError("`over_refusal_second_judge` needs `over_refusal_judge`.")

    def judges(self, task: str) -> dict[str, JudgeChoice]:
        """The judges of one task by the key that names them; the first gives the rates."""
        names = ("judge", "second_judge")
        if task == "over_refusal" and self.over_refusal_judge is not None:
            names = ("over_refusal_judge", "over_refusal_second_judge")
        return {name: choice for name in names if (choice := getattr(self, name)) is not None}


_PATHS = frozenset(
    {
        "prompts",
        "data",
        "training_data",
        "gold",
        "questions",
        "texts",
        "template",
        "task_folder",
        "prompt",
        "model",
        "adapter",
        "chat_template",
    }
)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteRecipe:
    """Reads a suite's recipe and applies the overrides of the command line.

    Relative files and folders are looked for in the working folder first, then beside the recipe.

    Args:
        path: YAML file.
        overrides: Command-line words such as ``["--models.base.dtype", "bfloat16", "--out", "runs/other"]``.

    Raises:
        ConfigError: The file cannot be read; a key is unknown or missing; a value does not have the type of its key,
            or contradicts another.
    """
    document = Document(path, overrides, noun="a suite", paths=_PATHS)
    document.default("out", f"runs/{document.path.stem}")
    return document.build(SuiteRecipe)
