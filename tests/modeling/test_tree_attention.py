"""What the branch-by-branch attention gives equals attention under the dense mask of the trees."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpo.errors import ModelError
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.masks import dense_mask
from mpo.modeling.tree_attention import layer_window, tree_attention
from mpo.modeling.trees import Tree, build_batch
from tests.plain import random_pair
from tests.tiny import build_model


def draw_batch(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    trees = [Tree(*random_pair(rng)) for _ in range(rng.randint(1, 4))]
    return build_batch(
        trees,
        layout="tree",
        max_tokens_per_row=rng.randint(1, 90),
        pad_token_id=0,
        pooling="mean",
        pad_to_multiple_of=rng.choice([None, 5]),
    )


def layer(window: int | None = None, kinds: list[str] | None = None, place: int = 0) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(sliding_window=window, layer_types=kinds), layer_idx=place, is_causal=True
    )


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """Attention as its formula says, for every head; the shared key-value heads repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return (weights @ value).transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from([None, 0.8]),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
)
def test_outputs_and_gradients_are_those_under_the_dense_mask(
    seed: int, window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    batch = draw_batch(seed)
    rows, length = batch["input_ids"].shape
    torch.manual_seed(seed)
    states = [
        torch.randn(rows, length, count, 8, dtype=torch.float64, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    ]
    query, key, value = (part.transpose(1, 2) for part in states)
    mask = dense_mask(batch["tree_ids"], batch["branch_ids"], batch["position_ids"], window)
    found, _ = tree_attention(
        layer(window), query, key, value, None, softcap=softcap, tree_spans=batch["tree_spans"]
    )
    real = batch["tree_ids"] >= 0
    expected = written_out(query, key, value, mask, softcap)
    tolerance = 1e-6 if softcap else 1e-10  # the soft-capped softmax is computed in float32
    assert found.shape == expected.shape
    assert (found[~real] == 0).all()
    torch.testing.assert_close(found[real], expected[real], rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(expected) * real[:, :, None, None]
    for own, other in zip(
        torch.autograd.grad((found * direction).sum(), states),
        torch.autograd.grad((expected * direction).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_half_precision_is_attended_in_float32_on_a_cpu(dtype: torch.dtype, softcap: float | None) -> None:
    batch = draw_batch(3)
    rows, length = batch["input_ids"].shape
    torch.manual_seed(3)
    states = [torch.randn(rows, count, length, 8, dtype=dtype, requires_grad=True) for count in (4, 2, 2)]
    seen = []

    def kernel(*parts: Tensor, **kwargs: Any) -> Tensor:
        seen.extend(part.dtype for part in parts)
        return torch.nn.functional.scaled_dot_product_attention(*parts, **kwargs)

    call = {"tree_spans": batch["tree_spans"], "softcap": softcap}
    found, _ = tree_attention(layer(), *states, None, kernel=kernel, **call)
    exact, _ = tree_attention(layer(), *(part.double() for part in states), None, **call)
    assert found.dtype == dtype
    assert set(seen) == (set() if softcap else {torch.float32})
    torch.testing.assert_close(found, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    gradients = torch.autograd.grad(found.sum(), states)
    assert {gradient.dtype for gradient in gradients} == {dtype}


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("padded", [False, True])
def test_a_call_without_trees_is_plain_causal_attention(softcap: float | None, padded: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, 6, 8, dtype=torch.float64) for count in (4, 2, 2))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask = causal & torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()[:, None, None]
    module = SimpleNamespace(config=SimpleNamespace(), num_key_value_groups=2, is_causal=True)
    found, _ = tree_attention(module, query, key, value, mask if padded else None, softcap=softcap)  # type: ignore[arg-type]
    expected = written_out(query, key, value, mask if padded else causal, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_generation_with_it_is_generation_with_the_models_own_attention() -> None:
    ids = torch.arange(20, 32)[None]
    for family in ("llama", "gemma2", "gemma3"):
        answers = [
            build_model(family, attn_implementation=attention).generate(
                ids, max_new_tokens=5, do_sample=False
            )
            for attention in ("eager", "tree")
        ]
        assert torch.equal(*answers), family


def test_a_model_that_drops_the_spans_is_refused_instead_of_attending_everything() -> None:
    model = build_model("llama", attn_implementation="tree")
    attach_reward_gap_head(model)
    for block in model.model.layers:
        original = block.self_attn.forward

        def without_spans(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            kwargs.pop("tree_spans")
            return original(*args, **kwargs)

        block.self_attn.forward = without_spans
    with pytest.raises(ModelError, match="does not pass on"):
        model(reward_gap_head=True, **draw_batch(0))


def test_attention_with_sinks_is_refused() -> None:
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ModelError, match="eager"):
        tree_attention(layer(), states, states, states, None, s_aux=torch.zeros(2))


def test_only_sliding_layers_have_a_window() -> None:
    kinds = ["sliding_attention", "full_attention"]
    assert [layer_window(layer(7, kinds).config, place) for place in (0, 1)] == [7, None]
    assert layer_window(layer(7).config, 0) == 7
    assert layer_window(layer().config, 0) is None
