"""Preference pairs under a model: the tensors that a loss needs, and the model calls that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mpo.modeling.head import RewardGapOutput
from mpo.modeling.layout import Forward
from mpo.modeling.loss import retention_loss
from mpo.modeling.trees import MODEL_KEYS


@dataclass(frozen=True)
class StepMeans:
    """Means over all pairs of an optimizer step, its micro-batches and ranks together.

    With them the loss of a pair can be its share of a mean over the step's tokens, or prompts: a sum over the pair's tokens
    divided by the mean number of tokens.

    Attributes:
        chosen_tokens: Length of the chosen response.
        sequence_tokens: Tokens of prompt and chosen response but the first, which nothing predicts.
        prompts: Prompts of the step per pair: the mean of one over the number of pairs that are trained of a pair's group.
        kl: KTO's reference point ``z_0`` of the step, nats; 0 for other objectives.
    """

    chosen_tokens: Tensor | float
    sequence_tokens: Tensor | float
    prompts: Tensor | float
    kl: Tensor | float = 0.0


@dataclass
class PairTensors:
    """The tensors of one batch of T pairs from G groups: all a loss needs, whatever the batch's layout.

    The pairs are the groups' target pairs, unless ``train_on`` says otherwise. What the chosen objectives do not ask for
    is None.

    Attributes:
        chosen_logps: ``[T]``, mean log-likelihood per token of the chosen responses under the policy, nats.
        rejected_logps: ``[T]``, the same for the rejected responses.
        reference_gap: ``[T]``, the reference's reward gap on the pair's source (a constant), nats per token; NaN where it
            is not asked for.
        retention: ``[T]``, retention term of the pair's source, or of a harmless pair itself (0 where neither is held).
        language: ``[T]``, index of the pair's language in the trainer's ``languages``.
        group_of_pair: ``[T]``, index of the pair's group, 0 to G - 1.
        source_hidden: ``[G, 2, H]``, pooled states of the source's two sequences under the policy, or None.
        reference_hidden: ``[G, 2, H]``, the same under the reference, or None.
        chosen_lengths: ``[T]``, tokens of the chosen responses.
        rejected_lengths: ``[T]``, the same for the rejected responses.
        is_source: ``[T]``, True for a pair in the dominant language.
        reference_chosen_logps: ``[T]``, ``chosen_logps`` of the same pairs under the reference (a constant), or None.
        reference_rejected_logps: ``[T]``, the same for the rejected responses, or None.
        first_logps: ``[T, 2]``, log-likelihood of the first token of the chosen and of the rejected response; None for
            what no call has made.
        below_greedy: ``[T, 2]``, how far the log-likelihoods of the chosen and the rejected response are below those of what greedy
            decoding takes in place of each token, summed; 0 where it would say just that. A constant; or None.
        shared_sums: ``[T, 2]``, log-likelihood of as many first tokens of the chosen and the rejected response as the
            shorter one has, summed; or None.
        reference_shared_sums: ``[T, 2]``, the same under the reference, or None.
        prompt_sums: ``[T]``, log-likelihood of the prompt's tokens but its first, summed; or None.
        prompt_states: ``[P, L, H]``, of each of P prompts the hidden state of one token, its last unless ``state_position``
            says otherwise, in each of its languages: those of its target pairs in their order, then the source's; zeros where
            it has fewer than L. After the final norm, or at ``state_layer``. Or None.
        prompt_counts: ``[P]``, number of languages of each, or None.
        prompt_of_pair: ``[T]``, index of the pair's prompt among these, or None.
        step: Means over the optimizer step; where there are kinds, over its harmful pairs.
        is_harmless: ``[T]``, True for a pair of a harmless group; None where the data have none.
        by_kind: Places of the harmful and of the harmless pairs, or None likewise.
        harmless_step: Means over the harmless pairs of the optimizer step.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    reference_gap: Tensor
    retention: Tensor
    language: Tensor
    group_of_pair: Tensor
    source_hidden: Tensor | None = None
    reference_hidden: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    is_source: Tensor | None = None
    reference_chosen_logps: Tensor | None = None
    reference_rejected_logps: Tensor | None = None
    first_logps: Tensor | None = None
    below_greedy: Tensor | None = None
    shared_sums: Tensor | None = None
    reference_shared_sums: Tensor | None = None
    prompt_sums: Tensor | None = None
    prompt_states: Tensor | None = None
    prompt_counts: Tensor | None = None
    prompt_of_pair: Tensor | None = None
    step: StepMeans | None = None
    is_harmless: Tensor | None = None
    by_kind: tuple[Tensor, Tensor] | None = None
    harmless_step: StepMeans | None = None

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of the chosen and the rejected responses summed over their tokens, ``[T]`` each."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return self.chosen_logps * self.chosen_lengths, self.rejected_logps * self.rejected_lengths

    @property
    def reference_sums(self) -> tuple[Tensor, Tensor]:
        """The same under the reference."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        assert self.reference_chosen_logps is not None and self.reference_rejected_logps is not None
        return (
            self.reference_chosen_logps * self.chosen_lengths,
            self.reference_rejected_logps * self.rejected_lengths,
        )

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """``log pi(y|x) - log pi_ref(y|x)`` of the chosen and the rejected responses, summed over their tokens."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        assert self.reference_chosen_logps is not None and self.reference_rejected_logps is not None
        # The difference first: of two large sums it would lose digits.
        return (
            (self.chosen_logps - self.reference_chosen_logps) * self.chosen_lengths,
            (self.rejected_logps - self.reference_rejected_logps) * self.rejected_lengths,
        )

    def select(self, pairs: Tensor) -> PairTensors:
        """Some of the pairs, by their places ``[S]``; groups stay what they are."""
        per_pair = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_PER_PAIR}
        found = replace(self, **{k: v[pairs] for k, v in per_pair.items() if v is not None})
        if found.is_harmless is not None:
            found.by_kind = places_by_kind(found.is_harmless)
        return found

    def of_kind(self, *, harmless: bool) -> PairTensors | None:
        """The pairs of one kind, with the means over these; None where there are none."""
        if self.by_kind is None:
            return None if harmless else self
        places = self.by_kind[harmless]
        if not len(places):
            return None
        alone = replace(self, is_harmless=None, by_kind=None, harmless_step=None)
        return replace(alone.select(places), step=self.harmless_step if harmless else self.step)


