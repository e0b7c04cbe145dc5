"""What a run will do, worked out and checked before anything costs time: no weights are loaded here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mpo.data import BadRow, LoadedGroups, language_name, load_groups, split_by_source
from mpo.data.tokenization import tokenize_groups
from mpo.errors import ConfigError, DataError, DependencyError, ModelError, StorageError
from mpo.evaluation.reward_gap import sort_languages
from mpo.modeling.loading import (
    ModelSource,
    adapter_settings,
    empty_model,
    is_quantized,
    linear_layer_names,
    load_config,
    load_tokenizer,
    pick_attention,
)
from mpo.training.compute import check_compute_options, is_installed, require_package
from mpo.training.recipe import DATA_SUFFIXES, Recipe
from mpo.training.sampling import EpochSampler, GroupBatchSampler, TokenBudgetSampler, step_tokens
from mpo.training.sharding import launched_with

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig

# Bytes that AdamW keeps per trained weight: two float32 moments.
_OPTIMIZER_BYTES = 8
# The official code runs source and target of a pair as two batches, each of two sequences (prompt + chosen, prompt +
# rejected) that are padded to one length, a multiple of 8.
_OFFICIAL_MULTIPLE = 8

_TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "codecarbon": ("codecarbon",),
    "azure_ml": ("azureml",),
}


@dataclass
class Plan:
    """A recipe that was found sound, with what was opened to find out.

    Attributes:
        recipe: the recipe, with `dtype` and `attn_implementation` filled in.
        source: where the model comes from.
        config: the model's configuration.
        tokenizer: with a chat template.
        peft_config: of the new adapter, or None.
        data: what was loaded, before the split.
        train, held_out: groups; ``held_out`` is None where nothing is.
        dropped: bad rows that were left out.
        trainable, parameters: numbers of trained weights and of the model's own.
        facts: what the printed plan says, in order.
        notes: sentences about what the user may not have meant.
    """

    recipe: Recipe
    source: ModelSource
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    data: LoadedGroups
    train: Dataset
    held_out: Dataset | None
    dropped: list[BadRow]
    trainable: int
    parameters: int
    steps: int
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """The plan, one fact per line."""
        width = max(len(name) for name in self.facts)
        lines = [f"{name.ljust(width)}  {text}" for name, text in self.facts.items()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def make_plan(recipe: Recipe, *, on_this_machine: bool = True) -> Plan:
    """Checks a recipe against this machine, the model and the data, cheapest first, and says what the run will do.

    Args:
        recipe: what to run.
        on_this_machine: False for a plan that is only looked at: settings that this machine cannot honour become notes.

    Raises:
        MPOError: the first thing that would make the run fail; see :mod:`mpo.errors`.
    """
    notes = list(recipe.unavailable)
    if on_this_machine and recipe.unavailable:
        raise ConfigError(
            f"{recipe.source_path}: {'; '.join(recipe.unavailable)}. Change it, or set `use_cpu: true` to train on the "
            "CPU on purpose."
        )
    check_output_folder(recipe, create=on_this_machine)
    check_packages(recipe, on_this_machine=on_this_machine)
    _check_data_files(recipe)

    training = recipe.training
    source = ModelSource(
        str(recipe.model.model_name_or_path), recipe.model.model_revision, bool(training.trust_remote_code)
    )
    config = load_config(source)
    recipe = _with_model_choices(recipe, config, on_this_machine)
    tokenizer = load_tokenizer(source, training.chat_template)
    if recipe.model.reference_model_name_or_path is not None:
        load_config(ModelSource(recipe.model.reference_model_name_or_path, None, source.trust_remote_code))
    model = empty_model(config, source)
    peft_config = None
    parameters = trainable = sum(parameter.numel() for parameter in model.parameters())
    if recipe.model.trains_adapter:
        peft_config, trainable = _count_adapter(recipe, model)

    data, train, held_out, dropped = _load_data(recipe)
    for problem in dropped[:3]:
        notes.append(
            f"dropped {problem.file}, row {problem.row}"
            + (f", field `{problem.field}`" if problem.field else "")
            + f": {problem.reason}"
        )
    tokens, errors = _count_tokens(recipe, tokenizer, train, held_out)
    notes.extend(errors[:3])
    steps = _steps(recipe, tokens.micro_batches)
    plan = Plan(
        recipe,
        source,
        config,
        tokenizer,
        peft_config,
        data,
        train,
        held_out,
        dropped,
        trainable,
        parameters,
        steps,
    )
    if held_out is None:
        notes.append(
            "nothing is held out, so the reward gap will not be measured before and after (`held_out: 0.1`)"
        )
    elif shared := _shared_sources(train, held_out):
        notes.append(
            f"{shared} of the prompts of `eval_dataset` are also trained on, which flatters the result"
        )
    if on_this_machine and not is_installed("matplotlib"):
        notes.append("no plots will be drawn: matplotlib is not installed (`pip install 'mpo-align[plots]'`)")
    size = _checkpoint_sizes(plan)
    plan.facts = _facts(plan, tokens, size)
    plan.facts["Bad rows dropped"] = str(len(dropped) + len(errors))
    plan.notes = notes
    if on_this_machine:
        _check_disk(plan, size)
    return plan


# -------------------------------------------------------------------------------------------------------------- folder


def check_output_folder(recipe: Recipe, *, create: bool = True) -> None:
    """Makes sure that the output folder can be written and holds no run that would be overwritten.

    Raises:
        StorageError: the folder cannot be made or written, is or may be another model's, or holds checkpoints and
            nothing says what to do with them.
        ConfigError: the checkpoint to resume from is not there or not complete.
    """
    from mpo.training.checkpoints import last_complete_checkpoint

    training = recipe.training
    folder = Path(str(training.output_dir))
    check_writable(folder, create=create)
    _check_replaces_nothing(recipe, folder)
    resume = training.resume_from_checkpoint
    last = last_complete_checkpoint(folder) if folder.is_dir() else None
    if resume is None or str(resume).lower() in ("false", "no"):
        if last is not None:
            raise StorageError(
                f"{folder} holds the checkpoints of an earlier run (the last complete one is {last.name}). Go on with "
                "it, or write elsewhere:\n"
                f"  {recipe.command(resume_from_checkpoint='auto')}\n"
                f"  {recipe.command(output_dir=str(_free_name(folder)))}"
            )
        return
    if str(resume).lower() in ("true", "auto", "yes"):
        return
    wanted = Path(str(resume))
    if not wanted.is_dir():
        known = f" The last complete one in {folder} is {last.name}." if last is not None else ""
        raise ConfigError(
            f"`resume_from_checkpoint` is {resume!r}, which is not a folder; expected `auto` or a checkpoint folder."
            + known
        )


def _check_replaces_nothing(recipe: Recipe, folder: Path) -> None:
    model = recipe.model
    for key, name in (
        ("model_name_or_path", model.model_name_or_path),
        ("adapter_name_or_path", model.adapter_name_or_path),
        ("reference_model_name_or_path", model.reference_model_name_or_path),
    ):
        if name and folder.is_dir() and Path(name).is_dir() and folder.samefile(name):
            raise StorageError(
                f"The output folder {folder} is that of `{key}`, whose files the run would replace. Choose another with "
                "`output_dir`."
            )
    # A run writes its provenance first, so a folder that has none is nobody's run.
    foreign = [
        name for name in ("README.md", "config.json", "adapter_config.json") if (folder / name).is_file()
    ]
    if foreign and not (folder / "provenance.json").is_file():
        raise StorageError(
            f"The output folder {folder} holds files that no run wrote ({', '.join(foreign)}, without a "
            "provenance.json); the run would replace them. Choose another with `output_dir`."
        )


def check_writable(folder: Path, *, create: bool = True) -> None:
    """Makes ``folder`` and writes a file in it; with ``create=False``, in the nearest folder above that exists.

    Raises:
        StorageError: it cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"The output folder {folder} is a file. Choose another with `output_dir`.")
    place = folder
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.NamedTemporaryFile(dir=place, prefix=".writable"):
            pass
    except OSError as error:
        raise StorageError(
            f"The output folder {folder} cannot be written: {error.strerror or error}. Choose another with `output_dir`, "
            "or make room there."
        ) from None


