from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.errors import ConfigError, DependencyError
from mpo.training.config import MPOConfig
from mpo.training.recipe import (
    DataSettings,
    ModelSettings,
    Recipe,
    load_recipe,
    recipe_fields,
    settings_in_effect,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))
PAPER = {"llama": (1.0, 6e-7, "en"), "gemma": (1.5, 4e-7, "en"), "qwen": (1.5, 6e-7, "zh")}
BASE = "model_name_or_path: org/model\ndataset: org/pairs\nbf16: false\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str | bytes, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return _write


@pytest.fixture
def load(write):
    def _load(text: str = "", *overrides: str) -> Recipe:
        return load_recipe(write(BASE + text), overrides)

    return _load


# ---------------------------------------------------------------------------------------------------- shipped recipes


def test_all_promised_recipes_are_there() -> None:
    wanted = {f"{family}{kind}" for family in PAPER for kind in ("", "_mpo", "_full")} | {"demo", "smoke"}
    assert wanted <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_and_opens_with_its_command_and_hardware(path: Path) -> None:
    overrides = ["--model_name_or_path", "org/model"] if path.stem == "smoke" else []
    recipe = load_recipe(path, overrides)
    assert recipe.training.output_dir.startswith("runs/")
    header = path.read_text().split("\n\n")[0]
    assert f"recipes/{path.name}" in header
    assert "# Hardware: " in header


@pytest.mark.parametrize("family", PAPER)
def test_full_recipes_have_the_settings_of_the_paper(family: str) -> None:
    recipe = load_recipe(RECIPES / f"{family}_full.yaml")
    beta, learning_rate, source = PAPER[family]
    training = recipe.training
    assert (training.beta, training.learning_rate, training.source_language) == (beta, learning_rate, source)
    assert recipe.given["bf16"] is True
    assert not recipe.model.trains_adapter
    assert training.num_train_epochs == 2
    assert str(training.lr_scheduler_type) in ("cosine", "SchedulerType.COSINE")
    assert training.warmup_steps == 0.1
    assert training.max_length == 1024
    assert (training.group_by_source, training.per_device_train_batch_size) == (False, 1)
    assert (training.retain_weight, training.retain_pooling) == (1.0, "mean")
    assert training.gradient_accumulation_steps == 1


@pytest.mark.parametrize("family", PAPER)
def test_lora_recipes_train_an_adapter_on_all_linear_layers_of_the_real_model(family: str) -> None:
    both, lora, full = (load_recipe(RECIPES / f"{family}{kind}.yaml") for kind in ("", "_mpo", "_full"))
    assert lora.training.beta == full.training.beta
    for recipe in (both, lora):
        assert recipe.model.use_peft and recipe.model.lora_target_modules == "all-linear"
        assert recipe.model.model_name_or_path == full.model.model_name_or_path
        assert recipe.training.learning_rate > full.training.learning_rate


def test_recipes_hold_harmless_prompts_alike_whatever_the_model() -> None:
    own = {"model_name_or_path", "dataset", "output_dir", "attn_implementation", "learning_rate"}
    given = [load_recipe(RECIPES / f"{family}.yaml").given for family in PAPER]
    settings = [{key: value for key, value in each.items() if key not in own} for each in given]
    assert settings[0]["harmless_retention"] == "mixed_kl" and settings[0] == settings[1] == settings[2]


def test_gemma_2_recipes_do_not_use_sdpa() -> None:
    for name in ("gemma", "gemma_mpo", "gemma_full"):
        assert load_recipe(RECIPES / f"{name}.yaml").model.attn_implementation in (
            "tree",
            "eager",
            "flex_attention",
        )


def test_the_zero2_configuration_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / "accelerate" / "zero2.yaml"))
    assert str(config.distributed_type).endswith("DEEPSPEED")
    assert config.deepspeed_config["zero_stage"] == 2
    assert config.mixed_precision == "no"  # the recipe's `bf16: true` decides


# --------------------------------------------------------------------------------------------------------------- keys


def test_no_key_belongs_to_two_dataclasses() -> None:
    names = Counter(
        f.name for part in (ModelSettings, DataSettings, MPOConfig) for f in dataclasses.fields(part)
    )
    assert [name for name, count in names.items() if count > 1] == []
    assert set(recipe_fields()) == set(names)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("betta", "beta"), ("learning_rat", "learning_rate"), ("retain_wieght", "retain_weight")],
)
def test_an_unknown_key_is_an_error_with_its_line_and_the_nearest_key(load, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"line 4: `{key}` .*`{nearest}`"):
        load(f"{key}: 1\n")
    with pytest.raises(ConfigError, match=rf"command line: `{key}` .*`{nearest}`"):
        load("", f"--{key}", "1")


