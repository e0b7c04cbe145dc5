"""What is counted of layers without weights is what real tensors take."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from peft import get_peft_model

from mpo.modeling.adapters import skip_input_casts
from mpo.modeling.masks import attention_mask
from mpo.planning.activations import Layers, LiveMemory, _spans, layer_peaks, mask_bytes
from tests import runs
from tests.tiny import build_model

LAYERS = 5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_count_while_they_live_and_views_do_not(device: str) -> None:
    before = torch.zeros(1000, device=device)
    with LiveMemory() as counter:
        first = before + 1
        view = first.view(10, 100)[2:]
        assert counter.current == counter.peak == 4000
        second = view * 2
        assert counter.current == 4000 + 3200
        del first, view
        gc.collect()
        assert counter.current == 3200
        del second
        gc.collect()
        assert counter.current == 0
        assert counter.peak == 7200


def really_taken(family: str, how: Layers, rows: int, length: int, spans: tuple[int, ...]) -> tuple[int, int]:
    """Peak bytes of the forward and of the backward pass of real layers, without those of masks and kept gradients."""
    model = build_model(
        family, layers=LAYERS, hidden=64, attn_implementation=how.attention, dtype=how.weights
    )
    if family == "mixtral":
        model.set_experts_implementation("grouped_mm")  # as models are loaded
    body = model.base_model
    if how.adapter is not None:
        model = get_peft_model(model, how.adapter)
        skip_input_casts(model)
    model.train()
    if how.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.zeros((rows, length), dtype=torch.long)
    positions = torch.arange(length).expand(rows, length)
    config = body.config.get_text_config()
    mask: Any = None
    if how.attention != "tree":
        mask = attention_mask(config, ids.int(), ids.to(torch.int8), positions, how.compute)
    states = torch.randn(rows, length, config.hidden_size, dtype=how.weights, requires_grad=True)
    counter = LiveMemory()
    with counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=how.compute == torch.bfloat16):
            extra = {"tree_spans": spans} if how.attention == "tree" else {}
            output = body(
                inputs_embeds=states, position_ids=positions, attention_mask=mask, use_cache=False, **extra
            )
            output = output.last_hidden_state
        forward, counter.peak = counter.peak, counter.current
        output.backward(torch.randn_like(output))
    return forward, counter.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "attention", "tolerance"),
    # A CPU's kernels keep more or less than a GPU's, and copies of the keys and values that heads share.
    [
        ("llama", "eager", 0.03),
        ("gemma2", "eager", 0.03),
        ("mixtral", "eager", 0.03),
        ("qwen2", "sdpa", 0.15),
        ("llama", "tree", 0.15),
    ],
)
def test_the_layers_of_a_step_take_what_is_counted(
    family: str, attention: str, tolerance: float, compute: torch.dtype, adapter: bool, checkpointing: bool
) -> None:
    how = Layers(
        config=build_model(family, layers=LAYERS, hidden=64).config,
        attention=attention,
        tree_tokens=96,
        weights=compute if adapter else torch.float32,
        compute=compute,
        adapter=runs.lora() if adapter else None,
        adapter_weights=torch.float32,
        checkpointing=checkpointing,
    )
    rows, length = (1, 12 * 96) if attention == "tree" else (3, 160)
    counted = layer_peaks(how, LAYERS, rows, length)
    taken = really_taken(family, how, rows, length, 12 * (12, 42, 42, 0))
    for peak, real in zip(counted, taken, strict=True):
        assert peak.total == pytest.approx(real, rel=tolerance)


def test_without_a_backward_pass_nothing_is_kept() -> None:
    how = Layers(build_model("llama").config)
    forward, backward = layer_peaks(how, 20, 2, 256, backward=False)
    assert forward.kept == 0 < forward.working
    assert backward.total == 0


def test_only_a_dense_mask_is_kept_by_every_layer() -> None:
    config = build_model("llama").config
    for attention, squares in (("flex_attention", False), ("sdpa", True)):
        how = Layers(config, attention)
        long, short = (layer_peaks(how, 20, rows, 512 // rows)[1].kept for rows in (1, 4))
        assert long == pytest.approx(short + squares * 20 * (512**2 - 4 * 128**2) * 2)


@pytest.mark.parametrize("tokens", [1, 95, 96, 97, 191, 500])
def test_no_tree_is_longer_than_trees_are(tokens: int) -> None:
    spans = _spans(tokens, 96)
    trees = [sum(spans[at : at + 4]) for at in range(0, len(spans), 4)]
    assert sum(trees) == tokens and max(trees) <= 96 and len(trees) == -(-tokens // 96)


def test_masks_are_squares_except_where_there_are_none() -> None:
    config = build_model("llama").config
    sizes = {
        attention: mask_bytes(Layers(config, attention), 3, 100)
        for attention in ("eager", "sdpa", "flex_attention", "tree")
    }
    assert sizes == {"eager": 60_000, "sdpa": 30_000, "flex_attention": 0, "tree": 0}


def test_casts_that_the_forward_pass_alone_holds_are_not_in_the_backward_pass() -> None:
    config = build_model("llama", layers=LAYERS, hidden=64).config
    how = Layers(config, weights=torch.float32, checkpointing=True)
    forward, backward = layer_peaks(how, 40, 1, 8)
    assert backward.total < forward.total
