"""A report on preference data: what is in it, and which rows deserve a look before anything is trained."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from mpo.common.characters import printable
from mpo.common.words import counted, shortened
from mpo.data import spilling
from mpo.data.contract import (
    HARMLESS,
    PARTS,
    answers_read,
    is_blank,
    is_same_text,
    messages_text,
    pair_digest,
)
from mpo.data.detection import detect_all, expect
from mpo.data.faults import BadRow, grouped_faults
from mpo.data.forms.readers import holds_marks
from mpo.data.languages import UNDETERMINED, detect, known_to_detection, language_name, same_language
from mpo.data.loading import LoadedGroups, _load, count_kinds
from mpo.data.refusals import opens_with_refusal, refusal_languages
from mpo.errors import ConfigError

_WIDTH = 100
_AT_ONCE = 680  # groups whose texts are looked at together
_ROWS_SHOWN = 12
_TEXT_SHOWN = 60
_SAMPLE = 200  # sources whose language is compared with the setting
_LEAST_VOTES = 5

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

# Turns as in HH-RLHF and other written dialogs.
_DIALOG = re.compile(r"(?:^|\n)\s*(?:Human|User|H)\s*:.*\n\s*(?:Assistant|A)\s*:", re.DOTALL)

_FINDING_PART = {
    "untranslated_prompt": "prompt",
    "untranslated_rejected": "rejected",
    "prompt_too_long": "prompt",
    "prompt_language": "prompt",
    "empty_prompt": "prompt",
    "same_prompt": "prompt",
    "rejected_language": "rejected",
    "rejected_refusal": "rejected",
}


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
            _clip(f"Data      {_shown(self.origin, 80)}"),
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
            lines += ["", *_wrapped(f"{title}: {self.count(name)} pairs. {text}", "  ")]
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
                place = _shown(fault.place(_ROWS_SHOWN), 300)
                lines += _wrapped(f"{place}: {_shown(fault.reason, 300)}", "  ")
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
                place = f"{_shown(row.file, 20)}:{row.row}" if several else str(row.row)
                lines.append(_clip(f"      row {place}  {row.text}"))
            return lines
        names = [
            f"{_shown(row.file, 30)}:{row.row}" if several else str(row.row) for row in rows[:_ROWS_SHOWN]
        ]
        more = ", ..." if len(rows) > _ROWS_SHOWN else ""
        return _wrapped(f"{head.strip()}, rows {', '.join(names)}{more}", "    ")


def check_data(
    data: Any,
    *,
    tokenizer: Any = None,
    source_language: str = "en",
    max_length: int | None = 1024,
    max_response_length: int | None = None,
    split: str = "train",
    limit: int | None = None,
    languages: Iterable[str] | None = None,
    show_texts: bool = False,
) -> DataReport:
    """Look through preference data and report what is in it.

    Args:
        data: Anything that :func:`mpo.data.load_groups` takes.
        tokenizer: Tokenizer of the model, for lengths in its tokens and for truncation. Lengths are
            characters without it.
        source_language: Language of sources without a label.
        max_length: Longest prompt plus response in training, in tokens.
        max_response_length: Longest response in training, in tokens.
        split: Split of a Hub dataset.
        limit: Look at the first N sources only.
        languages: Look at these target languages only.
        show_texts: Put the beginning of each flagged text (escaped, 60 characters) into the report. Safety
            data is harmful on purpose, so texts are left out by default.

    Raises:
        DataError: A file as a whole cannot be read. Bad rows are reported instead.
        ConfigError: A setting has an impossible value.
    """
    for name, value, least in (
        ("max_length", max_length, 2),
        ("max_response_length", max_response_length, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ConfigError(f"{name}: expected a whole number of at least {least}, or None, got {value!r}.")
    mistaken: Counter[str] = Counter()
    read = partial(_load, data, split=split, bad_rows="drop", limit=limit, languages=languages)
    loaded, _ = read(source_language=source_language, mistaken=mistaken)
    notes = []
    if (found := _other_source_language(loaded, mistaken)) is not None:
        notes.append(
            f"The sources are in {language_name(found)}, but the source language is set to {source_language!r}: set "
            f"`source_language: {found}`. The rest of this report is as if it were."
        )
        loaded, _ = read(source_language=found)
    survey = _Survey(tokenizer, max_length, max_response_length, show_texts)
    pairs = 0
    for table in loaded.groups.with_format("arrow").iter(_AT_ONCE):
        groups = table.to_pylist()
        expect(
            [
                text
                for g in groups
                for pair in (g["source"], *g["targets"])
                for text in answers_read(pair).values()
            ]
        )
        for group in groups:
            harmless = group.get("kind") == HARMLESS
            survey.add(group["source"], None, group["origin"], harmless)
            for target in group["targets"]:
                survey.add(target, group["source"], group["origin"], harmless)
                pairs += 1
        spilling.release()
    kinds = count_kinds(loaded.groups)
    return DataReport(
        origin=loaded.origin,
        fingerprint=loaded.fingerprint,
        groups=len(loaded.groups),
        pairs=pairs,
        length_unit=survey.unit,
        max_length=max_length if tokenizer is not None else None,
        languages=survey.reports(),
        bad_rows=loaded.dropped,
        notes=notes,
        kinds=kinds if kinds[HARMLESS] else {},
        reasoning=survey.reasoning,
    )


def _other_source_language(loaded: LoadedGroups, mistaken: Counter[str]) -> str | None:
    """The language that most sources are in, where it is not the one they were taken to be in."""
    votes, seen = mistaken.copy(), mistaken.total()
    sources = loaded.groups[:_SAMPLE]["source"]
    texts = [messages_text([*source["prompt"], *source["chosen"]]) for source in sources]
    for source, found in zip(sources, detect_all(texts), strict=True):
        seen += found.certain
        if found.certain and not same_language(found.language, source["language"]):
            votes[found.language] += 1
    language, number = max(votes.items(), key=lambda vote: vote[1], default=("", 0))
    return language if number >= _LEAST_VOTES and number > 0.5 * seen else None


class _Survey:
    """Collects the report, pair by pair."""

    def __init__(
        self, tokenizer: Any, max_length: int | None, max_response_length: int | None, show_texts: bool
    ) -> None:
        self._tokenizer, self._max_length, self._show_texts = tokenizer, max_length, show_texts
        self._max_response_length = max_response_length
        self._templated = bool(getattr(tokenizer, "chat_template", None))
        self.unit = (
            "characters"
            if tokenizer is None
            else "tokens"
            if self._templated
            else "tokens of the texts alone"
        )
        self._reports: dict[tuple[bool, str], LanguageReport] = {}
        self._lengths: dict[tuple[bool, str], dict[str, array[int]]] = {}
        self.reasoning = 0
        self._targets_seen: set[bytes] = set()
        self._in_source: set[bytes] = set()
        self._prompts_seen: set[bytes] = set()

    def add(
        self, pair: Mapping[str, Any], source: Mapping[str, Any] | None, origin: str, harmless: bool
    ) -> None:
        key = (source is None, pair["language"])
        report = self._reports.get(key)
        if report is None:
            language = pair["language"]
            report = self._reports[key] = LanguageReport(
                language,
                language_name(language),
                source is None,
                language_checked=language == UNDETERMINED or language in known_to_detection([language]),
                refusals_checked=language in refusal_languages(),
            )
            self._lengths[key] = {part: array("q") for part in PARTS}
        report.pairs += 1
        texts = {part: messages_text(pair[part]) for part in PARTS}
        read = answers_read(pair, texts)
        self.reasoning += sum(read[part] is not texts[part] for part in PARTS[1:])

        def flag(finding: str) -> None:
            shown = (
                _shown(texts[_FINDING_PART.get(finding, "chosen")], _TEXT_SHOWN) if self._show_texts else None
            )
            report.flagged.setdefault(finding, []).append(FlaggedRow(origin, pair["row"], shown))

        self._add_lengths(pair, texts, self._lengths[key], flag)
        self._add_languages(pair, read, report, flag)
        self._add_refusals(pair, read, source, report, flag, harmless)
        self._add_repetitions(pair, source, flag)
        if is_blank(texts["prompt"]):
            flag("empty_prompt")
        if any("\ufffd" in text for text in texts.values()):
            flag("broken_characters")
        if any(map(_holds_dialog, read.values())):
            flag("dialog")
        if not (read["chosen"] and read["rejected"]):
            flag("no_answer")
        for part in PARTS:
            if source is not None and is_same_text(texts[part], messages_text(source[part])):
                flag(f"untranslated_{part}")

    def _add_lengths(
        self, pair: Mapping[str, Any], texts: Mapping[str, str], lengths: dict[str, array[int]], flag: Any
    ) -> None:
        measured = self._measure(pair, texts)
        if measured is None:
            flag("template_refuses")
            return
        for part, units in measured.items():
            lengths[part].append(len(units))
        if self._tokenizer is None:
            return
        prompt, chosen, rejected = (measured[part] for part in PARTS)
        if self._max_length is not None:
            if len(prompt) >= self._max_length:
                flag("prompt_too_long")
                return
            if len(prompt) + max(len(chosen), len(rejected)) > self._max_length:
                flag("truncated")
        room = None if self._max_length is None else self._max_length - len(prompt)
        cut = min((limit for limit in (room, self._max_response_length) if limit is not None), default=None)
        if chosen[:cut] == rejected[:cut]:
            flag("same_after_cut")

    def _measure(
        self, pair: Mapping[str, Any], texts: Mapping[str, str]
    ) -> Mapping[str, Sequence[Any]] | None:
        """The three parts in the report's unit; None where the chat template refuses the messages."""
        if self._tokenizer is None:
            return texts
        if not self._templated:
            return {
                part: self._tokenizer(text, add_special_tokens=False)["input_ids"]
                for part, text in texts.items()
            }
        try:
            prompt = self._template(pair["prompt"], generation=True)
            # What the template renders behind the prompt counts as response, as in training.
            return {
                "prompt": prompt,
                **{part: self._template(pair["prompt"] + pair[part])[len(prompt) :] for part in PARTS[1:]},
            }
        except Exception:
            # Templates are programs of the model's authors: they raise Jinja errors, TypeErrors, anything.
            return None

    def _template(self, messages: Sequence[Mapping[str, str]], *, generation: bool = False) -> Sequence[int]:
        tokens = self._tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=generation, return_dict=False
        )
        return list(tokens)

    def _add_languages(
        self, pair: Mapping[str, Any], texts: Mapping[str, str], report: LanguageReport, flag: Any
    ) -> None:
        if pair["language"] == UNDETERMINED:
            flag("undetermined")
            return
        if not report.language_checked:
            return
        for part in PARTS:
            found = detect(texts[part])
            if found.certain and not same_language(found.language, pair["language"]):
                flag(f"{part}_language")

    def _add_refusals(
        self,
        pair: Mapping[str, Any],
        texts: Mapping[str, str],
        source: Mapping[str, Any] | None,
        report: LanguageReport,
        flag: Any,
        harmless: bool,
    ) -> None:
        if not report.refusals_checked:
            return
        # Untranslated refusals stand on target sides, and are refusals all the same.
        languages = [pair["language"], *([source["language"]] if source else [])]
        chosen_refuses = opens_with_refusal(texts["chosen"], *languages)
        if harmless:
            if chosen_refuses:
                flag("harmless_refused")
            return
        if not chosen_refuses:
            flag("chosen_no_refusal")
        if opens_with_refusal(texts["rejected"], *languages):
            flag("rejected_refusal")

    def _add_repetitions(self, pair: Mapping[str, Any], source: Mapping[str, Any] | None, flag: Any) -> None:
        whole = pair_digest(pair)
        if source is None:
            prompt = pair_digest(pair, ("prompt",))
            if prompt in self._prompts_seen:
                flag("same_prompt")
            self._prompts_seen.add(prompt)
            return
        of_source = pair_digest(source, PARTS, pair["language"])
        if whole in self._targets_seen:
            flag("same_target")
        elif of_source in self._in_source:
            flag("same_source_and_language")
        self._targets_seen.add(whole)
        self._in_source.add(of_source)

    def reports(self) -> list[LanguageReport]:
        for key, report in self._reports.items():
            report.lengths = {
                part: _percentiles(lengths) for part, lengths in self._lengths[key].items() if lengths
            }
            for rows in report.flagged.values():
                rows.sort(key=lambda flagged: (flagged.file, flagged.row))
        return sorted(
            self._reports.values(), key=lambda report: (not report.is_source, -report.pairs, report.language)
        )


def _holds_dialog(text: str) -> bool:
    # The pattern looks at every line's beginning, so it is asked only where there may be something.
    return (":" in text and _DIALOG.search(text) is not None) or holds_marks(text)


def _percentiles(values: Sequence[int]) -> Percentiles:
    ordered = sorted(values)

    def rank(percent: int) -> int:
        # Nearest rank: the smallest value that at least this share of the values does not exceed.
        return ordered[max(-(-percent * len(ordered) // 100), 1) - 1]

    return Percentiles(rank(5), rank(50), rank(95), ordered[-1])


def _shown(text: str, length: int) -> str:
    """A text as it may be printed: one line, short, characters that act on a terminal or on reading order escaped."""
    return printable(shortened(" ".join(text[: 4 * length].split()), length), lines=False)


def _title(language: LanguageReport) -> str:
    return f"{language.name} ({language.language})" + (", source" if language.is_source else "")


def _clip(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..."


def _wrapped(text: str, indent: str) -> list[str]:
    import textwrap

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
