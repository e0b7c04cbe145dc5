"""The command line: ``mpo train``, ``mpo data check``, ``mpo evaluate ...``, ``mpo merge``.

Each command is a module with a function ``register``. What it needs is imported when it runs, so that ``mpo --help`` answers
at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from mpo import __version__
from mpo.cli import (
    analyze,
    cache,
    chat,
    compare,
    data,
    env,
    evaluate,
    init,
    keys,
    merge,
    plan,
    recipes,
    report,
    train,
)
from mpo.cli.options import Parser, show_help
from mpo.common.characters import printable
from mpo.common.words import nearest
from mpo.errors import MPOError, ProcessLostError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_COMMANDS = (  # in the order of `mpo --help`
    init,
    recipes,
    keys,
    train,
    plan,
    data,
    evaluate,
    compare,
    report,
    analyze,
    chat,
    merge,
    cache,
    env,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for an error that is the user's to mend, 128 and the signal's number (130 for
    Ctrl-C) when interrupted.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        if not hasattr(arguments, "rest"):  # only `mpo plan` takes the keys of a recipe among its own options
            near = nearest(rest[0].lstrip("-").partition("=")[0], vars(arguments).keys() - {"run", "parser"})
            hint = f"; did you mean --{near}?" if near else ""
            getattr(arguments, "parser", parser).error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        arguments.rest = rest
    if {"-h", "--help"} & {*getattr(arguments, "overrides", ())}:
        return show_help(arguments.parser)
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
    except KeyboardInterrupt as interruption:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\n{str(interruption) or 'Interrupted.'}", file=sys.stderr)
        return int(getattr(interruption, "exit_code", EXIT_INTERRUPTED))
    except BrokenPipeError:  # `mpo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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
    parser = Parser(
        prog="mpo",
        description="Multilingual safety alignment by preference optimization.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpo {__version__}")
    parser.set_defaults(run=lambda _: show_help(parser))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
