"""The main job: from a recipe to an aligned model, with its reward gap per language measured before and after."""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpo.common.characters import printable
from mpo.common.files import is_full_disk, write_json, write_text
from mpo.common.locks import locked_folder
from mpo.common.progress import quiet_libraries
from mpo.common.typed_json import write_typed
from mpo.common.words import clock, duration
from mpo.data import count_kinds
from mpo.data.contract import HARMLESS
from mpo.errors import (
    DependencyError,
    ModelError,
    MPOError,
    ProcessLostError,
    StorageError,
    TrainingError,
)
from mpo.evaluation import Comparison, RewardGapTable, Scores, compare, summarize
from mpo.evaluation.results import LEAKS
from mpo.jobs.leak import leaks_result
from mpo.jobs.next_steps import next_steps
from mpo.jobs.preflight import Plan, make_plan
from mpo.jobs.preflight.folder import (
    check_output_folder,
    how_to_train_on,
    remove_earlier_result,
    result_steps,
    set_result_aside,
    wanted_checkpoint,
)
from mpo.jobs.preflight.model import PRECISIONS, half_precision
from mpo.jobs.probing import Probed, finish_probe, start_probe, write_probe_answers
from mpo.modeling.identity import hub_commit
from mpo.modeling.loading import ModelSource, load_adapter, load_model
from mpo.modeling.opening import folder_content
from mpo.report.answers import PAGE as ANSWERS
from mpo.report.run import PROBE_ANSWERS
from mpo.training.allocator import keep_freed_memory
from mpo.training.checkpoints import holds_weights_only, last_complete_checkpoint, steps_of
from mpo.training.launcher import launched_with
from mpo.training.ranks import from_main
from mpo.training.recipe import Recipe, settings_in_effect
from mpo.training.resume import no_step_is_left
from mpo.training.stopping import StopSignals
from mpo.training.workload import seen_by_step

if TYPE_CHECKING:
    from mpo.training.trainer import MPOTrainer

_DESCRIPTIONS = {
    "adapter_model.safetensors": "the trained adapter",
    "adapter_config.json": "its settings and base model",
    "model.safetensors": "the trained model",
    "tokenizer.json": "the tokenizer",
    "recipe.yaml": "the resolved recipe",
    "provenance.json": "data fingerprint, versions, hardware, command",
    "metrics.json": "all that was measured, before and after",
    "training_curve.png": "gap per language and loss, over the steps",
    "overview.png": "gap, harmful prompts answered and harmless ones refused, before and after",
    "behavior.png": "harmless prompts refused against harmful ones answered, before and after",
    PROBE_ANSWERS: "the model's answers to the probe prompts, before and after",
    "reward_gap.png": "reward gap per language, before and after",
    "leaks.json": "evaluation prompts that stand in the training data",
    "dropped_rows.json": "rows of the data that were left out, with the reason",
    "README.md": "the model card",
}


def train(recipe: Recipe, dry_run: bool = False) -> Path:
    """Trains what a recipe describes and leaves the model, its measurements and its card in ``output_dir``.

    In a distributed run every rank calls this; the main process prints and writes.

    Args:
        recipe: From :func:`mpo.training.recipe.load_recipe`.
        dry_run: Load and check everything but the weights, print the plan, and stop.

    Returns:
        The output folder.

    Raises:
        MPOError: Something is wrong with the recipe, the model, the data or this machine. Whatever can be found out
            without loading weights is found out before.
        StoppedBySignal: SIGINT, SIGTERM or SIGUSR1 has ended the run, after its current step where checkpoints are saved.
    """
    quiet_libraries()
    with StopSignals(), ExitStack() as held:
        return _train(recipe, dry_run, held)


