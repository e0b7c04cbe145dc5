"""Whether activations are recomputed in the backward pass, where the user has not said whether to."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from mpo.common.log import get_logger
from mpo.planning.memory import device_memory, step_needs_checkpointing
from mpo.training.config import MPOConfig
from mpo.training.sampling import GroupCollator
from mpo.training.sharding import will_be_sharded
from mpo.training.workload import largest_micro_batch, longest_tree, tokens_of_step

logger = get_logger(__name__)


def prepare_checkpointing(args: MPOConfig) -> None:
    """Settle, before a model is loaded, what the launcher decides; ``args`` are changed in place."""
    if args.decide_checkpointing and will_be_sharded(args):
        _set(args, "", True)
    plugin = getattr(args, "deepspeed_plugin", None)
    if args.gradient_checkpointing and plugin is not None and plugin.zero_stage == 3:
        # A layer that is recomputed gathers its weights again, which the other form takes for a change of shape.
        kwargs: Any = args.gradient_checkpointing_kwargs or {}
        _set(args, "_kwargs", {**kwargs, "use_reentrant": True})


def decide_checkpointing(
    model: Any,
    args: MPOConfig,
    groups: Dataset,
    collator: GroupCollator,
    accelerator: Accelerator,
) -> None:
    """Recompute activations where the largest micro-batch of these groups would not fit otherwise.

    Nothing is decided where the user has; ``args`` are changed in place.
    """
    memory = device_memory(accelerator.device)
    if not args.decide_checkpointing or memory is None or will_be_sharded(args):
        return
    sizes = tokens_of_step(groups, args, collator.shape.layout)
    tokens = largest_micro_batch(sizes, args, args.train_batch_size)
    call = min(tokens, collator.max_tokens_per_call or tokens)
    try:
        needed = step_needs_checkpointing(
            model,
            tokens=call,
            row_tokens=collator.shape.max_tokens_per_row,
            tree_tokens=longest_tree(groups),
            half=accelerator.mixed_precision in ("bf16", "fp16"),
            processes=accelerator.num_processes,
            accumulates=args.gradient_accumulation_steps > 1 or call < tokens,
            device_bytes=memory,
        )
    except Exception as error:
        # An estimate must not stop a run: the model may have parts that need real tensors.
        logger.warning(
            f"The memory of a step cannot be estimated ({type(error).__name__}), so activations are kept. Set "
            "`gradient_checkpointing: true` if it does not fit."
        )
        return
    if needed:
        logger.warning(
            f"Activations are recomputed: a micro-batch of {tokens} tokens would not fit into {memory / 1e9:.0f} GB "
            "otherwise. `gradient_checkpointing: false` insists on keeping them."
        )
        _set(args, "", True)
        if hasattr(model, "peft_config"):
            model.enable_input_require_grads()


def _set(args: MPOConfig, ending: str, value: Any) -> None:
    """Set ``gradient_checkpointing`` or, with its ending, ``gradient_checkpointing_kwargs``."""
    setattr(args, f"gradient_checkpointing{ending}", value)
    if hasattr(args, f"activation_checkpointing{ending}"):  # its name in later versions of transformers
        setattr(args, f"activation_checkpointing{ending}", value)
