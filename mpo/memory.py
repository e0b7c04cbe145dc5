"""Memory of a training process: what a step keeps for its backward pass, and what a CPU's allocator keeps."""

from __future__ import annotations

import copy
import ctypes
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from mpo.adapters import spare_input_copies
from mpo.masks import attention_mask

# What is not counted: the CUDA context, the LM head's tiles, buffers of kernels and of communication, fragmentation.
_RESERVE = 3 * 10**9
_USABLE = 0.9

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """
    Ask glibc's allocator to keep freed memory for the next step instead of returning it to the system.

    A training step frees and takes the same gigabytes again and again; given back in between, every page of them is
    cleared and mapped anew in each step. The process holds its peak until it ends.

    Returns:
        Whether the allocator took the settings; False where there is no glibc, which changes nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a device whose memory is not known, such as a CPU, which shares it."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def step_needs_checkpointing(
    model: Any, *, tokens: int, max_tokens_per_row: int, compute: torch.dtype, device_bytes: int
) -> bool:
    """
    Whether a step fits into a device only if activations are recomputed.

    Counted are the weights as they are loaded, four bytes of gradient and eight of AdamW's moments for each trained
    weight, and :func:`activation_bytes`; with a reserve of 3 GB for what is not counted, they must stay below 90 % of the
    device's memory.

    Args:
        model: the model that is trained, with its adapter; on any device.
        tokens: tokens of the largest micro-batch.
        max_tokens_per_row: length of a packed row; with ``tree`` attention, of the longest tree.
        compute: dtype of the computation.
        device_bytes: memory of the device.
    """
    weights = list(model.parameters())
    held = sum(weight.numel() * weight.element_size() for weight in weights)
    held += sum(12 * weight.numel() for weight in weights if weight.requires_grad)
    length = min(tokens, max_tokens_per_row)
    adapter = model.active_peft_config if hasattr(model, "peft_config") else None
    bare = model if adapter is None else model.get_base_model()
    activations = activation_bytes(
        bare, rows=-(-tokens // length), length=length, compute=compute, adapter=adapter
    )
    return held + activations + _RESERVE > _USABLE * device_bytes


def saves_attention_weights(config: PreTrainedConfig) -> bool:
    """Whether attention keeps a matrix of weights for the backward pass, whose size is the square of a length."""
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return text._attn_implementation == "eager" or (text._attn_implementation == "tree" and capped)


def activation_bytes(
    like: PreTrainedModel, *, rows: int, length: int, compute: torch.dtype, adapter: Any = None
) -> int:
    """
    Bytes that the layers of a model keep for the backward pass of packed rows, without recomputation.

    A model of the same kind runs once on tensors that have sizes but no memory, and what autograd saves is added up,
    each storage once. Attention is counted as saving its inputs and output, as fused kernels do; ``eager`` saves its
    matrices of weights, and so does ``tree`` where it bounds the scores.

    Args:
        like: bare model, for its class, configuration (the attention implementation counts) and dtype.
        rows, length: ``[rows, length]`` tokens.
        compute: dtype of the computation; mixed precision where it is half and an adapter or the weights are not.
        adapter: ``peft.PeftConfig`` of an adapter, whose weights are float32; without one all weights are trained.
    """
    eager = saves_attention_weights(like.config)
    with torch.device("meta"):
        model: Any = type(like)._from_config(
            _with_attention(like.config, "eager" if eager else _COUNTED), dtype=like.dtype
        )
        wrapped = model
        if adapter is not None:
            from peft import get_peft_model

            wrapped = get_peft_model(model, copy.deepcopy(adapter))
            spare_input_copies(wrapped)
    seen: dict[int, Any] = {}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that no other storage takes its place
            total += storage.nbytes()
        return tensor

    half = compute.itemsize < 4
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", dtype=compute if half else torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        wrapped.to_empty(device="cpu")
        seen.update((w.untyped_storage()._cdata, w) for w in (*wrapped.parameters(), *wrapped.buffers()))
        ids = torch.zeros((rows, length), dtype=torch.long)
        # Trees do not matter for sizes, the form of the mask does.
        form = _with_attention(like.config, "eager" if eager else "sdpa")
        masks = attention_mask(form.get_text_config(), ids.int(), ids.to(torch.int8), ids, compute)
        model.base_model(input_ids=ids, position_ids=ids, attention_mask=masks, use_cache=False)
    return total


_COUNTED = "mpo_counted"


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves and has its output's shape."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("this attention is only counted")


def _counted_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    # Under a mask, the library repeats keys and values for the heads that share them.
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output: Tensor = _FusedAttention.apply(query, key, value)
    return output.transpose(1, 2), None


AttentionInterface.register(_COUNTED, _counted_attention)


def _with_attention(config: PreTrainedConfig, implementation: str) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    return config
