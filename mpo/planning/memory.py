"""What one GPU needs in a training step: weights, gradients, optimizer states, buffers and activations.

Nothing is loaded. Weights are counted from the model on torch's ``meta`` device, activations by running a few layers on
tensors without memory (:mod:`mpo.planning.activations`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mpo.modeling.loading import ModelSource, empty_model
from mpo.modeling.tree_attention import IMPLEMENTATION as TREE
from mpo.planning.activations import Layers, layer_peaks, mask_bytes, with_adapter

GB = 1e9

# Tokens and words of a tile of the LM head's logits on a GPU (mpo.modeling.head, trl.kernels.chunked_logprob).
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
# The CUDA context, the communication library's buffers and libraries' workspaces, and what fragmentation loses.
_FIXED_BYTES, _LOST_SHARE = 2.5 * GB, 0.05
# DeepSpeed's buckets at their default sizes: 5e8 elements to reduce, 1e9 gathered weights alive at most.
_REDUCE_BUCKET, _LIVE_WEIGHTS = 5e8, 1e9


@dataclass(frozen=True)
class Sharding:
    """One way to divide a model over GPUs.

    Attributes:
        name: As in the literature.
        config: Its file in ``recipes/accelerate``.
        engine: ``"torch"``, ``"deepspeed"`` or ``"fsdp2"``.
        weights, gradients, optimizer: Whether these are divided.
        offload: Whether weights and optimizer states wait in main memory.
        one_gpu: Whether it is for a single GPU.
        multi_node: Whether a configuration for several machines, ``*_multi_node.yaml``, lies beside it.
    """

    name: str
    config: str
    engine: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    offload: bool = False
    one_gpu: bool = False
    multi_node: bool = False


_ALL_DIVIDED = {"weights": True, "gradients": True, "optimizer": True}
# In the order of preference: what communicates less comes first.
SHARDINGS = (
    Sharding("one GPU", "single.yaml", "torch", one_gpu=True),
    Sharding("DDP", "ddp.yaml", "torch", multi_node=True),
    Sharding("ZeRO-1", "zero1.yaml", "deepspeed", optimizer=True),
    Sharding("ZeRO-2", "zero2.yaml", "deepspeed", gradients=True, optimizer=True, multi_node=True),
    Sharding("FSDP2", "fsdp2.yaml", "fsdp2", **_ALL_DIVIDED, multi_node=True),
    Sharding("ZeRO-3", "zero3.yaml", "deepspeed", **_ALL_DIVIDED, multi_node=True),
    Sharding("FSDP2 offload", "fsdp2_offload.yaml", "fsdp2", **_ALL_DIVIDED, offload=True),
    Sharding("ZeRO-3 offload", "zero3_offload.yaml", "deepspeed", **_ALL_DIVIDED, offload=True),
)


@dataclass(frozen=True)
class Training:
    """What decides a run's memory and time, besides the machine.

    Attributes:
        config: Of the model.
        parameters, trained: Numbers of weights, and of those that are trained (an adapter's come on top).
        layer_parameters: Weights of one decoder layer.
        head_parameters: Weights of the LM head (of the embedding, where the two are tied).
        adapter: Whether an adapter is trained.
        half: Whether it computes in bf16 or fp16.
        bits: Of the frozen base's linear weights: 16 or 32, or 8 or 4 where it is quantised.
        checkpointing: Whether activations are recomputed.
        attention: ``"tree"``, ``"sdpa"``, ``"eager"`` or ``"flex_attention"``.
        tree_tokens: Of a tree, on average.
        reference_tokens: Tokens of a batch of the reference pass.
        accumulates: Whether a step has several micro-batches, so that gradients are kept between them.
    """

    config: PretrainedConfig
    parameters: int
    trained: int
    layer_parameters: int
    head_parameters: int
    adapter: bool
    half: bool = True
    bits: int = 16
    checkpointing: bool = True
    attention: str = "sdpa"
    tree_tokens: int = 650
    reference_tokens: int = 8192
    accumulates: bool = False

    @property
    def hidden(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class Memory:
    """Bytes that one GPU holds at its peak, by what they are: ``forward`` of all layers in the forward pass, which has casts of
    all weights where torch makes them; ``activations`` that are kept for the backward pass, and ``layer`` of the layer at
    work in it. ``main_memory`` is what waits in the machine's memory for each GPU.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    forward: float
    activations: float
    layer: float
    lm_head: float
    reference: float
    main_memory: float
    accumulates: bool = False

    @property
    def tensors(self) -> float:
        """Bytes of the tensors alive at the peak: of the step or, if it takes more, of the reference pass before it."""
        # The head takes most in its own backward pass, which is done before those of the layers begin.
        working = max(self.forward, self.activations + max(self.layer, self.lm_head))
        # Gradients take the place of activations, unless those of an earlier micro-batch are there already.
        backward = working + self.gradients if self.accumulates else max(working, self.gradients)
        step = self.weights + self.optimizer + self.buffers + backward
        return max(step, self.weights + self.buffers + self.reference)

    @property
    def total(self) -> float:
        """What the GPU must have: the tensors, CUDA's own memory, and what fragmentation loses."""
        return (self.tensors + _FIXED_BYTES) / (1 - _LOST_SHARE)


def describe(
    config: PretrainedConfig, *, adapter: Any = None, name: str = "the model", **settings: Any
) -> Training:
    """Count a model's weights on the meta device.

    Args:
        config: Of the model.
        adapter: ``peft`` configuration of a new adapter, or None for full fine-tuning.
        name: Of the model, for errors.
        settings: Further fields of :class:`Training`.

    Raises:
        ModelError: The architecture is not a causal language model.
    """
    model = empty_model(config, ModelSource(name))
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in _layers(model)[0].parameters())
    head = sum(p.numel() for p in model.get_output_embeddings().parameters())
    trained = parameters
    if adapter is not None:
        trained = sum(p.numel() for p in with_adapter(model, adapter).parameters() if p.requires_grad)
    return Training(
        config=config,
        parameters=parameters,
        trained=trained,
        layer_parameters=layer,
        head_parameters=head,
        adapter=adapter is not None,
        **settings,
    )


