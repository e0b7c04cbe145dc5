"""Memory of a training process: what a step needs of a GPU, and what a CPU's allocator keeps."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from typing import Any

import torch

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
    model: Any,
    *,
    tokens: int,
    row_tokens: int,
    tree_tokens: int,
    half: bool,
    processes: int,
    accumulates: bool,
    device_bytes: int,
) -> bool:
    """
    Whether a step fits into a GPU only if activations are recomputed, by the count of ``mpo plan`` (:mod:`mpo.planning.capacity`).

    Counted are the weights as they are loaded, four bytes of gradient and eight of AdamW's moments for each trained weight,
    activations, the LM head's tiles, and CUDA's own memory.

    Args:
        model: the model that is trained, with its adapter; on any device.
        tokens: tokens of the largest micro-batch.
        row_tokens: longest packed row.
        tree_tokens: length of the longest tree.
        half: whether it computes in bf16 or fp16.
        processes: GPUs of the run, each with a whole model.
        accumulates: whether a step has several micro-batches.
        device_bytes: memory of the GPU.
    """
    from mpo.planning.capacity import SHARDINGS, describe, memory

    adapter = model.active_peft_config if hasattr(model, "peft_config") else None
    bare = model if adapter is None else model.get_base_model()
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    training = describe(
        bare.config,
        adapter=adapter,
        name=type(bare).__name__,
        half=half,
        bits=8 * bare.dtype.itemsize,
        checkpointing=False,
        attention=bare.config.get_text_config()._attn_implementation,
        tree_tokens=tree_tokens,
        reference_tokens=1,  # recomputing does not change what that pass takes
        accumulates=accumulates,
    )
    sharding = next(s for s in SHARDINGS if s.engine == "torch" and s.one_gpu == (processes == 1))
    needed = replace(
        memory(training, sharding, processes, tokens, row_tokens, adapter),
        weights=float(sum(weight.numel() * weight.element_size() for weight in weights)),
        gradients=4.0 * trained,
        optimizer=8.0 * trained,
    )
    return needed.total > device_bytes
