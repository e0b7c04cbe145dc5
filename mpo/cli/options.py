"""What several commands share: options of the same meaning everywhere, and the help of an unfinished command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from mpo.common.words import nearest, show_name
from mpo.errors import ConfigError

if TYPE_CHECKING:
    from mpo.evaluation.engines import Generation, ModelChoice


_LONGEST_USAGE = 6  # lines
# What other programs call a command.
_OTHER_WORDS = {
    "train": "finetune fine-tune tune fit sft dpo align run",
    "chat": "generate ask talk infer inference prompt predict answer",
    "evaluate": "eval test benchmark bench measure score judge",
    "merge": "export fuse fold serve deploy convert",
    "env": "doctor info version diagnose system environment",
    "init": "new start setup create begin quickstart wizard",
    "recipes": "list ls configs examples templates cp",
    "keys": "options settings params parameters explain help",
    "plan": "estimate memory fits gpus cost",
    "data check": "dataset check validate",
    "analyze hidden-space": "hidden-space hidden_space embeddings probe",
}


class Parser(argparse.ArgumentParser):
    """A parser that names the command a misspelt one was meant to be, and says where a recipe goes."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            others = {other: name for name, words in _OTHER_WORDS.items() for other in words.split()}
            elsewhere = others.get(value.lower()) if self.prog == "mpo" else None
            near = elsewhere or nearest(value, action.choices, 0.6)
            hint = (
                f"did you mean `{self.prog} {near}`?" if near else f"there are {', '.join(action.choices)}."
            )
            raise argparse.ArgumentError(
                None, f"there is no command `{self.prog} {show_name(value)}`; {hint}"
            )
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        """Prints usage and message, and exits with 2."""
        if any(action.dest == "overrides" for action in self._actions):
            message = "the recipe comes first" + ("" if "are required" in message else f" ({message})")
        if (
            self.format_usage().count("\n") > _LONGEST_USAGE
        ):  # the sentence that helps would be below the screen
            self.exit(2, f"{self.prog}: error: {message}. All options: {self.prog} --help\n")
        super().error(message)


def add_recipe_command(
    commands: Any,
    path: str,
    example: str,
    *,
    help: str,
    description: str,
    changes: str,
    docs: str,
    out: str = "",
    dry_run: str = "",
) -> argparse.ArgumentParser:
    """Adds the command ``path`` (``mpo evaluate suite``), which takes a recipe and ``--key value`` words behind it.

    ``changes`` shows such words, ``docs`` says what explains the keys. Where ``out`` says what lies in a folder and
    ``dry_run`` what it does, there are options of these names.
    """
    given = "[--out FOLDER] " * bool(out) + "[--dry_run] " * bool(dry_run)
    parser: argparse.ArgumentParser = commands.add_parser(
        path.split()[-1],
        help=help,
        usage=f"{path} RECIPE {given}[--key value ...]",
        description=description,
        epilog=f"Any key of the recipe can be changed after it:\n{changes}{docs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"YAML file, for example {example}")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(parser=parser)
    if out:
        parser.add_argument(
            "--out", metavar="FOLDER", help=f"folder of {out}, in place of the recipe's `out`"
        )
    if dry_run:
        parser.add_argument("--dry_run", "--dry-run", action="store_true", help=dry_run)
    return parser


def overrides_of(arguments: argparse.Namespace) -> tuple[list[str], bool]:
    """The words that change a recipe, ``--out`` first, and whether ``--dry_run`` is among them or before it."""
    words, dry_run = list(arguments.overrides), arguments.dry_run
    if getattr(arguments, "out", None) is not None:
        words = ["--out", arguments.out, *words]
    while flags := {"--dry_run", "--dry-run"} & {*words}:
        place = words.index(flags.pop())
        value = "".join(words[place + 1 : place + 2]).lower()
        dry_run = value != "false"
        del words[place : place + (2 if value in ("true", "false") else 1)]
    for word in words:
        if word.startswith("--") and nearest(word.replace("-", "_"), ["__dry_run", "__dryrun"], 0.8):
            raise ConfigError(
                f"command line: there is no option `{show_name(word)}`; did you mean `--dry_run`?"
            )
    return words, dry_run


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that read preference pairs."""
    parser.add_argument("--source_language", default="en", help="the dominant language (default en)")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="keep only these target languages")
    parser.add_argument("--limit", type=int, help="keep the first so many sources")
    parser.add_argument(
        "--max_length", type=int, default=1024, help="longest prompt plus response, in tokens"
    )
    add_split(parser)


def add_split(parser: Any) -> None:
    """Which split of a dataset on the Hub is read. A group will do as parser, here and below."""
    parser.add_argument("--dataset_split", default="train", help="split of a Hub dataset (default train)")


def add_bad_rows(parser: Any) -> None:
    """What becomes of rows that cannot be used."""
    parser.add_argument(
        "--bad_rows", choices=("error", "drop"), default="error", help="stop at bad rows, or drop them"
    )


def add_confidence(parser: Any) -> None:
    """Coverage of a measurement's intervals."""
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="coverage of the intervals (default 0.95)"
    )