def memory(
    training: Training,
    sharding: Sharding,
    gpus: int,
    tokens: int,
    row_tokens: int,
    adapter: Any = None,
) -> Memory:
    """Memory of one GPU.

    Args:
        training: What is trained.
        sharding: How it is divided.
        gpus: Number of GPUs.
        tokens: Of a micro-batch on each GPU.
        row_tokens: Longest packed row, see ``MPOConfig.max_tokens_per_row``; at least a tree's. ``tree`` attention has one
            row for all.
        adapter: ``peft`` configuration of the adapter, as given to :func:`describe`.
    """
    total, trained = training.parameters, training.trained
    frozen = total if training.adapter else 0
    compute = 2 if training.half else 4
    share = {
        part: (1 / gpus if getattr(sharding, part) else 1.0) for part in ("weights", "gradients", "optimizer")
    }
    base_bytes = _base_bytes(training, frozen, compute)
    if sharding.engine == "deepspeed" and training.half:
        # Everything in half precision; float32 master weights are among the optimizer's states.
        weight_bytes, gradient_bytes, optimizer_bytes = (
            base_bytes + compute * trained,
            compute * trained,
            12 * trained,
        )
    else:
        weight_bytes, gradient_bytes, optimizer_bytes = base_bytes + 4 * trained, 4 * trained, 8 * trained
    weights, gradients, optimizer = (
        weight_bytes * share["weights"],
        gradient_bytes * share["gradients"],
        optimizer_bytes * share["optimizer"],
    )
    buffers = _buffers(training, sharding, gpus, compute)
    kept_elsewhere = 0.0
    if sharding.offload:
        kept_elsewhere = weights + optimizer + gradients
        weights = gradients = optimizer = 0.0
    layers = _how_layers_compute(training, sharding, adapter)
    whole = max(tokens, training.reference_tokens)
    row = whole if training.attention == TREE else max(row_tokens, training.tree_tokens)
    forward, backward = layer_peaks(layers, training.layers, *_rows(tokens, row))
    masks = mask_bytes(layers, *_rows(tokens, row))
    reference_rows = _rows(training.reference_tokens, row)
    reference, _ = layer_peaks(
        replace(layers, checkpointing=False), training.layers, *reference_rows, backward=False
    )
    words = min(_TILE_WORDS, training.config.get_text_config().vocab_size)
    # A tile of logits, on which kernels work in place; the gradient of the states in float32, and cast.
    head = min(tokens, _TILE_TOKENS) * words * compute + tokens * training.hidden * (4 + compute)
    if not training.adapter:
        # The head's gradient is summed in float32, then cast.
        head += training.head_parameters * (4 + compute)
        if layers.autocast:
            head += training.head_parameters * compute
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        forward=forward.total + masks,
        activations=backward.kept + masks,
        layer=backward.working,
        lm_head=head,
        reference=reference.total
        + mask_bytes(layers, *reference_rows)
        + min(training.reference_tokens, _TILE_TOKENS) * words * compute,
        main_memory=kept_elsewhere,
        accumulates=training.accumulates,
    )


