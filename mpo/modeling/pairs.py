"""Target pairs under a model: the tensors that a loss needs, and the model calls that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpo.modeling.head import RewardGapOutput
from mpo.modeling.layout import Forward
from mpo.modeling.loss import retention_loss
from mpo.modeling.trees import MODEL_KEYS


@dataclass
class PairTensors:
    """The tensors of one batch of T target pairs from G groups: all a loss needs, whatever the batch's layout.

    Attributes:
        chosen_logps: ``[T]``, mean log-likelihood per token of the chosen responses under the policy, nats.
        rejected_logps: ``[T]``, the same for the rejected responses.
        reference_gap: ``[T]``, the reference's reward gap on the pair's source (a constant), nats per token.
        retention: ``[T]``, retention term of the pair's source (0 where the source is not run).
        language: ``[T]``, index of the pair's language in the trainer's ``languages``.
        group_of_pair: ``[T]``, index of the pair's group, 0 to G - 1.
        source_hidden: ``[G, 2, H]``, pooled states of the source's two sequences under the policy, or None.
        reference_hidden: ``[G, 2, H]``, the same under the reference, or None.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    reference_gap: Tensor
    retention: Tensor
    language: Tensor
    group_of_pair: Tensor
    source_hidden: Tensor | None = None
    reference_hidden: Tensor | None = None


def call_model(forward: Forward, tensors: dict[str, Any], **kwargs: Any) -> RewardGapOutput:
    """One call of a model with the reward-gap head on the tensors of :func:`mpo.modeling.trees.build_batch`."""
    return forward(
        reward_gap_head=True, **{key: tensors[key] for key in MODEL_KEYS if key in tensors}, **kwargs
    )


def pair_tensors(
    batch: dict[str, Any], logps: Tensor, pooled: Tensor | None, pairs: Tensor | None = None
) -> PairTensors:
    """The tensors a loss needs, from what the head returned.

    Args:
        batch: From :class:`mpo.training.sampling.GroupCollator`.
        logps: ``[T, 2]``, scores of the target pairs.
        pooled: ``[G, 2, H]``, pooled states of the sources, or None.
        pairs: ``[T]``, which of the batch's pairs these are; None for all.
    """
    select = (lambda values: values) if pairs is None else (lambda values: values[pairs])
    group_of_pair = select(batch["group_of_pair"])
    reference_hidden = batch.get("reference_hidden")
    if pooled is None or not pooled.shape[0] or reference_hidden is None:
        pooled, reference_hidden = None, None
        retention = torch.zeros_like(logps[:, 0])
    else:
        retention = retention_loss(pooled, reference_hidden)[group_of_pair]
    return PairTensors(
        chosen_logps=logps[:, 0],
        rejected_logps=logps[:, 1],
        reference_gap=select(batch["reference_gap"]),
        retention=retention.to(logps.device),
        language=select(batch["language"]),
        group_of_pair=group_of_pair,
        source_hidden=pooled,
        reference_hidden=reference_hidden,
    )


def run_model(forward: Forward, batch: dict[str, Any], **kwargs: Any) -> tuple[PairTensors, RewardGapOutput]:
    """Run a model on a collated batch, in one call, or in several where the collator has split it.

    Args:
        forward: The model with the reward-gap head.
        batch: From :class:`mpo.training.sampling.GroupCollator`.
        kwargs: Further arguments of a single call.

    Returns:
        The target pairs' tensors, and the head's whole output (scores of sources, if any, follow the targets').
    """
    count = batch["reference_gap"].shape[0]
    if "calls" not in batch:
        output = call_model(forward, batch, **kwargs)
    else:
        source = (
            call_model(forward, batch["source_call"])
            if batch["source_call"] is not None
            else RewardGapOutput()
        )
        parts: list[Tensor] = []
        for call in batch["calls"]:
            scored = call_model(forward, call).response_logps
            assert scored is not None
            parts.append(scored)
        order = torch.argsort(torch.cat([call["pairs"] for call in batch["calls"]]))
        output = RewardGapOutput(response_logps=torch.cat(parts)[order], pooled=source.pooled)
    assert output.response_logps is not None
    return pair_tensors(batch, output.response_logps[:count], output.pooled), output


def run_in_calls(
    forward: Forward, batch: dict[str, Any], backward: Callable[[PairTensors, Tensor], None]
) -> None:
    """Forward and backward of a batch that the collator has split: a call's activations are freed before the next.

    The pairs of all calls share their sources. Each call's backward stops at the sources' states, where the gradients add
    up, and one backward from there finishes the step: the same sums as in a single call.

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
        output = call_model(forward, call)
        assert output.response_logps is not None
        backward(pair_tensors(batch, output.response_logps, shared, call["pairs"]), call["pairs"])
    if pooled is not None and shared is not None and shared.grad is not None:
        torch.autograd.backward(pooled, shared.grad)
