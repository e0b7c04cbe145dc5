"""What training changes in a PEFT adapter: nothing in its results, only copies that it need not make."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def skip_input_casts(model: nn.Module) -> None:
    """Keep LoRA layers from copying their input to float32 under autocast.

    PEFT keeps an adapter's weights in float32 beside a base in half precision, and casts the input of each adapted layer
    to float32 to match. Autocast then casts it back for the product: two passes over the input, and a copy of it for the
    backward pass, once for every adapted layer. From half precision to float32 and back is the identity, so the results
    are the same to the last bit without. Outside autocast nothing changes, nor with dropout or a variant such as DoRA,
    which compute something of their own in the adapter's precision.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and hasattr(module, "_cast_input_dtype"):
            setattr(module, "_cast_input_dtype", partial(_cast_where_needed, module))  # noqa: B010


def _cast_where_needed(layer: Any, states: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    exact = (
        states is not None
        and torch.is_autocast_enabled(states.device.type)
        and states.dtype == torch.get_autocast_dtype(states.device.type)
        and not layer.lora_variant
        and all(isinstance(drop, nn.Identity) for drop in layer.lora_dropout.values())
    )
    cast: Tensor | None = states if exact else type(layer)._cast_input_dtype(layer, states, dtype)
    return cast
