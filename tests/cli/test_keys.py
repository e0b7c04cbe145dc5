"""Every key of every kind of recipe is explained by ``mpo keys``, with the default that it has."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo.building.recipe import BuildRecipe, load_build
from mpo.cli.app import main
from mpo.cli.keys import keys_of_kind
from mpo.common.key_help import found_text, written
from mpo.common.recipe_kinds import KINDS, explaining
from mpo.hidden_space.recipe import AnalysisRecipe
from mpo.jobs.compare.recipe import CompareRecipe
from mpo.jobs.suite_recipe import SuiteRecipe

RECIPES: dict[str, Any] = {
    "build": BuildRecipe,
    "suite": SuiteRecipe,
    "analysis": AnalysisRecipe,
    "comparison": CompareRecipe,
}


def classes_in(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_in(part)


def keys_in(kind: type) -> set[tuple[type, str]]:
    """(class, field) of all that a recipe holds, each class once."""
    found: set[tuple[type, str]] = set()
    waiting, seen = [kind], {kind}
    while waiting:
        owner = waiting.pop()
        for name, hint in typing.get_type_hints(owner).items():
            if name not in {field.name for field in dataclasses.fields(owner)} or name == "source_path":
                continue
            found.add((owner, name))
            new = [inner for inner in classes_in(hint) if inner not in seen]
            seen.update(new)
            waiting += new
    return found


@pytest.mark.parametrize("kind", RECIPES)
def test_every_key_of_a_recipe_has_its_explanation_and_its_default(kind: str) -> None:
    keys, real = keys_of_kind(kind), keys_in(RECIPES[kind])
    assert sorted(name.rpartition(".")[2] for name in keys) == sorted(name for _, name in real)
    unexplained = [
        name for name, key in keys.items() if "no description" in key.text or len(key.text.split()) < 3
    ]
    assert not unexplained
    assert not [name for name, key in keys.items() if ":class:" in key.text or ":data:" in key.text]
    for field in dataclasses.fields(RECIPES[kind]):
        if isinstance(field.default, (str, int, float)) and field.name != "source_path":
            shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert keys[field.name].default == shown


@pytest.mark.parametrize("kind", RECIPES)
def test_every_listed_key_is_explained_under_the_name_that_it_is_listed_under(kind: str) -> None:
    keys = keys_of_kind(kind)
    for name, key in keys.items():
        for word in (
            name,
            name.replace("NAME", "mine").replace(".N.", ".3."),
            f"--{name.replace('_', '-')}",
        ):
            text = found_text(keys, word, "mpo keys")
            assert text is not None and text.startswith(f"{name}\n"), word
        if key.inside:
            assert f"\n  {key.inside}." in (found_text(keys, name, "mpo keys") or ""), name


def test_the_default_of_a_key_is_the_one_that_a_recipe_without_it_has(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("prompts: {data: [starter]}\nlanguages: [zh]\nmodel: {model: m}\n", encoding="utf-8")
    recipe = load_build(path)
    compared = 0
    for name, key in keys_of_kind("build").items():
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part, None)
        if (
            key.default
            and value is not None
            and not dataclasses.is_dataclass(value)
            and name not in ("out", "languages")
        ):
            shown = value if isinstance(value, bool) or value is None else str(value)
            assert key.default == (str(shown).lower() if isinstance(value, bool) else written(value)), name
            compared += 1
    assert compared > 30
    assert (recipe.out, keys_of_kind("build")["out"].default) == (
        "runs/data/mine",
        "runs/data/ and the recipe's name",
    )
    # A mapping that sets some of its keys leaves the others as they are.
    some = load_build(path, ["--answers.generation.max_new_tokens", "24"]).answers.generation
    assert some == dataclasses.replace(recipe.answers.generation, max_new_tokens=24)
    assert (some.temperature, some.top_p) == (0.8, 0.95)


def test_every_kind_of_recipe_has_the_command_that_its_errors_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [explaining(kind.noun) for kind in KINDS if kind.home or kind.noun == "a recipe"]
    named = [command for command in named if "accelerate" not in command]
    assert len(named) == 1 + len(RECIPES)
    for command in named:
        assert main(command.split()[1:]) == 0
        kind = command.split()[-1]
        keys = keys_of_kind(kind) if kind in RECIPES else ("learning_rate", "retain_weight")
        assert all(f"\n  {name} " in capsys.readouterr().out for name in [*keys][:1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["unfinished"], "Not a key of a training recipe, but of others:\n\nanswers.unfinished\n"),
        (["samples"], "\nOf a build: mpo keys --of build samples"),
        (["--of", "suite", "over_refusal.mine.prompts"], "attack.NAME.prompts\n"),
        (["--of", "build", "harmless_judge.model"], "judge.model\n"),
        (["--of", "build", "back translation"], "back_translation\n"),
        (["--of", "comparison", "runs"], "runs\n"),
        (["--of", "build", "answers.unfinished"], "answers.unfinished\n  Type     str\n  Default  drop\n"),
        (["--of", "suite", "examples"], "report.examples\n"),
        (["--of", "comparison", "low"], "search.parameters.NAME.low\n"),
        (["--of", "suite", "concurrency"], "\n  judge.concurrency "),
        (["--of", "training", "beta"], "beta\n  Type"),
    ],
)
def test_a_key_is_found_by_its_name_or_its_last_part(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith(said) or (said.startswith("\n") and said in f"\n{out}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--of", "build", "translatn"], "Did you mean `translation`?"),
        (["--of", "analysis", "xyzzy"], "`mpo keys --of analysis` shows every key."),
        (["--of", "training", "unfinished"], "No key of a recipe is called `unfinished`"),
        (["xyzzy"], "`mpo keys --all` shows every key."),
    ],
)
def test_a_word_that_no_key_has_is_an_error(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *words]) != 0
    assert said in capsys.readouterr().err
