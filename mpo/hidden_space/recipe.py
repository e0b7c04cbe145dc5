"""The recipe of an analysis: models, texts, and how to embed and measure, in one YAML file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo.common.typed_yaml import Document
from mpo.data.languages import normalize_language_setting
from mpo.errors import ConfigError
from mpo.hidden_space.compare import Settings
from mpo.hidden_space.settings import EmbeddingSettings, ReadingSettings
from mpo.hidden_space.texts import TextSource

_PATHS = frozenset({"reference", "aligned", "adapter", "folder", "chat_template"})


@dataclass(frozen=True)
class ModelEntry:
    """A model before and after alignment.

    Attributes:
        name: What it is called in files and tables.
        reference: Folder or Hub name of the model before; leave it out to measure a model alone.
        aligned: The model after.
        adapter: Instead of `aligned`: an adapter of the reference.
        reference_revision, aligned_revision: Revisions on the Hub.
    """

    name: str
    reference: str | None = None
    aligned: str | None = None
    adapter: str | None = None
    reference_revision: str | None = None
    aligned_revision: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.\-]+", self.name) or self.name.startswith("."):
            raise ConfigError(
                f"The model name {self.name!r} is to be part of file names; expected letters, digits, dots, hyphens."
            )
        if (self.aligned is None) == (self.adapter is None):
            given = "neither is" if self.aligned is None else "both are"
            raise ConfigError(
                f"Model {self.name}: expected one of `aligned` and `adapter`, a trained model or an adapter; {given} given."
            )
        if self.adapter is not None and self.reference is None:
            raise ConfigError(f"Model {self.name}: an `adapter` needs its base model as `reference`.")


@dataclass(frozen=True, kw_only=True)
class AnalysisRecipe(ReadingSettings, Settings):
    """An analysis: what is compared on what, besides how it is read and measured.

    Attributes:
        models: What to compare.
        data: The harmful and harmless texts.
        languages: Their codes, in the order of tables and pictures.
        out: Folder of the results; a subfolder ``hidden_space`` is made in it.
        pooling: ``last`` or ``mean``.
        shown_layer: Layer of tables and pictures; by default the last of `layers`.
        embeddings: Folder for the embeddings, which are kept; by default beside the results.
        source_path: The file this came from.
    """

    models: tuple[ModelEntry, ...]
    data: TextSource
    languages: tuple[str, ...]
    out: str
    pooling: str = "last"
    shown_layer: str | None = None
    embeddings: str | None = None
    source_path: Path = Path("recipe.yaml")

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.models]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"`models` has the names {names}; expected at least one, and each once.")
        Settings.__post_init__(self)
        self.embedding  # noqa: B018 - its values are checked when it is made
        code = normalize_language_setting(self.source_language, "source_language")
        object.__setattr__(self, "source_language", code)

    @property
    def embedding(self) -> EmbeddingSettings:
        """How to embed."""
        reading = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReadingSettings)}
        return EmbeddingSettings(poolings=(self.pooling,), **reading)


def load_analysis_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnalysisRecipe:
    """Read a recipe and apply the ``--key value`` words of the command line.

    Args:
        path: YAML file.
        overrides: Such as ``["--resamples", "200", "--data.folder", "polyrefuse", "--models.0.adapter", "runs/a"]``.

    Raises:
        ConfigError: The file is no recipe, a key is unknown or missing, or a value has the wrong type.
    """
    document = Document(path, overrides, noun="an analysis", paths=_PATHS)
    return document.build(AnalysisRecipe, source_path=document.path)
