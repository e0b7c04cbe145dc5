"""``mpo plan``: on which GPUs a recipe fits, how it is launched there, and for how long it would run."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from typing import Any

from mpo.errors import ConfigError


def register(commands: Any) -> None:
    """Add the command to the ``argparse`` sub-parsers ``commands``."""
    plan = commands.add_parser(
        "plan",
        help="which GPUs a recipe fits on, how to launch it there, and how long it takes",
        description="Work out, without weights, what each GPU would hold under every way to divide the model, the largest "
        "micro-batch that fits, and the time. Keys of the recipe can be changed behind it, as with `mpo train`.",
        usage="mpo plan RECIPE [--gpus N --gpu_memory GB | --machines NxGB ...] [options] [--key value ...]",
        allow_abbrev=False,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, for example recipes/llama_full.yaml")
    plan.add_argument("--gpus", type=int, help="GPUs over all machines (default: those of this one, or 8)")
    plan.add_argument(
        "--gpu_memory", "--gpu-memory", type=float, help="GB of each (default: as this machine's, or 80)"
    )
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
        help="peak of a GPU in bf16 (default 312, an A100; H100: 989)",
    )
    plan.add_argument("--utilisation", type=float, help="share of the peak that is reached (default 0.35)")
    plan.add_argument("--groups", type=int, help="sources, where the data are not at hand (default 100)")
    plan.add_argument("--targets", type=int, help="target languages of each source, likewise (default 6)")
    plan.add_argument(
        "--tree_tokens",
        type=int,
        help="tokens of prompt and both responses, likewise (default 650)",
    )
    plan.add_argument("--node_bandwidth", type=float, help="GB/s between GPUs of a machine (default 300)")
    plan.add_argument("--network_bandwidth", type=float, help="GB/s of a GPU to others (default 25)")
    plan.add_argument("--scaling", action="store_true", help="also show the efficiency from 1 to 1024 GPUs")
    plan.set_defaults(run=_run, rest=[])


def _run(arguments: argparse.Namespace) -> int:
    from mpo.training.recipe_keys import check_keys, source_keys

    machines = [_machine(text) for text in arguments.machines or []]
    if known := source_keys():
        _check_spelling(arguments, known)
    check_keys(arguments.recipe, arguments.rest)  # what is misspelt is said before torch is imported
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.fit import Assumptions, Machine, compare, machine_or_this, report
    from mpo.training.recipe import load_recipe

    per_node = arguments.gpus_per_node
    alone = None if machines else machine_or_this(arguments.gpus, arguments.gpu_memory, per_node)
    given = {name: getattr(arguments, name) for name in Assumptions.__dataclass_fields__}
    assumed = Assumptions(**{name: value for name, value in given.items() if value is not None})
    recipe = load_recipe(arguments.recipe, arguments.rest)
    if alone is None:
        print(compare(recipe, [Machine(*machine, per_node) for machine in machines], assumed))
    else:
        print(report(recipe, alone, assumed, scaling=arguments.scaling))
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
