"""``mpo evaluate reward-gap``: the reward gap per language, of a model alone or without and with an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpo.cli import options


def register(measurements: Any) -> None:
    """Adds ``reward-gap`` to the sub-parsers of ``mpo evaluate``."""
    gap = measurements.add_parser(
        "reward-gap",
        help="the reward gap per language, with confidence intervals",
        description="Measure the reward gap per language. With an adapter: of the base model and of the adapter.",
        allow_abbrev=False,
    )
    gap.add_argument("--model", required=True, help="folder or Hub name of the model")
    gap.add_argument("--adapter", help="folder or Hub name of an adapter; compared with the model without it")
    gap.add_argument(
        "--data", required=True, nargs="+", metavar="FILE", help="file(s) of pairs, or a name on the Hub"
    )
    gap.add_argument(
        "--out", metavar="FOLDER", help="write reward_gap.json, reward_gap.txt and reward_gap.png there"
    )
    gap.add_argument(
        "--beta", type=float, default=1.0, help="scale of the target gap in the error column (default 1)"
    )
    options.add_confidence(gap)
    options.add_loading_options(gap, adapter_revision=True)
    gap.add_argument("--max_response_length", type=int, help="cut every response to so many tokens")
    gap.add_argument("--batch_layout", choices=("tree", "padded"), default="tree", help=argparse.SUPPRESS)
    gap.add_argument("--max_tokens_per_row", type=int, help="tokens of a packed row; less needs less memory")
    options.add_bad_rows(gap)
    options.add_data_options(gap)
    gap.set_defaults(run=_run, batch_size=1)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.measure import measure_reward_gap

    measure_reward_gap(
        options.one_or_many(arguments.data),
        options.chosen_model(arguments),
        out=None if arguments.out is None else Path(arguments.out),
        beta=arguments.beta,
        confidence=arguments.confidence,
        batch_layout=arguments.batch_layout,
        max_tokens_per_row=arguments.max_tokens_per_row,
        bad_rows=arguments.bad_rows,
        source_language=arguments.source_language,
        languages=arguments.languages,
        limit=arguments.limit,
        max_length=arguments.max_length,
        max_response_length=arguments.max_response_length,
        split=arguments.dataset_split,
    )
    return 0
