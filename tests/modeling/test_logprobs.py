"""Log-likelihoods under a frozen head equal those of the written-out logits, and so does their gradient."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from mpo.modeling.logprobs import FrozenHeadDivergence, FrozenHeadLogProbs, below_greedy
from tests.plain import relative_error


def draw(seed: int, tokens: int, vocabulary: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in ((tokens, size), (vocabulary, size))]
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return values[0].to(dtype), values[1].to(dtype), bias.to(dtype), labels


def written_out(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, scale: float
) -> Tensor:
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels]


class Head(NamedTuple):
    """What a head and its states are drawn by; ``held`` logits at a time."""

    seed: int
    tokens: int
    vocabulary: int
    size: int
    softcap: float | None
    scale: float
    biased: bool
    held: int

    def draw(self, further: int = 0) -> tuple[Tensor, ...]:
        return draw(self.seed + further, self.tokens, self.vocabulary, self.size, torch.float64)


HEADS = given(
    st.builds(
        Head,
        seed=st.integers(0, 10**6),
        tokens=st.integers(1, 9),
        vocabulary=st.integers(2, 40),
        size=st.integers(1, 6),
        softcap=st.sampled_from([None, 0.7, 30.0]),
        scale=st.sampled_from([1.0, 0.3]),
        biased=st.booleans(),
        held=st.integers(1, 200),
    )
)


@settings(deadline=None, max_examples=60)
@HEADS
def test_values_and_gradient_are_those_of_the_whole_logits(head: Head) -> None:
    _, tokens, _, _, softcap, scale, biased, held = head
    hidden, weight, bias, labels = head.draw()
    bias_or_none = bias if biased else None
    upstream = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpo.modeling.logprobs._LOGITS", {"cpu": held})
        for own in (True, False):
            leaf = hidden.clone().requires_grad_()
            found = (
                FrozenHeadLogProbs.apply(leaf, weight, bias_or_none, labels, softcap, scale, True)[0]
                if own
                else written_out(leaf, weight, bias_or_none, labels, softcap, scale)
            )
            (gradient,) = torch.autograd.grad((found * upstream).sum(), leaf)
            results.append((found.detach(), gradient))
    (found, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=60)
@HEADS
def test_how_far_a_token_is_below_greedy_decoding_is_that_of_the_whole_logits(head: Head) -> None:
    _, tokens, vocabulary, _, softcap, scale, biased, held = head
    hidden, weight, bias, labels = head.draw()
    bias_or_none = bias if biased else None
    everything = torch.stack(
        [
            written_out(hidden, weight, bias_or_none, torch.full((tokens,), token), softcap, scale)
            for token in range(vocabulary)
        ]
    )
    labels[0] = everything[:, 0].argmax()
    expected = everything.gather(0, labels[None])[0] - everything.amax(dim=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpo.modeling.logprobs._LOGITS", {"cpu": held})
        leaf = hidden.clone().requires_grad_()
        with_loss = FrozenHeadLogProbs.apply(leaf, weight, bias_or_none, labels, softcap, scale, True, True)[
            1
        ]
        alone = below_greedy(leaf, weight, bias_or_none, labels, softcap, scale)
    for found in (with_loss, alone):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert not found.requires_grad and found[0] == 0


@pytest.mark.parametrize("reverse", [False, True])
@settings(deadline=None, max_examples=60)
@HEADS
def test_the_divergence_and_its_gradient_are_those_of_the_whole_logits(reverse: bool, head: Head) -> None:
    _, tokens, vocabulary, _, softcap, scale, biased, held = head
    hidden, weight, bias, _ = head.draw()
    reference = hidden + 0.3 * head.draw(1)[0]
    bias_or_none = bias if biased else None
    upstream = torch.linspace(-1, 2, tokens, dtype=torch.float64)

    def all_log_probs(states: Tensor) -> Tensor:
        everything = [torch.full((tokens,), token) for token in range(vocabulary)]
        columns = [written_out(states, weight, bias_or_none, labels, softcap, scale) for labels in everything]
        return torch.stack(columns, dim=1)

    leaf = hidden.clone().requires_grad_()
    wanted = all_log_probs(reference)
    moved = all_log_probs(leaf)
    ahead, behind = (moved, wanted) if reverse else (wanted, moved)
    expected = (ahead.exp() * (ahead - behind)).sum(dim=1)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), leaf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpo.modeling.logprobs._LOGITS", {"cpu": held})
        own = hidden.clone().requires_grad_()
        found = FrozenHeadDivergence.apply(
            own, reference, weight, bias_or_none, softcap, scale, True, reverse
        )
        (gradient,) = torch.autograd.grad((found * upstream).sum(), own)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)
    same = FrozenHeadDivergence.apply(hidden, hidden, weight, bias_or_none, softcap, scale, False, reverse)
    assert float(same.abs().max()) <= 1e-12


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_in_bfloat16_it_is_as_close_to_float64_as_the_kernel_that_recomputes_the_logits(
    softcap: float | None,
) -> None:
    hidden, weight, _, labels = draw(0, 64, 700, 48, torch.bfloat16)
    exact = hidden.double().requires_grad_()
    expected = written_out(exact, weight.double(), None, labels, softcap, 1.0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    errors = []
    for own in (True, False):
        leaf = hidden.clone().requires_grad_()
        if own:
            found = FrozenHeadLogProbs.apply(leaf, weight, None, labels, softcap, 1.0, True)[0]
        else:
            found = ChunkedLogProbFunction.apply(leaf, weight, None, labels, 1.0, 128, softcap, 1.0, ())[0]
        assert found.dtype == torch.float32
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert gradient.dtype == torch.bfloat16
        errors.append((relative_error(found, expected), relative_error(gradient, expected_gradient)))
    own_errors, kernel_errors = errors
    assert own_errors[0] <= 1.2 * kernel_errors[0] + 1e-6
    assert own_errors[1] <= 1.2 * kernel_errors[1] + 1e-6


def test_without_a_gradient_nothing_is_kept() -> None:
    hidden, weight, bias, labels = draw(1, 5, 11, 3, torch.float32)
    with torch.no_grad():
        found, _ = FrozenHeadLogProbs.apply(hidden, weight, bias, labels, None, 1.0, False)
    assert found.grad_fn is None
    assert relative_error(found, written_out(hidden, weight, bias, labels, None, 1.0)) < 1e-6
