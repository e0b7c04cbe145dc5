"""How a model is called, whole or with its weights divided over ranks by DeepSpeed ZeRO or FSDP2.

Accelerate places and divides a model when the training loop begins. The reference pass and the first scoring come before,
so they ask here for a model that can be called, and get the one that training will compute with: same precision, same
division.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Trainer

from mpo.errors import ConfigError
from mpo.modeling.layout import CALL_TOKENS
from mpo.training.config import MPOConfig
from mpo.training.launcher import launched_with


def will_be_sharded(args: Any) -> bool:
    """Whether a trainer with these settings will divide its model over ranks, before it has an accelerator."""
    return bool(getattr(args, "deepspeed_plugin", None) or args.fsdp or launched_with("FSDP"))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed or FSDP divides the model, its gradients or its optimizer over ranks."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def sharding_name(accelerator: Accelerator) -> str:
    """``"none"``, ``"DDP"``, ``"ZeRO-1"`` to ``"ZeRO-3"`` or ``"FSDP2"``."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "none"


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse Accelerate configurations under which a run could not keep its promises, and correct what can be.

    Raises:
        ConfigError: FSDP on a CPU; FSDP1; or ZeRO-3 that would save a model nobody can load.
    """
    if launched_with("FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            "the Accelerate configuration asks for FSDP, which Accelerate sets aside without GPUs: each process would hold "
            "the whole model. Take recipes/accelerate/ddp.yaml, or zero3.yaml, which divides it on CPUs, too."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ConfigError(
                "under ZeRO-3 without `zero3_save_16bit_model: true` in the Accelerate configuration, what is saved is the "
                "shards of the ranks, which no other program loads. Set it, as recipes/accelerate/zero3.yaml does."
            )
    elif accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(
                "the Accelerate configuration asks for FSDP1. Set `fsdp_version: 2`, as recipes/accelerate/fsdp2.yaml does."
            )
        policy = plugin.mixed_precision_policy
        if policy is not None:
            # Accelerate's policy rounds every module's output to bf16, the log-likelihoods and pooled states included,
            # whose small differences are the loss. Gradients are summed in float32 for the same reason.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
            )


def tokens_per_call(args: MPOConfig, accelerator: Accelerator, *, router_loss: bool) -> int | None:
    """Tokens beyond which a micro-batch is split into several model calls; None where it is always one.

    Raises:
        ConfigError: A split is asked for where ranks would wait for each other, or the loss is of a whole micro-batch.
    """
    wanted = args.max_tokens_per_call
    split = not (accelerator.num_processes > 1 or is_sharded(accelerator) or router_loss or args.fp16)
    if wanted is not None and not split:
        raise ConfigError(
            f"`max_tokens_per_call` is {wanted}, but a micro-batch is one model call with several processes, DeepSpeed, "
            "FSDP, fp16 or a mixture-of-experts model. Remove it, and lower `max_targets_per_group` to save memory."
        )
    return wanted or (CALL_TOKENS.get(accelerator.device.type) if split else None)


class CallablePolicy:
    """The model of a trainer as it can be called for a forward pass, before the training loop begins and in it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._early_engine: Any = None  # DeepSpeed's, until training makes its own

    @property
    def model(self) -> Any:
        """The model itself, with its adapter."""
        return self._trainer.model

    @property
    def accelerator(self) -> Accelerator:
        """The trainer's."""
        return self._trainer.accelerator

    @property
    def has_moved(self) -> bool:
        """Whether there has been an optimizer step."""
        return self._trainer.state.global_step > 0

    def callable(self) -> Any:
        """What to call. Before training, a model that will be divided over ranks is divided here."""
        trainer = self._trainer
        if trainer.is_deepspeed_enabled and trainer.model_wrapped is trainer.model:
            if self._early_engine is None:
                self._early_engine = _deepspeed_inference_engine(trainer.model, trainer.accelerator)
            return self._early_engine
        if trainer.is_fsdp_enabled and not is_fsdp_sharded(trainer.model):
            trainer.model = trainer.model_wrapped = _fsdp_shard(trainer.model, trainer.accelerator)
        return trainer.model_wrapped if is_sharded(trainer.accelerator) else trainer.model

    def release(self) -> None:
        """Give up what was made for calls before training, so that training's engine can take the model."""
        destroy_engine(self._early_engine)
        self._early_engine = None


@contextmanager
def inference(model: Any, accelerator: Accelerator) -> Iterator[Any]:
    """A model in eval mode, under the mixed precision of training; afterwards it is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        # Sharding engines cast the weights themselves.
        with nullcontext() if is_sharded(accelerator) else accelerator.autocast():
            yield model
    finally:
        model.train(was_training)


def place_frozen(model: Any, accelerator: Accelerator) -> Any:
    """A frozen model, beside the one that is trained, as it can be called: on the device, divided where that one is."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_inference_engine(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    return model.to(accelerator.device)


def skip_steps_that_overflow(model: Any, accelerator: Accelerator) -> None:
    """Have training's DeepSpeed engine skip a step whose gradient is not finite; anything else is left alone.

    ZeRO-3 does so. ZeRO-1 and 2 take such a step unless they are told to look.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.optimizer.check_grad_overflow = True


def destroy_engine(model: Any) -> None:
    """Take down a DeepSpeed engine, before another takes its model; anything else is left alone."""
    if hasattr(model, "destroy"):
        model.destroy()


def _deepspeed_inference_engine(model: nn.Module, accelerator: Accelerator) -> Any:
    """A DeepSpeed engine without an optimizer around a model that training has not wrapped yet.

    The weights are cast and placed as training's engine will have them; under ZeRO-3 they are divided over the ranks.
    """
    from trl.models.utils import prepare_deepspeed

    return prepare_deepspeed(model, accelerator)


def _fsdp_shard(model: Any, accelerator: Accelerator) -> Any:
    """Divide a model with FSDP2, for good: there is no way back, so training goes on with the result.

    See :func:`mpo.training.trl_contract.without_second_sharding`, under which the training loop does not divide it again.
    """
    # Accelerate takes a model only together with its optimizer; training's own is made when the loop begins.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.0))
    accelerator._optimizers.clear()
    return model


def fsdp_whole_state(model: Any, accelerator: Accelerator) -> dict[str, Any]:
    """The weights of a model that FSDP2 has divided, whole and each once. All ranks call this."""
    state: dict[str, Any] = accelerator.get_state_dict(model)
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)
    return state


def fsdp_reshard(model: nn.Module) -> None:
    """Give up the gathered weights that a forward pass has left behind.

    Units that are not divided again after their forward pass (the last norm and the head, the root) show their whole
    weights until a backward pass. An optimizer made in between would be given those, and never move the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_fsdp_sharded(model: Any) -> bool:
    """Whether FSDP2 has divided the model."""
    return isinstance(model, FSDPModule)


def local_part(parameter: Tensor) -> Tensor:
    """The part of a weight that this rank holds; all of it where weights are whole."""
    if hasattr(parameter, "ds_tensor"):
        part: Tensor = parameter.ds_tensor
        return part
    if hasattr(parameter, "to_local"):
        part = parameter.to_local()
        return part
    return parameter
