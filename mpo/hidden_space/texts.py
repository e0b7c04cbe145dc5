"""The texts to embed: harmful and harmless ones per language, from files or from the Hub, as data sets publish them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mpo.common.characters import half_character
from mpo.data.contract import is_blank
from mpo.data.languages import normalize_language, normalize_language_setting
from mpo.data.reading import looks_like_path, read_file, read_hub
from mpo.errors import ConfigError, DataError
from mpo.hidden_space.compare import LanguageTexts
from mpo.hidden_space.resampling import Array

_PLACE = "{language}"


@dataclass(frozen=True)
class TextSource:
    """Where harmful and harmless texts come from. There are three forms:

    - **labelled**: one `dataset` with a `label` column; `harmful_values` and `harmless_values` say what a label means.
    - **two sets**: `harmful_dataset` and `harmless_dataset`.
    - **pairs**: one `dataset` whose rows have a harmful and a harmless text, in `harmful_text` and `harmless_text`.

    Attributes:
        dataset: File (JSON, JSONL, CSV, Parquet) or name on the Hub. ``{language}`` in it, in the other two and in
            `split` is replaced by each language's code.
        harmful_dataset, harmless_dataset: The same, for the two classes.
        folder: Folder that relative file names count from; by default the working folder, then the recipe's.
        split: Split of a Hub dataset.
        text: Column(s) with the text; the first that has one in a row counts.
        harmful_text, harmless_text: Columns of the two texts of a pair.
        label: Column with the label.
        harmful_values, harmless_values: Labels of the two classes, as text. Rows with another label are left out.
        language_column: Column with the language, for files that hold several.
        parallel: Row i of a class is the same text in every language. Bootstrap samples and folds then keep
            translations together.
        limit: Keep so many texts of each class and language, drawn at random once and for all: data sets are often sorted.
            Classes with the same number of texts keep the same rows, so pairs and translations stay together.
    """

    dataset: str | None = None
    harmful_dataset: str | None = None
    harmless_dataset: str | None = None
    folder: str | None = None
    split: str = "train"
    text: tuple[str, ...] = ("text",)
    harmful_text: str | None = None
    harmless_text: str | None = None
    label: str | None = None
    harmful_values: tuple[str, ...] = ("1",)
    harmless_values: tuple[str, ...] = ("0",)
    language_column: str | None = None
    parallel: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        forms = {
            "a labelled dataset (`dataset`, `label`)": (self.dataset, self.label),
            "two datasets (`harmful_dataset`, `harmless_dataset`)": (
                self.harmful_dataset,
                self.harmless_dataset,
            ),
            "pairs (`dataset`, `harmful_text`, `harmless_text`)": (
                self.dataset,
                self.harmful_text,
                self.harmless_text,
            ),
        }
        whole = [name for name, parts in forms.items() if all(parts)]
        given = {part for parts in forms.values() for part in parts if part}
        if len(whole) != 1 or given != set(forms[whole[0]]):
            settings = [f.name for f in fields(self) if f.name in _FORM_KEYS and getattr(self, f.name)]
            raise ConfigError(
                f"The data are described by {', '.join(f'`{name}`' for name in settings) or 'nothing'}; expected the settings "
                f"of exactly one of: {'; '.join(forms)}."
            )
        if not self.text:
            raise ConfigError("`text` is empty; expected the column(s) with the text.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"`limit` is {self.limit}; expected a number of texts of at least 1.")
        if set(self.harmful_values) & set(self.harmless_values):
            raise ConfigError("`harmful_values` and `harmless_values` share a label.")

    @property
    def name(self) -> str:
        """What the texts are called in tables and titles."""
        named = self.dataset or f"{self.harmful_dataset} and {self.harmless_dataset}"
        return named if self.folder is None else f"{Path(self.folder).name}/{named}"


_FORM_KEYS = {"dataset", "harmful_dataset", "harmless_dataset", "label", "harmful_text", "harmless_text"}


@dataclass(frozen=True)
class TextSet:
    """Texts in the order in which they are embedded: language by language, harmful before harmless.

    Attributes:
        texts: ``[n]``.
        language: ``[n]`` code of each.
        harmful: ``[n]`` booleans.
        unit, kin: ``[n]``, see :class:`~mpo.hidden_space.compare.LanguageTexts`.
        fingerprint: Hash of all of it.
        left_out: Rows with a label that is neither harmful nor harmless.
    """

    texts: tuple[str, ...]
    language: tuple[str, ...]
    harmful: Array
    unit: Array
    fingerprint: str
    left_out: int = 0

    @cached_property
    def kin(self) -> Array:
        """Number of the family of each text: units that hold a text with the same words, up to spaces, are one."""
        family: dict[int, int] = {}

        def head(unit: int) -> int:
            while (above := family.setdefault(unit, unit)) != unit:
                family[unit] = family[above]
                unit = above
            return unit

        first: dict[str, int] = {}
        units = self.unit.tolist()
        for text, unit in zip(self.texts, units, strict=True):
            one, other = head(first.setdefault(" ".join(text.split()), unit)), head(unit)
            family[max(one, other)] = min(one, other)
        return np.asarray([head(unit) for unit in units], dtype=np.int64)

    @property
    def languages(self) -> list[str]:
        """Codes, in order."""
        return list(dict.fromkeys(self.language))

    def rows(self, language: str) -> slice:
        """Where the texts of a language are."""
        start = self.language.index(language)
        return slice(start, start + self.language.count(language))

    def by_language(self) -> dict[str, LanguageTexts]:
        """What the measures need to know of the texts."""
        return {
            code: LanguageTexts(self.harmful[rows], self.unit[rows], self.kin[rows])
            for code in self.languages
            for rows in (self.rows(code),)
        }


def load_texts(source: TextSource, languages: Sequence[str], *, beside: Path | None = None) -> TextSet:
    """Read the texts of all languages.

    Args:
        source: Where they come from.
        languages: Codes, in the order of the tables.
        beside: Folder of the recipe, where files are looked for after the working folder.

    Raises:
        DataError: A file or column is missing, a text is blank, a language has no texts, or the data claim to be
            parallel and have different numbers of texts.
        ConfigError: No language, the same one twice, or one that is not known.
    """
    codes = [normalize_language_setting(code, "languages") for code in languages]
    if not codes or len(set(codes)) < len(codes):
        raise ConfigError(
            f"`languages` is {list(languages)}; expected each language once, such as [en, de, zh]."
        )
    _check_languages(source, codes)
    reader = _Reader(source, beside)
    texts: list[str] = []
    language: list[str] = []
    harmful: list[bool] = []
    unit: list[int] = []
    counts: dict[str, tuple[int, int]] = {}
    for number, code in enumerate(codes):
        classes = reader.classes(code)
        counts[code] = len(classes[True]), len(classes[False])
        for label in (True, False):
            found = classes[label]
            if not found:
                raise DataError(
                    f"There are no {'harmful' if label else 'harmless'} texts in {code}: {reader.seen(code)}",
                    file=source.name,
                )
            rows = _drawn(len(found), source.limit)
            texts += [found[row] for row in rows]
            language += [code] * len(rows)
            harmful += [label] * len(rows)
            own = rows if source.harmful_text else [2 * row + label for row in rows]
            unit += [place + (0 if source.parallel else number << 32) for place in own]
    _check_parallel(source, counts)
    digest = xxhash.xxh3_128()
    for text, code, label, place in zip(texts, language, harmful, unit, strict=True):
        digest.update(f"{code} {int(label)} {place} {len(text)} {text}".encode("utf-8", "surrogatepass"))
    return TextSet(
        tuple(texts),
        tuple(language),
        np.asarray(harmful),
        np.asarray(unit, dtype=np.int64),
        digest.hexdigest(),
        reader.left_out,
    )


def _drawn(count: int, limit: int | None) -> list[int]:
    """Rows to keep of so many, in order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(0).permutation(count)[:limit].tolist())


