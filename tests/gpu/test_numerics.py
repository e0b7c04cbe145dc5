"""The step's loss and gradients on the device: against float64 on the CPU, between attentions, between layouts."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import varlen
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.loss import mpo_loss, retention_loss, reward_gap
from mpo.modeling.trees import Tree, build_batch
from mpo.training.sampling import to_device
from tests.plain import Exact, Ids, plain_model, score_pair
from tests.tiny import build_model

pytestmark = pytest.mark.gpu

# Rounding of the gradient, ||difference|| / ||gradient|| over all weights, and of a log-likelihood in nats.
TOLERANCES = {torch.float32: (2e-4, 2e-4), torch.bfloat16: (0.1, 0.1)}
ATTENTIONS = [
    ("llama", "tree"),
    ("gemma2", "tree"),
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen2", "sdpa"),
    ("gemma2", "eager"),
]
FLOAT64_CASES = [
    *(
        (family, attention, layout, dtype)
        for family, attention in ATTENTIONS
        for layout in ("tree", "padded")
        for dtype in TOLERANCES
    ),
    # Each is compiled, which takes longer than all of the others.
    ("llama", "flex_attention", "tree", torch.float32),
    ("gemma2", "flex_attention", "tree", torch.bfloat16),
]


def trees(seed: int, count: int = 6) -> list[Tree]:
    rng = random.Random(seed)

    def part(most: int) -> list[int]:
        return [rng.randrange(10, 500) for _ in range(rng.randint(1, most))]

    return [Tree(part(20), part(30), part(30), score=True, pool=True) for _ in range(count)]


@dataclass
class Step:
    loss: Tensor
    logps: Tensor
    pooled: Tensor
    gradient: Tensor | None


def reference_of(items: list[Tree], hidden_size: int) -> tuple[Tensor, Tensor]:
    """Reference gaps and pooled states that do not depend on the model."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(items), generator=generator), torch.randn(
        len(items), 2, hidden_size, generator=generator
    )


def finished(loss: Tensor, logps: Tensor, pooled: Tensor, model: Any) -> Step:
    """The step on the CPU in float64, with the gradients of all trained weights as one vector if there are any."""
    gradient = None
    if loss.requires_grad:
        model.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.detach().double().cpu().flatten() for p in trained])
    return Step(*(value.detach().double().cpu() for value in (loss, logps, pooled)), gradient)


def step(model: Any, items: list[Tree], layout: str, *, row: int = 128, backward: bool = True) -> Step:
    """One step on the model's device."""
    device = next(model.parameters()).device
    gaps, hidden = (value.to(device) for value in reference_of(items, model.config.hidden_size))
    batch = build_batch(items, layout=layout, max_tokens_per_row=row, pad_token_id=0, pooling="mean")
    with torch.set_grad_enabled(backward):
        output = model(reward_gap_head=True, **to_device(batch, device))
        gap = reward_gap(output.response_logps[:, 0], output.response_logps[:, 1])
        loss = mpo_loss(gap, gaps, retention_loss(output.pooled, hidden)).mean()
    return finished(loss, output.response_logps, output.pooled, model)


