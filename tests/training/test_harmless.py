"""Harmless groups beside harmful ones: the step against a plain computation in float64, its order, its logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.plain import Ids, Scored, assert_same_tensors, gradients, relative_error, retention, score_pair
from tests.training.test_trainer_numerics import Bench, Case

TOLERANCE = 1e-5
RAGGED: dict[str, Any] = {"targets": (1, 3, 2, 2, 1), "harmless": (1, 4)}


# ---- The loss of a step ------------------------------------------------------------------------------------------


def dpo(now: Scored, then: Scored, pair: Ids, beta: float) -> Tensor:
    moved = [(now.logps[i] - then.logps[i]) * len(ids) for i, ids in enumerate((pair.chosen, pair.rejected))]
    return -logsigmoid(beta * (moved[0] - moved[1]))


def plain_step(bench: Bench) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of one step over all groups: each kind's mean, from one sequence a forward pass."""
    args, case = bench.trainer.args, bench.case
    model, leaves = bench.policy()

    def both(pair: Ids) -> tuple[Scored, Scored]:
        with torch.no_grad():
            then = score_pair(bench.start, pair, case.pooling)
        return score_pair(model, pair, case.pooling), then

    harmful: list[Tensor] = []
    harmless: list[Tensor] = []
    for place, group in enumerate(bench.groups):
        source = both(group.source)
        if place not in case.harmless:
            for target in group.targets:
                if args.loss_type == ["mpo"]:
                    gap = score_pair(model, target).gap
                    kept = retention(*source)
                    harmful.append((args.beta * gap - source[1].gap) ** 2 + args.retain_weight * kept)
                else:
                    harmful.append(dpo(*both(target), target, args.beta))
            continue
        pairs = {"targets": group.targets, "source": [group.source], "both": [*group.targets, group.source]}
        for pair in pairs[args.harmless_train_on or "both"]:
            now, then = both(pair)
            loss = torch.zeros((), dtype=torch.float64)
            if args.harmless_loss_type in (None, ["sigmoid"]):
                loss = dpo(now, then, pair, args.harmless_beta or 0.1)
            elif args.harmless_loss_type == ["sft"]:
                loss = -now.logps[0] * len(pair.chosen)
            loss = args.harmless_loss_weight * loss
            if args.harmless_retention == "hidden":
                moved = (now.pooled[0] - then.pooled[0]).square().sum() / now.pooled.shape[1]
                loss = loss + args.harmless_retain_weight * moved
            harmless.append(loss)
    mean = torch.stack(harmful).mean()
    if args.harmless_loss_type == ["sft"]:
        tokens = sum(
            len(pair.chosen)
            for place in case.harmless
            for pair in [bench.groups[place].source, *bench.groups[place].targets]
        )
        mean = mean + torch.stack(harmless).sum() / tokens
    else:
        mean = mean + torch.stack(harmless).mean()
    return mean.detach(), gradients(mean, leaves)


USES: list[dict[str, Any]] = [
    {},
    {"harmless_loss_weight": 0.3, "harmless_beta": 0.7, "harmless_train_on": "targets"},
    {"harmless_train_on": "source"},
    {"harmless_loss_type": "sft", "harmless_loss_weight": 2.0},
    {"harmless_retention": "hidden", "harmless_retain_weight": 3.0},
    {"harmless_loss_type": "none", "harmless_retention": "hidden"},
    {"loss_type": "sigmoid", "harmless_retention": "hidden", "harmless_train_on": "targets"},
]
MADE_UP: list[dict[str, Any]] = [
    {},
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 2, "max_targets_per_group": 1},
    {"per_device_train_batch_size": 1, "max_tokens_per_batch": 150},
    {"per_device_train_batch_size": 5, "max_tokens_per_call": 120},
    {"per_device_train_batch_size": 3, "max_tokens_per_call": 120, "batch_layout": "padded"},
]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("use", USES, ids=str)
def test_a_step_is_the_sum_of_the_means_over_either_kind(
    use: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    pooling = "last" if lora else "mean"
    case = Case("qwen2" if lora else "llama", lora, pooling=pooling, seed=41, cut=True, **RAGGED)
    bench = Bench(case, tmp_path, **use)
    loss, expected = plain_step(bench)
    own_loss, found = bench.run()
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


@pytest.mark.parametrize("made_up", MADE_UP[1:], ids=str)
@pytest.mark.parametrize("use", [USES[0], USES[4]], ids=str)
def test_a_step_is_the_same_however_its_groups_are_made_up(
    use: dict[str, Any], made_up: dict[str, Any], tmp_path: Path
) -> None:
    case = Case("llama", layout=made_up.get("batch_layout", "tree"), seed=42, **RAGGED)
    bench = Bench(case, tmp_path, **use, **made_up)
    loss, expected = plain_step(bench)
    batches = bench.batches()
    assert len(batches) > 1 or "calls" in batches[0]
    own_loss, found = bench.run(batches)
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


def test_a_filler_of_either_kind_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(Case("llama", seed=43, **RAGGED), tmp_path, harmless_retention="hidden")
    loss, expected = plain_step(bench)
    collate, data = bench.trainer.data_collator, bench.trainer.get_train_dataloader().dataset
    parts = ([0, ~1, 2], [~0], [1, ~4], [~2, 3, 4])
    own_loss, found = bench.run([collate(data.__getitems__(indices)) for indices in parts])
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)
