"""From the names and settings of a command or a recipe to an engine."""

from __future__ import annotations

from mpo.evaluation.engines.engine import Engine, Generation, ModelChoice


def make_engine(choice: ModelChoice, generation: Generation) -> Engine:
    """The engine of a choice, nothing large loaded yet.

    Raises:
        MPOError: The model cannot be used, a package is missing, or settings contradict each other.
    """
    if choice.engine == "server":
        from mpo.evaluation.engines.server import ServerEngine

        return ServerEngine(choice, generation)
    if choice.engine == "vllm":
        from mpo.evaluation.engines.vllm import VLLMEngine

        return VLLMEngine(choice, generation)
    from mpo.evaluation.engines.local import LocalEngine

    return LocalEngine(choice, generation)
