"""Which checkpoint a run resumes from, and whether it fits: the form of the optimizer's states, the order of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from mpo.common.log import get_logger
from mpo.common.words import listed
from mpo.errors import ConfigError, StorageError
from mpo.modeling.identity import ModelIdentity
from mpo.training.checkpoints import (
    checkpoints,
    damaged_files,
    holds_weights_only,
    is_complete,
    is_set_aside,
    saved_state,
    set_aside,
    steps_of,
)
from mpo.training.config import MPOConfig
from mpo.training.ranks import from_main
from mpo.training.reference_policy import ReferencePolicy
from mpo.training.run_settings import (
    OptimizerSettings,
    changes_at,
    check_settings,
    described,
    run_settings,
    saved_settings,
)
from mpo.training.sharding import sharding_name
from mpo.training.unique_pairs import fingerprint_rows

logger = get_logger(__name__)

_FACTORS = ("ranks", "groups_per_micro_batch", "gradient_accumulation_steps")
# Where the rows differ, one of these may be the reason.
_ROWS = (
    "source_language",
    "group_by_source",
    "max_targets_per_group",
    "max_length",
    "max_response_length",
    "harmless_max_response_length",
    "chat_template",
    "chat_template_kwargs",
)


class ResumableRun:
    """What a checkpoint of a trainer's run states, and which checkpoint the run may go on from.

    Attributes:
        changes: One sentence for each setting that was changed on purpose where the run was resumed, over all its parts.
    """

    def __init__(self, trainer: Trainer, reference: ReferencePolicy) -> None:
        self.changes: list[str] = []
        self._trainer: Any = trainer
        self._reference = reference
        self._given_optimizer = trainer.optimizer
        self._optimizer_settings: OptimizerSettings | None = None
        self._changed: list[str] = []  # names of the settings that change at this resume
        self._intact: set[str] = set()  # checkpoints whose files were read and are as they were saved

    def state(self) -> dict[str, Any]:
        """What a checkpoint states of its run.

        ``form`` is how the optimizer's states are kept: whole, or divided as one engine and number of ranks needs.
        ``settings`` are those of :func:`mpo.training.run_settings.run_settings`, and ``changes`` what became of them on the
        way. All else decides which groups have been seen after a number of steps.
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
            "settings": run_settings(
                args,
                trainer.model,
                self._reference.identity(),
                self._given_optimizer,
                str(trainer.accelerator.mixed_precision),
                harmless=trainer.data_collator.harmless is not None,
            ),
            "made_by": {name: getattr(args, name) for name in _ROWS},
            "changes": self.changes,
            "train_on": args.train_on,
            "harmless_share": args.harmless_share,
        }
        if trainer.retain_weights is not None:
            state["retain_weights"] = trainer.retain_weights.state()
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
            StorageError: There is no such checkpoint, or it is not complete, or damaged, or holds weights only.
            ConfigError: It does not fit, see :func:`check_resumable`.
        """
        self.changes, self._changed = [], []
        if not resume:
            return None
        trainer = self._trainer
        if resume is True or resume == "auto":
            found = from_main(self._last_intact(), trainer.accelerator)
            if isinstance(found, StorageError):
                raise found
            if found is None and resume is True:
                raise StorageError(
                    f"there is no complete checkpoint in '{trainer.args.output_dir}' to resume from."
                )
            if found is None:
                return None
            resume = found
            self._intact.add(os.fspath(found))
        resume = os.fspath(resume)
        if not Path(resume).is_dir():
            raise StorageError(f"the checkpoint '{resume}' to resume from does not exist.")
        if not is_complete(resume):
            raise StorageError(
                f"the checkpoint '{resume}' is not complete: its run ended while it was written, or files are missing. "
                'Resume with "auto" or True, which takes the last complete one.'
            )
        trains_adapter = hasattr(trainer.model, "peft_config")
        check_has_optimizer(resume, trains_adapter=trains_adapter)
        if resume not in self._intact:
            if damaged := from_main(self._damage(resume), trainer.accelerator):
                raise StorageError(
                    f"the checkpoint '{resume}' is damaged: {listed(damaged)} changed since it was saved. Resume with "
                    '"auto" or True, which takes the last one that is whole.'
                )
            self._intact.add(resume)
        now = self.state()
        problems = []
        checks: tuple[Callable[..., None], ...] = (
            partial(check_resumable, skips_seen_groups=not trainer.args.ignore_data_skip),
            self._take_over,
        )
        for check in checks:
            try:
                check(resume, now, trains_adapter=trains_adapter)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return resume

    def _take_over(self, checkpoint: str, state: Mapping[str, Any], *, trains_adapter: bool) -> None:
        """Refuse, or note, settings that changed since the checkpoint was saved."""
        saved, now = saved_state(checkpoint), state["settings"]
        then = saved_settings(saved)
        if then is None:
            logger.warning(
                f"'{checkpoint}' does not say with which settings it was trained (an earlier version saved it), so they "
                "were not compared with those of this run."
            )
            return
        allowed = self._trainer.args.resume_changes or ()
        self._changed = check_settings(checkpoint, then, now, allowed, trains_adapter=trains_adapter)
        step = int(Path(checkpoint).name.rpartition("-")[2])
        self.changes = [*saved.get("changes", []), *changes_at(step, self._changed, then, now)]

    def optimizer_created(self, optimizer: Any) -> None:
        """Remember the settings of the optimizer as the arguments give them."""
        self._optimizer_settings = OptimizerSettings(optimizer)

    def restored(self, checkpoint: str, optimizer: Any, scheduler: Any) -> None:
        """Restore what the library does not know of, and put changed settings back over those that a checkpoint has restored.

        Raises:
            ConfigError: The optimizer is DeepSpeed's own, which takes its settings from its configuration.
        """
        if self._trainer.retain_weights is not None:
            self._trainer.retain_weights.restore(saved_state(checkpoint).get("retain_weights", {}))
        if not self._changed:
            return
        if self._optimizer_settings is None:
            raise ConfigError(
                "`resume_changes` has no effect on an optimizer that DeepSpeed's configuration defines. Remove `optimizer` "
                "from that configuration, or restore the settings."
            )
        self._optimizer_settings.apply(self._changed, optimizer, scheduler)

    def position(self, started: tuple[int, int], max_steps: int, num_train_epochs: int) -> tuple[int, int]:
        """Where the loop begins: at ``started`` (epochs, micro-batches), or past its last epoch if no step is left.

        The library's loop looks at ``max_steps`` only after a step, so in the middle of an epoch it would take one more.
        """
        return (num_train_epochs, 0) if self._trainer.state.global_step >= max_steps else started

    def _last_intact(self) -> Path | StorageError | None:
        """The last complete checkpoint whose files are as they were saved; the main process looks for it."""
        if not self._trainer.accelerator.is_main_process:
            return None
        folder = self._trainer.args.output_dir
        found = [path for path in checkpoints(folder) if is_complete(path) and not is_set_aside(path)]
        for path in reversed(found):
            if not (damaged := damaged_files(path)):
                return path
            logger.warning(
                f"The checkpoint '{path}' is damaged ({listed(damaged)} changed since it was saved) and is passed over."
            )
        if found:
            return StorageError(
                f"all checkpoints in '{folder}' are damaged: files changed since they were saved. Delete them to start "
                "again, or choose another `output_dir`."
            )
        return None

    def _damage(self, checkpoint: str) -> list[str]:
        return damaged_files(checkpoint) if self._trainer.accelerator.is_main_process else []

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


def check_has_optimizer(checkpoint: str | Path, *, trains_adapter: bool) -> None:
    """Raise a StorageError for a checkpoint that was saved with ``save_only_model``."""
    if holds_weights_only(checkpoint):
        key = "adapter_name_or_path" if trains_adapter else "model_name_or_path"
        raise StorageError(
            f"the checkpoint '{checkpoint}' cannot be resumed: it was saved with `save_only_model: true`, without optimizer, "
            f"schedule and random state. Start a new run from its weights (`{key}: {checkpoint}`) in another `output_dir`."
        )


def no_step_is_left(checkpoint: str | Path, args: MPOConfig, planned: int) -> bool:
    """Whether the run that a checkpoint belongs to has been trained to its end.

    Args:
        checkpoint: Its folder; it fits the run.
        args: The settings of the run that is to go on.
        planned: The steps of the run as it is planned now, before ``min_source_gap`` has left sources out.
    """
    done, total = steps_of(checkpoint)
    if done >= planned:
        return True
    if args.min_source_gap is None or args.max_steps > 0 or args.ignore_data_skip:
        return False  # the plan is exact, or the epochs may have another number of steps than they had
    then = saved_settings(saved_state(checkpoint)) or {}
    return done >= total and then.get("num_train_epochs") == args.num_train_epochs


def check_planned(checkpoint: str | Path, args: MPOConfig, model: Any, *, harmless: bool) -> None:
    """Refuse a checkpoint of a run with other settings, as far as they are known before weights are loaded.

    Args:
        checkpoint: Its folder.
        args: The settings of the run that is to go on.
        model: The model without its weights, with its adapter if it has one.
        harmless: Whether there are harmless groups.

    Raises:
        ConfigError: Names every setting that must not change, with its old and new value.
    """
    then = saved_settings(saved_state(checkpoint))
    if then is None:
        return
    now = run_settings(args, model, ModelIdentity("unknown:not loaded"), None, "", harmless=harmless)
    for name in ("dtype", "mixed_precision"):  # of the weights and of the launcher
        del now[name]
    allowed, trains_adapter = args.resume_changes or (), hasattr(model, "peft_config")
    check_settings(str(checkpoint), then, now, allowed, trains_adapter=trains_adapter)


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
    apart = ("form", "settings", "changes", "made_by", "retain_weights")
    different = [name for name in now if name not in apart and name in saved and saved[name] != now[name]]
    if different and not _same_steps(different, saved, now):
        changes = ", ".join(described(name, saved[name], now[name]) for name in different)
        if "rows" in different:
            then, made_by = saved.get("made_by", {}), now["made_by"]
            reasons = [name for name in made_by if name in then and then[name] != made_by[name]]
            changes += "".join(f", {described(name, then[name], made_by[name])}" for name in reasons)
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
