"""The model of a recipe: how it is loaded, and what of it is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel
from trl import get_peft_config

from mpo.common.words import listed
from mpo.errors import ConfigError, ModelError
from mpo.modeling.loading import adapter_settings, is_quantized, linear_layer_names, pick_attention
from mpo.training.launcher import launched_with
from mpo.training.recipe import Recipe

PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", None: "fp32"}
"""Short names of what :func:`half_precision` returns."""


def half_precision(recipe: Recipe) -> str | None:
    """``"bfloat16"``, ``"float16"`` or None for float32; what a recipe asks for decides, also on another machine."""
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(recipe.training, key) or recipe.given.get(key):
            return name
    return None


def with_model_choices(recipe: Recipe, config: PretrainedConfig, *, on_this_machine: bool = True) -> Recipe:
    """Fill in the type of the weights and the attention.

    Raises:
        ConfigError: The combination learns nothing.
    """
    model, training = recipe.model, recipe.training
    gpu = not on_this_machine or (torch.cuda.is_available() and not training.use_cpu)
    half = half_precision(recipe)
    dtype = model.dtype
    if dtype is None:
        dtype = half if half is not None and model.trains_adapter else "float32"
    if not model.trains_adapter:
        loaded = str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        keeps_masters = launched_with("DEEPSPEED") or training.deepspeed
        if loaded in ("bfloat16", "float16") and not (keeps_masters and loaded == half == "bfloat16"):
            raise ConfigError(
                f"`dtype` loads the weights as {loaded} and all of them are trained: a step of learning rate "
                f"{training.learning_rate:g} is smaller than {loaded} can tell apart, so most updates would vanish. "
                "Remove `dtype` (weights then load as float32, and `bf16: true` still computes in bf16), or train an "
                "adapter with `use_peft: true`."
            )
        if is_quantized(config):
            raise ConfigError(
                f"{model.model_name_or_path} is quantised, and quantised weights cannot be trained. Set "
                "`use_peft: true`, or take the unquantised model."
            )
    attention = pick_attention(
        config,
        model.attn_implementation,
        layout=training.batch_layout,
        gpu=gpu,
        compiled=bool(training.torch_compile),
    )
    return dataclasses.replace(
        recipe, model=dataclasses.replace(model, dtype=dtype, attn_implementation=attention)
    )


def new_adapter_config(recipe: Recipe) -> PeftConfig:
    """The LoRA configuration of a recipe."""
    config = get_peft_config(recipe.model)
    assert config is not None
    if recipe.model.init_lora_weights is not None:
        config.init_lora_weights = recipe.model.init_lora_weights  # type: ignore[attr-defined]
    config.base_model_name_or_path = recipe.model.model_name_or_path
    config.revision = recipe.model.model_revision
    return config


def with_adapter(recipe: Recipe, model: PreTrainedModel) -> tuple[PeftConfig | None, PeftModel]:
    """Make sure that an adapter fits the model.

    Returns:
        The configuration of the new adapter, or None for an existing one, and the model with it.

    Raises:
        ModelError: It does not fit.
        ConfigError: It cannot be trained, or is not as the recipe says.
    """
    from mpo.training.checks import check_adapter_config

    existing = recipe.model.adapter_name_or_path
    if existing is None:
        new = config = new_adapter_config(recipe)
        _begin_at(_first_layer(recipe, model), config, model)
    else:
        _check_adapter_agrees(recipe, adapter_settings(existing), model)
        new, config = None, PeftConfig.from_pretrained(existing)
        config.inference_mode = False
    check_adapter_config(config)
    names = linear_layer_names(model)
    try:
        with torch.device("meta"):
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        targets = getattr(config, "target_modules", None)
        raise ModelError(
            f"The adapter does not fit {recipe.model.model_name_or_path}: {str(error).splitlines()[0]} "
            f"`lora_target_modules` is {listed_modules(targets)}; the model's linear layers are {', '.join(names)}. "
            "`all-linear` takes all but the output head."
        ) from error
    return new, wrapped


def _first_layer(recipe: Recipe, model: PreTrainedModel) -> int:
    """`lora_first_layer` as a layer's number.

    Raises:
        ConfigError: The model has no such layer.
    """
    layers = model.config.get_text_config().num_hidden_layers
    wanted = recipe.model.lora_first_layer
    first = round(wanted * layers) if wanted < 1 else int(wanted)
    if first >= layers:
        raise ConfigError(
            f"`lora_first_layer` is {wanted:g}, and {recipe.model.model_name_or_path} has {layers} layers, counted from 0. Choose "
            "a lower one."
        )
    return first


def _begin_at(first: int, config: Any, model: PreTrainedModel) -> None:
    """Leave the layers below ``first`` without an adapter."""
    if first == 0:
        return
    config.layers_to_transform = list(range(first, model.config.get_text_config().num_hidden_layers))
    if config.target_modules == "all-linear":  # PEFT takes layers with names alone
        head = model.get_output_embeddings()
        heads = {name.rpartition(".")[2] for name, part in model.named_modules() if part is head}
        config.target_modules = {*linear_layer_names(model)} - heads


def _check_adapter_agrees(recipe: Recipe, settings: dict[str, Any], model: PreTrainedModel) -> None:
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    stored = {key: settings[name] for key, name in names.items() if name in settings}
    stored["lora_first_layer"] = min(settings.get("layers_to_transform") or [0])
    for key in stored:
        if (given := recipe.given.get(key)) is None:
            continue
        if (_first_layer(recipe, model) if key == "lora_first_layer" else given) != stored[key]:
            raise ConfigError(
                f"`{key}` is {given!r}, but the adapter {recipe.model.adapter_name_or_path} that training "
                f"goes on from has {stored[key]!r}, which cannot be changed. Remove `{key}` or set it to that."
            )


def listed_modules(targets: Any) -> str:
    """The modules that get an adapter, as text."""
    return targets if isinstance(targets, str) else listed(sorted(targets or ()))
