"""What a step needs is counted as its tensors take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.plan_memory import Case, config, counted, measured
from mpo.planning.known_models import shape_config
from mpo.planning.memory import SHARDINGS, Memory, describe, memory, step_needs_checkpointing
from mpo.training import activation_checkpointing
from tests import runs
from tests.tiny import build_model, random_groups, save_tiny

BY_NAME = {sharding.name: sharding for sharding in SHARDINGS}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("attention", ["tree", "eager"])
def test_the_count_is_within_5_percent_of_the_tensors_of_a_real_step(
    adapter: bool, recomputed: bool, half: bool, attention: str
) -> None:
    model = config(hidden=128, layers=4, vocab=1024)
    case = Case(adapter, recomputed, length=512, trees=2, attention=attention, half=half)
    assert counted(model, case).tensors == pytest.approx(measured(model, case), rel=0.05)


def test_bounded_scores_are_kept_and_plain_ones_are_not() -> None:
    config_ = shape_config("gemma-2-9b")
    config_.num_hidden_layers = 4
    config_.layer_types = ["full_attention"] * 4

    def activations(tree_tokens: int) -> float:
        described = describe(
            config_, adapter=None, attention="tree", checkpointing=False, tree_tokens=tree_tokens
        )
        return memory(described, BY_NAME["one GPU"], 1, 4096, 4096).activations

    capped = activations(1024) - activations(512)
    config_.attn_logit_softcapping = None
    assert abs(activations(1024) - activations(512)) < 0.01 * capped


def test_sixteen_bytes_per_weight_are_divided_as_each_sharding_divides_them() -> None:
    training = describe(shape_config("llama-3.1-8b"))
    parameters, gpus = 8_030_261_248, 8

    def state(name: str) -> tuple[float, float, float]:
        found = memory(training, BY_NAME[name], gpus, 1024, 1024)
        return found.weights, found.gradients, found.optimizer

    assert state("DDP") == (4 * parameters, 4 * parameters, 8 * parameters)
    assert state("ZeRO-1") == (2 * parameters, 2 * parameters, 12 * parameters / gpus)
    assert state("ZeRO-2") == (2 * parameters, 2 * parameters / gpus, 12 * parameters / gpus)
    assert state("ZeRO-3") == (2 * parameters / gpus, 2 * parameters / gpus, 12 * parameters / gpus)
    assert state("FSDP2") == (4 * parameters / gpus, 4 * parameters / gpus, 8 * parameters / gpus)
    for name in ("FSDP2 offload", "ZeRO-3 offload"):
        assert state(name) == (0, 0, 0)
        assert memory(training, BY_NAME[name], gpus, 1024, 1024).main_memory == 16 * parameters / gpus
    assert memory(training, BY_NAME["ZeRO-3"], gpus, 1024, 1024).main_memory == 0


def test_a_frozen_base_is_held_as_it_is_stored_and_an_adapter_in_float32() -> None:
    adapter = runs.lora(r=4)
    parameters, outside_layers = 8_030_261_248, 2 * 128256 * 4096 + 4096
    for bits, base in (
        (16, 2 * parameters),
        (4, (parameters - outside_layers) * 4.125 / 8 + 2 * outside_layers),
    ):
        training = describe(shape_config("llama-3.1-8b"), adapter=adapter, bits=bits)
        found = memory(training, BY_NAME["DDP"], 8, 1024, 1024, adapter)
        assert found.weights == base + 4 * training.trained
        assert (found.gradients, found.optimizer) == (4 * training.trained, 8 * training.trained)


def test_the_peak_is_the_largest_of_what_is_not_held_at_once() -> None:
    held = Memory(
        weights=1,
        gradients=16,
        optimizer=2,
        buffers=4,
        forward=10,
        activations=8,
        layer=3,
        lm_head=5,
        reference=0,
        main_memory=1000,
    )
    # Gradients take the place of activations; those of an earlier micro-batch are there already.
    assert held.tensors == 1 + 2 + 4 + 16
    assert replace(held, gradients=12).tensors == 1 + 2 + 4 + 8 + 5
    assert replace(held, accumulates=True).tensors == 1 + 2 + 4 + 8 + 5 + 16
    # Casts of all weights may be there in the forward pass and gone in the other.
    assert replace(held, forward=40).tensors == 1 + 2 + 4 + 40
    # Before the first step there are neither gradients nor optimizer states.
    assert replace(held, reference=100).tensors == 1 + 4 + 100
    assert held.total == (23 + 2.5e9) / 0.95


def test_a_row_has_room_for_a_tree() -> None:
    training = describe(shape_config("llama-3.2-1b"), tree_tokens=700)
    sharding = BY_NAME["one GPU"]
    assert memory(training, sharding, 1, 2100, 512) == memory(training, sharding, 1, 2100, 700)


# ---- Whether to recompute activations ----------------------------------------------------------------------------------


def test_recomputing_is_asked_for_exactly_where_the_plan_exceeds_the_device() -> None:
    model = build_model("llama", dtype=torch.float32)
    training = describe(
        model.config,
        half=True,
        bits=32,
        checkpointing=False,
        attention=model.config._attn_implementation,
        tree_tokens=90,
        reference_tokens=1,
    )
    options = {
        "tokens": 300,
        "row_tokens": 128,
        "tree_tokens": 90,
        "half": True,
        "processes": 1,
        "accumulates": False,
    }
    needed = memory(training, SHARDINGS[0], 1, 300, 128).total
    assert step_needs_checkpointing(model, device_bytes=int(needed) - 1, **options)
    assert not step_needs_checkpointing(model, device_bytes=int(needed) + 1, **options)

    # Frozen weights have no gradients and no moments, and what the model holds is what counts.
    weights = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    frozen = weights - model.lm_head.weight.numel()
    assert not step_needs_checkpointing(model, device_bytes=int(needed) - 8 * frozen, **options)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_recomputes_only_where_memory_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    rows = random_groups(0, 2, words=(1, 4))

    def calls(memory: int | None, **settings: Any) -> int:
        monkeypatch.setattr(activation_checkpointing, "device_memory", lambda device: memory)
        peft = {"peft_config": runs.lora()} if lora else {}
        trainer = runs.trainer(folder, tmp_path, rows, max_steps=1, **peft, **settings)
        trainer._prepare_references()
        count = []
        bare = trainer.model.get_base_model() if lora else trainer.model
        bare.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.append(1))
        trainer.train()
        return len(count)

    little, much = 10**9, 10**11
    kept = calls(None)
    assert calls(much) == kept
    assert calls(little) == 2 * kept
    assert calls(little, gradient_checkpointing=False) == kept
    assert calls(much, gradient_checkpointing=True) == 2 * kept


def test_a_divided_model_is_recomputed_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_checkpointing, "will_be_sharded", lambda args: True)
    monkeypatch.setattr(activation_checkpointing, "device_memory", lambda device: 10**12)
    folder = save_tiny("llama", tmp_path / "model")
    assert runs.trainer(folder, tmp_path).args.gradient_checkpointing
    assert not runs.trainer(folder, tmp_path, gradient_checkpointing=False).args.gradient_checkpointing


def test_a_model_that_cannot_be_counted_is_trained_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(activation_checkpointing, "device_memory", lambda device: 10**9)
    monkeypatch.setattr(activation_checkpointing, "step_needs_checkpointing", fail)
    with caplog.at_level("WARNING", logger="mpo"):
        trainer = runs.trainer(save_tiny("llama", tmp_path / "model"), tmp_path)
    assert not trainer.args.gradient_checkpointing
    assert any("cannot be estimated" in message for message in caplog.messages)
