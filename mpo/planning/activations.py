"""What the layers of a model take in a training step besides their weights, counted without weights and without a GPU.

A few layers run a whole step on tensors that have sizes but no memory (torch's ``meta`` device). The peak of what is alive
at once (:class:`LiveMemory`) grows by the same amount with every further layer, so two such runs say what any number of
layers takes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations import moe

from mpo.modeling.adapters import skip_input_casts
from mpo.modeling.loading import ModelSource, empty_model
from mpo.modeling.tree_attention import IMPLEMENTATION as TREE
from mpo.modeling.tree_attention import tree_attention

# Numbers of trees and of layers that are run to measure what any number of them takes. With few trees, gradients of all
# weights would hide what the trees take; an adapter's do not.
_TREES, _TREES_ADAPTER = (6, 10), (2, 4)
_FEW_LAYERS, _MORE_LAYERS = 2, 4
_COUNTED = "mpo_counted"


@dataclass(frozen=True)
class Layers:
    """How a model's layers compute.

    Attributes:
        config: Of the model.
        attention: ``"tree"``, ``"eager"``, ``"sdpa"`` or ``"flex_attention"``. All but eager, and trees whose scores are
            bounded, keep what memory-efficient kernels keep: queries, keys, values, outputs, the sums of the softmax.
        tree_tokens: Length of the trees that ``"tree"`` attention divides the rows into; an eighth of each is its prompt.
        weights: dtype of the model's weights.
        compute: dtype of the activations; where it is not that of all weights, torch casts on the way (autocast).
        adapter: ``peft`` configuration of an adapter, or None where all weights are trained.
        adapter_weights: dtype of the adapter's weights.
        checkpointing: Whether activations are recomputed.
    """

    config: PretrainedConfig
    attention: str = "sdpa"
    tree_tokens: int = 650
    weights: torch.dtype = torch.bfloat16
    compute: torch.dtype = torch.bfloat16
    adapter: Any = None
    adapter_weights: torch.dtype = torch.bfloat16
    checkpointing: bool = False

    @property
    def autocast(self) -> bool:
        used = {self.weights} if self.adapter is None else {self.weights, self.adapter_weights}
        return used != {self.compute}

    # Configurations have no hash of their own; two that say the same are the same here.
    @cached_property
    def _text(self) -> str:
        return repr(vars(self) | {"config": self.config.to_json_string(use_diff=False)})

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and self._text == other._text


@dataclass(frozen=True)
class Peak:
    """The most that layers take in the forward or the backward pass of a step.

    Attributes:
        kept: Bytes that grow with the number of layers.
        working: Bytes that come on top while one of them works.
    """

    kept: float
    working: float

    @property
    def total(self) -> float:
        return self.kept + self.working


def layer_peaks(
    layers: Layers, number: int, rows: int, length: int, *, backward: bool = True
) -> tuple[Peak, Peak]:
    """What layers take in the forward and in the backward pass, without attention masks (:func:`mask_bytes`).

    The two differ where weights are cast: casts stay until the forward pass is done, or until the backward pass has used
    them, unless activations are recomputed.

    Args:
        layers: How they compute.
        number: Of layers.
        rows, length: Packed rows of a micro-batch and their length in tokens.
        backward: Whether there is a backward pass; without one its peak is 0.
    """
    trees = _TREES if layers.adapter is None else _TREES_ADAPTER
    few_tokens, more_tokens = (layers.tree_tokens * count for count in trees)
    if layers.attention != TREE or rows > 1 or length <= few_tokens:
        return _peaks(layers, number, rows, length, backward)
    # No token sees another tree, so what grows with tokens grows with their number.
    few = _peaks(layers, number, 1, few_tokens, backward)
    more = _peaks(layers, number, 1, more_tokens, backward)
    share = (length - few_tokens) / (more_tokens - few_tokens)
    forward, back = (
        Peak(low.kept + share * (high.kept - low.kept), low.working + share * (high.working - low.working))
        for low, high in zip(few, more, strict=True)
    )
    return forward, back


def mask_bytes(layers: Layers, rows: int, length: int) -> int:
    """Bytes of the attention masks of packed rows. ``tree`` and ``flex_attention`` have none."""
    if layers.attention in (TREE, "flex_attention"):
        return 0
    return rows * length * length * (1 if layers.attention == "sdpa" else layers.compute.itemsize)


def with_adapter(model: Any, adapter: Any, dtype: torch.dtype | None = None) -> Any:
    """The model on the meta device with a new adapter, whose weights have the type that PEFT gives them or the given one."""
    from peft import get_peft_model

    with torch.device("meta"):
        adapted = get_peft_model(model, copy.deepcopy(adapter), autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return adapted


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at the same time, on any device.

    Inside this context, every storage that an operation makes counts from then until it is freed. What was
    there before does not count. What a single operation takes and frees within itself is not seen.

    Attributes:
        current: Bytes alive.
        peak: The most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # by far the most frequent call with fake tensors
            return args[0].fake_device
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, counts=False)
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, counts=True)
        return result

    def _see(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self.current += size
        self.peak = max(self.peak, self.current)
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.current -= size


# ---- Runs of a few layers --------------------------------------------------------------------------------------------


def _peaks(layers: Layers, number: int, rows: int, length: int, backward: bool) -> tuple[Peak, Peak]:
    few = _run(layers, _FEW_LAYERS, rows, length, backward)
    more = _run(layers, _MORE_LAYERS, rows, length, backward)
    forward, back = (
        Peak(number * slope, low - _FEW_LAYERS * slope)
        for low, high in zip(few, more, strict=True)
        for slope in [(high - low) / (_MORE_LAYERS - _FEW_LAYERS)]
    )
    return forward, back


@lru_cache(maxsize=512)
def _run(layers: Layers, number: int, rows: int, length: int, backward: bool) -> tuple[int, int]:
    """Peak bytes of a forward and a backward pass of the first layers. Weights and their gradients do not count."""
    config = copy.deepcopy(layers.config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        # A model with fewer layers than are asked for goes on with its own kinds of layers.
        kinds = list(text.layer_types)
        text.layer_types = [kinds[layer % len(kinds)] for layer in range(number)]
    model: Any = empty_model(config, ModelSource("the model"))
    model.to(layers.weights)
    experts = model._can_set_experts_implementation()
    if experts:
        model.set_experts_implementation("grouped_mm")  # the default; another looks at which tokens go where
    spans: dict[str, Any] = {}
    if layers.attention == TREE:
        AttentionInterface.register(
            _COUNTED, partial(tree_attention, kernel=_fused_branch, kernel_shares_heads=True)
        )
        spans = {"tree_spans": _spans(rows * length, layers.tree_tokens)}
    else:
        AttentionInterface.register(_COUNTED, partial(_fused_attention, masked=layers.attention == "sdpa"))
    model.set_attn_implementation("eager" if layers.attention == "eager" else _COUNTED)
    body = model.base_model
    if layers.adapter is not None:
        model = with_adapter(model, layers.adapter, layers.adapter_weights)
        if layers.autocast:
            skip_input_casts(model)
    model.train(backward)
    if layers.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    counter = LiveMemory()
    # Autocast, which adapters of experts switch off, does not know the meta device. Tensors can say that they are on a CPU,
    # which takes longer.
    fake = layers.autocast or (experts and layers.adapter is not None)
    device = "cpu" if fake else "meta"
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device(device):
        model.to_empty(device=device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        masks = _masks(text, rows, length, layers)
        states = torch.empty((rows, length, text.hidden_size), dtype=layers.weights, requires_grad=backward)
        positions = torch.zeros((rows, length), dtype=torch.long)
        with counter, _experts_counted(), torch.set_grad_enabled(backward):
            with torch.autocast("cpu", torch.bfloat16, enabled=layers.autocast):
                output = body(
                    inputs_embeds=states,
                    position_ids=positions,
                    attention_mask=masks,
                    use_cache=False,
                    **spans,
                ).last_hidden_state
            forward = counter.peak
            counter.peak = counter.current
            if not backward:
                return forward, 0
            output.backward(torch.empty_like(output))
            return forward, counter.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _spans(tokens: int, tree_tokens: int) -> tuple[int, ...]:
    """``tree_spans`` of trees of that length and of one with what is over."""
    sizes = [tree_tokens] * (tokens // tree_tokens)
    if tokens % tree_tokens:
        sizes.append(tokens % tree_tokens)
    return tuple(
        n
        for size in sizes
        for n in (size // 8, (size - size // 8) // 2, size - size // 8 - (size - size // 8) // 2, 0)
    )


def _masks(text: Any, rows: int, length: int, layers: Layers) -> Any:
    shape = (rows, 1, length, length) if mask_bytes(layers, 1, 1) else (1, 1, 1, 1)
    mask = torch.empty(shape, dtype=layers.compute if layers.attention == "eager" else torch.bool)
    kinds = set(getattr(text, "layer_types", None) or [])
    return dict.fromkeys(kinds, mask) if len(kinds) > 1 or "sliding_attention" in kinds else mask


class _FusedAttention(torch.autograd.Function):
    """Takes and keeps the memory of torch's memory-efficient attention under a mask, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        # The kernel adds the mask in the type of the query, and keeps that form for the way back.
        bias = None if mask is None else mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, sums, bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    masked: bool,
    **ignored: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if masked and groups > 1:  # as transformers does under a mask
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output: Tensor = _FusedAttention.apply(*_cast(query, key, value), attention_mask if masked else None)
    return output.transpose(1, 2).contiguous(), None


def _fused_branch(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, **ignored: Any
) -> Tensor:
    """The same for one branch under ``tree`` attention, whose keys and values are repeated already where they must be."""
    output: Tensor = _FusedAttention.apply(*_cast(query, key, value), attn_mask)
    return output


@contextmanager
def _experts_counted() -> Iterator[None]:
    """Multiply tokens and experts by :func:`_grouped_mm`, the one function of a library that this package replaces.

    The kernel that transformers calls has no form for tensors without memory. A contract test watches its name.
    """
    original = moe._grouped_mm
    moe._grouped_mm = _grouped_mm  # type: ignore[assignment]
    try:
        yield
    finally:
        moe._grouped_mm = original


def _grouped_mm(states: Tensor, weight: Tensor, **ignored: Any) -> Tensor:
    """The product of tokens with their experts' weights, for any type: all tokens go to the first expert."""
    with torch.autocast("cpu", enabled=False):  # which does not know the kernel
        return states.to(weight.dtype) @ weight[0]


def _cast(*tensors: Tensor) -> list[Tensor]:
    """As autocast does before torch's own attention: rotary embeddings may have brought float32."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
