"""The common form of everything in a report: a number per row and model, its interval, and the change between models."""

from __future__ import annotations

from dataclasses import dataclass

from mpo.common.tables import printable_name
from mpo.common.words import number
from mpo.data.languages import language_name

MIXED = "mul"  # ISO 639-2's code for several languages, which code-switching prompts have
NONE = "\N{EN DASH}"

FEWEST = 10
"""Prompts below which no change of a rate is called clear."""


@dataclass(frozen=True)
class Unit:
    """How a number is written.

    Attributes:
        name: What is on the axis.
        scale: Factor from the stored number to the written one.
        digits: Decimals.
        suffix: After the number.
        change_suffix: After a change.
        change_scale: Factor of a change.
        change_digits: Decimals of a change.
        signed: Write a plus sign, too.
    """

    name: str
    scale: float = 1.0
    digits: int = 2
    suffix: str = ""
    change_suffix: str = ""
    change_scale: float = 1.0
    change_digits: int = 2
    signed: bool = False

    def write(self, value: float | None) -> str:
        """A value with its suffix."""
        return NONE if value is None else number(value * self.scale, self.digits, self.signed) + self.suffix

    def write_interval(self, low: float | None, high: float | None) -> str:
        """``[low, high]``, or nothing where there is none."""
        if low is None or high is None:
            return ""
        return f"[{', '.join(number(end * self.scale, self.digits, self.signed) for end in (low, high))}]"

    def write_change(self, change: float | None) -> str:
        """A change with its sign and suffix."""
        if change is None:
            return NONE
        return number(change * self.change_scale, self.change_digits, True) + self.change_suffix

    def write_change_interval(self, low: float | None, high: float | None) -> str:
        """``[low, high]`` of a change, or nothing where there is none."""
        if low is None or high is None:
            return ""
        ends = (number(end * self.change_scale, self.change_digits, True) for end in (low, high))
        return f"[{', '.join(ends)}]"


SHARE = Unit("%", 100.0, 1, "\N{NO-BREAK SPACE}%", "", 100.0, 1)
"""A share, written in per cent; its change is in percentage points."""

GAP = Unit("nats per token", digits=3, change_digits=3, signed=True)
"""A reward gap."""

PERPLEXITY = Unit(
    "perplexity", digits=2, change_suffix="\N{NO-BREAK SPACE}%", change_scale=100.0, change_digits=1
)
"""A perplexity; its change is relative."""

SCORE = Unit("score", digits=3, change_digits=3)
"""A score of no particular scale."""


@dataclass(frozen=True)
class Value:
    """A number with its interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Change:
    """The paired change from the first model.

    Attributes:
        change: After minus before, or relative where the unit says so.
        low: Lower end of its interval; None where there is none.
        high: Upper end.
        p_value: Of a paired test, adjusted for the number of languages; None where there is none.
        count: Number of prompts or items it rests on; None where that is not known.
    """

    change: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    count: int | None = None

    def direction(self, confidence: float) -> int:
        """1 or -1 where the change is clear, else 0.

        Clear is a change whose interval leaves zero out, whose test, if it has one, rejects, and that rests on
        :data:`FEWEST` prompts or more.
        """
        if self.low is None or self.high is None or (self.count is not None and self.count < FEWEST):
            return 0
        if self.p_value is not None and self.p_value >= 1 - confidence:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class Cell:
    """One model in one row."""

    value: Value
    change: Change | None = None


@dataclass(frozen=True)
class Row:
    """One language or task.

    Attributes:
        label: Its name, as plain text.
        cells: One per model, None where it was not measured.
        count: Number of prompts, pairs or texts.
        is_average: True for the row over all languages.
        detail: Further numbers, one text per extra column.
        is_source: True for the dominant language where the average is over the target languages alone.
    """

    label: str
    cells: tuple[Cell | None, ...]
    count: int
    is_average: bool = False
    detail: tuple[str, ...] = ()
    is_source: bool = False


@dataclass(frozen=True)
class Measurement:
    """One table and chart of the report.

    Attributes:
        anchor: Name of the section in links.
        title: Heading.
        short: Name in the Markdown table.
        unit: How its numbers are written.
        better: ``"lower"`` or ``"higher"``.
        models: Names of the models, the one to compare with first.
        rows: Languages or tasks, the average last.
        lead: What is measured, as one paragraph of plain text.
        detail: Headings of the rows' further numbers.
        notes: Below the table, plain text.
        warnings: What must not be overlooked, plain text.
        confidence: Coverage of the intervals.
        axis: Range that the chart shows; by default that of its numbers.
        reference: A value to mark in the chart, and its name.
    """

    anchor: str
    title: str
    short: str
    unit: Unit
    better: str
    models: tuple[str, ...]
    rows: tuple[Row, ...]
    lead: str
    detail: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    confidence: float = 0.95
    axis: tuple[float, float] | None = None
    reference: tuple[float, str] | None = None

    @property
    def average(self) -> Row | None:
        """The row over all languages."""
        return next((row for row in self.rows if row.is_average), None)

    @property
    def averaged(self) -> int:
        """Number of rows that the average is over: those with a number, less the source's."""
        return sum(any(row.cells) for row in self.rows if not (row.is_average or row.is_source))

    def direction(self, change: Change | None) -> int:
        """1 or -1 where a change is clear, else 0; see :meth:`Change.direction`."""
        return 0 if change is None else change.direction(self.confidence)

    def verdict(self, change: Change | None, row: Row | None = None) -> str | None:
        """``"better"`` or ``"worse"`` where a change is clear, else None.

        The source language is to stay where it is: a clear change of its row is ``"moved"``, up or down.
        """
        direction = self.direction(change)
        if direction == 0:
            return None
        if row is not None and row.is_source:
            return "moved"
        return "better" if (direction > 0) == (self.better == "higher") else "worse"

    @property
    def is_tested(self) -> bool:
        """Whether any change has a p-value."""
        changes = [cell.change for row in self.rows for cell in row.cells if cell is not None]
        return any(change is not None and change.p_value is not None for change in changes)

    def moved(self, model: int, direction: int) -> list[str]:
        """Labels of the rows whose change is clear and goes up (1), goes down (-1), or is not clear (0).

        The rows of the mean and of the source are not among them.
        """
        return [
            row.label
            for row in self.rows
            if not (row.is_average or row.is_source)
            if (cell := row.cells[model]) is not None and cell.change is not None
            if self.direction(cell.change) == direction
        ]


def shown_language(code: str) -> str:
    """Name of a language for people, whatever a file had as its code."""
    return "Mixed languages" if code == MIXED else printable_name(language_name(code), 24)


def p_text(p_value: float | None) -> str:
    """A p-value as papers print it."""
    if p_value is None:
        return NONE
    return "<\N{THIN SPACE}0.001" if p_value < 0.001 else f"{p_value:.3f}"
