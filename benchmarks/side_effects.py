"""What safety training costs: from public red-team prompts to a page of attack success against harmless prompts refused.

    python -m benchmarks.side_effects --model MODEL --multijail MultiJail.csv --dry_run
    python -m benchmarks.side_effects --model MODEL --multijail MultiJail.csv --polyrefuse FOLDER --seeds 0 1 2
    python -m benchmarks.side_effects --model MODEL --multijail MultiJail.csv --paper gemma_mpo_data.json --part tune

MultiJail (https://github.com/DAMO-NLP-SG/multilingual-safety-for-LLMs) is divided by its rows: those from 70 to 100 are for
choosing settings by (``--part tune``), trained on the 70 before; with settings chosen, the first 100 are trained on, and of the
others 48 are measured (``--part test``). Harmless prompts are trained on from the package's starter sets and measured on its probe
set, 14 of whose prompts are for choosing and the others for measuring. With ``--polyrefuse``, a folder of PolyRefuse's files
(https://github.com/mainlp/Multilingual-Refusal), its harmless training prompts are trained on as well, in the languages that it
has, and of its harmless test prompts 30 of the first 120 are for choosing and 48 of the others are measured; ``--harmless
NAME=FILE.csv`` adds sets. Nothing is trained on and measured. With ``--pairs``, published preference pairs, their prompts are
trained on as harmful ones where the dominant language's chosen response is a refusal.

1. ``mpo data build`` makes groups: refusals of a list for harmful prompts, the model's own answers to harmless ones.
2. ``mpo compare`` trains ``refuse-or-answer`` on them (recipes/qwen.yaml), with ``--ways`` others of
   recipes/compare/refuse_or_answer.yaml on the same groups, with ``--paper`` also the published objective on the published pairs
   (``mpo``), once with each seed, and measures the model before and after.
3. ``mpo analyze hidden-space`` says how far the measured harmful and harmless prompts lie apart before and after each run.

What is done is skipped by the same command; ``OUT/compare-PART/index.html`` is the page, ``OUT/effects-PART.md`` a table for each
setting, by language and set of prompts, and ``OUT/hidden_space-PART`` has the hidden space.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import command
from mpo.building.recipe import BuildRecipe, load_build
from mpo.common.files import write_text
from mpo.common.statistics import average_change
from mpo.common.tables import TextTable
from mpo.data.contract import messages_text
from mpo.data.loading import load_groups
from mpo.data.refusals import opens_with_refusal
from mpo.errors import ConfigError, DataError
from mpo.evaluation.comparison import LANGUAGE, REFUSAL
from mpo.evaluation.contrast import ContrastRow
from mpo.evaluation.probe import probe_rows
from mpo.hidden_space.recipe import load_analysis_recipe
from mpo.jobs.build import build_data
from mpo.jobs.compare.job import compare
from mpo.jobs.compare.outcomes import mean_by_language, mean_over_seeds, measured, outcomes
from mpo.jobs.compare.planning import RUNS
from mpo.jobs.compare.recipe import BASE, load_comparison
from mpo.jobs.hidden_space import run_analysis
from mpo.report.folder import ModelResults

LANGUAGES = ("en", "zh", "ko", "ar", "bn", "sw")
UNTRAINED = ("ja", "de", "fr", "es")
MULTIJAIL_PARTS = {"tune": (slice(0, 70), slice(70, 100)), "test": (slice(0, 100), slice(100, None))}
"""Its rows that are trained on, and those that are measured or chosen from."""
POLYREFUSE_PARTS = {"tune": (slice(0, 120), 30), "test": (slice(120, None), 48)}
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "qwen.yaml"
BUILD = ROOT / "recipes" / "data" / "refuse_or_answer.yaml"
PAPER = {
    "loss_type": "mpo",
    "loss_weights": None,
    "beta": 1.0,
    "retain_weight": 1.0,
    "train_on": "targets",
    "retain_pooling": "mean",
    "min_source_gap": None,
    "language_weights": None,
    "max_response_length": 64,
    "bad_rows": "drop",
    "lora_first_layer": 0.0,
    "learning_rate": 2.0e-4,
    "max_steps": -1,
    "num_train_epochs": 2,
    "save_strategy": "epoch",
    "harmless_loss_type": None,
    "harmless_retention": "none",
    "harmless_retain_target": None,
    "harmless_refusal_target": None,
    "harmless_share": None,
}
"""What the published objective changes in the recipe: nothing of the remedy stays, and objective, epochs and layers are
those of recipes/compare/paper.yaml."""

WAY = "refuse-or-answer"
WAYS: dict[str, dict[str, Any]] = {
    run["name"]: {key: value for key, value in run.items() if key != "name"}
    for run in yaml.safe_load(
        (ROOT / "recipes" / "compare" / "refuse_or_answer.yaml").read_text(encoding="utf-8")
    )["runs"]
}
"""What each way changes in the recipe, on the same groups and in as many steps."""


def write_table(path: Path, rows: Iterable[Mapping[str, str]], languages: Iterable[str]) -> Path:
    """A CSV file of prompts, a column for each language."""
    names = ["id", *languages]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return path


def read_multijail(path: Path) -> list[dict[str, str]]:
    """Its rows, in their order.

    Raises:
        DataError: It cannot be read, or lacks a language.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}).", file=str(path)) from None
    lacking = [code for code in LANGUAGES if not rows or code not in rows[0]]
    if lacking or len(rows) <= 100:
        raise DataError(
            f"has {len(rows)} rows{' and no column ' + ', '.join(lacking) if lacking else ''}. Expected MultiJail.csv, with a column "
            "for each language.",
            file=str(path),
        )
    return rows


