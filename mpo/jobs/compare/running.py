"""One run of a comparison: trained, measured, and let go; how far it is lies in its folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpo.common.files import write_json
from mpo.common.typed_json import read_typed, write_typed
from mpo.common.words import ARROW, counted, duration, shown_value, size
from mpo.errors import ConfigError, MPOError, StorageError
from mpo.evaluation.comparison import RunRecord
from mpo.evaluation.results import METRICS, TrainingMetrics
from mpo.jobs.compare import processes
from mpo.jobs.compare.outcomes import measured, score_of
from mpo.jobs.compare.planning import Comparing, PlannedRun, PlannedSuite, as_stored
from mpo.jobs.compare.recipe import BASE
from mpo.report.comparison import MEASURED
from mpo.training.checkpoints import last_complete_checkpoint

TRAIN_LOG, BASE_SETTINGS = "train.log", "base.settings.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def carry_out(run: PlannedRun, base: Path, suite: PlannedSuite, out: Path) -> RunRecord:
    """Trains and measures a run, as far as that is not done yet, and writes how far it is.

    Args:
        run: What to train.
        base: The training recipe.
        suite: What measures it.
        out: Folder in which ``measured`` is.
    """
    record = read_record(run)
    if record is not None and _is_done(record, run, suite, out):
        print(f"Done: {_trained(record)}", flush=True)
        return record
    if record is not None and _is_trained(record, run):
        record = replace(record, state="trained")
    else:
        record = _train(run, base, record)
    if record.state == "trained":
        record = _measure(run, record, suite, out)
    if record.state == "failed":
        print(f"Failed: {record.error}", flush=True)
    return record


def state(run: PlannedRun, record: RunRecord, suite: PlannedSuite, out: Path) -> str:
    """How far a run is that has begun, for the plan: one that is done is measured again where its measurement no longer holds."""
    if record.state != "done" or _is_done(record, run, suite, out):
        return record.state
    return "to measure" if _is_trained(record, run) else "to do"


def _is_done(record: RunRecord, run: PlannedRun, suite: PlannedSuite, out: Path) -> bool:
    """Whether it was measured by this very suite, and its results are there."""
    return record.state == "done" and (out / MEASURED / run.name).is_dir() and record.suite == suite.settings


def _is_trained(record: RunRecord, run: PlannedRun) -> bool:
    """Whether its weights are there: also where only its measurement has failed."""
    return record.pairs is not None and record.kept and any(run.folder.glob("*.safetensors"))


def _train(run: PlannedRun, base: Path, record: RunRecord | None) -> RunRecord:
    how, before = "--overwrite_output_dir=true", 0.0
    if last_complete_checkpoint(run.folder) is not None:
        how, before = "--resume_from_checkpoint=auto", _seconds(run, record)
    record = _write(run, RunRecord(state="started", settings=run.settings, seconds=before))
    started = time.monotonic()
    try:
        ended = processes.run_mpo(
            ["train", str(base), *run.words, f"--output_dir={run.folder}", how], run.folder / TRAIN_LOG
        )
    finally:  # also where it is interrupted
        record = _write(run, replace(record, seconds=before + time.monotonic() - started))
    if ended.code != 0:
        return _write(run, replace(record, state="failed", error=f"Training: {ended.reason}"))
    try:
        metrics = read_typed(run.folder / METRICS, TrainingMetrics)
    except StorageError as error:
        return _write(run, replace(record, state="failed", error=f"Training: {error}"))
    for checkpoint in run.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return _write(
        run,
        replace(
            record,
            state="trained",
            steps=metrics.steps,
            pairs=metrics.pairs or 0,
            tokens=metrics.tokens,
            peak_memory=metrics.peak_memory,
        ),
    )


def _seconds(run: PlannedRun, record: RunRecord | None) -> float:
    """How long a run has been trained; where this process was killed meanwhile, up to the last line of the run's log."""
    if record is None:
        return 0.0
    log = run.folder / TRAIN_LOG
    lost = log.stat().st_mtime - run.record.stat().st_mtime if log.is_file() else 0.0
    return record.seconds + max(0.0, lost)


def _measure(run: PlannedRun, record: RunRecord, suite: PlannedSuite, out: Path) -> RunRecord:
    adapter = str(run.folder) if run.trains_adapter else None
    base = suite.recipe.models[BASE]
    model = suite.model(
        base.model if run.trains_adapter else str(run.folder),
        adapter,
        revision=base.revision if run.trains_adapter else None,
    )
    models = {BASE: asdict(base)} if (out / MEASURED / BASE).is_dir() else {}
    ended = processes.run_mpo(
        suite_words(suite, out, {**models, run.name: asdict(model)}), out / MEASURED / f"{run.name}.log"
    )
    if ended.code != 0:
        return _write(run, replace(record, state="failed", error=f"Measuring: {ended.reason}"))
    return _write(run, replace(record, state="done", suite=suite.settings, error=""))


