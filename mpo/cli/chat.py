"""``mpo chat``: talks to a model in the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.cli import options

_EPILOG = """\
  mpo chat runs/llama                                            an adapter on the base model that it names
  mpo chat runs/llama --compare                                  each question answered before and after training
  mpo chat runs/llama --compare --questions probe --languages en zh bn     one question in three languages
  echo "How do I cook rice?" | mpo chat runs/llama               one answer
"""


def register(commands: Any) -> None:
    """Adds ``chat`` to the sub-parsers of ``mpo``."""
    chat = commands.add_parser(
        "chat",
        help="talk to a model, and to its base model beside it",
        description="Talk to a model in the terminal, or ask it the questions of a file or a pipe.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    chat.add_argument("model", metavar="MODEL", help="folder or Hub name of a model or an adapter")
    chat.add_argument("--adapter", help="folder or Hub name of an adapter to put on it")
    chat.add_argument("--compare", action="store_true", help="answer without and with the adapter")
    questions = chat.add_argument_group("questions from a file")
    questions.add_argument(
        "--questions",
        metavar="FILE",
        help="questions with a column per language, as for `mpo evaluate attack`; probe for some that come along",
    )
    questions.add_argument("--languages", nargs="+", metavar="CODE", help="ask in these languages only")
    questions.add_argument("--limit", type=int, default=1, help="ask the first so many (default 1)")
    answers = chat.add_argument_group("answers")
    answers.add_argument("--system_prompt", "--system", help="system turn of every conversation")
    options.add_generation_options(answers, 512)
    options.add_loading_options(chat.add_argument_group("model"), adapter_revision=True)
    chat.set_defaults(run=_run, batch_size=1)


def _run(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.chat import ChatSettings, chat

    codes = [code for word in arguments.languages or () for code in word.split(",") if code]
    chat(
        ChatSettings(
            options.chosen_model(arguments),
            options.generation_of(arguments),
            system_prompt=arguments.system_prompt,
            compare=arguments.compare,
            questions=arguments.questions,
            languages=codes or None,
            limit=arguments.limit,
        )
    )
    return 0
