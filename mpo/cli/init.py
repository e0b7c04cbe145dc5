"""``mpo init``: asks for model and data, and writes a recipe that has been checked."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def register(commands: Any) -> None:
    """Adds ``init`` to the sub-parsers of ``mpo``."""
    init = commands.add_parser(
        "init",
        help="write a recipe for a model, data and this machine, and check it",
        description="Ask for what is not given, write a commented recipe, plan it for the machine, check everything but the "
        "weights, and say how to run it.",
        allow_abbrev=False,
    )
    init.add_argument(
        "--model", metavar="MODEL", help="folder or Hub name of the model to align; demo for a small one"
    )
    init.add_argument(
        "--data", metavar="FILE", help="pairs: a file or a Hub name; demo for those that come along"
    )
    init.add_argument("--out", metavar="FILE", help="the recipe (default: the model's name)")
    init.add_argument(
        "--template",
        metavar="NAME",
        help="recipe to begin with (default: by the model's family and the kinds of prompts)",
    )
    init.add_argument(
        "--source_language", metavar="CODE", help="language of the sources (default: found out)"
    )
    init.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs (default: those of this machine; 0 for a CPU)"
    )
    init.add_argument("--gpu_memory", "--gpu-memory", type=float, metavar="GB", help="GB of each")
    init.add_argument("--yes", "-y", action="store_true", help="ask nothing")
    init.add_argument("--force", action="store_true", help="replace a recipe that is there")
    init.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.jobs.begin import Beginning, begin

    wanted = {name: getattr(arguments, name) for name in Beginning.__dataclass_fields__}
    begin(Beginning(**wanted), ask=input if sys.stdin.isatty() else None)
    return 0
