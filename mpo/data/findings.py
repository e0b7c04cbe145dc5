"""What a check of preference data reports, and how it reads."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpo.common.characters import printable
from mpo.common.words import counted, shortened
from mpo.data.contract import PARTS
from mpo.data.faults import BadRow, grouped_faults

_WIDTH = 100
_ROWS_SHOWN = 12

FINDINGS: dict[str, tuple[str, str]] = {
    "prompt_too_long": (
        "prompt too long",
        "The prompt alone fills max_length: nothing of a response would be left.",
    ),
    "truncated": (
        "truncated",
        "Prompt plus chosen or prompt plus rejected is longer than max_length and would be cut.",
    ),
    "template_refuses": ("template fails", "The chat template of the tokenizer refuses these messages."),
    "prompt_language": (
        "prompt language",
        "The prompt is detected to be in another language than the pair's label.",
    ),
    "chosen_language": ("chosen language", "The chosen response is detected to be in another language."),
    "rejected_language": (
        "rejected language",
        "The rejected response is detected to be in another language.",
    ),
    "same_after_cut": (
        "equal after the cut",
        "What max_length and max_response_length leave of both responses is the same: no preference to learn.",
    ),
    **{
        f"untranslated_{part}": (
            f"untranslated {part}",
            f"The target's {what} is the source's own text.{advice}",
        )
        for part, what, advice in (
            ("prompt", "prompt", ""),
            ("chosen", "chosen response", " `drop_untranslated: true` leaves such pairs out of training."),
            ("rejected", "rejected response", ""),
        )
    },
    "dialog": (
        "dialog in a text",
        "A text holds turns of a dialog (Human: ... Assistant:) or marks of a chat template. Prompts with several turns "
        "are lists of messages, and a response is the answer alone.",
    ),
    "no_answer": (
        "no answer",
        "A response ends within its reasoning, so that nothing is said to the user. It was cut off when it was written.",
    ),
    "empty_prompt": ("empty prompt", "The prompt holds no visible text, so the responses answer nothing."),
    "undetermined": ("no language", "No label was given and the texts hold no letters to detect one by."),
    "chosen_no_refusal": (
        "chosen complies?",
        "The chosen response opens without a refusal phrase. Only a sign, see mpo/data/refusals.py.",
    ),
    "rejected_refusal": (
        "rejected refuses?",
        "The rejected response opens with a refusal phrase. Only a sign, see mpo/data/refusals.py.",
    ),
    "harmless_refused": (
        "harmless refused?",
        "The prompt is harmless, and its chosen response opens with a refusal phrase. Only a sign, see "
        "mpo/data/refusals.py.",
    ),
    "same_target": (
        "repeated target",
        "An identical target pair in the same language stands earlier in the data.",
    ),
    "same_source_and_language": (
        "several per source",
        "An identical source has another target pair in the same language earlier in the data.",
    ),
    "same_prompt": (
        "repeated prompt",
        "An identical source prompt with other responses stands earlier in the data.",
    ),
    "broken_characters": (
        "broken characters",
        "A text holds U+FFFD, what is left of a character decoded wrongly.",
    ),
}
"""Name of each finding: its short title, and what it says."""


@dataclass(frozen=True, slots=True)
class FlaggedRow:
    """One pair that a finding names: its file, its 0-based row, and the text where texts were asked for."""

    file: str
    row: int
    text: str | None = None


@dataclass(frozen=True)
class Percentiles:
    """Nearest-rank percentiles of a length, in the report's unit."""

    p5: int
    p50: int
    p95: int
    max: int

    def __str__(self) -> str:
        return f"{self.p5}/{self.p50}/{self.p95}/{self.max}"


@dataclass
class LanguageReport:
    """What the data holds in one language, on one side.

    Attributes:
        language: ISO 639 code.
        name: English name.
        is_source: True for source pairs.
        pairs: Number of pairs; for sources, each counted once.
        lengths: Percentiles of ``prompt``, ``chosen`` and ``rejected``.
        language_checked: Whether detection knows this language, so that the three language findings mean
            something.
        refusals_checked: Whether there are refusal phrases in this language.
        flagged: Finding -> the pairs it names.
    """

    language: str
    name: str
    is_source: bool
    pairs: int = 0
    lengths: dict[str, Percentiles] = field(default_factory=dict)
    language_checked: bool = True
    refusals_checked: bool = True
    flagged: dict[str, list[FlaggedRow]] = field(default_factory=dict)


