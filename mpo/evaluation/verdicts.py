"""Verdicts of a judge on answers, on disk as they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mpo.common.journal import Journal, settle
from mpo.common.progress import CountProgress
from mpo.common.statistics import Kappa, cohen_kappa
from mpo.errors import ConfigError
from mpo.evaluation.answers import AnswerRow, fingerprint_answers
from mpo.evaluation.judges import Exchange, Judge, Verdict
from mpo.evaluation.judges.phrases import PhraseJudge
from mpo.evaluation.tasks import BLOCKED, NO_VERDICT, UNFINISHED, UNPARSED, Task

Verdicts = Mapping[str, str]
"""Verdict by the answer's id."""


@dataclass(frozen=True)
class VerdictRow:
    """One row of ``verdicts.JUDGE.jsonl``.

    Attributes:
        id: That of the answer.
        prompt_id: The same for the translations of one request.
        language: Code of the prompt's language.
        verdict: One of the task's, ``unparsed``, ``blocked`` or ``unfinished``.
        reply: What the judge wrote; None where it was not asked.
    """

    id: str
    prompt_id: str
    language: str
    verdict: str
    reply: str | None = None


def verdicts_file(folder: Path, label: str) -> Path:
    """Where a judge's verdicts are."""
    return folder / f"verdicts.{label}.jsonl"


def judge_answers(judge: Judge, task: Task, answers: list[AnswerRow], folder: Path) -> dict[str, str]:
    """Judges every answer that has no verdict in ``folder/verdicts.LABEL.jsonl`` yet.

    Verdicts on other answers or with other settings are an error, but for those of refusal phrases, which cost nothing: all are
    given anew. A judge sees the answer without its reasoning. What is no answer, or one without any text, is not shown to it: its
    verdict is ``blocked``, ``unfinished``, or the task's own. In a language without refusal phrases, those judge no answer.

    Args:
        judge: What judges.
        task: What it judges by.
        answers: The answers.
        folder: Where the verdicts are, and where they go.

    Returns:
        The verdict of every answer, by its id, in the order of the answers.

    Raises:
        ConfigError: The folder holds verdicts on other answers, or of the same judge with other settings.
        MPOError: The judge cannot be reached or used. Verdicts given before are kept.
    """
    with Journal(verdicts_file(folder, judge.label), VerdictRow) as journal:
        settings = {"answers": fingerprint_answers(answers), **judge.settings()}
        try:
            settle(journal.path, settings, empty=not journal.rows)
        except ConfigError:
            if not isinstance(judge, PhraseJudge):
                raise
            journal.clear()
            settle(journal.path, settings, empty=True)

        def keep(row: AnswerRow, verdict: Verdict) -> None:
            journal.append(
                asdict(VerdictRow(row.id, row.prompt_id, row.language, verdict.verdict, verdict.reply))
            )

        for row in answers:
            if row.id not in journal.rows and (known := _without_judge(judge, task, row)) is not None:
                keep(row, known)
        left = [row for row in answers if row.id not in journal.rows]
        if left:
            done = len(answers) - len(left)
            with CountProgress(
                f"Judging ({judge.label})", len(answers), done=done, unit="answer"
            ) as progress:
                for index, verdict in judge.judge(
                    [Exchange(row.prompt, row.parts.answer, row.language) for row in left]
                ):
                    keep(left[index], verdict)
                    progress.advance()
        return {row.id: journal.rows[row.id]["verdict"] for row in answers}


def judge_unwritten(judge: Judge, task: Task, answers: Sequence[AnswerRow]) -> dict[str, str]:
    """The verdicts of :func:`judge_answers` by the answers' ids, without files: for a judge that costs nothing."""
    known = {row.id: _without_judge(judge, task, row) for row in answers}
    left = [row for row in answers if known[row.id] is None]
    given = judge.judge([Exchange(row.prompt, row.parts.answer, row.language) for row in left])
    verdicts = {left[index].id: verdict for index, verdict in given}
    return {row.id: (known[row.id] or verdicts[row.id]).verdict for row in answers}


def _without_judge(judge: Judge, task: Task, row: AnswerRow) -> Verdict | None:
    """The verdict on what is no answer or an empty one; None where a judge is asked."""
    if row.blocked is not None:
        return Verdict(BLOCKED)
    if not row.parts.complete:
        return Verdict(UNFINISHED)
    if row.parts.answer.strip() or (isinstance(judge, PhraseJudge) and not judge.reads(row.language)):
        return None
    return Verdict(task.empty)


def agreement(first: Verdicts, second: Verdicts, confidence: float = 0.95) -> Kappa | None:
    """Agreement of two judges on the answers for which both gave a verdict; None where there is no such answer."""
    both = [
        (verdict, second[name])
        for name, verdict in first.items()
        if not {verdict, second.get(name, UNPARSED)} & set(NO_VERDICT)
    ]
    if not both:
        return None
    return cohen_kappa([a for a, _ in both], [b for _, b in both], confidence)


def unparsed(verdicts: Verdicts | Sequence[str]) -> int:
    """How many verdicts could not be read."""
    values = verdicts.values() if isinstance(verdicts, Mapping) else verdicts
    return sum(verdict == UNPARSED for verdict in values)