def read_polyrefuse(folder: Path, part: str) -> tuple[list[dict[str, str]], list[str]]:
    """PolyRefuse's harmless prompts of a part, ``"train"`` or ``"test"``, and those of our languages that it has them in.

    Raises:
        DataError: A file cannot be read, there is none in English, or the languages have different numbers of prompts.
    """
    columns: dict[str, list[str]] = {}
    for code in (*LANGUAGES, *UNTRAINED):
        path = folder / f"harmless_{part}_{code}.json"
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            columns[code] = [row.get("instruction_translated") or row["instruction"] for row in found]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"is no file of PolyRefuse ({type(error).__name__}: {error}).", file=str(path)
            ) from None
    if LANGUAGES[0] not in columns or len({len(texts) for texts in columns.values()}) != 1:
        counts = ", ".join(f"{code} {len(texts)}" for code, texts in columns.items()) or "none"
        raise DataError(
            f"has harmless_{part}_LANGUAGE.json with these numbers of prompts: {counts}. Expected English among them, and the "
            "same number in each.",
            file=str(folder),
        )
    numbers = range(len(columns[LANGUAGES[0]]))
    rows = [
        {"id": f"polyrefuse-{part}-{n}", "kind": "harmless", **{code: columns[code][n] for code in columns}}
        for n in numbers
    ]
    return rows, list(columns)


def read_pairs(files: list[str]) -> list[dict[str, str]]:
    """Prompts of preference pairs whose chosen response in the dominant language is a refusal, in our languages.

    Those of several turns are left out.

    Raises:
        DataError: A file cannot be read, or none of its rows is good.
    """
    rows = []
    for file in files:
        for number, group in enumerate(load_groups(file, bad_rows="drop").groups):
            pairs = [group["source"], *group["targets"]]
            one_turn = all(len(pair["prompt"]) == 1 for pair in pairs)
            if one_turn and opens_with_refusal(messages_text(group["source"]["chosen"]), LANGUAGES[0]):
                texts = {pair["language"]: messages_text(pair["prompt"]) for pair in pairs}
                rows.append({"id": f"{Path(file).stem}-{number}", **texts})
    return rows


