"""Running a recipe: embed with every model, measure every layer, write numbers, pictures and a table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpo.common.files import write_text
from mpo.common.provenance import collect, portable_path
from mpo.common.typed_json import write_typed
from mpo.common.words import duration
from mpo.errors import ConfigError, DependencyError
from mpo.hidden_space.compare import AFTER, BEFORE, check_texts, measure_layer
from mpo.hidden_space.embed import Embedder
from mpo.hidden_space.language_silhouette import silhouette_picture, silhouette_table, silhouettes
from mpo.hidden_space.recipe import AnalysisRecipe, ModelEntry
from mpo.hidden_space.resampling import Array
from mpo.hidden_space.results import FILE, MEASUREMENT, HiddenSpace, ModelResult
from mpo.hidden_space.store import EmbeddingStore
from mpo.hidden_space.texts import TextSet, load_texts
from mpo.modeling.loading import ModelSource


def require_packages() -> None:
    """Refuse to start where the libraries of the analysis are missing.

    Raises:
        DependencyError: They are; the message says how to install them.
    """
    if find_spec("sklearn") is None:
        raise DependencyError(
            "The analysis needs scikit-learn, which is not installed. Install what it needs with: pip install "
            "'mpo-align[analysis]'"
        )


def run_analysis(recipe: AnalysisRecipe) -> Path:
    """Run a recipe. All ranks embed; the first one measures and writes.

    Returns:
        The folder with ``hidden_space.json``, the table and the pictures.

    Raises:
        MPOError: A model, the texts or a folder cannot be used.
    """
    require_packages()
    texts = load_texts(recipe.data, recipe.languages, beside=recipe.source_path.parent)
    check_texts(texts.by_language(), recipe)
    for entry in recipe.models:
        _check_layers(entry, recipe)
    folder = Path(recipe.out) / MEASUREMENT
    result = HiddenSpace(
        recipe.data.name,
        recipe.source_language,
        recipe.confidence,
        _settings(recipe),
        provenance=_provenance(texts),
    )
    # Everything is embedded before anything is measured: no rank waits for the one that measures, at the next model, for
    # longer than a process group has patience.
    embedded = [_embed(entry, recipe, texts) for entry in recipe.models]
    for entry, (stores, is_main) in zip(recipe.models, embedded, strict=True):
        if not is_main:
            break
        result.models[entry.name] = _measure(entry, recipe, stores, texts)
        model = result.models[entry.name]
        tables = [model.text_table(recipe.confidence)]
        if model.silhouettes:
            tables.append(silhouette_table(model.name, model.silhouettes))
        for table in tables:
            print()
            table.show()
        written = [
            write_typed(folder / FILE, result),
            write_text(folder / f"{entry.name}.txt", "\n\n".join(t.plain() for t in tables) + "\n"),
            *_draw(result, entry.name, stores, texts, recipe, folder),
        ]
        print(f"\nWritten: {', '.join(str(path) for path in written)}", flush=True)
    return folder


def _embedders(entry: ModelEntry, recipe: AnalysisRecipe) -> dict[str, Embedder]:
    """What embeds before and after. They are one where an adapter makes the difference; no weights are loaded yet."""

    def embedder(name: str, revision: str | None, adapter: str | None = None) -> Embedder:
        source = ModelSource(name, revision, recipe.trust_remote_code)
        return Embedder(source, recipe.embedding, adapter=adapter)

    found: dict[str, Embedder] = {}
    if entry.reference is not None:
        found[BEFORE] = embedder(entry.reference, entry.reference_revision, entry.adapter)
    if entry.aligned is not None:
        found[AFTER] = embedder(entry.aligned, entry.aligned_revision)
    else:
        found[AFTER] = found[BEFORE]
    return found


def _check_layers(entry: ModelEntry, recipe: AnalysisRecipe) -> None:
    """Refuse a model that is not there and layers that cannot be compared or shown, before hours of embedding."""
    layers = {state: embedder.layers for state, embedder in _embedders(entry, recipe).items()}
    after = layers[AFTER]
    before = layers.get(BEFORE, after)
    if before != after:
        raise ConfigError(
            f"Model {entry.name}: the reference has the layers {', '.join(before)}, the aligned model {', '.join(after)}. "
            "Only models of the same depth can be compared layer by layer; set `layers: [norm]`."
        )
    if recipe.shown_layer is not None and recipe.shown_layer not in after:
        raise ConfigError(
            f"`shown_layer` is {recipe.shown_layer}; expected one of the embedded layers {', '.join(after)}."
        )


def _embed(
    entry: ModelEntry, recipe: AnalysisRecipe, texts: TextSet
) -> tuple[dict[str, EmbeddingStore], bool]:
    """The stores before and after, and whether this is the rank that measures."""
    place = Path(recipe.embeddings) if recipe.embeddings else Path(recipe.out) / MEASUREMENT / "embeddings"
    stores: dict[str, EmbeddingStore] = {}
    embedders = _embedders(entry, recipe)
    for state, embedder in embedders.items():
        with_adapter = state == AFTER and entry.adapter is not None
        name = f"the adapter {entry.adapter}" if with_adapter else embedder.source.name
        if embedder.ranks.is_main_process:
            print(f"Embedding {len(texts.texts)} texts with {name}", flush=True)
        stores[state] = embedder.embed(texts, place / f"{entry.name}.{state}", with_adapter=with_adapter)
        if embedder is not embedders[AFTER] or state == AFTER:
            embedder.release()
    return stores, embedders[AFTER].ranks.is_main_process


def _measure(
    entry: ModelEntry, recipe: AnalysisRecipe, stores: Mapping[str, EmbeddingStore], texts: TextSet
) -> ModelResult:
    layers = stores[AFTER].layers
    result = ModelResult(
        entry.name,
        _shown_name(entry.reference),
        _shown_name(entry.aligned),
        _shown_name(entry.adapter),
        recipe.shown_layer or layers[-1],
    )
    started = time.monotonic()
    for number, layer in enumerate(layers, start=1):
        result.layers[layer] = measure_layer(
            texts.by_language(),
            lambda state, language, layer=layer: _cloud(
                stores[state], recipe.pooling, layer, texts, language
            ),  # type: ignore[misc]
            recipe,
            states=tuple(stores),
        )
        by_language = texts.by_language()
        if len(by_language) > 1:
            result.silhouettes[layer] = {
                state: silhouettes(
                    {code: _cloud(store, recipe.pooling, layer, texts, code) for code in by_language},
                    {code: rows.harmful for code, rows in by_language.items()},
                )
                for state, store in stores.items()
            }
        passed = time.monotonic() - started
        left = passed / number * (len(layers) - number)
        more = f", {duration(left)} left" if number < len(layers) else ""
        print(f"Measured layer {layer} ({number} of {len(layers)}){more}", flush=True)
    return result


def _cloud(store: EmbeddingStore, pooling: str, layer: str, texts: TextSet, language: str) -> Array:
    return store.array(pooling, layer)[texts.rows(language)]


def _shown_name(name: str | None) -> str | None:
    return portable_path(name) if name is not None and Path(name).expanduser().exists() else name


def _draw(
    result: HiddenSpace,
    name: str,
    stores: Mapping[str, EmbeddingStore],
    texts: TextSet,
    recipe: AnalysisRecipe,
    folder: Path,
) -> list[Path]:
    from mpo.hidden_space.pictures import draw_all

    shown = result.models[name].shown_layer

    def load(state: str, language: str) -> Array:
        return _cloud(stores[state], recipe.pooling, shown, texts, language)

    try:
        written = draw_all(result, name, texts.by_language(), load, folder)
        if scores := result.models[name].silhouettes:
            written.append(silhouette_picture(name, scores, folder / f"{name}.silhouettes.png"))
        return written
    except DependencyError as error:
        print(f"No pictures: {error}")
        return []


def _settings(recipe: AnalysisRecipe) -> dict[str, Any]:
    """What the numbers depend on, besides models and texts."""
    left_out = {"models", "data", "out", "embeddings", "source_path", "device", "tokens_per_batch"}
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(recipe)
        if field.name not in left_out and (value := getattr(recipe, field.name)) is not None
    }


def _provenance(texts: TextSet) -> dict[str, Any]:
    return collect(data_fingerprint=texts.fingerprint, texts=len(texts.texts), rows_left_out=texts.left_out)
