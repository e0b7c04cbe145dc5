"""What stops a run before it spoils its weights: a loss or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mpo.errors import TrainingError
from mpo.training.checkpoints import is_complete, last_complete_checkpoint
from mpo.training.ranks import from_main, gathered
from mpo.training.sharding import local_part

_OVERFLOWS_BEFORE_STOP = 25
_GROUPS_NAMED = 8


class FiniteGuard:
    """Watches the losses and the gradient of one optimizer step, on all ranks, and whether one of them was told to end.

    Args:
        accelerator: The process group.
        asked: Number of the signal that this rank has received, or 0.

    Attributes:
        stopped_by: Number of the signal that ends the run after the current step, the same on all ranks, or 0.
    """

    def __init__(self, accelerator: Accelerator, asked: Callable[[], int] = lambda: 0) -> None:
        self.stopped_by = 0
        self._accelerator = accelerator
        self._asked = asked
        self._loss: Tensor | None = None  # of the step so far
        self._groups: list[tuple[str, list[int]]] = []  # it is made of, as origin and rows
        self._overflows = 0  # steps in a row

    @property
    def skips(self) -> bool:
        """Whether the loss scaler skips the step that :meth:`not_finite` was last asked about: its gradient overflowed."""
        return self._overflows > 0

    def add(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Add a micro-batch (:class:`mpo.training.sampling.GroupCollator`) and its loss, a scalar without a graph."""
        self._loss = loss if self._loss is None else self._loss + loss
        self._groups.extend(zip(batch["origins"], batch["rows"], strict=True))

    def clear(self) -> None:
        """Begin the next step."""
        self._loss, self._groups = None, []

    def not_finite(self, grad_norm: Any = 0.0) -> str | None:
        """What forbids the optimizer to take the step: ``"loss"`` or ``"gradient"``, the same on all ranks, or None.

        This waits for the device, once per step. Under fp16 an overflowing gradient is how the loss scale finds its
        level, and the scaler skips the step, so only many in a row count.
        """
        device = self._accelerator.device
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=device)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        loss = torch.zeros((), device=device) if self._loss is None else self._loss.float()
        finite = torch.stack([torch.isfinite(loss), torch.isfinite(norm)]).float()
        flags = torch.cat([finite, finite.new_tensor([-self._asked()])])
        if self._accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
        loss_finite, norm_finite, asked = flags.tolist()
        self.stopped_by = -int(asked)
        if loss_finite and norm_finite:
            self._overflows = 0
            return None
        if loss_finite and self._accelerator.mixed_precision == "fp16":
            self._overflows += 1
            if self._overflows < _OVERFLOWS_BEFORE_STOP:
                return None
        return "gradient" if loss_finite else "loss"

    def stop(self, what: str, model: nn.Module, folder: Path, save: Callable[[], None]) -> NoReturn:
        """End the run on all ranks, after saving the last good state where it is not saved yet. All ranks call this.

        Args:
            what: From :meth:`not_finite`.
            model: Not moved by the optimizer yet, so its weights are those of the last good step.
            folder: The checkpoint of that step, which may not be there.
            save: Saves it, if the run saves checkpoints at all.

        Raises:
            TrainingError: Names the step's rows and the last good checkpoint.
        """
        ranks = self._accelerator
        groups = gathered(self._groups, ranks)
        rows = "; ".join(f"{origin} rows {rows}" for origin, rows in groups[:_GROUPS_NAMED])
        if len(groups) > _GROUPS_NAMED:
            rows += f" and {len(groups) - _GROUPS_NAMED} more groups"
        model.zero_grad()
        # Saving is a collective, and a rank may see another state of the folder, or have all its own weights finite.
        good = all(gathered([_trained_weights_are_finite(model)], ranks))
        if good and not from_main(is_complete(folder), ranks):
            save()
        saved = from_main(last_complete_checkpoint(folder.parent), ranks)
        step = int(folder.name.rpartition("-")[2])
        raise TrainingError(
            f"the {what} of step {step + 1} is not finite, so the optimizer was not run. Rows of the batch: {rows}. "
            + (f"The last good state is in '{saved}'. " if saved else "No step had been saved. ")
            + "Lower the learning rate, check these rows, or train in bf16 or fp32 instead of fp16."
        )


def _trained_weights_are_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(local_part(p)).all()) for p in model.parameters() if p.requires_grad)
