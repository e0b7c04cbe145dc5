"""How fast a run would be: floating-point operations and bytes sent in a step, by arithmetic."""

from __future__ import annotations

from mpo.planning.memory import Sharding, Training


def step_flops(training: Training, tokens: float, context: float) -> float:
    """Floating-point operations of forward and backward over ``tokens`` tokens.

    A multiplication by each weight costs 2 operations per token forward, 2 for the gradient of its input and, where the
    weight itself is trained, 2 for its own; recomputing activations adds one forward pass (Kaplan et al., 2020, section
    2.1). Attention adds ``4 * hidden * context`` per layer and token forward and twice that backward.

    Args:
        training: What is trained.
        tokens: Number of tokens.
        context: Tokens that a token attends to, on average.
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
    """Bytes that each GPU sends in an optimizer step, with ring collectives: (N - 1) / N of what is gathered or scattered.

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
    """Share of the time in which a GPU computes.

    Args:
        compute_seconds: Of a step.
        sent_bytes: Of a step, see :func:`sent_per_step`.
        bytes_per_second: Of a GPU's slowest link on the ring.
        overlap: Share of the computing time behind which communication can hide.
    """
    communication = sent_bytes / bytes_per_second
    return compute_seconds / (compute_seconds + max(0.0, communication - overlap * compute_seconds))
