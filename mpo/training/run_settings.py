"""What a run trains and how, as its checkpoints state it, and what may change where it is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from mpo.common.words import ARROW, listed, nearest, shown_value
from mpo.errors import ConfigError
from mpo.modeling.identity import ModelIdentity, computing_settings
from mpo.training.harmless import HarmlessSettings

_LENGTH = ("num_train_epochs", "max_steps")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", *_LENGTH)
_OBJECTIVE = ("beta", "retain_weight", "retain_pooling", "language_weights", "disable_dropout")
_HARMLESS = (
    "harmless_beta",
    "harmless_loss_weight",
    "harmless_retain_weight",
    "harmless_retain_target",
    "harmless_refusal_target",
)
_OF_THE_ORDER = ("harmless_share", "harmless_max_response_length")  # they belong to the data and their order
# Keys of the optimizer's parameter groups, which a checkpoint would set back.
_GROUP_KEYS = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
_ADAPTER_NAMES = {
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "layers_to_transform": "lora_first_layer",
}
_SAME_SHAPES = ("lora_alpha", "lora_dropout", "use_rslora", "mixed_precision", "max_grad_norm")
CHANGEABLE = (*_GROUP_KEYS, *_SCHEDULE, *_OBJECTIVE, *_HARMLESS, *_SAME_SHAPES)
"""Settings that `resume_changes` may name. All others decide what a checkpoint's tensors are."""

_NOT_LAMBDAS = ("reduce_lr_on_plateau", "greedy")


def check_names(names: Iterable[str]) -> None:
    """Raise a ConfigError for a name in `resume_changes` that cannot change within a run."""
    for name in names:
        if name not in CHANGEABLE:
            near = nearest(name, CHANGEABLE)
            raise ConfigError(
                f"`resume_changes` names {name!r}, which cannot change within a run"
                + (f"; did you mean `{near}`?" if near else f". Expected any of {', '.join(CHANGEABLE)}.")
            )


def run_settings(
    args: Any,
    model: Any,
    base: ModelIdentity,
    optimizer: Any,
    mixed_precision: str,
    *,
    harmless: bool = False,
) -> dict[str, Any]:
    """Every setting that decides what is trained and how, ready for JSON; the order of the data has its own record.

    Args:
        args: The run's :class:`~mpo.training.config.MPOConfig`.
        model: The model that is trained, with its adapter if it has one.
        base: Identity of the reference model.
        optimizer: One that the trainer was given, or None.
        mixed_precision: As ``accelerate.Accelerator`` names it.
        harmless: Whether there are harmless groups.
    """
    names = (
        *_OBJECTIVE,
        *_GROUP_KEYS,
        *_SCHEDULE,
        "max_grad_norm",
        "optim",
        "optim_args",
        "loss_type",
        "loss_weights",
        "train_on",
    )
    names += tuple(sorted(set(args.objectives.reads) - set(names)))
    settings = {name: getattr(args, name) for name in names}
    if harmless:
        settings |= {f.name: getattr(args, f.name) for f in fields(HarmlessSettings)}
        own = args.harmless
        settings |= {f"harmless_{name}": getattr(own, name) for name in ("loss_type", "beta", "train_on")}
        for name in _OF_THE_ORDER:
            del settings[name]
    # Only one of the two is in effect.
    settings["num_train_epochs" if args.max_steps > 0 else "max_steps"] = None
    settings["mixed_precision"] = mixed_precision
    settings["dtype"] = base.dtype
    if not base.model.startswith("unknown:"):
        settings["reference model"] = base.model
    if optimizer is not None:
        settings["optim"] = type(optimizer).__name__
        defaults = getattr(optimizer, "defaults", {})
        settings |= {name: defaults[key] for name, key in _GROUP_KEYS.items() if key in defaults}
    if hasattr(model, "peft_config"):
        config = model.peft_config["default"].to_dict()
        adapter = {**computing_settings(config), "lora_dropout": config.get("lora_dropout")}
        settings |= {_ADAPTER_NAMES.get(name, name): value for name, value in adapter.items()}
    plain: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True, default=_plain))
    return plain


