"""``mpo plan``: on which GPUs a recipe fits, how it is launched there, and for how long it would run."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PretrainedConfig

from mpo.common.machine import accelerators
from mpo.common.recipe_files import recipe_folder
from mpo.common.tables import TextTable, fact_lines
from mpo.common.words import counted, magnitude, rough_duration
from mpo.errors import ConfigError, ModelError
from mpo.jobs.preflight.data import load_data
from mpo.jobs.preflight.model import new_adapter_config
from mpo.modeling.layout import BATCH_TOKENS_DEFAULT
from mpo.modeling.loading import ModelSource, load_config, load_tokenizer, pick_attention, translate_error
from mpo.planning.fitting import Choice, best, choices, row_lengths
from mpo.planning.known_models import shape_config
from mpo.planning.memory import GB, Sharding, Training, describe
from mpo.planning.throughput import efficiency, reference_flops, sent_per_step, step_flops
from mpo.training.recipe import Recipe
from mpo.training.workload import (
    Schedule,
    Workload,
    assume_work,
    count_work,
    largest_micro_batch,
    schedule,
    tokenize_for_training,
)


@dataclass(frozen=True)
class Machine:
    """Where a recipe would run: GPUs over all nodes, GB of each, and GPUs of a node."""

    gpus: int
    gpu_memory: float
    gpus_per_node: int

    def __post_init__(self) -> None:
        _require_positive(self, "gpus", "gpu_memory", "gpus_per_node")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ConfigError(
                f"`--gpus` is {self.gpus}, which is not a multiple of the {self.gpus_per_node} GPUs of a machine "
                "(`--gpus_per_node`)."
            )

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    def __str__(self) -> str:
        return f"{self.gpus} x {self.gpu_memory:g} GB"


def machine_or_this(gpus: int | None, gpu_memory: float | None, gpus_per_node: int) -> Machine:
    """The machine that is asked about: what is not said of it is as on this one, or 8 GPUs of 80 GB where this has none.

    Args:
        gpus: GPUs over all machines.
        gpu_memory: GB of each.
        gpus_per_node: GPUs of a machine.
    """
    here = [device.memory / GB for device in accelerators() if device.memory is not None]
    if gpu_memory is None:
        # Of different cards the smallest decides: the model is divided evenly.
        gpu_memory = round(min(here), 1) if here else 80
    if gpus is None:
        gpus = len(here) or 8
        if not here:
            print(
                "This machine has no GPU that torch can use, so 8 are assumed; --gpus and --gpu_memory say otherwise.\n"
            )
    return Machine(gpus, gpu_memory, gpus_per_node)


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted: the options of ``mpo plan`` of these names, whose help explains them."""

    model: str | None = None
    peak_tflops: float = 312
    utilisation: float = 0.35
    groups: int = 100
    targets: int = 6
    tree_tokens: int = 650
    node_bandwidth: float = 300
    network_bandwidth: float = 25

    def __post_init__(self) -> None:
        _require_positive(
            self, "peak_tflops", "groups", "targets", "tree_tokens", "node_bandwidth", "network_bandwidth"
        )
        if not 0 < self.utilisation <= 1:
            raise ConfigError(
                f"`--utilisation` is {self.utilisation:g}; expected a share above 0 and at most 1."
            )


