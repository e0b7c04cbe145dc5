"""Memory of a training process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo.planning.capacity import SHARDINGS, describe, memory
from mpo.planning.memory import step_needs_checkpointing
from mpo.training import activation_checkpointing
from tests import runs
from tests.tiny import build_model, random_groups, save_tiny

_CHILD = """
import resource, sys
import torch
from mpo.planning.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 24) for _ in range(2)]  # larger than what glibc keeps by itself
step()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The least of several steps: the first ones fill the heap, and a system short of memory may take pages away at any time.
print(min(faults() for _ in range(8)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is on Linux only")
def test_memory_freed_by_a_step_is_taken_again_without_new_page_faults() -> None:
    def faults(mode: str) -> int:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, mode], capture_output=True, text=True, check=True
        )
        return int(child.stdout)

    assert faults("keep") < 1000 < faults("return")


# ---- What a step needs -------------------------------------------------------------------------------------------


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