def exact_step(model: Any, items: list[Tree], *, frozen_head: bool = False) -> Step:
    """The same with the same weights in float64 on the CPU, one sequence after another, written plainly."""
    plain = plain_model(copy.deepcopy(model).cpu())
    plain.get_output_embeddings().weight.requires_grad_(not frozen_head)
    gaps, hidden = reference_of(items, model.config.hidden_size)
    scored = [score_pair(plain, Ids(tree.prompt, tree.chosen, tree.rejected)) for tree in items]
    logps = torch.stack([pair.logps for pair in scored])
    pooled = torch.stack([pair.pooled for pair in scored])
    squares = (logps[:, 0] - logps[:, 1] - gaps) ** 2
    drift = ((pooled - hidden) ** 2).mean(dim=(1, 2))
    with Exact():
        return finished((squares + drift).mean(), logps, pooled, plain)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def built(family: str, attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    model = build_model(family, dtype=dtype, attn_implementation=attention, seed=3).to(device)
    attach_reward_gap_head(model)
    return model


def can_go_back(attention: str, device: torch.device) -> bool:
    return attention != "flex_attention" or device.type == "cuda"


@pytest.mark.parametrize(
    ("family", "attention", "layout", "dtype"),
    FLOAT64_CASES,
    ids=["-".join([*names, {torch.float32: "fp32"}.get(dtype, "bf16")]) for *names, dtype in FLOAT64_CASES],
)
def test_loss_and_gradient_are_those_of_float64_on_the_cpu(
    device: torch.device, family: str, attention: str, layout: str, dtype: torch.dtype
) -> None:
    if attention == "flex_attention" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("flex_attention on a CPU is for float32")
    model = built(family, attention, device, dtype)
    backward = can_go_back(attention, device)
    items = trees(1)
    found = step(model, items, layout, backward=backward)
    expected = exact_step(model, items)
    of_gradient, of_logps = TOLERANCES[dtype]
    assert (found.logps - expected.logps).abs().max() <= of_logps
    assert error(found.pooled, expected.pooled) <= of_gradient
    assert abs(found.loss - expected.loss) <= 2 * of_logps * (1 + expected.loss)
    if found.gradient is not None:
        assert error(found.gradient, expected.gradient) <= of_gradient


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_flex_attention_gives_what_eager_gives(device: torch.device, family: str) -> None:
    eager = built(family, "eager", device, torch.float32)
    flex = built(family, "flex_attention", device, torch.float32)
    backward = can_go_back("flex_attention", device)
    for seed, row in ((1, 128), (2, 300)):
        items = trees(seed)
        expected, found = (step(model, items, "tree", row=row, backward=backward) for model in (eager, flex))
        assert (found.logps - expected.logps).abs().max() <= 1e-4
        assert error(found.pooled, expected.pooled) <= 1e-4
        if found.gradient is not None and expected.gradient is not None:
            assert error(found.gradient, expected.gradient) <= 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "attention"), [("llama", "tree"), ("gemma2", "tree"), ("qwen2", "sdpa")])
def test_packed_trees_give_what_padded_sequences_give(
    device: torch.device, family: str, attention: str, dtype: torch.dtype
) -> None:
    model = built(family, attention, device, dtype)
    for seed in range(3):
        items = trees(10 + seed, count=1 + 4 * seed)
        plain, packed = (step(copy.deepcopy(model), items, layout) for layout in ("padded", "tree"))
        of_gradient, of_logps = TOLERANCES[dtype]
        assert (packed.logps - plain.logps).abs().max() <= of_logps
        assert packed.gradient is not None and plain.gradient is not None
        assert error(packed.gradient, plain.gradient) <= 2 * of_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_frozen_head_whose_logits_are_built_once_gives_the_gradient_of_float64(
    device: torch.device, family: str, dtype: torch.dtype
) -> None:
    model = built(family, "tree", device, dtype)
    model.get_output_embeddings().weight.requires_grad_(False)
    items = trees(4)
    found, expected = step(model, items, "tree"), exact_step(model, items, frozen_head=True)
    of_gradient, of_logps = TOLERANCES[dtype]
    assert (found.logps - expected.logps).abs().max() <= of_logps
    assert found.gradient is not None and expected.gradient is not None
    assert error(found.gradient, expected.gradient) <= of_gradient


def test_one_kernel_a_layer_gives_what_a_kernel_a_branch_gives(device: torch.device) -> None:
    on_cpu = device.type == "cpu"
    kernel = varlen.plain_kernel if on_cpu else varlen.torch_kernel()
    if kernel is None:
        pytest.skip("this torch has no `varlen_attn`")
    dtype = torch.float32 if on_cpu else torch.bfloat16  # the kernel is for half precision
    model = built("llama", "tree", device, dtype)
    items = trees(5)
    expected = step(copy.deepcopy(model), items, "tree", row=1 << 20)
    with varlen.in_place_of_trees(kernel):
        found = step(model, items, "tree", row=1 << 20)
    of_gradient, of_logps = TOLERANCES[dtype]
    assert (found.logps - expected.logps).abs().max() <= of_logps
    assert found.gradient is not None and expected.gradient is not None
    assert error(found.gradient, expected.gradient) <= of_gradient
