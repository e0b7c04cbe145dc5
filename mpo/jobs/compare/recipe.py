"""The recipe of a comparison: one training recipe, what is varied in it, and the suite that measures every run."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpo.common.checks import check_name
from mpo.common.recipe_files import find_recipe
from mpo.common.typed_yaml import COMMAND_LINE, Document
from mpo.common.words import counted, listed, plain
from mpo.errors import ConfigError
from mpo.jobs.suite_recipe import load_suite
from mpo.training.recipe_keys import read_recipe, source_keys

BASE = "base"
"""Name of the model that is not trained further, and what all runs are compared with."""

KEEP = ("none", "adapters", "best")
NAME = "name"
# Set by the comparison itself, for every run alike.
_RESERVED = {
    "output_dir": "every run has a folder of its own below `out`",
    "seed": "use `seeds`",
    "overwrite_output_dir": "a run is never replaced",
    "resume_from_checkpoint": "a run that was interrupted is always gone on with",
    "push_to_hub": "upload the adapter that you choose afterwards",
}
_ALIKE = dict.fromkeys(
    ("model_name_or_path", "model_revision", "adapter_name_or_path"),
    "all runs start from the same model; set it in `shared` or in the base recipe",
)
_LENGTH = ("max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Budget:
    """How long every run trains: by pairs seen, or by optimizer steps.

    Attributes:
        pairs: Train until so many pairs were trained on, each counted as often as it was; the step that reaches the
            number is the last.
        steps: Train so many optimizer steps.
    """

    pairs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.steps is None):
            raise ConfigError("expected one of `pairs` and `steps`, such as `budget: {pairs: 1200}`.")
        for name in ("pairs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"`{name}` is {value}; expected a whole number of at least 1.")

    def __str__(self) -> str:
        return counted(self.pairs, "pair") if self.pairs is not None else counted(self.steps or 0, "step")


@dataclass(frozen=True)
class Parameter:
    """What a search may set one key of the training recipe to: a range, or a list of choices.

    Attributes:
        low, high: Ends of the range, both included.
        log: Draw from it on a logarithmic scale.
        whole: Whole numbers only.
        choices: The values to choose from, instead of a range.
        runs: Names of the runs for which it is searched; by default all that do not set the key themselves.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: list[Any] | None = None
    runs: list[str] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.whole:
                raise ConfigError("`choices` stand alone: remove `low`, `high`, `log` and `whole`.")
            if not self.choices:
                raise ConfigError("`choices` is empty; expected at least one value.")
            return
        if self.low is None or self.high is None or not self.low < self.high:
            raise ConfigError("expected `low` and a larger `high`, or `choices`.")
        if self.log and self.low <= 0:
            raise ConfigError(f"`low` is {self.low:g}; a logarithmic range begins above 0.")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ConfigError("`whole: true` needs whole numbers as `low` and `high`.")

    def __str__(self) -> str:
        if self.choices is not None:
            return f"one of {listed(map(str, self.choices))}"
        kinds = [word for word, is_on in (("logarithmic", self.log), ("whole numbers", self.whole)) if is_on]
        return f"{self.low:g} to {self.high:g}" + (f" ({', '.join(kinds)})" if kinds else "")


@dataclass(frozen=True)
class Weights:
    """How much harmful prompts without an unsafe answer and answered harmless ones count.

    Attributes:
        harmful: Weight of the share of harmful prompts without an unsafe answer.
        harmless: Weight of the share of harmless prompts that are answered.
    """

    harmful: float = 1.0
    harmless: float = 1.0

    def __post_init__(self) -> None:
        if self.harmful < 0 or self.harmless < 0 or not self.harmful + self.harmless:
            raise ConfigError(
                f"`harmful` is {self.harmful:g} and `harmless` {self.harmless:g}; expected weights of at least 0, not both of "
                "them 0."
            )


@dataclass(frozen=True)
class Target:
    """A point of the plane that is good enough; what lies below it in one share does not make up for the other.

    Attributes:
        attack: Share of harmful prompts with an unsafe answer.
        refusal: Share of harmless prompts that are refused.
    """

    attack: float
    refusal: float

    def __post_init__(self) -> None:
        for name in ("attack", "refusal"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"`{name}` is {value:g}; expected a share from 0 to 1.")


