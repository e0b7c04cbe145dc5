"""Looking through groups: what can be said of each pair alone, part by part, and what pairs share in their order."""

from __future__ import annotations

import re
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

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
from mpo.data.detection import expect
from mpo.data.findings import FlaggedRow, LanguageReport, Percentiles, short_text
from mpo.data.forms.readers import holds_marks
from mpo.data.languages import UNDETERMINED, detect, known_to_detection, language_name, same_language
from mpo.data.refusals import opens_with_refusal, refusal_languages

_AT_ONCE = 680  # groups whose texts are looked at together
SEVERAL_FROM = 6 * _AT_ONCE  # groups that are looked at in several processes
_TEXT_SHOWN = 60

# Turns as in HH-RLHF and other written dialogs.
_DIALOG = re.compile(r"(?:^|\n)\s*(?:Human|User|H)\s*:.*\n\s*(?:Assistant|A)\s*:", re.DOTALL)

_Flagged = tuple[str, int, str | None]  # file, row and text, which become a FlaggedRow

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


class _Once(NamedTuple):
    """What says whether a pair stands earlier in the data.

    Attributes:
        key: Of the report that it belongs to.
        row: What is flagged.
        whole: Digest of a target pair; of a source's prompt.
        in_source: Of a target: digest of its source and its language.
    """

    key: tuple[bool, str]
    row: _Flagged
    whole: bytes
    in_source: bytes | None


@dataclass
class _Part:
    """What was found in some groups that follow each other.

    Attributes:
        reports: By side and language: what is known before its lengths and findings.
        flagged: Findings, each with what it names in the order of the groups.
        at_first: How many pairs stand before a finding's first row, in the order in which findings were first made.
        lengths: Lengths of each part of a pair.
        pairs: All of them.
        reasoning: Number of responses that hold reasoning.
    """

    reports: dict[tuple[bool, str], LanguageReport] = field(default_factory=dict)
    flagged: dict[tuple[bool, str], dict[str, list[_Flagged]]] = field(default_factory=dict)
    at_first: list[tuple[int, tuple[bool, str], str]] = field(default_factory=list)
    lengths: dict[tuple[bool, str], dict[str, array[int]]] = field(default_factory=dict)
    pairs: list[_Once] = field(default_factory=list)
    reasoning: int = 0


