"""What the FSDP2 tests run on two ranks and, with the same data, on one."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpo.modeling.trees import Tree, build_batch
from tests.plain import random_pair
from tests.tiny import build_model


@dataclass(frozen=True)
class Case:
    """Which modules are units besides the layers, whether the head is the embedding, and whether an adapter is trained."""

    wrapping: str
    tied: bool
    adapter: bool = False


CASES = [
    *(Case(wrapping, tied) for wrapping in ("root", "own unit", "tail group") for tied in (False, True)),
    Case("tail group", False, adapter=True),
]


def make_model(case: Case) -> Any:
    """The same on every rank; an adapter's frozen base is in bf16, so that its units hold two types."""
    dtype = torch.bfloat16 if case.adapter else torch.float32
    return build_model("llama", tie=case.tied, dtype=dtype).train()


def batch_of_rank(rank: int) -> dict[str, Tensor]:
    """Data that no other rank has, of another size."""
    rng = random.Random(rank)
    trees = [Tree(*random_pair(rng), score=True, pool=True) for _ in range(2 + rank)]
    return build_batch(trees, layout="tree", max_tokens_per_row=40, pad_token_id=0, pooling="mean")


def losses_of_rank(model: Any, rank: int) -> Tensor:
    """A loss of both outputs of the head."""
    output = model(reward_gap_head=True, **batch_of_rank(rank))
    gap = output.response_logps[:, 0] - output.response_logps[:, 1]
    return (gap**2).mean() + (output.pooled**2).mean()
