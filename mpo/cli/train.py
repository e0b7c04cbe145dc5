"""``mpo train``: trains what a recipe describes."""

from __future__ import annotations

import argparse
from signal import SIGINT
from typing import Any

from mpo.cli.options import add_recipe_command, overrides_of

_CHANGES = """\
  --learning_rate 1e-4      a value            --gradient_checkpointing   true
  --languages bn sw         a list             --limit null               nothing
  --language_weights.bn 2   an entry of a mapping
"""
_DOCS = """\
The keys are those of trl.ModelConfig, of the data (dataset, held_out, limit, languages, ...) and of mpo.MPOConfig;
`mpo keys` explains them.

On several GPUs:  accelerate launch scripts/train.py RECIPE [--key value ...]
"""


def register(commands: Any) -> None:
    """Adds ``train`` to the sub-parsers of ``mpo``."""
    train = add_recipe_command(
        commands,
        "mpo train",
        "recipes/llama_mpo.yaml",
        help="train what a recipe describes",
        description="Train what a recipe describes; leave the model, its measurements and its card in `output_dir`.",
        changes=_CHANGES,
        docs=_DOCS,
        dry_run="check everything but the weights, print the plan, stop",
    )
    train.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    overrides, dry_run = overrides_of(arguments)
    from mpo.training.recipe_keys import check_keys

    check_keys(arguments.recipe, overrides)  # what is misspelt is said before torch is imported
    from mpo.training.compute import keep_to_one_gpu

    keep_to_one_gpu()
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.errors import StoppedBySignal
    from mpo.jobs.train import how_to_resume, train
    from mpo.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    try:
        train(recipe, dry_run=dry_run)
    except KeyboardInterrupt as stop:
        raise StoppedBySignal(getattr(stop, "number", SIGINT), how_to_resume(recipe)) from None
    from mpo.training.ranks import end_rank

    end_rank()
    return 0