@pytest.mark.parametrize(
    "key",
    [
        "warmup_ratio",
        "lora_rank",
        "torch_dtype",
        "cutoff_len",
        "pref_beta",
        "dataset_name",
        "group_by_length",
    ],
)
def test_a_key_that_others_call_differently_is_named_in_our_words(load, key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` is not a key of a recipe; use `"):
        load(f"{key}: 1\n")


def test_a_key_that_is_set_twice_is_an_error(load) -> None:
    with pytest.raises(ConfigError, match="line 5: `beta` is set twice"):
        load("beta: 1.0\nbeta: 2.0\n")
    with pytest.raises(ConfigError, match="line 6: `bn` is set twice"):
        load("language_weights:\n  bn: 1\n  bn: 2\n")


def test_all_wrong_keys_and_values_are_reported_at_once(load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            "betta: 1\nlearning_rate: fast\nlanguage_weights:\n  bn: 1\n  sw: x\n",
            "--lr",
            "1",
            "--max_steps",
            "x",
        )
    head, *lines = str(caught.value).splitlines()
    assert head == "5 settings are wrong:"
    for line, said in zip(
        lines,
        (
            "line 4: `betta` is not a key",
            "line 5: `learning_rate` is 'fast'",
            "line 8: `language_weights` is",
            "command line: `lr` is not a key of a recipe; use `learning_rate`.",
            "command line: `max_steps` is 'x'",
        ),
        strict=True,
    ):
        assert said in line


def test_settings_that_are_refused_or_contradict_each_other_are_reported_together(load) -> None:
    with pytest.raises(ConfigError, match=r"2 settings are wrong") as caught:
        load("beta: -1\nheld_out: 2.5\n")
    assert "line 4: `beta` is -1.0" in str(caught.value) and "line 5: `held_out` is 2.5" in str(caught.value)
    with pytest.raises(ConfigError, match=r"2 settings are wrong") as caught:
        load("lora_r: 8\neval_strategy: epoch\nheld_out: 0\n")
    assert "line 4: `lora_r` is set" in str(caught.value) and "line 5: `eval_strategy`" in str(caught.value)


def test_a_wrong_value_that_is_a_secret_is_not_repeated(load) -> None:
    for text, words in ((f"learning_rate: {TOKEN}\n", []), ("", ["--beta", TOKEN]), ("", [TOKEN])):
        with pytest.raises(ConfigError) as caught:
            load(text, *words)
        assert TOKEN not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- YAML errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", r"line 1, column \d+: this is not valid YAML"),
        ("beta: 1\n\tlr: 2", r"line 2, column 1: this is not valid YAML.*spaces, not tabs"),
        ("beta: 'x", r"line 1, column \d+"),
        ("beta: 1: 2", r"line 1, column 8"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- beta\n- gamma\n", "must be a mapping.*this is a list"),
        ("just words", "must be a mapping"),
        ("a: &x 1\nb: *x\n", "line 2, column 4.*anchors and aliases"),
        ("beta: !!python/object/apply:os.system ['true']", "line 1: the tag .* is not accepted"),
        ("beta: !secret x", "line 1: the tag .* is not accepted"),
        ("[a, b]: 1", "a key must be a word"),
        ("beta: 1\n---\nbeta: 2", "line 2"),
        ("beta: \x07", "line 1, column 7: the control character"),
    ],
)
def test_broken_yaml_is_a_clear_error(write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(text))


def test_other_encodings_a_bom_and_a_missing_file(write, tmp_path: Path) -> None:
    assert load_recipe(write(b"\xef\xbb\xbf" + BASE.encode())).model.model_name_or_path == "org/model"
    with pytest.raises(ConfigError, match=r"line 4: the recipe is not UTF-8"):
        load_recipe(write(BASE.encode() + "run_name: é".encode("latin-1")))
    with pytest.raises(ConfigError, match="There is no recipe"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="is a folder; expected a recipe"):
        load_recipe(tmp_path)


def test_deep_nesting_is_an_error_and_not_a_crash(write) -> None:
    with pytest.raises(ConfigError):
        load_recipe(write("beta: " + "[" * 5000))


# --------------------------------------------------------------------------------------------------------- YAML traps


