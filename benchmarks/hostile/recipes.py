"""Hostile recipes of every kind: misspelt, mistyped, cut, contradicting, and such as want to run something."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.hostile.cases import EITHER, REFUSED, Case, altered

_RECIPES = Path(__file__).parents[2] / "recipes"


def _loaders() -> dict[str, tuple[Path, Callable[..., Any]]]:
    from mpo.building.recipe import load_build
    from mpo.hidden_space.recipe import load_analysis_recipe
    from mpo.jobs.compare.recipe import load_comparison
    from mpo.jobs.suite_recipe import load_suite
    from mpo.training.recipe import load_recipe

    return {
        "train": (_RECIPES / "smoke.yaml", load_recipe),
        "suite": (_RECIPES / "evaluation" / "demo.yaml", load_suite),
        "build": (_RECIPES / "data" / "demo.yaml", load_build),
        "compare": (_RECIPES / "compare" / "demo.yaml", load_comparison),
        "hidden space": (_RECIPES / "hidden_space" / "mpo_run.yaml", load_analysis_recipe),
    }


def _broken(text: str, draw: random.Random) -> tuple[str, str, str]:
    """What was done, what is to come of it, and the text."""
    lines = text.splitlines(keepends=True)
    first = next(line for line in lines if line[0].isalpha())
    key = first.partition(":")[0]
    return draw.choice(
        [
            ("a key twice", REFUSED, text + f"{key}: 1\n{key}: 2\n"),
            ("a tab", REFUSED, text + f"other:\n\t{key}: 1\n"),
            ("an open bracket", REFUSED, text + "other: [1, {a: \n"),
            ("code", REFUSED, text + "other: !!python/object/apply:os.getcwd []\n"),
            ("two documents", REFUSED, text + "---\na: 1\n"),
            ("an unknown key", REFUSED, text + "learning_rat: 1.0e-5\n"),
            ("an unknown key with escapes", REFUSED, text + '"\\e[31m\\u202e": 1\n'),
            ("a list", REFUSED, "- 1\n- 2\n"),
            ("a number", REFUSED, "3\n"),
            ("nothing", REFUSED, "# nothing\n"),
            ("a recursive alias", REFUSED, text + "other: &a [*a]\n"),
            ("an unknown alias", REFUSED, text + "other: *none\n"),
            ("a null byte", REFUSED, text + "other: \x00\n"),
            ("many aliases", REFUSED, text + _bomb()),
            ("nested deeply", REFUSED, text + f"other: {'[' * 5000}\n"),
            ("cut off", EITHER, text[: draw.randrange(len(text))]),
        ]
    )


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]\n"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)]
    return "".join(lines)


def cases(draw: random.Random, folder: Path, number: int) -> Iterator[Case]:
    """So many recipes in a folder, each read as its command reads it before anything else."""
    loaders = _loaders()
    for index in range(number):
        kind = list(loaders)[index % len(loaders)]
        path, load = loaders[kind]
        text = path.read_text(encoding="utf-8")
        if draw.random() < 0.4:
            done, expected, text = _broken(text, draw)
        else:
            document = copy.deepcopy(yaml.safe_load(text))
            done, expected = altered(document, draw), EITHER
            if done in ("one key more", "a misspelt key") and kind != "suite":
                expected = EITHER  # some keys name what the user likes
            text = yaml.safe_dump(document, allow_unicode=True)
        file = folder / f"{index}.yaml"
        file.write_text(text, encoding="utf-8")

        def run(file: Path = file, load: Callable[..., Any] = load) -> None:
            load(file)

        yield Case(f"{kind}: {done}", expected, run)
