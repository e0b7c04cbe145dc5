"""What several commands share: options of the same meaning everywhere, and the help of an unfinished command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpo.errors import ConfigError

if TYPE_CHECKING:
    from mpo.evaluation.engines import ModelChoice


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that read preference pairs."""
    parser.add_argument("--source_language", default="en", help="the dominant language (default en)")
    parser.add_argument("--languages", nargs="+", metavar="CODE", help="keep only these target languages")
    parser.add_argument("--limit", type=int, help="keep the first so many sources")
    parser.add_argument(
        "--max_length", type=int, default=1024, help="longest prompt plus response, in tokens"
    )
    parser.add_argument("--dataset_split", default="train", help="split of a Hub dataset (default train)")


def add_loading_options(parser: Any, *, adapter_revision: bool = False) -> None:
    """Options of the commands that load a model: where, in which type, at which revision. A group will do as parser."""
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


def one_or_many(names: Sequence[str]) -> str | list[str]:
    """A single name as itself, several as a list: what the loaders take."""
    return names[0] if len(names) == 1 else list(names)


def show_help(parser: argparse.ArgumentParser) -> int:
    """What a command does that waits for a sub-command."""
    parser.print_help()
    return 0