def _free_name(folder: Path) -> Path:
    number = 2
    while (candidate := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return candidate


# ------------------------------------------------------------------------------------------------------------ packages


def check_packages(recipe: Recipe, *, on_this_machine: bool = True) -> None:
    """Makes sure that the optional packages which the recipe needs are installed and can work here.

    Raises:
        DependencyError: one is not.
        ConfigError: a setting means nothing on this device.
    """
    model, training = recipe.model, recipe.training
    check_compute_options(
        training,
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        on_this_machine=on_this_machine,
    )
    if launched_with("DEEPSPEED"):
        require_package("deepspeed", "the Accelerate configuration", "deepspeed")
    for tracker in training.report_to or []:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"`report_to` names {tracker!r}; expected none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        packages = _TRACKER_PACKAGES.get(str(tracker))
        if packages is not None and not any(is_installed(package) for package in packages):
            raise DependencyError(
                f"`report_to` names {tracker}, but {packages[0]} is not installed. Install it with "
                f"`pip install {packages[0].replace('_', '-')}`, or set `report_to: none`."
            )


# --------------------------------------------------------------------------------------------------------------- model


def _with_model_choices(recipe: Recipe, config: PretrainedConfig, on_this_machine: bool) -> Recipe:
    """Fills in the type of the weights and the attention, and refuses combinations in which nothing is learned."""
    model, training = recipe.model, recipe.training
    gpu = not on_this_machine or (torch.cuda.is_available() and not training.use_cpu)
    # What the recipe asks for decides, also in a plan made on another machine.
    bf16, fp16 = (
        bool(training.bf16 or recipe.given.get("bf16")),
        bool(training.fp16 or recipe.given.get("fp16")),
    )
    half = "bfloat16" if bf16 else "float16" if fp16 else None
    dtype = model.dtype
    if dtype is None:
        dtype = half if half is not None and model.trains_adapter else "float32"
    if not model.trains_adapter:
        loaded = str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        keeps_masters = launched_with("DEEPSPEED") or training.deepspeed
        if loaded in ("bfloat16", "float16") and not (keeps_masters and loaded == "bfloat16" and bf16):
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
    from trl import get_peft_config

    config = get_peft_config(recipe.model)
    assert config is not None
    if recipe.model.init_lora_weights is not None:
        config.init_lora_weights = recipe.model.init_lora_weights  # type: ignore[attr-defined]
    config.base_model_name_or_path = recipe.model.model_name_or_path
    config.revision = recipe.model.model_revision
    return config


def _count_adapter(recipe: Recipe, model: PreTrainedModel) -> tuple[PeftConfig | None, int]:
    """(configuration of the new adapter or None for an existing one, number of trained weights)."""
    from peft import PeftConfig, get_peft_model

    from mpo.training.checks import check_adapter_config

    existing = recipe.model.adapter_name_or_path
    if existing is None:
        new = config = new_adapter_config(recipe)
    else:
        _check_adapter_agrees(recipe, adapter_settings(existing))
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
            f"`lora_target_modules` is {_listed(targets)}; the model's linear layers are {', '.join(names)}. "
            "`all-linear` takes all but the output head."
        ) from error
    return new, sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def _check_adapter_agrees(recipe: Recipe, settings: dict[str, Any]) -> None:
    for key, stored in (
        ("lora_r", "r"),
        ("lora_alpha", "lora_alpha"),
        ("use_rslora", "use_rslora"),
        ("use_dora", "use_dora"),
    ):
        if key in recipe.given and stored in settings and recipe.given[key] != settings[stored]:
            raise ConfigError(
                f"`{key}` is {recipe.given[key]!r}, but the adapter {recipe.model.adapter_name_or_path} that training "
                f"goes on from has {settings[stored]!r}, which cannot be changed. Remove `{key}` or set it to that."
            )


