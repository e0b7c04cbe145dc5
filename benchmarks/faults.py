"""Hostile inputs by the hundred: how many end in a clear error, and which do not.

    python -m benchmarks.faults --seed 1
    python -m benchmarks.faults --only data recipes --cases 50
    python -m benchmarks.faults --only train-1 train-2 suite --kills 20

Every input is drawn from the seed. What is wrong is a traceback, a hang, a fault that is accepted in silence, a good input that
is refused, or a page that holds what acts on who reads it. Servers have their own tests: tests/evaluation/test_hostile_servers.py.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.hostile import data_files, kills, models, recipes, results
from benchmarks.hostile.cases import Tally, try_all
from mpo.common.progress import quiet_libraries

NUMBERS = {
    "data": 200,
    "models": 50,
    "results": 500,
    "recipes": 300,
    "train-1": 30,
    "train-2": 30,
    "suite": 20,
}
"""Inputs of each kind, unless another number is asked for; the last three are kills."""


def measure(kind: str, seed: int, number: int, folder: Path) -> Tally:
    """What comes of so many inputs of a kind, made in a folder."""
    draw = random.Random(f"{seed} {kind}")
    in_process: dict[str, Callable[..., object]] = {
        "data": data_files.cases,
        "models": models.cases,
        "results": results.cases,
        "recipes": recipes.cases,
    }
    if kind in in_process:
        return try_all(in_process[kind](draw, folder, number))  # type: ignore[arg-type]
    if kind == "suite":
        return kills.suites(draw, folder, number)
    return kills.trainings(draw, folder, number, int(kind.rpartition("-")[2]))


def main() -> int:
    """Prints a line per kind and one for everything that is wrong; 1 where something is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=NUMBERS, default=list(NUMBERS))
    parser.add_argument("--cases", type=int, help="inputs of each kind that runs in this process")
    parser.add_argument("--kills", type=int, help="kills of each kind of run")
    arguments = parser.parse_args()
    quiet_libraries()
    wrong = 0
    print(f"{'kind':<10}{'tried':>7}{'clear errors':>15}{'wrong':>7}")
    for kind in arguments.only:
        asked = arguments.kills if kind in ("train-1", "train-2", "suite") else arguments.cases
        with tempfile.TemporaryDirectory() as folder:
            tally = measure(kind, arguments.seed, NUMBERS[kind] if asked is None else asked, Path(folder))
        print(f"{kind:<10}{tally.tried:>7}{tally.refused:>15}{len(tally.wrong):>7}", flush=True)
        for sentence in tally.wrong:
            print(f"    {sentence!a}", flush=True)
        wrong += len(tally.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
