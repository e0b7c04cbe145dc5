"""A tiny model and an adapter that changes it, saved as a user would have them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import build_model, save_tiny


def save_model_and_adapter(folder: Path, family: str = "llama") -> tuple[str, str]:
    """Folders of the model and of a LoRA adapter whose weights are not zero."""
    model = save_tiny(family, folder / "model")
    policy = get_peft_model(
        build_model(family), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    policy.save_pretrained(str(folder / "adapter"))
    return str(model), str(folder / "adapter")
