"""Every group is drawn once per epoch, all ranks make the same number of calls, and weights have mean one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.errors import ConfigError
from mpo.modeling.layout import BatchShape
from mpo.training.order import GroupBatchSampler, TokenBudgetSampler
from mpo.training.sampling import GroupCollator, language_weights

epochs = st.integers(0, 5)
counts = st.integers(1, 60)
ranks = st.integers(1, 7)
sizes = st.integers(1, 5)
orders = st.one_of(st.none(), st.integers(0, 100))


def shape(layout: str) -> BatchShape:
    """Short rows, of which a batch has several."""
    return BatchShape(layout, max_tokens_per_row=20, pad_token_id=0, pooling="mean", tokens_per_batch=20)


def draw(
    count: int, size: int, ranks: int, seed: int | None, epoch: int, **options: Any
) -> list[list[list[int]]]:
    """The batches of every rank, of groups numbered 1000, 1001, ..."""
    batches = []
    for rank in range(ranks):
        sampler = GroupBatchSampler(
            np.arange(1000, 1000 + count), size, num_ranks=ranks, rank=rank, seed=seed, **options
        )
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        batches.append(found)
    return batches


@given(counts, sizes, ranks, orders, epochs)
def test_all_ranks_together_see_every_group_exactly_once(
    count: int, size: int, ranks: int, seed: int | None, epoch: int
) -> None:
    batches = draw(count, size, ranks, seed, epoch)
    seen = Counter(group for rank in batches for batch in rank for group in batch if group >= 0)
    assert seen == Counter(range(1000, 1000 + count))


@given(counts, sizes, ranks, orders, epochs)
def test_all_ranks_make_the_same_number_of_calls_and_none_is_empty_or_too_large(
    count: int, size: int, ranks: int, seed: int | None, epoch: int
) -> None:
    batches = draw(count, size, ranks, seed, epoch)
    assert len({len(rank) for rank in batches}) == 1
    assert all(1 <= len(batch) <= size for rank in batches for batch in rank)


@given(counts, sizes, ranks, orders, epochs)
def test_a_rank_takes_a_filler_only_where_it_has_no_group_of_its_own(
    count: int, size: int, ranks: int, seed: int | None, epoch: int
) -> None:
    for step in zip(*draw(count, size, ranks, seed, epoch), strict=True):
        real = [sum(group >= 0 for group in batch) for batch in step]
        assert max(real) - min(real) <= 1  # what is left is spread evenly
        for batch in step:
            fillers = [group for group in batch if group < 0]
            assert not fillers or (len(batch) == 1 and ~fillers[0] in range(1000, 1000 + count))


@given(counts, sizes, ranks, st.integers(0, 100), epochs)
def test_with_drop_last_every_batch_is_full_and_nothing_is_seen_twice(
    count: int, size: int, ranks: int, seed: int, epoch: int
) -> None:
    batches = draw(count, size, ranks, seed, epoch, drop_last=True)
    assert all(len(batch) == size for rank in batches for batch in rank)
    seen = [group for rank in batches for batch in rank for group in batch]
    assert len(seen) == len(set(seen)) == count // (size * ranks) * size * ranks


def test_the_order_follows_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [group for batch in draw(40, 2, 1, seed, epoch)[0] for group in batch]

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)
    # Were seed and epoch added up, another seed would only be a shift of the epochs.
    assert order(3, 2) != order(4, 1)


def test_without_a_seed_groups_come_in_their_order() -> None:
    assert draw(5, 2, 1, None, 3) == [[[1000, 1001], [1002, 1003], [1004]]]


# ---- By tokens ---------------------------------------------------------------------------------------------

token_counts = st.lists(st.integers(1, 400), min_size=1, max_size=80)


def draw_tokens(
    tokens: list[int], budget: int, ranks: int, seed: int, epoch: int, **options: Any
) -> list[list[list[int]]]:
    """The batches of every rank, of groups numbered 1000, 1001, ... with these tokens."""
    batches = []
    for rank in range(ranks):
        sampler = TokenBudgetSampler(
            np.arange(1000, 1000 + len(tokens)),
            np.array(tokens),
            budget,
            num_ranks=ranks,
            rank=rank,
            seed=seed,
            **options,
        )
        length = len(sampler)
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
        assert len(batches[-1]) == length, "the number of steps is known before and is that of every epoch"
    return batches


def load(batch: list[int], tokens: list[int]) -> int:
    return sum(tokens[group - 1000] for group in batch if group >= 0)


@given(token_counts, st.integers(1, 900), ranks, st.integers(0, 100), epochs)
def test_by_tokens_every_group_is_seen_once_within_the_budget_on_ranks_in_step(
    tokens: list[int], budget: int, ranks: int, seed: int, epoch: int
) -> None:
    batches = draw_tokens(tokens, budget, ranks, seed, epoch)
    seen = Counter(group for rank in batches for batch in rank for group in batch if group >= 0)
    assert seen == Counter(range(1000, 1000 + len(tokens)))
    assert len({len(rank) for rank in batches}) == 1
    for batch in (batch for rank in batches for batch in rank):
        assert load(batch, tokens) <= budget or len(batch) == 1
        assert all(group >= 0 for group in batch) or (len(batch) == 1 and ~batch[0] - 1000 < len(tokens))


@given(token_counts, st.integers(1, 900), ranks, st.integers(0, 100), epochs)
def test_by_tokens_no_rank_waits_for_more_than_the_smallest_group_of_another(
    tokens: list[int], budget: int, ranks: int, seed: int, epoch: int
) -> None:
    for step in zip(*draw_tokens(tokens, budget, ranks, seed, epoch), strict=True):
        assert any(group >= 0 for batch in step for group in batch)
        least = min(load(batch, tokens) for batch in step)
        for batch in step:
            if batch[0] >= 0:
                smallest = min(tokens[group - 1000] for group in batch)
                # Sizes are rounded up by less than a thirty-second.
                assert load(batch, tokens) - least <= smallest + (load(batch, tokens) + smallest) / 32


@given(token_counts, st.integers(1, 900), ranks, st.integers(0, 100))
def test_by_tokens_with_drop_last_no_rank_computes_a_filler(
    tokens: list[int], budget: int, ranks: int, seed: int
) -> None:
    batches = draw_tokens(tokens, budget, ranks, seed, 0, drop_last=True)
    seen = [group for rank in batches for batch in rank for group in batch]
    assert len(seen) == len(set(seen)) and all(group >= 0 for group in seen)
    missing = len(tokens) - len(seen)
    assert missing < ranks or not batches[0]


def test_by_tokens_batches_are_nearly_full() -> None:
    tokens = np.random.default_rng(0).integers(200, 1200, 4000).tolist()
    for ranks in (1, 8):
        steps = len(draw_tokens(tokens, 8192, ranks, 0, 0)[0])
        assert sum(tokens) / (8192 * ranks) <= steps <= 1.08 * sum(tokens) / (8192 * ranks) + 1


def test_by_tokens_order_and_company_follow_from_seed_and_epoch() -> None:
    tokens = np.random.default_rng(1).integers(20, 60, 60).tolist()

    def order(seed: int, epoch: int) -> list[list[int]]:
        return draw_tokens(tokens, 200, 1, seed, epoch)[0]

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2) != order(4, 1) != order(3, 1)
    company = [{frozenset(batch) for batch in order(0, epoch)} for epoch in (0, 1)]
    assert len(company[0] & company[1]) < len(company[0]) / 2


def test_by_tokens_nothing_is_kept_per_group_but_arrays() -> None:
    sampler = TokenBudgetSampler(np.arange(5000), np.full(5000, 100), 1000, num_ranks=4)
    assert all(not isinstance(value, (list, tuple, dict, set)) for value in vars(sampler).values())
    arrays = [value for value in vars(sampler).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 5000 * 40


# ---- Weights -----------------------------------------------------------------------------------------------

LANGUAGES = ["ar", "bn", "ja", "sw"]
pair_counts = st.fixed_dictionaries({}, optional={language: st.integers(1, 50) for language in LANGUAGES})


@given(pair_counts, st.dictionaries(st.sampled_from(LANGUAGES), st.floats(0.125, 8)))
def test_weights_keep_their_ratios_and_have_mean_one_over_the_pairs(
    pairs: dict[str, int], wanted: dict[str, float]
) -> None:
    if not pairs:
        return
    found = dict(zip(LANGUAGES, language_weights(LANGUAGES, pairs, wanted), strict=True))
    mean = sum(found[language] * count for language, count in pairs.items()) / sum(pairs.values())
    assert mean == pytest.approx(1.0, rel=1e-9)
    for a in LANGUAGES:
        for b in LANGUAGES:
            assert found[a] * wanted.get(b, 1.0) == pytest.approx(found[b] * wanted.get(a, 1.0), rel=1e-9)


@given(pair_counts)
def test_balanced_weights_give_each_language_of_the_data_the_same_total(pairs: dict[str, int]) -> None:
    if not pairs:
        return
    found = dict(zip(LANGUAGES, language_weights(LANGUAGES, pairs, "balanced"), strict=True))
    totals = [found[language] * count for language, count in pairs.items()]
    assert totals == pytest.approx([sum(pairs.values()) / len(pairs)] * len(pairs), rel=1e-9)


def test_weights_of_zero_for_all_that_is_there_are_refused() -> None:
    assert language_weights(LANGUAGES, {"ar": 3, "bn": 1}, {"ar": 0.0}) == [0.0, 4.0, 4.0, 4.0]
    with pytest.raises(ConfigError, match=r"0 for every language that is trained on \(ar\)"):
        language_weights(LANGUAGES, {"ar": 3}, {"ar": 0.0, "bn": 2.0})


def test_without_weights_every_pair_weighs_one() -> None:
    assert language_weights(LANGUAGES, {"ar": 3}, None) == [1.0] * 4


# ---- The collator ------------------------------------------------------------------------------------------


@st.composite
def examples(draw_from: st.DrawFn) -> list[dict[str, Any]]:
    """Tokenized groups with reference values, some of them fillers. All tokens of all parts differ."""
    numbers = iter(range(10, 10**6))

    def part() -> list[int]:
        return [next(numbers) for _ in range(draw_from(st.integers(1, 4)))]

    groups = []
    for place in range(draw_from(st.integers(1, 4))):
        targets = draw_from(st.integers(1, 3))
        groups.append(
            {
                **{f"source_{name}": part() for name in ("prompt", "chosen", "rejected")},
                **{
                    f"target_{name}": [part() for _ in range(targets)]
                    for name in ("prompt", "chosen", "rejected")
                },
                "target_language": [draw_from(st.sampled_from(LANGUAGES)) for _ in range(targets)],
                "row": list(range(10 * place, 10 * place + targets)),
                "origin": f"file {place}",
                "group": 100 + place,
                "filler": draw_from(st.booleans()),
                "reference_gap": float(place) + 0.5,
                "reference_hidden": np.full((2, 3), place, dtype=np.float32),
            }
        )
    return groups


@settings(deadline=None)
@given(examples(), st.sampled_from(["tree", "padded"]), st.booleans())
def test_a_batch_holds_targets_in_order_each_with_its_own_group_language_weight_and_reference(
    groups: list[dict[str, Any]], layout: str, run_source: bool
) -> None:
    weights = [1.0, 2.0, 0.5, 3.0]
    batch = GroupCollator(LANGUAGES, weights, shape(layout), run_source=run_source)(groups)
    pairs = [(g, i) for g, group in enumerate(groups) for i in range(len(group["target_language"]))]
    responses = [
        group["target_chosen"][i] + group["target_rejected"][i]
        for group in groups
        for i in range(len(group["row"]))
    ]
    languages = [groups[g]["target_language"][i] for g, i in pairs]
    real = [not groups[g]["filler"] for g, _ in pairs]
    assert batch["score_labels"].tolist() == [token for response in responses for token in response]
    assert batch["group_of_pair"].tolist() == [g for g, _ in pairs]
    assert batch["reference_gap"].tolist() == [groups[g]["reference_gap"] for g, _ in pairs]
    assert [LANGUAGES[i] for i in batch["language"].tolist()] == languages
    assert batch["weight"].tolist() == [
        weights[LANGUAGES.index(language)] * counted
        for language, counted in zip(languages, real, strict=True)
    ]
    assert batch["num_pairs"] == sum(real)
    assert batch["groups"] == [group["group"] for group in groups]
    assert batch["rows"] == [group["row"] for group in groups]

    tokens = set(batch["input_ids"].flatten().tolist())
    source_tokens = {
        token
        for group in groups
        for name in ("prompt", "chosen", "rejected")
        for token in group[f"source_{name}"]
    }
    pooled = batch["input_ids"].flatten()[batch["pool_index"]].tolist()
    if run_source:
        expected = [
            group["source_prompt"] + group[f"source_{name}"]
            for group in groups
            for name in ("chosen", "rejected")
        ]
        assert pooled == [token for sequence in expected for token in sequence]
        assert batch["reference_hidden"][:, 0, 0].tolist() == list(map(float, range(len(groups))))
    else:
        assert pooled == []
        assert "reference_hidden" not in batch
        assert not tokens & source_tokens


@settings(deadline=None)
@given(examples(), st.sampled_from(["tree", "padded"]), st.booleans(), st.integers(1, 60))
def test_a_batch_that_is_too_large_is_split_into_calls_that_share_its_pairs(
    groups: list[dict[str, Any]], layout: str, run_source: bool, limit: int
) -> None:
    options = {"run_source": run_source, "max_tokens_per_call": limit}
    batch = GroupCollator(LANGUAGES, [1.0] * 4, shape(layout), **options)(groups)
    names = ("prompt", "chosen", "rejected")
    targets = [
        [group[f"target_{name}"][i] for name in names] for group in groups for i in range(len(group["row"]))
    ]
    sources = [[group[f"source_{name}"] for name in names] for group in groups]
    sizes = [sum(map(len, parts)) for parts in targets]
    total = sum(sizes) + sum(len(part) for parts in sources for part in parts) * run_source
    if total <= limit:
        assert "calls" not in batch
        return
    pairs = [call["pairs"].tolist() for call in batch["calls"]]
    assert sorted(pair for call in pairs for pair in call) == list(range(len(targets)))
    for call, members in zip(batch["calls"], pairs, strict=True):
        assert len(members) == 1 or sum(sizes[pair] for pair in members) <= limit
        labels = [token for pair in members for part in targets[pair][1:] for token in part]
        assert call["score_labels"].tolist() == labels
        assert call["pool_lengths"].tolist() == []
    if run_source:
        pooled = batch["source_call"]["input_ids"].flatten()[batch["source_call"]["pool_index"]].tolist()
        sequences = [prompt + response for prompt, *responses in sources for response in responses]
        assert pooled == [token for sequence in sequences for token in sequence]
    else:
        assert batch["source_call"] is None
