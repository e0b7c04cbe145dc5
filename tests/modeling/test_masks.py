"""Who sees whom in packed trees: own prompt, own branch, nothing later, nothing too far back."""

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
from mpo.modeling.masks import additive_mask, attention_mask, block_mask, dense_mask, tree_mask_mod
from mpo.modeling.trees import Tree, build_batch
from tests.plain import Exact, plain_model, random_pair, relative_error, score_pair
from tests.tiny import build_model

seeds = st.integers(0, 10**6)
windows = st.one_of(st.none(), st.integers(1, 12))


def draw_rows(
    seed: int, longest: int = 7
) -> tuple[dict[str, Tensor], list[list[tuple[int, str, int] | None]]]:
    """
    Random packed rows, and what lies at each place of them: the tree, the part and the place in the part.

    Every token is a number of its own, so that the second result comes from the texts alone.
    """
    rng = random.Random(seed)
    numbers = iter(range(1, 10**6))
    origin: dict[int, tuple[int, str, int]] = {}

    def part(tree: int, name: str) -> list[int]:
        tokens = [next(numbers) for _ in range(rng.randint(1, longest))]
        origin.update({token: (tree, name, place) for place, token in enumerate(tokens)})
        return tokens

    trees = [
        Tree(part(i, "prompt"), part(i, "chosen"), part(i, "rejected")) for i in range(rng.randint(1, 4))
    ]
    batch = build_batch(
        trees,
        layout="tree",
        max_tokens_per_row=rng.randint(1, 4 * 3 * longest),
        pad_token_id=0,
        pooling="mean",
        pad_to_multiple_of=rng.choice([None, 5]),
    )
    prompts = [len(tree.prompt) for tree in trees]
    rows = []
    for row in batch["input_ids"].tolist():
        found = [origin.get(token) for token in row]
        # Places count from the beginning of the sequence that the token belongs to.
        rows.append([o and (o[0], o[1], o[2] + (0 if o[1] == "prompt" else prompts[o[0]])) for o in found])
    return batch, rows


def sees(query: tuple[int, str, int] | None, key: tuple[int, str, int] | None, window: int | None) -> bool:
    """The rule. A sliding window of ``w`` tokens shows a token itself and ``w - 1`` before it."""
    if query is None or key is None:
        return False
    same_tree = query[0] == key[0]
    in_own_sequence = key[1] == "prompt" or key[1] == query[1]
    not_later = key[2] <= query[2]
    near = window is None or query[2] - key[2] < window
    return same_tree and in_own_sequence and not_later and near


def ids_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return batch["tree_ids"], batch["branch_ids"], batch["position_ids"]


@settings(deadline=None)
@given(seeds, windows)
def test_the_dense_mask_is_the_rule_written_as_nested_loops(seed: int, window: int | None) -> None:
    batch, rows = draw_rows(seed)
    mask = dense_mask(*ids_of(batch), window)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(rows), 1, len(rows[0]), len(rows[0]))
    found = mask.tolist()
    for r, row in enumerate(rows):
        for q, query in enumerate(row):
            for k, key in enumerate(row):
                for head in range(1):
                    # Padding sees itself, so that its softmax is not empty; nobody else sees it.
                    expected = sees(query, key, window) if query is not None else q == k
                    assert found[r][head][q][k] == expected, (r, q, k)


@settings(deadline=None, max_examples=50)
@given(seeds, windows)
def test_the_mask_of_flex_attention_is_the_dense_one_at_every_query_and_key(
    seed: int, window: int | None
) -> None:
    batch, _ = draw_rows(seed)
    rows, length = batch["input_ids"].shape
    rule = tree_mask_mod(*ids_of(batch), window)
    found = rule(
        torch.arange(rows)[:, None, None, None],
        torch.tensor(0),
        torch.arange(length)[None, None, :, None],
        torch.arange(length)[None, None, None, :],
    )
    assert torch.equal(found, dense_mask(*ids_of(batch), window))


