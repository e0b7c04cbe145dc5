"""Models whose weights are divided over ranks: DeepSpeed ZeRO and FSDP2.

Accelerate places and divides a model when the training loop begins. The reference pass and the first scoring come before,
so they ask here for a model that can be called, and get the one that training will compute with: same precision, same
division.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from mpo.errors import ConfigError
from mpo.training.compute import is_installed


def launched_with(engine: str) -> bool:
    """Whether ``accelerate launch`` was given a configuration of ``"DEEPSPEED"`` or ``"FSDP"``."""
    return _is_set(f"ACCELERATE_USE_{engine}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def deepspeed_backend(use_cpu: bool) -> str | None:
    """
    What DeepSpeed's processes communicate with where it has to be said, before they begin to.

    Without an accelerator that is gloo: left to themselves, Accelerate takes the processes for single ones. DeepSpeed's own
    sum over shared memory, which it compiles for a minute or more on its first start, is left out.

    Args:
        use_cpu: whether the settings ask for the CPU.

    Returns:
        A backend of torch, or None to leave it to Accelerate.

    Raises:
        ConfigError: the CPU is asked for, where Accelerate sets DeepSpeed aside.
    """
    if not launched_with("DEEPSPEED"):
        return None
    if use_cpu or _is_set("ACCELERATE_USE_CPU"):
        raise ConfigError(
            "the Accelerate configuration asks for DeepSpeed, which Accelerate sets aside under `use_cpu` "
            "(ACCELERATE_USE_CPU). Remove that: without a GPU, DeepSpeed takes the CPU by itself."
        )
    if torch.accelerator.is_available():
        return None
    if is_installed("deepspeed"):  # where it is not, its absence is reported later
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return "gloo"


def sharding_name(accelerator: Accelerator) -> str:
    """``"none"``, ``"DDP"``, ``"ZeRO-1"`` to ``"ZeRO-3"`` or ``"FSDP2"``."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "none"


def check_sharding(accelerator: Accelerator) -> None:
    """
    Refuse Accelerate configurations under which a run could not keep its promises, and mend what can be mended.

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


def deepspeed_inference_engine(model: nn.Module, accelerator: Accelerator) -> Any:
    """
    A DeepSpeed engine without an optimizer around a model that training has not wrapped yet.

    The weights are cast and placed as training's engine will have them; under ZeRO-3 they are divided over the ranks.
    Call its ``destroy()`` before another engine takes the model.
    """
    from trl.models.utils import prepare_deepspeed

    return prepare_deepspeed(model, accelerator)


def fsdp_shard(model: Any, accelerator: Accelerator) -> Any:
    """
    Divide a model with FSDP2, for good: there is no way back, so training goes on with the result.

    See :func:`fsdp_sharded_before`, under which the training loop does not divide it again.
    """
    # Accelerate takes a model only together with its optimizer; training's own is made when the loop begins.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.0))
    accelerator._optimizers.clear()
    return model


def fsdp_shard_reference(model: Any, accelerator: Accelerator) -> Any:
    """Divide a frozen model with FSDP2, beside the one that is trained."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


@contextmanager
def fsdp_sharded_before(accelerator: Accelerator) -> Iterator[None]:
    """``accelerator.prepare(model, optimizer)`` for a model that is divided already and an optimizer made of its shards."""

    def prepare(model: Any, optimizer: Any) -> tuple[Any, Any]:
        accelerator._models.append(model)
        return model, accelerator.prepare_optimizer(optimizer)

    with mock.patch.object(accelerator, "prepare", prepare):
        yield


def fsdp_reshard(model: nn.Module) -> None:
    """
    Give up the gathered weights that a forward pass has left behind.

    Units that are not divided again after their forward pass (the last norm and the head, the root) show their whole
    weights until a backward pass. An optimizer made in between would be given those, and never move the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_fsdp_sharded(model: nn.Module) -> bool:
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
