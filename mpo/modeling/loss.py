"""The MPO objective as pure functions of tensors.

Nothing here knows of models, trainers, trees or batches. Symbols follow Zhao et al., *MPO: Multilingual Safety
Alignment via Reward Gap Optimization* (ACL 2025, arXiv 2505.16869); log-likelihoods are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import huber_loss


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean of consecutive segments along the first dimension.

    Args:
        values: ``[N]`` or ``[N, H]``, the segments one after another. Half-precision values are averaged in float32.
        lengths: ``[S]`` integers, at least 1 each, summing to ``N``.

    Returns:
        ``[S]`` or ``[S, H]``, float32 or the dtype of ``values`` if that is wider.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # `unsafe` skips a validation of `lengths` that would wait for the device.
    return torch.segment_reduce(values, "mean", lengths=lengths, axis=0, unsafe=True)


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum of consecutive segments along the first dimension.

    Args:
        values: ``[N]``, the segments one after another. Half-precision values are summed in float32.
        lengths: ``[S]`` integers that sum to ``N``; an empty segment's sum is 0.

    Returns:
        ``[S]``, float32 or the dtype of ``values`` if that is wider.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def reward_gap(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Reward gap ``RG(x) = r(x, y_w) - r(x, y_l)``: chosen minus rejected.

    Args:
        chosen_logps: ``[T]``, length-normalised log-likelihood ``r(x, y_w)`` of each chosen response, nats per token.
        rejected_logps: ``[T]``, the same for the rejected responses.

    Returns:
        ``[T]``, nats per token.
    """
    return chosen_logps - rejected_logps


def reward_gap_loss(
    target_gap: Tensor, reference_gap: Tensor, beta: float, delta: float | None = None
) -> Tensor:
    """First term of MPO: ``L1 = e^2`` with ``e = beta * RG_theta^t - RG_ref^d``.

    With ``delta`` it is twice Huber's function (*Robust Estimation of a Location Parameter*, 1964) of ``e``: ``e^2`` up to a
    distance of ``delta``, and ``2 delta |e| - delta^2`` beyond, where a pair's gradient grows no further.

    Args:
        target_gap: ``[T]``, the policy's reward gap in the target language, nats per token.
        reference_gap: ``[T]``, the frozen reference's gap on the pair's source in the dominant language.
        beta: Scale of the target gap.
        delta: Distance in nats per token above 0, or None for the square as published.

    Returns:
        ``[T]``, one value per pair.
    """
    error = beta * target_gap - reference_gap
    if delta is None:
        return error.square()
    return 2 * huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def retention_loss(hidden: Tensor, reference_hidden: Tensor) -> Tensor:
    """Second term of MPO: ``L2 = ||h_theta^d - h_ref^d||^2 / hidden_size``, averaged over chosen and rejected.

    Args:
        hidden: ``[G, 2, H]``, pooled final hidden states of each source pair (chosen, rejected) under the policy.
        reference_hidden: ``[G, 2, H]``, the same under the frozen reference.

    Returns:
        ``[G]``, one value per source.
    """
    difference = hidden - reference_hidden.to(hidden.dtype)
    return difference.square().mean(dim=-1).mean(dim=-1)


def mpo_loss(
    target_gap: Tensor,
    reference_gap: Tensor,
    retention: Tensor | float = 0.0,
    *,
    beta: float = 1.0,
    retain_weight: float = 1.0,
    delta: float | None = None,
) -> Tensor:
    """MPO's loss of each target pair: ``L1 + retain_weight * L2``.

    The loss of an optimizer step is the mean of these values over all target pairs of the step.

    Args:
        target_gap: ``[T]``, the policy's reward gap in the target language, nats per token.
        reference_gap: ``[T]``, the reference's gap on the pair's source.
        retention: ``[T]``, :func:`retention_loss` of the pair's source (repeated for each of its targets).
        beta: Scale of the target gap (the paper: 1.0 for Llama-3.1, 1.5 for Gemma-2 and Qwen2.5).
        retain_weight: lambda of the paper, 1.0 there.
        delta: See :func:`reward_gap_loss`.

    Returns:
        ``[T]``, one value per pair.

    Example:
        >>> import torch
        >>> mpo_loss(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([0.25]), beta=1.0)
        tensor([0.5000])
    """
    return reward_gap_loss(target_gap, reference_gap, beta, delta) + retain_weight * retention
