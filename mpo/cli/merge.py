"""``mpo merge``: folds an adapter into its base model."""

from __future__ import annotations

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Adds ``merge`` to the sub-parsers of ``mpo``."""
    merge = commands.add_parser("merge", help="fold an adapter into its base model", allow_abbrev=False)
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of the adapter")
    merge.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the merged model")
    merge.add_argument("--base", help="base model, where it is not the one that the adapter names")
    merge.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="type of the saved weights"
    )
    merge.add_argument("--revision", help="revision of the base model")
    merge.add_argument("--trust_remote_code", action="store_true", help="run code that the base model brings")
    merge.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.merge import merge_adapter

    folder = merge_adapter(
        arguments.adapter,
        arguments.out,
        base=arguments.base,
        dtype=arguments.dtype,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"The merged model is in {folder}; it loads with AutoModelForCausalLM.from_pretrained.")
    return 0
