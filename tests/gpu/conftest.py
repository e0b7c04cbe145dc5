"""The device of this suite: CUDA, or with ``MPO_GPU_SUITE_DEVICE=cpu`` a CPU, which shows that the tests run at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs no compiler runs first: a run that is cut then has most of what it should show."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    own.sort(key=lambda item: any(word in item.name for word in ("flex_attention", "compiled", "liger")))
    places = [place for place, item in enumerate(items) if item in own]
    for place, item in zip(places, own, strict=True):
        items[place] = item


@pytest.fixture
def device() -> torch.device:
    return torch.device(os.environ.get("MPO_GPU_SUITE_DEVICE", "cuda"))


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of a test that has no meaning on another."""
    if device.type != "cuda":
        pytest.skip("has no meaning without CUDA")
    return device


@pytest.fixture(autouse=True)
def process_of_its_own() -> None:
    """Mixed precision and compilation are settings of the process; each test here starts as a process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch._dynamo.reset()