def spread(rows: list[Any], count: int) -> list[Any]:
    """So many of the rows, evenly over all of them."""
    step = max(1, len(rows) // count)
    return rows[::step][:count]


def probe_part(part: str) -> list[ContrastRow]:
    """The harmless prompts of the probe set that settings are chosen with, or the others."""
    rows = [row for row in probe_rows() if row.kind != "harmful"]
    everyday = [row for row in rows if row.kind == "harmless"]
    alike = [row for row in rows if row.kind == "looks_harmful"]
    chosen = {row.id for row in [*spread(everyday, 8), *spread(alike, 6)]}
    return [row for row in rows if (row.id in chosen) == (part == "tune")]


def prepare(options: argparse.Namespace) -> tuple[BuildRecipe, Path, Path]:
    """Writes the prompts and the recipes; returns that of the build, and where those of comparison and hidden space are."""
    out = Path(options.out)
    rows = read_multijail(Path(options.multijail))
    trained_on, measured_on = MULTIJAIL_PARTS[options.part]
    train = write_table(out / "prompts" / f"train-{options.part}.csv", rows[trained_on], LANGUAGES)
    attacked = spread(rows[measured_on], 48)
    attack = write_table(out / "prompts" / f"attack-{options.part}.csv", attacked, LANGUAGES)
    asked, own = [*LANGUAGES, *UNTRAINED], probe_part(options.part)
    harmless = {}
    texts = {}
    for kind in ("harmless", "looks_harmful"):
        found = [row for row in own if row.kind == kind]
        name = kind.replace("_", "-")
        path = out / "prompts" / f"{name}-{options.part}.csv"
        harmless[name] = {
            "prompts": [str(write_table(path, ({"id": r.id, **r.texts} for r in found), asked))]
        }
    labelled = [
        {"text": text, "kind": kind, "language": code}
        for code in LANGUAGES
        for kind, texts_of_kind in (
            ("harmful", [row[code] for row in attacked]),
            ("harmless", [row.texts[code] for row in own]),
        )
        for text in texts_of_kind
    ]
    for code in asked:
        path = out / "prompts" / f"text-{options.part}-{code}.txt"
        write_text(path, "".join(f"{row.texts[code]}\n" for row in own))
        texts[code] = str(path)
    for each in options.harmless:
        name, _, file = each.partition("=")
        taken = [*harmless, "polyrefuse"]
        if not file or name in taken:
            raise ConfigError(
                f"`--harmless {each}` should be NAME=FILE, with another name than {', '.join(taken)}."
            )
        harmless[name] = {"prompts": [file], "limit": 48}
    train_files = [str(train), "starter-harmless", "starter-everyday"]
    if options.pairs:
        rows = read_pairs(options.pairs)
        train_files.append(str(write_table(out / "prompts" / "pairs-train.csv", rows, LANGUAGES)))
    if options.polyrefuse:
        rows, codes = read_polyrefuse(Path(options.polyrefuse), "train")
        train_files.append(str(write_table(out / "prompts" / "polyrefuse-train.csv", rows, ["kind", *codes])))
        rows, codes = read_polyrefuse(Path(options.polyrefuse), "test")
        of_part, count = POLYREFUSE_PARTS[options.part]
        path = out / "prompts" / f"polyrefuse-{options.part}.csv"
        harmless["polyrefuse"] = {"prompts": [str(write_table(path, spread(rows[of_part], count), codes))]}
    texts_of_space = out / "prompts" / f"hidden_space-{options.part}.jsonl"
    write_text(texts_of_space, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in labelled))
    model = {"model": options.model, "dtype": options.dtype, "batch_size": options.batch_size}
    runs = [
        *({"name": name, **WAYS[name]} for name in WAYS if name == WAY or name in options.ways),
        *([{"name": "mpo", "dataset": options.paper, **PAPER}] if options.paper else []),
    ]
    written = {
        f"suite-{options.part}": {
            "models": {"base": model},
            "attack": {"multijail": {"prompts": [str(attack)]}},
            "over_refusal": harmless,
            "generation": {"max_new_tokens": options.max_new_tokens},
            "judge": {"name": "refusal-phrases"},
            "perplexity": {"texts": texts},
            **(
                {"reward_gap": {"data": [options.gap], "max_response_length": 64, "bad_rows": "drop"}}
                if options.gap
                else {}
            ),
        },
        f"compare-{options.part}": {
            "base": str(RECIPE),
            "suite": str(out / f"suite-{options.part}.yaml"),
            "shared": {
                "model_name_or_path": options.model,
                "dataset": str(out / f"data-{options.part}" / "groups.jsonl"),
                "dtype": options.dtype,
                "bf16": options.dtype == "bfloat16",
                **({"use_cpu": True} if options.cpu else {}),
            },
            "runs": runs,
            "seeds": options.seeds,
            "out": str(out / f"compare-{options.part}"),
            "title": "Attack success and its price",
        },
        f"hidden_space-{options.part}": {
            "models": [
                {
                    "name": name,
                    "reference": options.model,
                    "adapter": str(out / f"compare-{options.part}" / RUNS / name),
                }
                for name in (f"{run['name']}-s{seed}" for run in runs for seed in options.seeds)
            ],
            "data": {
                "dataset": str(texts_of_space),
                "label": "kind",
                "harmful_values": ["harmful"],
                "harmless_values": ["harmless"],
                "language_column": "language",
                "parallel": True,
            },
            "languages": list(LANGUAGES),
            "source_language": LANGUAGES[0],
            "layers": "all",
            "pooling": "last",
            "template": "chat",
            "dtype": options.dtype,
            "out": str(out / f"hidden_space-{options.part}"),
        },
    }
    for name, recipe in written.items():
        write_text(out / f"{name}.yaml", yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))
    missing = ["--prompts.missing", "skip"] if options.polyrefuse or options.pairs else []
    data = ["--prompts.data", *train_files, *missing, "--out", str(out / f"data-{options.part}")]
    choice = [word for name, value in model.items() for word in (f"--model.{name}", str(value))]
    build = load_build(BUILD, [*data, *choice, "--leaks.against", str(attack)])
    return build, *(out / f"{kind}-{options.part}.yaml" for kind in ("compare", "hidden_space"))


