"""On which GPUs a recipe could run, and for how long: memory, time and communication, worked out without weights.

:mod:`mpo.jobs.preflight` says what a run will do on this machine; ``mpo plan``, which is built on this module, says what machine a run
would need. Weights, gradients and optimizer states are counted from the model on torch's ``meta`` device, activations by
running a few layers on tensors without memory (:mod:`mpo.planning.activations`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
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
    """
    One way to divide a model over GPUs.

    Attributes:
        name: as in the literature.
        config: its file in ``recipes/accelerate``.
        engine: ``"torch"``, ``"deepspeed"`` or ``"fsdp2"``.
        weights, gradients, optimizer: whether these are divided.
        offload: whether weights and optimizer states wait in main memory.
        one_gpu: whether it is for a single GPU.
    """

    name: str
    config: str
    engine: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    offload: bool = False
    one_gpu: bool = False


# In the order in which a person would take them: what communicates less comes first.
SHARDINGS = (
    Sharding("one GPU", "single.yaml", "torch", one_gpu=True),
    Sharding("DDP", "ddp.yaml", "torch"),
    Sharding("ZeRO-1", "zero1.yaml", "deepspeed", optimizer=True),
    Sharding("ZeRO-2", "zero2.yaml", "deepspeed", gradients=True, optimizer=True),
    Sharding("FSDP2", "fsdp2.yaml", "fsdp2", weights=True, gradients=True, optimizer=True),
    Sharding("ZeRO-3", "zero3.yaml", "deepspeed", weights=True, gradients=True, optimizer=True),
    Sharding(
        "FSDP2 offload",
        "fsdp2_offload.yaml",
        "fsdp2",
        weights=True,
        gradients=True,
        optimizer=True,
        offload=True,
    ),
    Sharding(
        "ZeRO-3 offload",
        "zero3_offload.yaml",
        "deepspeed",
        weights=True,
        gradients=True,
        optimizer=True,
        offload=True,
    ),
)


@dataclass(frozen=True)
class Training:
    """
    What decides a run's memory and time, besides the machine.

    Attributes:
        config: of the model.
        parameters, trained: numbers of weights, and of those that are trained (an adapter's come on top).
        layer_parameters: weights of one decoder layer.
        head_parameters: weights of the LM head (of the embedding, where the two are tied).
        adapter: whether an adapter is trained.
        half: whether it computes in bf16 or fp16.
        bits: of the frozen base's linear weights: 16 or 32, or 8 or 4 where it is quantised.
        checkpointing: whether activations are recomputed.
        attention: ``"tree"``, ``"sdpa"``, ``"eager"`` or ``"flex_attention"``.
        tree_tokens: of a tree, on average.
        reference_tokens: tokens of a batch of the reference pass.
        accumulates: whether a step has several micro-batches, so that gradients are kept between them.
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
    """
    Bytes that one GPU holds at its peak, by what they are: ``forward`` of all layers in the forward pass, which has casts of
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
        # Gradients come to be while activations go, unless those of an earlier micro-batch are there already.
        backward = working + self.gradients if self.accumulates else max(working, self.gradients)
        step = self.weights + self.optimizer + self.buffers + backward
        return max(step, self.weights + self.buffers + self.reference)

    @property
    def total(self) -> float:
        """What the GPU must have: the tensors, CUDA's own memory, and what fragmentation loses."""
        return (self.tensors + _FIXED_BYTES) / (1 - _LOST_SHARE)


@dataclass(frozen=True)
class Choice:
    """
    A way to run: what is trained under which sharding.

    Attributes:
        sharding, training: of the run.
        row: longest packed row.
        tokens: the most that a micro-batch can have on each GPU, 0 if the run does not fit.
        memory: of a GPU with that many tokens.
    """

    sharding: Sharding
    training: Training
    row: int
    tokens: int
    memory: Memory


def describe(
    config: PretrainedConfig, *, adapter: Any = None, name: str = "the model", **settings: Any
) -> Training:
    """
    Count a model's weights on the meta device.

    Args:
        config: of the model.
        adapter: ``peft`` configuration of a new adapter, or None for full fine-tuning.
        name: of the model, for errors.
        settings: further fields of :class:`Training`.

    Raises:
        ModelError: the architecture is not a causal language model.
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
    """
    Memory of one GPU.

    Args:
        training: what is trained.
        sharding: how it is divided.
        gpus: number of GPUs.
        tokens: of a micro-batch on each GPU.
        row_tokens: longest packed row, see ``MPOConfig.max_tokens_per_row``; at least a tree's. ``tree`` attention has one
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


# ---- What fits -------------------------------------------------------------------------------------------------------


TOKEN_BUDGETS = tuple(1024 * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128))


