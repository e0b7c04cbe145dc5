"""What is misspelt is said at once: before torch and the libraries on it are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpo.cli import app

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "sklearn", "matplotlib", "scipy"}
SUITE = ["evaluate", "suite", "recipes/evaluation/demo.yaml"]
COMPARE = ["compare", "recipes/compare/demo.yaml"]
HIDDEN = ["analyze", "hidden-space", "recipes/hidden_space/mpo_run.yaml"]

BUILD = ["data", "build", "recipes/data/demo.yaml"]

CASES = [
    (["--help"], "usage: mpo"),
    (["train", "--help"], "usage: mpo train"),
    ([*SUITE, "--help"], "usage: mpo evaluate suite"),
    (["trian"], "there is no command `mpo trian`; did you mean `mpo train`?"),
    (["evaluate", "sute"], "there is no command `mpo evaluate sute`; did you mean `mpo evaluate suite`?"),
    (["evaluate", "zzz"], "there is no command `mpo evaluate zzz`; there are reward-gap, attack"),
    (["merge", "a", "--out", "b", "--bsae", "c"], "unrecognized arguments: --bsae c; did you mean --base?"),
    (["train", "lama.yaml"], "There is no recipe lama.yaml. Recipes here: recipes/demo.yaml"),
    (["train", "recipes/llama.yaml", "--betta", "1"], "`betta` is not a key of a recipe; the nearest is `beta`."),
    (["train", "recipes/llama.yaml", "--beta", "much"], "`beta` is 'much'; expected a number"),
    (["train", "recipes/llama.yaml", "--dry_run", "--lr", "1", "--beta", "x"], "2 settings are wrong"),
    (["train", "recipes/llama.yaml", "--hub_token", "abc"], "set the environment variable instead"),
    ([*SUITE[:2], "dmo.yaml"], "There is no recipe dmo.yaml"),
    ([*SUITE, "--models.base.dtpye", "x"], "the nearest is `models.base.dtype`"),
    ([*SUITE, "--generation.max_new_tokens", "x"], "`generation.max_new_tokens` is 'x'; expected a whole number."),
    ([*SUITE, "--dry_run", "--judge.name", "oracle"], "judge: expected refusal-phrases"),
    ([*COMPARE[:1], "dmo.yaml"], "There is no recipe dmo.yaml"),
    ([*COMPARE, "--sedes", "1"], "the nearest is `seeds`"),
    ([*COMPARE, "--runs", "[{name: a, betta: 1}, {name: b, loss_type: sigmoid, lerning_rate: 2}]"], "2 settings are wrong"),
    ([*COMPARE, "--base", "lama"], "There is no recipe lama"),
    ([*HIDDEN[:2], "dmo.yaml"], "There is no recipe dmo.yaml"),
    ([*HIDDEN, "--resample", "1"], "the nearest is `resamples`"),
    ([*BUILD, "--help"], "usage: mpo data build"),
    ([*BUILD[:2], "dmo.yaml"], "There is no recipe dmo.yaml"),
    ([*BUILD, "--answers.sample", "1"], "the nearest is `answers.samples`"),
    ([*BUILD, "--dry_run", "--filters.copy", "2"], "copy: expected a number from 0 to 1"),
    ([*HIDDEN, "--folds", "x"], "`folds` is 'x'; expected a whole number."),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str | int | None]]:
    """Exit code and text of each command, all in one process, and the heavy modules that any of them imported."""
    code = f"""
import contextlib, io, json, sys
from mpo.cli import main
answers = {{}}
for words in {[words for words, _ in CASES]!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            rc = main(words)
        except SystemExit as stop:
            rc = stop.code or 0
    heavy = sorted({HEAVY!r} & set(sys.modules))
    answers[' '.join(words)] = [rc, out.getvalue(), ' '.join(heavy)]
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, list[str | int | None]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("words", "said"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_a_mistake_is_answered_without_the_heavy_libraries(
    answers: dict[str, list[str | int | None]], words: list[str], said: str
) -> None:
    rc, text, heavy = answers[" ".join(words)]
    assert said in str(text)
    assert rc == (0 if "--help" in words else 2)
    assert heavy == ""


@pytest.mark.parametrize("module", ["mpo", "mpo.cli"])
def test_the_package_runs_as_a_module(module: str) -> None:
    words = [sys.executable, "-m", module, "trian"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean `mpo train`?" in done.stderr


@pytest.mark.parametrize("words", [["train"], SUITE[:2], HIDDEN[:2], [*SUITE[:2], "--models.a.model", "m"]])
def test_a_command_with_a_recipe_says_where_it_goes(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        app.main(words)
    assert stop.value.code == 2 and "the recipe comes first" in capsys.readouterr().err
