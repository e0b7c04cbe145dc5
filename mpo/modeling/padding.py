"""Token sequences of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device, *, fill: int = 0, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of a batch, ``[b, longest]`` integers each, with ``fill`` and 0 on one side of what is shorter."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
