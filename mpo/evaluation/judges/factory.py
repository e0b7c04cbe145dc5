"""From the names and settings of a command or a recipe to a judge."""

from __future__ import annotations

from mpo.evaluation.judges.judge import Judge, JudgeChoice
from mpo.evaluation.tasks import Task


def check_judge(choice: JudgeChoice, task: Task) -> None:
    """Refuse a judge that cannot judge this task. Nothing is loaded, connected to or looked for on the Hub.

    Raises:
        ConfigError: Its replies say nothing about the task, or its prompt cannot be used.
    """
    if choice.name == "llm":
        from mpo.evaluation.judges.llm import judging_prompt

        judging_prompt(choice.prompt, task)
    elif choice.name == "guard":
        from mpo.evaluation.judges.guard import guard_question

        guard_question(choice, task)


def make_judge(choice: JudgeChoice, task: Task) -> Judge:
    """The judge of a choice, nothing large loaded yet.

    Raises:
        MPOError: Its model, prompt or key cannot be used.
    """
    if choice.name == "llm":
        from mpo.evaluation.judges.llm import LLMJudge

        return LLMJudge(choice, task)
    if choice.name == "guard":
        from mpo.evaluation.judges.guard import GuardJudge

        return GuardJudge(choice, task)
    from mpo.evaluation.judges.phrases import PhraseJudge

    return PhraseJudge(task)
