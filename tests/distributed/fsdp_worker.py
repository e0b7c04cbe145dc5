"""One of two processes that divide a model with FSDP2 and take one step on data of their own.

torchrun --nproc_per_node 2 tests/distributed/fsdp_worker.py OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mpo.modeling.head import attach_reward_gap_head
from tests.distributed.fsdp_cases import CASES, Case, batch_of_rank, losses_of_rank, make_model
from tests.distributed.launching import end_after_limit
from tests.runs import lora

torch.set_num_threads(1)
end_after_limit()


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


def step(case: Case, rank: int) -> dict[str, Any]:
    model: Any = make_model(case)
    if case.adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, lora(init_lora_weights="gaussian"))
        attach_reward_gap_head(model.get_base_model())
    else:
        attach_reward_gap_head(model)
    divide(model, case)
    loss = losses_of_rank(model, rank)
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {"loss": loss.detach(), "gradients": gradients}


def rounded(rank: int) -> torch.Tensor:
    """Log-likelihoods under a policy that computes in bf16 and does not round what comes out."""
    model: Any = make_model(Case("root", False))
    attach_reward_gap_head(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    output: torch.Tensor = model(reward_gap_head=True, **batch_of_rank(rank)).response_logps
    return output.detach()


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[Any, Any] = {case: step(case, rank) for case in CASES}
    found["rounded"] = rounded(rank)
    torch.save(found, Path(sys.argv[1]) / f"found.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