def _listed(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, (set, list, tuple)) else str(value)


# ---------------------------------------------------------------------------------------------------------------- data


def _check_data_files(recipe: Recipe) -> None:
    for key in ("dataset", "eval_dataset"):
        value = getattr(recipe.data, key)
        for name in [value] if isinstance(value, str) else value or []:
            if Path(name).is_file():
                continue
            if Path(name).suffix.lower() in DATA_SUFFIXES or name.startswith(("/", ".", "~")):
                places = sorted({os.getcwd(), str(recipe.source_path.resolve().parent)})
                raise DataError(
                    f"there is no such file (looked in {' and '.join(places)}). Set `{key}`.", file=name
                )


def _load_data(recipe: Recipe) -> tuple[LoadedGroups, Dataset, Dataset | None, list[BadRow]]:
    data, training = recipe.data, recipe.training
    settings: dict[str, Any] = {
        "source_language": training.source_language,
        "bad_rows": training.bad_rows,
        "languages": data.languages,
    }
    with training.main_process_first(desc="loading the data"):
        loaded = load_groups(data.dataset, split=data.dataset_split, limit=data.limit, **settings)
        if data.eval_dataset is not None:
            other = load_groups(data.eval_dataset, split=data.dataset_split, **settings)
            return loaded, loaded.groups, other.groups, [*loaded.dropped, *other.dropped]
        train, held_out = split_by_source(loaded.groups, data.held_out, data.held_out_seed)
    return loaded, train, held_out if len(held_out) else None, loaded.dropped


