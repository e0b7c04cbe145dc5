"""A signal that one of two ranks receives ends both at the same step, and the run resumes as if it had not, on each engine."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed import scenarios
from tests.distributed.launching import launch
from tests.distributed.test_engines import WORKER, saved
from tests.plain import assert_same_tensors

NAME = "full-adamw"


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_sigterm_on_one_rank_saves_the_step_and_the_run_resumes(engine: str, tmp_path: Path) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    shared, out = tmp_path / "shared", tmp_path / "out"
    out.mkdir()
    family = scenarios.SCENARIOS[NAME].family
    scenarios.save_tiny(family, shared / f"model-{family}")
    status, written = launch(engine, [WORKER, out, shared, f"signal:{NAME}"], limit=240)
    assert status == 0, written[-8000:]
    first, second = (torch.load(out / f"signal-{NAME}.{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second
    assert first["code"] == 128 + signal.SIGTERM
    assert first["stopped at"] == 2 and first["checkpoints"] == ["checkpoint-2"]
    assert first["steps"] == [1, 2, 3]
    assert "learning_rate" in first["refused"]
    # Both divide the same sums alike: nothing is left to rounding.
    assert_same_tensors(saved(out / "signalled"), saved(out / "whole"), 0.0)
