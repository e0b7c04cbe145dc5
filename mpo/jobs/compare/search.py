"""Searches settings before a comparison: each trial is trained and measured on prompts that the comparison does not use.

Optuna proposes the values (Akiba et al., KDD 2019, arXiv 1907.10902): it samples conditionally on what was tried, keeps its
studies in a file, and is what most people search with. Its sampler is seeded for each trial anew, by the search's seed and the
trial's number, so that a search that was interrupted proposes what one that was not would have.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpo.common.tables import TextTable
from mpo.common.words import counted, number
from mpo.errors import DependencyError, MPOError
from mpo.evaluation.comparison import Searched, Trial
from mpo.jobs.compare.outcomes import measured, score_of
from mpo.jobs.compare.planning import Comparing, plan_runs, replace_changes
from mpo.jobs.compare.recipe import Parameter, Search, Setting, searched
from mpo.jobs.compare.running import carry_out, drop_weights, read_record

FOLDER, STUDY = "search", "study.jsonl"
_ERROR, _REPEATS = "error", "repeats"  # why a trial failed; number of the failed one that it repeats


def require_optuna() -> None:
    """Makes sure that Optuna is installed.

    Raises:
        DependencyError: It is not.
    """
    try:
        import optuna
    except ImportError:
        raise DependencyError(
            "`search` needs Optuna, which is not installed. Install it with `pip install 'mpo-align[search]'`, or remove "
            "`search` and `validation_suite`."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def search_settings(plan: Comparing) -> tuple[list[Searched], list[Setting]]:
    """Searches every setting that something is searched for.

    What is done is not done again; a trial that was interrupted goes on with the values it had. One that failed is tried
    again, unless a run of the setting has begun, which another find would not fit.

    Args:
        plan: The comparison.

    Returns:
        The searches, and the settings with what was found. A setting whose every trial failed is not among them.
    """
    require_optuna()
    search = plan.recipe.search
    assert search is not None
    searches, settings = [], []
    for setting in plan.settings:
        if not searched(search, setting):
            settings.append(setting)
            continue
        found = _search(plan, search, setting)
        searches.append(found)
        if found.best:
            settings.append(replace_changes(setting, found.best))
        else:
            print(f"Every trial of {setting.name} failed; it is left out.", flush=True)
    return searches, settings


def _search(plan: Comparing, search: Search, setting: Setting) -> Searched:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    folder = plan.out / FOLDER / setting.name
    folder.mkdir(parents=True, exist_ok=True)
    parameters = searched(search, setting)
    space = {key: distribution(parameter) for key, parameter in parameters.items()}
    name = _study_name(plan, search, setting)
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / STUDY))),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
    )
    state = optuna.trial.TrialState
    has_begun = any(run.record.is_file() for run in plan.runs if run.setting.name == setting.name)
    failed = [trial.number for trial in _finished(study) if trial.state == state.FAIL]
    for trial in study.trials:
        if trial.state == state.RUNNING:  # it was interrupted
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=state.FAIL)
        elif trial.number in failed and not has_begun:
            study.enqueue_trial(trial.params, user_attrs={_REPEATS: trial.number})
    if failed and has_begun:
        print(
            f"{counted(len(failed), 'trial')} of {setting.name} failed; its runs have begun with the best of the others. To try "
            f"again, remove {plan.runs[0].folder.parent / setting.name}-s*.",
            flush=True,
        )
    while (done := len(_finished(study))) < search.trials:
        study.sampler = optuna.samplers.TPESampler(seed=search.sampler_seed + done)
        asked = study.ask(space)
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in asked.params.items())
        print(f"\n[search {setting.name}, trial {done + 1}/{search.trials}] {shown}", flush=True)
        score, error = _try(plan, search, setting, asked.params, folder, name)
        if score is None:
            asked.set_user_attr(_ERROR, error)
            study.tell(asked, state=state.FAIL)
            continue
        print(f"Score: {score:.4f}", flush=True)
        study.tell(asked, score)
    trials = [Trial(dict(t.params), t.value, t.user_attrs.get(_ERROR, "")) for t in _finished(study)]
    first = max(trials, key=_score)
    best = {} if first.score is None else first.values
    _show(setting.name, trials)
    return Searched(setting.name, trials, best)


def _finished(study: Any) -> list[Any]:
    """The trials that came to an end and that no other repeats, in order."""
    repeated = {t.user_attrs.get(_REPEATS) for t in study.trials}
    ended = [t for t in study.trials if t.state.name == "COMPLETE" or _ERROR in t.user_attrs]
    return [t for t in ended if t.number not in repeated]


def _study_name(plan: Comparing, search: Search, setting: Setting) -> str:
    """A name that changes with all that a score depends on, so that no search takes over the trials of another."""
    assert plan.validation is not None
    space = searched(search, setting)
    run = next(run for run in plan.runs if run.setting.name == setting.name)
    what = {
        "space": {key: str(parameter) for key, parameter in space.items()},
        "aim": search.objective if search.aim is None else str(search.aim),
        "settings": {key: value for key, value in run.settings.items() if key not in space},
        "suite": plan.validation.settings,
    }
    return _digest(what)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def distribution(parameter: Parameter) -> Any:
    """What Optuna draws a parameter from."""
    import optuna

    if parameter.choices is not None:
        return optuna.distributions.CategoricalDistribution(parameter.choices)
    assert parameter.low is not None and parameter.high is not None
    if parameter.whole:
        return optuna.distributions.IntDistribution(
            int(parameter.low), int(parameter.high), log=parameter.log
        )
    return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _try(
    plan: Comparing, search: Search, setting: Setting, values: dict[str, Any], folder: Path, study: str
) -> tuple[float | None, str]:
    """The score of a trial, or None and why it failed."""
    assert plan.validation is not None
    tried = replace(replace_changes(setting, values), name=f"t{_digest([study, values])}")
    try:
        (run,) = plan_runs(
            plan.recipe, plan.base, [tried], folder=folder / "runs", seeds=plan.recipe.seeds[:1]
        ).runs
        record = carry_out(run, plan.base, plan.validation, folder)
        if record.state != "done":
            return None, record.error
        score = score_of(measured(folder, run.name), search.aim)
    except MPOError as error:
        return None, str(error)
    if read_record(run) is not None:
        drop_weights(run.folder)
    if score is None:
        return None, "No language has both a harmful and a harmless prompt with a verdict."
    return score, ""


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score


def _show(name: str, trials: list[Trial]) -> None:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    rows = tuple(
        (
            str(place),
            *(_shown(trial.values.get(key)) for key in keys),
            "failed" if trial.score is None else number(100 * trial.score, 1),
        )
        for place, trial in enumerate(sorted(trials, key=_score, reverse=True), 1)
    )
    print()
    TextTable(f"Search of {name}", ("Rank", *keys, "score, %"), rows).show()


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
