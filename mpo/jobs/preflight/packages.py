"""The optional packages that a recipe asks for."""

from __future__ import annotations

from huggingface_hub import constants, get_token
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mpo.errors import ConfigError, DependencyError
from mpo.training.compute import check_compute_options, is_installed, require_package
from mpo.training.config import MPOConfig
from mpo.training.launcher import launched_with
from mpo.training.recipe import Recipe

_TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "codecarbon": ("codecarbon",),
    "azure_ml": ("azureml",),
}


def upload_obstacle(training: MPOConfig) -> str | None:
    """What would keep a finished run from being uploaded, as far as this machine shows without asking the Hub."""
    if not training.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        return "`push_to_hub` is on, but the Hub is switched off (HF_HUB_OFFLINE is set). Remove one of them."
    if not (training.hub_token or get_token()):
        return (
            "`push_to_hub` is on, but this machine is not signed in to the Hub. Set HF_TOKEN, or run `hf auth login`; or "
            "remove `push_to_hub`."
        )
    return None


def check_packages(recipe: Recipe, *, on_this_machine: bool = True) -> None:
    """Makes sure that the optional packages which the recipe needs are installed and can work here.

    Raises:
        DependencyError: One is not.
        ConfigError: A setting means nothing on this device.
    """
    model, training = recipe.model, recipe.training
    check_compute_options(
        training,
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        on_this_machine=on_this_machine,
    )
    if launched_with("DEEPSPEED"):
        require_package("deepspeed", "the Accelerate configuration", "deepspeed")
    if on_this_machine and (obstacle := upload_obstacle(training)):
        raise ConfigError(obstacle)
    for tracker in training.report_to or []:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"`report_to` names {tracker!r}; expected none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        packages = _TRACKER_PACKAGES.get(str(tracker))
        if packages is not None and not any(is_installed(package) for package in packages):
            raise DependencyError(
                f"`report_to` names {tracker}, but {packages[0]} is not installed. Install it with "
                f"`pip install {packages[0].replace('_', '-')}`, or set `report_to: none`."
            )
