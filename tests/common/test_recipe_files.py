"""Recipes by path and by name, those of the package, and files of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mpo.common.recipe_files import (
    copy_recipe,
    find_recipe,
    packaged_recipe,
    packaged_recipes,
    recipe_folder,
    recipes_text,
)
from mpo.common.recipe_kinds import KINDS, another_kind, kind_of
from mpo.common.typed_yaml import Document
from mpo.errors import ConfigError, StorageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_of_the_project_has_a_name_and_a_line() -> None:
    files = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipe_folder() == ROOT / "recipes"
    assert {Path(f"{recipe.name}.yaml") for recipe in packaged_recipes()} == files
    text = recipes_text()
    for recipe in packaged_recipes():
        assert 10 < len(recipe.summary) <= 88 and f"  {recipe.name} " in text


def test_a_bare_name_is_a_recipe_of_the_package(empty_folder: Path) -> None:
    assert find_recipe("llama") == ROOT / "recipes" / "llama.yaml"
    assert find_recipe("demo", "evaluation") == ROOT / "recipes" / "evaluation" / "demo.yaml"
    assert find_recipe("demo") == ROOT / "recipes" / "demo.yaml"
    assert find_recipe("smollm2") == ROOT / "recipes" / "hidden_space" / "smollm2.yaml"
    (empty_folder / "demo").mkdir()  # a folder is no recipe
    assert find_recipe("demo") == ROOT / "recipes" / "demo.yaml"


def test_a_file_of_the_folder_comes_before_the_package(empty_folder: Path) -> None:
    (empty_folder / "llama.yaml").write_text("beta: 1\n")
    assert find_recipe("llama") == Path("llama.yaml")
    (empty_folder / "llama").write_text("beta: 2\n")
    assert find_recipe("llama") == Path("llama")


def test_an_own_copy_that_is_not_there_is_never_replaced_by_the_original() -> None:
    with pytest.raises(ConfigError, match="One called `llama` comes with the package: name it so"):
        find_recipe("llama.yaml")
    with pytest.raises(ConfigError, match=r"There is no recipe recipes/llama.yaml\. One called `llama`"):
        find_recipe("recipes/llama.yaml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lama", "Did you mean `llama`, which comes with the package?"),
        ("papr", "Did you mean `compare/paper`"),
        ("", "A recipe has no name"),
        ("pairs.jsonl", "is a file of data; expected a recipe. Check it with `mpo data check pairs.jsonl`"),
        ("model.safetensors", "is a file of weights"),
    ],
)
def test_what_was_meant_instead_is_said(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe(given)
    assert said in str(caught.value)


def test_a_folder_names_the_recipes_or_the_model_in_it(empty_folder: Path) -> None:
    folder = empty_folder / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"mine is a folder.*It holds a model; talk to it with `mpo chat`"):
        find_recipe("mine")
    (folder / "a.yaml").write_text("beta: 1\n")
    with pytest.raises(ConfigError, match=r"Recipes in it: mine/a.yaml"):
        find_recipe("mine")


def test_a_copy_comes_with_its_data_and_replaces_nothing(empty_folder: Path) -> None:
    recipe, *data = copy_recipe("evaluation/demo", "mine/")
    assert recipe == Path("mine/demo.yaml") and Path("mine/demo/pairs.jsonl") in data
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert settings["reward_gap"]["data"] == ["demo/pairs.jsonl"]
    assert all(path.is_file() and Path("mine") in path.parents for path in data)

    recipe.write_text("beta: 1\n")
    with pytest.raises(StorageError, match=r"mine/demo.yaml is there already"):
        copy_recipe("evaluation/demo", "mine")
    assert recipe.read_text() == "beta: 1\n"
    copy_recipe("evaluation/demo", "mine", force=True)
    assert "models:" in recipe.read_text(encoding="utf-8")

    assert copy_recipe("llama", "other") == [Path("other.yaml")]
    assert copy_recipe("recipes/llama.yaml")[0].read_bytes() == (ROOT / "recipes" / "llama.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"no recipe lamma in the package\. Did you mean `llama`"):
        copy_recipe("lamma")


def test_a_copy_takes_the_recipes_along_that_it_names(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = empty_folder / "package"
    for name, text in {
        "compare/a.yaml": "base: ../base.yaml  # ../base.yaml\nruns: []\n",
        "base.yaml": "dataset: demo/pairs.jsonl\n",
        "demo/pairs.jsonl": "{}\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr("mpo.common.recipe_files.recipe_folder", lambda: folder)
    written = copy_recipe("compare/a", "new/mine.yaml")
    assert written == [Path("new/mine.yaml"), Path("new/base.yaml"), Path("new/demo/pairs.jsonl")]
    assert written[0].read_text() == "base: base.yaml  # base.yaml\nruns: []\n"
    assert written[1].read_text() == "dataset: demo/pairs.jsonl\n"


def test_an_installation_without_recipes_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpo.common.recipe_files.recipe_folder", lambda: None)
    assert packaged_recipe("llama") is None and "has no recipes" in recipes_text()
    with pytest.raises(ConfigError, match=r"There is no recipe llama\.$"):
        find_recipe("llama")


def test_every_recipe_of_the_package_is_known_by_its_keys() -> None:
    for recipe in packaged_recipes():
        kind = kind_of(yaml.safe_load(recipe.path.read_text(encoding="utf-8")))
        part_of_another = recipe.name.endswith("_suite")
        assert kind is not None and (kind.home == recipe.name.rpartition("/")[0] or part_of_another), (
            recipe.name
        )


@pytest.mark.parametrize("expected", ["a recipe", "a suite", "an analysis"])
def test_a_recipe_of_another_kind_names_its_command(expected: str) -> None:
    for other in KINDS:
        keys = [*sorted(other.marks)[:2], "seed"]
        said = another_kind(expected, "x.yaml", keys)
        if other.noun == expected:
            assert said is None
        else:
            assert said and f"this is {other}" in said and other.command.format(path="x.yaml") in said


def test_a_document_of_another_kind_is_refused_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"this is a suite, .* expected a training recipe.*suite evaluation/demo"
    ):
        Document("evaluation/demo")
    with pytest.raises(ConfigError, match=r"expected a suite. Use it with: mpo train llama$"):
        Document("llama", noun="a suite")


def test_a_key_of_another_kind_beside_own_ones_is_only_an_unknown_key() -> None:
    assert another_kind("a recipe", "x.yaml", ["dataset", "attack"]) is None
    assert another_kind("a recipe", "x.yaml", ["something"]) is None
    assert another_kind("a whole", "x.yaml", ["attack", "judge"]) is None