def effects(title: str, base: ModelResults, seeds: list[ModelResults]) -> TextTable:
    """What training did, before and after in per cent, by language and set of prompts; after is the mean over seeds.

    A row has attack success, refusals of each set of harmless prompts and of all of them, answers to them in the language asked, and
    how much more perplexing they are. The last row is the mean over the languages trained, with 95 % intervals over prompts of the
    change; notes have each seed's, and the dominant language's reward gap where it was measured.
    """
    sets = sorted(base.safety, key=lambda key: (key[0] != "attack", key))
    columns = []
    for key in sets:
        of_each = [model.safety[key].outcomes() for model in (base, *seeds)]
        columns.append((key[1], of_each[0], mean_over_seeds(of_each[1:]), of_each[1:]))
    refused = [outcomes(model, REFUSAL) for model in (base, *seeds)]
    columns.append(("all harmless", refused[0], mean_over_seeds(refused[1:]), refused[1:]))
    asked = [
        {
            code: {key: value for key, value in values.items() if key[0] != "attack"}
            for code, values in outcomes(model, LANGUAGE).items()
        }
        for model in (base, *seeds)
    ]
    columns.append(("in the language asked", asked[0], mean_over_seeds(asked[1:]), asked[1:]))
    texts = [model.perplexity.languages for model in (base, *seeds) if model.perplexity is not None]
    rows = []
    for code in (*LANGUAGES, *UNTRAINED):
        cells = [
            f"{100 * statistics.fmean(before[code].values()):.1f} -> {100 * statistics.fmean(after[code].values()):.1f}"
            if before.get(code) and after.get(code)
            else ""
            for _, before, after, _ in columns
        ]
        first, *later = (of_model[code].perplexity for of_model in texts)
        rows.append((code, *cells, f"{100 * (statistics.geometric_mean(later) / first - 1):+.1f} %"))
    last, notes = [], []
    for name, before, after, each in columns:
        own = [
            {code: values[code] for code in LANGUAGES if values.get(code)}
            for values in (before, after, *each)
        ]
        change = average_change(own[0], own[1])
        ends = [f"{100 * end:+.1f}" for end in (change.change.low, change.change.high) if end is not None]
        within = f" [{', '.join(ends)}]" if ends else ""
        last.append(
            f"{100 * change.before:.1f} -> {100 * change.after:.1f} ({100 * change.change.mean:+.1f}{within})"
        )
        of_seeds = [100 * statistics.fmean(mean_by_language(values).values()) for values in own[2:]]
        notes.append(f"{name}, each seed: {', '.join(f'{value:.1f}' for value in of_seeds)}")
    rows.append(("those trained", *last, ""))
    gaps = [
        model.reward_gap.source.gap
        for model in (base, *seeds)
        if model.reward_gap and model.reward_gap.source
    ]
    if gaps:
        shown = ", ".join(f"{gap:+.3f}" for gap in gaps[1:])
        notes.append(f"reward gap in {LANGUAGES[0]}, before and each seed: {gaps[0]:+.3f}; {shown}")
    header = ("", *(name for name, *_ in columns), "perplexity")
    return TextTable(title, header, tuple(rows), rules=frozenset({len(rows) - 1}), notes=tuple(notes))