def _shared_sources(train: Dataset, held_out: Dataset) -> int:
    def prompts(groups: Dataset) -> set[bytes]:
        return {
            hashlib.sha256(json.dumps(source["prompt"], sort_keys=True).encode()).digest()
            for source in groups["source"]
        }

    return len(prompts(train) & prompts(held_out))


@dataclass(frozen=True)
class _Tokens:
    """Of one epoch: groups as the trainer will run them, pairs, and tokens as trees and as the official code's batches."""

    groups: int
    micro_batches: int
    pairs: int
    per_language: Counter[str]
    trees: int
    padded: int
    longest: int
    held_out_groups: int
    held_out_pairs: int


def _count_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset | None
) -> tuple[_Tokens, list[str]]:
    training = recipe.training
    kwargs = training.chat_template_kwargs
    settings: dict[str, Any] = {
        "max_length": training.max_length,
        "max_response_length": training.max_response_length,
        "template_kwargs": kwargs if isinstance(kwargs, dict) else None,
        "bad_rows": training.bad_rows,
        "group_by_source": training.group_by_source,
        "max_targets_per_group": training.max_targets_per_group,
        "num_proc": training.dataset_num_proc,
    }
    tokenized, errors = tokenize_groups(train, tokenizer, name="train", **settings)
    padded = pairs = longest = 0
    per_language: Counter[str] = Counter()
    for row in tokenized.with_format(None):
        source = [len(row[f"source_{part}"]) for part in ("prompt", "chosen", "rejected")]
        longest = max(longest, sum(source))
        per_language.update(row["target_language"])
        lengths = zip(row["target_prompt"], row["target_chosen"], row["target_rejected"], strict=True)
        for target in ([len(part) for part in parts] for parts in lengths):
            pairs += 1
            longest = max(longest, sum(target))
            padded += _official_tokens(source) + _official_tokens(target)
    held_groups = held_pairs = 0
    if held_out is not None:
        held, more = tokenize_groups(held_out, tokenizer, name="held-out", **settings)
        errors = [*errors, *more]
        held_groups = len(held_out)
        held_pairs = sum(len(languages) for languages in held["target_language"])
    trees = int(step_tokens(tokenized, training, "tree").sum())
    micro_batches = len(_train_sampler(recipe, tokenized))
    counts = _Tokens(
        len(tokenized), micro_batches, pairs, per_language, trees, padded, longest, held_groups, held_pairs
    )
    return counts, errors


