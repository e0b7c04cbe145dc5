"""Can the model tell harm from harmlessness in each language, and does what was trained use it?

    python -m benchmarks.separation --model MODEL --groups groups.jsonl --harmful attack.csv --harmless harmless.csv \\
        --adapters runs/one runs/two

Rates of refusals say where a model stands: how far it was trained, too. How well it tells one kind from the other does not depend
on that, and is measured here, in each language and on prompts that no training saw:

- *by a linear probe* of the starting model's states at the last token before the answer, trained on the prompts of ``--groups``, those
  of all languages together: what can be had at best by a hyperplane in that layer.
- *by the model itself*, before training and with each adapter: by the log-likelihood of the refusal that the groups teach. An answer
  is not generated; a model that refuses in other words is judged by these.

Under each table it says which of the measured prompts stand among the groups', as `mpo data leak` finds them.

Each is given as AUROC, and as the share of harmful prompts that are missed where a tenth (``--refused``) of the harmless ones are refused.
``--layers`` chooses layers of the probe, on other prompts than those that the page is to speak of.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks import command
from mpo.common.tables import TextTable
from mpo.data.contract import HARMLESS, messages_text
from mpo.data.leaks import find_leaks
from mpo.data.loading import load_groups
from mpo.errors import DataError
from mpo.evaluation.evaluation_texts import evaluation_texts
from mpo.evaluation.prompts import load_prompts
from mpo.hidden_space.embed import Embedder
from mpo.hidden_space.probe import auroc, train_probe
from mpo.hidden_space.settings import EmbeddingSettings
from mpo.hidden_space.texts import TextSet
from mpo.jobs.leak import group_texts
from mpo.modeling.loading import ModelSource
from mpo.modeling.opening import open_model
from mpo.scoring import score_groups

Array = np.ndarray[Any, Any]


class Prompts:
    """Prompts in their languages, ``[n]`` each.

    Attributes:
        texts, language: Of each.
        harmful: Booleans.
    """

    def __init__(self, rows: Sequence[tuple[str, str, bool]]) -> None:
        # As `TextSet` has them: language by language, harmful before harmless.
        languages = list(dict.fromkeys(row[0] for row in rows))
        ordered = sorted(rows, key=lambda row: (languages.index(row[0]), not row[2]))
        self.texts = [row[1] for row in ordered]
        self.language = np.array([row[0] for row in ordered])
        self.harmful = np.array([row[2] for row in ordered], dtype=bool)


def of_groups(groups: Dataset) -> Prompts:
    """The last turn of each prompt of some groups."""
    rows = [
        (pair["language"], messages_text(pair["prompt"][-1:]), group.get("kind") != HARMLESS)
        for group in groups
        for pair in (group["source"], *group["targets"])
    ]
    return Prompts(rows)


def of_files(files: Mapping[bool, Sequence[str]], languages: Sequence[str]) -> Prompts:
    """Prompts of files, in these languages.

    Raises:
        DataError: A file cannot be read, or a language has no prompts of a kind.
    """
    loaded = [(harmful, load_prompts(path).prompts) for harmful, paths in files.items() for path in paths]
    found = Prompts(
        [
            (code, prompt.text, harmful)
            for code in languages
            for harmful, prompts in loaded
            for prompt in prompts
            if prompt.language == code
        ]
    )
    for code in languages:
        if len(set(found.harmful[found.language == code])) < 2:
            raise DataError(
                f"there are no harmful, or no harmless, prompts in {code}; expected a column `{code}` in files of either kind.",
                file=", ".join(path for paths in files.values() for path in paths),
            )
    return found


def missed(scores: Array, harmful: Array, refused: float) -> float:
    """Share of harmful prompts that score no higher than the threshold above which so many of the harmless ones lie."""
    return float(np.mean(scores[harmful] <= np.quantile(scores[~harmful], 1 - refused)))


def by_probe(options: argparse.Namespace, trained: Prompts, measured: Prompts) -> dict[str, Array]:
    """``[n]`` scores of the measured prompts, by a probe of each layer that is trained on the others."""
    settings = EmbeddingSettings(layers=tuple(options.layers), dtype=options.dtype)
    embedder = Embedder(ModelSource(options.model), settings)
    clouds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, prompts in (("trained", trained), ("measured", measured)):
            texts = TextSet(
                tuple(prompts.texts),
                tuple(prompts.language.tolist()),
                prompts.harmful,
                np.arange(len(prompts.texts)),
                name,
            )
            store = embedder.embed(texts, Path(folder) / name)
            clouds[name] = {layer: np.array(store.array("last", layer)) for layer in embedder.layers}
    embedder.release()
    scores = {}
    for layer in embedder.layers:
        # Two folds, of which the first is not trained on. The second is held out for nothing.
        points = np.concatenate([clouds["measured"][layer], clouds["trained"][layer]])
        fold = np.repeat([0, 1], [len(measured.texts), len(trained.texts)])
        probe = train_probe(points, np.concatenate([measured.harmful, trained.harmful]), fold)
        scores[layer] = clouds["measured"][layer] @ probe.weight[0]
    return scores


def by_model(
    options: argparse.Namespace, adapter: str | None, pairs: Mapping[str, Any], measured: Prompts
) -> Array:
    """``[n]`` mean log-likelihood per token of the taught refusal after each measured prompt, nats."""
    opened = open_model(ModelSource(options.model), adapter=adapter, dtype=options.dtype, needs_template=True)
    asked = [
        {**pairs[code], "prompt": [{"role": "user", "content": text}]}
        for code, text in zip(measured.language.tolist(), measured.texts, strict=True)
    ]
    # A group is one call of the model; the languages of its pairs mean nothing here.
    parts = np.array_split(np.arange(len(asked)), max(1, len(asked) // 16))
    groups = [{"source": asked[part[0]], "targets": [asked[row] for row in part[1:]]} for part in parts]
    scores = score_groups(opened.load(), Dataset.from_list(groups), opened.tokenizer, progress=False)
    return np.array([pair.chosen for pair in scores.records])


def in_training(groups: Dataset, files: Sequence[str]) -> list[str]:
    """A sentence for each file: how many of its prompts stand among the groups'."""
    return find_leaks(
        group_texts(groups), [text for path in files for text in evaluation_texts(path)]
    ).summary()


