"""Checkpoints that are complete or absent: a run killed while it saves resumes from the one before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments

from mpo.common.files import is_full_disk, sync, write_text
from mpo.common.log import get_logger
from mpo.modeling.identity import hash_file
from mpo.training.ranks import Ranks, gathered

logger = get_logger(__name__)

MARKER = "complete.json"
EARLIER = "earlier-run"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def save_checkpoint(
    folder: Path,
    write: Callable[[], str | None],
    state: Mapping[str, Any],
    ranks: Ranks,
    *,
    keep: int | None,
) -> None:
    """Save a checkpoint and remove old ones, or, on a full disk, leave those as they are and log what happened.

    All ranks call this. Old checkpoints go only when the new one is complete, so that a kill at any moment leaves one to
    resume from.

    Args:
        folder: The checkpoint's, beside the other ones of the run.
        write: Writes its files, on all ranks, and returns a checkpoint that is never removed, such as the best one.
        state, keep: As for :func:`mark_complete` and :func:`rotate`.
        ranks: The process group; the main process declares and removes checkpoints.
    """
    main = ranks.is_main_process
    if main and folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    ranks.wait_for_everyone()
    problem = protected = None
    try:
        protected = write()
    except (OSError, RuntimeError, SafetensorError) as error:
        if not (isinstance(error, OSError) or is_full_disk(error)):
            raise
        problem = str(error)
    problem = next((found for found in gathered([problem], ranks) if found), None)
    if main and problem is None:
        try:
            mark_complete(folder, state)
            rotate(folder.parent, keep, protected, newest=folder)
        except OSError as error:
            problem = str(error)
    if main and problem is not None:
        shutil.rmtree(folder, ignore_errors=True)
        last = last_complete_checkpoint(folder.parent)
        logger.error(
            f"The checkpoint of step {folder.name.rpartition('-')[2]} could not be saved ({problem}). Training goes on; the "
            f"last complete checkpoint is {last or 'none'}. Free some space in '{folder.parent}' before the next one."
        )
    ranks.wait_for_everyone()


def warn_if_none_is_best(args: TrainingArguments, state: TrainerState) -> None:
    """At the end of a run: say so where the best checkpoint was asked for, and the model has its last weights instead."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is not None:
        return
    metric = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
    why = (
        f"no evaluation has given `{metric}`"
        if state.best_global_step is None
        else f"`{metric}` was best at step {state.best_global_step}, of which there is none"
    )
    logger.warning(
        f"No checkpoint could be chosen (`load_best_model_at_end`): {why}. The model has the weights of its last step, "
        f"{state.global_step}."
    )


def mark_complete(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Declare a checkpoint complete: write the sizes and hashes of all its files, and ``state``, to its marker file.

    The files are flushed to disk first, so a marker never stands for data that a power cut can still take.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    sizes, hashes = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        sync(path)
        name = path.relative_to(folder).as_posix()
        sizes[name], hashes[name] = path.stat().st_size, hash_file(path)
    marker = {"files": sizes, "xxh3": hashes, "state": dict(state)}
    write_text(folder / MARKER, json.dumps(marker, indent=2, sort_keys=True))


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint has its marker and every file has the size the marker states; see :func:`damaged_files`."""
    folder = Path(folder)
    try:
        with open(folder / MARKER, encoding="utf-8") as file:
            files = json.load(file)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def saved_state(folder: str | Path) -> dict[str, Any]:
    """The ``state`` given to :func:`mark_complete`, empty for a checkpoint without a marker."""
    return _marked(folder, "state")


def steps_of(folder: str | Path) -> tuple[int, int]:
    """The steps that had been taken when a checkpoint was saved, and all that its run was to take.

    Raises:
        OSError, ValueError, KeyError: It does not say so.
    """
    state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"], state["max_steps"]


def damaged_files(folder: str | Path) -> list[str]:
    """Files of a complete checkpoint whose content is not what was saved. Reads all of it.

    A checkpoint of an earlier version, whose marker has no hashes, shows no damage.
    """
    damaged = []
    for name, saved in sorted(_marked(folder, "xxh3").items()):
        try:
            if hash_file(Path(folder) / name) != saved:
                damaged.append(name)
        except OSError:
            damaged.append(name)
    return damaged


def holds_weights_only(folder: str | Path) -> bool:
    """Whether a checkpoint was saved with ``save_only_model``: no optimizer, schedule or random state to go on with."""
    return not any(Path(folder).glob("rng_state*.pth"))


def _marked(folder: str | Path, part: str) -> dict[str, Any]:
    try:
        with open(Path(folder) / MARKER, encoding="utf-8") as file:
            found = json.load(file)[part]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoint folders below ``folder``, by rising step, complete or not."""
    found = []
    if Path(folder).is_dir():
        for path in Path(folder).iterdir():
            match = _NAME.match(path.name)
            if match and path.is_dir():
                found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step below ``folder``, or None; none that was :func:`set_aside`."""
    for path in reversed(checkpoints(folder)):
        if is_complete(path) and not is_set_aside(path):
            return path
    return None


def is_set_aside(checkpoint: Path) -> bool:
    """Whether a checkpoint is of an earlier run, see :func:`set_aside`."""
    return (checkpoint / EARLIER).exists()


def set_aside(folder: str | Path, resumed: str | Path | None = None) -> list[Path]:
    """Declare that a new run goes on from one checkpoint, or from none, and not from those of later steps in its folder.

    They stay, and can be resumed from by name, but :func:`last_complete_checkpoint` passes over them: the highest step
    it finds is then always of the run's own history.

    Args:
        folder: Output folder of the run.
        resumed: The checkpoint that the run goes on from; None for a fresh start.

    Returns:
        The complete checkpoints that were set aside now.
    """
    start = 0
    if resumed is not None:
        (Path(resumed) / EARLIER).unlink(missing_ok=True)
        start, _ = steps_of(resumed)
    found = []
    for path in checkpoints(folder):
        later = int(path.name.rpartition("-")[2]) > start
        if later and is_complete(path) and not is_set_aside(path):
            (path / EARLIER).touch()
            found.append(path)
    return found


def rotate(
    folder: str | Path, keep: int | None, protected: str | None = None, newest: Path | None = None
) -> None:
    """Delete old checkpoints.

    Args:
        folder: Output folder of the run.
        keep: Number of complete checkpoints to keep; None keeps all. The newest one is always kept.
        protected: A checkpoint that is never deleted, for example the best one.
        newest: The checkpoint just written; by default the complete one with the highest step. In a folder with the
            checkpoints of an earlier run the two are not the same.

    Half-written checkpoints are deleted in any case, unless their step is higher than the newest's.
    """
    given = newest is not None
    newest = newest or last_complete_checkpoint(folder)
    if newest is None:
        return
    safe = {newest.resolve()} | ({Path(protected).resolve()} if protected else set())
    older = checkpoints(folder)
    if given:
        older.remove(newest)
    else:
        older = older[: older.index(newest)]
    complete = [path for path in older if is_complete(path)]
    surplus = len(complete) + 1 - max(keep, 1) if keep else 0
    for path in older:
        if path.resolve() in safe:
            continue
        if path not in complete:
            shutil.rmtree(path, ignore_errors=True)
        elif surplus > 0:
            # The marker goes first: a kill in the middle must not leave a folder that looks complete.
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            surplus -= 1