def _official_tokens(lengths: list[int]) -> int:
    """Tokens, padding included, of the official code's batch for one pair of ``[prompt, chosen, rejected]`` tokens."""
    prompt, chosen, rejected = lengths
    return 2 * _OFFICIAL_MULTIPLE * math.ceil((prompt + max(chosen, rejected)) / _OFFICIAL_MULTIPLE)


# --------------------------------------------------------------------------------------------------------------- sizes


def _steps(recipe: Recipe, micro_batches: int) -> int:
    training = recipe.training
    updates = max(1, math.ceil(micro_batches / training.gradient_accumulation_steps))
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.num_train_epochs * updates)


def _train_sampler(recipe: Recipe, tokenized: Dataset) -> EpochSampler:
    """A sampler that makes as many micro-batches as the trainer's."""
    training = recipe.training
    tokens = step_tokens(tokenized, training, training.batch_layout)
    indices = np.flatnonzero(tokens)
    options: dict[str, Any] = {"num_ranks": training.world_size, "drop_last": training.dataloader_drop_last}
    if training.max_tokens_per_batch is None:
        return GroupBatchSampler(indices, training.per_device_train_batch_size, **options)
    return TokenBudgetSampler(indices, tokens[indices], training.max_tokens_per_batch, **options)


@dataclass(frozen=True)
class _Sizes:
    """Bytes: of the saved weights, of one checkpoint, and of everything the run may hold at once."""

    weights: int
    checkpoint: int
    kept: int
    total: int


def _checkpoint_sizes(plan: Plan) -> _Sizes:
    training = plan.recipe.training
    # Adapters train in float32 over a half-precision base as well.
    weights = plan.trainable * 4
    checkpoint = weights + (0 if training.save_only_model else plan.trainable * _OPTIMIZER_BYTES)
    strategy = str(getattr(training.save_strategy, "value", training.save_strategy))
    written = 0
    if strategy == "epoch":
        written = math.ceil(training.num_train_epochs)
    elif strategy in ("steps", "best"):
        every = training.save_steps if training.save_steps >= 1 else max(1, training.save_steps * plan.steps)
        written = math.ceil(plan.steps / every)
    limit = training.save_total_limit
    # The new checkpoint is written before the oldest is removed.
    kept = min(written, limit + 1) if limit else written
    hidden = plan.config.get_text_config().hidden_size
    reference = len(plan.train) * 2 * (hidden + 1) * 4
    return _Sizes(weights, checkpoint, kept, weights + kept * checkpoint + reference)


def _check_disk(plan: Plan, size: _Sizes) -> None:
    folder = Path(str(plan.recipe.training.output_dir))
    free = shutil.disk_usage(folder).free
    if free < size.total:
        raise StorageError(
            f"The disk of {folder} has {_bytes(free)} free, and this run may need {_bytes(size.total)}: "
            f"{size.kept} checkpoint{'' if size.kept == 1 else 's'} of {_bytes(size.checkpoint)} and the result of "
            f"{_bytes(size.weights)}. Make room, choose another `output_dir`, or keep less: `save_total_limit: 1`, "
            "`save_only_model: true` or `save_strategy: no`."
        )


# ---------------------------------------------------------------------------------------------------------------- text


