"""Multilingual safety alignment by preference optimization.

The public names are loaded when first used, so that ``import mpo`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "MPOConfig": "mpo.training.config",
    "MPOTrainer": "mpo.training.trainer",
    "mpo_loss": "mpo.modeling.loss",
    "reward_gap": "mpo.modeling.loss",
}
__all__ = ["MPOConfig", "MPOTrainer", "__version__", "mpo_loss", "reward_gap"]

if TYPE_CHECKING:
    from mpo.modeling.loss import mpo_loss, reward_gap
    from mpo.training.config import MPOConfig
    from mpo.training.trainer import MPOTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
