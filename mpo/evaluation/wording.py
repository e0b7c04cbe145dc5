"""In which language a model answers, and whether it babbles: what no verdict says.

The language is the word of :func:`mpo.data.languages.detect`. Where it cannot know, the answer is counted as *unknown* and is
in no share: a text without letters or with too few of them, a language that the detector does not have, one too close to the
language asked to be told from it (Malay in answer to Indonesian), and prompts in mixed languages.

Babble is measured as *repetition*, the share of a text's character 10-grams (without white space) that stood in it before; of
a text of fewer than 30 characters its n-grams, n being a third of its length. Characters and not words, since Chinese, Japanese
and Thai write no spaces. An answer is repetitive above one half. Of the 3,451 texts of the published MPO pairs for Gemma, in
seven languages, none is above 0.18; of the 3,342 for Llama, 86 are above one half, and those that were read end in a loop.
Nonsense that does not repeat itself is not found, and a text of fewer than 12 characters is not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from mpo.common.statistics import wilson_interval
from mpo.common.tables import TextTable
from mpo.common.typed_json import Count, Share
from mpo.data.languages import detect, known_to_detection, same_language
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.rates import Ends, shown_language, shown_share
from mpo.evaluation.tasks import BLOCKED, UNFINISHED, Task

_GRAM, _SHORTEST, _LONGEST = 10, 12, 20_000  # characters
_REPETITIVE = 0.5


@dataclass(frozen=True)
class Wording:
    """The answers to the prompts of one language.

    Attributes:
        language: Its code.
        count: Answers that hold any text.
        asked: Those in the language of the prompt.
        others: Those in another language, by its code.
        others_by_verdict: The same by the judge's verdict: ``refusal`` counts the refusals in another language.
        repetitive: Those that repeat themselves.
        share: Share of `asked` among those whose language is known; None where none is.
        interval: Wilson interval of the share; None with it.
    """

    language: Annotated[str, Field(exclude=True)]
    count: Count
    asked: Count
    others: dict[str, Count] = field(default_factory=dict)
    others_by_verdict: dict[str, Count] = field(default_factory=dict)
    repetitive: Count = 0
    share: Share | None = None
    interval: Ends = None

    @property
    def unknown(self) -> int:
        """Answers whose language cannot be told."""
        return self.count - self.asked - sum(self.others.values())


def repetition(text: str) -> float | None:
    """Share of the character n-grams that stood in the text before; None where it is too short to say."""
    letters = "".join(text[:_LONGEST].casefold().split())
    if len(letters) < _SHORTEST:
        return None
    size = min(_GRAM, len(letters) // 3)
    grams = [letters[start : start + size] for start in range(len(letters) - size + 1)]
    return 1 - len(set(grams)) / len(grams)


def is_repetitive(text: str) -> bool:
    """Whether more than half of a text repeats what stood in it before."""
    return (repetition(text) or 0.0) > _REPETITIVE


def answer_language(row: AnswerRow) -> str | None:
    """Code of the language that an answer is in, as far as it can be told; None where it cannot."""
    if not known_to_detection([row.language]):
        return None
    found = detect(row.parts.answer)
    if not found.certain or (found.language != row.language and same_language(found.language, row.language)):
        return None
    return found.language


def in_language_asked(answers: Sequence[AnswerRow]) -> dict[str, dict[str, float]]:
    """``{language: {prompt id: 1 or 0}}``: is the answer in the language of its prompt? Unknown ones are left out."""
    out: dict[str, dict[str, float]] = {}
    for row in answers:
        if _says_something(row) and (found := answer_language(row)) is not None:
            out.setdefault(row.language, {})[row.prompt_id] = float(found == row.language)
    return out


def in_no_known_language(
    answers: Sequence[AnswerRow], told: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """``{language: {prompt id: 1 or 0}}``: can the answer's language not be told? Languages that never can are left out.

    Args:
        answers: All answers.
        told: Ids of answers whose language something else has told.
    """
    out: dict[str, dict[str, float]] = {}
    for row in answers:
        if _says_something(row) and known_to_detection([row.language]):
            out.setdefault(row.language, {})[row.prompt_id] = float(
                row.id not in told and answer_language(row) is None
            )
    return out


def repeats_itself(answers: Sequence[AnswerRow]) -> dict[str, dict[str, float]]:
    """``{language: {prompt id: 1 or 0}}``: is the answer repetitive? Those too short to say are left out."""
    out: dict[str, dict[str, float]] = {}
    for row in answers:
        if _says_something(row) and repetition(row.parts.answer) is not None:
            out.setdefault(row.language, {})[row.prompt_id] = float(is_repetitive(row.parts.answer))
    return out


def measure_wording(
    answers: Sequence[AnswerRow], verdicts: Mapping[str, str], confidence: float = 0.95
) -> dict[str, Wording]:
    """Language and repetition of the answers, by the language of the prompts.

    Args:
        answers: All answers; blocked and unfinished ones and those without text are left out.
        verdicts: The verdict of each, by id.
        confidence: Coverage of the intervals.
    """
    by_language: dict[str, list[AnswerRow]] = {}
    for row in answers:
        by_language.setdefault(row.language, [])
        if _says_something(row) and verdicts[row.id] not in (BLOCKED, UNFINISHED):
            by_language[row.language].append(row)
    return {code: _wording(code, rows, verdicts, confidence) for code, rows in by_language.items()}


def _wording(
    language: str, rows: Sequence[AnswerRow], verdicts: Mapping[str, str], confidence: float
) -> Wording:
    found = [answer_language(row) for row in rows]
    asked = sum(code == language for code in found)
    others = Counter(code for code in found if code not in (None, language))
    by_verdict = Counter(
        verdicts[row.id] for row, code in zip(rows, found, strict=True) if code not in (None, language)
    )
    known = asked + others.total()
    return Wording(
        language,
        len(rows),
        asked,
        {str(code): count for code, count in others.most_common()},
        dict(by_verdict),
        sum(is_repetitive(row.parts.answer) for row in rows),
        asked / known if known else None,
        wilson_interval(asked, known, confidence) if known else None,
    )


def _says_something(row: AnswerRow) -> bool:
    return row.blocked is None and row.parts.complete and bool(row.parts.answer.strip())


def wording_table(
    title: str, task: Task, wording: Mapping[str, Wording], confidence: float = 0.95
) -> TextTable:
    """The table for people."""
    refused = _refused(task)
    header = (
        "Language",
        "Answers",
        f"In it [{100 * confidence:g} %]",
        "elsewhere",
        f"of them {refused}",
        "unknown",
        "repetitive",
    )
    rows = tuple(
        (
            shown_language(code),
            str(row.count),
            shown_share(row.share, *(row.interval or (None, None))),
            str(sum(row.others.values())),
            str(row.others_by_verdict.get(refused, 0)),
            str(row.unknown),
            str(row.repetitive),
        )
        for code, row in wording.items()
    )
    notes = ["The share is of the answers whose language can be told."]
    if sum(row.unknown for row in wording.values()):
        notes.append(
            "Unknown are answers too short, without letters, or in languages too close to be told apart; they are in no share."
        )
    others = Counter[str]()
    for row in wording.values():
        others.update(row.others)
    if others:
        named = ", ".join(f"{shown_language(code)} {count}" for code, count in others.most_common(5))
        notes.append(f"Answered instead in: {named}.")
    return TextTable(title, header, rows, notes=tuple(notes), emphasis=frozenset({2}))


def _refused(task: Task) -> str:
    """The verdict that a refusal gets."""
    return "refusal" if "refusal" in task.verdicts else "safe"
