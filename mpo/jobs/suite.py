"""Every measurement of a recipe on every model, into one folder, skipping what is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpo.common.files import write_bytes
from mpo.common.typed_json import read_typed, write_typed
from mpo.data.reading import missing_file_error
from mpo.data.refusals import phrases_fingerprint
from mpo.errors import ConfigError, MPOError, StorageError
from mpo.evaluation.answers import Framing
from mpo.evaluation.engines import Generation, ModelChoice
from mpo.evaluation.judge_quality import measure_judge
from mpo.evaluation.judges import JudgeChoice, check_judge, make_judge
from mpo.evaluation.judges.grader import check_grader
from mpo.evaluation.judges.guard import has_own_replies
from mpo.evaluation.judges.phrases import PhraseJudge
from mpo.evaluation.mt_bench import (
    fingerprint_questions,
    load_questions,
    measure_mt_bench,
    shown_origin,
)
from mpo.evaluation.perplexity import measure_perplexity, read_lines
from mpo.evaluation.prompts import PromptSet, load_prompts, load_template
from mpo.evaluation.results import (
    JUDGE,
    LEAKS,
    MT_BENCH,
    PERPLEXITY,
    REWARD_GAP,
    SAFETY,
    SUITE,
    UTILITY,
    SuiteIndex,
    read_reward_gap,
)
from mpo.evaluation.reward_gap import RewardGapTable
from mpo.evaluation.safety import measure_safety, model_folder
from mpo.evaluation.tasks import TASKS
from mpo.evaluation.utility import measure_utility, require_harness
from mpo.jobs.measure import load_pairs, measure_reward_gap
from mpo.jobs.suite_leaks import write_leaks
from mpo.jobs.suite_recipe import PromptSettings, RewardGapSettings, SuiteRecipe
from mpo.report.answers import PAGE as ANSWERS
from mpo.report.page import write_report
from mpo.report.run import CURVE


@dataclass(frozen=True)
class Job:
    """One measurement of one model.

    Attributes:
        name: ``MODEL/MEASUREMENT``, with the prompt set for attack and over-refusal: the place of its files.
        settings: What its result depends on, ready for JSON.
        file: The file that its last step writes.
        run: Does it.
    """

    name: str
    settings: dict[str, Any]
    file: Path
    run: Callable[[], Any]


def run_suite(recipe: SuiteRecipe, *, dry_run: bool = False, report: bool = True) -> tuple[Path, Path] | None:
    """Runs what is not done yet, then writes the report.

    A measurement counts as done when its result is there and was made by the suite with the same settings, the same
    model and adapter (by the content of their weights) and the same files. One that fails does not stop the others.

    Args:
        recipe: What to measure.
        dry_run: Check the recipe and its files, print what would be measured, stop.
        report: Write the report.

    Returns:
        The paths of the page and the table; None for a dry run, or without a report.

    Raises:
        MPOError: A file of the recipe cannot be used, or measurements failed; the message names them.
    """
    out = Path(recipe.out)
    prompts = check_suite(recipe)
    jobs = list(_jobs(recipe, out, prompts))
    done = _read_done(out)
    left = [job for job in jobs if not _is_done(job, done)]
    names = {job.name for job in left}
    for job in jobs:
        print(f"  {'to do' if job.name in names else 'done '}  {job.name}", flush=True)
    if dry_run:
        return None
    failed = []
    for number, job in enumerate(left, 1):
        print(f"\n[{number}/{len(left)}] {job.name}", flush=True)
        try:
            job.run()
        except MPOError as error:
            print(f"Failed: {error}", flush=True)
            failed.append((job.name, error))
            continue
        done[job.name] = _fingerprint(job.settings)
        _write_done(out, recipe, done)
    try:
        if (looked := write_leaks(out, recipe, prompts, done.get(LEAKS))) is not None:
            done[LEAKS] = looked
    except MPOError as error:
        print(f"The prompts were not looked for in the training data: {error}", flush=True)
    _write_done(out, recipe, done)
    if len(failed) == len(jobs):
        raise MPOError(f"Every measurement failed. The first, {failed[0][0]}: {failed[0][1]}")
    failed += _measure_judges(recipe, out)
    _take_curves(recipe, out)
    paths = None
    if report:
        paths = write_report(out, title=recipe.report.title, examples=recipe.report.examples)
        answers = out / ANSWERS
        print(f"\nReport: {paths[0]}, {f'{answers}, ' if answers.is_file() else ''}{paths[1]}")
    if failed:
        raise MPOError(
            f"{len(failed)} of {len(jobs) + (recipe.gold is not None)} measurements failed, the others are "
            f"{'in the report' if report else f'in {out}'}. "
            + " ".join(f"{name}: {error}" for name, error in failed)
            + " Run the same command again to make up for them."
        )
    return paths


def check_suite(recipe: SuiteRecipe) -> dict[tuple[str, str], PromptSet]:
    """Reads every prompt set, by task and name, and looks for everything else that would otherwise show only after hours.

    Raises:
        MPOError: A file of the recipe cannot be used.
    """
    prompts = {
        (kind, name): _load_prompts(name, settings)
        for kind in TASKS
        for name, settings in getattr(recipe, kind).items()
    }
    _check_files(recipe)
    return prompts


def _measure_judges(recipe: SuiteRecipe, out: Path) -> list[tuple[str, MPOError]]:
    """The judges against the labels of the recipe, where it has some; what failed."""
    if recipe.gold is None:
        return []
    print("\nThe judges against labels", flush=True)
    try:
        measure_judge(out, recipe.gold, confidence=recipe.confidence)
    except MPOError as error:
        print(f"Failed: {error}", flush=True)
        (out / JUDGE).unlink(missing_ok=True)  # it would be of other labels or other answers
        return [("gold", error)]
    return []


def _take_curves(recipe: SuiteRecipe, out: Path) -> None:
    """The picture of a model's training beside its measurements, where its folder here has one, for the report."""
    for name, model in recipe.models.items():
        curve = Path(model.adapter or model.model) / CURVE
        if model.engine != "server" and curve.is_file() and (out / name).is_dir():
            write_bytes(out / name / CURVE, curve.read_bytes())


