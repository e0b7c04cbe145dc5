"""The settings: their defaults, what they refuse and how they travel."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser
from trl import DPOConfig

from mpo.errors import ConfigError, MPOError
from mpo.training.config import _MEANINGLESS, MPOConfig
from mpo.training.launcher import deepspeed_backend

# A value for every refused option that is not its default.
_SET = {
    "ld_alpha": 0.5,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
    "label_smoothing": 0.1,
    "label_smoothing_factor": 0.1,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 100,
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 4,
    "padding_free": True,
    "truncation_mode": "keep_end",
    "pad_token": "<pad>",
    "train_sampling_strategy": "sequential",
    "neftune_noise_alpha": 5.0,
}


def config(**settings: Any) -> MPOConfig:
    return MPOConfig(**{"output_dir": "unused", "use_cpu": True, **settings})


def test_defaults_are_those_of_the_documentation() -> None:
    settings = config()
    expected = {
        "beta": 1.0,
        "retain_weight": 1.0,
        "retain_pooling": "mean",
        "min_source_gap": None,
        "language_weights": None,
        "stop_on_collapse": False,
        "source_language": "en",
        "group_by_source": True,
        "max_targets_per_group": None,
        "bad_rows": "error",
        "batch_layout": "tree",
        "max_length": 1024,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 2.0,
        "warmup_steps": 0.1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.lr_scheduler_type == "cosine"


def test_bf16_is_off_on_a_cpu_and_a_user_who_asks_for_it_gets_it() -> None:
    assert config().bf16 is False
    assert config(bf16=True).bf16 is True


def test_gradient_checkpointing_can_be_asked_for_by_the_name_users_know() -> None:
    assert config(gradient_checkpointing=True).gradient_checkpointing is True
    assert not config(gradient_checkpointing=False).gradient_checkpointing


def test_every_refused_option_exists_in_the_library() -> None:
    known = {option.name for option in dataclasses.fields(MPOConfig)}
    assert set(_MEANINGLESS) <= known, "a refused option that is no field is refused nowhere"
    assert set(_SET) == set(_MEANINGLESS)


@pytest.mark.parametrize("name", sorted(_MEANINGLESS))
def test_an_option_without_meaning_is_refused_by_name_and_with_a_reason(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**{name: _SET[name]})
    assert f"`{name}=" in str(error.value)
    assert _MEANINGLESS[name] in str(error.value)
    assert isinstance(error.value, MPOError)


@pytest.mark.parametrize("name", sorted(_MEANINGLESS))
def test_an_option_without_meaning_may_be_written_out_with_its_default(name: str) -> None:
    option = next(option for option in dataclasses.fields(DPOConfig) if option.name == name)
    default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
    config(**{name: default})


# ---- Objectives ------------------------------------------------------------------------------------------------


def test_one_objective_may_be_named_without_its_list() -> None:
    assert config(loss_type="ipo").loss_type == ["ipo"]
    assert config().loss_type == ["mpo"]


@pytest.mark.parametrize(
    ("settings", "beta", "label_smoothing"),
    [
        ({}, 1.0, 0.0),
        ({"loss_type": "sigmoid"}, 0.1, 0.0),
        ({"loss_type": ["mpo", "sft"]}, 1.0, 0.0),
        ({"loss_type": "robust"}, 0.01, 0.1),
        ({"loss_type": "robust", "label_smoothing": 0.0}, 0.01, 0.0),
        ({"loss_type": "exo_pair", "beta": 0.3}, 0.3, 1e-3),
        ({"loss_type": ["mpo", "sigmoid"], "beta": 0.5}, 0.5, 0.0),
        ({"loss_type": "sft"}, 1.0, 0.0),
    ],
    ids=str,
)
def test_what_is_not_set_takes_the_published_value_of_the_objective(
    settings: dict[str, Any], beta: float, label_smoothing: float
) -> None:
    found = config(**settings)
    assert (found.beta, found.label_smoothing) == (beta, label_smoothing)
    # Settings that are copied mean the same.
    again = dataclasses.replace(found, output_dir="elsewhere")
    assert (again.beta, again.label_smoothing, again.loss_type) == (beta, label_smoothing, found.loss_type)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "simp"}, "Did you mean 'simpo'"),
        ({"loss_type": []}, "one or more objectives"),
        ({"loss_type": ["sft", "sft"]}, "each once"),
        ({"loss_type": "aot"}, "sorts the log-ratios of a batch"),
        (
            {"loss_type": ["mpo", "sft"], "loss_weights": [1.0]},
            "as many numbers as `loss_type` names objectives, 2",
        ),
        ({"loss_type": ["mpo", "sigmoid"]}, "published values differ: 1 for mpo, 0.1 for sigmoid"),
        ({"train_on": "both"}, "`train_on: both` does not go with `mpo`: MPO pulls the target languages"),
        ({"loss_type": ["sft", "mpo"], "train_on": "source"}, "does not go with `mpo`"),
        ({"loss_type": "sft", "train_on": "all"}, "expected 'targets', 'source' or 'both'"),
        ({"loss_type": "sft", "beta": 0.1}, "no meaning for `loss_type` sft"),
        ({"loss_type": "sigmoid", "retain_weight": 0.0}, "it belongs to the objectives mpo"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "no meaning for `loss_type` sigmoid"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "above 0 and below 0.5"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": "sigmoid", "ld_alpha": 1.5}, "from 0 to 1"),
        ({"loss_type": "sigmoid", "f_divergence_type": "total"}, "one of reverse_kl"),
        (
            {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "forward_kl"},
            "which apo_zero cannot take",
        ),
        (
            {"loss_type": "mlc", "max_targets_per_group": 2},
            "`max_targets_per_group` is 2, but `mlc` compares",
        ),
        ({"loss_type": "mlc", "group_by_source": False}, "Remove `group_by_source`"),
        ({"loss_type": "mlc", "train_on": "source"}, "`train_on` is 'source', but `mlc` compares"),
        ({"loss_type": "sigmoid", "state_layer": 1}, "it belongs to the objectives mlc"),
        ({"loss_type": "mpo", "state_position": -2}, "it belongs to the objectives mlc"),
        ({"loss_type": "mlc", "state_layer": -1}, "a number of a layer from 0"),
        ({"loss_type": "mlc", "state_position": 0}, "from -1 (the prompt's last token) down"),
        ({"loss_type": "mlc", "state_layer": 1, "torch_compile": True}, "a model that is compiled"),
        ({"loss_type": "sigmoid", "mpo_delta": 1.0}, "it belongs to the objectives mpo"),
        ({"loss_type": "mpo", "mpo_delta": 0.0}, "above 0, or nothing"),
        ({"loss_type": ["mpo", "gap_retention"]}, "which is for harmless groups alone"),
        ({"loss_type": "cpo", "simpo_gamma": 1.0}, "it belongs to the objectives simpo"),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "at least 0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_objectives_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0),
        ("beta", -1.0),
        ("beta", float("nan")),
        ("beta", float("inf")),
        ("beta", "1.0"),
        ("retain_weight", -0.1),
        ("retain_weight", float("nan")),
        ("retain_weight", float("inf")),
        ("retain_weight", True),
        ("retain_pooling", "first"),
        ("batch_layout", "packed"),
        ("bad_rows", "ignore"),
        ("min_source_gap", "zero"),
        ("min_source_gap", float("nan")),
        ("max_length", 1),
        ("max_length", 10.5),
        ("max_tokens_per_row", 0),
        ("max_tokens_per_row", 12.5),
        ("reference_tokens_per_batch", -1),
        ("max_targets_per_group", 0),
        ("max_response_length", 0),
        ("collapse_window", 2),
        ("collapse_window", 6.5),
        ("collapse_drop", 0),
        ("collapse_drop", float("nan")),
        ("source_language", ""),
        ("source_language", "  "),
        ("source_language", 5),
        ("language_weights", "equal"),
        ("language_weights", ["zh"]),
        ("language_weights", {"zh": -1.0}),
        ("language_weights", {"zh": "1"}),
        ("language_weights", {"zh": float("nan")}),
        ("language_weights", {"zh": float("inf")}),
        ("language_weights", {"zh": 0.0, "ja": 0}),
        ("language_weights", {1: 1.0}),
        ("lr_scheduler_type", "cosin"),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("adam_epsilon", -1.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -1),
        ("gradient_accumulation_steps", 0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("num_train_epochs", 0),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        config(**{name: value})
    assert f"`{name}`" in str(error.value)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 2),
        ("retain_weight", 0),
        ("retain_pooling", "last"),
        ("batch_layout", "padded"),
        ("bad_rows", "drop"),
        ("min_source_gap", 0),
        ("min_source_gap", -0.5),
        ("max_length", None),
        ("max_length", 2),
        ("max_tokens_per_row", 1),
        ("collapse_window", 3),
        ("source_language", "zh"),
        ("language_weights", "balanced"),
        ("language_weights", {"zh": 2.0, "ja": 0}),
        ("language_weights", {}),
        ("lr_scheduler_type", "linear"),
        ("learning_rate", 0),
        ("adam_beta1", 0.0),
        ("max_steps", -1),
        ("max_steps", 1),
        ("num_train_epochs", 0.1),
    ],
)
def test_a_value_at_the_edge_of_what_is_meant_is_kept(name: str, value: Any) -> None:
    assert getattr(config(**{name: value}), name) == value


def test_batches_that_accelerate_would_split_are_refused() -> None:
    with pytest.raises(ConfigError, match="split_batches"):
        config(accelerator_config={"split_batches": True})


def parse(*arguments: str) -> MPOConfig:
    (settings,) = HfArgumentParser(MPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "unused", *arguments]
    )
    return settings


def test_the_command_line_parser_of_transformers_reads_every_field_of_our_own() -> None:
    settings = parse(
        *("--use_cpu", "--beta", "1.5", "--retain_weight", "0.5", "--retain_pooling", "last"),
        *(
            "--min_source_gap",
            "0.0",
            "--stop_on_collapse",
            "--collapse_window",
            "9",
            "--collapse_drop",
            "0.3",
        ),
        *("--source_language", "zh", "--group_by_source", "false", "--max_targets_per_group", "4"),
        *("--bad_rows", "drop", "--batch_layout", "padded", "--max_tokens_per_row", "64"),
        *("--reference_cache_dir", "cache", "--reference_tokens_per_batch", "128"),
        *("--chat_template_kwargs", '{"enable_thinking": false}', "--language_weights", "balanced"),
    )
    assert (settings.beta, settings.retain_weight, settings.retain_pooling) == (1.5, 0.5, "last")
    assert (settings.min_source_gap, settings.stop_on_collapse) == (0.0, True)
    assert (settings.collapse_window, settings.collapse_drop) == (9, 0.3)
    assert (settings.source_language, settings.group_by_source) == ("zh", False)
    assert (settings.max_targets_per_group, settings.bad_rows) == (4, "drop")
    assert (settings.batch_layout, settings.max_tokens_per_row) == ("padded", 64)
    assert (settings.reference_cache_dir, settings.reference_tokens_per_batch) == ("cache", 128)
    assert settings.chat_template_kwargs == {"enable_thinking": False}
    assert settings.language_weights == "balanced"


def test_weights_per_language_can_be_given_on_the_command_line_as_json() -> None:
    assert parse("--use_cpu", "--language_weights", '{"bn": 2.0, "sw": 1}').language_weights == {
        "bn": 2.0,
        "sw": 1,
    }


def test_a_wrong_choice_on_the_command_line_is_refused() -> None:
    with pytest.raises(SystemExit):
        parse("--use_cpu", "--retain_pooling", "first")


def test_replacing_one_setting_keeps_the_others_and_checks_again() -> None:
    settings = config(beta=1.5, language_weights={"zh": 2.0}, gradient_checkpointing=True, report_to=[])
    changed = dataclasses.replace(settings, beta=2.0)
    assert (changed.beta, changed.language_weights, changed.gradient_checkpointing) == (
        2.0,
        {"zh": 2.0},
        True,
    )
    assert settings.beta == 1.5
    with pytest.raises(ConfigError, match="retain_weight"):
        dataclasses.replace(settings, retain_weight=-1.0)


def test_gradient_checkpointing_can_be_switched_off_again_in_a_copy() -> None:
    on = config(gradient_checkpointing=True)
    # Where transformers has the new name, the old one only mirrors it once the settings are made.
    name = "activation_checkpointing" if hasattr(on, "activation_checkpointing") else "gradient_checkpointing"
    assert not dataclasses.replace(on, **{name: False}).gradient_checkpointing


def test_settings_survive_pickling() -> None:
    settings = config(beta=1.5, language_weights={"zh": 2.0}, min_source_gap=0.0)
    again = pickle.loads(pickle.dumps(settings))
    assert type(again) is MPOConfig
    assert again.to_dict() == settings.to_dict()


def test_settings_can_be_written_as_json_and_read_again() -> None:
    settings = config(beta=1.5, language_weights={"zh": 2.0}, chat_template_kwargs={"a": 1})
    stored = json.loads(settings.to_json_string())
    kept = ("output_dir", "use_cpu", "beta", "language_weights", "chat_template_kwargs", "retain_pooling")
    again = MPOConfig(**{name: stored[name] for name in kept})
    assert again.to_dict() == settings.to_dict()


def test_a_token_is_not_written_with_the_settings() -> None:
    assert "hf_secret" not in config(hub_token="hf_secret").to_json_string()


def test_the_reference_cache_lies_where_the_user_says_or_below_the_hub_cache(tmp_path: Path) -> None:
    from huggingface_hub.constants import HF_HOME

    assert config().reference_folder() == str(Path(HF_HOME) / "mpo" / "reference")
    assert config(reference_cache_dir=str(tmp_path)).reference_folder() == str(tmp_path)
    assert config(reference_cache_dir="~/somewhere").reference_folder() == str(Path.home() / "somewhere")


def test_deepspeed_without_a_gpu_gets_a_backend_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = pytest.importorskip("deepspeed.ops")
    monkeypatch.setattr(operations, "__compatible_ops__", {"deepspeed_shm_comm": True}, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert deepspeed_backend(False) is None
    assert operations.__compatible_ops__ == {"deepspeed_shm_comm": True}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert deepspeed_backend(False) == "gloo"
    assert operations.__compatible_ops__ == {"deepspeed_shm_comm": False}
    with pytest.raises(ConfigError, match="sets aside under `use_cpu`"):
        MPOConfig(use_cpu=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert deepspeed_backend(False) is None


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss", False),
        ("loss", False),
        ("eval_loss/retention", False),
        ("eval_first_loss/retention", False),
        ("eval_reward_gap/bn", True),
        ("positive/sw", True),
        ("eval_first_logps/chosen/zh", True),
    ],
)
def test_the_best_model_is_chosen_in_the_direction_of_its_metric(metric: str, greater: bool) -> None:
    assert config(metric_for_best_model=metric).greater_is_better is greater
    if not greater:
        with pytest.raises(ConfigError, match="the worst checkpoint would be kept"):
            config(metric_for_best_model=metric, greater_is_better=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "eval_los"}, "did you mean 'eval_loss'"),
        ({"metric_for_best_model": "accuracy"}, "which no evaluation gives"),
        ({"metric_for_best_model": "eval_loss/reward_gap"}, "which no evaluation gives"),
        ({"metric_for_best_model": "eval_reward_gap"}, "which no evaluation gives"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "least learning rate"),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "least learning rate"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"num_cycles": 1}},
            "least learning rate",
        ),
        ({"seed": -1}, "`seed` is -1"),
        ({"data_seed": -1}, "`data_seed` is -1"),
        ({"seed": 2**32}, "`seed` is 4294967296"),
        ({"deepspeed": True}, "`deepspeed` is True; expected the path"),
    ],
)
def test_what_a_library_would_refuse_later_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_schedule_with_its_least_learning_rate_is_taken() -> None:
    settings = config(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1})
    assert settings.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
