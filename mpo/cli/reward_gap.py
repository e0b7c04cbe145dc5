"""``mpo evaluate reward-gap``: the reward gap per language, of a model alone or without and with an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpo.cli.options import add_data_options, add_loading_options, chat_template_kwargs, one_or_many


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
    gap.add_argument(
        "--confidence", type=float, default=0.95, help="coverage of the intervals (default 0.95)"
    )
    add_loading_options(gap, adapter_revision=True)
    gap.add_argument("--max_response_length", type=int, help="cut every response to so many tokens")
    gap.add_argument("--batch_layout", choices=("tree", "padded"), default="tree", help=argparse.SUPPRESS)
    gap.add_argument("--max_tokens_per_row", type=int, help="tokens of a packed row; less needs less memory")
    gap.add_argument(
        "--bad_rows", choices=("error", "drop"), default="error", help="stop at bad rows, or drop them"
    )
    add_data_options(gap)
    gap.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.measure import measure_reward_gap

    measure_reward_gap(
        one_or_many(arguments.data),
        model=arguments.model,
        adapter=arguments.adapter,
        adapter_revision=arguments.adapter_revision,
        out=None if arguments.out is None else Path(arguments.out),
        beta=arguments.beta,
        confidence=arguments.confidence,
        dtype=arguments.dtype,
        device=arguments.device,
        attn_implementation=arguments.attn_implementation,
        batch_layout=arguments.batch_layout,
        max_tokens_per_row=arguments.max_tokens_per_row,
        revision=arguments.revision,
        chat_template=arguments.chat_template,
        chat_template_kwargs=chat_template_kwargs(arguments),
        trust_remote_code=arguments.trust_remote_code,
        bad_rows=arguments.bad_rows,
        source_language=arguments.source_language,
        languages=arguments.languages,
        limit=arguments.limit,
        max_length=arguments.max_length,
        max_response_length=arguments.max_response_length,
        split=arguments.dataset_split,
    )
    return 0
