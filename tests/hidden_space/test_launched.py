"""Processes that ``accelerate launch`` starts on this machine's CPU share the texts out, and find what one finds alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from mpo.cli import main
from mpo.hidden_space.store import EmbeddingStore
from tests.distributed.launching import environment, run
from tests.jobs.test_hidden_space import make_place

COMMANDS = Path(__file__).parent / "commands.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("launched"))


@pytest.fixture(scope="module")
def written(place: Path) -> str:
    """What two ranks print, which are started once for both commands."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    commands = [[*analysis(place), "--out", str(place / "two")], embedding(place)]
    status, written = run(
        [*launcher, "--main_process_port", str(port), COMMANDS, json.dumps(commands)],
        environment(),
        limit=900,
    )
    assert status == 0, written[-8000:]
    return written


def analysis(place: Path) -> list[str]:
    # Small batches, so that both ranks have several.
    return ["analyze", "hidden-space", str(place / "recipe.yaml"), "--tokens_per_batch", "64"]


def embedding(place: Path) -> list[str]:
    words = ["analyze", "embed", "--model", str(place / "model"), "--folder", str(place)]
    words += ["--dataset", "texts_{language}.jsonl", "--label", "toxic", "--languages", "en"]
    return [*words, "--out", str(place / "states")]


def test_two_ranks_embed_and_analyse_as_one_does(place: Path, written: str) -> None:
    assert main([*analysis(place), "--out", str(place / "one")]) == 0
    one, two = place / "one" / "hidden_space", place / "two" / "hidden_space"
    stores = sorted(path.name for path in (one / "embeddings").iterdir())
    assert stores == sorted(path.name for path in (two / "embeddings").iterdir())
    assert stores == ["alone.after", "tiny.after", "tiny.before"]
    for name in stores:
        alone, together = (EmbeddingStore(folder / "embeddings" / name) for folder in (one, two))
        assert together.provenance["processes"] == 2
        assert together.identity == alone.identity and together.texts == alone.texts
        for layer in alone.layers:
            assert np.array_equal(together.array("last", layer), alone.array("last", layer))
    found = [json.loads((folder / "hidden_space.json").read_text(encoding="utf-8")) for folder in (one, two)]
    assert found[0]["models"] == found[1]["models"]
    assert written.count("Hidden space of tiny") == 1  # by one rank only


def test_two_ranks_that_only_embed_say_so_once(place: Path, written: str) -> None:
    assert written.count("60 texts, last of layers norm") == 1
    assert EmbeddingStore(place / "states").provenance["processes"] == 2
