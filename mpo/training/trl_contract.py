"""Where TRL and Accelerate are kept from what they do by habit, and their errors made this package's own.

What this relies on is watched by ``tests/training/test_trl_contract.py``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from mpo.errors import ConfigError, DependencyError, MPOError, StorageError
from mpo.training.config import MPOConfig
from mpo.training.sharding import fsdp_reshard, is_fsdp_sharded


class _NoModel:
    """An architecture of which nothing is loaded."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        """Return no model."""


@contextmanager
def without_reference_model(args: MPOConfig) -> Iterator[None]:
    """Keep ``DPOTrainer.__init__`` from loading a second model as its reference, which MPO never needs.

    The policy is loaded before, so the only model that the constructor still loads is that reference, by
    ``create_model_from_path(..., **args.model_init_kwargs)``. One of the function's arguments is the architecture to load.
    """
    given = args.model_init_kwargs
    trl_logger = logging.getLogger("trl.trainer.dpo_trainer")
    level = trl_logger.level
    args.model_init_kwargs = {"architecture": _NoModel}
    # TRL remarks that the settings of a loaded model are ignored, but the policy was loaded with them.
    trl_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*model_init_kwargs.*")
            # PEFT asks a model by the old name of an attribute that transformers renamed.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        args.model_init_kwargs = given
        trl_logger.setLevel(level)


@contextmanager
def without_second_sharding(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """Have ``accelerator.prepare(model, optimizer)`` take a model that FSDP2 has divided, and an optimizer of its shards.

    ``Accelerator.prepare`` itself would find an optimizer's weights again by their addresses, which empty shards share.
    For any other model nothing changes.
    """
    if not is_fsdp_sharded(model):
        yield
        return
    fsdp_reshard(model)

    def prepare(model: Any, optimizer: Any) -> tuple[Any, Any]:
        accelerator._models.append(model)
        return model, accelerator.prepare_optimizer(optimizer)

    accelerator.prepare = prepare
    try:
        yield
    finally:
        del accelerator.prepare  # the class's own shows again


@contextmanager
def own_errors(args: MPOConfig) -> Iterator[None]:
    """Turn what the libraries say of a missing package, a folder or the LM head into this package's errors."""
    try:
        yield
    except MPOError:
        raise
    except ImportError as error:
        raise DependencyError(str(error)) from error
    except (NotADirectoryError, PermissionError, FileExistsError) as error:
        raise StorageError(f"the output folder '{args.output_dir}' cannot be made: {error}") from error
    except ValueError as error:
        if "lm_head" not in str(error):
            raise
        raise ConfigError(str(error)) from error
