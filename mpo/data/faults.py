"""Rows that were left out, and how they are listed: identical faults together, each with its number and first places."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field as with_default

from mpo.common.words import shortened


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row, or one target pair of a row, that was left out.

    Attributes:
        file: File or dataset it came from.
        row: 0-based row in it.
        field: Path of the field inside the row, or None where the whole row is meant.
        reason: What is wrong with it.
    """

    file: str
    row: int
    field: str | None
    reason: str


@dataclass
class Fault:
    """What several rows of one file have in common.

    Attributes:
        file: The file or dataset.
        field: Path of the field; an index that differs between the rows is ``n``.
        reason: The first row's reason. The others' may differ in numbers.
        rows: 0-based rows, in the order of the file.
    """

    file: str
    field: str | None
    reason: str
    rows: list[int] = with_default(default_factory=list)

    def place(self, shown: int = 8) -> str:
        """Where it stands, as in ``pairs.json, 3 rows (2, 5, 9), field 'chosen'``, with the first ``shown`` rows."""
        file = shortened(self.file)
        where = f", field `{self.field}`" if self.field else ""
        if len(self.rows) == 1:
            return f"{file}, row {self.rows[0]}{where}"
        more = f" and {len(self.rows) - shown:,} more" if len(self.rows) > shown else ""
        rows = ", ".join(map(str, self.rows[:shown]))
        return f"{file}, {len(self.rows):,} rows ({rows}{more}){where}"


_INDEX = re.compile(r"\[\d+\]")
_NUMBER = re.compile(r"\d+")


def grouped_faults(rows: Iterable[BadRow]) -> list[Fault]:
    """Bad rows as faults, the most frequent first; of equally frequent ones the first to appear."""
    faults: dict[tuple[str, str, str], Fault] = {}
    for bad in rows:
        alike = _INDEX.sub("[n]", bad.field or "")
        fault = faults.setdefault(
            (bad.file, alike, _NUMBER.sub("0", bad.reason)), Fault(bad.file, bad.field, bad.reason)
        )
        if fault.field != bad.field:
            fault.field = alike
        fault.rows.append(bad.row)
    return sorted(faults.values(), key=lambda fault: -len(fault.rows))