def _train(recipe: Recipe, dry_run: bool, held: ExitStack) -> Path:
    main = recipe.training.process_index == 0
    say = _Speaker(main)
    say(f"Checking {recipe.source_path}")
    plan = make_plan(recipe, on_this_machine=not dry_run)
    say(f"\n{plan.to_text()}\n")
    folder = Path(str(plan.recipe.training.output_dir))
    if dry_run:
        say("This was a dry run: no weights were loaded and nothing was trained.")
        return folder

    resolved = plan.recipe.to_yaml()
    provenance = _provenance(plan)
    if main:
        held.enter_context(
            locked_folder(
                folder, f"Another run is training in {folder}. Let it finish, or choose another `output_dir`."
            )
        )
        check_output_folder(plan.recipe)  # another run may have ended since
    say.now(f"Loading {plan.source.name}")
    if recipe.training.device.type == "cpu":
        keep_freed_memory()
    with _explaining(plan):
        trainer = _build_trainer(plan)
        # A checkpoint that does not fit is named before anything is scored.
        checkpoint = trainer.resolve_checkpoint(wanted_checkpoint(plan.recipe))
        ended = checkpoint is not None and no_step_is_left(checkpoint, recipe.training, plan.steps)
        if ended and (complete := _complete(plan, str(checkpoint), trainer)):
            say(complete)
            if recipe.training.push_to_hub and main:
                _push(trainer, folder, say)  # an upload that has failed is made up for
            return folder
        if trainer.resume_changes:
            provenance["resume_changes"] = trainer.resume_changes
        if main:
            set_result_aside(plan.recipe)
            _write_start(plan, resolved, provenance)
        if checkpoint is not None:
            say("\n".join([f"Going on from {checkpoint}", *trainer.resume_changes]))
        before = None
        if plan.held_out is not None:
            before = _score(trainer, plan, "before", say)
        watch = start_probe(trainer, plan.probe, say.now)
        # How many sources `min_source_gap` leaves out is known only after the reference pass.
        length = "" if recipe.training.min_source_gap is not None else f" for {plan.steps} steps"
        say.now("All steps are trained; their result is made now" if ended else f"Training{length}")
        result = trainer.train(resume_from_checkpoint=checkpoint)
        say.now(f"Trained in {duration(result.metrics.get('train_runtime', 0.0))}{_left_out(trainer)}")
        if trainer.retain_weights is not None:
            say.now(trainer.retain_weights.summary())
        after = _score(trainer, plan, "after", say) if before is not None else None
        probed = finish_probe(watch, trainer)
        say.now("Saving")
        trainer.save_model(str(folder))
    if main:
        comparison = harmless = None
        if before is not None and after is not None:
            comparison = compare(before[1], after[1])
            harmless = _harmless(before[0], after[0], plan)
        fallen = None if comparison is None else comparison.fallen()
        if sentence := " ".join(filter(None, [fallen, None if probed is None else probed.sentence])):
            held.callback(say, f"\n{sentence}")  # last, where it is read, and whatever fails from here on
        _write_results(plan, trainer, comparison, before, after, probed, resolved, provenance, harmless)
        remove_earlier_result(folder)
        if comparison is not None:
            say("")
            comparison.show()
            if harmless is not None:
                say("")
                harmless.harmless_table().show()
        if probed is not None and probed.change is not None:
            say("")
            probed.change.show()
        say(f"\n{_listing(folder)}")
        gpu = plan.recipe.training.device.type != "cpu"
        steps = next_steps(folder, base=plan.source.name, adapter=plan.recipe.model.trains_adapter, gpu=gpu)
        say(f"\n{steps}")
    with _explaining(plan):
        trainer.accelerator.wait_for_everyone()
    if plan.recipe.training.push_to_hub and main:
        _push(trainer, folder, say)
    return folder


def _complete(plan: Plan, checkpoint: str, trainer: MPOTrainer) -> str | None:
    """What is said of a run whose last step this checkpoint holds, if its whole result is there; else None.

    All ranks call this; the main process looks.
    """
    training = plan.recipe.training
    folder, (done, _) = Path(str(training.output_dir)), steps_of(checkpoint)
    saved = training.process_index == 0 and result_steps(folder, Path(checkpoint)) == done
    if not from_main(saved, trainer.accelerator):
        return None
    return (
        f"\nThe run is complete: {done} of {min(done, plan.steps)} steps are trained, and the result is in {folder}. Nothing "
        f"was changed. {how_to_train_on(plan.recipe)} `overwrite_output_dir: true` without `resume_from_checkpoint` begins anew."
    )


