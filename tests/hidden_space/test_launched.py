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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("launched"))


def launched(*words: str) -> str:
    """What two ranks print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    status, written = run(
        [*launcher, "--main_process_port", str(port), "-m", "mpo.cli", *words], environment(), limit=150
    )
    assert status == 0, written[-8000:]
    return written


def test_two_ranks_embed_and_analyse_as_one_does(place: Path) -> None:
    recipe = str(place / "recipe.yaml")
    # Small batches, so that both ranks have several.
    words = ["analyze", "hidden-space", recipe, "--tokens_per_batch", "64"]
    written = launched(*words, "--out", str(place / "two"))
    assert main([*words, "--out", str(place / "one")]) == 0
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


def test_two_ranks_that_only_embed_say_so_once(place: Path) -> None:
    words = ["analyze", "embed", "--model", str(place / "model"), "--folder", str(place)]
    words += ["--dataset", "texts_{language}.jsonl", "--label", "toxic", "--languages", "en"]
    written = launched(*words, "--out", str(place / "states"))
    assert written.count("60 texts, last of layers norm") == 1
    assert EmbeddingStore(place / "states").provenance["processes"] == 2