def test_numbers_without_a_dot_are_numbers(load) -> None:
    training = load("learning_rate: 1e-4\nbeta: 1\nmax_steps: 1e2\nweight_decay: .5\n").training
    assert (training.learning_rate, training.beta, training.max_steps, training.weight_decay) == (
        1e-4,
        1.0,
        100,
        0.5,
    )
    assert isinstance(training.beta, float) and isinstance(training.max_steps, int)


def test_no_and_on_are_words_where_words_are_meant(load) -> None:
    recipe = load("languages: [no, bn]\nsave_strategy: no\neval_strategy: no\nrun_name: on\n")
    assert recipe.data.languages == ["no", "bn"]
    assert recipe.training.save_strategy == "no"
    assert recipe.training.run_name == "on"
    assert load("language_weights:\n  no: 2\n  bn: 1\n").training.language_weights == {"no": 2.0, "bn": 1.0}
    assert load("", "--languages", "no", "on").data.languages == ["no", "on"]


def test_no_and_on_are_truth_values_where_these_are_meant(load) -> None:
    training = load("gradient_checkpointing: on\ngroup_by_source: no\n").training
    assert (training.gradient_checkpointing, training.group_by_source) == (True, False)


def test_text_stays_text(load) -> None:
    training = load("run_name: 2024-01-01\nhub_revision: 0123\n").training
    assert (training.run_name, training.hub_revision) == ("2024-01-01", "0123")
    assert load("", "--run_name", "1e5").training.run_name == "1e5"


def test_values_in_open_mappings_follow_the_rules_of_yaml_1_2(load) -> None:
    given = "chat_template_kwargs:\n  a: no\n  b: true\n  c: 1e-3\n  d: '7'\n  e: [1, x]\n  f:\n    g: null\n"
    assert load(given).training.chat_template_kwargs == {
        "a": "no",
        "b": True,
        "c": 1e-3,
        "d": "7",
        "e": [1, "x"],
        "f": {"g": None},
    }


# -------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", "fast", "a number"),
        ("learning_rate", ".nan", "a number"),
        ("learning_rate", "1e999", "a number"),
        ("learning_rate", "[1]", "a number"),
        ("max_steps", "1.5", "a whole number"),
        ("max_steps", "9" * 5000, "a whole number"),
        ("lora_r", "null", "a whole number"),
        ("group_by_source", "maybe", "true or false"),
        ("retain_pooling", "max", "'mean' or 'last'"),
        ("dtype", "int8", "'auto' or 'bfloat16'"),
        ("run_name", "{a: 1}", "text"),
        ("language_weights", "{bn: many}", "a mapping"),
        ("language_weights", "[1]", "a mapping"),
        ("optim", "adamw_trch", "did you mean 'adamw_torch'"),
        ("save_strategy", "sometimes", "one of"),
        ("parallelism_config", "x", "expected null"),
        ("limit", "some", "a whole number or null"),
        ("held_out", "half", "a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(
    load, key: str, value: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=rf"line 4: `{key}` is .*; expected .*") as caught:
        load(f"{key}: {value}\n")
    assert expected in str(caught.value)


def test_held_out_may_be_a_share_or_a_number_of_sources(load) -> None:
    assert load("held_out: 0.25\n").data.held_out == 0.25
    number = load("held_out: 12\n").data.held_out
    assert number == 12 and isinstance(number, int)
    for wrong in ("1.0", "-1", "-0.1"):
        with pytest.raises(ConfigError, match="`held_out`"):
            load(f"held_out: {wrong}\n")


def test_one_value_may_stand_for_a_list(load) -> None:
    recipe = load("languages: bn\nreport_to: none\nlora_target_modules: q_proj\nuse_peft: true\n")
    assert recipe.data.languages == ["bn"]
    assert recipe.model.lora_target_modules == "q_proj"
    assert load("dataset: [a, b]\n".replace("dataset", "eval_dataset")).data.eval_dataset == ["a", "b"]


def test_languages_joined_by_commas_are_explained(load) -> None:
    with pytest.raises(ConfigError, match="`--languages bn sw`"):
        load("", "--languages", "bn,sw")


