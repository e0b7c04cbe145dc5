"""``mpo plan``: on which GPUs a recipe fits, how it is launched there, and for how long it would run."""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mpo.planning.capacity import Choice, Sharding, Training
    from mpo.training.recipe import Recipe

_SMALLEST_ROW = 512


def register(commands: Any) -> None:
    """Add the command to the ``argparse`` sub-parsers ``commands``."""
    plan = commands.add_parser(
        "plan",
        help="which GPUs a recipe fits on, how to launch it there, and how long it takes",
        description="Work out, without weights, what each GPU would hold under every way to divide the model, the largest "
        "micro-batch that fits, and the time. Keys of the recipe can be changed behind it, as with `mpo train`.",
        usage="mpo plan RECIPE (--gpus N --gpu_memory GB | --machines NxGB ...) [options] [--key value ...]",
        allow_abbrev=False,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, for example recipes/llama_full.yaml")
    plan.add_argument("--gpus", type=int, default=8, help="GPUs over all machines (default 8)")
    plan.add_argument("--gpu_memory", "--gpu-memory", type=float, default=80, help="GB of each (default 80)")
    plan.add_argument(
        "--machines",
        nargs="+",
        metavar="NxGB",
        help="compare these instead, a line each: 1x24 8x80 is one GPU of 24 GB and eight of 80 GB",
    )
    plan.add_argument("--gpus_per_node", type=int, default=8, help="GPUs of a machine (default 8)")
    plan.add_argument(
        "--model", help="other model: folder with a config.json, or a known size such as llama-3.1-70b"
    )
    plan.add_argument(
        "--peak_tflops",
        type=float,
        default=312,
        help="peak of a GPU in bf16 (default 312, an A100; H100: 989)",
    )
    plan.add_argument(
        "--utilisation", type=float, default=0.35, help="share of the peak that is reached (default 0.35)"
    )
    plan.add_argument(
        "--groups", type=int, default=100, help="sources, where the data are not at hand (default 100)"
    )
    plan.add_argument(
        "--targets", type=int, default=6, help="target languages of each source, likewise (default 6)"
    )
    plan.add_argument(
        "--tree_tokens",
        type=int,
        default=650,
        help="tokens of prompt and both responses, likewise (default 650)",
    )
    plan.add_argument(
        "--node_bandwidth", type=float, default=300, help="GB/s between GPUs of a machine (default 300)"
    )
    plan.add_argument(
        "--network_bandwidth", type=float, default=25, help="GB/s of a GPU to others (default 25)"
    )
    plan.add_argument("--scaling", action="store_true", help="also show the efficiency from 1 to 1024 GPUs")
    plan.set_defaults(run=_run, rest=[])


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.training.recipe import load_recipe, recipe_fields

    machines = [_machine(text) for text in arguments.machines or []]
    for gpus, gpu_memory in machines or [(arguments.gpus, arguments.gpu_memory)]:
        arguments.gpus, arguments.gpu_memory = gpus, gpu_memory
        _check(arguments)
    _check_spelling(arguments, recipe_fields())
    recipe = load_recipe(arguments.recipe, arguments.rest)
    print(compare(recipe, machines, arguments) if machines else report(recipe, arguments))
    return 0


def _check_spelling(arguments: argparse.Namespace, keys: Collection[str]) -> None:
    """Names the option that a misspelt one was meant to be; what else is no key of a recipe, the recipe says."""
    for word in arguments.rest:
        name = word.removeprefix("--").partition("=")[0].partition(".")[0]
        near = difflib.get_close_matches(name, vars(arguments), n=1, cutoff=0.8)
        if word.startswith("--") and name not in keys and near:
            raise ConfigError(
                f"`--{name}` is neither an option of `mpo plan` nor a key of a recipe; did you mean `--{near[0]}`?"
            )


def _machine(text: str) -> tuple[int, float]:
    gpus, _, gpu_memory = text.lower().partition("x")
    try:
        return int(gpus), float(gpu_memory)
    except ValueError:
        raise ConfigError(
            f"`--machines` has '{text}'; expected a number of GPUs and the GB of each, such as 8x80."
        ) from None


def _check(arguments: argparse.Namespace) -> None:
    for name in ("gpus", "gpu_memory", "gpus_per_node", "peak_tflops", "groups", "targets", "tree_tokens"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"`--{name}` is {getattr(arguments, name):g}; expected a number above 0.")
    if not 0 < arguments.utilisation <= 1:
        raise ConfigError(
            f"`--utilisation` is {arguments.utilisation:g}; expected a share above 0 and at most 1."
        )
    if arguments.gpus > arguments.gpus_per_node and arguments.gpus % arguments.gpus_per_node:
        raise ConfigError(
            f"`--gpus` is {arguments.gpus}, which is not a multiple of the {arguments.gpus_per_node} GPUs of a machine "
            "(`--gpus_per_node`)."
        )


def compare(recipe: Recipe, machines: list[tuple[int, float]], arguments: argparse.Namespace) -> str:
    """The text of the command for several machines: the best way to run on each."""
    from mpo.common.tables import TextTable
    from mpo.planning.capacity import GB, best

    data = _data(recipe, arguments)
    described = _describe(recipe, arguments.model, data)
    rows = []
    for gpus, gpu_memory in machines:
        found = _choices(recipe, described, data, gpus, gpu_memory)
        chosen = best(found, _needed(recipe, data))
        machine = f"{gpus} x {gpu_memory:g} GB"
        if chosen is None:
            rows.append((machine, "nothing fits", *["-"] * 6))
            continue
        steps, _ = _steps(recipe, data, gpus)
        rows.append(
            (
                machine,
                chosen.sharding.name,
                "yes" if chosen.training.checkpointing else "no",
                f"{chosen.memory.total / GB:.1f}",
                f"{chosen.memory.main_memory / GB:.1f}",
                f"{chosen.tokens:,}",
                f"{steps:,}",
                _duration(_seconds(recipe, chosen.training, data, gpus, arguments)),
            )
        )
    training, _, name = described
    table = TextTable(
        title="The best way to run on each machine, with the largest micro-batch that fits",
        header=("Machine", "Divided by", "Recomputed", "GB", "Main memory", "Tokens", "Steps", "Time"),
        rows=tuple(rows),
        notes=(
            "GB: of each GPU. Main memory: GB per GPU that wait there. Tokens: of a micro-batch on each GPU.",
            f"Time: at {arguments.utilisation:.0%} of {arguments.peak_tflops:g} TFLOP/s per GPU; longer with weights in "
            "main memory.",
        ),
    )
    return f"{_lines(_facts(name, training, data))}\n\n{table.plain()}"


def report(recipe: Recipe, arguments: argparse.Namespace) -> str:
    """The text of the command for one machine: every way to run there."""
    from mpo.common.tables import TextTable
    from mpo.planning.capacity import best

    data = _data(recipe, arguments)
    training, _, name = described = _describe(recipe, arguments.model, data)
    gpus = arguments.gpus
    nodes = math.ceil(gpus / arguments.gpus_per_node)
    choices = _choices(recipe, described, data, gpus, arguments.gpu_memory)
    table = TextTable(
        title=f"GB on each of {gpus} GPU{'s' if gpus > 1 else ''} of {arguments.gpu_memory:g} GB, with the largest "
        "micro-batch that fits",
        header=(
            "Divided by",
            "Weights",
            "Gradients",
            "Optimizer",
            "Buffers",
            "Activations",
            "Recomputed",
            "LM head",
            "Reference",
            "Total",
            "Main memory",
            "Tokens",
        ),
        rows=tuple(map(_row, choices)),
        notes=(
            "Total: the larger of the step and the reference pass, with 2.5 GB for CUDA and 5 % lost to fragmentation.",
            "Main memory: GB per GPU that wait there. Tokens: of a micro-batch on each GPU; 0 does not fit.",
        ),
    )
    facts = _facts(name, training, data) | {
        "Machine" if nodes == 1 else "Machines": f"{gpus} x {arguments.gpu_memory:g} GB"
        + (f" on {nodes} nodes" if nodes > 1 else "")
    }
    parts = [_lines(facts), table.plain()]
    chosen = best(choices, _needed(recipe, data))
    if chosen is None:
        parts.append(
            "Nothing fits. More GPUs, larger ones, an adapter (`--use_peft true`) or a smaller model would."
        )
        return "\n\n".join(parts)
    parts.append(_lines(_outcome(recipe, chosen, data, arguments, nodes)))
    if arguments.scaling:
        parts.append(_scaling(chosen, data, recipe, arguments).plain())
    return "\n\n".join(parts)


def _facts(name: str, training: Training, data: _Data) -> dict[str, str]:
    return {
        "Model": f"{name} ({training.parameters / 1e9:.2f}B parameters)",
        "Training": _kind(training),
        "Data": data.text,
    }


def _needed(recipe: Recipe, data: _Data) -> int:
    """Tokens of the largest micro-batch."""
    return data.group_tokens * max(1, recipe.training.per_device_train_batch_size)


def _least(recipe: Recipe, data: _Data) -> int:
    """Tokens of a group that is divided as far as it can be: one target and, where it is held still, its source."""
    return math.ceil(data.tree_tokens * (2 if recipe.training.runs_sources else 1))


def _choices(
    recipe: Recipe, described: tuple[Training, Any, str], data: _Data, gpus: int, gpu_memory: float
) -> list[Choice]:
    """Under each sharding, the row length, and whether to recompute activations, with which the most tokens fit."""
    from mpo.planning.capacity import GB, SHARDINGS, Choice, largest_budget, possible

    training, adapter, _ = described
    least = _least(recipe, data)
    needed = max(least, _needed(recipe, data))
    choices = []
    for sharding in (s for s in SHARDINGS if possible(s, training, gpus)):
        found: Choice | None = None
        for recomputes in _recomputations(recipe, sharding):
            if found is not None and found.tokens >= needed:
                break
            variant = replace(training, checkpointing=recomputes)
            for row in _row_lengths(recipe, training.attention):
                tokens, held = largest_budget(
                    variant, sharding, gpus, gpu_memory * GB, row, adapter, needed, least
                )
                if found is None or tokens > found.tokens:
                    found = Choice(sharding, variant, row, tokens, held)
        assert found is not None
        choices.append(found)
    return choices


def _lines(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in facts.items())


def _row(choice: Choice) -> tuple[str, ...]:
    held = choice.memory
    activations = max(held.forward, held.activations + held.layer)
    before = (held.weights, held.gradients, held.optimizer, held.buffers, activations)
    after = (held.lm_head, held.reference, held.total, held.main_memory)
    return (
        choice.sharding.name,
        *(f"{value / 1e9:.1f}" for value in before),
        "yes" if choice.training.checkpointing else "no",
        *(f"{value / 1e9:.1f}" for value in after),
        f"{choice.tokens:,}" if choice.tokens else "0",
    )


def _recomputations(recipe: Recipe, sharding: Sharding) -> list[bool]:
    """Whether activations are recomputed: as the recipe says, else as the trainer decides."""
    given = recipe.given.get("gradient_checkpointing")
    if given is not None:
        return [bool(given)]
    return [False, True] if sharding.engine == "torch" else [True]


def _row_lengths(recipe: Recipe, attention: str) -> list[int]:
    from mpo.modeling.layout import ROW_TOKENS_DEFAULT, ROW_TOKENS_TREE_ATTENTION
    from mpo.modeling.tree_attention import IMPLEMENTATION

    given = recipe.training.max_tokens_per_row
    if given is not None:
        return [given]
    if attention == IMPLEMENTATION:
        return [ROW_TOKENS_TREE_ATTENTION]
    lengths = [ROW_TOKENS_DEFAULT]
    while lengths[-1] > _SMALLEST_ROW:
        lengths.append(lengths[-1] // 2)
    return lengths


# --------------------------------------------------------------------------------------------------------------- model


def _describe(recipe: Recipe, other: str | None, data: _Data) -> tuple[Training, Any, str]:
    from mpo.jobs.preflight import new_adapter_config
    from mpo.modeling.layout import BATCH_TOKENS_DEFAULT
    from mpo.modeling.loading import pick_attention
    from mpo.planning.capacity import describe

    model, training = recipe.model, recipe.training
    name = other or str(model.model_name_or_path)
    config = _config(name, bool(training.trust_remote_code))
    adapter = new_adapter_config(recipe) if model.trains_adapter else None
    half = bool(recipe.given.get("bf16") or recipe.given.get("fp16"))
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else 16 if half else 32
    attention = pick_attention(config, model.attn_implementation, layout=training.batch_layout, gpu=True)
    described = describe(
        config,
        adapter=adapter,
        name=name,
        half=half,
        bits=bits,
        attention=attention or "sdpa",
        tree_tokens=max(1, round(data.tree_tokens)),
        reference_tokens=training.reference_tokens_per_batch or BATCH_TOKENS_DEFAULT,
        accumulates=training.gradient_accumulation_steps > 1,
    )
    return described, adapter, name


def _config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """From a folder, which needs no weights; by its size, without a network; else from the Hub or its cache."""
    from transformers import AutoConfig

    from mpo.modeling.loading import ModelSource, load_config, translate_error
    from mpo.planning.shapes import shape_config

    if Path(name).is_dir():
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise translate_error(name, "configuration", error) from error
        return config
    try:
        return shape_config(name)
    except ModelError:
        return load_config(ModelSource(name, None, trust_remote_code))


def _kind(training: Training) -> str:
    what = f"an adapter of {training.trained / 1e6:.1f}M" if training.adapter else "all weights"
    precision = "bf16" if training.half else "float32"
    base = f", base in {training.bits} bits" if training.bits < 16 else ""
    return f"{what}, {precision}{base}, attention {training.attention}"


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class _Data:
    """Groups and tokens of an epoch; ``group_tokens`` of the largest group, ``tree_tokens`` of a mean tree."""

    text: str
    groups: int
    pairs: int
    tokens: int
    source_tokens: int
    group_tokens: int
    tree_tokens: float


def _data(recipe: Recipe, arguments: argparse.Namespace) -> _Data:
    counted = _counted(recipe)
    if counted is not None:
        return counted
    groups, targets, tree = arguments.groups, arguments.targets, arguments.tree_tokens
    per_group = (targets + 1) * tree
    if not recipe.training.group_by_source:
        groups, targets, per_group = groups * targets, 1, 2 * tree
    origin = recipe.data.dataset
    return _Data(
        text=f"assumed, since {origin if isinstance(origin, str) else 'the data'} or its tokenizer is not here: "
        f"{groups:,} groups of {targets} pair{'s' if targets > 1 else ''}, {tree:,} tokens per tree",
        groups=groups,
        pairs=groups * targets,
        tokens=groups * per_group,
        source_tokens=arguments.groups * tree,
        group_tokens=per_group,
        tree_tokens=tree,
    )


def _counted(recipe: Recipe) -> _Data | None:
    """The recipe's data in the model's own tokens, where both are at hand."""
    from mpo.data import load_groups, split_by_source
    from mpo.data.tokenization import tokenize_groups
    from mpo.modeling.loading import ModelSource, load_tokenizer

    data, training = recipe.data, recipe.training
    names = [data.dataset] if isinstance(data.dataset, str) else list(data.dataset or [])
    model = str(recipe.model.model_name_or_path)
    if not names or not all(os.path.isfile(name) for name in names) or not os.path.isdir(model):
        return None
    try:
        tokenizer = load_tokenizer(ModelSource(model), training.chat_template)
    except ModelError:
        return None
    loaded = load_groups(
        data.dataset,
        split=data.dataset_split,
        limit=data.limit,
        source_language=training.source_language,
        bad_rows=training.bad_rows,
        languages=data.languages,
    )
    train = loaded.groups
    if data.eval_dataset is None:
        train, _ = split_by_source(loaded.groups, data.held_out, data.held_out_seed)
    kwargs = training.chat_template_kwargs
    tokenized, _ = tokenize_groups(
        train,
        tokenizer,
        max_length=training.max_length,
        max_response_length=training.max_response_length,
        template_kwargs=kwargs if isinstance(kwargs, dict) else None,
        bad_rows=training.bad_rows,
        group_by_source=training.group_by_source,
        max_targets_per_group=training.max_targets_per_group,
        name="train",
    )
    sizes, sources, pairs = [], 0, 0
    for row in tokenized.with_format(None):
        source = sum(len(row[f"source_{part}"]) for part in ("prompt", "chosen", "rejected"))
        targets = zip(row["target_prompt"], row["target_chosen"], row["target_rejected"], strict=True)
        sources += source
        pairs += len(row["target_prompt"])
        sizes.append(
            (source if training.runs_sources else 0) + sum(len(part) for tree in targets for part in tree)
        )
    if not sizes:
        raise DataError("nothing is left to train on; `--dry_run` says why.")
    return _Data(
        text=f"{loaded.origin}: {len(sizes):,} groups, {pairs:,} pairs, {sum(sizes):,} tokens per epoch",
        groups=len(sizes),
        pairs=pairs,
        tokens=sum(sizes),
        source_tokens=sources,
        group_tokens=max(sizes),
        tree_tokens=sum(sizes) / (pairs + len(sizes)),
    )


# ------------------------------------------------------------------------------------------------------------- outcome


def _outcome(
    recipe: Recipe, choice: Choice, data: _Data, arguments: argparse.Namespace, nodes: int
) -> dict[str, str]:
    from mpo.planning.capacity import sent_per_step

    sharding, training, budget = choice.sharding, choice.training, choice.tokens
    settings = recipe.training
    gpus = arguments.gpus
    micro = max(1, settings.per_device_train_batch_size)
    steps, epochs = _steps(recipe, data, gpus)
    needed = _needed(recipe, data)
    facts = {
        "Best": f"{sharding.name}: a micro-batch of {budget:,} tokens on each GPU"
        + (f", in rows of {choice.row:,}" if choice.row < budget else "")
        + (", activations recomputed" if training.checkpointing else ", activations kept")
    }
    if needed > budget:
        facts["Note"] = (
            f"a micro-batch of {micro} group{'s' if micro > 1 else ''} has up to {needed:,} tokens. Divide groups with "
            f"`max_targets_per_group: {max(1, math.floor(budget / max(1.0, data.tree_tokens)) - 1)}`"
            + ("" if training.checkpointing else ", or set `gradient_checkpointing: true`")
        )
    elif budget >= 2 * data.group_tokens and micro < budget // data.group_tokens:
        facts["Room"] = (
            f"for `per_device_train_batch_size: {budget // data.group_tokens}`, which makes steps fewer and larger"
        )
    facts["Steps"] = f"{steps:,} optimizer steps, {data.tokens * epochs:,.0f} tokens in {epochs:g} epochs"
    facts["Time"] = (
        f"{_duration(_seconds(recipe, training, data, gpus, arguments))} at {arguments.utilisation:.0%} of {arguments.peak_tflops:g} TFLOP/s per GPU"
        + (", longer with weights in main memory" if sharding.offload else "")
    )
    facts["Sent"] = (
        f"{sent_per_step(training, sharding, gpus, settings.gradient_accumulation_steps) / 1e9:.3g} GB by each GPU in a "
        "step"
        if gpus > 1
        else "nothing"
    )
    facts["Launch"] = _launch(recipe, choice, gpus, nodes)
    return facts


def _steps(recipe: Recipe, data: _Data, gpus: int) -> tuple[int, float]:
    settings = recipe.training
    per_step = gpus * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    each = max(1, math.ceil(data.groups / per_step))
    if settings.max_steps > 0:
        return settings.max_steps, settings.max_steps / each
    return math.ceil(settings.num_train_epochs * each), settings.num_train_epochs


def _seconds(
    recipe: Recipe, training: Training, data: _Data, gpus: int, arguments: argparse.Namespace
) -> float:
    from mpo.planning.capacity import reference_flops, step_flops

    _, epochs = _steps(recipe, data, gpus)
    context = data.tree_tokens / 2
    work = step_flops(training, data.tokens * epochs, context) + reference_flops(
        training, data.source_tokens, context
    )
    return work / (gpus * arguments.peak_tflops * 1e12 * arguments.utilisation)


def _launch(recipe: Recipe, choice: Choice, gpus: int, nodes: int) -> str:
    sharding = choice.sharding
    words = ["accelerate launch"]
    if nodes == 1:
        words += [f"--config_file recipes/accelerate/{sharding.config}", f"--num_processes {gpus}"]
    else:
        name = sharding.config.replace(".yaml", "_multi_node.yaml")
        several = Path(__file__).parents[2] / "recipes" / "accelerate" / name
        config = name if several.is_file() else sharding.config
        words += [
            f"--config_file recipes/accelerate/{config}",
            f"--num_machines {nodes} --num_processes {gpus}",
        ]
        if config == sharding.config and sharding.engine == "deepspeed":
            words += [
                "--deepspeed_multinode_launcher standard"
            ]  # else Accelerate asks for pdsh and a file of hosts
        words += ["--machine_rank RANK --main_process_ip ADDRESS --main_process_port 29500"]
    words += ["scripts/train.py", str(recipe.source_path)]
    if choice.row != _row_lengths(recipe, choice.training.attention)[0]:
        words.append(f"--max_tokens_per_row {choice.row}")
    return " ".join([*words, *recipe.overrides])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _scaling(choice: Choice, data: _Data, recipe: Recipe, arguments: argparse.Namespace) -> Any:
    from mpo.common.tables import TextTable
    from mpo.planning.capacity import efficiency, sent_per_step, step_flops

    sharding, training = choice.sharding, choice.training
    tokens = data.tokens / data.groups * max(1, recipe.training.per_device_train_batch_size)
    seconds = step_flops(training, tokens, data.tree_tokens / 2) / (
        arguments.peak_tflops * 1e12 * arguments.utilisation
    )
    rows = []
    for gpus in (1, 8, 16, 64, 256, 1024):
        inside = gpus <= arguments.gpus_per_node
        link = (arguments.node_bandwidth if inside else arguments.network_bandwidth) * 1e9
        sent = sent_per_step(training, sharding, gpus) if gpus > 1 else 0.0
        rows.append(
            (
                f"{gpus:,}",
                f"{sent / 1e9:.1f}",
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
            f"Sent over {arguments.node_bandwidth:g} GB/s inside a machine, {arguments.network_bandwidth:g} GB/s between "
            "machines; the tokens of a GPU stay the same.",
        ),
    )