def suite_words(suite: PlannedSuite, out: Path, models: Mapping[str, Any]) -> list[str]:
    """The command that measures models in place of the suite's own."""
    given = {
        name: {key: value for key, value in model.items() if value is not None}
        for name, model in models.items()
    }
    return [
        "evaluate",
        "suite",
        str(suite.path),
        "--no_report",
        f"--out={out / MEASURED}",
        f"--models={json.dumps(given, ensure_ascii=False)}",
    ]


def measure_base(plan: Comparing) -> None:
    """Measures the model that all runs start from, once.

    Raises:
        MPOError: It cannot be measured, so there would be nothing to compare with.
    """
    done = plan.out / MEASURED / BASE_SETTINGS
    settings = as_stored({"model": plan.model, "suite": plan.suite.settings})
    if (
        done.is_file()
        and (plan.out / MEASURED / BASE).is_dir()
        and read_typed(done, dict[str, Any], "Delete it, and the base model is measured again.") == settings
    ):
        return
    print("Measuring the base model", flush=True)
    words = suite_words(plan.suite, plan.out, {BASE: asdict(plan.suite.recipe.models[BASE])})
    ended = processes.run_mpo(words, plan.out / MEASURED / f"{BASE}.log")
    if ended.code != 0:
        raise MPOError(
            f"The base model could not be measured, so no run was trained: {ended.reason} The log is "
            f"{plan.out / MEASURED / f'{BASE}.log'}."
        )
    write_json(done, settings)


def check_room(plan: Comparing, records: Mapping[str, RunRecord]) -> None:
    """Makes sure that the disk holds what the runs that are left write, as far as it is kept.

    Raises:
        StorageError: It does not.
    """
    left = [run for run in plan.runs if run.name not in records or records[run.name].state != "done"]
    if not left:
        return
    kept = sum(run.weights for run in left) if plan.recipe.keep == "adapters" else 0
    needed = kept + max(run.disk for run in left)
    place = next(folder for folder in (plan.out, *plan.out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"The disk of {plan.out} has {size(free)} free, and the {counted(len(left), 'run')} that are left may need "
            f"{size(needed)}. Make room, choose another `out`, or keep less: `keep: best` or `keep: none`."
        )


def let_go(runs: Sequence[PlannedRun], keep: str, out: Path) -> None:
    """Removes the trained weights of measured runs that are not to be kept; their results stay."""
    done = [
        (run, record) for run in runs if (record := read_record(run)) is not None and record.state == "done"
    ]
    if keep == "adapters":
        return
    best = None
    if keep == "best":
        scores = {
            run.name: score for run, _ in done if (score := score_of(measured(out, run.name))) is not None
        }
        best = max(scores, key=lambda name: scores[name], default=None)
    for run, record in done:
        if run.name != best and record.kept:
            drop_weights(run.folder)
            _write(run, replace(record, kept=False))


def drop_weights(folder: Path) -> None:
    """Removes trained weights and leaves what explains them."""
    for pattern in _WEIGHTS:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _trained(record: RunRecord) -> str:
    return f"{record.steps:,} steps, {record.pairs or 0:,} pairs, {duration(record.seconds)}"


# ------------------------------------------------------------------------------------------------------ how far it is


def read_record(run: PlannedRun) -> RunRecord | None:
    """How far a run is, or None where it has not begun.

    Raises:
        StorageError: Its record is damaged.
    """
    if not run.record.is_file():
        return None
    return read_typed(run.record, RunRecord, f"Delete {run.folder} to train it again.")


def read_records(runs: Sequence[PlannedRun]) -> dict[str, RunRecord]:
    """The records of the runs that have begun, by name."""
    return {run.name: record for run in runs if (record := read_record(run)) is not None}


def _write(run: PlannedRun, record: RunRecord) -> RunRecord:
    write_typed(run.record, record)
    return record


def refuse_changed(runs: Sequence[PlannedRun], records: Mapping[str, RunRecord], suite: PlannedSuite) -> None:
    """Makes sure that what is there was made with the settings of now.

    Other refusal phrases are no fault where a run's weights are there: it is measured again, which asks it nothing anew.

    Raises:
        ConfigError: It names every run whose settings differ, and what differs.
    """
    changed = []
    for run in runs:
        record = records.get(run.name)
        if record is None:
            continue
        if found := _differences(record.settings, run.settings):
            changed.append(f"{run.name} was trained with other settings ({found})")
        elif record.suite and (
            found := _differences(record.suite, suite.settings, but=["phrases"] if record.kept else ())
        ):
            changed.append(f"{run.name} was measured with another suite ({found})")
    if changed:
        folder = runs[0].folder.parent.parent
        raise ConfigError(
            "\n  ".join([f"{folder} holds runs that do not fit the recipe:", *changed])
            + "\nSet them as they were to go on, give the changed runs other names, or write elsewhere with `--out`."
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], but: Sequence[str] = ()) -> str:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in but]
    return "; ".join(
        f"{name}: {shown_value(then.get(name), 60)} {ARROW} {shown_value(now.get(name), 60)}"
        for name in names
    )
