"""Preference objectives as pure functions of tensors, each with its paper; MPO's own is in :mod:`mpo.modeling.loss`.

Nothing here knows of models, trainers, trees or batches. All tensors are ``[T]``, one entry per pair, and each function
returns ``[T]``; the loss of an optimizer step is the mean over its pairs. Log-likelihoods are in nats. Symbols:

- ``chosen``, ``rejected``: log-ratios ``log pi(y|x) - log pi_ref(y|x)`` of the chosen and the rejected response, summed
  over their tokens
- ``margin``: a difference of chosen minus rejected, of which each objective says what of
- ``beta``: the objective's own temperature
- ``sigma``: the logistic function
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LARGEST_EXPONENT = 80.0  # whose exponential float32 still holds


def shortened(sums: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Log-likelihoods in which the tokens that a response is longer by weigh ``alpha``.

    LD-DPO (Liu et al., 2024, arXiv 2409.06411, equation 11).

    Args:
        sums: Log-likelihoods summed over all tokens of the responses.
        shared: The same over as many first tokens as the shorter response of the pair has.
        alpha: From 0, which leaves the further tokens out, to 1, which changes nothing.
    """
    return shared + alpha * (sums - shared)


def divergence_score(log_ratio: Tensor, divergence: str, coefficient: float = 0.5) -> Tensor:
    """What takes the place of a log-ratio where the policy is held to the reference by another f-divergence than the
    reverse KL: ``f'(pi / pi_ref)`` of f-DPO (Wang et al., ICLR 2024, arXiv 2309.16240, table 1).

    Args:
        log_ratio: ``chosen`` or ``rejected``.
        divergence: One of :data:`F_DIVERGENCES`.
        coefficient: Alpha of the alpha-divergence; at 1 that is the reverse KL.

    Raises:
        ValueError: There is no such divergence.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(coefficient - 1) < 1e-6):
        return log_ratio
    if divergence == "forward_kl":
        return 1 - torch.exp(-log_ratio)
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "alpha_divergence":
        power = coefficient - 1
        return torch.expm1(torch.clamp(power * log_ratio, max=_LARGEST_EXPONENT)) / power
    raise ValueError(f"there is no divergence {divergence!r}; expected one of {', '.join(F_DIVERGENCES)}")


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigma(beta * margin)``, with labels that are wrong with probability ``label_smoothing``.

    - DPO (Rafailov et al., 2023, arXiv 2305.18290, equation 7): the margin of ``chosen`` and ``rejected``; per token, it
      is the length-normalised DPO of Tulu 3 (Lambert et al., 2024, arXiv 2411.15124).
    - CPO (Xu et al., 2024, arXiv 2401.08417, equation 3): the margin of the policy's log-likelihoods alone.
    - SimPO (Meng et al., 2024, arXiv 2405.14734, equation 6): the same per token, less ``gamma / beta``.
    """
    agreed = -logsigmoid(beta * margin)
    if not label_smoothing:
        return agreed
    return (1 - label_smoothing) * agreed - label_smoothing * logsigmoid(-beta * margin)


def rdpo_loss(
    chosen: Tensor, rejected: Tensor, length_difference: Tensor, beta: float, alpha: float
) -> Tensor:
    """``-log sigma(beta * (chosen - rejected) + alpha * (|y_w| - |y_l|))``: length-regularised DPO.

    R-DPO (Park et al., 2024, arXiv 2403.19159, section 4). The optimum of a reward that loses ``alpha`` with every token
    is that the policy's own margin may be smaller where the chosen response is the longer one.

    Args:
        chosen, rejected: Log-ratios.
        length_difference: Tokens of the chosen response minus tokens of the rejected one.
        beta: Temperature.
        alpha: Reward lost per token.
    """
    return -logsigmoid(beta * (chosen - rejected) + alpha * length_difference)


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss ``l`` without the bias of labels that are flipped with probability ``eps``, ``label_smoothing``, below 0.5:
    ``((1 - eps) l(margin) - eps l(-margin)) / (1 - 2 eps)`` with ``l(margin) = -log sigma(beta * margin)``.

    rDPO (Chowdhury et al., 2024, arXiv 2403.00409, section 3.1).
    """
    kept = (1 - label_smoothing) * logsigmoid(beta * margin)
    return (label_smoothing * logsigmoid(-beta * margin) - kept) / (1 - 2 * label_smoothing)


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """``max(0, 1 - beta * margin)``: the rank loss ``max(0, delta - log pi(y_w|x) + log pi(y_l|x))`` of SLiC-HF (Zhao et al.,
    2023, arXiv 2305.10425) on log-ratios, with ``delta`` one over ``beta`` and all times ``beta``, as Liu et al. (2023, arXiv
    2309.06657) have it."""
    return torch.relu(1 - beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """``(margin - 1 / (2 beta))^2``: IPO (Azar et al., 2023, arXiv 2310.12036, equation 17), on log-ratios per token."""
    return (margin - 1 / (2 * beta)).square()


def exo_pair_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """``KL(p || q)`` of the policy's preference ``p = sigma(+-beta * margin)`` from the labels' ``q = (1 - eps, eps)``.

    EXO (Ji et al., 2024, arXiv 2402.00856, equation 16, with two responses); ``label_smoothing`` is ``eps``, above 0.
    """
    first, second = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    return torch.sigmoid(beta * margin) * (first - math.log1p(-label_smoothing)) + torch.sigmoid(
        -beta * margin
    ) * (second - math.log(label_smoothing))


def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2`` with rewards ``r = beta * log-ratio``.

    NCA (Chen et al., 2024, arXiv 2402.05369, section 4.1).
    """
    return -logsigmoid(beta * chosen) - 0.5 * (logsigmoid(-beta * chosen) + logsigmoid(-beta * rejected))


