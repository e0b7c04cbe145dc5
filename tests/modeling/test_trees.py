"""Packed trees give every token the context it has in its own un-padded sequence."""

from __future__ import annotations

import random
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.trees import Tree, build_batch, even_rows, pack_rows
from tests.plain import (
    Exact,
    ExactLogProbFunction,
    Ids,
    assert_same_tensors,
    gradients,
    plain_model,
    random_pair,
    relative_error,
    score_pair,
)
from tests.tiny import build_model

ATTENTION = [
    (family, attention)
    for family in ("llama", "gemma2", "qwen2", "gemma3", "qwen3", "mixtral")
    for attention in ("eager", "sdpa", "tree")
    if (family, attention) != ("gemma2", "sdpa")  # sdpa cannot cap attention scores
]
POOLINGS = ("mean", "last")
PAD = 3


def build(trees: list[Tree], **options: Any) -> dict[str, Tensor]:
    defaults = {"layout": "tree", "max_tokens_per_row": 32, "pad_token_id": PAD, "pooling": "mean"}
    return build_batch(trees, **{**defaults, **options})


def numbered_trees(seed: int, count: int) -> list[Tree]:
    """Trees in which every token is another number, so that a place can be told from what lies there."""
    rng = random.Random(seed)
    numbers = iter(range(100, 10_000))

    def part() -> list[int]:
        return [next(numbers) for _ in range(rng.randint(1, 8))]

    return [Tree(part(), part(), part(), rng.random() < 0.7, rng.random() < 0.7) for _ in range(count)]


# ---- Packing -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_every_item_lies_in_exactly_one_row_and_no_row_of_several_is_overfull(
    sizes: list[int], budget: int
) -> None:
    rows = pack_rows(sizes, budget)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    for row in rows:
        assert row
        assert len(row) == 1 or sum(sizes[item] for item in row) <= budget


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_an_item_opens_a_row_only_where_no_earlier_row_had_room(sizes: list[int], budget: int) -> None:
    rows = pack_rows(sizes, budget)
    turn = {item: place for place, item in enumerate(sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)))}
    for number, row in enumerate(rows):
        for item in row:
            for earlier in rows[:number]:
                already = sum(sizes[other] for other in earlier if turn[other] < turn[item])
                assert already + sizes[item] > budget


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 100))
def test_even_rows_are_no_more_and_no_longer_and_hold_the_same(sizes: list[int], budget: int) -> None:
    def longest(rows: list[list[int]]) -> int:
        return max(sum(sizes[item] for item in row) for row in rows)

    rows, first_fit = even_rows(sizes, budget), pack_rows(sizes, max(budget, *sizes))
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert len(rows) <= len(first_fit)
    assert longest(rows) <= longest(first_fit)


def test_even_rows_share_what_first_fit_puts_into_the_first() -> None:
    assert [len(row) for row in pack_rows([5] * 6, 25)] == [5, 1]
    assert [len(row) for row in even_rows([5] * 6, 25)] == [3, 3]


def test_packing_nothing_gives_no_rows() -> None:
    assert pack_rows([], 8) == []


