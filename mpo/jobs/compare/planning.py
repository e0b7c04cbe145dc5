"""Everything that a comparison will do, checked before its first run starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mpo.common.files import check_writable
from mpo.common.redaction import redact
from mpo.common.tables import TextTable
from mpo.common.words import counted, listed
from mpo.data.languages import language_of_file
from mpo.errors import ConfigError, MPOError
from mpo.evaluation.comparison import RUN
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.prompts import PromptSet
from mpo.jobs.compare.recipe import (
    BASE,
    Budget,
    CompareRecipe,
    Setting,
    base_of,
    check_keys,
    example_of,
    searched,
    settings_of,
    suite_of,
)
from mpo.jobs.preflight import Plan, check_packages, make_plan
from mpo.jobs.preflight.folder import disk_space
from mpo.jobs.suite import check_suite, phrases_of
from mpo.jobs.suite_recipe import PromptSettings, SuiteRecipe, load_suite
from mpo.training.recipe import Recipe, load_recipe, settings_in_effect
from mpo.training.workload import Seen, seen_by_step

T = TypeVar("T")

RUNS = "runs"
_MOST_NAMES = 3  # runs with the same mistake that are all named
# What a run writes and where it goes on from, and not what it trains.
_PLACES = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir")


class BaseModel(NamedTuple):
    """The model that all runs start from: its name, its revision, and the adapter on it, if there is one."""

    name: str
    revision: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        setting: Its row of the comparison.
        seed: Its seed.
        folder: Where it writes.
        seen: Its steps, and the pairs and tokens that it trains on.
        settings: What decides its result, ready for JSON.
        trains_adapter: Whether its result is an adapter on the base model.
        words: Changes of the base recipe, without those that say where it writes.
        weights: Bytes of its result.
        disk: Bytes that it may take while it is trained.
    """

    setting: Setting
    seed: int
    folder: Path
    seen: Seen
    settings: dict[str, Any]
    trains_adapter: bool
    words: tuple[str, ...]
    weights: int = 0
    disk: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def record(self) -> Path:
        """Where it is written how far the run is."""
        return self.folder / RUN


@dataclass(frozen=True)
class PlannedSuite:
    """What measures the runs.

    Attributes:
        path: Its recipe.
        recipe: The same, read.
        prompts: Its prompt sets by task and name.
        settings: What decides its results, ready for JSON.
    """

    path: Path
    recipe: SuiteRecipe
    prompts: Mapping[tuple[str, str], PromptSet]
    settings: dict[str, Any]

    def model(self, model: str, adapter: str | None = None, *, revision: str | None = None) -> ModelChoice:
        """How a model is opened: as the first of the suite is, but for its name."""
        first = next(iter(self.recipe.models.values()))
        return replace(first, model=model, adapter=adapter, revision=revision, adapter_revision=None)


@dataclass(frozen=True)
class Comparing:
    """A comparison that has been checked.

    Attributes:
        recipe: What is compared.
        base: The training recipe.
        model: Name of the model that all runs start from, its revision, and the adapter on it, if there is one.
        runs: In the order in which they are trained: all settings with the first seed, then with the second.
        suite: What measures them.
        validation: What measures the trials of a search.
        facts: What all runs share, in words.
        notes: Sentences about what the user may not have meant.
    """

    recipe: CompareRecipe
    base: Path
    settings: tuple[Setting, ...]
    model: BaseModel
    runs: tuple[PlannedRun, ...]
    suite: PlannedSuite
    validation: PlannedSuite | None
    facts: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def out(self) -> Path:
        """The folder of everything."""
        return Path(self.recipe.out)


