"""The keys of a recipe as the source of the libraries has them, against the real dataclasses."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo.common.typed_yaml import UNKNOWN
from mpo.errors import ConfigError
from mpo.training import recipe_keys
from mpo.training.recipe import load_recipe, recipe_fields
from mpo.training.recipe_keys import check_keys, source_keys

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_the_source_has_the_keys_types_and_choices_of_the_dataclasses() -> None:
    early, real = source_keys(), recipe_fields()
    assert early is not None
    assert set(early) == set(real)
    # Enums of the libraries, and what only lives in memory.
    unknown = {name for name, key in early.items() if key.hint is UNKNOWN}
    assert unknown <= {
        "optim",
        "logging_strategy",
        "eval_strategy",
        "save_strategy",
        "hub_strategy",
        "parallelism_config",
        "debug",
    }
    assert {n: k.hint for n, k in early.items() if n not in unknown} == {
        n: k.hint for n, k in real.items() if n not in unknown
    }
    choices = {name: key.choices for name, key in real.items() if key.choices}
    assert {name: key.choices for name, key in early.items() if key.choices} == {
        name: values for name, values in choices.items() if not name.startswith("log_level")
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_loads_passes_the_early_check(path: Path) -> None:
    entry = ["--chat_template_kwargs.enable_thinking", "false"]
    check_keys(path, ["--languages", "bn", "sw", *entry, "--limit", "null", "--bf16"])


@pytest.mark.parametrize(
    "line",
    [
        "betta: 1",
        "beta: much",
        "lr: 1",
        "dtype: int8",
        "retain_pooling: max",
        "max_steps: 1.5",
        "lora_target_modules: {a: b}",
        "report_to: [1, {a: b}]",
        "hub_token: 0123456789",
        "languages.bn: 1",
        "beta: 1\nbeta: 2",
    ],
)
def test_both_checks_say_the_same(tmp_path: Path, line: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model_name_or_path: org/model\ndataset: org/pairs\n{line}\n")
    said = []
    for check in (check_keys, load_recipe):
        with pytest.raises(ConfigError) as caught:
            check(recipe)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_without_source_the_early_check_only_reads_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_keys, "find_spec", lambda name: None)
    assert source_keys() is None
    recipe = tmp_path / "r.yaml"
    recipe.write_text("betta: 1\n")
    check_keys(recipe)
    with pytest.raises(ConfigError, match="There is no recipe"):
        check_keys(tmp_path / "none.yaml")


def test_what_source_cannot_say_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.py"
    library.write_text(
        "from x import Kind, LEVELS\nNAMES = ('a', 'b')\n\n"
        "class Base:\n    old: int = 1\n    kind: Kind | str = 'x'\n    shared: ClassVar[int] = 3\n\n"
        "class Settings(lib.Base):\n    kind: str = field(metadata={'choices': list(NAMES)})\n"
        "    level: str = field(default='x', metadata={'choices': LEVELS.keys()})\n"
        "    odd: 'str' = ''\n    call: make() = None\n    several: Union[None, list[str], Literal['x']] = None\n"
    )
    monkeypatch.setattr(recipe_keys, "_files", lambda: iter([library]))
    monkeypatch.setattr(recipe_keys, "OWNERS", ("Settings",))
    keys = source_keys()
    assert keys is not None and list(keys) == ["old", "kind", "level", "odd", "call", "several"]
    assert keys["old"].hint is int and keys["level"].hint is str and not keys["level"].choices
    assert (keys["kind"].hint, keys["kind"].choices) == (str, ("a", "b"))
    assert keys["odd"].hint is UNKNOWN and keys["call"].hint is UNKNOWN
    library.write_text("class Settings(Elsewhere):\n    a: int = 1\n")
    assert source_keys() is None
    library.write_text("class Settings:\n    a: int = = 1\n")
    assert source_keys() is None
