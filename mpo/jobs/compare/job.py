"""Trains every run of a comparison, measures it, and lets go of it: what is done is never done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mpo.common.locks import locked_folder
from mpo.common.provenance import collect
from mpo.common.typed_json import write_typed
from mpo.errors import MPOError, StoppedBySignal
from mpo.evaluation.comparison import COMPARISON, ComparisonResult, Searched
from mpo.jobs.compare.outcomes import compared
from mpo.jobs.compare.planning import (
    Comparing,
    PlannedRun,
    plan_comparison,
    plan_runs,
    plan_text,
)
from mpo.jobs.compare.recipe import BASE, CompareRecipe
from mpo.jobs.compare.running import (
    carry_out,
    check_room,
    let_go,
    measure_base,
    read_record,
    read_records,
    refuse_changed,
    state,
)
from mpo.report.comparison import MEASURED, comparison_table, write_comparison
from mpo.report.page import write_report


def compare(recipe: CompareRecipe, *, dry_run: bool = False) -> Path | None:
    """Trains, measures and compares.

    A run that fails is recorded and the others go on. A second call does what is left: failed runs are tried again, one
    that was interrupted goes on from its last checkpoint.

    Args:
        recipe: From :func:`mpo.jobs.compare.recipe.load_comparison`.
        dry_run: Check everything, print the runs and stop.

    Returns:
        The page; None for a dry run.

    Raises:
        MPOError: Something is wrong with the recipe or a run of it, the folder holds runs with other settings, or every run
            failed.
        StoppedBySignal: It was told to end; what was being trained has saved its state where its recipe keeps checkpoints.
    """
    print(f"Checking {recipe.source_path}", flush=True)
    if recipe.search is not None:
        from mpo.jobs.compare.search import require_optuna

        require_optuna()
    plan = plan_comparison(recipe, on_this_machine=not dry_run)
    records = read_records(plan.runs)
    if recipe.search is None:  # what a search finds decides on the settings
        refuse_changed(plan.runs, records, plan.suite)
    if not dry_run:
        check_room(plan, records)
    states = {
        run.name: state(run, records[run.name], plan.suite, plan.out)
        for run in plan.runs
        if run.name in records
    }
    print(f"\n{plan_text(plan, states)}\n", flush=True)
    if dry_run:
        print("This was a dry run: nothing was trained and nothing was measured.")
        return None
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked_folder(
        plan.out, f"Another comparison is running in {plan.out}. Let it finish, or choose another `out`."
    ):
        try:
            return _compare(plan)
        except StoppedBySignal as stop:
            raise StoppedBySignal(
                stop.number,
                f"Interrupted. What is done is kept in {plan.out}; the same command goes on from there.",
            ) from None


def _compare(plan: Comparing) -> Path:
    recipe, out = plan.recipe, plan.out
    searches: list[Searched] = []
    runs: Sequence[PlannedRun] = plan.runs
    if recipe.search is not None:
        from mpo.jobs.compare.search import search_settings

        searches, settings = search_settings(plan)
        if not settings:
            raise MPOError(
                f"Every trial of every search failed. The logs are in {out}; the same command tries them again."
            )
        found = plan_runs(recipe, plan.base, settings).runs
        runs = [run for seed in recipe.seeds for run in found if run.seed == seed]
        refuse_changed(runs, read_records(runs), plan.suite)
    measure_base(plan)
    for number, run in enumerate(runs, 1):
        print(f"\n[{number}/{len(runs)}] {run.name}", flush=True)
        carry_out(run, plan.base, plan.suite, out)
        let_go(runs, recipe.keep, out)
    page = _report(plan, runs, searches)
    failed = {run.name: record for run in runs if (record := read_record(run)) and record.state == "failed"}
    if failed:
        raise MPOError(
            f"{len(failed)} of {len(runs)} runs failed, the others are on the page. "
            + " ".join(f"{name}: {record.error}" for name, record in failed.items())
            + " Run the same command again to make up for them."
        )
    return page


def _report(plan: Comparing, runs: Sequence[PlannedRun], searches: list[Searched]) -> Path:
    comparison = _comparison(plan, runs, searches)
    write_typed(plan.out / COMPARISON, comparison)
    details = None
    names = [BASE, *(run.name for run in comparison.runs if run.state == "done")]
    try:
        details, _ = write_report(plan.out / MEASURED, models=names, title=f"{plan.recipe.title}: every run")
    except MPOError as error:
        print(f"No page of every run: {error}", flush=True)
    page, _ = write_comparison(comparison, plan.out, details=details)
    print()
    comparison_table(comparison).show()
    print(f"\nPage: {page}", flush=True)
    return page


def _comparison(plan: Comparing, runs: Sequence[PlannedRun], searches: list[Searched]) -> ComparisonResult:
    return replace(
        compared(plan, runs, read_records(runs), searches),
        provenance=collect(base_model=plan.model.name, data_fingerprint=str(runs[0].settings["data"])),
    )