def _require_positive(options: Any, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise ConfigError(f"`--{name}` is {getattr(options, name):g}; expected a number above 0.")


def compare(recipe: Recipe, machines: Sequence[Machine], assumed: Assumptions) -> str:
    """A table of several machines: the best way to run on each.

    Raises:
        MPOError: Model or data cannot be used.
    """
    fit = Fit(recipe, assumed)
    rows = []
    for machine in machines:
        chosen = best(fit.choices(machine), fit.needed)
        if chosen is None:
            rows.append((str(machine), "nothing fits", *["-"] * 6))
            continue
        run = fit.schedule(machine.gpus)
        rows.append(
            (
                str(machine),
                chosen.sharding.name,
                "yes" if chosen.training.checkpointing else "no",
                f"{chosen.memory.total / GB:.1f}",
                f"{chosen.memory.main_memory / GB:.1f}",
                f"{chosen.tokens:,}",
                f"{run.steps:,}",
                rough_duration(fit.seconds(chosen.training, machine.gpus, run.epochs)),
            )
        )
    table = TextTable(
        title="The best way to run on each machine, with the largest micro-batch that fits",
        header=("Machine", "Divided by", "Recomputed", "GB", "Main memory", "Tokens", "Steps", "Time"),
        rows=tuple(rows),
        notes=(
            "GB: of each GPU. Main memory: GB per GPU that wait there. Tokens: of a micro-batch on each GPU.",
            f"Time: at {fit.speed}; longer with weights in main memory.",
        ),
    )
    return f"{fact_lines(fit.facts)}\n\n{table.plain()}"


def report(recipe: Recipe, machine: Machine, assumed: Assumptions, *, scaling: bool = False) -> str:
    """Every way to run on one machine and, of the best, steps, time and the command that launches it.

    Args:
        recipe: What would be trained.
        machine: Where.
        assumed: What is taken for granted.
        scaling: Also show the efficiency of the best way on 1 to 1024 GPUs.

    Raises:
        MPOError: Model or data cannot be used.
    """
    return planned(recipe, machine, assumed, scaling=scaling).text


@dataclass(frozen=True)
class Planned:
    """A plan for one machine.

    Attributes:
        text: The report.
        choice: The best way to run; None where nothing fits.
        launch: The command that does so.
    """

    text: str
    choice: Choice | None = None
    launch: str | None = None


def planned(recipe: Recipe, machine: Machine, assumed: Assumptions, *, scaling: bool = False) -> Planned:
    """As :func:`report`, with what it recommends."""
    fit = Fit(recipe, assumed)
    found = fit.choices(machine)
    table = TextTable(
        title=f"GB on each of {counted(machine.gpus, 'GPU')} of {machine.gpu_memory:g} GB, with the largest micro-batch "
        "that fits",
        header=tuple(_columns(found[0])),
        rows=tuple(tuple(_columns(choice).values()) for choice in found),
        notes=(
            "Total: the larger of the step and the reference pass, with 2.5 GB for CUDA and 5 % lost to fragmentation.",
            "Main memory: GB per GPU that wait there. Tokens: of a micro-batch on each GPU; 0 does not fit.",
        ),
    )
    where = f"{machine} on {machine.nodes} nodes" if machine.nodes > 1 else str(machine)
    parts = [
        fact_lines(fit.facts | {"Machine" if machine.nodes == 1 else "Machines": where}),
        table.plain(),
    ]
    chosen = best(found, fit.needed)
    if chosen is None:
        parts.append(
            "Nothing fits. More GPUs, larger ones, an adapter (`--use_peft true`) or a smaller model would."
        )
        return Planned("\n\n".join(parts))
    outcome = fit.outcome(chosen, machine)
    parts.append(fact_lines(outcome))
    if scaling:
        parts.append(fit.scaling(chosen, machine.gpus_per_node).plain())
    return Planned("\n\n".join(parts), chosen, outcome["Launch"])


class Fit:
    """A recipe's model and work, and what follows from them for machines."""

    def __init__(self, recipe: Recipe, assumed: Assumptions) -> None:
        self.recipe = recipe
        self.assumed = assumed
        self.work, self.data = _work(recipe, assumed)
        self.name = assumed.model or str(recipe.model.model_name_or_path)
        self.adapter = new_adapter_config(recipe) if recipe.model.trains_adapter else None

    @cached_property
    def training(self) -> Training:
        """What is trained, as :mod:`mpo.planning` takes it."""
        model, args = self.recipe.model, self.recipe.training
        config = _config(self.name, bool(args.trust_remote_code))
        # Not what this machine has, but what the recipe asks of another one.
        half = bool(self.recipe.given.get("bf16") or self.recipe.given.get("fp16"))
        attention = pick_attention(config, model.attn_implementation, layout=args.batch_layout, gpu=True)
        return describe(
            config,
            adapter=self.adapter,
            name=self.name,
            half=half,
            bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else 16 if half else 32,
            attention=attention or "sdpa",
            tree_tokens=max(1, round(self.work.mean_tree)),
            reference_tokens=args.reference_tokens_per_batch or BATCH_TOKENS_DEFAULT,
            accumulates=args.gradient_accumulation_steps > 1,
        )

    @property
    def facts(self) -> dict[str, str]:
        training = self.training
        what = f"an adapter of {training.trained / 1e6:.1f}M" if training.adapter else "all weights"
        if training.adapter and self.recipe.model.lora_first_layer:
            what += " (counted in all layers)"
        precision = "bf16" if training.half else "float32"
        base = f", base in {training.bits} bits" if training.bits < 16 else ""
        return {
            "Model": f"{self.name} ({magnitude(training.parameters)} parameters)",
            "Training": f"{what}, {precision}{base}, attention {training.attention}",
            "Data": self.data,
        }

    @property
    def needed(self) -> int:
        """Tokens of the largest micro-batch."""
        return largest_micro_batch(self.work.group_tokens, self.recipe.training)

    @property
    def rows(self) -> list[int]:
        """Lengths of packed rows to try."""
        return row_lengths(self.recipe.training.max_tokens_per_row, self.training.attention)

    @property
    def speed(self) -> str:
        return f"{self.assumed.utilisation:.0%} of {self.assumed.peak_tflops:g} TFLOP/s per GPU"

    def choices(self, machine: Machine) -> list[Choice]:
        """Each way to divide the model there."""
        given = self.recipe.given.get("gradient_checkpointing")
        # A group that is divided as far as it can be: one target and, where sources are run, its source.
        least = math.ceil(self.work.mean_tree * (2 if self.recipe.training.runs_sources else 1))
        return choices(
            self.training,
            machine.gpus,
            machine.gpu_memory * GB,
            self.adapter,
            needed=self.needed,
            least=least,
            rows=self.rows,
            checkpointing=None if given is None else bool(given),
        )

    def schedule(self, gpus: int) -> Schedule:
        """Steps on so many GPUs, as the trainer takes them."""
        return schedule(self.work.group_tokens, self.recipe.training, gpus, self.work.harmless)

    def seconds(self, training: Training, gpus: int, epochs: float) -> float:
        """Time of the reference pass and of so many epochs."""
        context = self.work.mean_tree / 2  # a token attends to half of its tree, on average
        work = step_flops(training, self.work.tokens * epochs, context)
        work += reference_flops(training, self.work.reference_tokens, context)
        return work / (gpus * self._flops_per_second)

    @property
    def _flops_per_second(self) -> float:
        return self.assumed.peak_tflops * 1e12 * self.assumed.utilisation

    def outcome(self, choice: Choice, machine: Machine) -> dict[str, str]:
        """Steps, time, communication and command of a way to run."""
        sharding, training, budget = choice.sharding, choice.training, choice.tokens
        gpus = machine.gpus
        run = self.schedule(gpus)
        facts = {
            "Best": f"{sharding.name}: a micro-batch of {budget:,} tokens on each GPU"
            + (f", in rows of {choice.row:,}" if choice.row < budget else "")
            + (", activations recomputed" if training.checkpointing else ", activations kept")
        }
        facts |= self._advice(budget, training, splits=self._splits(gpus, sharding))
        facts["Steps"] = (
            f"{run.steps:,} optimizer steps, {self.work.tokens * run.epochs:,.0f} tokens in {run.epochs:g} epochs"
        )
        facts["Time"] = f"{rough_duration(self.seconds(training, gpus, run.epochs))} at {self.speed}" + (
            ", longer with weights in main memory" if sharding.offload else ""
        )
        sent = sent_per_step(training, sharding, gpus, self.recipe.training.gradient_accumulation_steps)
        facts["Sent"] = f"{sent / GB:.3g} GB by each GPU in a step" if gpus > 1 else "nothing"
        facts["Launch"] = launch_command(self.recipe, choice, machine, self.rows[0])
        return facts

    def _splits(self, gpus: int, sharding: Sharding) -> bool:
        """Whether a micro-batch may be several model calls, which leave no gradients that the plan has not counted."""
        text = self.training.config.get_text_config()
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
        return bool(
            gpus == 1
            and sharding.engine == "torch"
            and self.training.adapter
            and not self.recipe.given.get("fp16")
            and not experts
        )

    def _advice(self, budget: int, training: Training, *, splits: bool) -> dict[str, str]:
        """What to change where a micro-batch is too large for the machine, or could be larger."""
        args = self.recipe.training
        largest, micro = int(self.work.group_tokens.max()), args.per_device_train_batch_size
        by_tokens = args.max_tokens_per_batch
        if splits and args.max_tokens_per_call is not None and args.max_tokens_per_call <= budget:
            return {}
        if self.needed > budget:
            of = "" if by_tokens else f" of {counted(micro, 'group')}"
            trees = max(1, int(budget / max(1.0, self.work.mean_tree)) - 1)
            ways = [f"Divide groups with `max_targets_per_group: {trees}`"]
            if by_tokens and largest <= budget:
                ways = [f"Set `max_tokens_per_batch: {budget}`"]
            elif splits:
                ways = [f"Set `max_tokens_per_call: {budget}`, which changes nothing else"]
            elif not by_tokens and largest <= budget:
                fewer = budget // largest
                again = math.ceil(micro / fewer) * args.gradient_accumulation_steps
                ways = [
                    f"Set `per_device_train_batch_size: {fewer}` and `gradient_accumulation_steps: {again}`"
                ]
            if not training.checkpointing:
                ways.append("set `gradient_checkpointing: true`")
            return {"Note": f"a micro-batch{of} has up to {self.needed:,} tokens. {', or '.join(ways)}"}
        if args.max_steps > 0:
            return {}  # larger steps would be as many
        if by_tokens and budget > by_tokens:
            return {"Room": f"for `max_tokens_per_batch: {budget}`, which makes steps fewer and larger"}
        if not by_tokens and budget >= 2 * largest and micro < budget // largest:
            return {
                "Room": f"for `per_device_train_batch_size: {budget // largest}`, which makes steps fewer and larger"
            }
        return {}

    def scaling(self, choice: Choice, gpus_per_node: int) -> TextTable:
        """Communication and efficiency of a way to run on 1 to 1024 GPUs."""
        assumed, args = self.assumed, self.recipe.training
        sharding, training = choice.sharding, choice.training
        tokens = self.work.tokens / self.work.groups * args.per_device_train_batch_size
        if args.max_tokens_per_batch is not None:
            tokens = self.work.tokens / self.schedule(1).micro_batches
        seconds = step_flops(training, tokens, self.work.mean_tree / 2) / self._flops_per_second
        rows = []
        for gpus in (1, 8, 16, 64, 256, 1024):
            link = (assumed.node_bandwidth if gpus <= gpus_per_node else assumed.network_bandwidth) * GB
            sent = sent_per_step(training, sharding, gpus) if gpus > 1 else 0.0
            rows.append(
                (
                    f"{gpus:,}",
                    f"{sent / GB:.1f}",
                    f"{sent / link:.2f}",
                    f"{efficiency(seconds, sent, link, 0.0):.0%}",
                    f"{efficiency(seconds, sent, link, 0.8):.0%}",
                    f"{tokens * gpus:,.0f}",
                )
            )
        return TextTable(
            title=f"{sharding.name} on more GPUs: {seconds:.2f} s of computing per step on each, {tokens:,.0f} tokens",
            header=("GPUs", "GB sent", "Seconds", "Efficiency", "80 % hidden", "Tokens a step"),
            rows=tuple(rows),
            notes=(
                f"Sent over {assumed.node_bandwidth:g} GB/s inside a machine, {assumed.network_bandwidth:g} GB/s between "
                "machines; the tokens of a GPU stay the same.",
            ),
        )


def launch_command(recipe: Recipe, choice: Choice, machine: Machine, default_row: int) -> str:
    """The command that launches a way to run, from a checkout of the project or from an installation.

    Args:
        recipe: What is trained.
        choice: How.
        machine: Where.
        default_row: Length of a packed row that needs no saying.
    """
    sharding = choice.sharding
    words = ["accelerate launch"]
    if machine.nodes == 1:
        words += [_config_file(sharding.config), f"--num_processes {machine.gpus}"]
    else:
        config = sharding.config
        if sharding.multi_node:
            config = config.replace(".yaml", "_multi_node.yaml")
        words += [
            _config_file(config),
            f"--num_machines {machine.nodes} --num_processes {machine.gpus}",
        ]
        if sharding.engine == "deepspeed" and not sharding.multi_node:
            # Without it Accelerate asks for pdsh and a file of hosts.
            words += ["--deepspeed_multinode_launcher standard"]
        words += ["--machine_rank RANK --main_process_ip ADDRESS --main_process_port 29500"]
    script = ["scripts/train.py"] if os.path.isfile("scripts/train.py") else ["-m", "mpo.cli", "train"]
    script += [str(recipe.source_path)]
    if choice.row != default_row:
        script += ["--max_tokens_per_row", str(choice.row)]
    return " ".join([*words, shlex.join([*script, *recipe.overrides])])


def _config_file(name: str) -> str:
    packaged, near = recipe_folder(), f"recipes/accelerate/{name}"
    if packaged is not None and not os.path.isfile(near):
        near = shlex.quote(str(packaged / "accelerate" / name))
    return f"--config_file {near}"


def _columns(choice: Choice) -> dict[str, str]:
    """A row of the table of one machine."""
    held = choice.memory
    before = {
        "Weights": held.weights,
        "Gradients": held.gradients,
        "Optimizer": held.optimizer,
        "Buffers": held.buffers,
        "Activations": max(held.forward, held.activations + held.layer),
    }
    after = {
        "LM head": held.lm_head,
        "Reference": held.reference,
        "Total": held.total,
        "Main memory": held.main_memory,
    }
    return {
        "Divided by": choice.sharding.name,
        **{name: f"{value / GB:.1f}" for name, value in before.items()},
        "Recomputed": "yes" if choice.training.checkpointing else "no",
        **{name: f"{value / GB:.1f}" for name, value in after.items()},
        "Tokens": f"{choice.tokens:,}",
    }


def _config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """From a folder, which needs no weights; by its size, without a network; else from the Hub or its cache."""
    if os.path.isdir(name):
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except Exception as error:  # what libraries raise at a damaged file is anything
            raise translate_error(name, "configuration", error) from error
        return config
    try:
        return shape_config(name)
    except ModelError:
        return load_config(ModelSource(name, None, trust_remote_code))


def _work(recipe: Recipe, assumed: Assumptions) -> tuple[Workload, str]:
    """The recipe's work, counted where its data and tokenizer are at hand, else assumed; and a sentence that says so."""
    data, args = recipe.data, recipe.training
    files = [
        name
        for value in (data.dataset, data.eval_dataset)
        for name in ([value] if isinstance(value, str) else value or [])
    ]
    source = ModelSource(
        str(recipe.model.model_name_or_path), recipe.model.model_revision, bool(args.trust_remote_code)
    )
    if files and all(map(os.path.isfile, files)) and _has_tokenizer(source):
        try:
            tokenizer = load_tokenizer(source, args.chat_template)
        except ModelError:
            pass
        else:
            loaded, train, _, _ = load_data(recipe)
            work = count_work(tokenize_for_training(train, tokenizer, args)[0], args)
            return (
                work,
                f"{loaded.origin}: {work.groups:,} groups, {work.pairs:,} pairs, {work.tokens:,} tokens per epoch",
            )
    work = assume_work(args, sources=assumed.groups, targets=assumed.targets, tree_tokens=assumed.tree_tokens)
    origin = data.dataset if isinstance(data.dataset, str) else "the data"
    most = int(work.group_tokens.max()) // assumed.tree_tokens - args.runs_sources
    return work, (
        f"assumed, since {origin} or its tokenizer is not here: {work.groups:,} groups of "
        f"{'' if work.pairs == most * work.groups else 'up to '}{counted(most, 'pair')}, "
        f"{assumed.tree_tokens:,} tokens per tree{'' if work.harmless is None else f', {work.harmless.mean():.0%} of them harmless'}"
    )


def _has_tokenizer(source: ModelSource) -> bool:
    """Whether a tokenizer is on this machine, in the model's folder or the Hub's cache."""
    if os.path.isdir(source.name):
        return True
    try:
        return isinstance(
            try_to_load_from_cache(source.name, "tokenizer_config.json", revision=source.revision), str
        )
    except HFValidationError:
        return False
