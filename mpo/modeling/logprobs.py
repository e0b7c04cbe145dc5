"""Log-likelihoods of given tokens under a frozen LM head, and their gradient, from one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits held at a time: few enough for a CPU's cache and a GPU's memory, enough for an efficient matrix product.
_LOGITS = {"cpu": 1 << 24}
_LOGITS_DEFAULT = 1 << 27


class FrozenHeadLogProbs(torch.autograd.Function):
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
    ) -> Tensor:
        """Returns ``[N]`` log-likelihoods in nats, float32 or wider."""
        tokens = max(1, _LOGITS.get(hidden.device.type, _LOGITS_DEFAULT) // weight.shape[0])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(hidden.shape[0], dtype=wide)
        gradient = torch.empty_like(hidden) if with_gradient else None
        for start in range(0, hidden.shape[0], tokens):
            part = slice(start, start + tokens)
            label = labels[part, None]
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            if scale != 1.0:
                logits = logits.to(wide).mul_(scale)
            squashed = None
            if softcap is not None:
                squashed = logits.to(wide).div_(softcap).tanh_()
                logits = squashed * softcap
            values = torch.log_softmax(logits, dim=-1, dtype=wide)
            log_probs[part] = values.gather(1, label).squeeze(1)
            if gradient is not None:
                # In place: p - 1[label] takes the room of the log-probabilities.
                slopes = values.exp_()
                slopes.scatter_add_(1, label, slopes.new_full((1, 1), -1.0).expand_as(label))
                if squashed is not None:
                    slopes.mul_(squashed.square_().neg_().add_(1.0))
                torch.mm(slopes.to(weight.dtype), weight, out=gradient[part])
                gradient[part].mul_(-scale)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradients[0].to(gradient.dtype)[:, None] * gradient, None, None, None, None, None, None