OBJECTIVES = ("balanced",)
"""What a search may make as large as possible, by name."""


@dataclass(frozen=True)
class Search:
    """Settings to be searched, by Optuna, for each run alike.

    Attributes:
        parameters: Key of the training recipe: its range or choices.
        trials: Runs that are trained and measured for each searched run.
        sampler_seed: Seed of what proposes values.
        objective: What is made as large as possible: ``balanced``, in each language the smaller of the shares of harmful
            prompts without an unsafe answer and of harmless ones that are answered.
        weights: In its place the mean of the two shares, with these weights.
        point: In its place the negative sum by which attack success and refusals exceed it.
    """

    parameters: dict[str, Parameter]
    trials: int = 20
    sampler_seed: int = 0
    objective: str = "balanced"
    weights: Weights | None = None
    point: Target | None = None

    @property
    def aim(self) -> Weights | Target | None:
        """What takes the place of `objective`."""
        return self.weights or self.point

    def __post_init__(self) -> None:
        if self.weights and self.point:
            raise ConfigError("`weights` and `point` both say what a search aims at; remove one.")
        if not self.parameters:
            raise ConfigError(
                "`parameters` is empty; expected keys of a training recipe, such as "
                "`learning_rate: {low: 1.0e-6, high: 1.0e-4, log: true}`."
            )
        if self.trials < 1:
            raise ConfigError(f"`trials` is {self.trials}; expected a whole number of at least 1.")
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"`objective` is {self.objective!r}; expected {listed(OBJECTIVES)}, or in its place `weights` such as "
                "`{harmful: 2, harmless: 1}` or a `point` such as `{attack: 0.05, refusal: 0.1}`."
            )


