"""The output folder: nothing in it is lost, and the disk has room for what the run writes."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mpo.common.files import check_writable
from mpo.common.words import counted, plain, size
from mpo.errors import ConfigError, StorageError
from mpo.jobs.preflight.plan import Plan
from mpo.training.checkpoints import MARKER, last_complete_checkpoint, steps_of
from mpo.training.recipe import Recipe
from mpo.training.resume import check_has_optimizer

EARLIER_RESULT = "earlier-result"
# What a run, or the libraries that save for it, may leave in its folder.
_RESULT = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates",
    "README.md",
    "recipe.yaml",
    "provenance.json",
    "metrics.json",
    "dropped_rows.json",
    "leaks.json",
    "reward_gap.png",
    "training_curve.png",
    "behavior.png",
    "overview.png",
    "probe_answers.jsonl",
    "checkpoint-*",
)

# Bytes that AdamW keeps for each trained weight: two float32 moments.
_OPTIMIZER_BYTES = 8


def check_output_folder(recipe: Recipe, *, create: bool = True) -> None:
    """Makes sure that the output folder can be written and holds no run that would be overwritten.

    Raises:
        StorageError: The folder cannot be made or written, is or may be another model's, or holds checkpoints or a result
            and nothing says what to do with them; or the checkpoint to resume from holds weights only.
        ConfigError: The checkpoint to resume from is not there, or those of this run could not be resumed.
    """
    training = recipe.training
    folder = Path(str(training.output_dir))
    check_writable(folder, create=create)
    _check_replaces_nothing(recipe, folder)
    resume = wanted_checkpoint(recipe)
    last = last_complete_checkpoint(folder) if folder.is_dir() else None
    keeps = not training.overwrite_output_dir
    if resume is None and last is not None and keeps and _is_finished(folder, last):
        raise StorageError(
            f"{folder} holds a run that is complete: its result ({finished_result(folder)}) and its checkpoints (the last "
            f"one is {last.name}). {how_to_train_on(recipe)} Otherwise write elsewhere, or replace it once the new run is complete:\n"
            f"  {recipe.command(output_dir=str(_free_name(folder)))}\n"
            f"  {recipe.command(overwrite_output_dir='true')}"
        )
    if resume is None and last is not None and keeps:
        raise StorageError(
            f"{folder} holds the checkpoints of an earlier run (the last complete one is {last.name}). Go on with "
            "it, or write elsewhere:\n"
            f"  {recipe.command(resume_from_checkpoint='auto')}\n"
            f"  {recipe.command(output_dir=str(_free_name(folder)))}"
        )
    if keeps and not _goes_on(recipe) and (result := finished_result(folder)) is not None:
        raise StorageError(
            f"{folder} holds the result of an earlier run ({result}). Write elsewhere, or replace it once the new run is "
            "complete:\n"
            f"  {recipe.command(output_dir=str(_free_name(folder)))}\n"
            f"  {recipe.command(overwrite_output_dir='true')}"
        )
    if resume is None:
        return
    if isinstance(resume, bool) or resume == "auto":
        if training.save_only_model:
            raise ConfigError(
                f"`resume_from_checkpoint` is {resume!r} and `save_only_model` is true: checkpoints of weights alone cannot "
                "be resumed. Remove one of the two."
            )
        if last is not None:
            check_has_optimizer(last, trains_adapter=recipe.model.trains_adapter)
        return
    wanted = Path(resume)
    if not wanted.is_dir():
        known = f" The last complete one in {folder} is {last.name}." if last is not None else ""
        raise ConfigError(
            f"`resume_from_checkpoint` is {resume!r}, which is not a folder; expected `auto` or a checkpoint folder."
            + known
        )
    check_has_optimizer(wanted, trains_adapter=recipe.model.trains_adapter)


def wanted_checkpoint(recipe: Recipe) -> str | bool | None:
    """`resume_from_checkpoint` as :meth:`mpo.training.trainer.MPOTrainer.train` takes it."""
    wanted = recipe.training.resume_from_checkpoint
    text = str(wanted).lower()
    if wanted is None or text in ("false", "no"):
        return None
    if text in ("true", "yes"):
        return True
    return "auto" if text == "auto" else str(wanted)


def checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """The checkpoint that the run will go on from, if there is one."""
    resume, folder = wanted_checkpoint(recipe), Path(str(recipe.training.output_dir))
    if resume is None:
        return None
    if isinstance(resume, bool) or resume == "auto":
        return last_complete_checkpoint(folder) if folder.is_dir() else None
    return Path(resume)


def finished_result(folder: Path) -> str | None:
    """Name of the weights that an earlier run has left, or None."""
    found = sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
    return found[0] if found else None


def how_to_train_on(recipe: Recipe) -> str:
    """How a complete run is made a longer one."""
    length = "max_steps" if recipe.training.max_steps > 0 else "num_train_epochs"
    return f"A larger `{length}` goes on from there with `resume_from_checkpoint: auto` and `resume_changes: [{length}]`."


def result_steps(folder: Path, checkpoint: Path) -> int | None:
    """Steps of the run whose result lies in the folder, if all of it was written after the checkpoint; else None.

    An older one is what an earlier run has left. The card is written last; PEFT leaves one of its own with the weights.
    """
    weights = finished_result(folder)
    if weights is None:
        return None
    try:
        files = [checkpoint / MARKER, *(folder / name for name in (weights, "metrics.json", "README.md"))]
        written = [path.stat().st_mtime_ns for path in files]
        steps = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) and written == sorted(written) else None


def _is_finished(folder: Path, last: Path) -> bool:
    """Whether a run has come to its end, and its last checkpoint was not followed by steps of another."""
    steps = result_steps(folder, last)
    try:
        return steps is not None and steps >= steps_of(last)[0]
    except (OSError, ValueError, KeyError):
        return False


def _goes_on(recipe: Recipe) -> bool:
    """Whether the run is to go on with the one whose result may lie in the output folder."""
    folder, resume = Path(str(recipe.training.output_dir)), wanted_checkpoint(recipe)
    if resume is None:
        return False
    if isinstance(resume, str) and resume != "auto":
        return Path(resume).is_dir() and Path(resume).resolve().parent == folder.resolve()
    return last_complete_checkpoint(folder) is not None


def set_result_aside(recipe: Recipe) -> None:
    """Move the result of an earlier run, which the recipe says may be replaced, to a folder of its own in its folder.

    Raises:
        StorageError: It cannot be moved.
    """
    folder = Path(str(recipe.training.output_dir))
    if not recipe.training.overwrite_output_dir or _goes_on(recipe):
        return
    old = [path for pattern in _RESULT for path in folder.glob(pattern)]
    if not old:
        return
    number = 1
    while (aside := folder / (EARLIER_RESULT + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    try:
        aside.mkdir()
        for path in sorted(
            old, key=lambda path: path.suffix == ".safetensors"
        ):  # what explains the weights first
            os.replace(path, aside / path.name)
    except OSError as error:
        raise StorageError(
            f"The earlier result in {folder} cannot be moved to {aside}: {error.strerror or error}. Choose another "
            "`output_dir`."
        ) from error


def remove_earlier_result(folder: Path) -> None:
    """Remove what :func:`set_result_aside` has moved, in this run and in those that did not come to their end."""
    for aside in [folder / EARLIER_RESULT, *folder.glob(f"{EARLIER_RESULT}-*")]:
        shutil.rmtree(aside, ignore_errors=True)


def _check_replaces_nothing(recipe: Recipe, folder: Path) -> None:
    model = recipe.model
    for key, name in (
        ("model_name_or_path", model.model_name_or_path),
        ("adapter_name_or_path", model.adapter_name_or_path),
        ("reference_model_name_or_path", model.reference_model_name_or_path),
    ):
        if name and folder.is_dir() and Path(name).is_dir() and folder.samefile(name):
            raise StorageError(
                f"The output folder {folder} is that of `{key}`, whose files the run would replace. Choose another with "
                "`output_dir`."
            )
    # A run writes its provenance first, so a folder that has none is nobody's run.
    foreign = [
        name for name in ("README.md", "config.json", "adapter_config.json") if (folder / name).is_file()
    ]
    if foreign and not (folder / "provenance.json").is_file():
        raise StorageError(
            f"The output folder {folder} holds files that no run wrote ({', '.join(foreign)}, without a "
            "provenance.json); the run would replace them. Choose another with `output_dir`."
        )


def _free_name(folder: Path) -> Path:
    number = 2
    while (candidate := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return candidate


@dataclass(frozen=True)
class DiskSpace:
    """Bytes of the saved weights, of one checkpoint, and of all that a run may hold at once; ``kept`` checkpoints."""

    weights: int
    checkpoint: int
    kept: int
    total: int


def disk_space(plan: Plan) -> DiskSpace:
    """What a run takes of the disk."""
    training = plan.recipe.training
    # Adapters train in float32 over a half-precision base as well.
    weights = plan.trainable * 4
    checkpoint = weights + (0 if training.save_only_model else plan.trainable * _OPTIMIZER_BYTES)
    strategy = plain(training.save_strategy)
    written = 0
    if strategy == "epoch":
        written = math.ceil(plan.schedule.epochs)
    elif strategy in ("steps", "best"):
        every = (
            training.save_steps if training.save_steps >= 1 else math.ceil(training.save_steps * plan.steps)
        )
        written = math.ceil(plan.steps / every)
    limit = training.save_total_limit
    # The new checkpoint is written before the oldest is removed.
    kept = min(written, limit + 1) if limit else written
    hidden = plan.config.get_text_config().hidden_size
    reference = len(plan.train) * 2 * (hidden + 1) * 4
    return DiskSpace(weights, checkpoint, kept, weights + kept * checkpoint + reference)


def check_disk(plan: Plan, space: DiskSpace) -> None:
    """Make sure that the disk has room for what a run writes.

    Raises:
        StorageError: It has not.
    """
    folder = Path(str(plan.recipe.training.output_dir))
    free = shutil.disk_usage(folder).free
    if free < space.total:
        raise StorageError(
            f"The disk of {folder} has {size(free)} free, and this run may need {size(space.total)}: "
            f"{counted(space.kept, 'checkpoint')} of {size(space.checkpoint)} and the result of "
            f"{size(space.weights)}. Make room, choose another `output_dir`, or keep less: `save_total_limit: 1` or "
            "`save_strategy: no`."
        )
