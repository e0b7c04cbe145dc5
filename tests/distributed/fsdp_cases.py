"""The reward-gap head under FSDP2: a step on two ranks that have data of their own and, with the same data, on one.

``fully_shard`` is called directly, so that the head is wrapped in every way in which a user may wrap it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.trees import Tree, build_batch
from tests.plain import random_pair
from tests.runs import lora
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


def divide(model: Any, case: Case) -> None:
    """Wrap the decoder layers, and the rest as the case says."""
    bare = model.get_base_model() if case.adapter else model
    for layer in bare.model.layers:
        fully_shard(layer)
    embedding, norm, head = bare.model.embed_tokens, bare.model.norm, bare.lm_head
    match case.wrapping:
        case "own unit":
            if case.tied:
                fully_shard([embedding, head])
            else:
                fully_shard(head)
        case "tail group":
            # As Accelerate does: the last norm, the head and, where it is the same weight, the embedding.
            if not case.tied:
                fully_shard(embedding)
            fully_shard([norm, embedding, head] if case.tied else [norm, head], reshard_after_forward=False)
    fully_shard(model)


def make_headed(case: Case) -> Any:
    """The model with its reward-gap head, and with an adapter where the case has one."""
    model: Any = make_model(case)
    if case.adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, lora(init_lora_weights="gaussian"))
        attach_reward_gap_head(model.get_base_model())
    else:
        attach_reward_gap_head(model)
    return model


def step(case: Case, rank: int) -> dict[str, Any]:
    """Loss of a rank's data and gradient of all ranks', on a divided model."""
    model = make_headed(case)
    divide(model, case)
    loss = losses_of_rank(model, rank)
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {"loss": loss.detach(), "gradients": gradients}


def step_alone(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of each rank's data, and gradient of their mean, on one undivided model."""
    model = make_headed(case)
    losses = [losses_of_rank(model, rank) for rank in (0, 1)]
    (sum(losses) / 2).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [float(loss) for loss in losses], gradients


def rounded(rank: int) -> Tensor:
    """Log-likelihoods under a policy that computes in bf16 and does not round what comes out."""
    model: Any = make_model(Case("root", False))
    attach_reward_gap_head(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    output: Tensor = model(reward_gap_head=True, **batch_of_rank(rank)).response_logps
    return output.detach()


def rounded_alone(rank: int) -> Tensor:
    """The same of an undivided model whose weights are in bf16."""
    model: Any = make_model(Case("root", False)).bfloat16()
    attach_reward_gap_head(model)
    return model(reward_gap_head=True, **batch_of_rank(rank)).response_logps


def run_heads(rank: int) -> dict[Any, Any]:
    """What a rank finds in every case, by case."""
    return {**{case: step(case, rank) for case in CASES}, "rounded": rounded(rank)}
