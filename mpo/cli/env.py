"""``mpo env``: versions, devices and settings of this machine, for a bug report."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``env`` to the sub-parsers of ``mpo``."""
    env = commands.add_parser(
        "env",
        help="versions, devices, memory, extras and settings of this machine, for a bug report",
        description="Secrets, user names and home folders are taken out.",
        allow_abbrev=False,
    )
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.jobs.environment import environment, environment_text

    if arguments.json:
        import json

        print(json.dumps(environment(), indent=2, ensure_ascii=False))
    else:
        from mpo.common.characters import printable

        print(printable(environment_text()))
    return 0
