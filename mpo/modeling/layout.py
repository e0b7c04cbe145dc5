"""How a model takes a batch: row and batch budgets for the device, and whether it takes packed trees at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from mpo.common.log import get_logger
from mpo.errors import ModelError
from mpo.modeling.head import RewardGapOutput
from mpo.modeling.tree_attention import IMPLEMENTATION
from mpo.modeling.trees import Tree, build_batch

logger = get_logger(__name__)

Forward = Callable[..., RewardGapOutput]


# On a CPU large rows lose more to page faults and dense attention than they gain; a GPU wants them long.
_ROW_TOKENS = {"cpu": 512}
ROW_TOKENS_DEFAULT = 8192
# Attention tree by tree does not care how long a row is: one row holds all trees of a call, and no padding.
ROW_TOKENS_TREE_ATTENTION = 1 << 20
_BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_DEFAULT = 8192  # enough to fill a GPU; more would need memory that training does not

# On a CPU the activations of one call are kept to what its memory takes; an accelerator makes one call.
CALL_TOKENS = {"cpu": 1024}

# A wrong mask changes results by tens of percent, rounding by less than this.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class BatchShape:
    """How sources become model calls."""

    layout: str
    max_tokens_per_row: int
    pad_token_id: int
    pooling: str
    tokens_per_batch: int


def call_on_trees(
    forward: Forward,
    trees: Sequence[Tree],
    shape: BatchShape,
    device: torch.device,
    *,
    score_shared: bool = False,
) -> RewardGapOutput:
    """One call of a model with the reward-gap head on trees, in the given layout; see :func:`mpo.modeling.trees.build_batch`."""
    batch = build_batch(
        trees,
        layout=shape.layout,
        max_tokens_per_row=shape.max_tokens_per_row,
        pad_token_id=shape.pad_token_id,
        pooling=shape.pooling,
        score_shared=score_shared,
    )
    return forward(
        reward_gap_head=True,
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()},
    )


def batch_shape(
    device: torch.device,
    *,
    layout: str,
    pad_token_id: int,
    pooling: str,
    max_tokens_per_row: int | None = None,
    tokens_per_batch: int | None = None,
    attention: str | None = None,
) -> BatchShape:
    """The shape of batches for a device; budgets that are None get the default of device and attention implementation."""
    row = max_tokens_per_row or (
        ROW_TOKENS_TREE_ATTENTION
        if attention == IMPLEMENTATION
        else _ROW_TOKENS.get(device.type, ROW_TOKENS_DEFAULT)
    )
    batch = tokens_per_batch or _BATCH_TOKENS.get(device.type, BATCH_TOKENS_DEFAULT)
    return BatchShape(layout, row, pad_token_id, pooling, batch)


def default_attention(config: PreTrainedConfig, layout: str = "tree") -> str | None:
    """Attention implementation for a model whose user chose none.

    Packed trees get ``tree`` (:mod:`mpo.modeling.tree_attention`), which computes nothing that a mask would hide, if the model's
    attention is one that ``sdpa`` computes, with or without a soft-cap. Padded rows, and other models, get ``eager`` where
    attention scores are soft-capped (Gemma-2; ``sdpa`` cannot), otherwise the library's own choice (None).
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if layout == "tree":
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        pluggable = getattr(architecture, "_supports_attention_backend", False)
        if pluggable and (capped or getattr(architecture, "_supports_sdpa", False)):
            return IMPLEMENTATION
    return "eager" if capped else None


def usable_layout(
    forward: Forward, trees: Sequence[Tree], shape: BatchShape, device: torch.device, dtype: torch.dtype
) -> str:
    """The layout to use: ``shape.layout``, or ``"padded"`` where the model does not take packed trees.

    A few short trees are run in both layouts; architectures whose attention ignores or misreads the mask (state-space
    layers, chunked attention, flash attention) give different results and fall back with a warning.

    Args:
        forward: The model with the reward-gap head, in eval mode.
        trees: At least one tree; only the first few tokens of each are used.
        shape: How trees become a model call.
        device, dtype: Of the model.
    """
    if shape.layout == "padded":
        return "padded"
    short = [
        Tree(tree.prompt[-12:], tree.chosen[:9], tree.rejected[:7], score=True, pool=True)
        for tree in trees[:3]
    ]
    with torch.no_grad():
        try:
            packed = call_on_trees(forward, short, shape, device)
        except (ModelError, TypeError) as error:
            logger.warning(f"Falling back to `batch_layout: padded`: {error}")
            return "padded"
        plain = call_on_trees(forward, short, replace(shape, layout="padded"), device)
    assert packed.pooled is not None and plain.pooled is not None
    assert packed.response_logps is not None and plain.response_logps is not None
    error_size = max(
        _relative_error(packed.pooled, plain.pooled),
        _relative_error(packed.response_logps, plain.response_logps),
    )
    if not error_size < _TOLERANCE.get(dtype, 0.1):
        logger.warning(
            f"Falling back to `batch_layout: padded`: this model gives results that differ by {error_size:.0%} for packed "
            "trees, so it does not follow their attention mask."
        )
        return "padded"
    return "tree"


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp(min=1e-12))
