"""What answers prompts: a model in this process, vLLM, or a server. All have one interface, :class:`Engine`."""

from __future__ import annotations

from mpo.evaluation.engines.engine import ENGINES, Answer, Engine, Generation, ModelChoice
from mpo.evaluation.engines.factory import make_engine

__all__ = ["ENGINES", "Answer", "Engine", "Generation", "ModelChoice", "make_engine"]
