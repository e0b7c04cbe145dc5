"""Settings of the questions that a run puts to its model, and which metric chooses the checkpoint to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mpo.common.checks import is_positive, is_whole, require
from mpo.common.words import listed, nearest
from mpo.errors import ConfigError

PROBE_METRIC = "probe_balanced"
"""Share of harmful prompts refused or of harmless ones answered, whichever is smaller, averaged over languages."""

# Of the metrics that an evaluation gives, see `MPOTrainer.evaluate`; the first are losses, the others per language.
_BEST_LOSSES = ("loss", "loss/retention")
_BEST_PER_LANGUAGE = ("reward_gap", "gap_to_source", "positive", "logps/chosen", "logps/rejected")


@dataclass
class ProbeSettings:
    r"""What a run asks its model before, while and after it is trained; see `mpo.evaluation.probe`.

    Args:
        behavior_probe (`int`, *optional*, defaults to `20`):
            Probe prompts per language and kind (harmful, harmless, harmless that looks harmful) that are answered before and
            after training. 0 asks nothing.
        probe_languages (`list[str]`, *optional*):
            Languages they are asked in. Unset: those that are trained, and the source language.
        probe_max_new_tokens (`int`, *optional*, defaults to `48`):
            Longest answer, in tokens.
        probe_steps (`float`, *optional*):
            Ask them every so many steps, too; below 1 a share of all steps. Unset: only before and after.
        stop_on_over_refusal (`float`, *optional*):
            Stop when the share of harmless prompts refused is more than this many percentage points above the start's: in
            the mean over languages, or in one language beyond the change's 95 % interval.
    """

    behavior_probe: int = field(
        default=20, metadata={"help": "Probe prompts per language and kind; 0 asks nothing."}
    )
    probe_languages: list[str] | None = field(
        default=None, metadata={"help": "Languages of the probe; unset: those that are trained."}
    )
    probe_max_new_tokens: int = field(default=48, metadata={"help": "Longest answer to a probe prompt."})
    probe_steps: float | None = field(
        default=None, metadata={"help": "Steps between two probes; below 1 a share of all steps."}
    )
    stop_on_over_refusal: float | None = field(
        default=None,
        metadata={"help": "Rise of harmless prompts refused, in percentage points, that ends the run."},
    )

    def probe_every(self, max_steps: int) -> int | None:
        """Optimizer steps from one probe to the next in a run of so many; None where there is none in between."""
        if self.probe_steps is None or not self.behavior_probe:
            return None
        steps = self.probe_steps
        return max(1, math.ceil(max_steps * steps) if steps < 1 else int(steps))

    def wanting_answers(self, metric_for_best_model: str | None) -> str | None:
        """Half a sentence that names the settings which do nothing where no prompt is asked; None where there is none."""
        given = {
            "probe_steps": self.probe_steps is not None,
            "stop_on_over_refusal": self.stop_on_over_refusal is not None,
            "metric_for_best_model": is_probe_metric(metric_for_best_model),
        }
        names = [f"`{name}`" for name, is_given in given.items() if is_given]
        if not names:
            return None
        return f"{listed(names)} {'need' if names[1:] else 'needs'} answers to the probe prompts"

    def check_probe(self, metric_for_best_model: str | None) -> None:
        """Refuse values that mean nothing, and settings that need a probe where there is none.

        Raises:
            ConfigError: Says what was expected.
        """
        require(
            self,
            "behavior_probe",
            lambda v: is_whole(v, 0),
            "0 for none, or a number of prompts per language and kind",
        )
        require(self, "probe_max_new_tokens", lambda v: is_whole(v, 1), "a whole number of at least 1")
        require(
            self,
            "probe_steps",
            lambda v: v is None or (is_positive(v) and (v < 1 or v % 1 == 0)),
            "a whole number of steps, a share of them below 1, or null",
        )
        require(
            self,
            "stop_on_over_refusal",
            lambda v: v is None or (is_positive(v) and v <= 100),
            "percentage points from above 0 to 100, or null",
        )
        if self.probe_languages is not None and not self.probe_languages:
            raise ConfigError(
                "`probe_languages` is empty; expected languages such as [en, bn], or null for those that are trained. "
                "`behavior_probe: 0` asks nothing."
            )
        if not self.behavior_probe and (wanting := self.wanting_answers(metric_for_best_model)):
            raise ConfigError(f"{wanting}, and `behavior_probe` is 0. Set it to 20, for example.")
        if self.stop_on_over_refusal is not None and self.probe_steps is None:
            raise ConfigError(
                "`stop_on_over_refusal` is looked at when the probe is asked, and `probe_steps` is not set. Set it, for "
                "example to 0.1, a tenth of the steps."
            )


def is_probe_metric(metric: str | None) -> bool:
    """Whether a metric for the best model comes from the probe."""
    return metric is not None and metric.removeprefix("eval_") == PROBE_METRIC


def check_probe_is_asked(
    settings: ProbeSettings, metric_for_best_model: str | None, callbacks: Iterable[Any]
) -> None:
    """Refuse settings that need answers to the probe prompts where no callback asks them.

    Raises:
        ConfigError: Names the settings and the callback.
    """
    wanting = settings.wanting_answers(metric_for_best_model)
    if wanting and not any(getattr(each, "asks_probe", False) for each in callbacks):
        raise ConfigError(
            f"{wanting}, and no callback of this trainer asks them. `mpo.evaluation.probe.watch.ProbeWatch` does: "
            "`trainer.add_callback(ProbeWatch(trainer))`."
        )


def metric_is_loss(metric: str) -> bool:
    """Whether a metric for the best model is better when it is smaller.

    Raises:
        ConfigError: No evaluation gives a metric of this name.
    """
    name = metric.removeprefix("eval_")
    if is_probe_metric(metric):
        return False
    # With several evaluation sets, a metric begins with the name of one.
    if any(name == loss or name.endswith(f"_{loss}") for loss in _BEST_LOSSES):
        return True
    kind = name.rpartition("/")[0]
    if any(kind == each or kind.endswith(f"_{each}") for each in _BEST_PER_LANGUAGE):
        return False
    known = [
        *(f"eval_{loss}" for loss in _BEST_LOSSES),
        *(f"eval_{each}/bn" for each in _BEST_PER_LANGUAGE),
        f"eval_{PROBE_METRIC}",
    ]
    near = nearest(metric, known)
    raise ConfigError(
        f"`metric_for_best_model` is {metric!r}, which no evaluation gives"
        + (f"; did you mean {near!r}?" if near else ".")
        + f" Known are {', '.join(known)} (with a target language for `bn`)."
    )
