"""Attention over packed preference trees, branch by branch: the ``tree`` attention implementation.

A mask over a whole row makes attention compute every pair of tokens and throw most of them away. Here each branch of
each tree is attended as the plain causal sequence it is, prompt + chosen and prompt + rejected, by the fastest kernel
torch has for that. What grows with the square of a length is then a tree's length, not a row's, so a row may be as long
as all trees of a call together, which leaves no padding. The keys and values of a prompt are shared by both branches;
only its attention scores are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mpo.errors import ModelError

IMPLEMENTATION = "tree"


@torch.compiler.disable
def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    tree_spans: Sequence[int] | None = None,
    kernel: Callable[..., Tensor] = scaled_dot_product_attention,
    kernel_shares_heads: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form ``transformers`` calls it.

    Args:
        module: The attention layer, which knows its config and its place.
        query: ``[R, heads, S, D]``.
        key, value: ``[R, key-value heads, S, D]``.
        attention_mask: Of calls without trees: boolean ``[R, 1, S, S]``, or None for causal.
        scaling: Factor of the scores, ``D ** -0.5`` by default.
        dropout: Of the attention weights.
        softcap: Bound of the scores (Gemma-2).
        tree_spans: How the ``R * S`` places are divided among trees, see :func:`mpo.modeling.trees.build_batch`. None for calls
            without trees, such as generation.
        kernel: Attends one branch, in the form of torch's function.
        kernel_shares_heads: Whether the kernel takes fewer key-value heads than heads itself; None where it does on a GPU,
            since the CPU's is slow at it.

    Returns:
        ``[R, S, heads, D]`` and None. Padding between trees is 0.

    Raises:
        ModelError: The model gave the mask of trees but not ``tree_spans``, or its attention has attention sinks.
    """
    if kwargs.get("s_aux") is not None or not hasattr(module, "config"):
        raise ModelError(
            f"{type(module).__name__} attends in a way that `attn_implementation: {IMPLEMENTATION}` does not know. Set "
            "`attn_implementation: eager`."
        )
    if tree_spans is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ModelError(
                f"{type(module).__name__} does not pass on what `attn_implementation: {IMPLEMENTATION}` needs. Set "
                "`attn_implementation: sdpa` or `eager`."
            )
        if softcap is None:
            output, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return output, None
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        if attention_mask is None:
            attention_mask = _causal(query.shape[2], key.shape[2], None, query.device)
        return _capped(query, key, value, attention_mask, scaling, dropout, softcap).transpose(1, 2), None

    window = layer_window(module.config, getattr(module, "layer_idx", 0))
    rows, heads, length, _ = query.shape
    shares_heads = not query.is_cpu if kernel_shares_heads is None else kernel_shares_heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[n, heads, D]`` each, one causal sequence."""
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        size = query.shape[2]
        banded = window is not None and size > window
        mask = _causal(size, size, window, query.device) if banded or softcap is not None else None
        shared_heads = heads // key.shape[1]
        if shared_heads > 1 and (mask is not None or not shares_heads):
            key, value = repeat_kv(key, shared_heads), repeat_kv(value, shared_heads)
        if softcap is not None:
            assert mask is not None
            output = _capped(query, key, value, mask, scaling, dropout, softcap)
        else:
            output = kernel(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != heads,
            )
        return output[0].transpose(0, 1)

    dtype = query.dtype
    if query.is_cpu and kernel_shares_heads is None and dtype in (torch.bfloat16, torch.float16):
        # torch's kernel for CPUs: its backward pass takes three times as long in half precision as in float32.
        query, key, value = query.float(), key.float(), value.float()
    # One split and one concatenation: a slice's gradient would be a whole row for every branch.
    parts = [
        states.transpose(1, 2).flatten(0, 1).split(list(tree_spans), dim=0) for states in (query, key, value)
    ]
    outputs: list[Tensor] = []
    for first in range(0, len(tree_spans), 4):
        prompt, chosen, rejected, padding = range(first, first + 4)
        for branch in (chosen, rejected):
            output = attend(*(torch.cat([pieces[prompt], pieces[branch]]) for pieces in parts))
            outputs.append(output if branch == chosen else output[tree_spans[prompt] :])
        if tree_spans[padding]:
            outputs.append(outputs[-1].new_zeros(tree_spans[padding], heads, value.shape[3]))
    return torch.cat(outputs).to(dtype).unflatten(0, (rows, length)), None


def layer_window(config: Any, layer: int) -> int | None:
    """Sliding window of a layer in positions, or None where it sees everything before it."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if not kinds or kinds[layer] == "sliding_attention" else None


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """``[queries, keys]``, True where a query sees a key; the last query is at the last key."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)
    return mask if window is None else mask.triu_(keys - queries - window + 1)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Attention whose scores are bounded to plus or minus ``softcap``, which torch's kernels cannot do."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return drop(weights, dropout) @ value


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, tree_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
