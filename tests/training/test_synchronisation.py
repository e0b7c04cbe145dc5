"""Nothing in a step waits for the device, but for one finite flag per optimizer step and what is logged.

Whether an operation waits depends on the device; which operations would wait on an accelerator does not. So the
operations of a run on the CPU are watched: those that turn a tensor into a Python value, those whose result's size
depends on a tensor's values, and those that bring a tensor to the CPU. The suite for GPUs lets CUDA itself complain.

The padded layout is left out: it gives the library a two-dimensional mask, which the library looks into.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mpo.training.sampling import GroupCollator
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.tiny import random_groups, save_tiny

WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
}


class Watch(TorchDispatchMode):
    """Counts waiting operations by the function that they are in, ``file:function``; torch's own functions have callers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.paused = False

    def note(self, operation: str) -> None:
        if self.paused:
            return
        skipped = (str(Path(torch.__file__).parent), __file__)
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(skipped)]
        self.found[f"{Path(frames[-1].filename).name}:{frames[-1].name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeat = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or repeat:
            self.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch everything but the collator, which works on the CPU ahead of the step."""
    watch = Watch()
    collate = GroupCollator.__call__

    def unwatched(*args: Any) -> Any:
        watch.paused = True
        try:
            return collate(*args)
        finally:
            watch.paused = False

    def noted(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            watch.note(name)
            return original(self, *args, **kwargs)

        return mock.patch.object(Tensor, name, method)

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu", "__array__"):
            stack.enter_context(noted(name))
        stack.enter_context(mock.patch.object(GroupCollator, "__call__", unwatched))
        stack.enter_context(watch)
        yield watch


class Watched(MPOTrainer):
    """Watches from the first micro-batch to the end of the last optimizer step."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with watching() as self.watch:
            return super()._inner_training_loop(*args, **kwargs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in ("llama", "gemma2")}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"max_tokens_per_call": 60}),
        ("llama", {"max_tokens_per_batch": 300, "retain_pooling": "last"}),
        ("gemma2", {"peft_config": runs.lora()}),
    ],
    ids=["trees", "several calls", "token budget", "adapter"],
)
def test_a_step_waits_once_for_its_finite_flag(
    models: dict[str, Path], tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    steps, accumulated = 3, 2
    trainer = runs.trainer(
        models[family],
        tmp_path,
        random_groups(0, steps * accumulated, (1, 3), words=(1, 6)),
        kind=Watched,
        max_steps=steps,
        gradient_accumulation_steps=accumulated,
        logging_strategy="no",
        **settings,
    )
    trainer.train()
    assert trainer.state.global_step == steps
    # Besides, the loader draws a seed at the start of each epoch, and the loss is read at the end of the run.
    others = {"trainer.py:_run_epoch": math.ceil(trainer.state.epoch), "trainer.py:_finalize_training": 1}
    assert dict(trainer.watch.found) == {"guards.py:not_finite": steps, **others}


def test_logging_waits_only_when_something_is_logged(models: dict[str, Path], tmp_path: Path) -> None:
    waits = []
    for interval in (1, 2, 4):
        settings = {"max_steps": 4, "logging_steps": interval}
        trainer = runs.trainer(models["llama"], tmp_path, kind=Watched, **settings)
        trainer.train()
        assert trainer.watch.found["guards.py:not_finite"] == 4
        waits.append(sum(trainer.watch.found.values()))
    assert waits[0] - waits[1] == 2 * (waits[1] - waits[2]) > 0, "4, 2 and 1 logs"


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: float(tensor.sum()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
        lambda tensor: 1 if tensor.sum() > 0 else 0,
        lambda tensor: torch.repeat_interleave(tensor, (tensor > 0).long()),
        lambda tensor: torch.masked_select(tensor, tensor > 0),
        lambda tensor: tensor.unique(),
    ],
)
def test_the_watch_sees_what_waits(wait: Any) -> None:
    tensor = torch.tensor([1.0, -1.0])
    with watching() as watch:
        _ = tensor * 2
        assert not watch.found
        wait(tensor)
        assert watch.found
