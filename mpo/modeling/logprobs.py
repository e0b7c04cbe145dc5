"""What a frozen LM head says of given states, and its gradient, from one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at a time: few enough for a CPU's cache and a GPU's memory, enough for an efficient matrix product.
_LOGITS = {"cpu": 1 << 24}
_LOGITS_DEFAULT = 1 << 27


class _OfStates(torch.autograd.Function):
    """A value of each state ``[N, H]``, whose gradient the forward pass has saved; the other arguments get none."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        others = [None] * (len(ctx.needs_input_grad) - 1)
        return gradients[0].to(gradient.dtype)[:, None] * gradient, *others


class FrozenHeadLogProbs(_OfStates):
    """``log softmax(f(hidden @ weight.T + bias))[labels]`` for an LM head that is not trained.

    With ``y`` the logits of a token, ``z = cap * tanh(scale * y / cap)`` (or ``z = scale * y``) and ``p = softmax(z)``::

        d log p_label / d hidden = sum_v (1[v = label] - p_v) * (dz_v / dy_v) * weight_v

    The right side does not depend on what the loss makes of the log-likelihood, so it is computed where the logits are at
    hand, in the forward pass, and kept as ``[N, H]``. A kernel that also serves a trained head has to build the logits a
    second time in its backward pass: three matrix products of the vocabulary's size instead of these two.

    The logits are built for a few tokens at a time, in the dtype of ``hidden``; everything that is summed over the
    vocabulary is float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H], of the same dtype
        bias: Tensor | None,  # [V]
        labels: Tensor,  # [N]
        softcap: float | None,
        scale: float,
        with_gradient: bool,
        with_below: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ``[N]`` log-likelihoods in nats, float32 or wider, and, where asked for, :func:`below_greedy`."""
        tokens = _tokens_at_once(hidden, weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(hidden.shape[0], dtype=wide)
        below = torch.empty_like(log_probs) if with_below else None
        gradient = torch.empty_like(hidden) if with_gradient else None
        for start in range(0, hidden.shape[0], tokens):
            part = slice(start, start + tokens)
            label = labels[part, None]
            logits, squashed = _logits(hidden[part], weight, bias, softcap, scale)
            values = torch.log_softmax(logits, dim=-1, dtype=wide)
            log_probs[part] = values.gather(1, label).squeeze(1)
            if below is not None:
                below[part] = log_probs[part] - values.amax(dim=-1)
            if gradient is not None:
                # In place: p - 1[label] takes the room of the log-probabilities.
                slopes = values.exp_()
                slopes.scatter_add_(1, label, slopes.new_full((1, 1), -1.0).expand_as(label))
                _to_hidden(slopes, squashed, weight, -scale, gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        if below is not None:
            ctx.mark_non_differentiable(below)
        return log_probs, below


@torch.no_grad()
def below_greedy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None, scale: float
) -> Tensor:
    """``[N]``, how far each token is below what greedy decoding takes there, ``log p_label - max_v log p_v``, in nats: 0 where
    it is that token. Arguments as of :class:`FrozenHeadLogProbs`, which has it from its own logits."""
    tokens = _tokens_at_once(hidden, weight)
    below = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, hidden.shape[0], tokens):
        part = slice(start, start + tokens)
        logits, _ = _logits(hidden[part], weight, bias, softcap, scale)
        below[part] = logits.gather(1, labels[part, None]).squeeze(1).to(below.dtype) - logits.amax(dim=-1)
    return below


class FrozenHeadDivergence(_OfStates):
    """``KL(p_ref || p)`` of the next token, or with ``reverse`` ``KL(p || p_ref)``, under an LM head that is not trained.

    ``p`` and ``p_ref`` are the distributions that the same head gives to two states, that of the policy and that of the
    reference at the same place of the same text. With ``z`` the policy's logits as in :class:`FrozenHeadLogProbs`::

        d KL(p_ref || p) / d hidden = sum_v (p_v - p_ref,v) * (dz_v / dy_v) * weight_v
        d KL(p || p_ref) / d hidden = sum_v p_v * (log(p_v / p_ref,v) - KL) * (dz_v / dy_v) * weight_v

    computed like there in the forward pass: three matrix products of the vocabulary's size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, H]
        reference: Tensor,  # [N, H], in any dtype
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        softcap: float | None,
        scale: float,
        with_gradient: bool,
        reverse: bool = False,
    ) -> Tensor:
        """Returns ``[N]`` nats, float32 or wider."""
        # Two distributions are held at a time.
        tokens = max(1, _tokens_at_once(hidden, weight) // 2)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        divergence = hidden.new_empty(hidden.shape[0], dtype=wide)
        gradient = torch.empty_like(hidden) if with_gradient else None
        for start in range(0, hidden.shape[0], tokens):
            part = slice(start, start + tokens)
            wanted, _ = _logits(reference[part].to(hidden.dtype), weight, bias, softcap, scale)
            wanted = torch.log_softmax(wanted, dim=-1, dtype=wide)
            logits, squashed = _logits(hidden[part], weight, bias, softcap, scale)
            values = torch.log_softmax(logits, dim=-1, dtype=wide)
            # In the direction of the distribution that the mean is taken over.
            mean_over = (values if reverse else wanted).exp()
            further = values.sub_(wanted) if reverse else wanted.sub_(values)
            divergence[part] = (mean_over * further).sum(dim=-1)
            if gradient is not None:
                if reverse:
                    slopes = mean_over.mul_(further.sub_(divergence[part, None]))
                else:
                    slopes = values.exp_().sub_(mean_over)
                _to_hidden(slopes, squashed, weight, scale, gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return divergence


def _tokens_at_once(hidden: Tensor, weight: Tensor) -> int:
    return max(1, _LOGITS.get(hidden.device.type, _LOGITS_DEFAULT) // weight.shape[0])


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Logits of some states, scaled and capped, and the ``tanh`` of the cap, if there is one."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits.to(wide).mul_(scale)
    if softcap is None:
        return logits, None
    squashed = logits.to(wide).div_(softcap).tanh_()
    return squashed * softcap, squashed


def _to_hidden(slopes: Tensor, squashed: Tensor | None, weight: Tensor, scale: float, out: Tensor) -> None:
    """The gradient of the states, from that of the capped logits; overwrites its arguments."""
    if squashed is not None:
        slopes.mul_(squashed.square_().neg_().add_(1.0))
    torch.mm(slopes.to(weight.dtype), weight, out=out)
    out.mul_(scale)