def plan_comparison(recipe: CompareRecipe, *, on_this_machine: bool = True) -> Comparing:
    """Checks every run and both suites, cheapest first, and counts the work.

    Args:
        recipe: What is compared.
        on_this_machine: False for a plan that is only looked at: settings that this machine cannot honour become notes.

    Raises:
        MPOError: What would make a run or its measurement fail; the mistakes of all runs together.
    """
    settings = settings_of(recipe)
    base = base_of(recipe)
    check_keys(recipe, base, settings)
    check_writable(Path(recipe.out), setting="out", create=False)
    given = load_recipe(base, Setting(BASE, {}, recipe.shared).words()).given
    if not any(
        _asks(key, value) for one in (given, *(s.changes for s in settings)) for key, value in one.items()
    ):
        # The suite asks more, and what it asks is compared.
        settings = [replace(setting, shared={"behavior_probe": 0, **setting.shared}) for setting in settings]
    # Not yet found values are stood in for by one of their range.
    examples = [replace_changes(setting, example_of(recipe.search, setting)) for setting in settings]
    loaded = _each(recipe, examples, lambda setting: load_recipe(base, setting.words()))
    _refuse_same(recipe, examples, loaded)
    first = loaded[0].model
    model = BaseModel(str(first.model_name_or_path), first.model_revision, first.adapter_name_or_path)
    suite = plan_suite(recipe.suite, model)
    validation = None
    if recipe.validation_suite is not None:
        validation = plan_suite(recipe.validation_suite, model)
        _refuse_overlap(suite, validation)
        for one, key in ((suite, "suite"), (validation, "validation_suite")):
            if not (one.recipe.attack and one.recipe.over_refusal):
                raise ConfigError(
                    f"{one.path}: `search` aims at a point between attack success and refusals of harmless prompts, so "
                    f"`{key}` needs both `attack` and `over_refusal`."
                )
    if recipe.keep == "best" and not (suite.recipe.attack and suite.recipe.over_refusal):
        raise ConfigError(f"{suite.path}: `keep: best` needs a suite with both `attack` and `over_refusal`.")
    plans = plan_runs(recipe, base, examples, on_this_machine=on_this_machine)
    runs = tuple(run for seed in recipe.seeds for run in plans.runs if run.seed == seed)
    notes = (*plans.notes, *inherited_notes(base, examples, loaded))
    return Comparing(recipe, base, tuple(settings), model, runs, suite, validation, plans.facts, notes)


def inherited_notes(base: Path, settings: Sequence[Setting], loaded: Sequence[Recipe]) -> list[str]:
    """Sentences about rows whose objective takes a value of the base recipe in place of its published one.

    Args:
        base: The training recipe.
        settings: The rows.
        loaded: The recipe of each.
    """
    notes = []
    for setting, found in zip(settings, loaded, strict=True):
        own = {**setting.shared, **setting.changes}
        if "loss_type" not in own:
            continue
        for name, objective in found.training.objectives.by_name.items():
            for key, published in objective.published.items():
                value = getattr(found.training, key)
                if key in found.given and key not in own and value != published:
                    notes.append(
                        f"{setting.name} takes `{key}: {value:g}` from {base.name}; published for `{name}` is {published:g}. "
                        f"Set `{key}` for {setting.name} to say which is meant"
                    )
    return notes


def _asks(key: str, value: Any) -> bool:
    """Whether a setting wants the questions that a run puts to its model, see `behavior_probe`."""
    return "probe" in key or key == "stop_on_over_refusal" or "probe" in str(value)


def replace_changes(setting: Setting, more: Mapping[str, Any]) -> Setting:
    """The setting with more changes."""
    return replace(setting, changes={**setting.changes, **more})


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class PlannedRuns:
    """All runs, what they share in words, and what the user may not have meant."""

    runs: tuple[PlannedRun, ...]
    facts: Mapping[str, str]
    notes: tuple[str, ...]


