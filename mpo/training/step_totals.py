"""What the pairs of an optimizer step add up to, over its micro-batches and all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mpo.modeling.layout import Forward
from mpo.modeling.pairs import mismatch_sums
from mpo.training.sampling import to_device


def summed(batches: Sequence[dict[str, Any]], accelerator: Accelerator) -> list[Any]:
    """The sums of the batches' ``totals``, of all ranks."""
    totals = [sum(numbers) for numbers in zip(*(batch["totals"] for batch in batches), strict=True)]
    if accelerator.num_processes == 1:
        return totals
    own = torch.stack([torch.full((), float(total), device=accelerator.device) for total in totals])
    return list(accelerator.reduce(own, reduction="sum"))


def reference_point(forward: Forward, batches: Sequence[dict[str, Any]], accelerator: Accelerator) -> Tensor:
    """KTO's estimate of the divergence from the reference, at least 0, from what the batches have for it, which is then gone."""
    device = accelerator.device
    sums = torch.zeros(2, device=device)
    with torch.no_grad():
        for batch in batches:
            sums = sums + mismatch_sums(forward, to_device(batch.pop("mismatched"), device))
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    return (sums[0] / sums[1].clamp(min=1)).clamp(min=0)