def _facts(plan: Plan, tokens: _Tokens, size: _Sizes) -> dict[str, str]:
    recipe, training, data = plan.recipe, plan.recipe.training, plan.recipe.data
    model = recipe.model
    share = plan.trainable / plan.parameters
    kind = (
        "all weights"
        if not model.trains_adapter
        else "an existing adapter"
        if not plan.peft_config
        else _kind(recipe)
    )
    counts = [(code, tokens.per_language[code]) for code in sort_languages(tokens.per_language)]
    languages = ", ".join(f"{language_name(code)} {count}" for code, count in counts)
    if plan.held_out is None:
        held = "nothing"
    else:
        origin = "`eval_dataset`" if data.eval_dataset is not None else "by source"
        held = (
            f"{_count(tokens.held_out_groups, 'source')}, {_count(tokens.held_out_pairs, 'pair')} ({origin})"
        )
    objective = f"beta {training.beta:g}, retain_weight {training.retain_weight:g} ({training.retain_pooling} pooling)"
    if training.loss_type != ["mpo"]:
        objective = training.objectives.description()
    return {
        "Model": f"{plan.source.name} ({plan.config.model_type}, {_number(plan.parameters)} parameters)",
        "Training": f"{kind}, {plan.trainable:,} trainable parameters ({share:.2%})",
        "Objective": f"{objective}, source language {training.source_language}",
        "Data": f"{plan.data.origin}: {_count(tokens.groups, 'group')}, {_count(tokens.pairs, 'pair')}",
        "Pairs per language": languages,
        "Held out": held,
        "Optimizer": f"{_plain(training.optim)}, learning rate {training.learning_rate:g}, "
        f"{_plain(training.lr_scheduler_type)} schedule, warm-up {training.warmup_steps:g}",
        "Steps": f"{plan.steps} optimizer steps ({_length(recipe)}), {_step_size(recipe)} per device x "
        f"{_count(training.world_size, 'device')} x {training.gradient_accumulation_steps} accumulated",
        "Tokens per epoch": f"{tokens.trees:,} as trees; padded pair by pair, as in the official code, {tokens.padded:,} "
        f"({tokens.padded / max(tokens.trees, 1):.1f} times as many); longest tree {tokens.longest:,}",
        "Precision": f"{_precision(recipe)}, weights in {model.dtype}"
        + (", base in 4 bits" if model.load_in_4bit else ", base in 8 bits" if model.load_in_8bit else "")
        + (f", attention {model.attn_implementation}" if model.attn_implementation else ""),
        "Devices": _sharding(recipe),
        "Output": f"{training.output_dir} (about {_bytes(size.total)} on disk)",
    }


def _kind(recipe: Recipe) -> str:
    model = recipe.model
    name = "DoRA" if model.use_dora else "rsLoRA" if model.use_rslora else "LoRA"
    targets = _listed(model.lora_target_modules)
    return (
        f"{'Q' if model.load_in_4bit else ''}{name} r={model.lora_r}, alpha={model.lora_alpha} on {targets}"
    )


def _length(recipe: Recipe) -> str:
    training = recipe.training
    return "max_steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"


def _step_size(recipe: Recipe) -> str:
    training = recipe.training
    if training.max_tokens_per_batch is not None:
        return f"up to {training.max_tokens_per_batch:,} tokens"
    groups = training.per_device_train_batch_size
    each = training.world_size * groups * training.gradient_accumulation_steps
    return f"{_count(each, 'group')} each: {groups}"


def _precision(recipe: Recipe) -> str:
    training = recipe.training
    if training.bf16 or recipe.given.get("bf16"):
        return "bf16 mixed precision"
    return "fp16 mixed precision" if training.fp16 or recipe.given.get("fp16") else "float32"


def precision(recipe: Recipe) -> str:
    """``"bf16"``, ``"fp16"`` or ``"fp32"``."""
    return "bf16" if recipe.training.bf16 else "fp16" if recipe.training.fp16 else "fp32"


def _sharding(recipe: Recipe) -> str:
    training = recipe.training
    world = training.world_size
    device = training.device.type
    where = f"{world} {'process' if world == 1 else 'processes'} on {device}"
    if launched_with("DEEPSPEED") or training.deepspeed:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return f"{where}, DeepSpeed ZeRO{'-' + stage if stage else ''}"
    if launched_with("FSDP"):
        return f"{where}, FSDP"
    return where if world == 1 else f"{where}, the model on each (DDP)"


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _number(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
