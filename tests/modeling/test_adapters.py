"""LoRA layers under autocast: without the copies of their input, the results are the same to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig

from mpo.modeling.adapters import skip_input_casts
from tests.tiny import build_model


def adapted(seed: int = 0, **settings: Any) -> Any:
    """A model in bfloat16 with an adapter in float32 that does something."""
    torch.manual_seed(seed)
    bare = build_model("llama", layers=2, hidden=64, dtype=torch.bfloat16)
    model = get_peft_model(bare, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def step(model: Any, *, autocast: bool = True) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients and the bytes that autograd saves."""
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    ids = torch.arange(3, 35)[None]
    torch.manual_seed(1)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return logits.detach(), gradients, sum(storage.nbytes() for storage in saved.values())


def test_results_are_the_same_to_the_last_bit_with_fewer_bytes_saved() -> None:
    before, spared = adapted(), adapted()
    skip_input_casts(spared)
    logits, gradients, saved = step(before)
    other_logits, other_gradients, other_saved = step(spared)
    assert torch.equal(logits, other_logits)
    assert gradients.keys() == other_gradients.keys() and len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    inputs = 2 * 32 * 64 * 2  # bytes of one layer's input in bfloat16, and as many again
    assert saved - other_saved > inputs


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"use_dora": True}])
def test_where_it_would_change_results_nothing_changes(settings: dict[str, Any]) -> None:
    before, spared = adapted(**settings), adapted(**settings)
    skip_input_casts(spared)
    logits, gradients, saved = step(before)
    other_logits, other_gradients, other_saved = step(spared)
    assert torch.equal(logits, other_logits) and saved == other_saved
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


def test_without_autocast_and_in_a_copy_the_model_works_as_before() -> None:
    model = adapted()
    expected = step(adapted(), autocast=False)[0]
    skip_input_casts(model)
    twin = copy.deepcopy(model)
    assert torch.equal(step(model, autocast=False)[0], expected)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(step(twin, autocast=False)[0], expected)
    generated = twin.generate(
        input_ids=torch.tensor([[3, 4]]), generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0)
    )
    assert generated.shape[1] <= 4
