"""Settings of the probe: what they may be, and what needs one."""

from __future__ import annotations

from typing import Any

import pytest

from mpo.errors import ConfigError
from mpo.training.config import MPOConfig
from mpo.training.recipe_keys import check_keys


def config(**settings: Any) -> MPOConfig:
    return MPOConfig(**{"output_dir": "unused", "use_cpu": True, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"behavior_probe": -1}, "`behavior_probe` is -1"),
        ({"behavior_probe": True}, "`behavior_probe` is True"),
        ({"behavior_probe": 2.5}, r"`behavior_probe` is 2\.5"),
        ({"probe_max_new_tokens": 0}, "at least 1"),
        ({"probe_steps": 0}, "a whole number of steps, a share of them below 1, or null"),
        ({"probe_steps": 1.5}, "`probe_steps` is 1.5"),
        ({"probe_steps": -3}, "`probe_steps` is -3"),
        ({"probe_steps": float("nan")}, "`probe_steps` is nan"),
        ({"probe_steps": 5, "stop_on_over_refusal": 0}, "from above 0 to 100"),
        ({"probe_steps": 5, "stop_on_over_refusal": 101}, "from above 0 to 100"),
        ({"probe_languages": []}, "`behavior_probe: 0` asks nothing"),
        ({"stop_on_over_refusal": 10}, "`probe_steps` is not set"),
        ({"behavior_probe": 0, "probe_steps": 5}, "`probe_steps` needs answers"),
        (
            {"behavior_probe": 0, "metric_for_best_model": "eval_probe_balanced"},
            "`metric_for_best_model` needs",
        ),
        ({"metric_for_best_model": "probe_balance"}, "did you mean 'eval_probe_balanced'"),
        (
            {"metric_for_best_model": "probe_balanced", "greater_is_better": False, "behavior_probe": 0},
            "needs answers",
        ),
    ],
)
def test_what_means_nothing_is_refused_with_what_was_expected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize("name", ["probe_balanced", "eval_probe_balanced"])
def test_the_balanced_share_is_a_metric_for_the_best_model_and_better_when_larger(name: str) -> None:
    assert config(metric_for_best_model=name).greater_is_better is True


@pytest.mark.parametrize(
    ("steps", "every"), [(None, None), (5, 5), (5.0, 5), (0.1, 10), (0.001, 1), (0.34, 34)]
)
def test_a_share_of_the_steps_is_rounded_up(steps: float | None, every: int | None) -> None:
    assert config(probe_steps=steps).probe_every(100) == every
    assert config(probe_steps=None, behavior_probe=0).probe_every(100) is None


def test_the_other_spelling_is_named(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("model_name_or_path: a/b\ndataset: c\nbehaviour_probe: 4\n")
    with pytest.raises(ConfigError, match="`behavior_probe`"):
        check_keys(tmp_path / "r.yaml")