def _load_prompts(name: str, settings: PromptSettings) -> PromptSet:
    return load_prompts(
        settings.prompts,
        name=name,
        languages=settings.languages,
        limit=settings.limit,
        prompt_column=settings.prompt_column,
        language_column=settings.language_column,
        language=settings.prompt_language,
        split=settings.dataset_split,
        bad_rows=settings.bad_rows,
    )


def _check_judges(recipe: SuiteRecipe) -> None:
    """Every judge can judge what it is to judge."""
    if recipe.mt_bench is not None:
        try:
            check_grader(recipe.mt_bench.judge or recipe.judge)
        except ConfigError as error:
            raise ConfigError(f"`mt_bench`: {error} Set `mt_bench.judge`, or `judge` for all.") from None
    hint = "Set `over_refusal_judge` to a judge of refusals; `judge` and `second_judge` are then for attacks alone."
    for kind, task in TASKS.items():
        for key, choice in recipe.judges(kind).items() if getattr(recipe, kind) else ():
            try:
                check_judge(choice, task)
            except ConfigError as error:
                more = f" {hint}" if kind == "over_refusal" and not key.startswith(kind) else ""
                raise ConfigError(f"`{key}` of `{kind}`: {error}{more}") from None
            shared = recipe.attack and recipe.over_refusal and recipe.over_refusal_judge is None
            if shared and choice.prompt is not None and not has_own_replies(choice):
                raise ConfigError(
                    f"`{key}.prompt`: one judging prompt asks for the verdicts of one task, and this one would be put to both. "
                    f"{hint}"
                )


def _check_files(recipe: SuiteRecipe) -> None:
    _check_judges(recipe)
    for name, model in recipe.models.items():
        model_folder(model, name)
    for settings in (*recipe.attack.values(), *recipe.over_refusal.values()):
        if settings.template is not None:
            load_template(settings.template)
    if (gap := recipe.reward_gap) is not None:
        load_pairs(gap.data, **_reading(gap))
    if recipe.perplexity is not None:
        for file in recipe.perplexity.texts.values():
            read_lines(file)
    if recipe.utility is not None:
        require_harness()
    if recipe.gold is not None and not os.path.isfile(recipe.gold):
        raise missing_file_error(Path(recipe.gold))


