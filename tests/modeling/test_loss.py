"""The objective's pure functions against the formulas, written out in numbers and plain tensor algebra."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpo.modeling.loss import mpo_loss, retention_loss, reward_gap, reward_gap_loss, segment_mean
from tests.plain import relative_error

TOLERANCE = 1e-9

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)
scales = st.floats(0.1, 3.0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_values_and_gradients(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Both give the same values, and the same gradients for a random direction of the output."""
    results = []
    for compute in (function, plain):
        leaves = [value.clone().requires_grad_() for value in inputs]
        output = compute(*leaves)
        gradients = torch.autograd.grad((output * draw(7, *output.shape)).sum(), leaves)
        results.append([output.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == torch.float64
        assert relative_error(actual, expected) <= TOLERANCE


@settings(deadline=None)
@given(seeds, sizes)
def test_reward_gap_is_chosen_minus_rejected(seed: int, pairs: int) -> None:
    chosen, rejected = draw(seed, pairs), draw(seed + 1, pairs)
    gap = reward_gap(chosen, rejected)
    assert gap.tolist() == [chosen[i].item() - rejected[i].item() for i in range(pairs)]


@settings(deadline=None)
@given(seeds, sizes, scales)
def test_reward_gap_loss_is_the_squared_distance_to_the_reference_gap(
    seed: int, pairs: int, beta: float
) -> None:
    gap, reference = draw(seed, pairs), draw(seed + 1, pairs)
    losses = reward_gap_loss(gap, reference, beta)
    for i in range(pairs):
        difference = beta * gap[i].item() - reference[i].item()
        assert math.isclose(losses[i].item(), difference * difference, rel_tol=TOLERANCE, abs_tol=1e-15)


@settings(deadline=None)
@given(seeds, sizes, scales, st.floats(0.01, 3))
def test_beyond_a_distance_the_gaps_loss_is_the_tangent_of_its_square(
    seed: int, pairs: int, beta: float, delta: float
) -> None:
    gap, reference = draw(seed, pairs).requires_grad_(), draw(seed + 1, pairs)
    losses = reward_gap_loss(gap, reference, beta, delta)
    losses.sum().backward()
    assert gap.grad is not None
    for i in range(pairs):
        error = beta * gap[i].item() - reference[i].item()
        near = max(-delta, min(delta, error))
        expected = near**2 + 2 * near * (error - near)
        assert math.isclose(losses[i].item(), expected, rel_tol=TOLERANCE, abs_tol=1e-15)
        assert math.isclose(gap.grad[i].item(), 2 * beta * near, rel_tol=TOLERANCE, abs_tol=1e-15)


@settings(deadline=None)
@given(seeds, sizes, scales)
def test_beta_scales_the_policy_only(seed: int, pairs: int, beta: float) -> None:
    gap = draw(seed, pairs)
    at_rest = reward_gap_loss(gap, beta * gap, beta)
    assert at_rest.abs().max().item() <= 1e-15


@settings(deadline=None)
@given(seeds, sizes, st.integers(1, 40))
def test_retention_loss_is_the_squared_distance_per_dimension_averaged_over_both_sequences(
    seed: int, sources: int, hidden: int
) -> None:
    def plain(states: Tensor, reference: Tensor) -> Tensor:
        rows = []
        for g in range(sources):
            chosen = sum((states[g, 0, i] - reference[g, 0, i]) ** 2 for i in range(hidden)) / hidden
            rejected = sum((states[g, 1, i] - reference[g, 1, i]) ** 2 for i in range(hidden)) / hidden
            rows.append((chosen + rejected) / 2)
        return torch.stack(rows)

    assert_equal_values_and_gradients(
        retention_loss, plain, draw(seed, sources, 2, hidden), draw(seed + 1, sources, 2, hidden)
    )


@settings(deadline=None)
@given(seeds, sizes, scales, st.floats(0.0, 3.0))
def test_mpo_loss_adds_the_weighted_retention_of_each_pair(
    seed: int, pairs: int, beta: float, retain_weight: float
) -> None:
    def plain(gap: Tensor, reference: Tensor, retention: Tensor) -> Tensor:
        return torch.stack(
            [(beta * gap[i] - reference[i]) ** 2 + retain_weight * retention[i] for i in range(pairs)]
        )

    def function(gap: Tensor, reference: Tensor, retention: Tensor) -> Tensor:
        return mpo_loss(gap, reference, retention, beta=beta, retain_weight=retain_weight)

    inputs = draw(seed, pairs), draw(seed + 1, pairs), draw(seed + 2, pairs).square()
    assert function(*inputs).shape == (pairs,)
    if retain_weight:
        assert_equal_values_and_gradients(function, plain, *inputs)
    else:
        assert relative_error(function(*inputs), plain(*inputs)) <= TOLERANCE


def test_mpo_loss_by_default_has_beta_one_and_weight_one() -> None:
    losses = mpo_loss(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.25, 0.0]))
    assert losses.tolist() == [0.5, 4.0]


@st.composite
def segments(draw_from: st.DrawFn) -> list[int]:
    return draw_from(st.lists(st.integers(1, 9), min_size=1, max_size=8))


@settings(deadline=None)
@given(seeds, segments(), st.one_of(st.none(), st.integers(1, 5)))
def test_segment_mean_averages_each_consecutive_run(seed: int, lengths: list[int], width: int | None) -> None:
    shape = (sum(lengths),) if width is None else (sum(lengths), width)

    def plain(values: Tensor) -> Tensor:
        rows, start = [], 0
        for length in lengths:
            total = values[start]
            for place in range(start + 1, start + length):
                total = total + values[place]
            rows.append(total / length)
            start += length
        return torch.stack(rows)

    assert_equal_values_and_gradients(
        lambda values: segment_mean(values, torch.tensor(lengths)), plain, draw(seed, *shape)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segment_mean_averages_half_precision_in_float32(dtype: torch.dtype) -> None:
    # 4096 + 1 is not a bfloat16 or float16 number, so a sum in half precision would lose every one.
    values = torch.cat([torch.tensor([4096.0]), torch.ones(511)]).to(dtype)
    mean = segment_mean(values, torch.tensor([512]))
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx((4096 + 511) / 512, rel=1e-6)


def test_all_derivatives_agree_with_finite_differences() -> None:
    gap, reference, retained = (draw(seed, 4).requires_grad_() for seed in (1, 2, 3))
    states, kept = (draw(seed, 3, 2, 5).requires_grad_() for seed in (4, 5))
    assert torch.autograd.gradcheck(reward_gap, (gap, reference))
    assert torch.autograd.gradcheck(lambda a, b: reward_gap_loss(a, b, 1.5), (gap, reference))
    assert torch.autograd.gradcheck(retention_loss, (states, kept))
    assert torch.autograd.gradcheck(
        lambda a, b, c: mpo_loss(a, b, c, beta=1.5, retain_weight=0.7), (gap, reference, retained)
    )
    assert torch.autograd.gradcheck(
        lambda values: segment_mean(values, torch.tensor([2, 1, 4])), (draw(6, 7, 3).requires_grad_(),)
    )
