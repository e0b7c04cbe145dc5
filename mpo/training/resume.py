"""Which checkpoint a run resumes from, and whether it fits: the form of the optimizer's states, the order of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Trainer

from mpo.common.log import get_logger
from mpo.errors import ConfigError, StorageError
from mpo.training.checkpoints import is_complete, last_complete_checkpoint, saved_state, set_aside
from mpo.training.config import MPOConfig
from mpo.training.ranks import from_main
from mpo.training.sharding import sharding_name
from mpo.training.unique_pairs import fingerprint_rows

logger = get_logger(__name__)

_FACTORS = ("ranks", "groups_per_micro_batch", "gradient_accumulation_steps")


class ResumableRun:
    """What a checkpoint of a trainer's run states, and which checkpoint the run may go on from."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer

    def state(self) -> dict[str, Any]:
        """What a checkpoint states of its run.

        ``form`` is how the optimizer's states are kept: whole, or divided as one engine and number of ranks needs. All
        else decides which groups have been seen after a number of steps.
        """
        trainer = self._trainer
        args: MPOConfig = trainer.args
        ranks = trainer.accelerator.num_processes
        name = sharding_name(trainer.accelerator)
        form = "whole" if name in ("none", "DDP") else name if name == "FSDP2" else f"{name} on {ranks} ranks"
        state: dict[str, Any] = {
            "form": form,
            "order_version": 1,
            "data_seed": args.order_seed,
            "ranks": ranks,
            "groups_per_micro_batch": trainer._train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "groups": len(trainer.train_dataset),
            "rows": self._rows,
            "dataloader_drop_last": args.dataloader_drop_last,
            "min_source_gap": args.min_source_gap,
            "max_tokens_per_batch": args.max_tokens_per_batch,
            "train_on": args.train_on,
        }
        if args.max_tokens_per_batch is not None:  # these decide how many tokens a group has
            state.update(batch_layout=args.batch_layout, sources_run=args.runs_sources)
        return state

    def find_checkpoint(self, resume: str | os.PathLike[str] | bool | None) -> str | None:
        """The checkpoint to resume from, which is there, complete and fits the run.

        All ranks call this; the main process decides which one is the last.

        Args:
            resume: A checkpoint's folder; True for the last complete one in ``output_dir``; ``"auto"`` for the same if
                there is one; None or False for none.

        Raises:
            StorageError: There is no such checkpoint, or it is not complete.
            ConfigError: It does not fit, see :func:`check_resumable`.
        """
        if not resume:
            return None
        trainer = self._trainer
        if resume is True or resume == "auto":
            found = from_main(last_complete_checkpoint(trainer.args.output_dir), trainer.accelerator)
            if found is None and resume is True:
                raise StorageError(
                    f"there is no complete checkpoint in '{trainer.args.output_dir}' to resume from."
                )
            if found is None:
                return None
            resume = found
        resume = os.fspath(resume)
        if not Path(resume).is_dir():
            raise StorageError(f"the checkpoint '{resume}' to resume from does not exist.")
        if not is_complete(resume):
            raise StorageError(
                f"the checkpoint '{resume}' is not complete: its run ended while it was written, or files are missing. "
                'Resume with "auto" or True, which takes the last complete one.'
            )
        check_resumable(
            resume,
            self.state(),
            trains_adapter=hasattr(trainer.model, "peft_config"),
            skips_seen_groups=not trainer.args.ignore_data_skip,
        )
        return resume

    def set_earlier_aside(self, checkpoint: str | None) -> None:
        """Mark later checkpoints of another run, which this one does not continue, and warn of them."""
        if not self._trainer.accelerator.is_main_process:
            return
        folder = self._trainer.args.output_dir or "."
        if found := set_aside(folder, checkpoint):
            logger.warning(
                f"'{folder}' holds checkpoints of an earlier run ({', '.join(path.name for path in found)}) that this run "
                "does not go on from: `resume_from_checkpoint: auto` passes over them from now on. Name one to resume "
                "from it, or choose another `output_dir` to keep runs apart."
            )

    @cached_property
    def _rows(self) -> str:
        return fingerprint_rows(self._trainer.train_dataset)


def check_resumable(
    checkpoint: str, now: Mapping[str, Any], *, trains_adapter: bool, skips_seen_groups: bool
) -> None:
    """Refuse a checkpoint that a run in the state ``now`` cannot go on from as if it had never stopped.

    Raises:
        ConfigError: States of the optimizer in another form, or another order of the data.
    """
    saved = saved_state(checkpoint)
    was = saved.get("form")
    if was is not None and was != now["form"]:
        key = "adapter_name_or_path" if trains_adapter else "model_name_or_path"
        raise ConfigError(
            f"the optimizer's states in '{checkpoint}' are kept as {was} needs them, and this run is {now['form']}. Resume "
            f"under the same Accelerate configuration, or start a new run from the weights (`{key}: {checkpoint}`), with a "
            "fresh optimizer."
        )
    if not skips_seen_groups:
        return
    different = [name for name in now if name != "form" and name in saved and saved[name] != now[name]]
    if different and not _same_steps(different, saved, now):
        changes = ", ".join(f"{name}: {saved[name]} then, {now[name]} now" for name in different)
        raise ConfigError(
            f"'{checkpoint}' was saved with another order of the data ({changes}), so resuming would repeat some groups "
            "and skip others. Restore the settings (on another number of ranks, groups per rank times ranks times "
            "`gradient_accumulation_steps` must stay the same), or set `ignore_data_skip: true` to start the epoch from its "
            "first group with the checkpoint's weights."
        )


def _same_steps(different: list[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether every optimizer step has the groups that it had, only spread otherwise over ranks and micro-batches."""
    if not set(different) <= set(_FACTORS) or now["dataloader_drop_last"]:
        return False
    if now["max_tokens_per_batch"] is not None:
        return False  # the groups of a micro-batch are chosen for the number of ranks
    return math.prod(saved.get(name, 0) for name in _FACTORS) == math.prod(now[name] for name in _FACTORS)
