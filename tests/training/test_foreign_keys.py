"""Keys of other trainers are translated, never accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpo.errors import ConfigError
from mpo.training.foreign_keys import TOOLS, TRANSLATED
from mpo.training.recipe_keys import check_keys, source_keys

OTHERS = {
    "axolotl": "base_model: a\ndatasets: b\nmicro_batch_size: 2\nnum_epochs: 1\nsequence_len: 2048\nlearning_rate: 1e-4\n",
    "LLaMA-Factory": "model_name_or_path: a\nfinetuning_type: lora\nlora_rank: 8\npref_beta: 0.1\npref_loss: sigmoid\n",
    "TRL": "model_name_or_path: a\ndataset_name: b\ndataset_train_split: train\nmax_prompt_length: 512\nbeta: 0.1\n",
}


def test_every_translation_leads_to_keys_that_exist() -> None:
    keys = source_keys()
    assert keys is not None and len(TRANSLATED) > 80
    for name, said in TRANSLATED.items():
        assert name not in keys, f"{name} is a key of ours"
        for key in re.findall(r"`(\w+)(?::[^`]*)?`", said.partition(" (")[0]):
            assert key in keys or key in ("mpo", "sft"), f"{name}: there is no {key}"


@pytest.mark.parametrize(
    ("name", "ours"),
    [("cutoff_len", "max_length"), ("sequence_len", "max_length"), ("pref_loss", "loss_type")],
)
def test_the_tool_is_named_whose_key_it_is(tmp_path: Path, name: str, ours: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"beta: 1\n{name}: 1\n")
    tool = next(tool for tool, names in TOOLS.items() if name in names)
    with pytest.raises(
        ConfigError, match=rf"line 2: `{name}` is not a key of a recipe; use `{ours}` \({tool}'s `{name}`\)"
    ):
        check_keys(recipe)


@pytest.mark.parametrize("tool", OTHERS)
def test_a_whole_file_of_another_trainer_is_translated_at_once(tmp_path: Path, tool: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(OTHERS[tool])
    with pytest.raises(ConfigError) as caught:
        check_keys(recipe)
    head, *lines, last = str(caught.value).splitlines()
    foreign = [name for name in TOOLS[tool] if f"{name}:" in OTHERS[tool]]
    assert len(foreign) >= 3 and head == f"{len(foreign)} settings are wrong:"
    assert all(any(f"`{name}` is not a key" in line for line in lines) for name in foreign)
    assert last == "  A recipe with our keys to begin with: `mpo recipes copy llama`."