def _check_languages(source: TextSource, codes: Sequence[str]) -> None:
    """Refuse to read the texts of one language as those of several."""
    names = [name for name in (source.dataset, source.harmful_dataset, source.harmless_dataset) if name]
    if len(codes) > 1 and source.language_column is None and _PLACE not in source.split:
        for name in names:
            if _PLACE not in name:
                raise ConfigError(
                    f"{name} would be read for each of {', '.join(codes)}. Put {_PLACE} where its name or `split` differs "
                    "between languages, or name the `language_column`."
                )


def _check_parallel(source: TextSource, counts: Mapping[str, tuple[int, int]]) -> None:
    """Rows are the same text in every language only if there are equally many, before `limit` draws from them."""
    if source.parallel and len(set(counts.values())) > 1:
        listed = ", ".join(f"{code} {bad} and {good}" for code, (bad, good) in counts.items())
        raise DataError(
            f"`parallel` is set, but the languages have different numbers of harmful and harmless texts: {listed}. Without "
            "the setting each language stands on its own.",
            file=source.name,
        )


class _Reader:
    """Reads each file once and sorts its rows into languages and classes."""

    def __init__(self, source: TextSource, beside: Path | None) -> None:
        self.source, self.beside = source, beside
        self.left_out = 0
        self._labels: dict[str, set[str]] = {}
        self._languages: set[str] = set()
        self._whole: dict[str, dict[bool, list[str]]] | None = None

    def classes(self, code: str) -> dict[bool, list[str]]:
        """The harmful and the harmless texts of a language."""
        if self.source.language_column is None:
            return self._sorted(code, None)[code]
        if _PLACE in self._templates():
            return self._sorted(code, code)[code]
        if self._whole is None:
            self._whole = self._sorted(code, None)
        return self._whole.get(code, {True: [], False: []})

    def seen(self, code: str) -> str:
        """What was there instead, for an error."""
        if self.source.language_column is not None:
            return f"the column `{self.source.language_column}` has {_listed(self._languages)}."
        if self.source.label is not None:
            return (
                f"the column `{self.source.label}` has {_listed(self._labels.get(code, set()))}; expected "
                f"{_listed(self.source.harmful_values)} for harmful and {_listed(self.source.harmless_values)} for harmless."
            )
        return "the file is empty."

    def _templates(self) -> str:
        s = self.source
        return " ".join(part for part in (s.dataset, s.harmful_dataset, s.harmless_dataset, s.split) if part)

    def _sorted(self, code: str, only: str | None) -> dict[str, dict[bool, list[str]]]:
        found: dict[str, dict[bool, list[str]]] = {code: {True: [], False: []}}
        for label, text, row_code in self._texts(code):
            if only is None or row_code == only:
                found.setdefault(row_code, {True: [], False: []})[label].append(text)
        return found

    def _texts(self, code: str) -> Iterator[tuple[bool, str, str]]:
        s = self.source
        if s.dataset is None:
            for template, label in ((s.harmful_dataset, True), (s.harmless_dataset, False)):
                assert template is not None
                for name, row, value in self._rows(template, code):
                    yield label, _text(value, s.text, name, row), self._language(value, code, name, row)
            return
        for name, row, value in self._rows(s.dataset, code):
            own = self._language(value, code, name, row)
            if s.harmful_text is not None and s.harmless_text is not None:
                yield True, _text(value, (s.harmful_text,), name, row), own
                yield False, _text(value, (s.harmless_text,), name, row), own
                continue
            assert s.label is not None
            _require(value, s.label, name, row)
            label_text = _label(value[s.label])
            self._labels.setdefault(own, set()).add(label_text)
            if label_text in s.harmful_values or label_text in s.harmless_values:
                yield label_text in s.harmful_values, _text(value, s.text, name, row), own
            else:
                self.left_out += 1

    def _rows(self, template: str, code: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        name, split = template.replace(_PLACE, code), self.source.split.replace(_PLACE, code)
        path = self._path(name)
        rows = read_hub(name, split) if path is None else read_file(path, name)
        for number, value in rows:
            if isinstance(value, DataError):
                raise value
            if not isinstance(value, Mapping):
                raise DataError("expected an object with columns.", file=name, row=number)
            yield name, number, value

    def _path(self, name: str) -> Path | None:
        """The file of this name, or None for a name on the Hub."""
        given = Path(name).expanduser()
        if self.source.folder is not None:
            return Path(self.source.folder).expanduser() / given
        if given.exists():
            return given
        if self.beside is not None and (self.beside / given).exists():
            return self.beside / given
        return given if looks_like_path(name) else None

    def _language(self, value: Mapping[str, Any], default: str, name: str, row: int) -> str:
        column = self.source.language_column
        if column is None:
            return default
        _require(value, column, name, row)
        code = normalize_language(str(value[column]))
        self._languages.add(code)
        return code


def _require(value: Mapping[str, Any], column: str, name: str, row: int) -> None:
    if column not in value:
        raise DataError(
            f"there is no such column; there are {_listed(value)}.", file=name, row=row, field=column
        )


def _text(value: Mapping[str, Any], columns: Sequence[str], name: str, row: int) -> str:
    for column in columns:
        text = value.get(column)
        if text is not None and not isinstance(text, str):
            raise DataError(f"expected text, found {type(text).__name__}.", file=name, row=row, field=column)
        if text is not None and not is_blank(text):
            if problem := half_character(text):
                raise DataError(problem, file=name, row=row, field=column)
            return text
    for column in columns:
        if column in value:
            raise DataError("is blank; expected a text.", file=name, row=row, field=column)
    _require(value, columns[0], name, row)
    raise AssertionError("unreachable")


def _label(value: Any) -> str:
    """A label as text: 1, 1.0, True and "1" are the same one."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _listed(values: Any) -> str:
    names = sorted(str(value) for value in values)
    return (", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")) or "nothing"
