"""``mpo evaluate``: gathers the measurements, each of which is a module with a ``register`` of its own."""

from __future__ import annotations

from typing import Any

from mpo.cli import attack, labels, mt_bench, reward_gap, suite, utility
from mpo.cli.options import show_help

_MEASUREMENTS = (reward_gap, attack, utility, mt_bench, labels, suite)


def register(commands: Any) -> None:
    """Adds ``evaluate`` and its measurements to the sub-parsers of ``mpo``."""
    evaluate = commands.add_parser("evaluate", help="measure a model")
    evaluate.set_defaults(run=lambda _: show_help(evaluate))
    measurements = evaluate.add_subparsers(title="commands", metavar="COMMAND")
    for measurement in _MEASUREMENTS:
        measurement.register(measurements)