def show_effects(out: Path, part: str, runs: Iterable[str], seeds: Iterable[int]) -> None:
    """Prints the tables and writes them as a page."""
    folder = out / f"compare-{part}"
    page = ["# Before and after, %"]
    for run in runs:
        models = [measured(folder, f"{run}-s{seed}") for seed in seeds]
        table = effects(f"{run}: before -> after, %", measured(folder, BASE), models)
        table.show()
        page += [f"## {run}", table.markdown(), *(f"- {note}" for note in table.notes)]
    write_text(out / f"effects-{part}.md", "\n\n".join(page) + "\n")


def main() -> None:
    """Builds, trains, measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a chat model, by name or folder")
    parser.add_argument("--multijail", required=True, help="MultiJail.csv as published")
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=[],
        metavar="FILE",
        help="preference pairs, to train on their prompts that are refused",
    )
    parser.add_argument(
        "--paper", help="the published MPO pairs, to train the published objective on them beside it"
    )
    parser.add_argument(
        "--gap", metavar="FILE", help="preference pairs that are not trained on, to measure the reward gap of"
    )
    parser.add_argument(
        "--harmless", nargs="+", default=[], metavar="NAME=FILE", help="more harmless prompts to measure"
    )
    parser.add_argument(
        "--polyrefuse",
        metavar="FOLDER",
        help="PolyRefuse's files, to train on its harmless prompts and measure others",
    )
    parser.add_argument("--part", choices=["tune", "test"], default="test")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[], help="other ways beside the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of an answer that is measured")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="float32 for a processor without bf16",
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    parser.add_argument("--out", default="runs/side_effects")
    parser.add_argument("--dry_run", action="store_true", help="check everything and stop")
    options = parser.parse_args()
    build, comparison, space = prepare(options)
    groups = Path(options.out) / f"data-{options.part}" / "groups.jsonl"
    if not options.dry_run or not groups.is_file():
        build_data(build, dry_run=options.dry_run)
    if groups.is_file():
        compare(load_comparison(comparison), dry_run=options.dry_run)
    if not options.dry_run:
        runs = [run["name"] for run in yaml.safe_load(comparison.read_text(encoding="utf-8"))["runs"]]
        show_effects(Path(options.out), options.part, runs, options.seeds)
        run_analysis(load_analysis_recipe(space))


if __name__ == "__main__":
    command.run(main)
