"""What the trainer refuses before it spends time: arguments, adapters and weights that training could not honour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset

from mpo.errors import ConfigError, DataError, ModelError
from mpo.modeling.layers import decoder_of
from mpo.training.compute import check_compute_options
from mpo.training.config import MPOConfig
from mpo.training.harmless import BY_HEAD
from mpo.training.probe_settings import is_probe_metric

_REFUSED = {
    "data_collator": "the step packs preference trees with its own collator",
    "compute_metrics": "no logits are built that it could read; `trainer.score()` gives the score of every pair",
}


def check_arguments(
    args: Any, model: Any, ref_model: Any, train_dataset: Any, quantization_config: Any, **refused: Any
) -> None:
    """Refuse arguments of the trainer that contradict each other, have no meaning (``refused``), or need what is missing.

    Raises:
        ConfigError, DataError, DependencyError: Says what to pass or install instead.
    """
    if not isinstance(args, MPOConfig):
        raise ConfigError(f"`args` is a {type(args).__name__}; expected an `mpo.MPOConfig`.")
    for name, value in refused.items():
        if value is not None:
            raise ConfigError(f"`{name}` is not supported by MPOTrainer: {_REFUSED[name]}.")
    if train_dataset is None:
        raise DataError("`train_dataset` is missing; expected groups, see `mpo.data.load_groups`.")
    if ref_model is model:
        raise ConfigError(
            "`ref_model` is the model itself. Leave it out: the reference is the starting policy."
        )
    if quantization_config is not None and not isinstance(model, str):
        raise ConfigError(
            "`quantization_config` was given with a loaded model; quantization happens while loading. Pass the model's "
            "name or folder instead."
        )
    check_compute_options(
        args,
        load_in_4bit=getattr(quantization_config, "load_in_4bit", False),
        load_in_8bit=getattr(quantization_config, "load_in_8bit", False),
    )


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse a new adapter that the model cannot take, or an existing one that cannot be trained further.

    Raises:
        ConfigError: Says how to pass the adapter instead.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            "the model holds an adapter of transformers' own (`add_adapter`). Load it with `peft.PeftModel` instead, or "
            "pass the bare model with `peft_config`."
        )
    if hasattr(model, "peft_config"):
        if peft_config is not None:
            raise ConfigError(
                "`peft_config` asks for a new adapter, but the model has one already. Leave it out to train that one "
                "further, or merge it first (`mpo merge`)."
            )
        if "default" not in model.peft_config:
            raise ConfigError(
                f"the model's adapter is called {', '.join(model.peft_config)}; the trainer trains the one called "
                "'default'. Load it without `adapter_name`."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                "the model's adapter was loaded frozen. Load it with `is_trainable=True` to train it further."
            )
    check_adapter_config(
        peft_config if peft_config is not None else getattr(model, "active_peft_config", None)
    )


def check_adapter_config(config: Any) -> None:
    """Refuse adapters that the reward-gap head cannot train: prompt learning, and copies of the LM head.

    Args:
        config: A ``peft.PeftConfig`` or None.

    Raises:
        ConfigError: Names what to use instead.
    """
    if config is None:
        return
    if getattr(config, "is_prompt_learning", False):
        raise ConfigError(
            f"{type(config).__name__} puts virtual tokens before the prompt, which preference trees do not have. Use LoRA "
            "(or DoRA, rsLoRA) instead."
        )
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) and "lm_head" in (targets or []):
        raise ConfigError(
            "`target_modules` names lm_head: the reward-gap head reads the LM head's weight directly, so an adapter on it "
            "would never be trained. Remove it; `all-linear` leaves it out."
        )
    saved = set(getattr(config, "modules_to_save", None) or [])
    if saved & {"lm_head", "embed_tokens"}:
        raise ConfigError(
            f"`modules_to_save` names {', '.join(sorted(saved & {'lm_head', 'embed_tokens'}))}: the reward-gap head reads "
            "the LM head's weight directly and would train a copy that it does not use. Remove it."
        )


def check_harmless(
    args: MPOConfig,
    harmless: np.ndarray,
    model: Any,
    *,
    other_reference: bool,
    other_loss: bool = False,
    file: str = "train_dataset",
) -> None:
    """Refuse harmless groups that the settings cannot hold, or that they only hold where no other group teaches anything.

    Args:
        args: The run's settings.
        harmless: ``[groups]``, True for those that are.
        model: The model, with the adapter on it if there is one.
        other_reference: Whether the reference is another model than the starting policy: to hold at that is to teach.
        file: Where the groups came from.
        other_loss: Whether another loss than that of the objectives is theirs.

    Raises:
        DataError: All are harmless, and the model would stay as it is.
        ConfigError: What a head says of the states of now and of the reference is to be compared where the two have not the same head:
            it is trained, or the reference has its own.
    """
    own = args.harmless
    teaching = {*own.loss_type} - {"gap_retention"} if args.harmless_loss_weight else set()
    if len(harmless) and harmless.all() and not (teaching or other_reference or other_loss):
        raise DataError(
            f"all {len(harmless)} groups are harmless, and with `harmless_loss_type: {', '.join(own.loss_type) or 'none'}`"
            f"{'' if args.harmless_loss_weight else ' and a `harmless_loss_weight` of 0'} the model is only held on those: it would "
            "stay as it is. Add harmful groups, which `mpo data build` makes of prompts that are to be refused, or set another "
            "`harmless_loss_type`.",
            file=file,
        )
    if not (harmless.any() and own.keeps_own and args.harmless_retention in BY_HEAD):
        return
    if other_reference:
        raise ConfigError(
            f"`harmless_retention: {args.harmless_retention}` holds what the starting policy expects, by the one LM head of the model, and the reference "
            "here is another model. Leave it out, or set `harmless_retention: states`."
        )
    if _is_trained(model.get_output_embeddings()):
        raise ConfigError(
            f"`harmless_retention: {args.harmless_retention}` needs an LM head that is not trained, as under LoRA, and here all weights are. Set "
            "`harmless_retention: states`, which needs no head, or `use_peft: true`."
        )


def check_state_layer(args: MPOConfig, model: Any) -> None:
    """Refuse a layer that the model has not, or below which nothing is trained.

    Args:
        args: Settings of a run.
        model: The model, with the adapter on it if there is one.

    Raises:
        ConfigError: Names the layers that there are.
        ModelError: The model has no list of layers.
    """
    if args.state_layer is None:
        return
    decoder: Any = decoder_of(model)
    layers = len(decoder.layers)
    below = [model.get_input_embeddings(), *decoder.layers[: args.state_layer]]
    if args.state_layer > layers or not any(map(_is_trained, below)):
        trained = [i for i, block in enumerate(decoder.layers, start=1) if _is_trained(block)]
        raise ConfigError(
            f"`state_layer` is {args.state_layer}, and the model has {layers} layers, of which the first one that is trained is "
            f"{trained[0] if trained else 'none'}: states below it stay as they are. Choose one from there on."
        )


def _is_trained(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def check_best_metric(args: MPOConfig, languages: Sequence[str], evaluation_sets: Sequence[str]) -> None:
    """Refuse a metric for the best model that evaluations of these languages and sets will not give.

    Args:
        args: Settings, whose metric has a name that exists.
        languages: Target languages of the data.
        evaluation_sets: Names of the evaluation sets, where there are several.

    Raises:
        ConfigError: Names the metrics that there are.
    """
    if args.metric_for_best_model is None or is_probe_metric(args.metric_for_best_model):
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    if evaluation_sets:
        found = [each for each in evaluation_sets if name.startswith(f"{each}_")]
        if not found:
            raise ConfigError(
                f"`metric_for_best_model` is {args.metric_for_best_model!r}, but there are several evaluation sets, and their "
                f"metrics begin with their names. Write `eval_{evaluation_sets[0]}_{name}`; the sets are "
                f"{', '.join(evaluation_sets)}."
            )
        name = name.removeprefix(f"{max(found, key=len)}_")
    if name == "loss/retention" and args.retain_weight == 0:
        raise ConfigError(
            "`metric_for_best_model` is the retention loss, which is not measured with `retain_weight: 0`. Take `eval_loss`."
        )
    kind, slash, language = name.rpartition("/")
    if slash and kind != "loss" and language not in languages:
        raise ConfigError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r}, but the data has no target language {language!r}; "
            f"it has {', '.join(sorted(languages))}."
        )


def check_tokens(tokenized: Dataset, model: Any, tokenizer: Any, name: str = "train") -> None:
    """Refuse token ids without a row in the model's embedding, and texts with more tokens than it has positions.

    Args:
        tokenized: From :func:`mpo.training.workload.tokenize_for_training`.
        model: A ``PreTrainedModel``, which may be empty.
        tokenizer: Its tokenizer.
        name: Of the data, for the error.

    Raises:
        ModelError: Says which token, or how many tokens.
    """
    rows = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    largest = tokenizer.pad_token_id
    longest = 0
    for table in tokenized.with_format("arrow").iter(1024):
        for side in ("source", "target"):
            parts = [table[f"{side}_{part}"].combine_chunks() for part in ("prompt", "chosen", "rejected")]
            if side == "target":
                parts = [part.flatten() for part in parts]
            if len(parts[0]) == 0:
                continue
            largest = max(largest, *(pc.max(part.flatten()).as_py() or 0 for part in parts))
            prompt, chosen, rejected = map(pc.list_value_length, parts)
            whole = pc.add(prompt, pc.max_element_wise(chosen, rejected))
            longest = max(longest, pc.max(whole).as_py())
    if largest >= rows:
        raise ModelError(
            f"The tokenizer gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's embedding has "
            f"{rows} rows (0 to {rows - 1}). Was a token added to the tokenizer only? Take the model's own tokenizer, or "
            "resize the embedding (`resize_token_embeddings`) and save the model again."
        )
    if positions is not None and longest > positions:
        raise ModelError(
            f"The longest text of the {name} data has {longest} tokens, more than the model's {positions} positions "
            f"(`max_position_embeddings`). Set `max_length: {positions}` or less."
        )


def check_languages(found: Sequence[str], known: Sequence[str]) -> None:
    """Raise a DataError for data with target languages that the trainer was not made with."""
    if unknown := sorted(set(found) - set(known)):
        raise DataError(
            f"the data has target languages the trainer was not made with: {', '.join(unknown)}. Pass it as `eval_dataset` "
            "when the trainer is made."
        )


def check_master_weights(model: Any) -> None:
    """Raise a ConfigError if all weights of a model are to be trained that is loaded in half precision."""
    half = {
        str(p.dtype)
        for p in model.parameters()
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    }
    if half and not hasattr(model, "peft_config"):
        raise ConfigError(
            f"the weights to be trained are {', '.join(sorted(half))}: at the learning rates of preference training their "
            "updates are rounded away. Load the model with `dtype: float32` and set `bf16: true`, which computes in bf16 "
            "and keeps float32 master weights."
        )