@settings(deadline=None, max_examples=10)
@given(seeds, st.one_of(st.none(), st.integers(1, 80)))
def test_a_block_mask_computes_every_block_with_something_to_see_and_skips_the_others(
    seed: int, window: int | None
) -> None:
    batch, _ = draw_rows(seed, longest=90)
    dense = dense_mask(*ids_of(batch), window)[:, 0]
    block = block_mask(*ids_of(batch), window)
    rows, length = batch["input_ids"].shape
    assert block.shape == (rows, 1, length, length)
    size = block.BLOCK_SIZE[0]
    blocks = -(-length // size)
    padded = torch.zeros(rows, blocks * size, blocks * size, dtype=torch.bool)
    padded[:, :length, :length] = dense
    needed = padded.view(rows, blocks, size, blocks, size).any(dim=4).any(dim=2)
    assert torch.equal(block.to_dense()[:, 0].bool(), needed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_additive_mask_is_zero_or_the_finite_minimum(dtype: torch.dtype) -> None:
    batch, _ = draw_rows(3)
    dense = dense_mask(*ids_of(batch))
    added = additive_mask(dense, dtype)
    assert added.dtype == dtype
    assert torch.isfinite(added).all()
    assert (added[dense] == 0).all()
    assert (added[~dense] == torch.finfo(dtype).min).all()


# ---- What a model is given ---------------------------------------------------------------------------------


def mask_for(family: str, implementation: str) -> tuple[Any, dict[str, Tensor]]:
    config = build_model(family, sliding_window=4).config
    config._attn_implementation = implementation
    batch, _ = draw_rows(11)
    return attention_mask(config, *ids_of(batch), torch.float32), batch


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_sliding_layers_get_the_window_and_full_layers_do_not(family: str, implementation: str) -> None:
    masks, batch = mask_for(family, implementation)
    assert set(masks) == {"full_attention", "sliding_attention"}
    for kind, window in (("full_attention", None), ("sliding_attention", 4)):
        dense = dense_mask(*ids_of(batch), window)
        expected = dense if implementation == "sdpa" else additive_mask(dense, torch.float32)
        assert masks[kind].dtype == expected.dtype
        assert torch.equal(masks[kind], expected)
    assert not torch.equal(masks["full_attention"], masks["sliding_attention"])


def test_a_model_without_layer_types_gets_one_mask_with_its_window_if_it_has_one() -> None:
    batch, _ = draw_rows(11)
    for window in (None, 3):
        config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=window, model_type="some")
        mask = attention_mask(config, *ids_of(batch), torch.float32)
        assert torch.equal(mask, dense_mask(*ids_of(batch), window))


def test_a_window_of_all_layers_is_measured_in_positions() -> None:
    model = build_model("mixtral", dtype=torch.float64)
    model.config.sliding_window = 3
    reference = plain_model(model)
    attach_reward_gap_head(model)
    rng = random.Random(2)
    pairs = [random_pair(rng) for _ in range(3)]
    batch = build_batch(
        [Tree(*pair) for pair in pairs], layout="tree", max_tokens_per_row=99, pad_token_id=0, pooling="mean"
    )
    with torch.no_grad():
        expected = torch.stack([score_pair(reference, pair).logps for pair in pairs])
        with Exact():
            found = model(reward_gap_head=True, **batch).response_logps
        assert relative_error(found, expected) <= 1e-9
        reference.config.sliding_window = None
        without = torch.stack([score_pair(reference, pair).logps for pair in pairs])
    assert relative_error(without, expected) > 1e-3


def test_an_attention_implementation_that_cannot_take_such_masks_is_refused() -> None:
    config = SimpleNamespace(_attn_implementation="flash_attention_2", model_type="some")
    with pytest.raises(ModelError, match=r"flash_attention_2.*batch_layout: padded"):
        attention_mask(config, *ids_of(draw_rows(1)[0]), torch.float32)


def test_layers_that_are_not_plain_attention_are_refused() -> None:
    config = SimpleNamespace(
        _attn_implementation="sdpa", model_type="some", layer_types=["full_attention", "chunked_attention"]
    )
    with pytest.raises(ModelError, match=r"chunked_attention.*batch_layout: padded"):
        attention_mask(config, *ids_of(draw_rows(1)[0]), torch.float32)


# Gemma-2's sliding layer has all that flex_attention must get right: a soft-cap, a window, shared heads.
# One layer, since each kind of layer is another half minute of compilation.
def test_flex_attention_gives_what_eager_attention_gives() -> None:
    rng = random.Random(4)
    trees = [Tree(*random_pair(rng, longest=30), True, True) for _ in range(4)]
    batch = build_batch(trees, layout="tree", max_tokens_per_row=200, pad_token_id=0, pooling="last")
    outputs = []
    for implementation in ("eager", "flex_attention"):
        model = build_model("gemma2", layers=1, attn_implementation=implementation, sliding_window=6)
        model.requires_grad_(False)
        attach_reward_gap_head(model)
        with torch.no_grad():
            outputs.append(model(reward_gap_head=True, **batch))
    eager, flex = outputs
    assert relative_error(flex.response_logps, eager.response_logps) <= 1e-5
    assert relative_error(flex.pooled, eager.pooled) <= 1e-5