def _reading(settings: RewardGapSettings) -> dict[str, Any]:
    """How the pairs are read."""
    return {
        "source_language": settings.source_language,
        "languages": settings.languages,
        "limit": settings.limit,
        "split": settings.dataset_split,
        "bad_rows": settings.bad_rows,
    }


def _jobs(recipe: SuiteRecipe, out: Path, prompts: dict[tuple[str, str], PromptSet]) -> Iterator[Job]:
    gaps: list[Job] = []
    guards = {kind: _guards(recipe, kind) for kind in dict.fromkeys(kind for kind, _ in prompts)}
    for name, model in recipe.models.items():
        identity = _identity(model)
        if model.engine == "server":
            if recipe.reward_gap or recipe.utility or recipe.perplexity:
                print(
                    f"{name} is behind a server: reward gap, utility and perplexity need its weights and are left out."
                )
        elif recipe.reward_gap is not None:
            job = _reward_gap_job(recipe, out, name, model, identity, gaps)
            gaps.append(job)
            yield job
        for (kind, prompt_set), loaded in prompts.items():
            yield _safety_job(recipe, out, name, model, identity, kind, prompt_set, loaded, guards[kind])
        if recipe.mt_bench is not None:
            yield _mt_bench_job(recipe, out, name, model, identity)
        if model.engine != "server":
            yield from _capability_jobs(recipe, out, name, replace(model, engine="transformers"), identity)


def _identity(model: ModelChoice) -> dict[str, Any]:
    """What tells the model from another, whatever its folder is called."""
    if model.engine == "server":
        return {
            "url": model.url,
            "model": model.model,
            "chat_template_kwargs": model.chat_template_kwargs,
        }
    loaded = {"device": model.device, "attention": model.attn_implementation}
    return {**model.open().identity().to_dict(), **loaded}


def phrases_of(judges: Iterable[JudgeChoice]) -> dict[str, str]:
    """The content of the refusal phrases, where a judge reads them: with others its verdicts are others."""
    reads = any(judge.name == PhraseJudge.label for judge in judges)
    return {"phrases": phrases_fingerprint()} if reads else {}


def _guards(recipe: SuiteRecipe, kind: str) -> list[dict[str, Any]]:
    """What tells the guards that judge this kind from others, by the content of their weights; nothing is loaded."""
    guards = [choice for choice in recipe.judges(kind).values() if choice.name == "guard"]
    return [make_judge(choice, TASKS[kind]).settings() for choice in guards]


def _reward_gap_job(
    recipe: SuiteRecipe,
    out: Path,
    name: str,
    model: ModelChoice,
    identity: dict[str, Any],
    earlier: Sequence[Job],
) -> Job:
    settings = recipe.reward_gap
    assert settings is not None

    def run() -> None:
        measure_reward_gap(
            settings.data,
            replace(model, engine="transformers", url=None),
            before=_base_table(earlier, depends, out),
            out=out / name,
            beta=settings.beta,
            confidence=recipe.confidence,
            max_length=settings.max_length,
            max_response_length=settings.max_response_length,
            **_reading(settings),
        )

    depends = {
        **asdict(settings),
        "files": _contents(settings.data),
        "model": identity,
        "confidence": recipe.confidence,
    }
    return Job(f"{name}/reward_gap", depends, out / name / REWARD_GAP, run)


def _base_table(earlier: Sequence[Job], depends: dict[str, Any], out: Path) -> RewardGapTable | None:
    """The reward gaps of an adapter's base model, where this suite has them with the very same settings."""
    wanted = {**depends, "model": {**depends["model"], "adapter": None}}
    done = _read_done(out)
    for job in earlier:
        if job.settings == wanted and _is_done(job, done):
            try:
                return read_reward_gap(job.file).after
            except StorageError:
                return None
    return None