def table(
    title: str, scores: Mapping[str, Array], measured: Prompts, refused: float, seen: Sequence[str] = ()
) -> TextTable:
    """AUROC and share missed, a row for each score and a column for each language."""
    codes = list(dict.fromkeys(measured.language.tolist()))
    rows = []
    for name, values in scores.items():
        cells, areas, shares = [], [], []
        for code in codes:
            own = measured.language == code
            areas.append(float(auroc(values[own], measured.harmful[own])[0]))
            shares.append(missed(values[own], measured.harmful[own], refused))
            cells.append(f"{areas[-1]:.2f}, {100 * shares[-1]:.0f} %")
        rows.append((name, *cells, f"{np.mean(areas):.3f}, {100 * np.mean(shares):.0f} %"))
    counts = ", ".join(
        f"{code} {np.sum(measured.harmful[measured.language == code])} and {np.sum(~measured.harmful[measured.language == code])}"
        for code in codes
    )
    notes = (
        f"AUROC, and harmful prompts missed where {100 * refused:g} % of the harmless ones are refused.",
        f"Harmful and harmless prompts: {counts}.",
        *seen,
    )
    return TextTable(title, ("", *codes, "mean"), tuple(rows), notes=notes)


def main() -> None:
    """Measures the starting model and the adapters."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the starting model, by name or folder")
    parser.add_argument("--groups", required=True, help="what is trained on, as `mpo data build` writes it")
    parser.add_argument("--harmful", nargs="+", required=True, metavar="FILE.csv", help="measured prompts")
    parser.add_argument("--harmless", nargs="+", required=True, metavar="FILE.csv", help="measured prompts")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="FOLDER", help="what training has made")
    parser.add_argument(
        "--layers", nargs="+", default=["all"], help="of the probe, as in a hidden-space recipe"
    )
    parser.add_argument(
        "--refused", type=float, default=0.1, help="share of harmless prompts that may be refused"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=None)
    parser.add_argument("--out", default="runs/benchmarks/separation.json")
    options = parser.parse_args()
    groups = load_groups(options.groups).groups
    trained = of_groups(groups)
    if len(set(trained.harmful)) < 2:
        raise DataError(
            f"has {'harmful' if trained.harmful.any() else 'harmless'} groups alone. A probe is trained on both; expected groups as "
            "recipes/data/refuse_or_answer.yaml builds them.",
            file=options.groups,
        )
    pairs: dict[str, Any] = {}
    for group in groups:
        if group.get("kind") != HARMLESS:
            for pair in (group["source"], *group["targets"]):
                pairs.setdefault(pair["language"], pair)
    seen = in_training(groups, [*options.harmful, *options.harmless])
    measured = of_files({True: options.harmful, False: options.harmless}, list(pairs))
    names = [Path(path).name for path in options.adapters]
    if len({"start", *names}) <= len(names):  # runs of one name in several folders
        names = options.adapters
    adapters = {"start": None, **dict(zip(names, options.adapters, strict=True))}
    tables = [
        (
            "By a linear probe of the starting model's states, trained on the groups' prompts",
            by_probe(options, trained, measured),
        ),
        (
            "By the log-likelihood of the taught refusal",
            {name: by_model(options, adapter, pairs, measured) for name, adapter in adapters.items()},
        ),
    ]
    result = {}
    for title, scores in tables:
        shown = table(title, scores, measured, options.refused, seen)
        shown.show()
        print()
        result[title] = {"header": shown.header, "rows": shown.rows, "notes": shown.notes}
    command.save(options.out, result, base_model=options.model)


if __name__ == "__main__":
    command.run(main)
