"""The printed plan of a run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mpo.common.words import counted, magnitude, plain, size
from mpo.data import language_name
from mpo.evaluation.reward_gap import sort_languages
from mpo.jobs.preflight.model import PRECISIONS, half_precision, listed_modules
from mpo.jobs.preflight.plan import Plan
from mpo.training.config import MPOConfig
from mpo.training.harmless import RETENTIONS
from mpo.training.launcher import launched_with
from mpo.training.recipe import Recipe
from mpo.training.reference import cache_bytes
from mpo.training.reference_policy import needed_for


def facts_of(plan: Plan, disk_bytes: float) -> dict[str, str]:
    """What the printed plan says, in order; ``disk_bytes`` is what the run takes of the disk."""
    recipe, training, data = plan.recipe, plan.recipe.training, plan.recipe.data
    model, work = recipe.model, plan.work
    share = plan.trainable / plan.parameters
    kind = (
        "all weights"
        if not model.trains_adapter
        else "an existing adapter"
        if not plan.peft_config
        else _kind(recipe)
    )
    languages = ", ".join(
        f"{language_name(code)} {plan.languages[code]}" for code in sort_languages(plan.languages)
    )
    if plan.held_out is None:
        held = "nothing"
    else:
        origin = "`eval_dataset`" if data.eval_dataset is not None else "by source"
        held = f"{counted(len(plan.held_out), 'source')}, {counted(plan.held_out_pairs, 'pair')} ({origin})"
    objective = f"beta {training.beta:g}, retain_weight {training.retain_weight:g} ({training.retain_pooling} pooling)"
    if training.loss_type != ["mpo"]:
        objective = training.objectives.description()
    return {
        "Model": f"{plan.source.name} ({plan.config.model_type}, {magnitude(plan.parameters)} parameters)",
        "Training": f"{kind}, {plan.trainable:,} trainable parameters ({share:.2%})",
        "Objective": f"{objective}, source language {training.source_language}",
        "Data": f"{plan.data.origin}: {counted(work.groups, 'group')}, {counted(work.pairs, 'pair')}",
        **_harmless(plan),
        "Pairs per language": languages,
        "Held out": held,
        **({} if plan.in_between is None else {"Measured": plan.in_between.to_text()}),
        "Probe": _probe(plan),
        "Optimizer": f"{plain(training.optim)}, learning rate {training.learning_rate:g}, "
        f"{plain(training.lr_scheduler_type)} schedule, warm-up {training.warmup_steps:g}",
        "Steps": f"{plan.steps} optimizer steps ({_length(recipe)}), {_step_size(recipe)} per device x "
        f"{counted(training.world_size, 'device')} x {training.gradient_accumulation_steps} accumulated",
        "Tokens per epoch": f"{work.tree_tokens:,} as trees; padded pair by pair, as in the official code, "
        f"{work.official_tokens:,} ({work.official_tokens / work.tree_tokens:.1f} times as many); longest tree "
        f"{work.longest_tree:,}",
        "Precision": f"{_precision(recipe)}, weights in {model.dtype}"
        + (", base in 4 bits" if model.load_in_4bit else ", base in 8 bits" if model.load_in_8bit else "")
        + (f", attention {model.attn_implementation}" if model.attn_implementation else ""),
        "Devices": _sharding(recipe),
        "Output": f"{training.output_dir} (about {size(disk_bytes)} on disk)",
        **_upload(training),
    }


def _upload(training: MPOConfig) -> dict[str, str]:
    """Where the finished run goes; the Hub's library names the repository after the folder if nothing else does."""
    if not training.push_to_hub:
        return {}
    name = training.hub_model_id or Path(str(training.output_dir)).name
    return {
        "Upload": f"{name}, once the run is complete" + (", private" if training.hub_private_repo else "")
    }


def _harmless(plan: Plan) -> dict[str, str]:
    """How many groups are harmless, and what becomes of them."""
    found, args = plan.work.harmless, plan.recipe.training
    if found is None:
        return {}
    own = args.harmless
    uses = [own.objectives.description()] if own.loss_type else []
    if own.keeps_own:
        adapted = ""
        if (target := args.harmless_retain_target) is not None:
            adapted = f" to begin with, adapted in each language to a mean of {target:g}"
        elif (target := args.harmless_refusal_target) is not None:
            adapted = f" to begin with, adapted in each language until {100 * target:g} % of their prompts are refused"
        uses.append(
            f"{RETENTIONS[args.harmless_retention]} held with weight {args.harmless_retain_weight:g}{adapted}"
        )
    if args.harmless_share is not None:
        uses.append(f"{args.harmless_share:.0%} of each step")
    if own.keeps_tokens:
        groups = plan.tokenized.select(np.flatnonzero(found))
        cached = cache_bytes(groups, needed_for(own), plan.config.get_text_config().hidden_size)
        uses.append(f"{size(cached)} of reference cache in {args.reference_folder()}")
    return {"Harmless": f"{found.sum()} of these groups: {'; '.join(uses) or 'not trained on'}"}


def _probe(plan: Plan) -> str:
    """What the model is asked, and how much it may write in answer."""
    training, prompts = plan.recipe.training, plan.probe
    if prompts is None:
        return "nothing is asked"
    harmful, harmless = prompts.per_language
    times = 2
    if (every := training.probe_every(plan.steps)) is not None:
        times += plan.steps // every
    count = len(prompts.prompts)
    return (
        f"{counted(count, 'prompt')} ({harmful} harmful and {harmless} harmless ones in each of "
        f"{counted(len(prompts.languages), 'language')}) before and after"
        + (f" and every {counted(every, 'step')}" if every is not None else "")
        + f", up to {times * count * training.probe_max_new_tokens:,} new tokens"
    )


def _kind(recipe: Recipe) -> str:
    model = recipe.model
    name = "DoRA" if model.use_dora else "rsLoRA" if model.use_rslora else "LoRA"
    targets = listed_modules(model.lora_target_modules)
    first = model.lora_first_layer
    above = (
        ""
        if not first
        else f", from layer {first:g} up"
        if first >= 1
        else f", above {first:.0%} of the layers"
    )
    return f"{'Q' if model.load_in_4bit else ''}{name} r={model.lora_r}, alpha={model.lora_alpha} on {targets}{above}"


def _length(recipe: Recipe) -> str:
    training = recipe.training
    return "max_steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"


def _step_size(recipe: Recipe) -> str:
    training = recipe.training
    if training.max_tokens_per_batch is not None:
        return f"up to {training.max_tokens_per_batch:,} tokens"
    groups = training.per_device_train_batch_size
    each = training.world_size * groups * training.gradient_accumulation_steps
    return f"{counted(each, 'group')} each: {groups}"


def _precision(recipe: Recipe) -> str:
    name = PRECISIONS[half_precision(recipe)]
    return "float32" if name == "fp32" else f"{name} mixed precision"


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
