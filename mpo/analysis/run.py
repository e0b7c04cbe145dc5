"""Running a recipe: embed with every model, measure every layer, write numbers, pictures and a table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpo.analysis.compare import AFTER, BEFORE, check_texts, measure_layer
from mpo.analysis.embed import Embedder, EmbeddingSettings
from mpo.analysis.recipe import AnalysisRecipe, ModelEntry
from mpo.analysis.resampling import Array
from mpo.analysis.results import FILE, MEASUREMENT, HiddenSpace, ModelResult
from mpo.analysis.store import EmbeddingStore
from mpo.analysis.texts import TextSet, load_texts
from mpo.errors import ConfigError, DependencyError
from mpo.model import ModelSource
from mpo.progress import duration
from mpo.report.files import write_json, write_text
from mpo.report.provenance import collect, portable_path


def require_packages() -> None:
    """Refuse to start where the libraries of the analysis are missing.

    Raises:
        DependencyError: they are; the message says how to install them.
    """
    missing = [name for name in ("sklearn", "scipy") if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"The analysis needs {' and '.join(missing)}, not installed here. Install what it needs with: pip install "
            "'mpo-align[analysis]'"
        )


def run_analysis(recipe: AnalysisRecipe) -> Path:
    """
    Run a recipe. All ranks embed; the first one measures and writes.

    Returns:
        The folder with ``hidden_space.json``, the table and the pictures.

    Raises:
        MPOError: a model, the texts or a folder cannot be used.
    """
    require_packages()
    texts = load_texts(recipe.data, recipe.languages, beside=recipe.source_path.parent)
    check_texts(texts.by_language(), recipe.measuring)
    settings = _embedding_settings(recipe)
    folder = Path(recipe.out) / MEASUREMENT
    result = HiddenSpace(
        recipe.data.name,
        recipe.source_language,
        recipe.confidence,
        _settings(recipe),
        provenance=_provenance(texts),
    )
    for entry in recipe.models:
        stores, is_main = _embed(entry, recipe, settings, texts)
        if not is_main:
            continue
        result.models[entry.name] = _measure(entry, recipe, stores, texts)
        table = result.models[entry.name].text_table(recipe.confidence)
        print()
        table.show()
        written = [
            write_json(folder / FILE, result.to_dict()),
            write_text(folder / f"{entry.name}.txt", table.plain() + "\n"),
            *_draw(result, entry.name, stores, texts, recipe, folder),
        ]
        print(f"\nWritten: {', '.join(str(path) for path in written)}", flush=True)
    return folder


def _embedding_settings(recipe: AnalysisRecipe) -> EmbeddingSettings:
    shared = {f.name for f in dataclasses.fields(EmbeddingSettings)} & {
        f.name for f in dataclasses.fields(recipe)
    }
    return EmbeddingSettings(
        poolings=(recipe.pooling,), **{name: getattr(recipe, name) for name in sorted(shared)}
    )


def _embed(
    entry: ModelEntry, recipe: AnalysisRecipe, settings: EmbeddingSettings, texts: TextSet
) -> tuple[dict[str, EmbeddingStore], bool]:
    """The stores before and after, and whether this is the rank that measures."""
    place = Path(recipe.embeddings) if recipe.embeddings else Path(recipe.out) / MEASUREMENT / "embeddings"
    stores: dict[str, EmbeddingStore] = {}

    def source(name: str, revision: str | None) -> ModelSource:
        return ModelSource(name, revision, recipe.trust_remote_code)

    is_main = True
    if entry.reference is not None:
        embedder = Embedder(
            source(entry.reference, entry.reference_revision), settings, adapter=entry.adapter
        )
        _say(embedder, f"Embedding {len(texts.texts)} texts with {entry.reference}")
        stores[BEFORE] = embedder.embed(texts, place / f"{entry.name}.{BEFORE}")
        if entry.adapter is not None:
            _say(embedder, f"Embedding them with the adapter {entry.adapter}")
            stores[AFTER] = embedder.embed(texts, place / f"{entry.name}.{AFTER}", with_adapter=True)
        is_main = embedder.ranks.is_main_process
        embedder.release()
    if entry.aligned is not None:
        embedder = Embedder(source(entry.aligned, entry.aligned_revision), settings)
        _say(embedder, f"Embedding {len(texts.texts)} texts with {entry.aligned}")
        stores[AFTER] = embedder.embed(texts, place / f"{entry.name}.{AFTER}")
        is_main = embedder.ranks.is_main_process
        embedder.release()
    if len(stores) == 2 and stores[BEFORE].layers != stores[AFTER].layers:
        raise ConfigError(
            f"Model {entry.name}: the reference has the layers {', '.join(stores[BEFORE].layers)}, the aligned model "
            f"{', '.join(stores[AFTER].layers)}. Only models of the same depth can be compared layer by layer; set "
            "`layers: [norm]`."
        )
    return stores, is_main


def _say(embedder: Embedder, text: str) -> None:
    if embedder.ranks.is_main_process:
        print(text, flush=True)


def _measure(
    entry: ModelEntry, recipe: AnalysisRecipe, stores: Mapping[str, EmbeddingStore], texts: TextSet
) -> ModelResult:
    layers = stores[AFTER].layers
    shown = layers[-1] if recipe.shown_layer is None else recipe.shown_layer
    if shown not in layers:
        raise ConfigError(
            f"`shown_layer` is {shown}; expected one of the embedded layers {', '.join(layers)}."
        )
    result = ModelResult(
        entry.name,
        _shown_name(entry.reference),
        _shown_name(entry.aligned),
        _shown_name(entry.adapter),
        shown,
    )
    started = time.monotonic()
    for number, layer in enumerate(layers, start=1):
        result.layers[layer] = measure_layer(
            texts.by_language(),
            lambda state, language, layer=layer: _cloud(
                stores[state], recipe.pooling, layer, texts, language
            ),  # type: ignore[misc]
            recipe.measuring,
            states=tuple(stores),
        )
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
    from mpo.analysis.pictures import draw_all

    shown = result.models[name].shown_layer

    def load(state: str, language: str) -> Array:
        return _cloud(stores[state], recipe.pooling, shown, texts, language)

    try:
        return draw_all(result, name, texts.by_language(), load, folder)
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