def _safety_job(
    recipe: SuiteRecipe,
    out: Path,
    name: str,
    model: ModelChoice,
    identity: dict[str, Any],
    kind: str,
    prompt_set: str,
    prompts: PromptSet,
    guards: list[dict[str, Any]],
) -> Job:
    settings: PromptSettings = getattr(recipe, kind)[prompt_set]
    template = None if settings.template is None else load_template(settings.template)
    framing = Framing(template, settings.system_prompt)
    judge, second_judge = (*recipe.judges(kind).values(), None)[:2]
    assert judge is not None

    def run() -> None:
        measure_safety(
            TASKS[kind],
            prompts,
            model=model,
            out=out,
            generation=recipe.generation,
            judge=judge,
            second_judge=second_judge,
            framing=framing,
            name=name,
            confidence=recipe.confidence,
        )

    judges = list(recipe.judges(kind).values())
    depends = {
        "prompts": prompts.fingerprint,
        "framing": asdict(framing),
        "generation": recipe.generation.settings(),
        "judges": [asdict(judge) for judge in judges],
        "files": _contents([judge.prompt for judge in judges if judge.prompt is not None]),
        **({"guards": guards} if guards else {}),
        **phrases_of(judges),
        "model": identity,
        "engine": [model.engine, model.batch_size],
        "confidence": recipe.confidence,
    }
    return Job(f"{name}/{kind}/{prompt_set}", depends, out / name / kind / prompt_set / SAFETY, run)


def _mt_bench_job(
    recipe: SuiteRecipe, out: Path, name: str, model: ModelChoice, identity: dict[str, Any]
) -> Job:
    settings = recipe.mt_bench
    assert settings is not None
    questions = load_questions(settings.questions, language=settings.language, limit=settings.limit)
    judge, generation = settings.judge or recipe.judge, Generation(settings.max_new_tokens)

    def run() -> None:
        measure_mt_bench(
            questions,
            model=model,
            judge=judge,
            out=out,
            generation=generation,
            name=name,
            origin=shown_origin(settings.questions),
            confidence=recipe.confidence,
        )

    depends = {
        "questions": fingerprint_questions(questions),
        "generation": generation.settings(),
        "judge": asdict(judge),
        "model": identity,
        "engine": [model.engine, model.batch_size],
        "confidence": recipe.confidence,
    }
    return Job(f"{name}/mt_bench", depends, out / name / MT_BENCH, run)


def _capability_jobs(
    recipe: SuiteRecipe, out: Path, name: str, model: ModelChoice, identity: dict[str, Any]
) -> Iterator[Job]:
    utility, perplexity = recipe.utility, recipe.perplexity
    if utility is not None:
        yield Job(
            f"{name}/utility",
            {
                **asdict(utility),
                "files": _contents(
                    sorted(Path(utility.task_folder).rglob("*")) if utility.task_folder else ()
                ),
                "model": identity,
            },
            out / name / UTILITY,
            lambda: measure_utility(**asdict(utility), model=model, out=out, name=name),
        )
    if perplexity is not None:
        yield Job(
            f"{name}/perplexity",
            {
                **asdict(perplexity),
                "files": _contents(perplexity.texts.values()),
                "confidence": recipe.confidence,
                "model": identity,
            },
            out / name / PERPLEXITY,
            lambda: measure_perplexity(
                **asdict(perplexity), model=model, out=out, name=name, confidence=recipe.confidence
            ),
        )


# ---------------------------------------------------------------------------------------------------------- what is done


def _contents(files: Any) -> list[str]:
    """Hashes of the files among the names; a data set on the Hub has none."""
    return [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if os.path.isfile(f)]


def _fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode("utf-8")).hexdigest()


def _is_done(job: Job, done: dict[str, str]) -> bool:
    return job.file.is_file() and done.get(job.name) == _fingerprint(job.settings)


def _read_done(out: Path) -> dict[str, str]:
    """What the suite has finished in this folder; nothing where its file is missing or damaged."""
    try:
        return read_typed(out / SUITE, SuiteIndex).done
    except StorageError:
        return {}


def _write_done(out: Path, recipe: SuiteRecipe, done: dict[str, str]) -> None:
    write_typed(out / SUITE, SuiteIndex(models=list(recipe.models), done=done))
