"""Short training runs of tiny models on a CPU, for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from mpo.training.config import MPOConfig
from mpo.training.trainer import MPOTrainer
from tests.tiny import random_groups

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(folder: Path, **settings: Any) -> MPOConfig:
    """Settings of a run whose every file lies below ``folder``, with a learning rate that shows in a few steps."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "reference_cache_dir": str(folder / "reference"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "seed": 3,
    }
    return MPOConfig(**{**defaults, **settings})


def lora(**settings: Any) -> LoraConfig:
    """A small adapter on all linear layers."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "lora_dropout": 0.0, **settings})


def trainer(model: Any, folder: Path, rows: Any = None, **arguments: Any) -> MPOTrainer:
    """A trainer; arguments that it does not take itself are settings."""
    own = (
        "ref_model",
        "eval_dataset",
        "processing_class",
        "callbacks",
        "peft_config",
        "quantization_config",
        "optimizers",
        "kind",
    )
    given = {name: arguments.pop(name) for name in own if name in arguments}
    kind = given.pop("kind", MPOTrainer)
    return kind(
        model=str(model) if isinstance(model, Path) else model,
        args=config(folder, **arguments),
        train_dataset=random_groups(0, 6, words=(1, 6)) if rows is None else rows,
        **given,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
