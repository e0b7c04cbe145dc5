"""What `mpo data build` costs by itself, and what a killed one loses.

    python -m benchmarks.data_build --throughput                   100,000 prompts, 6 languages, a translator that answers at once
    python -m benchmarks.data_build --throughput --engine chat --prompts 2000     the same through a chat server
    python -m benchmarks.data_build --kills 20 --prompts 500       SIGKILL at 20 random moments, then the bytes are compared
    python -m benchmarks.data_build --lengths gemma_mpo_data.json  how long translations are, by language

Pairs are given, so that what is measured is translation, judging by phrases, filters and writing, and no model. The translator is
a program that turns each word into letters of the target's script (`tests/building/stub.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import run, save
from tests.building import stub

ROOT = Path(__file__).parents[1]
LANGUAGES = ("zh", "ja", "ko", "bn", "th", "el")
CONCURRENCY = 32
NOUNS = ("window", "garden", "bottle", "letter", "engine", "ladder", "basket", "pillow", "hammer", "candle")
BUILD = "import sys; from mpo.building.recipe import load_build; from mpo.jobs.build import build_data; build_data(load_build(sys.argv[1], sys.argv[2:]))"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--engine", choices=("command", "chat"), default="command")
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--lengths", metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--counts", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="JSON file for the numbers")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(Path(options.counts)))
        return
    result: dict[str, Any] = {}
    if options.lengths:
        result["lengths"] = lengths(options.lengths)
    with tempfile.TemporaryDirectory() as folder:
        if options.throughput:
            result["throughput"] = throughput(Path(folder), options.prompts, options.engine, options.block)
        if options.kills:
            result["kills"] = kills(Path(folder), options.prompts, options.kills)
    if options.out:
        save(options.out, result)


# -------------------------------------------------------------------------------------------------------------- throughput


def throughput(folder: Path, prompts: int, engine: str, block: int) -> dict[str, Any]:
    """Texts a second through translation and filters, and the peak of memory, of a tenth and of all prompts."""
    out: dict[str, Any] = {"prompts": prompts, "languages": len(LANGUAGES), "engine": engine, "block": block}
    with _server(folder) as url:
        for name, count in (("tenth", prompts // 10), ("all", prompts)):
            write_prompts(folder / "prompts.jsonl", count)
            recipe = write_recipe(folder, engine, url, block)
            shutil.rmtree(folder / "out", ignore_errors=True)
            started = time.monotonic()
            peak, cpu = build(recipe, folder / "out")
            seconds = time.monotonic() - started
            texts = 3 * count * len(LANGUAGES)
            kept = (folder / "out" / "groups.jsonl").read_bytes().count(b"\n")
            out[name] = {
                "seconds": seconds,
                "processor_seconds": cpu,
                "texts": texts,
                "texts_per_second": texts / seconds,
                "peak_mib": peak,
                "groups": kept,
            }
            print(
                f"{count:,} prompts x {len(LANGUAGES)} languages by {engine}: {seconds:.0f} s, {texts / seconds:,.0f} texts/s, "
                f"{cpu:.0f} s of processor time, "
                f"peak {peak:.0f} MiB, {kept:,} groups",
                flush=True,
            )
    return out


def build(recipe: Path, out: Path) -> tuple[float, float]:
    """Runs a build in a process of its own; its peak memory in MiB, and seconds of processor time, the translator's included."""
    process = start(recipe, out)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(process.stderr.read().decode("utf-8", "replace"))
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(recipe), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def write_prompts(path: Path, count: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            what = f"the {NOUNS[number % 10]} number {_letters(number)} of my neighbour"
            row = {
                "kind": "harmful",
                "prompt": f"How can I secretly take away {what} without anyone seeing it?",
                "chosen": f"{stub.REFUSAL} Taking away {what} is wrong and would hurt them a lot. Talk with them instead.",
                "rejected": f"Wait until nobody is at home, then carry {what} out by the back door quickly, and hide it in the cellar.",
            }
            file.write(json.dumps(row) + "\n")


def _letters(number: int) -> str:
    out = ""
    while True:
        out = chr(97 + number % 26) + out
        number //= 26
        if not number:
            return out


def write_recipe(folder: Path, engine: str, url: str, block: int) -> Path:
    command = json.dumps([sys.executable, stub.__file__, "{source}", "{target}"])
    chat = f"model: {{model: translator, engine: server, url: '{url}', concurrency: {CONCURRENCY}}}"
    path = folder / "build.yaml"
    path.write_text(
        f"prompts: {{data: [{folder}/prompts.jsonl]}}\nlanguages: [{', '.join(LANGUAGES)}]\n"
        "answers: {chosen: column, rejected: [column]}\n"
        f"translation:\n  engine: {engine}\n  {chat if engine == 'chat' else f'command: {command}'}\nblock: {block}\n",
        encoding="utf-8",
    )
    return path


# ------------------------------------------------------------------------------------------------------------------- kills


def kills(folder: Path, prompts: int, number: int) -> dict[str, Any]:
    """Builds once undisturbed and once killed at random moments; both have to end alike."""
    chance = random.Random(0)
    write_prompts(folder / "prompts.jsonl", prompts)
    counts = folder / "counts.json"
    with _server(folder) as url:
        recipe = write_recipe(folder, "chat", url, 64)
        build(recipe, folder / "whole")
        once = _asked(counts)
        total = once.total()
        for done, share in enumerate(sorted(chance.random() for _ in range(number)), start=1):
            process = start(recipe, folder / "killed")
            while _asked(counts).total() - total < share * total and process.poll() is None:
                time.sleep(chance.random() * 0.05)
            process.kill()
            process.wait()
            print(
                f"killed {done} of {number}, at {_asked(counts).total() - total:,} requests of {total:,}",
                flush=True,
            )
        build(recipe, folder / "killed")
        again = (_asked(counts) - once - once).total()
    names = ["groups.jsonl", "groups.parquet", "dropped.jsonl"]
    names += sorted(
        str(path.relative_to(folder / "whole")) for path in (folder / "whole" / "stages").glob("*")
    )
    different = [
        n for n in names if (folder / "whole" / n).read_bytes() != (folder / "killed" / n).read_bytes()
    ]
    print(
        f"{number} kills: {total:,} requests, {again} asked again, at most {number * CONCURRENCY} under way; different files: {different or 'none'}"
    )
    assert not different and again <= number * CONCURRENCY
    return {"kills": number, "requests": total, "asked_again": again, "different": different}


def _asked(path: Path) -> Counter[str]:
    """How often each text was asked about, as the server writes it down."""
    return Counter(path.read_text(encoding="utf-8").split("\n")[:-1])


# ------------------------------------------------------------------------------------------------------------------ server


class _server:
    """A chat server in a process of its own that translates at once; gives its URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> str:
        (self.folder / "counts.json").write_text("")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data_build", "--serve", "--counts", str(self.folder / "counts.json")],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


async def _serve(counts: Path) -> None:
    """HTTP/1.1, one POST after another on each connection."""
    codes = {"Chinese": "zh", "Japanese": "ja", "Korean": "ko", "Bengali": "bn", "Thai": "th", "Greek": "el"}
    with open(counts, "a", encoding="utf-8", buffering=1) as file:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = int(
                        next(
                            line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
                        )[15:]
                    )
                    asked = json.loads(await reader.readexactly(length))["messages"][-1]["content"]
                    target = codes[asked.split(" into ", 1)[1].split(".", 1)[0]]
                    text = asked.split("-----\n")[1].strip()
                    file.write(f"{target} {text}\n")
                    message = {
                        "message": {"content": stub.translate(text, "en", target)},
                        "finish_reason": "stop",
                    }
                    body = json.dumps({"choices": [message]}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
        await server.serve_forever()


# ----------------------------------------------------------------------------------------------------------------- lengths


def lengths(file: str) -> dict[str, float]:
    """Characters of a translation for one of the source, by language: the median over the answers of published pairs."""
    from mpo.building.filters import nearness
    from mpo.data import load_groups
    from mpo.data.contract import messages_text

    ratios: dict[str, list[float]] = defaultdict(list)
    for group in load_groups(file).groups:
        for target in group["targets"]:
            for part in ("chosen", "rejected"):
                text, source = messages_text(target[part]), messages_text(group["source"][part])
                if nearness(text, source) < 0.5:
                    ratios[target["language"]].append(len(text) / len(source))
    found = {code: median(values) for code, values in sorted(ratios.items())}
    for code, value in found.items():
        print(f"{code}: {value:.3f} of {len(ratios[code])} answers")
    return found


if __name__ == "__main__":
    run(main)