@given(
    rate=st.floats(min_value=1e-9, max_value=1.0, allow_nan=False),
    steps=st.integers(min_value=1, max_value=10**6),
    flag=st.booleans(),
    name=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=20),
)
@settings(max_examples=30, deadline=None)
def test_a_resolved_recipe_is_read_back_to_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, rate: float, steps: int, flag: bool, name: str
) -> None:
    folder = tmp_path_factory.mktemp("round")
    first = folder / "first.yaml"
    values: dict[str, Any] = {
        "learning_rate": rate,
        "max_steps": steps,
        "group_by_source": flag,
        "run_name": name,
        "languages": ["no", "bn"],
        "language_weights": {"no": 2.0},
        "save_strategy": "no",
        "limit": None,
    }
    first.write_text(BASE + yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    recipe = load_recipe(first)
    second = folder / "second.yaml"
    second.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(second)
    # Only where the trainer writes its own logs differs from one moment to the next.
    ignored = {"logging_dir"}
    before, after = settings_in_effect(recipe), settings_in_effect(again)
    assert {k: v for k, v in before.items() if k not in ignored} == {
        k: v for k, v in after.items() if k not in ignored
    }
    assert before["run_name"] == name and before["learning_rate"] == rate


def test_what_was_changed_after_loading_is_written(load) -> None:
    recipe = load("use_peft: true\n")
    before = recipe.to_dict()
    changed = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32"))
    changed.training.max_grad_norm = 0.5
    assert changed.to_dict() == before | {"dtype": "float32", "max_grad_norm": 0.5}


def test_writing_a_recipe_leaves_the_process_group_and_its_engine_alone(
    load, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    from accelerate import PartialState
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    recipe = load()
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    recipe.to_yaml()
    assert PartialState().num_processes == 2
    assert is_deepspeed_zero3_enabled() and settings.is_zero3()


# ---------------------------------------------------------------------------------------------------------- overrides


def test_overrides_take_every_documented_form(load) -> None:
    recipe = load(
        "language_weights:\n  bn: 1\n",
        *("--learning_rate", "1e-4"),
        "--beta=1.5",
        "--gradient_checkpointing",
        *("--languages", "bn", "sw"),
        *("--language_weights.bn", "2"),
        *("--language_weights.sw", "3"),
        *("--max-length", "null"),
        *("--min_source_gap", "-0.5"),
    )
    training = recipe.training
    assert (training.learning_rate, training.beta) == (1e-4, 1.5)
    assert training.gradient_checkpointing is True
    assert recipe.data.languages == ["bn", "sw"]
    assert training.language_weights == {"bn": 2.0, "sw": 3.0}
    assert training.max_length is None
    assert training.min_source_gap == -0.5


def test_the_command_line_wins_over_the_file_and_its_last_word_over_its_first(load) -> None:
    assert load("beta: 1\n", "--beta", "2", "--beta", "3").training.beta == 3.0


def test_lists_and_mappings_may_be_written_as_yaml_on_the_command_line(load) -> None:
    recipe = load("", "--languages", "[bn, sw]", "--language_weights", "{bn: 2}")
    assert recipe.data.languages == ["bn", "sw"]
    assert recipe.training.language_weights == {"bn": 2.0}


def test_nested_entries_and_flags_of_mappings(load) -> None:
    recipe = load(
        "",
        "--model_init_kwargs.a.b",
        "1",
        "--chat_template_kwargs.enable_thinking",
        "--chat_template_kwargs.n=no",
    )
    assert recipe.training.model_init_kwargs == {"a": {"b": 1}}
    assert recipe.training.chat_template_kwargs == {"enable_thinking": True, "n": "no"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beta", "2"], "'beta' stands alone"),
        (["--beta"], "`--beta` needs a value: a number"),
        (["--"], "stands alone"),
        (["--=3"], "names no key"),
        (["--beta.x", "2"], "sets an entry of a mapping"),
        (["--language_weights.", "2"], "names no key"),
        (["--beta", "1", "2"], "`beta` is"),
    ],
)
def test_a_malformed_override_is_explained(load, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("", *words)


def test_an_entry_of_a_mapping_that_is_set_as_a_whole_is_refused(load) -> None:
    with pytest.raises(ConfigError, match="the recipe sets the whole to 'balanced'"):
        load("language_weights: balanced\n", "--language_weights.bn", "2")


def test_the_command_that_repeats_a_run_keeps_its_overrides(load) -> None:
    recipe = load("", "--beta", "2", "--output-dir", "a", "--languages", "bn", "sw")
    assert recipe.command(output_dir="b").endswith("r.yaml --beta 2 --languages bn sw --output_dir b")


# ------------------------------------------------------------------------------------------------------------ secrets

TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"hub_token: {TOKEN}\n",
        f"hf_token: {TOKEN}\n",
        "wandb_api_key: 0123456789\n",
        f"model_init_kwargs:\n  token: {TOKEN}\n",
        f"run_name: my {TOKEN}\n",
        f"chat_template_kwargs:\n  x: [{TOKEN}]\n",
        "dataset: https://user:pa55word@example.org/pairs.json\n".replace("dataset", "eval_dataset"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(load, text: str) -> None:
    with pytest.raises(ConfigError, match="environment variable") as caught:
        load(text)
    for secret in (TOKEN, "0123456789", "pa55word"):
        assert secret not in str(caught.value)


def test_a_secret_on_the_command_line_is_refused(load) -> None:
    for words in (["--hub_token", TOKEN], ["--model_init_kwargs.token", TOKEN], ["--run_name", TOKEN]):
        with pytest.raises(ConfigError, match="environment variable") as caught:
            load("", *words)
        assert TOKEN not in str(caught.value)


def test_a_resolved_recipe_never_holds_a_token(load) -> None:
    recipe = load()
    recipe.training.hub_token = TOKEN
    assert TOKEN not in recipe.to_yaml()
    assert TOKEN not in str(settings_in_effect(recipe))


def test_token_counts_are_not_secrets(load) -> None:
    assert load("max_tokens_per_row: 64\nreference_tokens_per_batch: 128\n").training.max_tokens_per_row == 64


# --------------------------------------------------------------------------------------------------- combined settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: 8\n", "`lora_r` is set, but no adapter is trained"),
        ("use_peft: true\nlora_dropout: 0.1\n", "`disable_dropout` is on"),
        ("use_peft: true\nlora_r: 0\n", "a rank of at least 1"),
        ("use_peft: true\nlora_first_layer: -1\n", "a layer's number, counted from 0"),
        ("use_peft: true\nlora_first_layer: 1.5\n", "or below 1 a share of the layers"),
        ("use_peft: true\nlora_task_type: SEQ_CLS\n", "CAUSAL_LM"),
        ("load_in_4bit: true\n", "quantised weights cannot be trained"),
        ("eval_dataset: x\nheld_out: 0.2\n", "both set"),
        ("languages: [en, bn]\n", "which is the source language"),
        ("held_out: 0\neval_strategy: epoch\n", "nothing is held out"),
        ("model_init_kwargs:\n  dtype: float16\n", "set `dtype` instead"),
        ("model_init_kwargs:\n  use_safetensors: false\n", "weights load from safetensors"),
        ("loss_type: [aot]\n", "aot"),
        ("label_smoothing: 0.1\n", "has no meaning for `loss_type` mpo"),
        ("init_lora_weights: pissa\nuse_peft: true\n", "'gaussian' or 'orthogonal'"),
        ("limit: 0\n", "at least 1"),
        ("languages: []\n", "`languages` is empty"),
        ("load_in_4bit: true\nload_in_8bit: true\nuse_peft: true\n", "8 bit and 4 bit"),
        ("lr_scheduler_type: sinus\n", "sinus"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(load, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_lora_settings_may_stay_when_full_fine_tuning_is_asked_for(load) -> None:
    assert not load("use_peft: true\nlora_r: 8\n", "--use_peft", "false").model.trains_adapter


def test_model_and_data_are_required(write) -> None:
    with pytest.raises(ConfigError, match="no model; set `model_name_or_path`"):
        load_recipe(write("dataset: x\n"))
    with pytest.raises(ConfigError, match="no data; set `dataset`"):
        load_recipe(write("model_name_or_path: x\n"))


def test_the_output_folder_is_named_after_the_recipe(write) -> None:
    assert load_recipe(write(BASE, "mine.yaml")).training.output_dir == "runs/mine"


def test_a_missing_package_is_named_with_its_installation(load) -> None:
    pytest.importorskip("transformers")
    from importlib.util import find_spec

    if find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    with pytest.raises(DependencyError, match="pip install deepspeed"):
        load("deepspeed: zero3.json\n")


def test_relative_paths_count_from_here_and_then_from_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "pairs.jsonl").write_text("")
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.write_text("model_name_or_path: org/model\ndataset: pairs.jsonl\n")
    monkeypatch.chdir(tmp_path)
    assert Path(str(load_recipe("recipes/r.yaml").data.dataset)) == Path("recipes/pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text("")
    assert Path(str(load_recipe("recipes/r.yaml").data.dataset)) == Path("pairs.jsonl")


def test_bf16_on_a_machine_without_it_is_kept_for_plans_and_named(load) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = load("", "--bf16", "true")
    assert recipe.unavailable and "bf16" in recipe.unavailable[0]
    assert recipe.to_dict()["bf16"] is True
    assert load("use_cpu: true\n", "--bf16", "true").training.bf16 is True