# Fields of groups, prompts or steps.
_NOT_PER_PAIR = (
    "source_hidden",
    "reference_hidden",
    "prompt_states",
    "prompt_counts",
    "step",
    "by_kind",
    "harmless_step",
)


def places_by_kind(is_harmless: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the harmful and of the harmless pairs; waits for the device."""
    return (~is_harmless).nonzero().flatten(), is_harmless.nonzero().flatten()


def call_model(forward: Forward, tensors: dict[str, Any], **kwargs: Any) -> RewardGapOutput:
    """One call of a model with the reward-gap head on the tensors of :func:`mpo.modeling.trees.build_batch`."""
    return forward(
        reward_gap_head=True, **{key: tensors[key] for key in MODEL_KEYS if key in tensors}, **kwargs
    )


def pair_tensors(
    batch: dict[str, Any],
    output: RewardGapOutput,
    pooled: Tensor | None,
    call: dict[str, Any] | None = None,
) -> PairTensors:
    """The tensors a loss needs, from what the head returned.

    Args:
        batch: From :class:`mpo.training.sampling.GroupCollator`.
        output: Scores of T pairs.
        pooled: ``[P, 2, H]``, pooled states of the sequences that are held still, or None; for a call of a split batch
            those of the sources.
        call: The call of a split batch that gave the output, with ``pairs``, which of the batch's pairs these are.
    """
    pairs = None if call is None else call["pairs"]

    def own(name: str) -> Any:
        values = batch.get(name)
        return values if pairs is None or values is None else values[pairs]

    logps = output.response_logps
    assert logps is not None
    held = batch if call is None else call
    if call is not None and output.pooled is not None and output.pooled.shape[0]:
        pooled = output.pooled if pooled is None else torch.cat([output.pooled, pooled])
    reference_hidden = held.get("reference_hidden")
    if pooled is None or not pooled.shape[0] or reference_hidden is None:
        pooled, reference_hidden = None, None
        retention = torch.zeros_like(logps[:, 0])
    else:
        retention = _retention(pooled, reference_hidden, held)
        if "held_of_group" in held:
            # One for each group, whatever is held of it.
            pooled, reference_hidden = (
                _or_zero(states, held["held_of_group"]) for states in (pooled, reference_hidden)
            )
    if output.moved is not None:
        retention = retention + _or_zero(output.moved, held["kept_of_pair"])
    kinds = batch.get("is_harmless")
    lengths, reference_logps = own("lengths"), own("reference_logps")
    prompts: dict[str, Tensor] = (batch if call is None else call).get("prompts", {})
    states = None
    if prompts and output.prompt_states is not None:
        states = output.prompt_states[prompts["rows"]] * prompts["present"][:, :, None]
    return PairTensors(
        chosen_logps=logps[:, 0],
        rejected_logps=logps[:, 1],
        reference_gap=own("reference_gap"),
        retention=retention.to(logps.device),
        language=own("language"),
        group_of_pair=own("group_of_pair"),
        source_hidden=pooled,
        reference_hidden=reference_hidden,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        is_source=own("is_source"),
        reference_chosen_logps=None if reference_logps is None else reference_logps[:, 0],
        reference_rejected_logps=None if reference_logps is None else reference_logps[:, 1],
        first_logps=output.first_logps,
        below_greedy=output.below_greedy,
        shared_sums=output.shared_logps,
        reference_shared_sums=own("reference_shared"),
        prompt_sums=output.prompt_logps,
        prompt_states=states,
        prompt_counts=None if states is None or prompts is None else prompts["present"].sum(dim=1),
        prompt_of_pair=None if states is None or prompts is None else prompts["of_pair"],
        step=StepMeans(**batch["step"]),
        is_harmless=None if kinds is None else own("is_harmless"),
        by_kind=None if kinds is None else tuple(held["by_kind"]),
        harmless_step=None if kinds is None else StepMeans(**batch["harmless_step"]),
    )


def _retention(pooled: Tensor, reference: Tensor, held: dict[str, Any]) -> Tensor:
    """The retention term ``[T]`` of each pair: of its source, of its own chosen response, or 0."""
    losses = retention_loss(pooled, reference)
    if (own := held.get("holds_own")) is not None:
        losses = torch.where(own, retention_loss(pooled[:, :1], reference[:, :1]), losses)
    return _or_zero(losses, held["held_of_pair"])


def _or_zero(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; zeros for row -1."""
    return torch.cat([values, torch.zeros_like(values[:1])])[rows]


def run_model(forward: Forward, batch: dict[str, Any], **kwargs: Any) -> tuple[PairTensors, RewardGapOutput]:
    """Run a model on a collated batch, in one call, or in several where the collator has split it.

    Args:
        forward: The model with the reward-gap head.
        batch: From :class:`mpo.training.sampling.GroupCollator`.
        kwargs: Further arguments of a single call.

    Returns:
        The pairs' tensors, and the head's whole output; without the prompts' states where the batch is split.
    """
    if "calls" not in batch:
        output = call_model(forward, batch, **kwargs)
        return pair_tensors(batch, output, output.pooled), output
    held = batch["source_call"]
    pooled = None if held is None else call_model(forward, held).pooled
    parts = [call_model(forward, call) for call in batch["calls"]]
    retained = [
        pair_tensors(batch, part, pooled, call).retention
        for part, call in zip(parts, batch["calls"], strict=True)
    ]
    order = torch.argsort(torch.cat([call["pairs"] for call in batch["calls"]]))

    def joined(name: str) -> Tensor | None:
        found = [part[name] for part in parts if name in part]
        return torch.cat(found)[order] if found else None

    scores = ("response_logps", "first_logps", "below_greedy", "shared_logps", "prompt_logps")
    output = RewardGapOutput(**{name: joined(name) for name in scores}, pooled=pooled)
    found = pair_tensors(batch, output, pooled)
    return replace(found, retention=torch.cat(retained)[order]), output


def mismatch_sums(forward: Forward, mismatched: dict[str, Any]) -> Tensor:
    """How far a policy is from the reference on pairs with responses of other pairs.

    Args:
        forward: The policy with the reward-gap head; nothing asks for gradients of this.
        mismatched: Of :class:`mpo.training.sampling.GroupCollator`'s batch.

    Returns:
        ``[2]``: the sum of ``log pi(y'|x) - log pi_ref(y'|x)`` over the chosen and rejected responses y' of all pairs that
        count, and the number of these responses.
    """
    sums = torch.zeros(2, device=mismatched["counts"].device)
    for call in mismatched["calls"]:
        output, pairs = call_model(forward, call), call["pairs"]
        assert output.response_logps is not None
        moved = (output.response_logps - mismatched["reference_logps"][pairs]) * mismatched["lengths"][pairs]
        counts = mismatched["counts"][pairs]
        sums = sums + torch.stack([(moved.sum(dim=1) * counts).sum(), 2 * counts.sum()])
    return sums


def run_in_calls(
    forward: Forward, batch: dict[str, Any], backward: Callable[[PairTensors, Tensor], None]
) -> None:
    """Forward and backward of a batch that the collator has split: a call's activations are freed before the next.

    The pairs of all calls share the sources that are held still. Each call's backward stops at these sources' states, where
    the gradients add up, and one backward from there finishes the step: the same sums as in a single call.

    Args:
        forward: The model with the reward-gap head.
        batch: With ``calls`` and ``source_call``, see :class:`mpo.training.sampling.GroupCollator`.
        backward: Called with the tensors of a call's pairs and their places in the batch ``[T]``; makes their loss and
            runs its backward.
    """
    source_call = batch["source_call"]
    pooled = call_model(forward, source_call).pooled if source_call is not None else None
    shared = pooled.detach().requires_grad_() if pooled is not None else None
    for call in batch["calls"]:
        backward(pair_tensors(batch, call_model(forward, call), shared, call), call["pairs"])
    if pooled is not None and shared is not None and shared.grad is not None:
        torch.autograd.backward(pooled, shared.grad)
