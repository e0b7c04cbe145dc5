"""The three commands after a run: ask the model, measure it, serve it."""

from __future__ import annotations

import shlex
from pathlib import Path

from mpo.common.tables import fact_lines


def next_steps(folder: Path, *, base: str, adapter: bool, gpu: bool = True) -> str:
    """What to do with a trained model, a line each, as commands that can be copied.

    Args:
        folder: Where it is.
        base: The model that it was made from.
        adapter: Whether it is an adapter.
        gpu: Whether this machine has one. vLLM needs it; `transformers serve` does not.
    """
    here, merged = str(folder), f"{folder}-merged"
    trained = (base, here) if adapter else (here, "null")
    measure = ["mpo", "evaluate", "suite", "evaluation/demo", "--models.base.model", base]
    measure += ["--models.mpo.model", trained[0], "--models.mpo.adapter", trained[1]]
    server = "vllm" if gpu else "transformers"
    serve = f"{server} serve {shlex.quote(merged if adapter else here)}"
    commands = {
        "Ask it:": shlex.join(["mpo", "chat", here, *(["--compare"] if adapter else [])]),
        "Measure it:": shlex.join([*measure, "--out", f"runs/evaluation/{folder.name}"]),
        "Serve it:": f"{shlex.join(['mpo', 'merge', here, '--out', merged])} && {serve}"
        if adapter
        else serve,
    }
    return fact_lines(commands)
