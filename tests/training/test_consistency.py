"""MLC on preference trees against a plain computation in float64: which states it compares, and the mean over prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo.errors import ConfigError
from mpo.training.objectives import register_objective
from mpo.training.workload import tokens_of_step
from tests.plain import assert_same_tensors, gradients, relative_error, run_sequence, step_loss
from tests.training.test_objectives import TOLERANCE, Settings, dpo_loss, registry, trained_pairs
from tests.training.test_trainer_numerics import Bench, Case

__all__ = ["registry"]


def prompt_states(bench: Bench, model: Any) -> list[Tensor]:
    """Of each group the states ``[L, H]`` of its prompts, the source's last, at the layer and position of the settings."""
    args = bench.trainer.args
    layer = -1 if args.state_layer is None else args.state_layer
    return [
        torch.stack(
            [
                run_sequence(model, pair.prompt).hidden_states[layer][0, args.state_position]
                for pair in [*group.targets, group.source]
            ]
        )
        for group in bench.groups
    ]


def consistency(bench: Bench, model: Any) -> Tensor:
    """MLC's loss by the eigenvalues of the states' inner products, in the mean over prompts."""
    losses = []
    for states in prompt_states(bench, model):
        unit = states / states.norm(dim=1, keepdim=True)
        # Of equal states one is 0 but for rounding, to either side; the root has no slope at 0.
        values = torch.linalg.eigvalsh(unit @ unit.T).flip(0).clamp(min=1e-30).sqrt()
        scaled = values / values[0].detach() / bench.trainer.args.mlc_temperature
        losses.append(-torch.log(torch.exp(scaled[0]) / torch.exp(scaled).sum()))
    return torch.stack(losses).mean()


MIXED: dict[str, Any] = {"loss_type": ["mpo", "mlc"], "loss_weights": [1.0, 0.8]}
CASES: list[tuple[str, bool, dict[str, Any]]] = [
    ("llama", False, {"loss_type": "mlc"}),
    ("llama", True, {"loss_type": "mlc", "per_device_train_batch_size": 1}),
    ("gemma2", False, {"loss_type": "mlc", "mlc_temperature": 0.6, "batch_layout": "padded"}),
    ("qwen2", False, {**MIXED, "max_tokens_per_call": 1}),
    ("gemma2", True, {**MIXED, "max_tokens_per_call": 1, "state_layer": 1}),
    ("llama", False, {**MIXED, "per_device_train_batch_size": 2}),
    ("qwen2", True, {"loss_type": "mlc", "max_tokens_per_batch": 150, "per_device_train_batch_size": 1}),
    ("llama", False, {"loss_type": "mlc", "train_on": "both", "state_layer": 1, "state_position": -3}),
    ("llama", True, {"loss_type": "mlc", "state_layer": 1, "batch_layout": "padded"}),
    ("gemma2", False, {"loss_type": "mlc", "state_layer": 0, "state_position": -9}),
    ("gemma2", True, {"loss_type": "mlc", "state_layer": 2, "state_position": -2}),
]


@pytest.mark.parametrize(("family", "lora", "settings"), CASES, ids=str)
def test_mlc_draws_a_prompt_together_in_all_its_languages(
    family: str, lora: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(family, lora, targets=(1, 6, 2), layout=settings.get("batch_layout", "tree"), seed=40)
    bench = Bench(case, tmp_path, **settings)
    model, leaves = bench.policy()
    with case.arithmetic():
        expected = consistency(bench, model)
    if "mpo" in settings["loss_type"]:
        expected = step_loss(model, bench.groups, bench.reference(), **bench.options()) + 0.8 * expected
    batches = bench.batches()
    assert ("calls" in batches[0]) == ("max_tokens_per_call" in settings)
    assert len(batches) > 1 or not {"max_tokens_per_batch", "per_device_train_batch_size"} & set(settings)
    loss, found = bench.run(batches)
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_states_between_layers_have_their_gradient_where_activations_are_recomputed(
    lora: bool, reentrant: bool, tmp_path: Path
) -> None:
    kwargs = {"use_reentrant": reentrant}
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs, "state_layer": 1}
    case = Case(
        "llama", lora, targets=(1, 3), seed=42, exact=False
    )  # `Exact` is not there when they are recomputed
    bench = Bench(case, tmp_path, loss_type="mlc", **settings)
    bench.trainer.model.gradient_checkpointing_enable(kwargs)
    assert bench.trainer.model.train().is_gradient_checkpointing
    model, leaves = bench.policy()
    expected = consistency(bench, model)
    loss, found = bench.run()
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), 1e-4)


