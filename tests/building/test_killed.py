"""A build that is killed again and again ends with the same bytes, and asks again only for what was under way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.building import stub
from tests.building.test_build import harmful, read_lines, write_recipe, write_rows
from tests.evaluation.chat_server import ChatServer, serve

ROOT = Path(__file__).parents[2]
CONCURRENCY = 4
RUN = "import sys; from mpo.building.recipe import load_build; from mpo.jobs.build import build_data; build_data(load_build(sys.argv[1], sys.argv[2:]))"


def reply(body: dict[str, Any]) -> str:
    """The model that is trained, and the one that translates."""
    time.sleep(0.002)
    asked = body["messages"][-1]["content"]
    if body["model"] == "translator":
        return stub.translate(asked.split("-----\n")[1].strip(), "en", "ko")
    if body["seed"] % 2:
        return f"{stub.REFUSAL} What you ask, number {body['seed'] % 1000}, would hurt someone badly."
    return f"Take it in the night, number {body['seed'] % 1000}, and carry it away by the back door quickly."


def recipe(folder: Path, url: str) -> Path:
    rows = [
        {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        for row in harmful(24)
    ]
    write_rows(folder / "prompts.jsonl", rows)
    (folder / "refusals.json").write_text(json.dumps({"en": [stub.REFUSAL]}), encoding="utf-8")
    return write_recipe(
        folder,
        f"prompts: {{data: [{folder}/prompts.jsonl]}}\nlanguages: [ko]\n"
        f"model: {{model: toy, engine: server, url: '{url}', concurrency: {CONCURRENCY}}}\n"
        f"answers: {{select: first, samples: 2, refusals: {folder}/refusals.json}}\n"
        f"translation:\n  engine: chat\n  model: {{model: translator, engine: server, url: '{url}', concurrency: {CONCURRENCY}}}\n"
        f"filters: {{back_translation: null}}\nblock: 5\n",
    )


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(recipe), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def contents(out: Path) -> dict[str, bytes]:
    """Everything but what holds dates."""
    files = sorted(out.glob("stages/*")) + [
        out / name for name in ("groups.jsonl", "groups.parquet", "dropped.jsonl")
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_a_killed_build_ends_with_the_same_bytes_and_asks_hardly_anything_twice(tmp_path: Path) -> None:
    chance = random.Random(7)
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def counted(body: dict[str, Any]) -> str:
        with lock:
            counts[json.dumps(body, sort_keys=True)] += 1
        return reply(body)

    with serve(ChatServer(reply=counted)) as server:
        path = recipe(tmp_path, server.url)
        whole = start(path, tmp_path / "whole")
        assert whole.wait() == 0, whole.stderr.read().decode()
        asked = sum(counts.values())
        # A request that is in two blocks, or sampled alike, is one of each: how often an undisturbed run sends it.
        once = Counter(counts)
        counts.clear()
        kills = 0
        for share in sorted(chance.random() for _ in range(3)):
            process = start(path, tmp_path / "killed")
            while sum(counts.values()) < share * asked and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            process.wait()
            kills += 1
        last = start(path, tmp_path / "killed")
        assert last.wait() == 0, last.stderr.read().decode()

    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(read_lines(tmp_path / "whole" / "groups.jsonl")) > 12
    again = counts - once
    assert counts.keys() == once.keys()
    assert sum(again.values()) <= kills * CONCURRENCY
