"""Prompts of three kinds in several languages, as the package ships them: harmless, only seemingly harmful, and harmful.

A harmful prompt may share a ``pair`` with a harmless one: one topic, one form, and harm as the difference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Literal

KINDS = ("harmless", "looks_harmful", "harmful")


@dataclass(frozen=True)
class ContrastRow:
    """One prompt in all languages of its set.

    Attributes:
        id: ``harmless-017``, ``looks-harmful-003`` or ``harmful-012``; the ``prompt_id`` of its
            :class:`~mpo.evaluation.prompts.Prompt` objects.
        kind: One of :data:`KINDS`.
        pair: Id that a harmful prompt shares with the harmless one that differs from it in harm alone, else None.
        category: Kind of harm of a harmful prompt; topic of any other.
        texts: Text by language code, in the order of the file.
    """

    id: str
    kind: Literal["harmless", "looks_harmful", "harmful"]
    pair: str | None
    category: str
    texts: dict[str, str]


def prompt_rows(package_file: Traversable) -> tuple[ContrastRow, ...]:
    """All rows of a set that comes with the package, in the order of the file.

    Args:
        package_file: JSON lines: the fields of :class:`ContrastRow`, and in place of ``texts`` one field per language.
    """
    rows = []
    for line in package_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        fields = {name: row.pop(name) for name in ("id", "kind", "pair", "category")}
        rows.append(ContrastRow(**fields, texts=row))
    return tuple(rows)
