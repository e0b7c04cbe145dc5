"""The objectives' formulas against their definitions, written out in probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpo.modeling import objectives

finite = st.floats(-4, 4)
betas = st.floats(0.05, 2)
probabilities = st.floats(0.01, 0.45)


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def of(losses: Tensor) -> float:
    assert losses.shape == (1,)
    return float(losses)


@given(finite, betas, probabilities)
def test_flipped_labels_bias_dpo_and_leave_its_robust_form_unbiased(
    margin: float, beta: float, flips: float
) -> None:
    clean = -math.log(sigma(beta * margin))
    flipped = -math.log(sigma(-beta * margin))
    assert of(objectives.sigmoid_loss(one(margin), beta)) == pytest.approx(clean)
    smoothed = of(objectives.sigmoid_loss(one(margin), beta, flips))
    assert smoothed == pytest.approx((1 - flips) * clean + flips * flipped)
    robust = [of(objectives.robust_loss(one(sign * margin), beta, flips)) for sign in (1, -1)]
    assert (1 - flips) * robust[0] + flips * robust[1] == pytest.approx(clean, abs=1e-9)


@given(finite, betas, probabilities)
def test_exo_is_a_divergence_between_two_choices(margin: float, beta: float, eps: float) -> None:
    policy = sigma(beta * margin), sigma(-beta * margin)
    labels = 1 - eps, eps
    expected = sum(p * math.log(p / q) for p, q in zip(policy, labels, strict=True))
    assert of(objectives.exo_pair_loss(one(margin), beta, eps)) == pytest.approx(expected, abs=1e-9)


@given(finite, finite, betas)
def test_losses_of_two_log_ratios_are_their_definitions(w: float, lose: float, beta: float) -> None:
    a, b = beta * w, beta * lose
    expected: dict[Callable[..., Tensor], float] = {
        objectives.nca_pair_loss: -math.log(sigma(a)) - 0.5 * (math.log(sigma(-a)) + math.log(sigma(-b))),
        objectives.bco_pair_loss: -math.log(sigma(a)) - math.log(sigma(-b)),
        objectives.sppo_hard_loss: (w - 1 / (2 * beta)) ** 2 + (lose + 1 / (2 * beta)) ** 2,
        objectives.apo_zero_loss: (1 - sigma(a)) + sigma(b),
        objectives.apo_down_loss: sigma(a) + 1 - sigma(a - b),
    }
    for loss, value in expected.items():
        assert of(loss(one(w), one(lose), beta)) == pytest.approx(value), loss.__name__
    assert of(objectives.hinge_loss(one(w - lose), beta)) == pytest.approx(max(0.0, 1 - (a - b)))
    assert of(objectives.ipo_loss(one(w - lose), beta)) == pytest.approx((w - lose - 0.5 / beta) ** 2)


@given(finite, finite, st.integers(-30, 30), betas, st.floats(0, 0.5))
def test_rdpo_wants_less_of_a_margin_where_the_chosen_response_is_longer(
    w: float,
    lose: float,
    longer: int,
    beta: float,
    alpha: float,
) -> None:
    expected = math.log1p(math.exp(-(beta * (w - lose) + alpha * longer)))
    assert of(objectives.rdpo_loss(one(w), one(lose), one(longer), beta, alpha)) == pytest.approx(expected)


@given(finite, betas, st.floats(0.02, 1))
def test_discopop_blends_two_losses_by_the_size_of_the_margin(margin: float, beta: float, tau: float) -> None:
    logits = beta * margin
    share = 1 / (1 + math.exp(-max(-700, logits / tau)))
    expected = (1 - share) * -math.log(sigma(logits)) + share * math.exp(-logits)
    assert of(objectives.discopop_loss(one(margin), beta, tau)) == pytest.approx(expected)


@given(st.floats(-6, -0.05), st.floats(-6, -0.05))
def test_the_odds_ratio_is_that_of_the_probabilities(chosen: float, rejected: float) -> None:
    odds = [math.exp(value) / (1 - math.exp(value)) for value in (chosen, rejected)]
    expected = -math.log(sigma(math.log(odds[0] / odds[1])))
    assert of(objectives.odds_ratio_loss(one(chosen), one(rejected))) == pytest.approx(expected)


@given(finite, finite, st.floats(0, 3), betas, st.floats(0.1, 2), st.floats(0.1, 2))
def test_kto_measures_both_responses_from_its_reference_point(
    w: float,
    lose: float,
    kl: float,
    beta: float,
    desirable: float,
    undesirable: float,
) -> None:
    values = desirable * (1 - sigma(beta * (w - kl))), undesirable * (1 - sigma(beta * (kl - lose)))
    found = of(objectives.kto_loss(one(w), one(lose), kl, beta, desirable, undesirable))
    assert found == pytest.approx(sum(values) / 2)


@given(st.floats(-20, 20), st.floats(-1.5, 2.5))
def test_a_divergence_gives_the_derivative_of_its_function_at_the_ratio(
    log_ratio: float, alpha: float
) -> None:
    ratio = math.exp(log_ratio)
    expected = {
        "reverse_kl": log_ratio,
        "forward_kl": 1 - 1 / ratio,
        "js_divergence": math.log(2 * ratio / (ratio + 1)),
        "alpha_divergence": (ratio ** (alpha - 1) - 1) / (alpha - 1) if abs(alpha - 1) > 1e-3 else None,
    }
    for name, value in expected.items():
        if value is not None:
            found = of(objectives.divergence_score(one(log_ratio), name, alpha))
            assert found == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_the_alpha_divergence_near_one_is_the_reverse_kl_and_never_overflows() -> None:
    ratios = torch.tensor([-300.0, -1.0, 0.5, 300.0], requires_grad=True)
    assert torch.equal(objectives.divergence_score(ratios, "alpha_divergence", 1.0), ratios)
    close = objectives.divergence_score(ratios[1:3], "alpha_divergence", 1.001)
    torch.testing.assert_close(close, ratios[1:3], rtol=2e-3, atol=2e-3)
    large = objectives.divergence_score(ratios, "alpha_divergence", 2.0)
    large.sum().backward()
    assert bool(torch.isfinite(large).all()) and bool(torch.isfinite(ratios.grad).all())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no divergence 'total'"):
        objectives.divergence_score(ratios, "total")


def test_tokens_that_a_response_is_longer_by_weigh_less() -> None:
    sums, shared = torch.tensor([-9.0, -4.0]), torch.tensor([-6.0, -4.0])
    assert objectives.shortened(sums, shared, 0.5).tolist() == [-7.5, -4.0]
    assert torch.equal(objectives.shortened(sums, shared, 1.0), sums)
    assert torch.equal(objectives.shortened(sums, shared, 0.0), shared)


def consistency(states: Tensor, temperature: float) -> float:
    """By the definition, of one prompt."""
    unit = states / states.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.T).clamp(min=1e-30).sqrt().flip(0)
    return float(-torch.log_softmax(values / values[0] / temperature, dim=0)[0])


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_consistency_is_of_each_prompts_own_languages(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [4, 2, 5, 1]
    states = torch.zeros(4, 5, 16, dtype=torch.float64)
    for g, count in enumerate(counts):
        states[g, :count] = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    found = objectives.consistency_loss(states, torch.tensor(counts), temperature)
    expected = [consistency(states[g, :count], temperature) for g, count in enumerate(counts)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    # It is least where all languages point the same way, whatever the lengths.
    same = states[:1, :1] * torch.tensor([1.0, 3.0, 0.5, 2.0]).view(1, 4, 1)
    least = float(objectives.consistency_loss(same, torch.tensor([4]), temperature))
    assert least == pytest.approx(math.log(1 + 3 * math.exp(-1 / temperature)), abs=1e-6)
    assert least < min(found[:1].tolist())


GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda w, b: objectives.sigmoid_loss(w - b, 0.3, 0.1),
    "robust": lambda w, b: objectives.robust_loss(w - b, 0.3, 0.2),
    "exo_pair": lambda w, b: objectives.exo_pair_loss(w - b, 0.3, 0.1),
    "discopop": lambda w, b: objectives.discopop_loss(w - b, 0.3, 0.1),
    "odds_ratio": lambda w, b: objectives.odds_ratio_loss(-w.abs() - 0.1, -b.abs() - 0.1),
    "kto": lambda w, b: objectives.kto_loss(w, b, 0.3, 0.5, 1.2, 0.7),
    "forward_kl": lambda w, b: objectives.divergence_score(w, "forward_kl") - b,
    "alpha": lambda w, b: objectives.divergence_score(w, "alpha_divergence", 0.3) - b,
    "consistency": lambda w, b: objectives.consistency_loss(
        torch.stack([w.view(1, 4), b.view(1, 4)], dim=1), torch.tensor([2]), 0.5
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_values(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs: Any = [
        torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    ]
    if name == "consistency":
        # Its divisor is a constant, which finite differences do not know.
        loss = GRADIENTS[name](*inputs).sum()
        found = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            unit = torch.nn.functional.normalize(torch.stack(inputs), dim=-1)
            largest = torch.linalg.svdvals(unit)[0]

        def fixed(*values: Tensor) -> Tensor:
            singular = torch.linalg.svdvals(torch.nn.functional.normalize(torch.stack(values), dim=-1))
            return -torch.log_softmax(singular / largest / 0.5, dim=0)[0]

        assert torch.autograd.gradcheck(fixed, inputs)
        for a, b in zip(found, torch.autograd.grad(fixed(*inputs), inputs), strict=True):
            torch.testing.assert_close(a, b)
        return
    assert torch.autograd.gradcheck(GRADIENTS[name], inputs)