def plan_runs(
    recipe: CompareRecipe,
    base: Path,
    settings: Sequence[Setting],
    *,
    folder: Path | None = None,
    seeds: Sequence[int] | None = None,
    on_this_machine: bool = True,
) -> PlannedRuns:
    """Checks settings against the model and the data, and counts what each of their runs sees.

    Args:
        recipe: What is compared.
        base: The training recipe.
        settings: The rows.
        folder: Where the runs write; by default ``runs`` below `out`.
        seeds: In place of those of the recipe.
        on_this_machine: See :func:`plan_comparison`.

    Raises:
        MPOError: What would make a run fail; the mistakes of all together.
    """
    folder = folder or Path(recipe.out) / RUNS
    seeds = recipe.seeds if seeds is None else seeds

    def plan(setting: Setting) -> tuple[Plan, list[PlannedRun]]:
        probe = load_recipe(base, setting.words(output_dir=str(folder / ".check")))
        found = make_plan(probe, on_this_machine=False)
        if on_this_machine:
            check_packages(found.recipe, on_this_machine=True)
            if probe.unavailable:
                raise ConfigError(f"{'; '.join(probe.unavailable)}.")
        space = disk_space(found)
        shared = {"data": found.data.fingerprint, "model": found.source.name}
        runs = []
        for seed in seeds:
            found.recipe.training.seed = seed
            steps = seen_by_step(found.tokenized, found.recipe.training)
            seen = within_budget(steps, recipe.budget, found.steps)
            length = {} if recipe.budget is None else {"max_steps": seen.steps}
            words = setting.words(seed=seed, **length)
            decides = {**_decides(load_recipe(base, words)), **as_stored(shared)}
            runs.append(
                PlannedRun(
                    setting,
                    seed,
                    folder / f"{setting.name}-s{seed}",
                    seen,
                    decides,
                    found.recipe.model.trains_adapter,
                    tuple(words),
                    space.weights,
                    space.total,
                )
            )
        return found, runs

    plans = _each(recipe, settings, plan)
    first = plans[0][0]
    facts = {
        name: first.facts[name] for name in ("Model", "Data", "Pairs per language", "Held out", "Devices")
    }
    runs = tuple(run for _, found in plans for run in found)
    notes = [note for found, _ in plans for note in found.notes]
    fingerprints = {json.dumps([run.settings["data"], run.settings.get("languages")]) for run in runs}
    if len(fingerprints) > 1:
        notes.append(
            "the runs train on different data, so what differs between them is not the setting alone"
        )
    pairs = sorted({run.seen.pairs for run in runs})
    # Seeds draw other groups, with more or fewer languages; that is no difference between settings.
    unequal = any(len({run.seen.pairs for run in runs if run.seed == seed}) > 1 for seed in seeds)
    if recipe.budget is None and unequal:
        notes.append(
            f"the runs train on different numbers of pairs ({pairs[0]:,} to {pairs[-1]:,}); `budget: {{pairs: {pairs[0]}}}` "
            "makes them equal"
        )
    if recipe.budget is not None and any(
        plan.recipe.training.min_source_gap is not None for plan, _ in plans
    ):
        notes.append(
            "`min_source_gap` leaves sources out only once their gap is known; steps stay as planned, and the pairs that were "
            "seen are counted again after each run"
        )
    return PlannedRuns(runs, facts, tuple(dict.fromkeys(notes)))


def within_budget(steps: Iterable[Seen], budget: Budget | None, without: int) -> Seen:
    """What a run has seen when its budget is used up.

    Args:
        steps: What it has seen after each step, without end.
        budget: By pairs, the step that reaches their number is the last.
        without: Steps of a run without a budget.
    """
    pairs = None if budget is None else budget.pairs
    last = without if budget is None else budget.steps
    for seen in steps:
        if seen.steps == last or (pairs is not None and seen.pairs >= pairs):
            return seen
    raise AssertionError("the steps of a run have no end")


