"""Attention over packed trees with one kernel a layer: all branches of all trees in one call for sequences of any length.

Takes the place of :func:`mpo.modeling.tree_attention.tree_attention`, which launches a kernel for every branch, in the
benchmarks only: the kernel is new in torch, runs on CUDA in half precision, and knows neither soft-caps nor other masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mpo.errors import ModelError
from mpo.modeling.tree_attention import IMPLEMENTATION, layer_window, tree_attention

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int | None], Tensor]


def torch_kernel() -> Kernel | None:
    """Torch's kernel, or None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        longest: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        seen = (-1 if window is None else window - 1, 0)
        shares = query.shape[1] != key.shape[1]
        if torch.is_autocast_enabled(query.device.type):  # which does not know the kernel
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (part.to(dtype) for part in (query, key, value))
        output: Tensor = varlen_attn(
            query, key, value, ends, ends, longest, longest, scale=scale, window_size=seen, enable_gqa=shares
        )
        return output

    return kernel


def plain_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """What the kernel computes, one sequence after another, anywhere. ``[tokens, heads, D]`` each."""
    outputs = []
    for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        parts = [part[first:last].transpose(0, 1)[None] for part in (query, key, value)]
        size = last - first
        mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril_()
        if window is not None:
            mask = mask.triu_(1 - window)
        shares = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=shares)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@lru_cache(maxsize=8)
def _branches(spans: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Places of the tokens of all branches one after another, where each place's result is among these (the number of them
    for padding), where the branches end, and the longest."""
    order: list[int] = []
    result = [0] * sum(spans)
    ends, place = [0], 0
    for first in range(0, len(spans), 4):
        prompt, chosen, rejected, padding = spans[first : first + 4]
        shared = list(range(place, place + prompt))
        start = place + prompt
        for own in (range(start, start + chosen), range(start + chosen, start + chosen + rejected)):
            for number, token in enumerate([*shared, *own], start=len(order)):
                result[token] = number
            order += [*shared, *own]
            ends.append(len(order))
        place = start + chosen + rejected
        result[place : place + padding] = [-1] * padding
        place += padding
    longest = max(b - a for a, b in itertools.pairwise(ends))
    result = [len(order) if number == -1 else number for number in result]
    numbers = (torch.tensor(values, device=device) for values in (order, result))
    return (*numbers, torch.tensor(ends, dtype=torch.int32, device=device), longest)


def attention(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """An attention function in the form of :func:`mpo.modeling.tree_attention.tree_attention`."""

    @torch.compiler.disable
    def varlen_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        tree_spans: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if tree_spans is None or softcap is not None or kwargs.get("s_aux") is not None:
            raise ModelError(
                "attention with one kernel a layer was given no trees, or scores that are bounded. Measure a model without "
                "soft-caps, such as the shape llama-3.1-8b."
            )
        order, result, ends, longest = _branches(tuple(tree_spans), query.device)
        rows, heads, length, _ = query.shape
        parts = [part.transpose(1, 2).flatten(0, 1)[order] for part in (query, key, value)]
        window = layer_window(getattr(module, "config"), getattr(module, "layer_idx", 0))  # noqa: B009
        output = kernel(*parts, ends, longest, scaling, window)
        output = torch.cat([output, output.new_zeros(1, heads, value.shape[3])])[result]
        return output.unflatten(0, (rows, length)), None

    return varlen_attention


@contextmanager
def in_place_of_trees(kernel: Kernel | None) -> Iterator[None]:
    """Attend trees with this kernel; with None as the trainer does."""
    if kernel is not None:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention(kernel))
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, tree_attention)