def how_to_resume(recipe: Recipe) -> str:
    """What an interrupted run leaves, and the command that goes on from it."""
    folder = str(recipe.training.output_dir)
    last = last_complete_checkpoint(folder)
    if last is None:
        kept = "" if recipe.training.save_strategy != "no" else " (`save_strategy: steps` keeps checkpoints)"
        return f"Interrupted. No checkpoint was complete yet, so nothing is left in {folder} to resume{kept}."
    if holds_weights_only(last):
        return (
            f"Interrupted. The last checkpoint, {last}, holds weights only (`save_only_model: true`), so the run cannot go on "
            "from it."
        )
    command = recipe.command(resume_from_checkpoint="auto")
    return f"Interrupted. The last complete checkpoint is {last}. Go on with:\n  {command}"


class _Speaker:
    """Prints on the main process, at once, so that lines keep their order in a log file."""

    def __init__(self, main: bool) -> None:
        self.main = main

    def __call__(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def now(self, text: str) -> None:
        """Say what begins or has ended, with the time of the day."""
        self(f"{clock()} {text}")


# ------------------------------------------------------------------------------------------------------------- trainer


def _build_trainer(plan: Plan) -> MPOTrainer:
    from transformers import IntervalStrategy
    from trl import get_quantization_config

    from mpo.training.trainer import MPOTrainer

    recipe = plan.recipe
    model, training = recipe.model, recipe.training
    given: dict[str, Any] = dict(training.model_init_kwargs or {})  # type: ignore[arg-type]
    if _is_alone(training) and training.device.type == "cuda":
        # The library's "auto" spreads a model over devices and the CPU, which does not train.
        given.setdefault("device_map", {"": str(training.device)})  # text, since trackers store it as JSON
    if training.ddp_find_unused_parameters is None and not hasattr(
        plan.config.get_text_config(), "num_experts_per_tok"
    ):
        # Every weight of a dense model is used in every step; looking for unused ones costs a pass over the graph.
        training.ddp_find_unused_parameters = False
    if plan.in_between is not None and plan.in_between.every is not None:
        training.eval_strategy, training.eval_steps = IntervalStrategy.STEPS, plan.in_between.every
        training.do_eval = True
    quantization = get_quantization_config(model)
    policy: Any = plan.source.name
    if model.adapter_name_or_path is not None:
        base = load_model(
            plan.source,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            quantization_config=quantization,
            **_placement(training, given),
        )
        policy = load_adapter(base, model.adapter_name_or_path, trainable=True)
        quantization = None
    else:
        training.model_init_kwargs = {
            **given,
            "dtype": model.dtype,
            "revision": model.model_revision,
            "attn_implementation": model.attn_implementation,
            "use_safetensors": True,
        }
    reference = None
    if model.reference_model_name_or_path is not None:
        reference = load_model(
            ModelSource(model.reference_model_name_or_path, None, plan.source.trust_remote_code),
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            **_placement(training, given),
        )
    return MPOTrainer(
        model=policy,
        ref_model=reference,
        args=training,
        train_dataset=plan.train,
        eval_dataset=plan.held_out,
        processing_class=plan.tokenizer,
        quantization_config=quantization,
        peft_config=plan.peft_config,
    )


def _placement(training: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a model that is loaded here and not by the trainer."""
    return given if _is_alone(training) else {**given, "device_map": None}


def _is_alone(training: Any) -> bool:
    """Whether the whole model goes to one device. An engine places it otherwise even there, in main memory."""
    return training.world_size == 1 and not (launched_with("DEEPSPEED") or launched_with("FSDP"))


def _score(trainer: MPOTrainer, plan: Plan, when: str, say: _Speaker) -> tuple[Scores, RewardGapTable]:
    scores = trainer.score(description=f"Scoring held-out pairs {when} training")
    records = scores.of_kind(harmless=False) or scores.records
    table = summarize(records, beta=plan.recipe.training.gap_scale)
    parts = []
    if table.source is not None:
        parts.append(f"{table.source_label} {table.source.gap:+.3f}")
    if table.all_targets is not None:
        parts.append(f"target languages {table.all_targets.gap:+.3f}")
        parts.append(f"positive in {table.all_targets.positive:.0%} of their pairs")
    say.now(f"Held-out reward gap {when} training: {', '.join(parts)}")
    return scores, table


def _harmless(before: Scores, after: Scores, plan: Plan) -> Comparison | None:
    """The change on held-out harmless groups, where they are not all that was held out."""
    both = [scores.of_kind(harmless=True) for scores in (before, after)]
    if not all(both) or not before.of_kind(harmless=False):
        return None
    beta = plan.recipe.training.gap_scale
    return compare(*(summarize(records, beta=beta) for records in both))


def _left_out(trainer: MPOTrainer) -> str:
    """What `min_source_gap` has left out, which makes steps fewer than the plan says."""
    sources, dropped = (trainer.source_report.get(key, 0) for key in ("sources", "dropped"))
    if not dropped:
        return ""
    return f"; `min_source_gap: {trainer.args.min_source_gap:g}` left {dropped} of {sources} sources out"


# --------------------------------------------------------------------------------------------------------------- files


def _provenance(plan: Plan) -> dict[str, Any]:
    from mpo.common.provenance import collect

    training, model = plan.recipe.training, plan.recipe.model
    return collect(
        seed=training.seed,
        precision=PRECISIONS[half_precision(plan.recipe)],
        data_fingerprint=plan.data.fingerprint,
        base_model=plan.source.name,
        base_model_revision=hub_commit(plan.source.name, "config.json", model.model_revision)
        or model.model_revision,
        base_model_weights=folder_content(plan.source.name) if training.process_index == 0 else None,
        data_origin=plan.data.origin,
        groups_by_kind=kinds if (kinds := count_kinds(plan.data.groups))[HARMLESS] else None,
        dropped_rows=len(plan.dropped),
        trainable_parameters=plan.trainable,
        processes=training.world_size,
    )


def _write_start(plan: Plan, resolved: str, provenance: dict[str, Any]) -> None:
    """What explains a run, written before it starts so that one that is cut off can be explained, too."""
    folder = Path(str(plan.recipe.training.output_dir))
    header = printable(f"# A resolved recipe. Run it again with: mpo train {folder}/recipe.yaml", lines=False)
    changes = [
        printable(f"# Changed {change}", lines=False) for change in provenance.get("resume_changes", ())
    ]
    write_text(folder / "recipe.yaml", "\n".join([header, *changes, resolved]))
    write_json(folder / "provenance.json", provenance)
    if plan.leaks is not None:
        write_typed(folder / LEAKS, leaks_result(plan.leaks))
    if plan.dropped:
        _write_dropped(plan, [])


def _write_dropped(plan: Plan, after_tokenizing: list[str]) -> None:
    """Every row that was left out: those that break the contract, and those that only their tokens show to be bad."""
    rows = [{"file": r.file, "row": r.row, "field": r.field, "reason": r.reason} for r in plan.dropped]
    folder = Path(str(plan.recipe.training.output_dir))
    write_json(folder / "dropped_rows.json", {"dropped": rows, "dropped_after_tokenizing": after_tokenizing})


def _write_results(
    plan: Plan,
    trainer: MPOTrainer,
    comparison: Comparison | None,
    before: tuple[Scores, RewardGapTable] | None,
    after: tuple[Scores, RewardGapTable] | None,
    probed: Probed | None,
    resolved: str,
    provenance: dict[str, Any],
    harmless: Comparison | None,
) -> None:
    from mpo.evaluation.results import METRICS, TrainingMetrics
    from mpo.report.card import write_card
    from mpo.report.overview import overview
    from mpo.report.plots import behavior_plane, reward_gap_before_after, training_curve

    recipe, training = plan.recipe, plan.recipe.training
    folder = Path(str(training.output_dir))
    history = trainer.state.log_history
    measured: dict[str, Any] = {}
    retention: tuple[float, float] | None = None
    if comparison is not None and before is not None and after is not None:
        losses = (before[0].retention, after[0].retention)
        if losses[0] is not None and losses[1] is not None:
            retention = (losses[0], losses[1])
        measured = {
            "held_out_groups": comparison.before.groups,
            "before": comparison.before,
            "after": comparison.after,
            "change": comparison.to_dict()["change"],
            "retention_loss": dict(zip(("before", "after"), losses, strict=True)),
        }
    if harmless is not None:
        measured["harmless"] = {"before": harmless.before, "after": harmless.after}
    change = None if probed is None else probed.change
    steps = seen_by_step(
        trainer.train_dataset, training, num_ranks=training.world_size, kept=trainer.trained_groups
    )
    seen = next(itertools.islice(steps, max(trainer.state.global_step, 1) - 1, None))
    metrics = TrainingMetrics(
        beta=training.beta,
        **measured,
        sources=dict(trainer.source_report),
        pairs=seen.pairs,
        tokens=seen.tokens,
        peak_memory=_peak_memory(training.device),
        steps=trainer.state.global_step,
        train_runtime=next(
            (log["train_runtime"] for log in reversed(history) if "train_runtime" in log), None
        ),
        behavior=change,
    )
    write_typed(folder / METRICS, metrics)
    if probed is not None:
        write_probe_answers(folder, probed)
    if trainer.dropped_rows:
        _write_dropped(plan, trainer.dropped_rows)
    try:
        measured_gaps = [*history, *_ends(before, after, trainer)]
        training_curve(measured_gaps, folder / "training_curve.png", source_language=training.source_language)
        if comparison is not None:
            reward_gap_before_after(comparison.before, comparison.after, folder / "reward_gap.png")
        if change is not None:
            behavior_plane(change, folder / "behavior.png", history)
        if change is not None and comparison is not None:
            overview(comparison.before, comparison.after, change, folder / "overview.png")
    except DependencyError:
        pass  # the plan has said so
    data = recipe.data.dataset
    settings = settings_in_effect(recipe)
    settings.pop("num_train_epochs" if training.max_steps > 0 else "max_steps")
    write_card(
        folder,
        base_model=plan.source.name,
        peft=recipe.model.trains_adapter,
        languages=trainer.languages,
        source_language=training.source_language,
        comparison=comparison,
        recipe_yaml=resolved,
        provenance=provenance,
        dataset_name=data if isinstance(data, str) else None,
        settings=settings,
        retention=retention,
        harmless=harmless,
        finding=None if probed is None else probed.sentence,
        behavior=change,
        repository=training.hub_model_id,
    )


def _ends(
    before: tuple[Scores, RewardGapTable] | None,
    after: tuple[Scores, RewardGapTable] | None,
    trainer: MPOTrainer,
) -> list[dict[str, float]]:
    """The held-out gaps before and after training, as an evaluation at the first step and the last would have logged them."""
    ends = {0: before, trainer.state.global_step: after}
    if trainer.args.load_best_model_at_end:
        ends = {0: before}  # what was measured after is the best checkpoint, not the last step
    return [
        {"step": step, **{f"eval_reward_gap/{row.language}": row.gap for row in scored[1].rows}}
        for step, scored in ends.items()
        if scored is not None
    ]


def _peak_memory(device: torch.device) -> int:
    """Most bytes that the device held at once, or this process where it has no memory of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    shown = [name for name in names if name in _DESCRIPTIONS or name.endswith(".safetensors")]
    width = max((len(name) for name in shown), default=0)
    lines = [
        f"  {name.ljust(width)}  {_DESCRIPTIONS.get(name, 'part of the trained model')}" for name in shown
    ]
    rest = len(names) - len(shown)
    if rest:
        lines.append(f"  and {rest} more files of the tokenizer and the model's configuration")
    return "\n".join([f"Written to {folder}:", *lines])


def _push(trainer: MPOTrainer, folder: Path, say: _Speaker) -> None:
    from huggingface_hub import HfApi

    name = str(trainer.hub_model_id)
    say.now(f"Uploading to https://huggingface.co/{name}")
    try:
        HfApi().upload_folder(
            repo_id=name,
            folder_path=str(folder),
            ignore_patterns=["checkpoint-*", ".*", PROBE_ANSWERS, ANSWERS],  # some answer harmful prompts
            commit_message="MPO run",
        )
    except Exception as error:
        raise StorageError(
            f"The run is saved in {folder}, but the upload to {name} failed: {error}"
        ) from error


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _explaining(plan: Plan) -> Iterator[None]:
    """Turns what goes wrong for want of memory, disk or another process into an error that says what to do."""
    training = plan.recipe.training
    try:
        yield
    except MPOError:
        raise
    except torch.OutOfMemoryError as error:
        advice = []
        if not (training.gradient_checkpointing or getattr(training, "activation_checkpointing", False)):
            advice.append("`gradient_checkpointing: true` (about a third slower)")
        if training.batch_layout == "tree" and plan.recipe.model.attn_implementation != "tree":
            advice.append(f"a smaller `max_tokens_per_row` (now {training.max_tokens_per_row or 8192})")
        if (budget := training.max_tokens_per_call) is None or budget > 1024:
            advice.append(f"`max_tokens_per_call: {min(budget or 4096, 4096) // 2}`")
        advice.append("`max_targets_per_group: 2`")
        if not plan.recipe.model.trains_adapter:
            advice.append("an adapter (`use_peft: true`), or more sharding (recipes/accelerate)")
        elif not plan.recipe.model.load_in_4bit:
            advice.append("`load_in_4bit: true`")
        raise TrainingError(
            f"The GPU is out of memory: {str(error).splitlines()[0]}\nTry, in this order: {'; '.join(advice)}."
        ) from error
    except Exception as error:
        if is_full_disk(error):
            last = last_complete_checkpoint(str(training.output_dir))
            raise StorageError(
                f"The disk of {training.output_dir} is full. Make room and "
                + (
                    f"go on with the last complete checkpoint, {last.name}:"
                    if last is not None
                    else "begin anew, since no checkpoint is complete (`save_strategy: epoch` keeps some):"
                )
                + f" {plan.recipe.command(resume_from_checkpoint='auto')}"
            ) from error
        if training.world_size > 1 and is_lost_process(error):
            raise process_lost(error, str(training.output_dir)) from error
        if isinstance(error, OSError) and not os.path.isdir(str(training.output_dir)):
            raise StorageError(f"The output folder {training.output_dir} is gone: {error}") from error
        if "out of memory" in str(error).lower():
            raise ModelError(f"There is not enough memory: {str(error).splitlines()[0]}") from error
        raise


def is_lost_process(error: Exception) -> bool:
    """Whether a collective operation failed because of another process, as gloo and NCCL report it."""
    failed = isinstance(error, torch.distributed.DistError)
    return failed or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def process_lost(error: Exception, output_dir: str) -> ProcessLostError:
    """The error of a process that is left without another, with the checkpoint that the run resumes from."""
    last = last_complete_checkpoint(output_dir)
    resume = (
        f"The last complete checkpoint is {last}: run the same command again with `--resume_from_checkpoint auto`."
        if last is not None
        else f"No checkpoint in {output_dir} is complete yet, so the run begins anew (`save_strategy: epoch` keeps some)."
    )
    reported = str(error).splitlines()[0].partition(". ")[0]
    return ProcessLostError(
        f"Another process of this run was lost, or can no longer be reached ({reported}). Its own last "
        f"lines, on its machine, and the launcher's list of failures (root cause) say why. {resume}"
    )
