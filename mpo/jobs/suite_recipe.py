"""The recipe of a suite: which models, which measurements, with which settings. One YAML file."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from mpo.common.checks import check_beta, check_confidence, check_limit, check_max_length
from mpo.errors import ConfigError, MPOError
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.judges import JudgeChoice
from mpo.training.recipe import RecipeField, read_yaml, refuse_secret_value, typed

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
    """One prompt set; the names and meanings are those of ``mpo evaluate attack``."""

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
    """As for ``mpo evaluate reward-gap``."""

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
    """As for ``mpo evaluate utility``."""

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
    """As for ``mpo evaluate perplexity``."""

    texts: dict[str, str]
    max_length: int = 1024
    limit: int | None = None

    def __post_init__(self) -> None:
        check_limit(self.limit)
        check_max_length(self.max_length)


@dataclass(frozen=True)
class ReportSettings:
    """As for ``mpo report``."""

    title: str = "Safety in every language"
    examples: int = 2


@dataclass(frozen=True)
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
        report: What the page shows.
        confidence: Coverage of all intervals.
    """

    models: dict[str, ModelChoice]
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
    report: ReportSettings = field(default_factory=ReportSettings)
    confidence: float = 0.95

    def judges(self, task: str) -> dict[str, JudgeChoice]:
        """The judges of one task by the key that names them; the first gives the rates."""
        names = ("judge", "second_judge")
        if task == "over_refusal" and self.over_refusal_judge is not None:
            names = ("over_refusal_judge", "over_refusal_second_judge")
        return {name: choice for name in names if (choice := getattr(self, name)) is not None}


_SECTIONS: dict[str, type] = {
    "generation": Generation,
    "judge": JudgeChoice,
    "second_judge": JudgeChoice,
    "over_refusal_judge": JudgeChoice,
    "over_refusal_second_judge": JudgeChoice,
    "reward_gap": RewardGapSettings,
    "utility": UtilitySettings,
    "perplexity": PerplexitySettings,
    "report": ReportSettings,
}
_NAMED: dict[str, type] = {"models": ModelChoice, "attack": PromptSettings, "over_refusal": PromptSettings}
_FILES = {
    "prompts",
    "data",
    "texts",
    "template",
    "task_folder",
    "prompt",
    "model",
    "adapter",
    "chat_template",
}
"""Settings that may name a file or folder; one that lies beside the recipe is found there."""


def load_suite(path: str | Path) -> SuiteRecipe:
    """Reads a suite's recipe.

    Relative files and folders are looked for in the working folder first, then beside the recipe.

    Raises:
        ConfigError: The file cannot be read; a key is unknown or missing; a value does not have the type of its key,
            or contradicts another.
    """
    source = Path(path)
    raw, places = read_yaml(source)
    known = {option.name for option in fields(SuiteRecipe)}
    given: dict[str, Any] = {}
    for key, value in raw.items():
        place = places[key]
        _require_known(key, known, place)
        if key in _NAMED:
            _require_mapping(key, value, place)
            given[key] = {
                name: _section(f"{key}.{name}", _NAMED[key], entry, place, source)
                for name, entry in value.items()
            }
        elif key in _SECTIONS:
            if value in ("", "~", "null"):  # switched off
                continue
            given[key] = _section(key, _SECTIONS[key], value, place, source)
        else:
            given[key] = typed(key, value, _fields(SuiteRecipe)[key], place)
    given.setdefault("out", f"runs/{source.stem}")
    if not given.get("models"):
        raise ConfigError(
            f"{source}: there is no model to measure. Expected `models:` with a name and its settings, such as "
            "`base: {model: org/name}`."
        )
    if not any(given.get(key) for key in ("attack", "over_refusal", "reward_gap", "utility", "perplexity")):
        raise ConfigError(
            f"{source}: there is nothing to measure. Expected one or more of `attack`, `over_refusal`, `reward_gap`, "
            "`utility` and `perplexity`."
        )
    recipe = SuiteRecipe(**given)
    try:
        check_confidence(recipe.confidence)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if recipe.over_refusal_second_judge is not None and recipe.over_refusal_judge is None:
        raise ConfigError(f"{source}: `over_refusal_second_judge` needs `over_refusal_judge`.")
    return recipe


def _section(key: str, owner: type, value: Any, place: str, source: Path) -> Any:
    """The dataclass `owner` from a mapping of the recipe."""
    _require_mapping(key, value, place)
    known = _fields(owner)
    given = {}
    for name, entry in value.items():
        _require_known(name, set(known), place, f"{key}.")
        found = typed(f"{key}.{name}", entry, known[name], place)
        refuse_secret_value(f"{key}.{name}", found, place)
        given[name] = _beside(found, source) if name in _FILES else found
    missing = [
        option.name
        for option in fields(owner)
        if option.name not in given and option.default is MISSING and option.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{place}: `{key}` needs `{missing[0]}`.")
    try:
        return owner(**given)
    except MPOError as error:
        raise ConfigError(f"{place}: `{key}`: {error}") from None


def _fields(owner: type) -> dict[str, RecipeField]:
    """The keys of a section with the types that a value is read as."""
    hints = typing.get_type_hints(owner)
    if owner is JudgeChoice:
        hints["request"] = dict[str, Any] | None
    return {
        option.name: RecipeField(option.name, owner, hints[option.name], (), None) for option in fields(owner)
    }


def _require_mapping(key: str, value: Any, place: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{place}: `{key}` is {str(value)!r}; expected indented lines of the form `key: value`."
        )


def _require_known(key: str, known: typing.Collection[str], place: str, before: str = "") -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"{place}: `{before}{key}` is not a key of a suite; the nearest is `{before}{near[0]}`."
        )


def _beside(value: Any, source: Path) -> Any:
    """`value` with each path that is not in the working folder but beside the recipe made to lead there."""
    if isinstance(value, list):
        return [_beside(item, source) for item in value]
    if isinstance(value, dict):
        return {name: _beside(item, source) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    beside = source.parent / path
    is_path = 0 < len(value) < 1000 and not path.exists() and beside.exists()
    return str(beside) if is_path else value
