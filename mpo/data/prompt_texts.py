"""The prompts of training data in any form, a row at a time: all that is needed to look for them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from mpo.data.contract import RowError, _Place
from mpo.data.forms.recognition import (
    as_columns,
    form_of,
    header_of,
    is_empty,
    is_group,
    known_columns,
    language_columns,
)
from mpo.data.loading import _sources
from mpo.data.reading import Rows
from mpo.errors import DataError


@dataclass(frozen=True)
class TrainingText:
    """The prompts of one row of training data, translations of each other."""

    file: str
    row: int
    texts: tuple[str, ...]


def training_texts(
    data: Any, *, split: str = "train", skipped: list[RowError] | None = None
) -> Iterator[TrainingText]:
    """The prompts of training data, a row at a time, in any form: groups, pairs in one language, prompts alone.

    Args:
        data: As for :func:`mpo.data.load_groups`.
        split: Split of a Hub dataset.
        skipped: Takes the errors of rows that hold no prompt, which are left out.

    Raises:
        DataError: A file cannot be read, or has no known form.
    """
    for name, rows in _sources(data, split, prompts=True):
        for place, prompts in labelled_prompts(rows, name, [] if skipped is None else skipped):
            yield TrainingText(name, place, tuple(text for _, text in prompts))


def labelled_prompts(
    rows: Rows, name: str, skipped: list[RowError], *, last_turn: bool = False
) -> Iterator[tuple[int, list[tuple[str | None, str]]]]:
    """Row and prompts of each row of a file, each prompt with its language where the row names it.

    Args:
        rows: The rows.
        name: How errors call the file.
        skipped: Takes the errors of rows that hold no prompt.
        last_turn: Only the user's last message of each prompt; every message of the user without.
    """
    keep = slice(-1, None) if last_turn else slice(None)
    rows = ((number, as_columns(row)) for number, row in rows)
    first = list(islice(rows, 200))
    header = header_of(row for _, row in first if not isinstance(row, RowError))
    columns = language_columns(header)
    form = form_of(header)
    if form is None and not is_group(header):
        raise DataError(f"the form of its rows is not known. {known_columns()}.", file=name)
    known = frozenset(str(column) for column, value in header.items() if not is_empty(value))
    for index, row in chain(first, rows):
        place = _Place(name, index)
        try:
            if isinstance(row, RowError):
                raise row
            if not isinstance(row, Mapping):
                raise place.error("is no object; expected named fields.")
            if form is None:
                found = list(_group_prompts(row, keep))
            elif form.name == "wide-prompts":
                found = [(code, row[code]) for code in columns if isinstance(row.get(code), str)]
            else:
                label = row.get("language")
                texts = list(_user_texts(form.read(row, place, known).prompt))[keep]
                found = [(label if isinstance(label, str) else None, text) for text in texts]
            found = [(code, text) for code, text in found if text.strip()]
            if not found:
                raise place.error("holds no prompt.")
        except RowError as error:
            skipped.append(error)
            continue
        yield index, found


def _group_prompts(row: Mapping[Any, Any], keep: slice) -> Iterator[tuple[str | None, str]]:
    """Source and target prompts of a group or a flat row, as far as they can be read."""
    pairs: list[tuple[Any, Any]] = []
    if "targets" in row or isinstance(row.get("source"), Mapping):
        targets = row.get("targets")
        sides = [row.get("source"), *(targets if isinstance(targets, (list, tuple)) else ())]
        pairs = [(side.get("language"), side.get("prompt")) for side in sides if isinstance(side, Mapping)]
    else:
        pairs = [
            (row.get(f"{side}_language"), row.get(f"{side}_prompt", row.get(f"{side}_conversations")))
            for side in ("source", "target")
        ]
    for label, value in pairs:
        for text in list(_user_texts(value))[keep]:
            yield (label if isinstance(label, str) and label else None, text)


def _user_texts(value: Any) -> Iterator[str]:
    """What the user says in a prompt, message by message."""
    if isinstance(value, str):
        yield value
    messages = [value] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for message in messages:
        if isinstance(message, Mapping) and (message.get("role") or message.get("from")) in ("user", "human"):
            content = message.get("content", message.get("value"))
            if isinstance(content, str):
                yield content