def _how_layers_compute(training: Training, sharding: Sharding, adapter: Any) -> Layers:
    compute = torch.bfloat16 if training.half else torch.float32
    # DeepSpeed and FSDP2 compute in copies of the weights that are in half precision throughout.
    autocast = training.half and sharding.engine == "torch"
    frozen_half = training.adapter and training.bits <= 16
    return Layers(
        config=training.config,
        attention=training.attention,
        tree_tokens=training.tree_tokens,
        weights=torch.float32 if autocast and not frozen_half else compute,
        compute=compute,
        adapter=adapter if training.adapter else None,
        adapter_weights=torch.float32 if autocast else compute,
        checkpointing=training.checkpointing,
    )


def _base_bytes(training: Training, frozen: int, compute: int) -> float:
    if not frozen:
        return 0.0
    if training.bits >= 16:
        return frozen * training.bits / 8
    # Embedding, head and norms stay in half precision; quantised blocks carry a scale of about an eighth of a bit.
    linear = training.layer_parameters * training.layers
    return linear * (training.bits + 0.125) / 8 + (frozen - linear) * compute


def _buffers(training: Training, sharding: Sharding, gpus: int, compute: int) -> float:
    """What an engine allocates to gather weights and to reduce gradients."""
    trained = training.trained
    if sharding.engine == "deepspeed":
        # Two buckets, one filling while the other is reduced, and the float32 gradients of the partition in a step.
        bucket = min(_REDUCE_BUCKET, trained) * compute * (2 if gpus > 1 else 1)
        step = 0.0 if sharding.offload else min(4 * trained / (gpus if sharding.optimizer else 1), 4 * 1e9)
        gathered = 0.0
        if sharding.weights:
            largest = max(training.layer_parameters, training.head_parameters)
            gathered = compute * max(largest, min(_LIVE_WEIGHTS, training.parameters))
        return bucket + step + gathered
    if sharding.engine == "fsdp2":
        # The layer at work and the next one, gathered; embedding and head; a layer's gradients, and their float32 sum.
        gathered = compute * (2 * training.layer_parameters + 2 * training.head_parameters)
        reduced = 0 if training.adapter else (compute + 4) * training.layer_parameters
        return gathered + reduced
    return 4 * trained if gpus > 1 else 0  # DDP reduces from buckets of its own


def _rows(tokens: int, row_tokens: int) -> tuple[int, int]:
    if tokens <= row_tokens:
        return 1, tokens
    return math.ceil(tokens / row_tokens), row_tokens


def _layers(model: PreTrainedModel) -> Any:
    """The decoder's layers: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


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
    """Whether a step fits into a GPU only if activations are recomputed, by the count of ``mpo plan``.

    Counted are the weights as they are loaded, four bytes of gradient and eight of AdamW's moments for each trained weight,
    activations, the LM head's tiles, and CUDA's own memory.

    Args:
        model: The model that is trained, with its adapter; on any device.
        tokens: Tokens of the largest micro-batch.
        row_tokens: Longest packed row.
        tree_tokens: Length of the longest tree.
        half: Whether it computes in bf16 or fp16.
        processes: GPUs of the run, each with a whole model.
        accumulates: Whether a step has several micro-batches.
        device_bytes: Memory of the GPU.
    """
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