@dataclass
class DataReport:
    """The result of :func:`check_data`.

    Attributes:
        origin: The files or the dataset.
        fingerprint: Content hash of the groups.
        groups: Number of groups.
        pairs: Number of target pairs.
        length_unit: ``tokens`` (with the chat template), ``tokens of the texts alone`` (a tokenizer without
            template) or ``characters`` (no tokenizer).
        max_length: Longest prompt plus response, in tokens; None where it was not checked.
        languages: One entry per language and side, sources first, then by number of pairs.
        bad_rows: Rows that break the data contract.
        notes: Sentences about the data as a whole.
        kinds: Number of groups of each kind, where some are harmless.
        reasoning: Number of responses that hold a model's reasoning before their answer; those of a source are counted
            once. Languages, refusals and dialogs are read in the answers, lengths in all that is trained on.
    """

    origin: str
    fingerprint: str
    groups: int
    pairs: int
    length_unit: str
    max_length: int | None
    languages: list[LanguageReport]
    bad_rows: list[BadRow]
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    reasoning: int = 0

    def count(self, finding: str) -> int:
        """Number of pairs that a finding names, over all languages."""
        return sum(len(language.flagged.get(finding, ())) for language in self.languages)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain, JSON-serialisable values."""
        return {
            "origin": self.origin,
            "fingerprint": self.fingerprint,
            "groups": self.groups,
            "pairs": self.pairs,
            **({"kinds": self.kinds} if self.kinds else {}),
            "reasoning": self.reasoning,
            "length_unit": self.length_unit,
            "max_length": self.max_length,
            "languages": [asdict(language) for language in self.languages],
            "findings": {
                name: {"count": self.count(name), "meaning": text} for name, (_, text) in FINDINGS.items()
            },
            "bad_rows": [asdict(row) for row in self.bad_rows],
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """The report for a person: plain text, at most 100 columns."""
        lines = [
            _clip(f"Data      {short_text(self.origin, 80)}"),
            f"Groups    {self.groups}, with {self.pairs} target pairs",
            f"Hash      {self.fingerprint[:16]}",
        ]
        if self.kinds:
            lines.insert(
                2, f"Kinds     {', '.join(f'{number} {kind}' for kind, number in self.kinds.items())}"
            )
        if self.reasoning:
            responses = 2 * sum(language.pairs for language in self.languages)
            lines += _wrapped(
                f"Reasoning {self.reasoning} of {responses} responses hold it. Languages, refusals and dialogs are read in "
                "the answers behind it, lengths in the whole.",
                "",
            )
        for note in self.notes:
            lines += ["", *_wrapped(note, "")]
        if self.languages:
            lines += ["", f"Length in {self.length_unit}: 5th percentile / median / 95th / longest", ""]
            table = [["language", "pairs", *PARTS]]
            for language in self.languages:
                table.append(
                    [
                        _title(language),
                        str(language.pairs),
                        *(str(language.lengths.get(p, "-")) for p in PARTS),
                    ]
                )
            lines += _aligned(table)
            if self.max_length is None:
                lines += ["", "Truncation was not checked: it needs the model's tokenizer."]
        found = [name for name in FINDINGS if self.count(name)]
        if found:
            lines += ["", "Worth a look"]
        elif not self.bad_rows and not self.notes:
            lines += ["", "Nothing stands out."]
        for name in found:
            title, text = FINDINGS[name]
            if name in ("truncated", "prompt_too_long", "same_after_cut"):
                text = text.replace("max_length", f"max_length ({self.max_length})")
            lines += ["", *_wrapped(f"{title}: {counted(self.count(name), 'pair')}. {text}", "  ")]
            for language in self.languages:
                rows = language.flagged.get(name, [])
                if rows:
                    lines += self._rows(language, rows)
        for label, languages in (
            (
                "Language not checked (detection does not know it)",
                [x for x in self.languages if not x.language_checked],
            ),
            ("Refusals not checked (no phrases)", [x for x in self.languages if not x.refusals_checked]),
        ):
            if languages:
                lines += ["", *_wrapped(f"{label}: {', '.join(_title(x) for x in languages)}.", "")]
        if self.bad_rows:
            lines += ["", f"Bad rows: {len(self.bad_rows)}. They stop a run, unless it drops them."]
            faults = grouped_faults(self.bad_rows)
            for fault in faults[:_ROWS_SHOWN]:
                place = short_text(fault.place(_ROWS_SHOWN), 300)
                lines += _wrapped(f"{place}: {short_text(fault.reason, 300)}", "  ")
            if len(faults) > _ROWS_SHOWN:
                more = sum(len(fault.rows) for fault in faults[_ROWS_SHOWN:])
                lines.append(f"  and {more} more of {counted(len(faults) - _ROWS_SHOWN, 'other kind')}")
        return "\n".join(lines) + "\n"

    def _rows(self, language: LanguageReport, rows: Sequence[FlaggedRow]) -> list[str]:
        head = f"    {_title(language)}: {len(rows)} of {language.pairs}"
        several = ", " in self.origin
        if any(row.text is not None for row in rows):
            lines = [head]
            for row in rows[:_ROWS_SHOWN]:
                place = f"{short_text(row.file, 20)}:{row.row}" if several else str(row.row)
                lines.append(_clip(f"      row {place}  {row.text}"))
            return lines
        names = [
            f"{short_text(row.file, 30)}:{row.row}" if several else str(row.row) for row in rows[:_ROWS_SHOWN]
        ]
        more = ", ..." if len(rows) > _ROWS_SHOWN else ""
        noun = "row" if len(names) == 1 else "rows"
        return _wrapped(f"{head.strip()}, {noun} {', '.join(names)}{more}", "    ")


def short_text(text: str, length: int) -> str:
    """A text as it may be printed: one line, short, characters that act on a terminal or on reading order escaped."""
    return printable(shortened(" ".join(text[: 4 * length].split()), length), lines=False)


def _title(language: LanguageReport) -> str:
    return f"{language.name} ({language.language})" + (", source" if language.is_source else "")


def _clip(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(_clip("  " + "  ".join(cells).rstrip()))
    return lines
