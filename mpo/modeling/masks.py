"""Attention masks of packed preference trees, for each attention implementation.

One rule defines who sees whom (:func:`visible`); the dense mask of ``sdpa``, the additive one of ``eager`` and the
``BlockMask`` of ``flex_attention`` are three forms of it. Masks are built on the device, inside the model call, from
the small integer tensors that the collator sends. The ``tree`` implementation (:mod:`mpo.modeling.tree_attention`) needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpo.errors import ModelError
from mpo.modeling import tree_attention
from mpo.modeling.trees import PADDING, PROMPT

TREE_ATTENTION = ("eager", "sdpa", "flex_attention", tree_attention.IMPLEMENTATION)


def visible(
    query_tree: Tensor,
    key_tree: Tensor,
    query_branch: Tensor,
    key_branch: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    window: int | None = None,
) -> Tensor:
    """Whether a query token may attend to a key token. All arguments broadcast against each other.

    A token sees itself and what comes before it in its own tree: the prompt, and its own branch. A sliding window is
    measured in positions, since a rejected branch lies behind the chosen one in the row but not in the text.
    Padding sees itself only, so that no row of the softmax is empty.
    """
    own_branch = (key_branch == PROMPT) | (key_branch == query_branch)
    allowed = (query_tree == key_tree) & (query_tree != PADDING) & own_branch & (key_index <= query_index)
    if window is not None:
        allowed = allowed & (query_position - key_position < window)
    return allowed | (query_index == key_index)


def dense_mask(
    tree_ids: Tensor, branch_ids: Tensor, position_ids: Tensor, window: int | None = None
) -> Tensor:
    """Boolean mask of packed rows.

    Args:
        tree_ids: ``[R, S]``, number of the tree a token belongs to, -1 for padding.
        branch_ids: ``[R, S]``, 0 prompt, 1 chosen, 2 rejected.
        position_ids: ``[R, S]``.
        window: Sliding window in positions.

    Returns:
        ``[R, 1, S, S]``, True where the query (third dimension) sees the key (fourth).
    """
    index = torch.arange(tree_ids.shape[1], device=tree_ids.device)
    return visible(
        tree_ids[:, :, None],
        tree_ids[:, None, :],
        branch_ids[:, :, None],
        branch_ids[:, None, :],
        index[:, None],
        index[None, :],
        position_ids[:, :, None],
        position_ids[:, None, :],
        window,
    )[:, None]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[R, 1, S, S]`` in ``dtype``: 0 where ``mask`` is True, the dtype's finite minimum elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


def block_mask(tree_ids: Tensor, branch_ids: Tensor, position_ids: Tensor, window: int | None = None) -> Any:
    """``BlockMask`` for ``flex_attention``, one for all heads and layers. Arguments as in :func:`dense_mask`."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = tree_ids.shape
    return create_block_mask(
        tree_mask_mod(tree_ids, branch_ids, position_ids, window),
        B=rows,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=tree_ids.device,
    )


def tree_mask_mod(
    tree_ids: Tensor, branch_ids: Tensor, position_ids: Tensor, window: int | None = None
) -> Any:
    """The rule as a ``mask_mod(batch, head, query, key)`` of ``flex_attention``."""

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(
            tree_ids[row, query],
            tree_ids[row, key],
            branch_ids[row, query],
            branch_ids[row, key],
            query,
            key,
            position_ids[row, query],
            position_ids[row, key],
            window,
        )

    return mask_mod


@torch.compiler.disable
def attention_mask(
    config: Any, tree_ids: Tensor, branch_ids: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> Any:
    """What the backbone of ``config`` takes as ``attention_mask`` for packed trees.

    A model whose config has ``layer_types`` gets one mask per type; any other gets one mask, with its sliding window
    if it has one.

    Args:
        config: Text config of the model.
        tree_ids, branch_ids, position_ids: ``[R, S]``, see :func:`dense_mask`.
        dtype: dtype in which ``eager`` attention adds the mask.

    Raises:
        ModelError: The attention implementation or a layer type cannot take such a mask.
    """
    implementation = config._attn_implementation
    if implementation not in TREE_ATTENTION:
        raise ModelError(
            f"attention implementation '{implementation}' cannot take the mask of packed trees; expected one of "
            f"{', '.join(TREE_ATTENTION)}. Set `attn_implementation`, or `batch_layout: padded`."
        )

    def build(window: int | None) -> Any:
        if implementation == tree_attention.IMPLEMENTATION:
            # It goes by the batch's `tree_spans`. A mask of one element keeps the model from building its own.
            return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=tree_ids.device)
        if implementation == "flex_attention":
            return block_mask(tree_ids, branch_ids, position_ids, window)
        mask = dense_mask(tree_ids, branch_ids, position_ids, window)
        return mask if implementation == "sdpa" else additive_mask(mask, dtype)

    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if not layer_types:
        return build(window)
    masks = {}
    for kind in sorted(set(layer_types)):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"layers of type '{kind}' ({config.model_type}) cannot take the mask of packed trees. "
                "Set `batch_layout: padded`."
            )
        masks[kind] = build(window if kind == "sliding_attention" else None)
    return masks