def saved_settings(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings that a checkpoint states, or None; one of harmless groups that its version did not know had its default."""
    then = state.get("settings")
    if then is None or "harmless_retain_weight" not in then:
        return then
    defaults = {f.name: f.default for f in fields(HarmlessSettings) if f.name not in _OF_THE_ORDER}
    return {**defaults, **then}


def _plain(value: Any) -> Any:
    return getattr(value, "value", None) or str(value)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that two runs state differently. What only one of them states is not compared."""
    return [name for name in now if name in then and then[name] != now[name]]


def described(name: str, then: Any, now: Any) -> str:
    """``learning_rate: 0.001 then, 0.0005 now``; of long values only that they differ."""
    if isinstance(now, str) and len(now) > 30:  # a hash
        return f"{name}: another"
    return f"{name}: {shown_value(then)} then, {shown_value(now)} now"


def changes_at(step: int, names: Iterable[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``from step 3: learning_rate 0.001 → 0.0005`` for each name."""
    return [
        f"from step {step}: {name} {shown_value(then[name])} {ARROW} {shown_value(now[name])}"
        for name in names
    ]


def check_settings(
    checkpoint: str,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    allowed: Iterable[str],
    *,
    trains_adapter: bool,
) -> list[str]:
    """Refuse settings that changed since a checkpoint was saved, except those that the user has allowed to change.

    Args:
        checkpoint: Its folder.
        then, now: What :func:`run_settings` returned for the run that saved it, and for this one.
        allowed: `resume_changes`.
        trains_adapter: Whether an adapter is trained.

    Returns:
        Names of the settings that change.

    Raises:
        ConfigError: Names every setting that must not change, with its old and new value.
    """
    allowed = {*allowed, *(_LENGTH if {*allowed} & {*_LENGTH} else ())}
    changed = differences(then, now)
    refused = [name for name in changed if name not in allowed]
    kinds = {str(of.get("lr_scheduler_type")) for of in (then, now)}
    if "lr_scheduler_type" in changed and kinds & {*_NOT_LAMBDAS}:
        # Such a schedule lives from its own measurements, which the other kind has not made.
        refused = [name for name in refused if name != "lr_scheduler_type"] + ["lr_scheduler_type"]
        fixed = ["lr_scheduler_type"]
    else:
        fixed = []
    if not refused:
        return changed
    fixed += [name for name in refused if name not in CHANGEABLE]
    free = [name for name in refused if name not in fixed]
    advice = "Restore them"
    if free:
        advice += f", or set `resume_changes: [{', '.join(free)}]` to go on with the new values from here"
    if fixed:
        key = "adapter_name_or_path" if trains_adapter else "model_name_or_path"
        advice += (
            f". {listed(fixed)} cannot change within a run: start a new one from the checkpoint's weights "
            f"(`{key}: {checkpoint}`), with a fresh optimizer"
        )
    what = "; ".join(described(name, then[name], now[name]) for name in refused)
    raise ConfigError(f"'{checkpoint}' was saved by a run with other settings ({what}). {advice}.")


class OptimizerSettings:
    """Settings of the optimizer as the arguments give them, to be put back over those that a checkpoint restores."""

    def __init__(self, optimizer: Any) -> None:
        keys = {*_GROUP_KEYS.values()}
        self._groups = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]

    def apply(self, changed: Iterable[str], optimizer: Any, scheduler: Any) -> None:
        """Have a restored optimizer and schedule go on with what has changed.

        Args:
            changed: Names of settings.
            optimizer, scheduler: As they are after a checkpoint was loaded.
        """
        changed = set(changed)
        keys = {_GROUP_KEYS[name] for name in changed if name in _GROUP_KEYS}
        for group, given in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({key: given[key] for key in keys if key in given})
            if "lr" in keys:
                group["initial_lr"] = given["lr"]
        scheduler = getattr(scheduler, "scheduler", scheduler)
        if not hasattr(scheduler, "lr_lambdas"):
            return
        if "lr" in keys:
            scheduler.base_lrs = [given["lr"] for given in self._groups]
        if "lr" in keys or changed & {*_SCHEDULE}:
            # The next step's rate was computed by the old schedule.
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates
