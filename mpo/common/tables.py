"""One small table, as plain text, as Markdown, or in colour on a terminal."""

from __future__ import annotations

import re
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
NAME_WIDTH = 20  # widest language name that is printed whole


@dataclass(frozen=True)
class TextTable:
    """Cells that are ready to print: the first column is a name, the others are numbers.

    Attributes:
        title: One line above the table.
        header: Column headings, [columns].
        rows: Cells, [rows][columns].
        rules: Rows that have a line above them.
        notes: Lines below the table.
        emphasis: Columns to set in bold where that is possible.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rules: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    emphasis: frozenset[int] = frozenset()

    def plain(self) -> str:
        """The table in ASCII rules and spaces, columns aligned in a fixed-width font."""
        cells = [self.header, *self.rows]
        widths = [max(display_width(row[c]) for row in cells) for c in range(len(self.header))]
        line = "-" * (sum(widths) + 2 * (len(widths) - 1))
        out = [self.title, line, self._line(self.header, widths), line]
        for number, row in enumerate(self.rows):
            if number in self.rules:
                out.append(line)
            out.append(self._line(row, widths))
        return "\n".join([*out, line, *self.notes])

    def markdown(self) -> str:
        """The cells as a GitHub-flavoured Markdown table, escaped, without title and notes."""
        lines = [
            "| " + " | ".join(escape_markdown(cell.replace(" -> ", " \u2192 ")) for cell in row) + " |"
            for row in (self.header, *self.rows)
        ]
        lines.insert(1, "| :-- |" + " --: |" * (len(self.header) - 1))
        return "\n".join(lines)

    @staticmethod
    def _line(row: tuple[str, ...], widths: list[int]) -> str:
        padding = [" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
        name, *numbers = zip(row, padding, strict=True)
        return "  ".join([name[0] + name[1], *(space + cell for cell, space in numbers)]).rstrip()

    def show(self, file: TextIO | None = None) -> None:
        """Print the table: with Rich on a terminal that can show it, as plain text anywhere else.

        Args:
            file: Where to print; standard output by default.
        """
        stream = sys.stdout if file is None else file
        if not stream.isatty():
            print(self.plain(), file=stream)
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text("\n".join(self.notes), style="dim"),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, heading in enumerate(self.header):
            table.add_column(
                Text(heading),
                justify="right" if number else "left",
                style="bold" if number in self.emphasis else "",
                no_wrap=True,
            )
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(cell) for cell in row), end_section=number + 1 in self.rules)
        console = Console(file=stream)
        unbounded = console.options.update(max_width=10_000)
        if console.measure(table, options=unbounded).minimum > console.width:
            print(self.plain(), file=stream)  # a table that is cut off says less than one that wraps
        else:
            console.print(table)


class Tabular(ABC):
    """A result that is shown as one table: as plain text, as Markdown, or on a terminal."""

    @abstractmethod
    def text_table(self) -> TextTable:
        """The cells of :meth:`to_text`, for other output formats."""

    def to_text(self) -> str:
        """The table as plain text, at most 100 columns wide."""
        return self.text_table().plain()

    def to_markdown(self) -> str:
        """The table as a GitHub-flavoured Markdown table, without title and notes."""
        return self.text_table().markdown()

    def show(self, file: TextIO | None = None) -> None:
        """Print the table: in colour on a terminal, as plain text elsewhere."""
        self.text_table().show(file)


def fact_lines(facts: Mapping[str, str]) -> str:
    """One fact per line, the names in a column of their own."""
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in facts.items())


def escape_markdown(text: str) -> str:
    """`text` as one line that Markdown and the HTML in it show as it is, also inside a table.

    Characters that steer a terminal or turn the direction of what follows are left out.
    """
    line = " ".join("".join(" " if _steers(c) else c for c in text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]#|~!])", r"\\\1", line)
    return re.sub(r"^(\d*)([-+=.)])(?=\s|$)", r"\1\\\2", line)


def _steers(character: str) -> bool:
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _DIRECTIONS


def display_width(text: str) -> int:
    """Columns that `text` takes in a terminal: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def printable_name(text: str, width: int = NAME_WIDTH) -> str:
    """`text` without control characters (a data file may hold any label), cut to `width` columns."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "?"
    if display_width(clean) <= width:
        return clean
    while display_width(clean) > width - 3:
        clean = clean[:-1]
    return clean + "..."


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign; a value that rounds to zero has none."""
    if value is None:
        return "-"
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """``[low, high]``, or a dash where there is no interval."""
    return "-" if low is None or high is None else f"[{signed(low, digits)}, {signed(high, digits)}]"
