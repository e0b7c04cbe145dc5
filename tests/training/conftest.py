"""A tiny model and a few groups, for the tests of the trainer and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import random_groups, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return random_groups(0, 4, (1, 3), words=(1, 4))


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, Any]]:
    return random_groups(1, 3, (1, 3), words=(1, 4))
