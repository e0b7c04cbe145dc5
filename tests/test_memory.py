"""Memory of a training process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from mpo import trainer as trainer_module
from mpo.adapters import spare_input_copies
from mpo.masks import attention_mask
from mpo.memory import activation_bytes, step_needs_checkpointing
from tests import runs
from tests.tiny import build_model, random_groups, save_tiny

_CHILD = """
import resource, sys
import torch
from mpo.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 20) for _ in range(16)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is on Linux only")
def test_memory_freed_by_a_step_is_taken_again_without_new_page_faults() -> None:
    def faults(mode: str) -> int:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, mode], capture_output=True, text=True, check=True
        )
        return int(child.stdout)

    assert faults("keep") * 4 < faults("return")


# ---- What a step keeps -------------------------------------------------------------------------------------------


def really_kept(model: Any, bare: Any, rows: int, length: int, compute: torch.dtype) -> int:
    """Bytes that autograd saves in a forward pass of the model, each storage once, weights not counted."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(3, 100, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    mask = attention_mask(bare.config, ids.int() * 0, ids.to(torch.int8) * 0, positions, compute)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16),
    ):
        output = bare.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        own = {w.untyped_storage().data_ptr() for w in (*model.parameters(), *model.buffers())}
        total = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)
    assert output.last_hidden_state.shape[:2] == (rows, length)
    return total


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "attention", "tolerance"),
    # CPU kernels of sdpa keep more or less than those of a GPU, which save their inputs and output.
    [("llama", "eager", 0.0), ("gemma2", "eager", 0.0), ("qwen2", "sdpa", 0.15), ("gemma3", "sdpa", 0.15)],
)
def test_the_activations_of_a_step_are_counted_without_memory(
    family: str, attention: str, tolerance: float, compute: torch.dtype, lora: bool
) -> None:
    dtype = compute if lora else torch.float32
    bare = build_model(family, layers=3, hidden=64, attn_implementation=attention, dtype=dtype)
    adapter = runs.lora() if lora else None
    model = get_peft_model(bare, adapter) if lora else bare
    spare_input_copies(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = activation_bytes(bare, rows=2, length=96, compute=compute, adapter=adapter)
    assert runs.differing(before, model.state_dict()) == []
    expected = really_kept(model.train(), bare, 2, 96, compute)
    assert abs(found - expected) <= tolerance * expected


def test_recomputing_is_asked_for_exactly_where_the_sum_exceeds_the_device() -> None:
    model = build_model("llama", dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    options = {"tokens": 300, "max_tokens_per_row": 128, "compute": torch.float32}
    kept = activation_bytes(model, rows=3, length=128, compute=torch.float32)
    needed = (16 * weights + kept + 3 * 10**9) / 0.9
    assert step_needs_checkpointing(model, device_bytes=int(needed) - 10, **options)
    assert not step_needs_checkpointing(model, device_bytes=int(needed) + 10, **options)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_recomputes_only_where_memory_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    rows = random_groups(0, 2, words=(1, 4))

    def calls(memory: int | None, **settings: Any) -> int:
        monkeypatch.setattr(trainer_module, "device_memory", lambda device: memory)
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
    monkeypatch.setattr(trainer_module, "_sharded", lambda args: True)
    monkeypatch.setattr(trainer_module, "device_memory", lambda device: 10**12)
    folder = save_tiny("llama", tmp_path / "model")
    assert runs.trainer(folder, tmp_path).args.gradient_checkpointing
    assert not runs.trainer(folder, tmp_path, gradient_checkpointing=False).args.gradient_checkpointing


def test_a_model_that_cannot_be_counted_is_trained_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(trainer_module, "device_memory", lambda device: 10**9)
    monkeypatch.setattr(trainer_module, "step_needs_checkpointing", fail)
    with caplog.at_level("WARNING", logger="mpo"):
        trainer = runs.trainer(save_tiny("llama", tmp_path / "model"), tmp_path)
    assert not trainer.args.gradient_checkpointing
    assert any("cannot be estimated" in message for message in caplog.messages)