def spread(pairs: Any, args: Any) -> Tensor:
    """How far a pair's prompt is from that of its source, by the states of its group in the order of its pairs."""
    states = pairs.prompt_states[pairs.prompt_of_pair]
    place = [int((pairs.group_of_pair[:i] == g).sum()) for i, g in enumerate(pairs.group_of_pair)]
    own, source = torch.tensor(place), pairs.prompt_counts[pairs.prompt_of_pair] - 1
    rows = torch.arange(len(own))
    return (states[rows, own] - states[rows, source]).square().mean(dim=1)


@pytest.mark.usefixtures("registry")
def test_a_registered_objective_reads_states_at_a_layer_and_position(tmp_path: Path) -> None:
    register_objective("spread", spread, needs=["states"])
    settings = {"loss_type": "spread", "state_layer": 1, "state_position": -3}
    bench = Bench(Case("qwen2", targets=(1, 4, 2), seed=43), tmp_path, **settings)
    model, leaves = bench.policy()
    parts = [(states[:-1] - states[-1]).square().mean(dim=1) for states in prompt_states(bench, model)]
    expected = torch.cat(parts).mean()
    loss, found = bench.run()
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


def test_states_that_nobody_asks_for_are_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(Case("llama", targets=(2,), exact=False), tmp_path, loss_type="sigmoid")
    (batch,) = bench.batches()
    assert not {"state_index", "state_layer", "prompts"} & set(batch)
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", None)
    bench.run([batch])


@pytest.mark.parametrize(
    ("lora", "layer", "says"), [(True, 0, "first one that is trained is 1"), (False, 3, "has 2 layers")]
)
def test_a_layer_that_is_not_there_or_never_changes_is_refused(
    lora: bool, layer: int, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        Bench(Case("llama", lora, targets=(2,)), tmp_path, loss_type="mlc", state_layer=layer)


def test_mlc_beside_dpo_on_all_pairs_is_evaluated_and_runs_no_more_than_the_sources_prompts(
    tmp_path: Path,
) -> None:
    case = Case("llama", True, targets=(1, 4, 2), seed=41, exact=False)
    bench = Bench(case, tmp_path, loss_type=["sigmoid", "mlc"], loss_weights=[1.0, 0.8], beta=0.2)
    (batch,) = bench.batches()
    pairs = sum(len(part) for pair in trained_pairs(bench, "targets") for part in pair)
    prompts = sum(len(group.source.prompt) + 2 for group in bench.groups)
    assert int((batch["tree_ids"] >= 0).sum()) == pairs + prompts
    assert (
        int(tokens_of_step(bench.trainer.train_dataset, bench.trainer.args, "tree").sum()) == pairs + prompts
    )
    model, _ = bench.policy()
    with torch.no_grad():
        drawn = float(consistency(bench, model))
        alone = Settings(output_dir="x", use_cpu=True, loss_type="sigmoid", beta=0.2)
        preferred = float(dpo_loss(bench, alone, trained_pairs(bench, "targets")))
    metrics = bench.trainer.evaluate(bench.rows)
    assert metrics["eval_loss"] == pytest.approx(preferred + 0.8 * drawn, rel=1e-4)
