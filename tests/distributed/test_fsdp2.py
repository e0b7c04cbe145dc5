"""The reward-gap head under FSDP2: two ranks with data of their own have the gradient of the mean of their losses.

Accelerate does not run FSDP on a CPU, so ``fully_shard`` is called directly, on two processes with gloo.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from mpo.modeling.head import attach_reward_gap_head
from tests.distributed.fsdp_cases import CASES, Case, batch_of_rank, losses_of_rank, make_model
from tests.distributed.launching import environment, run
from tests.plain import assert_same_tensors
from tests.runs import lora

WORKER = Path(__file__).parent / "fsdp_worker.py"


def expected(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss of each rank's data, and gradient of their mean, on one undivided model."""
    model: Any = make_model(case)
    if case.adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, lora(init_lora_weights="gaussian"))
        attach_reward_gap_head(model.get_base_model())
    else:
        attach_reward_gap_head(model)
    losses = [losses_of_rank(model, rank) for rank in (0, 1)]
    (sum(losses) / 2).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [float(loss) for loss in losses], gradients


def test_each_way_to_wrap_the_head_gives_the_gradient_of_all_ranks(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    status, written = run([*launcher, WORKER, tmp_path], environment(), limit=180)
    assert status == 0, written[-8000:]
    ranks = [torch.load(tmp_path / f"found.{rank}.pt", weights_only=False) for rank in (0, 1)]
    for case in CASES:
        with subtests.test(f"{case}"):
            losses, gradients = expected(case)
            # A base in bf16 rounds differently in other batches of matrix products.
            tolerance = 2e-2 if case.adapter else 1e-5
            for rank in (0, 1):
                assert float(ranks[rank][case]["loss"]) == pytest.approx(losses[rank], rel=tolerance)
                assert_same_tensors(ranks[rank][case]["gradients"], gradients, tolerance)
    with subtests.test("computing in bf16 does not round the log-likelihoods to bf16"):
        logps = ranks[0]["rounded"]
        assert logps.dtype == torch.float32
        assert not torch.equal(logps, logps.bfloat16().float())
        model = make_model(Case("root", False)).bfloat16()
        attach_reward_gap_head(model)
        plain = model(reward_gap_head=True, **batch_of_rank(0)).response_logps
        torch.testing.assert_close(logps, plain, rtol=1e-2, atol=1e-2)
