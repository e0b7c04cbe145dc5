"""What a real translator makes of English texts, and which of its translations the filters of `mpo data build` let through.

    python -m benchmarks.translators --language es --command 'apertium -u {source}-{target}' --codes en=eng es=spa --back 40
    python -m benchmarks.translators --language zh --chat MODEL --prompts 30
    python -m benchmarks.translators --language zh --chat MODEL --prompts 30 --model MODEL        with answers of the model's own

Half of the prompts are the demo's pairs as they are, half are harmful ones of the starter set with its refusals and, since it has
none, rejected answers of the demo's pairs. With `--model` they are the starter set's instead, half harmful and half harmless, and the
model answers them as it would before a training. Only English is given, so that everything is translated. What was dropped is counted
by filter, and so many texts as `--read` says are shown, kept ones and those of each filter, beside their source: whether the right ones
were dropped, a reader has to say. Apertium is `apt-get install apertium apertium-eng-spa`; where the program is missing, nothing is
run. The folder of `--out` is gone on with like any build.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.command import run, save
from mpo.building.recipe import load_build
from mpo.building.starter import starter_refusals, starter_rows
from mpo.common.characters import printable
from mpo.data.contract import HARMFUL, KINDS, PARTS
from mpo.jobs.build import build_data

ROOT = Path(__file__).parents[1]
_SHOWN = 400  # characters of a text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="answers the prompts, in place of the answers that are given")
    parser.add_argument("--language", required=True, help="to translate into")
    parser.add_argument("--command", type=shlex.split, help="a program that translates")
    parser.add_argument("--codes", nargs="+", default=[], metavar="CODE=CODE", help="what it calls languages")
    parser.add_argument("--chat", metavar="MODEL", help="a chat model that translates")
    parser.add_argument("--back", type=float, help="least chrF of what is translated back")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--read", type=int, default=20)
    parser.add_argument("--out", help="folder of the build, kept")
    parser.add_argument("--json", help="JSON file for the numbers")
    options = parser.parse_args()
    if bool(options.command) == bool(options.chat):
        parser.error("expected --command or --chat")
    if options.command and shutil.which(options.command[0]) is None:
        sys.exit(f"skipped: there is no program {options.command[0]!r} here")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.out or temporary)
        recipe = write_recipe(folder, options)
        build_data(load_build(recipe))
        read(folder, options)
        if options.json:
            save(options.json, json.loads((folder / "build.json").read_text(encoding="utf-8")))


def asked(count: int) -> list[dict[str, str]]:
    """Prompts of the starter set, half harmful and half harmless, in English alone."""
    found = []
    for kind in KINDS:
        rows = [row for row in starter_rows() if row.kind == kind]
        found += [{"id": row.id, "kind": kind, "prompt": row.texts["en"]} for row in rows[: count // 2]]
    return found


def given(count: int) -> list[dict[str, str]]:
    """English pairs: the demo's, and prompts of the starter set with its refusals and rejected answers of the demo's."""
    lines = (ROOT / "recipes" / "demo" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    sources = [json.loads(line)["source"] for line in lines]
    pairs = [{part: source[part][0]["content"] for part in PARTS} for source in sources]
    found = [{"id": f"demo-{n}", **pair} for n, pair in enumerate(pairs)][: (count + 1) // 2]
    harmful = [row for row in starter_rows() if row.kind == HARMFUL][: count - len(found)]
    refusals = starter_refusals("en")
    for n, (row, pair) in enumerate(zip(harmful, pairs, strict=False)):
        answers = {"chosen": refusals[n % len(refusals)], "rejected": pair["rejected"]}
        found.append({"id": row.id, "prompt": row.texts["en"], **answers})
    return [{"kind": HARMFUL, **row} for row in found]


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    """The prompts, the refusals and the recipe of the build."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = asked(options.prompts) if options.model else given(options.prompts)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    (folder / "refusals.json").write_text(json.dumps({"en": starter_refusals("en")}), encoding="utf-8")
    loaded = {"dtype": options.dtype}
    translation: dict[str, Any] = (
        {
            "engine": "command",
            "command": options.command,
            "codes": dict(code.split("=", 1) for code in options.codes),
        }
        if options.command
        else {
            "engine": "chat",
            "model": {"model": options.chat, **loaded},
            "max_new_tokens": 4 * options.max_new_tokens,
        }
    )
    recipe = {
        "prompts": {"data": [str(folder / "prompts.jsonl")]},
        "languages": [options.language],
        "answers": {"chosen": "column", "rejected": ["column"]},
        "translation": translation,
        "filters": {"back_translation": options.back},
        "out": str(folder),
    }
    if options.model:
        recipe["model"] = {"model": options.model, **loaded}
        recipe["answers"] = {
            "rejected": ["own"],
            "samples": options.samples,
            "generation": {"max_new_tokens": options.max_new_tokens, "temperature": 0.8, "top_p": 0.95},
            "unfinished": "cut",
            "refusals": str(folder / "refusals.json"),
        }
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def read(folder: Path, options: argparse.Namespace) -> None:
    """Shows texts that were kept and texts that were dropped, each with its source."""
    chance = random.Random(0)
    code = options.language
    pairs = {row["id"]: row for row in _lines(folder / "stages" / "pairs.jsonl")}
    prompts = {row["id"]: row["texts"]["en"] for row in _lines(folder / "stages" / "prompts.jsonl")}
    dropped = defaultdict(list)
    for row in _lines(folder / "dropped.jsonl"):
        if row.get("text"):
            dropped[f"{row['stage']}: {row['reason']} ({row['language']})"].append(row)
    bad = {(row["id"], row["part"]) for rows in dropped.values() for row in rows if row["language"] == code}
    texts = _lines(folder / "stages" / f"texts.{code}.jsonl")
    kept = [
        {**row, "part": part, "text": row[part]}
        for row in texts
        for part in PARTS
        if row["from"].get(part) == "translation" and row[part] and (row["id"], part) not in bad
    ]
    for title, rows in {f"kept ({code})": kept, **dropped}.items():
        print(f"\n{title}: {len(rows)}")
        for row in chance.sample(rows, min(options.read, len(rows))):
            source = prompts[row["id"]] if row["part"] == "prompt" else pairs[row["id"]][row["part"]]
            also = f", also {', '.join(row['also'])}" if row.get("also") else ""
            print(f"  {row['id']}, {row['part']}, {row.get('value', '')}{also}")
            print(f"    {_one_line(source)}\n    {_one_line(row['text'])}")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _one_line(text: str | None) -> str:
    return printable(" ".join((text or "").split())[:_SHOWN], lines=False)


if __name__ == "__main__":
    run(main)