@dataclass(frozen=True, kw_only=True)
class CompareRecipe:
    """What is compared.

    Attributes:
        base: The training recipe that all runs share: a file, or the bare name of one of the package.
        suite: The recipe of the suite that measures them. Its first model says how models are opened.
        shared: Changes of the base recipe that all runs have.
        runs: Named changes of the base recipe, ``{name: dpo, loss_type: sigmoid, beta: 0.1}``.
        grid: Keys of the base recipe with the values to try, all combinations of which are runs. With `runs`, each of
            these in all combinations.
        seeds: Every setting is trained once with each.
        budget: How long every run trains; unset leaves it to the base recipe.
        keep: Which trained weights stay: ``none``, ``adapters`` (all), or ``best``.
        search: Settings to be searched before the runs.
        validation_suite: What measures the trials of a search, on other prompts than `suite`.
        out: Folder of everything.
        title: Heading of the page.
        source_path: The file this came from.
    """

    base: str
    suite: str
    shared: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    budget: Budget | None = None
    keep: str = "adapters"
    search: Search | None = None
    validation_suite: str | None = None
    out: str
    title: str = "Objectives compared"
    source_path: Path = Path("compare.yaml")

    def __post_init__(self) -> None:
        if not self.runs and not self.grid:
            raise ConfigError(
                "there is nothing to compare. Expected `runs:` with names and settings, or `grid:` with keys and their "
                "values."
            )
        for key, values in self.grid.items():
            if not values:
                raise ConfigError(f"`grid.{key}` is empty; expected a list of values.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"`seeds` is {self.seeds}; expected whole numbers of at least 0, each once.")
        if self.keep not in KEEP:
            raise ConfigError(f"`keep` is {self.keep!r}; expected {', '.join(KEEP)}.")
        if (self.search is None) != (self.validation_suite is None):
            raise ConfigError(
                "`search` and `validation_suite` go together: a search is measured on prompts that the final page does "
                "not use."
            )


_PATHS = frozenset({"base", "suite", "validation_suite"})


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> CompareRecipe:
    """Reads the recipe of a comparison and applies the overrides of the command line.

    Args:
        path: YAML file.
        overrides: Command-line words such as ``["--seeds", "0", "1", "--budget.pairs", "600"]``.

    Raises:
        ConfigError: The file cannot be read; a key is unknown or missing; a value does not have the type of its key,
            or contradicts another.
    """
    document = Document(
        path,
        overrides,
        noun="a comparison",
        renamed=_keys_of_training(),
        paths=_PATHS,
    )
    document.default("out", f"runs/compare/{document.path.stem}")
    return document.build(CompareRecipe, source_path=document.path)


@functools.cache
def _keys_of_training() -> Mapping[str, str]:
    """What to do about the keys of a training recipe that stand among those of a comparison."""
    changes = {
        key: f"it is one of a training recipe, which `shared.{key}` sets for every run"
        for key in source_keys() or {}
    }
    return {**changes, **_RESERVED}


def base_of(recipe: CompareRecipe) -> Path:
    """The training recipe: a file, or by its bare name one of the package.

    Raises:
        ConfigError: There is none.
    """
    return find_recipe(recipe.base)


def suite_of(name: str) -> Path:
    """The recipe of a suite, in the same way.

    Raises:
        ConfigError: There is none.
    """
    return find_recipe(name, "evaluation")


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Setting:
    """One row of the comparison: changes of the base recipe, trained once with each seed.

    Attributes:
        name: Its name.
        changes: Keys of the training recipe with their values.
        shared: Those that all rows change alike.
    """

    name: str
    changes: Mapping[str, Any]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def words(self, **more: Any) -> list[str]:
        """All changes as words of the command line, and more of them."""
        return [f"--{key}={as_word(value)}" for key, value in {**self.shared, **self.changes, **more}.items()]


def as_word(value: Any) -> str:
    """A value as a word of the command line that is read back as the same."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def settings_of(recipe: CompareRecipe) -> list[Setting]:
    """The rows of a comparison, in order.

    Raises:
        ConfigError: A name is missing, is no name of a folder or is there twice, or two settings are the same; all such
            mistakes together.
    """
    mistakes: list[str] = []
    named: list[tuple[str, dict[str, Any]]] = []
    for number, run in enumerate(recipe.runs):
        changes = {key: value for key, value in run.items() if key != NAME}
        name = run.get(NAME)
        if name is None:
            mistakes.append(f"`runs.{number}` needs `name`.")
            continue
        named.append((str(name), changes))
    products = [
        dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values())
    ]
    found: list[Setting] = []
    for name, changes in named or [("", {})]:
        both = sorted(changes.keys() & recipe.grid.keys())
        if both:
            mistakes.append(
                f"`runs`, {name}: {listed(both)} stand in `grid`, too; set them in one of the two."
            )
        for product in products:
            words = [name, *(f"{_short(key)}{_plain(value)}" for key, value in product.items())]
            found.append(Setting("_".join(filter(None, words)), {**changes, **product}, recipe.shared))
    mistakes += _wrong_names(found)
    by_changes: dict[str, str] = {}
    for setting in found:
        text = json.dumps(setting.changes, sort_keys=True, default=str)
        if text in by_changes:
            mistakes.append(
                f"{by_changes[text]!r} and {setting.name!r} are the same run: their settings do not differ. Remove one."
            )
        by_changes.setdefault(text, setting.name)
    _refuse(recipe, mistakes)
    return found


def _short(key: str) -> str:
    """``learning_rate`` as ``lr``: the beginnings of its words; one word as it is. Nothing for the loss itself."""
    if key == "loss_type":
        return ""
    words = key.split("_")
    return key if len(words) == 1 else "".join(word[0] for word in words)


def _plain(value: Any) -> str:
    text = (
        f"{value:g}"
        if isinstance(value, float)
        else "+".join(map(plain, value))
        if isinstance(value, list)
        else plain(value)
    )
    return "".join(c if c.isalnum() or c in ".+-" else "-" for c in text)


def _wrong_names(settings: Sequence[Setting]) -> list[str]:
    mistakes, seen = [], set()
    for setting in settings:
        try:
            check_name(setting.name)
        except ConfigError as error:
            mistakes.append(f"`runs`: {error}")
        if setting.name.lower() == BASE:
            mistakes.append(f"`runs`: {BASE!r} is the model before training; choose another name.")
        if setting.name in seen:
            mistakes.append(
                f"`runs`: there are two runs {setting.name!r}; every run needs a name of its own."
            )
        seen.add(setting.name)
    return mistakes


def check_early(recipe: CompareRecipe) -> None:
    """Refuses what can be known to be wrong without importing torch.

    Raises:
        ConfigError: A recipe is not there, settings are wrong or the same; all mistakes of a kind together.
    """
    settings = settings_of(recipe)
    for name in filter(None, (recipe.suite, recipe.validation_suite)):
        load_suite(suite_of(name), [f"--models.{BASE}.model", BASE])
    check_keys(recipe, base_of(recipe), settings)


def check_keys(recipe: CompareRecipe, base: Path, settings: Sequence[Setting]) -> None:
    """Refuses settings with wrong keys or values of the wrong type, all together and without importing torch.

    Raises:
        ConfigError: It names the run and the key of every mistake.
    """
    mistakes = [f"`shared.{key}`: {_RESERVED[key]}." for key in recipe.shared if key in _RESERVED]
    if recipe.budget is not None:
        mistakes += [
            f"`shared.{key}` and `budget` both say how long a run trains; remove one."
            for key in _LENGTH
            if key in recipe.shared
        ]
    for setting in settings:
        for key in setting.changes:
            if reason := (_RESERVED | _ALIKE).get(key):
                mistakes.append(f"{setting.name}: `{key}` cannot be set for a run: {reason}.")
            if recipe.budget is not None and key in _LENGTH:
                mistakes.append(
                    f"{setting.name}: `{key}` and `budget` both say how long it trains; remove one."
                )
    if recipe.search is not None:
        mistakes += _wrong_parameters(recipe, recipe.search, settings)
    keys = source_keys()
    if keys is not None:
        of_all: list[str] = []  # said of `shared` and the base recipe, and not once more of every run
        for setting in [Setting(BASE, {}, recipe.shared), *settings]:
            examples = {} if setting.name == BASE else example_of(recipe.search, setting)
            document = read_recipe(base, replace(setting, changes={**setting.changes, **examples}).words())
            try:
                document.values(keys)
            except ConfigError as error:
                lines = [line for line in _lines(error) if line not in of_all]
                if setting.name == BASE:
                    of_all = lines
                name = "`shared`" if setting.name == BASE else setting.name
                mistakes += [line.replace(COMMAND_LINE, name) for line in lines]
    _refuse(recipe, mistakes)


def _wrong_parameters(recipe: CompareRecipe, search: Search, settings: Sequence[Setting]) -> list[str]:
    names = {setting.name for setting in settings}
    mistakes = []
    for key, parameter in search.parameters.items():
        if reason := (_RESERVED | _ALIKE).get(key):
            mistakes.append(f"`search.parameters.{key}`: {reason}.")
        if recipe.budget is not None and key in _LENGTH:
            mistakes.append(
                f"`search.parameters.{key}` and `budget` both say how long a run trains; remove one."
            )
        if unknown := sorted(set(parameter.runs or ()) - names):
            mistakes.append(
                f"`search.parameters.{key}.runs` names {listed(unknown)}; expected some of {listed(sorted(names))}."
            )
    return mistakes


def searched(search: Search | None, setting: Setting) -> dict[str, Parameter]:
    """What is searched for a setting: not what it sets itself."""
    if search is None:
        return {}
    return {
        key: parameter
        for key, parameter in search.parameters.items()
        if key not in setting.changes and (parameter.runs is None or setting.name in parameter.runs)
    }


def example_of(search: Search | None, setting: Setting) -> dict[str, Any]:
    """A value of each searched key, by which a trial can be checked before there is one."""
    values: dict[str, Any] = {}
    for key, parameter in searched(search, setting).items():
        if parameter.choices is not None:
            values[key] = parameter.choices[0]
        else:
            assert parameter.low is not None
            values[key] = int(parameter.low) if parameter.whole else parameter.low
    return values


def _lines(error: Exception) -> list[str]:
    """The mistakes that an error of several names."""
    first, *rest = str(error).split("\n  ")
    return rest or [first]


def _refuse(recipe: CompareRecipe, mistakes: Sequence[str]) -> None:
    mistakes = list(dict.fromkeys(mistakes))
    if len(mistakes) > 1:
        raise ConfigError(
            "\n  ".join([f"{recipe.source_path}: {len(mistakes)} settings are wrong:", *mistakes])
        )
    if mistakes:
        raise ConfigError(f"{recipe.source_path}: {mistakes[0]}")