# ---- The tensors of a batch --------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    budget=st.integers(1, 80),
    layout=st.sampled_from(["tree", "padded"]),
    pooling=st.sampled_from(POOLINGS),
    multiple=st.sampled_from([None, 8, 7]),
)
def test_indices_point_at_the_tokens_that_are_scored_and_pooled(
    seed: int, count: int, budget: int, layout: str, pooling: str, multiple: int | None
) -> None:
    trees = numbered_trees(seed, count)
    batch = build(
        trees, layout=layout, max_tokens_per_row=budget, pooling=pooling, pad_to_multiple_of=multiple
    )
    flat = batch["input_ids"].flatten()

    predicts, labels, lengths, pooled, pool_lengths = [], [], [], [], []
    for tree in trees:
        for response in (tree.chosen, tree.rejected):
            sequence = [*tree.prompt, *response]
            if tree.score:
                predicts += sequence[len(tree.prompt) - 1 : -1]
                labels += response
                lengths.append(len(response))
            if tree.pool:
                kept = sequence if pooling == "mean" else sequence[-1:]
                pooled += kept
                pool_lengths.append(len(kept))
    assert flat[batch["score_index"]].tolist() == predicts
    assert batch["score_labels"].tolist() == labels
    assert batch["score_lengths"].tolist() == lengths
    assert flat[batch["pool_index"]].tolist() == pooled
    assert batch["pool_lengths"].tolist() == pool_lengths
    assert multiple is None or batch["input_ids"].shape[1] % multiple == 0


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), budget=st.integers(1, 80))
def test_spans_say_where_the_parts_of_each_tree_and_the_padding_lie(
    seed: int, count: int, budget: int
) -> None:
    batch = build(numbered_trees(seed, count), max_tokens_per_row=budget, pad_to_multiple_of=7)
    trees, branches = batch["tree_ids"].flatten().tolist(), batch["branch_ids"].flatten().tolist()
    place = 0
    seen = []
    for number, size in enumerate(batch["tree_spans"]):
        part = number % 4
        places = slice(place, place + size)
        found = set(zip(trees[places], branches[places], strict=True))
        place += size
        if part == 3:
            assert found <= {(-1, 0)}
        else:
            ((tree, branch),) = found
            assert branch == part
            seen.append(tree)
    assert place == len(trees)
    assert sorted(seen) == sorted(list(range(count)) * 3)
    assert seen[::3] == seen[1::3] == seen[2::3]


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), budget=st.integers(1, 80))
def test_a_tree_row_holds_each_token_once_at_the_position_it_has_in_its_own_sequence(
    seed: int, count: int, budget: int
) -> None:
    trees = numbered_trees(seed, count)
    batch = build(trees, max_tokens_per_row=budget)
    expected = {}
    for number, tree in enumerate(trees):
        for branch, start, part in (
            (0, 0, tree.prompt),
            (1, len(tree.prompt), tree.chosen),
            (2, len(tree.prompt), tree.rejected),
        ):
            for place, token in enumerate(part):
                expected[token] = (number, branch, start + place)
    found: dict[int, tuple[int, int, int]] = {}
    columns = ("input_ids", "tree_ids", "branch_ids", "position_ids")
    for token, tree, branch, position in zip(*(batch[c].flatten().tolist() for c in columns), strict=True):
        if tree == -1:
            assert token == PAD
            continue
        assert token not in found
        found[token] = (tree, branch, position)
    assert found == expected
    assert "attention_mask" not in batch


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_a_padded_row_is_one_sequence_and_its_padding_is_masked(seed: int, count: int) -> None:
    trees = numbered_trees(seed, count)
    batch = build(trees, layout="padded")
    sequences = [[*tree.prompt, *response] for tree in trees for response in (tree.chosen, tree.rejected)]
    assert len(batch["input_ids"]) == len(sequences)
    for row, sequence in enumerate(sequences):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == sequence
        assert batch["position_ids"][row][real].tolist() == list(range(len(sequence)))
        assert (batch["input_ids"][row][~real] == PAD).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), budget=st.integers(1, 80))
def test_a_row_is_never_longer_than_the_budget_or_the_longest_tree(
    seed: int, count: int, budget: int
) -> None:
    trees = numbered_trees(seed, count)
    rows, length = build(trees, max_tokens_per_row=budget)["input_ids"].shape
    assert 1 <= rows <= count
    assert length <= max(budget, *(tree.size for tree in trees))
    assert build(trees, max_tokens_per_row=10_000)["input_ids"].shape == (1, sum(tree.size for tree in trees))


@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_a_tree_with_an_empty_part_is_refused(part: str) -> None:
    tree = Tree([1], [2], [3])._replace(**{part: []})
    with pytest.raises(ValueError, match="tree 1 "):
        build([Tree([4], [5], [6]), tree])


@given(st.integers(0, 10**6))
def test_the_path_of_a_kept_tree_is_its_rejected_response_but_the_last_token(seed: int) -> None:
    draw = random.Random(seed)
    ids = iter(range(1, 10_000))  # no token twice, so a token says where it is

    def part() -> list[int]:
        return [next(ids) for _ in range(draw.randint(1, 4))]

    trees = [Tree(part(), part(), part(), keep=draw.random() < 0.6) for _ in range(5)]
    batch = build(trees)
    kept = [tree for tree in trees if tree.keep]
    assert ("kept_paths" in batch) == bool(kept)
    if not kept:
        return
    assert batch["kept_paths"].shape == (2, len(kept), max(len(tree.rejected) for tree in kept) - 1)
    own = batch["input_ids"].flatten()[batch["kept_index"]]
    for tree, *places in zip(kept, *batch["kept_paths"], strict=True):
        for tokens, row in zip((batch["score_labels"], own), places, strict=True):
            assert tokens[row[row >= 0]].tolist() == tree.rejected[:-1]
            assert (row[len(tree.rejected) - 1 :] == -1).all()
    answers = [t for tree in kept for t in [tree.prompt[-1], *tree.chosen[:-1], *tree.rejected[:-1]]]
    assert own[batch["kept_answers"]].tolist() == answers
    assert own[batch["kept_prompts"]].tolist() == [t for tree in kept for t in tree.prompt[:-1]]


def test_a_tree_that_is_kept_is_scored() -> None:
    with pytest.raises(ValueError, match="tree 0 is kept and not scored"):
        build([Tree([1, 2], [3], [4], score=False, keep=True)])


# ---- Through a model ---------------------------------------------------------------------------------------


