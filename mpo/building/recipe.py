"""The recipe of a build: which prompts, which model, what translates, what is let through. One YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpo.building.filters import FilterSettings
from mpo.building.translation.translator import TranslationChoice
from mpo.common.checks import check_limit
from mpo.common.typed_yaml import Document
from mpo.data.contract import KINDS
from mpo.data.languages import normalize_language_setting
from mpo.errors import ConfigError
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.judges import JudgeChoice

CHOSEN, REJECTED = ("model", "column", "refusal"), ("column", "own", "model", "opening")


@dataclass(frozen=True)
class PromptSource:
    """Where the prompts are.

    Attributes:
        data: Files (.jsonl, .json, .csv, .parquet), a name on the Hub, or ``starter`` for the prompts that come with the
            package, ``starter-harmless`` for its harmless ones, ``starter-everyday`` for 299 more of those, ``demo`` for its
            first eight of each kind.
        prompt_column: Column with the prompt in the dominant language; found by its name where it can be.
        kind: Kind of the prompts without a column ``kind``: ``harmful`` or ``harmless``.
        limit: Keep the first so many prompts.
        dataset_split: Split of a Hub dataset.
        bad_rows: ``error`` or ``drop``.
        missing: What becomes of a target language that a prompt is not given in: ``translate`` it, or ``skip`` it, so that the
            prompt's group is without it.
    """

    data: list[str]
    prompt_column: str | None = None
    kind: str | None = None
    limit: int | None = None
    dataset_split: str = "train"
    bad_rows: str = "error"
    missing: str = "translate"

    def __post_init__(self) -> None:
        check_limit(self.limit)
        if not self.data:
            raise ConfigError("data: expected the name of a prompt set, or at least one file.")
        if self.kind is not None and self.kind not in KINDS:
            raise ConfigError(f"kind: expected {' or '.join(KINDS)}, got {self.kind!r}.")
        if self.bad_rows not in ("error", "drop"):
            raise ConfigError(f"bad_rows: expected 'error' or 'drop', got {self.bad_rows!r}.")
        if self.missing not in ("translate", "skip"):
            raise ConfigError(f"missing: expected 'translate' or 'skip', got {self.missing!r}.")

    @property
    def skips_missing(self) -> bool:
        """Whether a prompt is taken in those languages alone that it is given in."""
        return self.missing == "skip"


@dataclass(frozen=True)
class AnswerSettings:
    """Where the two answers of a pair come from.

    Attributes:
        chosen: ``model``: the model to be trained answers; ``column``: the data have them; ``refusal``: harmful prompts get one of
            `refusals` in every language, harmless ones the model's own answers.
        rejected: Where the harmful answer is looked for, in this order: ``column`` (the data have it), ``own`` (an unsafe
            answer that the model gave while it was sampled), ``model`` (`rejecting_model` is asked), ``opening`` (the first words
            of an answer that complies, in every language, from `openings`).
        rejecting_model: A model that answers harmful prompts.
        samples: Answers of the model to each prompt.
        generation: How models answer.
        select: Which safe answer is chosen: ``gap``, the one with the largest reward gap under the model, which needs its
            weights in this process; ``first``, the first.
        never_safe: What becomes of a harmful prompt that the model never answers safely: ``refusal`` takes one of
            `refusals`, ``drop`` leaves the prompt out.
        refusals: JSON file with refusals by language, ``{"en": ["I can't help with that."], ...}``, for prompts that are never
            answered safely and as rejected answers to harmless ones; by default those that come with the package.
        openings: JSON file with openings by language, in the same form; by default those that come with the package.
        harmless: Which of the model's own answers to harmless prompts are taken: ``useful`` leaves out refusals, babble, answers in
            another language and those that are cut off before a sentence has ended; ``any`` takes what the model says, for
            training that does not teach it but holds it as it is (`harmless_retention`).
        unfinished: What becomes of an answer that is cut off at ``max_new_tokens``: ``drop``, or ``cut`` to end it with its
            last whole sentence.
    """

    chosen: str = "model"
    rejected: list[str] = field(default_factory=lambda: ["column", "own"])
    rejecting_model: ModelChoice | None = None
    samples: int = 4
    generation: Generation = field(default_factory=lambda: Generation(temperature=0.8, top_p=0.95))
    select: str = "gap"
    never_safe: str = "refusal"
    refusals: str | None = None
    openings: str | None = None
    harmless: str = "useful"
    unfinished: str = "drop"

    @property
    def samples_harmful(self) -> bool:
        """Whether the model to be trained answers harmful prompts, too."""
        return self.chosen == "model" or "own" in self.rejected

    @property
    def samples_harmless(self) -> bool:
        """Whether it answers harmless prompts."""
        return self.chosen != "column"

    @property
    def takes_any_harmless(self) -> bool:
        """Whether its answers to them are taken whatever they are."""
        return self.harmless == "any"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("chosen", CHOSEN),
            ("select", ("gap", "first")),
            ("never_safe", ("refusal", "drop")),
            ("harmless", ("useful", "any")),
            ("unfinished", ("drop", "cut")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}.")
        if not self.rejected or set(self.rejected) - set(REJECTED):
            raise ConfigError(f"rejected: expected a list of {', '.join(REJECTED)}, got {self.rejected!r}.")
        if ("model" in self.rejected) != (self.rejecting_model is not None):
            raise ConfigError(
                "rejecting_model: is needed where `rejected` has `model` in it, and only there; got "
                f"`rejected: [{', '.join(self.rejected)}]`."
            )
        if self.samples < 1:
            raise ConfigError(f"samples: expected at least 1, got {self.samples!r}.")
        if self.samples > 1 and self.generation.greedy:
            raise ConfigError(
                f"samples: {self.samples} answers with `temperature: 0` are one and the same. Raise the temperature, or set "
                "`samples: 1`."
            )


@dataclass(frozen=True)
class LeakSettings:
    """Prompts that are too near to those of an evaluation are left out.

    Attributes:
        against: What ``mpo data leak --against`` takes: prompt sets, files of pairs or groups, ``probe``.
    """

    against: list[str]


@dataclass(frozen=True)
class PageSettings:
    """What the page shows.

    Attributes:
        title: Its heading, and the data card's.
        examples: Dropped texts per filter and language.
    """

    title: str = "Preference data in every language"
    examples: int = 3


@dataclass(frozen=True, kw_only=True)
class BuildRecipe:
    """Everything that a build makes.

    Attributes:
        prompts: Where the prompts are.
        languages: Codes of the target languages.
        source_language: Code of the dominant language of the model.
        model: The model that will be trained; not needed where every answer is in a column.
        answers: Where the answers come from.
        judge: Says which answers are safe, and which refuse.
        harmless_judge: Says which answers to harmless prompts refuse, where `judge` cannot.
        translation: What translates prompts and answers into the target languages.
        back_translation: What translates back, by default the same.
        filters: What is let through.
        leaks: Evaluations whose prompts must not be trained on.
        out: Folder of the results.
        block: Prompts at a time.
        page: What the page shows.
    """

    prompts: PromptSource
    languages: list[str]
    source_language: str = "en"
    model: ModelChoice | None = None
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    judge: JudgeChoice = field(default_factory=JudgeChoice)
    harmless_judge: JudgeChoice | None = None
    translation: TranslationChoice = field(default_factory=TranslationChoice)
    back_translation: TranslationChoice | None = None
    filters: FilterSettings = field(default_factory=FilterSettings)
    leaks: LeakSettings | None = None
    out: str
    block: int = 256
    page: PageSettings = field(default_factory=PageSettings)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"block: expected at least 1, got {self.block!r}.")
        source = normalize_language_setting(self.source_language, "source_language")
        targets = [normalize_language_setting(code, "languages") for code in self.languages]
        if not targets:
            raise ConfigError("languages: expected at least one target language, such as `[zh, sw]`.")
        if source in targets:
            raise ConfigError(
                f"languages: {source!r} is the language of the source; name the languages to translate into."
            )
        if len({*targets}) < len(targets):
            raise ConfigError(
                f"languages: one is there twice in {', '.join(self.languages)}; expected each once. Remove the second."
            )
        object.__setattr__(self, "source_language", source)
        object.__setattr__(self, "languages", targets)
        answers = self.answers
        if self.answers.chosen == "model" and self.model is None:
            raise ConfigError(
                "model: `answers.chosen: model` needs the model that will be trained, such as `model: {model: org/name}`; or set "
                "`answers: {chosen: column, rejected: [column]}` for pairs that are there already."
            )
        gap = answers.select == "gap" and answers.chosen == "model"
        if gap and self.model is not None and self.model.engine == "server":
            raise ConfigError(
                "answers: `select: gap` needs the model's probabilities, which a server does not give. Set `select: first`, or "
                "load the model in this process."
            )
        if self.filters.back_translation is not None and not self.translates_back:
            raise ConfigError(
                "filters: `back_translation` needs what translates back: set `translation` or `back_translation`."
            )

    @property
    def samples_model(self) -> bool:
        """Whether the model to be trained is asked."""
        return self.model is not None and (self.answers.samples_harmful or self.answers.samples_harmless)

    @property
    def translates_back(self) -> bool:
        """Whether there is what translates back."""
        return (self.back_translation or self.translation).engine != "none"


_PATHS = frozenset(
    {"data", "model", "adapter", "chat_template", "prompt", "refusals", "openings", "command", "against"}
)


def load_build(path: str | Path, overrides: Sequence[str] = ()) -> BuildRecipe:
    """Reads a build's recipe and applies the overrides of the command line.

    Relative files and folders are looked for in the working folder first, then beside the recipe.

    Args:
        path: YAML file.
        overrides: Command-line words such as ``["--answers.samples", "8", "--out", "runs/other"]``.

    Raises:
        ConfigError: The file cannot be read; a key is unknown or missing; a value does not have the type of its key, or
            contradicts another.
    """
    document = Document(path, overrides, noun="a build", paths=_PATHS)
    document.default("out", f"runs/data/{document.path.stem}")
    return document.build(BuildRecipe)
