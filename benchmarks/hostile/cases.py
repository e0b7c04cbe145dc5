"""One hostile input, and whether what came of it is right."""

from __future__ import annotations

import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from types import FrameType
from typing import Any

from mpo.errors import MPOError

REFUSED, SAME, EITHER = "refused", "same", "either"
"""What may come of an input: a clear error, the result of the unharmed one, or either of an error and a result."""

_LONGEST = 4000  # characters of a message that is still read

ESCAPES = "\x1b[31mred\u202e<script>alert(1)</script>\u200b"
"""Acts on a terminal, on the direction of writing and in a page, where nothing is escaped."""


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
        name: What was done to it.
        expected: :data:`REFUSED`, :data:`SAME` or :data:`EITHER`.
        run: Gives it to the package. It returns None where all is well, or says what is not: a result that differs from
            the unharmed input's.
    """

    name: str
    expected: str
    run: Callable[[], str | None]


@dataclass
class Tally:
    """What came of all inputs of a kind.

    Attributes:
        tried: Number of inputs.
        refused: Those that ended in a clear error.
        wrong: A sentence for each other one that should have, or should not have, and for each traceback.
        by_name: Number of inputs by what was done to them.
    """

    tried: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    by_name: Counter[str] = field(default_factory=Counter)


def try_all(cases: Iterable[Case], seconds: float = 60) -> Tally:
    """Runs every case; one that takes so many seconds of a processor, or waits for twenty times as many, hangs."""
    tally = Tally()
    for case in cases:
        tally.tried += 1
        tally.by_name[case.name] += 1
        said = None
        try:
            with _limit(seconds), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                said = case.run()
            if case.expected == REFUSED and said is None:
                said = "accepted in silence"
        except MPOError as error:
            tally.refused += 1
            message = str(error)
            if case.expected == SAME:
                said = f"refused, though nothing is wrong with it: {message[:200]}"
            elif not message.strip() or len(message) > _LONGEST:
                said = f"a message of {len(message)} characters"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} at {place.filename.rpartition('/')[2]}:{place.lineno}: {str(error)[:200]}"
        if said is not None:
            tally.wrong.append(f"{case.name}: {said}")
    return tally


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    # Of a processor, since a machine that others are using takes any time for anything.
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, 20 * seconds),
    }
    before = {number: signal.signal(number, late) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    -0.5,
    "",
    " \u200b",
    ESCAPES,
    "9" * 5000,
    [],
    {},
    [[]],
    {"": None},
    [None],
)
"""Values that may stand where another was meant."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of a JSON document but itself."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [place for key, item in items for place in ((*path, key), *places(item, (*path, key)))]


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        document = document[key]
    return document


def altered(document: Any, draw: random.Random) -> str:
    """Changes a JSON document in place at one random spot; what was done."""
    path = draw.choice(places(document))
    owner, key = at(document, path[:-1]), path[-1]
    match draw.choice(["value", "value", "value", "gone", "more", "other key"]):
        case "gone":
            del owner[key]
            return f"without {key}" if isinstance(key, str) else "without an entry"
        case "more" if isinstance(owner, dict):
            owner[ESCAPES] = draw.choice(VALUES)
            return "one key more"
        case "other key" if isinstance(owner, dict):
            owner[f"{key}x"] = owner.pop(key)
            return "a misspelt key"
    owner[key] = draw.choice(VALUES)
    return "another value"
