"""The recipe of an analysis: models, texts, and how to embed and measure, in one YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from mpo.data.languages import normalize_language_setting
from mpo.errors import ConfigError
from mpo.hidden_space.compare import Settings
from mpo.hidden_space.embed import EmbeddingSettings, ReadingSettings
from mpo.hidden_space.texts import TextSource


@dataclass(frozen=True)
class ModelEntry:
    """
    A model before and after alignment.

    Attributes:
        name: what it is called in files and tables.
        reference: folder or Hub name of the model before; leave it out to measure a model alone.
        aligned: the model after.
        adapter: instead of `aligned`: an adapter of the reference.
        reference_revision, aligned_revision: revisions on the Hub.
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
            raise ConfigError(f"Model {self.name}: expected one of `aligned` and `adapter`.")
        if self.adapter is not None and self.reference is None:
            raise ConfigError(f"Model {self.name}: an `adapter` needs its base model as `reference`.")


@dataclass(frozen=True, kw_only=True)
class AnalysisRecipe(ReadingSettings, Settings):
    """
    An analysis: what is compared on what, besides how it is read and measured.

    Attributes:
        models: what to compare.
        data: the harmful and harmless texts.
        languages: their codes, in the order of tables and pictures.
        out: folder of the results; a subfolder ``hidden_space`` is made in it.
        pooling: ``last`` or ``mean``.
        shown_layer: layer of tables and pictures; by default the last of `layers`.
        embeddings: folder for the embeddings, which are kept; by default beside the results.
        source_path: the file this came from.
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
    """
    Read a recipe and apply the ``--key value`` words of the command line.

    Args:
        path: YAML file.
        overrides: such as ``["--resamples", "200", "--data.folder", "polyrefuse", "--models.0.adapter", "runs/a"]``.

    Raises:
        ConfigError: the file is no recipe, a key is unknown or missing, or a value has the wrong type.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}.") from None
    try:
        values = yaml.load(text, Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no recipe; expected keys such as models, data, languages and out.")
    for key, given in _parse_overrides(overrides):
        _set(values, key, given)
    values["source_path"] = str(path)
    recipe: AnalysisRecipe = _typed(AnalysisRecipe, values, path.name)
    return recipe


class _TextLoader(yaml.BaseLoader):
    """Reads all values as text, which the type of each key then interprets, and refuses a key that is set twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is set twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, str | list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if re.match(r"--[a-z]", word):
            key, equals, value = word[2:].partition("=")
            found.append((key, [value] if equals else []))
        elif not found:
            raise ConfigError(f"{word!r} is no setting; expected --key value.")
        else:
            found[-1][1].append(word)
    for key, given in found:
        if not given:
            raise ConfigError(f"--{key} has no value.")
    return [(key, given[0] if len(given) == 1 else given) for key, given in found]


def _set(values: Any, key: str, given: str | list[str]) -> None:
    """Set a key, or with dots an entry: ``models.0.adapter``."""
    *path, last = key.split(".")
    place = values
    for part in path:
        try:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        except (IndexError, ValueError, AttributeError):
            raise ConfigError(f"--{key}: there is no entry {part!r}.") from None
    if not isinstance(place, dict):
        raise ConfigError(f"--{key}: the recipe has no keys there.")
    place[last] = given


def _typed(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from a mapping of texts."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected keys with values, found {values!r}.")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known: {', '.join(fields)}."
            raise ConfigError(f"{where}: unknown key `{key}`.{hint}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}: the key `{name}` is missing.")
    return kind(**{key: _value(hints[key], value, f"{where}, `{key}`") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value in ("", "null", "~", None):
            return None
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if dataclasses.is_dataclass(hint):
        return _typed(hint, value, where)
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected keys with values, found {value!r}.")
        return {key: yaml.safe_load(item) if isinstance(item, str) else item for key, item in value.items()}
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_value(get_args(hint)[0], item, where) for item in items)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected one value, found {value!r}.")
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{where}: expected true or false, found {value!r}.")
        return value.lower() == "true"
    try:
        return hint(value)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}.get(hint, "a value")
        raise ConfigError(f"{where}: expected {noun}, found {value!r}.") from None