def _decides(recipe: Recipe) -> dict[str, Any]:
    """The settings of a run that were set, without places."""
    given = recipe.to_dict()
    if "bf16" not in recipe.given:
        del given["bf16"]  # filled in by the machine
    return as_stored({name: value for name, value in given.items() if name not in _PLACES})


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file has them, so that those of now can be compared with it."""
    plain: dict[str, Any] = redact(json.loads(json.dumps(dict(settings), default=str)))
    return plain


def _refuse_same(recipe: CompareRecipe, settings: Sequence[Setting], loaded: Sequence[Recipe]) -> None:
    """Two runs are the same where nothing differs once defaults are filled in."""
    seen: dict[str, str] = {}
    mistakes = []
    for setting, found in zip(settings, loaded, strict=True):
        values = {name: value for name, value in settings_in_effect(found).items() if name not in _PLACES}
        text = json.dumps(values, sort_keys=True, default=str)
        if text in seen:
            mistakes.append(
                f"{seen[text]!r} and {setting.name!r} are the same run, defaults filled in. Remove one, or change it."
            )
        seen.setdefault(text, setting.name)
    _refuse(recipe, mistakes)


def _each(recipe: CompareRecipe, settings: Sequence[Setting], work: Callable[[Setting], T]) -> list[T]:
    """What a function gives for each setting; the errors of all together."""
    found: list[T] = []
    names: dict[str, list[str]] = {}  # of the runs that a text is said of
    for setting in settings:
        try:
            found.append(work(setting))
        except MPOError as error:
            names.setdefault(str(error), []).append(setting.name)
    _refuse(
        recipe, [f"{_runs_named(of)}: {text}" for text, of in names.items()], sum(map(len, names.values()))
    )
    return found


def _runs_named(names: Sequence[str]) -> str:
    """The names of runs; of many the first and their number."""
    if len(names) <= _MOST_NAMES:
        return listed(names)
    return f"{names[0]} and {len(names) - 1:,} other runs"


def _refuse(recipe: CompareRecipe, mistakes: Sequence[str], runs: int | None = None) -> None:
    """Refuses the recipe if there are mistakes; they are those of so many runs, by default of one each."""
    runs = len(mistakes) if runs is None else runs
    if runs > 1:
        raise ConfigError("\n  ".join([f"{recipe.source_path}: {runs:,} runs cannot be made:", *mistakes]))
    if mistakes:
        raise ConfigError(f"{recipe.source_path}: {mistakes[0]}")


# --------------------------------------------------------------------------------------------------------------- suite


def plan_suite(name: str, model: BaseModel) -> PlannedSuite:
    """Reads and checks a suite that measures runs in place of its own models.

    Raises:
        MPOError: It cannot be used, or cannot measure trained weights.
    """
    path = suite_of(name)
    probe = load_suite(path, [f"--models.{BASE}.model", model.name])
    first = next(iter(probe.models.values()))
    if first.engine == "server":
        raise ConfigError(
            f"{path}: the first model of the suite is behind a server, which cannot open what a run has trained. Use the "
            "engine `transformers` or `vllm`."
        )
    recipe = replace(
        probe, models={BASE: replace(first, model=model.name, adapter=model.adapter, revision=model.revision)}
    )
    prompts = check_suite(recipe)
    settings = asdict(recipe)
    opened = {
        key: value for key, value in asdict(first).items() if key not in ("model", "adapter", "revision")
    }
    for key in ("models", "out", "report"):
        del settings[key]
    settings["opened"] = opened
    settings["prompts"] = {f"{kind}/{name}": found.fingerprint for (kind, name), found in prompts.items()}
    settings["files"] = _contents(recipe)
    settings |= phrases_of(
        judge for kind in ("attack", "over_refusal") for judge in recipe.judges(kind).values()
    )
    return PlannedSuite(path, recipe, prompts, as_stored(settings))


def _contents(recipe: SuiteRecipe) -> list[str]:
    """Hashes of the files that are measured on besides prompts."""
    names = [*(recipe.perplexity.texts.values() if recipe.perplexity else ())]
    names += recipe.reward_gap.data if recipe.reward_gap else []
    return [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names if Path(name).is_file()]


def _refuse_overlap(suite: PlannedSuite, validation: PlannedSuite) -> None:
    """A search must see the prompts of the final page in no language."""
    final, searched_on = _marks(suite), _marks(validation)
    if shared := final.keys() & searched_on.keys():
        count = len({searched_on[mark] for mark in shared})
        places = listed(sorted({f"{final[mark][0]} and {searched_on[mark][0]}" for mark in shared}))
        raise ConfigError(
            f"{counted(count, 'prompt')} of the validation suite {validation.path} {'are' if count > 1 else 'is'} also in the "
            f"suite {suite.path}, in the same language or another ({places}). A setting that is searched on the prompts it is "
            "then judged by looks better than it is. Take other prompts for the validation."
        )


def _marks(suite: PlannedSuite) -> dict[Any, tuple[str, str]]:
    """Set and id of each prompt, by its text in all languages of its file, asked or not, and by its file and id."""
    recipe = suite.recipe

    def every(sets: Mapping[str, PromptSettings]) -> dict[str, PromptSettings]:
        return {name: replace(one, languages=None, limit=None) for name, one in sets.items()}

    whole = check_suite(replace(recipe, attack=every(recipe.attack), over_refusal=every(recipe.over_refusal)))
    marks: dict[Any, tuple[str, str]] = {}
    for (kind, name), found in suite.prompts.items():
        asked = {prompt.prompt_id for prompt in found.prompts}
        settings: PromptSettings = getattr(recipe, kind)[name]
        files = [_without_language(file) for file in settings.prompts]
        for prompt in whole[kind, name].prompts:
            if prompt.prompt_id in asked:
                places = [(file, settings.dataset_split, prompt.prompt_id) for file in files]
                for mark in (" ".join(prompt.text.split()).casefold(), *places):
                    marks[mark] = (f"{kind}/{name}", prompt.prompt_id)
    return marks


def _without_language(source: str) -> Path:
    """A file or dataset less the language that its name ends in: those of other languages have the same prompts."""
    path = Path(source).expanduser().resolve()
    code = language_of_file(path)
    return path if code is None else path.with_name(path.stem[: -len(code) - 1] + path.suffix)


# ------------------------------------------------------------------------------------------------------------ the plan


def plan_text(plan: Comparing, states: Mapping[str, str]) -> str:
    """The printed plan.

    Args:
        plan: What will be done.
        states: State of the runs that have begun, by name.
    """
    recipe = plan.recipe
    rows = []
    for run in plan.runs:
        hidden = searched(recipe.search, run.setting)
        changes = [
            f"{key} {_shown(value)}" for key, value in run.setting.changes.items() if key not in hidden
        ]
        changes += [f"{key} searched" for key in hidden]
        rows.append(
            (
                run.name,
                f"{run.seen.steps:,}",
                f"{run.seen.pairs:,}",
                f"{run.seen.tokens:,}",
                states.get(run.name, "to do"),
                ", ".join(changes),
            )
        )
    prompts = [
        f"{kind.replace('_', ' ')} {name}: {counted(len(found.prompts), 'prompt')} in {counted(len(found.languages), 'language')}"
        for (kind, name), found in plan.suite.prompts.items()
    ]
    others = [
        name.replace("_", " ")
        for name in ("reward_gap", "utility", "perplexity")
        if getattr(plan.suite.recipe, name)
    ]
    asked = sum(len(found.prompts) for found in plan.suite.prompts.values())
    models = len(plan.runs) + 1
    lines = [f"{name.ljust(19)} {text}" for name, text in plan.facts.items()]
    lines += [
        f"{'Budget'.ljust(19)} {recipe.budget or 'that of the recipe'}, {counted(len(recipe.seeds), 'seed')}; "
        f"trained weights kept: {recipe.keep}",
        f"{'Measured'.ljust(19)} {'; '.join([*prompts, *others])} ({plan.suite.path})",
    ]
    if recipe.search is not None and plan.validation is not None:
        count = sum(bool(searched(recipe.search, setting)) for setting in plan.settings)
        lines.append(
            f"{'Search'.ljust(19)} {counted(count * recipe.search.trials, 'trial')}, {recipe.search.trials} for each of "
            f"{counted(count, 'setting')}: "
            + ", ".join(f"{key} {parameter}" for key, parameter in recipe.search.parameters.items())
            + f" ({plan.validation.path})"
        )
    table = TextTable(
        f"{counted(len(plan.runs), 'run')} of {counted(len(plan.settings), 'setting')}",
        ("Run", "steps", "pairs", "tokens", "state", "changes"),
        tuple(rows),
        notes=(
            f"In all {sum(r.seen.steps for r in plan.runs):,} steps on {sum(r.seen.pairs for r in plan.runs):,} pairs, and "
            f"{models * asked:,} answers of {counted(models, 'model')}.",
        ),
    )
    return "\n".join([*lines, "", table.plain(), *(f"Note: {note}" for note in plan.notes)])


def _shown(value: Any) -> str:
    return (
        "+".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
