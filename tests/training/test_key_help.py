"""Every key of a recipe is explained, from the source and without torch."""

from __future__ import annotations

import dataclasses

import pytest

from mpo.errors import ConfigError
from mpo.training.config import MPOConfig
from mpo.training.key_help import explained_keys, keys_text
from mpo.training.recipe import DataSettings, ModelSettings, recipe_fields


def test_every_key_has_its_explanation_and_the_default_of_its_dataclass() -> None:
    explained, real = explained_keys(), recipe_fields()
    assert set(explained) == set(real)
    assert not [name for name, key in explained.items() if key.text == "It has no description."]
    for name, key in real.items():
        if (
            isinstance(key.default, (str, int, float, bool))
            and explained[name].default != "chosen by transformers"
        ):
            shown = str(key.default).lower() if isinstance(key.default, bool) else key.default
            assert explained[name].default == str(getattr(shown, "value", shown)), name
    assert explained["loss_type"].default == "[mpo]" and explained["beta"].default == "null"


def test_what_this_package_says_of_a_key_comes_before_what_its_bases_say() -> None:
    keys = explained_keys()
    assert keys["bf16"].text.startswith("bf16 mixed precision. Unset")
    assert keys["beta"].text.startswith("Temperature of the objective. Unset: its published value, 1.0")
    assert keys["held_out"].group == "the data" and keys["seed"].group.startswith("training")
    own = {
        field.name for cls in (DataSettings, ModelSettings, MPOConfig) for field in dataclasses.fields(cls)
    }
    assert set(keys) == own


def test_one_key_is_shown_with_type_default_values_and_text() -> None:
    text = keys_text("retain_pooling")
    assert text.startswith("retain_pooling\n  Type     str\n  Default  mean\n")
    assert "one vector" in text
    assert keys_text("--learning-rate").startswith("learning_rate\n")


def test_a_name_of_another_trainer_leads_to_ours() -> None:
    text = keys_text("cutoff_len")
    assert text.startswith(
        "`cutoff_len` is not a key of a recipe; use `max_length` (LLaMA-Factory's `cutoff_len`)."
    )
    assert "\n\nmax_length\n  Type" in text


def test_a_word_finds_keys_by_name_and_by_text() -> None:
    text = keys_text("collapse")
    assert {"stop_on_collapse", "collapse_window", "collapse_drop"} <= {
        line.split()[0] for line in text.splitlines() if line
    }
    assert "  retain_weight " in keys_text("retention")


@pytest.mark.parametrize(
    ("word", "said"), [("betaa", "Did you mean `beta`?"), ("xyzzy\x1b[31m", "mpo keys --all")]
)
def test_a_word_that_finds_nothing_is_an_error(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keys_text(word)
    assert said in str(caught.value) and "\x1b" not in str(caught.value)


def test_the_overview_names_what_it_leaves_out() -> None:
    short, long = keys_text(), keys_text(everything=True)
    assert "Keys of the objective and the step" in short and "more keys of TRL and transformers" in short
    assert all(f"  {name} " in long for name in explained_keys())
