"""``mpo analyze``: the hidden space of a model before and after alignment, and the embeddings that it is made of."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mpo.cli.options import add_loading_options, add_recipe_command, chat_template_kwargs, show_help

_CHANGES = """\
  --resamples 200             a value            --languages en de         a list
  --data.folder polyrefuse    an entry           --models.0.adapter runs/a an entry of the first model
"""
_DOCS = """\
`mpo keys --of analysis` explains the keys.

On several GPUs:  accelerate launch -m mpo.cli analyze hidden-space RECIPE [--key value ...]
"""


def register(commands: Any) -> None:
    """Adds ``analyze`` to the sub-parsers of ``mpo``."""
    analyze = commands.add_parser("analyze", help="look at a model's representation of harm")
    analyze.set_defaults(run=lambda _: show_help(analyze))
    analyses = analyze.add_subparsers(title="commands", metavar="COMMAND")

    hidden_space = add_recipe_command(
        analyses,
        "mpo analyze hidden-space",
        "recipes/hidden_space/mpo_run.yaml",
        help="how alignment moved harmful and harmless texts apart, per language",
        description="Embed harmful and harmless texts before and after alignment and measure, per language and layer, how "
        "far they lie apart.",
        changes=_CHANGES,
        docs=_DOCS,
    )
    hidden_space.set_defaults(run=_hidden_space)

    embed = analyses.add_parser(
        "embed",
        help="write the hidden states of texts to a folder",
        description="Embed texts with a model: hidden states of any layers, pooled, memory-mapped, resumable.",
        allow_abbrev=False,
    )
    _add_embed_options(embed)
    embed.set_defaults(run=_embed)


def _add_embed_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--adapter", help="folder or Hub name of an adapter to switch on")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the embeddings")
    parser.add_argument(
        "--languages", nargs="+", required=True, metavar="CODE", help="languages of the texts"
    )
    data = parser.add_argument_group("texts", "{language} in a name is replaced by each language's code")
    data.add_argument("--dataset", metavar="FILE_OR_NAME", help="labelled texts, or pairs")
    data.add_argument("--harmful_dataset", metavar="FILE_OR_NAME", help="harmful texts")
    data.add_argument("--harmless_dataset", metavar="FILE_OR_NAME", help="harmless texts")
    data.add_argument("--folder", help="folder that relative file names count from")
    data.add_argument("--split", help="split of a Hub dataset (default train)")
    data.add_argument("--text", nargs="+", metavar="COLUMN", help="column(s) with the text (default text)")
    data.add_argument("--label", metavar="COLUMN", help="column with the label of labelled texts")
    data.add_argument(
        "--harmful_values", nargs="+", metavar="VALUE", help="labels of harmful texts (default 1)"
    )
    data.add_argument(
        "--harmless_values", nargs="+", metavar="VALUE", help="labels of harmless texts (default 0)"
    )
    data.add_argument("--harmful_text", metavar="COLUMN", help="column with the harmful text of a pair")
    data.add_argument("--harmless_text", metavar="COLUMN", help="column with the harmless text of a pair")
    data.add_argument("--language_column", metavar="COLUMN", help="column with the language")
    data.add_argument("--parallel", action="store_true", help="row i is the same text in every language")
    data.add_argument("--limit", type=int, help="keep so many texts of each class and language")
    states = parser.add_argument_group("states")
    states.add_argument(
        "--layers",
        nargs="+",
        help="all, or numbers (0 is the embeddings) and norm (after the final norm, the default)",
    )
    states.add_argument("--poolings", nargs="+", help="last (default) and mean")
    states.add_argument("--template", help="chat (default) or raw")
    states.add_argument("--max_length", type=int, help="longest text in tokens (default 512)")
    states.add_argument("--tokens_per_batch", type=int, help="tokens of a model call, padding included")
    add_loading_options(states)


def _hidden_space(arguments: argparse.Namespace) -> int:
    from mpo.hidden_space.recipe import load_analysis_recipe

    recipe = load_analysis_recipe(arguments.recipe, arguments.overrides)
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.jobs.hidden_space import run_analysis

    run_analysis(recipe)
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from mpo.common.progress import quiet_libraries

    quiet_libraries()
    from mpo.hidden_space.embed import Embedder
    from mpo.hidden_space.settings import EmbeddingSettings
    from mpo.hidden_space.texts import TextSource, load_texts
    from mpo.modeling.loading import ModelSource

    arguments.chat_template_kwargs = chat_template_kwargs(arguments)
    texts = load_texts(_fields(TextSource, arguments), arguments.languages)
    embedder = Embedder(
        ModelSource(arguments.model, arguments.revision, arguments.trust_remote_code),
        _fields(EmbeddingSettings, arguments),
        adapter=arguments.adapter,
    )
    store = embedder.embed(texts, Path(arguments.out), with_adapter=arguments.adapter is not None)
    if embedder.ranks.is_main_process:
        count, hidden = store.shape
        print(
            f"{count} texts, {', '.join(store.poolings)} of layers {', '.join(store.layers)}, {hidden} dimensions: "
            f"{store.folder}"
        )
    return 0


def _fields(kind: Any, arguments: argparse.Namespace) -> Any:
    """A dataclass of the options that bear its fields' names."""
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(kind)}
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
    )