def add_measured_model(parser: Any, *, served: bool = False) -> None:
    """The model that is measured."""
    at_server = "; for a server, its name there" * served
    parser.add_argument("--model", required=True, help=f"folder or Hub name of the model{at_server}")
    parser.add_argument("--adapter", help="folder or Hub name of an adapter to put on it")


def add_results(parser: Any) -> None:
    """Where the results of a measured model go."""
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder of results, one for all models"
    )
    parser.add_argument("--name", help="what the model's folder is called (default: from its name)")


def add_generation_options(parser: Any, max_new_tokens: int) -> None:
    """How an answer is made."""
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        help=f"longest answer (default {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default); above it samples"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability to sample from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")


def generation_of(arguments: argparse.Namespace) -> Generation:
    """What :func:`add_generation_options` lets be chosen."""
    from mpo.evaluation.engines import Generation

    return Generation(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)


def add_loading_options(parser: Any, *, adapter_revision: bool = False) -> None:
    """Options of the commands that load a model: where, in which type, at which revision."""
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="type of the loaded weights"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument(
        "--attn_implementation", help="eager, sdpa, flex_attention or, for the reward gap, tree (its default)"
    )
    parser.add_argument("--revision", help="revision of the model on the Hub")
    if adapter_revision:
        parser.add_argument("--adapter_revision", help="revision of the adapter on the Hub")
    parser.add_argument(
        "--chat_template", help="in place of the adapter's or the model's chat template: Jinja text or a file"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        metavar="JSON",
        help="extra arguments of the chat template (default: those that the adapter or the model was trained with)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings")


def chosen_model(arguments: argparse.Namespace, **engine: Any) -> ModelChoice:
    """The model that the options name, with the adapter on it; ``engine`` is what a command lets be chosen besides."""
    from mpo.evaluation.engines import ModelChoice

    return ModelChoice(
        arguments.model,
        adapter=arguments.adapter,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        attn_implementation=arguments.attn_implementation,
        revision=arguments.revision,
        adapter_revision=arguments.adapter_revision,
        chat_template=arguments.chat_template,
        chat_template_kwargs=chat_template_kwargs(arguments),
        trust_remote_code=arguments.trust_remote_code,
        **engine,
    )


def chat_template_kwargs(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The value of ``--chat_template_kwargs``.

    Raises:
        ConfigError: It is no JSON object.
    """
    given = arguments.chat_template_kwargs
    return None if given is None else json_object(given, "--chat_template_kwargs")


def json_object(text: str, option: str) -> dict[str, Any]:
    """An option's value that is a JSON object.

    Raises:
        ConfigError: It is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option}: expected a JSON object, got {text!r} ({error}).") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected a JSON object, got {text!r}.")
    return value


def files_by_language(words: Sequence[str], option: str) -> dict[str, str]:
    """The words ``CODE=FILE`` of an option.

    Raises:
        ConfigError: One is no such word, or names a language for the second time.
    """
    files: dict[str, str] = {}
    for word in words:
        code, equals, file = word.partition("=")
        if not (code and equals and file):
            raise ConfigError(f"{option}: expected CODE=FILE such as sw=swahili.txt, got {word!r}.")
        if code in files:
            raise ConfigError(
                f"{option}: expected one CODE=FILE for each language, got {code} twice. Put its texts into one file."
            )
        files[code] = file
    return files


def one_or_many(names: Sequence[str]) -> str | list[str]:
    """A single name as itself, several as a list: what the loaders take."""
    return names[0] if len(names) == 1 else list(names)


def show_help(parser: argparse.ArgumentParser) -> int:
    """What a command does that waits for a sub-command."""
    parser.print_help()
    return 0
