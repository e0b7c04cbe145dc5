"""Starts two processes on this machine's CPU as ``accelerate launch`` starts them on GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"


def environment() -> dict[str, str]:
    """The variables of a launched process: this checkout, one thread, and nothing of a launcher around the tests."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    theirs = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    return {**{name: value for name, value in os.environ.items() if name not in theirs}, **ours}


def launch(
    engine: str, arguments: Sequence[str | Path], *, ranks: int = 2, hang_after: float = 600
) -> subprocess.CompletedProcess[str]:
    """
    Run a script under one of the Accelerate configurations of the repository.

    Args:
        engine: name of the configuration.
        arguments: the script and its own arguments.
        ranks: number of processes.
        hang_after: seconds after which the processes are taken to hang and are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment()
    if not engine.startswith("zero"):
        # The configuration is for GPUs; this is what makes it gloo on a CPU. DeepSpeed looks for itself.
        variables["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *("--config_file", str(CONFIGS / f"{engine}.yaml")),
            *("--num_processes", str(ranks), "--main_process_port", str(port)),
            *map(str, arguments),
        ],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=hang_after,
    )