def bco_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``-log sigma(beta * chosen) - log sigma(-beta * rejected)``, as TRL has it: BCO (Jung et al., 2024, arXiv 2404.04656,
    section 4), ``-log sigma(r_w - shift) - log sigma(-(r_l - shift))`` with ``r = beta * log-ratio``, at a shift of 0."""
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``(chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2``: SPPO (Wu et al., 2024, arXiv 2405.00675, equation 4.7)
    with the chosen response certain to win; ``beta`` is one over the paper's eta."""
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``1 - sigma(beta * chosen) + sigma(beta * rejected)``: APO-zero (D'Oosterlinck et al., 2024, arXiv 2408.06266,
    equation 7), for chosen responses that are better than the model's own."""
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``sigma(beta * chosen) + 1 - sigma(beta * (chosen - rejected))``: APO-down (D'Oosterlinck et al., 2024, arXiv
    2408.06266, equation 8), for chosen responses that are worse than the model's own."""
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def discopop_loss(margin: Tensor, beta: float, tau: float) -> Tensor:
    """A blend of DPO's logistic loss and an exponential one by the size of the margin.

    DiscoPOP (Lu et al., 2024, arXiv 2406.08414, equation 5); ``tau`` is the temperature of the blend.
    """
    logits = beta * margin
    exponential = torch.sigmoid(logits / tau)
    return -logsigmoid(logits) * (1 - exponential) + torch.exp(-logits) * exponential


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """``-log sigma(log(odds(y_w) / odds(y_l)))`` with ``odds = P / (1 - P)``: ORPO's second term.

    ORPO (Hong et al., 2024, arXiv 2403.07691, equations 4 and 7).

    Args:
        chosen_logps, rejected_logps: Mean log-likelihoods per token, ``log P``.
    """
    odds = [logps - torch.log(-torch.expm1(logps)) for logps in (chosen_logps, rejected_logps)]
    return -logsigmoid(odds[0] - odds[1])


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The mean of both responses' ``1 - v`` with ``v = sigma(+-beta * (log-ratio - kl))``.

    KTO (Ethayarajh et al., 2024, arXiv 2402.01306, equations 7 and 8): every response is an example of its own, chosen
    ones desirable and rejected ones not.

    Args:
        chosen, rejected: Log-ratios.
        kl: The reference point ``z_0``: an estimate of ``KL(pi || pi_ref)``, a constant of at least 0.
        beta: Temperature.
        desirable_weight, undesirable_weight: ``lambda_D`` and ``lambda_U``.
    """
    desirable = desirable_weight * torch.sigmoid(beta * (kl - chosen))
    undesirable = undesirable_weight * torch.sigmoid(beta * (rejected - kl))
    return (desirable + undesirable) / 2


def consistency_loss(states: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """``-log softmax(sigma / (sigma_1 * temperature))_1`` over the singular values of a prompt's states in its languages.

    MLC (*Align Once, Benefit Multilingually*, ICLR 2026), as in its authors' code (Yuyan-B/MLC), of one prompt: the rows of the
    matrix are scaled to length 1, and it is least where they all point the same way, so that only the first singular value is left. The
    divisor ``sigma_1`` is a constant. Their code puts a linear layer before it, drawn at random and hardly trained at its
    learning rate, which keeps angles between rows nearly as they are; here there is none.

    Args:
        states: ``[G, L, H]``, of each of G prompts a state in each language, zeros where it has fewer than L.
        counts: ``[G]``, number of languages of each, at least 1.
        temperature: Of the softmax.

    Returns:
        ``[G]``.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    singular = torch.linalg.svdvals(torch.nn.functional.normalize(states, dim=-1))
    scaled = singular / (singular[:, :1].detach() * temperature)
    # Rows of zeros bring singular values of zero, which are none of the matrix's own.
    missing = torch.arange(singular.shape[1], device=counts.device) >= counts[:, None]
    return torch.logsumexp(scaled.masked_fill(missing, -torch.inf), dim=1) - scaled[:, 0]
