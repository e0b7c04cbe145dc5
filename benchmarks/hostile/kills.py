"""Runs that are killed at any moment and begun again: what comes of them is what comes of one that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.hostile.cases import Tally

_ROOT = Path(__file__).parents[2]
_SECONDS = 1800.0


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }


def run(command: Sequence[str], log: Path, after: float | None = None) -> int:
    """Exit status of a command; with ``after`` it and all it started are killed after so many seconds."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            list(command),
            cwd=_ROOT,
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(_SECONDS if after is None else after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def _kill_all(
    draw: random.Random,
    folder: Path,
    number: int,
    name: str,
    command: Callable[[Path], list[str]],
    result: Callable[[Path], Any],
) -> Tally:
    """Kills so many runs, each once and at any moment from its first sign of life on, and begins them again."""
    tally = Tally()
    log = folder / "log.txt"
    start = time.monotonic()
    if status := run(command(folder / "whole"), log):
        tally.wrong.append(f"{name}: the undisturbed run ended with {status}; see {log}")
        return tally
    lasts = time.monotonic() - start
    expected = result(folder / "whole")
    for index in range(number):
        place = folder / str(index)
        while True:
            after = draw.uniform(0.2, 1.0) * lasts
            began = time.monotonic()
            if run(command(place), log, after) != 0:
                break
            # It was over before: the machine has become faster.
            lasts = min(0.9 * lasts, time.monotonic() - began)
            shutil.rmtree(place)
        tally.tried += 1
        tally.by_name[name] += 1
        tally.refused += 1
        status = run(command(place), log)
        if status != 0:
            tally.wrong.append(
                f"{name}, killed after {after:.1f} s: begun again it ended with {status}; see {log}"
            )
        elif result(place) != expected:
            tally.wrong.append(
                f"{name}, killed after {after:.1f} s: another result than that of an undisturbed run"
            )
        elif left := [path.name for path in place.rglob("*") if path.name.endswith((".part", ".tmp"))]:
            tally.wrong.append(f"{name}, killed after {after:.1f} s: left behind {left}")
    return tally


def trainings(draw: random.Random, folder: Path, number: int, ranks: int) -> Tally:
    """Kills of training on one process or several."""
    from tests.tiny import save_tiny

    model = save_tiny("llama", folder / "model")

    def command(out: Path) -> list[str]:
        settings = {
            "model_name_or_path": str(model),
            "output_dir": str(out),
            "save_strategy": "steps",
            "save_steps": "1",
            "max_steps": "6",
            "behavior_probe": "0",
            "resume_from_checkpoint": "auto",
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        recipe = str(_ROOT / "recipes" / "smoke.yaml")
        if ranks == 1:
            return [sys.executable, "-m", "mpo", "train", recipe, *words, "--use_cpu", "true"]
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(_ROOT / "recipes" / "accelerate" / "ddp.yaml"),
        ]
        place = ["--num_processes", str(ranks), "--main_process_port", str(draw.randint(20_000, 60_000))]
        return [sys.executable, *launcher, *place, str(_ROOT / "scripts" / "train.py"), recipe, *words]

    def result(out: Path) -> bytes:
        return (out / "adapter_model.safetensors").read_bytes()

    return _kill_all(draw, folder, number, f"training on {ranks}", command, result)


def suites(draw: random.Random, folder: Path, number: int) -> Tally:
    """Kills of a suite of measurements."""
    import yaml

    from tests.tiny import save_tiny

    model = save_tiny("llama", folder / "model")
    recipe = yaml.safe_load((_ROOT / "recipes" / "compare" / "demo_suite.yaml").read_text(encoding="utf-8"))
    recipe["models"] = {"tiny": {"model": str(model), "device": "cpu"}}
    file = _ROOT / "recipes" / "compare" / "demo_suite.yaml"
    beside = file.parent
    for settings in (*recipe["attack"].values(), *recipe["over_refusal"].values()):
        settings["prompts"] = [str((beside / name).resolve()) for name in settings["prompts"]]
    texts = recipe["perplexity"]["texts"]
    recipe["perplexity"]["texts"] = {code: str((beside / name).resolve()) for code, name in texts.items()}
    made = folder / "suite.yaml"
    made.write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "mpo", "evaluate", "suite", str(made), "--out", str(out)]

    def result(out: Path) -> dict[str, Any]:
        found = {}
        for path in sorted(out.rglob("*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            values.pop("provenance", None)
            found[str(path.relative_to(out))] = values
        return found

    return _kill_all(draw, folder, number, "suite", command, result)