@lru_cache
def headed(family: str, attention: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = build_model(family, dtype=dtype, attn_implementation=attention, sliding_window=5)
    attach_reward_gap_head(model)
    return model


@lru_cache
def plain(family: str) -> PreTrainedModel:
    return plain_model(build_model(family, dtype=torch.float64, sliding_window=5))


def draw_trees(seed: int) -> tuple[list[Ids], list[Tree]]:
    """One to four pairs, each with log-likelihoods, pooled states, or both to compute."""
    rng = random.Random(seed)
    pairs = [random_pair(rng) for _ in range(rng.randint(1, 4))]
    jobs = [rng.choice([(True, False), (False, True), (True, True)]) for _ in pairs]
    return pairs, [Tree(*pair, *job) for pair, job in zip(pairs, jobs, strict=True)]


def draw_budget(seed: int, trees: list[Tree]) -> int:
    """A row for every tree, one row for all, a budget that the longest tree exceeds, or any other."""
    rng = random.Random(seed + 1)
    longest, total = max(tree.size for tree in trees), sum(tree.size for tree in trees)
    return rng.choice([1, total, max(1, longest - 1), rng.randint(1, 2 * total)])


def expected_outputs(
    model: PreTrainedModel, pairs: list[Ids], trees: list[Tree], pooling: str
) -> list[Tensor]:
    scored = [score_pair(model, pair, pooling) for pair in pairs]
    empty = torch.zeros((0, 2), dtype=torch.float64)
    logps = [s.logps for s, tree in zip(scored, trees, strict=True) if tree.score]
    states = [s.pooled for s, tree in zip(scored, trees, strict=True) if tree.pool]
    return [torch.stack(logps) if logps else empty, torch.stack(states) if states else empty]


def assert_tree_equals_plain(
    family: str, attention: str, seed: int, pooling: str, layout: str, exact: bool
) -> None:
    """Log-likelihoods and pooled states. In exact arithmetic to 1e-9, else to a few roundings of float32."""
    pairs, trees = draw_trees(seed)
    batch = build(trees, layout=layout, max_tokens_per_row=draw_budget(seed, trees), pooling=pooling)
    model = headed(family, attention)
    with torch.no_grad():
        expected = expected_outputs(plain(family), pairs, trees, pooling)
        with Exact() if exact else nullcontext():
            output = model(reward_gap_head=True, **batch)
    tolerances = (1e-9, 1e-9) if exact else (1e-6, 2e-6)
    outputs = output.response_logps, output.pooled
    for actual, wanted, tolerance in zip(outputs, expected, tolerances, strict=True):
        assert len(actual) == len(wanted)
        if len(wanted):
            assert actual.shape == wanted.shape
            assert relative_error(actual, wanted) <= tolerance


@pytest.mark.parametrize(("family", "attention"), ATTENTION)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), pooling=st.sampled_from(POOLINGS))
def test_packed_trees_equal_separate_sequences_in_exact_arithmetic(
    family: str, attention: str, seed: int, pooling: str
) -> None:
    assert_tree_equals_plain(family, attention, seed, pooling, "tree", exact=True)


@pytest.mark.parametrize(("family", "attention"), ATTENTION)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), pooling=st.sampled_from(POOLINGS))
def test_padded_rows_equal_separate_sequences_in_exact_arithmetic(
    family: str, attention: str, seed: int, pooling: str
) -> None:
    assert_tree_equals_plain(family, attention, seed, pooling, "padded", exact=True)


@pytest.mark.parametrize(("family", "attention"), ATTENTION)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), pooling=st.sampled_from(POOLINGS))
def test_packed_trees_equal_separate_sequences_up_to_the_float32_parts_of_the_libraries(
    family: str, attention: str, seed: int, pooling: str
) -> None:
    # Padded rows are not run so: where a sliding window leaves a padding token nothing to see, eager
    # attention turns float64's minimum into minus infinity as it goes to float32, and its softmax into NaN.
    # Trees have no such rows.
    assert_tree_equals_plain(family, attention, seed, pooling, "tree", exact=False)


@pytest.mark.parametrize(("family", "attention"), ATTENTION)
def test_gradients_through_packed_trees_equal_those_through_separate_sequences(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo.modeling.head.ChunkedLogProbFunction", ExactLogProbFunction)
    rng = random.Random(5)
    pairs = [random_pair(rng) for _ in range(3)]
    trees = [Tree(*pair, True, True) for pair in pairs]
    batch = build(trees, max_tokens_per_row=sum(tree.size for tree in trees[:2]))
    model, reference = headed(family, attention), plain(family)
    directions = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, 32, dtype=torch.float64)

    def along(logps: Tensor, states: Tensor) -> Tensor:
        return (logps * directions[0]).sum() + (states * directions[1]).sum()

    with Exact():
        output = model(reward_gap_head=True, **batch)
    actual = gradients(along(output.response_logps, output.pooled), dict(model.named_parameters()))
    outputs = expected_outputs(reference, pairs, trees, "mean")
    expected = gradients(along(*outputs), dict(reference.named_parameters()))
    assert_same_tensors(actual, expected, 1e-9)