def largest_budget(
    training: Training,
    sharding: Sharding,
    gpus: int,
    gpu_bytes: float,
    row_tokens: int,
    adapter: Any = None,
    wanted: int = TOKEN_BUDGETS[0],
    least: int = 1,
) -> tuple[int, Memory]:
    """
    The most tokens of a micro-batch that fit, 0 if none do, and the memory at that number (or at the least).

    Tried are :data:`TOKEN_BUDGETS` and the number that is ``wanted``, from the ``least`` that is of use.
    """
    budgets = sorted({least, *(tokens for tokens in (*TOKEN_BUDGETS, wanted) if tokens > least)})

    def needed(tokens: int) -> Memory:
        return memory(training, sharding, gpus, tokens, row_tokens, adapter)

    fitting = bisect_right(budgets, gpu_bytes, key=lambda tokens: needed(tokens).total)
    best = budgets[fitting - 1] if fitting else 0
    return best, needed(best or budgets[0])


def possible(sharding: Sharding, training: Training, gpus: int) -> bool:
    """Whether a sharding is for that many GPUs and that model."""
    if training.bits < 16 and (sharding.weights or sharding.engine == "deepspeed"):
        return False  # quantised weights are not divided
    if gpus == 1:
        return sharding.one_gpu or sharding.offload
    return not sharding.one_gpu


# ---- Time and communication ------------------------------------------------------------------------------------------


def step_flops(training: Training, tokens: float, context: float) -> float:
    """
    Floating-point operations of forward and backward over ``tokens`` tokens.

    A multiplication by each weight costs 2 operations per token forward, 2 for the gradient of its input and, where the
    weight itself is trained, 2 for its own; recomputing activations adds one forward pass (Kaplan et al., 2020, section
    2.1). Attention adds ``4 * hidden * context`` per layer and token forward and twice that backward.

    Args:
        training: what is trained.
        tokens: number of tokens.
        context: tokens that a token attends to, on average.
    """
    weights, attention = _forward_flops(training, context)
    again = 1 if training.checkpointing else 0
    passes = 1 + (1 if training.adapter else 2) + again
    return tokens * (weights * passes + attention * (3 + again))


def reference_flops(training: Training, tokens: float, context: float) -> float:
    """Floating-point operations of a forward pass alone."""
    return tokens * sum(_forward_flops(training, context))


def _forward_flops(training: Training, context: float) -> tuple[float, float]:
    """Operations per token of a forward pass: of the weights, and of attention."""
    text = training.config.get_text_config()
    embedding = training.head_parameters  # looked up, not multiplied; a head of its own is multiplied
    multiplied = training.parameters - (0 if getattr(text, "tie_word_embeddings", False) else embedding)
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or training.hidden // heads)
    return 2 * multiplied, 4 * width * context * training.layers


def sent_per_step(training: Training, sharding: Sharding, gpus: int, micro_batches: int = 1) -> float:
    """
    Bytes that each GPU sends in an optimizer step, with ring collectives: (N - 1) / N of what is gathered or scattered.

    Weights are gathered in each forward and each backward pass where they are divided; ZeRO-1 and 2 gather them once per
    step, after the update. Gradients are summed once per step, but per micro-batch where they are divided.
    """
    ring = (gpus - 1) / gpus
    half = 2 if training.half else 4
    trained, total = training.trained, training.parameters + (training.trained if training.adapter else 0)
    if sharding.engine == "torch":
        return 2 * ring * 4 * trained
    gradient = 4 if sharding.engine == "fsdp2" else half
    reductions = micro_batches if sharding.gradients else 1
    if sharding.weights:
        return ring * (2 * half * total * micro_batches + gradient * trained * reductions)
    return ring * (half * trained * reductions + half * trained)


def efficiency(compute_seconds: float, sent_bytes: float, bytes_per_second: float, overlap: float) -> float:
    """
    Share of the time in which a GPU computes.

    Args:
        compute_seconds: of a step.
        sent_bytes: of a step, see :func:`sent_per_step`.
        bytes_per_second: of a GPU's slowest link on the ring.
        overlap: share of the computing time behind which communication can hide.
    """
    communication = sent_bytes / bytes_per_second
    return compute_seconds / (compute_seconds + max(0.0, communication - overlap * compute_seconds))


def best(choices: Sequence[Choice], needed: int) -> Choice | None:
    """
    The first choice that takes ``needed`` tokens, else the one that takes most; None if nothing fits.

    Weights wait in main memory only where nothing fits otherwise: smaller groups cost less time than moving weights.
    """
    fitting = [choice for choice in choices if choice.tokens > 0]
    fitting = [choice for choice in fitting if not choice.sharding.offload] or fitting
    for choice in fitting:
        if choice.tokens >= needed:
            return choice
    return max(fitting, key=lambda choice: choice.tokens, default=None)
