"""What says whether an answer is safe, or a refusal. All judges have one interface, :class:`Judge`."""

from __future__ import annotations

from mpo.evaluation.judges.factory import check_judge, make_judge
from mpo.evaluation.judges.judge import JUDGES, Exchange, Judge, JudgeChoice, Verdict

__all__ = ["JUDGES", "Exchange", "Judge", "JudgeChoice", "Verdict", "check_judge", "make_judge"]
