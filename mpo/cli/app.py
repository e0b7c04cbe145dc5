"""The command line: ``mpo train``, ``mpo data check``, ``mpo evaluate ...``, ``mpo merge``.

What a command needs is imported when it runs, so that ``mpo --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING

from mpo import __version__
from mpo.cli import analyze, evaluate, plan, report
from mpo.cli.options import add_data_options, one_or_many, show_help
from mpo.common.characters import printable
from mpo.errors import MPOError, ProcessLostError

if TYPE_CHECKING:
    from mpo.training.recipe import Recipe

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_TRAIN_EPILOG = """\
Any key of the recipe can be changed after it:
  --learning_rate 1e-4      a value            --gradient_checkpointing   true
  --languages bn sw         a list             --limit null               nothing
  --language_weights.bn 2   an entry of a mapping
The keys are those of trl.ModelConfig, of the data (dataset, held_out, limit, languages, ...) and of mpo.MPOConfig;
docs/recipes.md explains them.

On several GPUs:  accelerate launch scripts/train.py RECIPE [--key value ...]
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for an error that is the user's to mend, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"] and (len(words) == 1 or words[1].startswith("--")):
        words = _recipe_first(words)
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest:
        if not hasattr(arguments, "rest"):  # only `mpo plan` takes the keys of a recipe among its own options
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.rest = rest
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        # Read by tqdm when it is imported: bars belong on a terminal, a log file gets lines.
        os.environ.setdefault("TQDM_DISABLE", "1")
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except MPOError as error:
        return _report(error)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `mpo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _recipe_first(words: list[str]) -> list[str]:
    """``mpo train --dry_run RECIPE`` is clear enough to be understood; anything else is told where the recipe goes."""
    if words[1:2] in (["--help"], ["--dry_run"], ["--dry-run"]) and words[2:3] != []:
        return [words[0], words[2], words[1], *words[3:]]
    if words[1:] == ["--help"]:
        return words
    print("Error: the recipe comes first: mpo train RECIPE [--dry_run] [--key value ...]", file=sys.stderr)
    raise SystemExit(EXIT_ERROR)


def _report(error: MPOError) -> int:
    if os.environ.get("MPO_DEBUG"):
        traceback.print_exc()
        return EXIT_ERROR
    rank = int(os.environ.get("RANK", "0"))
    # Who has lost another process speaks at once: the first may be the lost one, and the launcher ends the rest.
    speaks = isinstance(error, ProcessLostError) and int(os.environ.get("LOCAL_RANK", "0")) < 2
    if rank > 0 and not speaks:
        # The launcher ends all ranks as soon as one has gone. Mostly all fail alike: let the first say it, in full.
        time.sleep(3)
    print(printable(f"{f'[rank {rank}] ' if rank else ''}Error: {error}"), file=sys.stderr, flush=True)
    return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpo",
        description="Multilingual safety alignment by preference optimization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpo {__version__}")
    parser.set_defaults(run=lambda _: show_help(parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train what a recipe describes",
        usage="mpo train RECIPE [--dry_run] [--key value ...]",
        description="Train what a recipe describes; leave the model, its measurements and its card in `output_dir`.",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("recipe", metavar="RECIPE", help="YAML file, for example recipes/llama.yaml")
    train.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="check everything but the weights, print the plan, stop",
    )
    train.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    train.set_defaults(run=_train, parser=train)

    plan.register(commands)

    data = commands.add_parser("data", help="look at preference data")
    data.set_defaults(run=lambda _: show_help(data))
    check = data.add_subparsers(title="commands", metavar="COMMAND").add_parser(
        "check", help="summarise a data set and point at doubtful rows", allow_abbrev=False
    )
    check.add_argument(
        "data", metavar="FILE", nargs="+", help="JSON, JSONL, CSV or Parquet file(s), or a name on the Hub"
    )
    check.add_argument("--model", help="folder or Hub name of the model in whose tokens lengths are counted")
    check.add_argument("--json", metavar="OUT", help="also write the report as JSON")
    check.add_argument("--show_texts", action="store_true", help="show the beginning of each flagged text")
    check.add_argument(
        "--chat_template", help="chat template for a tokenizer that has none: Jinja text or a file"
    )
    add_data_options(check)
    check.set_defaults(run=_check_data)

    evaluate.register(commands)
    report.register(commands)
    analyze.register(commands)

    merge = commands.add_parser("merge", help="fold an adapter into its base model", allow_abbrev=False)
    merge.add_argument("adapter", metavar="ADAPTER", help="folder or Hub name of the adapter")
    merge.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the merged model")
    merge.add_argument("--base", help="base model, where it is not the one that the adapter names")
    merge.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="type of the saved weights"
    )
    merge.add_argument("--revision", help="revision of the base model")
    merge.add_argument("--trust_remote_code", action="store_true", help="run code that the base model brings")
    merge.set_defaults(run=_merge)
    return parser


# --------------------------------------------------------------------------------------------------------------- train


def _train(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if any(word in ("-h", "--help") for word in overrides):
        return show_help(arguments.parser)
    dry_run = arguments.dry_run
    for flag in ("--dry_run", "--dry-run"):
        while flag in overrides:
            place = overrides.index(flag)
            del overrides[place]
            dry_run = True
            if place < len(overrides) and overrides[place].lower() in ("true", "false"):
                dry_run = overrides.pop(place).lower() == "true"
    _use_one_gpu()
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.train import train
    from mpo.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    try:
        train(recipe, dry_run=dry_run)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\n{_how_to_resume(recipe)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _use_one_gpu() -> None:
    """Keeps a single process to one GPU: with several, transformers would split batches over them (DataParallel)."""
    if "WORLD_SIZE" in os.environ or os.environ.get("ACCELERATE_USE_CPU"):
        return
    import torch

    if torch.cuda.device_count() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        print(
            "Several GPUs are visible; one process uses one of them. For all of them: accelerate launch "
            "scripts/train.py RECIPE ..."
        )


def _how_to_resume(recipe: Recipe) -> str:
    from mpo.training.checkpoints import last_complete_checkpoint

    last = last_complete_checkpoint(str(recipe.training.output_dir))
    if last is None:
        return f"Interrupted. No checkpoint was complete yet, so nothing is left in {recipe.training.output_dir} to resume."
    command = recipe.command(resume_from_checkpoint="auto")
    return f"Interrupted. The last complete checkpoint is {last}. Go on with:\n  {command}"


# ---------------------------------------------------------------------------------------------------------------- data


def _check_data(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.data import check_data

    tokenizer = None
    if arguments.model is not None:
        from mpo.modeling.loading import ModelSource, load_tokenizer

        tokenizer = load_tokenizer(ModelSource(arguments.model), arguments.chat_template)
    report = check_data(
        one_or_many(arguments.data),
        tokenizer=tokenizer,
        source_language=arguments.source_language,
        max_length=arguments.max_length,
        split=arguments.dataset_split,
        limit=arguments.limit,
        languages=arguments.languages,
        show_texts=arguments.show_texts,
    )
    print(report.to_text())
    if arguments.json:
        from mpo.common.files import write_json

        print(f"\nWritten to {write_json(arguments.json, report.to_dict())}")
    return 0


# --------------------------------------------------------------------------------------------------------------- merge


def _merge(arguments: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