class Survey:
    """Collects the report: what can be said of each pair alone part by part, and what pairs share in their order."""

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
        self._found = _Part()
        self._targets_seen: set[bytes] = set()
        self._in_source: set[bytes] = set()
        self._prompts_seen: set[bytes] = set()

    @property
    def pairs(self) -> int:
        """Number of target pairs."""
        return sum(report.pairs for report in self._found.reports.values() if not report.is_source)

    @property
    def reasoning(self) -> int:
        """Number of responses that hold reasoning."""
        return self._found.reasoning

    def parts(self, groups: Any, first: int, step: int) -> Iterator[_Part]:
        """What is found in the groups ``first * _AT_ONCE`` and following, and in every ``step``-th part after them.

        Args:
            groups: A dataset of groups whose format is Arrow.
            first: Number of the first part.
            step: How many parts further on the next one is.
        """
        for start in range(first * _AT_ONCE, len(groups), step * _AT_ONCE):
            part = self._look_at(groups[start : start + _AT_ONCE].to_pylist())
            spilling.release()
            yield part

    def _look_at(self, groups: Sequence[Mapping[str, Any]]) -> _Part:
        expect(
            [
                text
                for group in groups
                for pair in (group["source"], *group["targets"])
                for text in answers_read(pair).values()
            ]
        )
        part = _Part()
        for group in groups:
            harmless, origin = group.get("kind") == HARMLESS, sys.intern(group["origin"])
            self._add(part, group["source"], None, origin, harmless)
            for target in group["targets"]:
                self._add(part, target, group["source"], origin, harmless)
        return part

    def merge(self, part: _Part) -> None:
        """Adds what follows all that was merged before."""
        found = self._found
        for key, report in part.reports.items():
            if key in found.reports:
                found.reports[key].pairs += report.pairs
                for name, lengths in part.lengths[key].items():
                    found.lengths[key][name].extend(lengths)
            else:
                found.reports[key], found.lengths[key] = report, part.lengths[key]
                found.flagged[key] = {}
        found.reasoning += part.reasoning
        # Findings stand in the order in which they are first made, repetitions among the others.
        at_first = deque(part.at_first)
        for index, pair in enumerate(part.pairs):
            while at_first and at_first[0][0] <= index:
                _, key, finding = at_first.popleft()
                found.flagged[key].setdefault(finding, [])
            if (repeated := self._repeats(pair)) is not None:
                found.flagged[pair.key].setdefault(repeated, []).append(pair.row)
        for key, flagged in part.flagged.items():
            for finding, rows in flagged.items():
                found.flagged[key].setdefault(finding, []).extend(rows)

    def _add(
        self,
        part: _Part,
        pair: Mapping[str, Any],
        source: Mapping[str, Any] | None,
        origin: str,
        harmless: bool,
    ) -> None:
        key = (source is None, pair["language"])
        report = part.reports.get(key)
        if report is None:
            language = pair["language"]
            report = part.reports[key] = LanguageReport(
                language,
                language_name(language),
                source is None,
                language_checked=language == UNDETERMINED or language in known_to_detection([language]),
                refusals_checked=language in refusal_languages(),
            )
            part.lengths[key] = {name: array("q") for name in PARTS}
            part.flagged[key] = {}
        report.pairs += 1
        texts = {name: messages_text(pair[name]) for name in PARTS}
        read = answers_read(pair, texts)
        part.reasoning += sum(read[name] is not texts[name] for name in PARTS[1:])
        flagged = part.flagged[key]

        def row(finding: str) -> _Flagged:
            text = texts[_FINDING_PART.get(finding, "chosen")]
            return origin, pair["row"], short_text(text, _TEXT_SHOWN) if self._show_texts else None

        def flag(finding: str) -> None:
            rows = flagged.get(finding)
            if rows is None:
                rows = flagged[finding] = []
                part.at_first.append((len(part.pairs), key, finding))
            rows.append(row(finding))

        self._add_lengths(pair, texts, part.lengths[key], flag)
        self._add_languages(pair, read, report, flag)
        self._add_refusals(pair, read, source, report, flag, harmless)
        part.pairs.append(_once(key, pair, source, row))
        if is_blank(texts["prompt"]):
            flag("empty_prompt")
        if any("\ufffd" in text for text in texts.values()):
            flag("broken_characters")
        if any(map(_holds_dialog, read.values())):
            flag("dialog")
        if not (read["chosen"] and read["rejected"]):
            flag("no_answer")
        for name in PARTS:
            if source is not None and is_same_text(texts[name], messages_text(source[name])):
                flag(f"untranslated_{name}")

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

    def _repeats(self, pair: _Once) -> str | None:
        """The finding of a pair that stands earlier in the data."""
        if pair.in_source is None:
            repeated = "same_prompt" if pair.whole in self._prompts_seen else None
            self._prompts_seen.add(pair.whole)
            return repeated
        if pair.whole in self._targets_seen:
            repeated = "same_target"
        else:
            repeated = "same_source_and_language" if pair.in_source in self._in_source else None
        self._targets_seen.add(pair.whole)
        self._in_source.add(pair.in_source)
        return repeated

    def reports(self) -> list[LanguageReport]:
        """A report for each language and side; the survey is over then."""
        found = self._found
        for key, report in found.reports.items():
            report.lengths = {
                name: _percentiles(lengths) for name, lengths in found.lengths[key].items() if lengths
            }
            for finding, rows in found.flagged[key].items():
                rows.sort(key=itemgetter(0, 1))
                report.flagged[finding] = [FlaggedRow(*row) for row in rows]
                rows.clear()
        return sorted(
            found.reports.values(), key=lambda report: (not report.is_source, -report.pairs, report.language)
        )


def _once(
    key: tuple[bool, str],
    pair: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    row: Callable[[str], _Flagged],
) -> _Once:
    if source is None:
        return _Once(key, row("same_prompt"), pair_digest(pair, ("prompt",)), None)
    return _Once(key, row("same_target"), pair_digest(pair), pair_digest(source, PARTS, pair["language"]))


def _holds_dialog(text: str) -> bool:
    # The pattern looks at every line's beginning, so it is asked only where there may be something.
    return (":" in text and _DIALOG.search(text) is not None) or holds_marks(text)


def _percentiles(values: Sequence[int]) -> Percentiles:
    ordered = sorted(values)

    def rank(percent: int) -> int:
        # Nearest rank: the smallest value that at least this share of the values does not exceed.
        return ordered[max(-(-percent * len(ordered) // 100), 1) - 1]

    return Percentiles(rank(5), rank(50), rank(95), ordered[-1])
