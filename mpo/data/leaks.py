"""Evaluation prompts that stand in training data: word for word, nearly, in translation, or in meaning.

A prompt that was trained on says little of what a model does with one that it has not seen. Prompts are compared
normalised (:func:`mpo.data.shingles.normalised`). Where an evaluation prompt is found in one of its languages, its other
languages are found through their translation, since the training data hold what they ask.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpo.common.characters import printable
from mpo.common.files import write_json, write_text
from mpo.common.tables import TextTable
from mpo.common.words import counted, listed, shortened
from mpo.data.languages import language_name
from mpo.data.prompt_texts import TrainingText
from mpo.errors import ConfigError, DataError, DependencyError

KINDS = ("exact", "characters", "words", "meaning", "translation")
"""How an evaluation prompt is found, the surest first."""

CHARACTERS, WORDS, MEANING = 0.5, 0.6, 0.9
"""Default thresholds: Jaccard similarity of character and of word n-grams, cosine of sentence embeddings."""

Encoder = Callable[[Sequence[str]], Any]
"""Texts to ``[texts, dimensions]`` embeddings of any length."""

_AT_ONCE = 8192  # training texts
_PAIRS_SHOWN = 40
_KEPT = 8  # training texts per evaluation prompt that are named
_TEXT_SHOWN = 60


@dataclass(frozen=True)
class EvaluationText:
    """One evaluation prompt in one language.

    Attributes:
        prompts: Name of its prompt set.
        prompt_id: The same for the translations of one prompt.
        language: Code of its language.
        text: The prompt.
    """

    prompts: str
    prompt_id: str
    language: str
    text: str


@dataclass(frozen=True)
class Leak:
    """An evaluation prompt and the training text in which it was found.

    Attributes:
        prompts: Name of the prompt set.
        prompt_id: Of the evaluation prompt.
        language: Of the evaluation prompt.
        kind: One of :data:`KINDS`.
        score: 1 for ``exact``, a Jaccard similarity, or the cosine of embeddings; that of the language found directly for
            ``translation``.
        file: Training file.
        row: 0-based row in it, the first that holds the text.
        rows: Number of rows that hold it.
        through: Language of the evaluation prompt that was found directly, for ``translation``.
        text: The evaluation prompt.
        training_text: The training text.
    """

    prompts: str
    prompt_id: str
    language: str
    kind: str
    score: float
    file: str
    row: int
    rows: int = 1
    through: str | None = None
    text: str = ""
    training_text: str = ""

    def to_dict(self, *, texts: bool = False) -> dict[str, Any]:
        """The leak for JSON, without the texts unless they are asked for."""
        values = asdict(self)
        if not texts:
            del values["text"], values["training_text"]
        return {**values, "score": round(self.score, 4)}


@dataclass
class Leaks:
    """What :func:`find_leaks` found.

    Attributes:
        pairs: Evaluation prompts with the training texts they were found in, by prompt set, prompt, language and kind; of
            many training texts the most similar ones.
        prompts: Number of prompts by prompt set, translations counted once.
        rows: Training rows read.
        texts: Training texts read.
        dropped: Training rows that could not be read.
        training: Names of the training files.
    """

    pairs: list[Leak] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    texts: int = 0
    dropped: int = 0
    training: list[str] = field(default_factory=list)

    def found(self, prompts: str) -> dict[str, str]:
        """The prompts of a set that stand in the training data, by id, with the surest way in which they were found."""
        kinds: dict[str, str] = {}
        for leak in self.pairs:
            if leak.prompts == prompts:
                kinds[leak.prompt_id] = min(kinds.get(leak.prompt_id, KINDS[-1]), leak.kind, key=KINDS.index)
        return kinds

    def summary(self) -> list[str]:
        """A sentence per prompt set."""
        lines = []
        for name, total in self.prompts.items():
            kinds = Counter(self.found(name).values())
            how = ", ".join(f"{kinds[kind]:,} {_HOW[kind]}" for kind in KINDS if kinds[kind])
            lines.append(
                f"{sum(kinds.values()):,} of {counted(total, 'prompt')} of {printable(name, lines=False)} "
                + (f"stand in the training data: {how}." if kinds else "stand in the training data.")
            )
        return lines

    def short(self) -> str:
        """How many of each set, as in ``1 of 315 prompts of multijail, 0 of 100 of probe``."""
        return counts_in_words({name: (len(self.found(name)), total) for name, total in self.prompts.items()})

    def to_dict(self, *, texts: bool = False) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "training": self.training,
            "rows": self.rows,
            "texts": self.texts,
            "dropped": self.dropped,
            "prompts": {
                name: {"prompts": total, "found": self.found(name)} for name, total in self.prompts.items()
            },
            "pairs": [leak.to_dict(texts=texts) for leak in self.pairs],
        }

    def to_text(self, *, texts: bool = False) -> str:
        """For a person: a sentence per prompt set, and the pairs that were found directly."""
        lines = [f"Read {counted(self.rows, 'training row')}, {counted(self.texts, 'prompt')} in them."]
        if self.dropped:
            lines.append(f"{counted(self.dropped, 'row')} could not be read and were left out.")
        lines += self.summary()
        direct = [leak for leak in self.pairs if leak.kind != "translation"]
        if direct:
            others: dict[tuple[str, str], list[str]] = {}
            for leak in self.pairs:
                if leak.kind == "translation":
                    others.setdefault((leak.prompts, leak.prompt_id), []).append(leak.language)
            rows = tuple(self._row(leak) for leak in direct[:_PAIRS_SHOWN])
            header = ("prompts", "id", "language", "found by", "score", "training row", "rows")
            lines += ["", TextTable("Found in the training data", header, rows).plain()]
            if texts:
                for leak in direct[:_PAIRS_SHOWN]:
                    lines.append(
                        f"  {leak.prompt_id}, {leak.language}: {_shown(leak.text)}\n    {_shown(leak.training_text)}"
                    )
            if len(direct) > _PAIRS_SHOWN:
                lines.append(f"and {len(direct) - _PAIRS_SHOWN:,} more; `--output` takes them all.")
            for (name, prompt_id), codes in list(others.items())[:_PAIRS_SHOWN]:
                lines.append(
                    f"Through their translation, {printable(name, lines=False)} {printable(prompt_id, lines=False)}: "
                    f"{listed(list(dict.fromkeys(codes)))}."
                )
        return "\n".join(lines)

    @staticmethod
    def _row(leak: Leak) -> tuple[str, ...]:
        name = printable(shortened(leak.prompts, 24), lines=False)
        place = printable(f"{shortened(leak.file, 32)}:{leak.row}", lines=False)
        language = language_name(leak.language)
        prompt_id = printable(shortened(leak.prompt_id, 24), lines=False)
        return (name, prompt_id, language, leak.kind, f"{leak.score:.2f}", place, f"{leak.rows:,}")

    def write(self, path: str | Path, *, texts: bool = False) -> Path:
        """Write all pairs as JSON or CSV, by the file's suffix.

        Raises:
            ConfigError: The suffix is another.
            StorageError: It cannot be written.
        """
        check_output(path)
        if Path(path).suffix.lower() == ".json":
            return write_json(path, self.to_dict(texts=texts))
        table = io.StringIO(newline="")
        names = list(Leak("", "", "", "", 0.0, "", 0).to_dict(texts=texts))
        writer = csv.DictWriter(table, names)
        writer.writeheader()
        writer.writerows(leak.to_dict(texts=texts) for leak in self.pairs)
        return write_text(path, table.getvalue())


def counts_in_words(sets: Mapping[str, tuple[int, int]]) -> str:
    """Found and total prompts by prompt set, as in ``1 of 315 prompts of multijail, 0 of 100 of probe``."""
    words = [
        f"{found:,} of {counted(total, 'prompt') if not n else f'{total:,}'} of {printable(name, lines=False)}"
        for n, (name, (found, total)) in enumerate(sets.items())
    ]
    return ", ".join(words)


def _shown(text: str) -> str:
    return printable(shortened(" ".join(text.split()), _TEXT_SHOWN), lines=False)


_HOW = {
    "exact": "word for word",
    "characters": "nearly (letters)",
    "words": "nearly (words)",
    "meaning": "by meaning",
    "translation": "through a translation",
}


def check_output(path: str | Path) -> None:
    """Whether pairs can be written to a file of this name.

    Raises:
        ConfigError: They cannot.
    """
    if Path(path).suffix.lower() not in (".json", ".csv"):
        raise ConfigError(f"output: expected a .json or .csv file, got {str(path)!r}.")


def find_leaks(
    train: Iterable[TrainingText],
    evaluation: Iterable[EvaluationText],
    *,
    characters: float = CHARACTERS,
    words: float = WORDS,
    encoder: Encoder | None = None,
    meaning: float = MEANING,
) -> Leaks:
    """Find evaluation prompts that stand in training data.

    The training side is streamed: memory holds the evaluation side, one batch, and what was found.

    Args:
        train: Training rows, for example from :func:`mpo.data.prompt_texts.training_texts`.
        evaluation: All evaluation prompts.
        characters: Least Jaccard similarity of character n-grams, in (0, 1].
        words: Least Jaccard similarity of word pairs, in (0, 1].
        encoder: Sentence embeddings, to find prompts of the same meaning in any language; None does without.
        meaning: Least cosine of two embeddings, in (0, 1].

    Raises:
        ConfigError: A threshold is out of range, or there is no evaluation prompt.
    """
    for name, value in (("characters", characters), ("words", words), ("meaning", meaning)):
        if isinstance(value, bool) or not 0 < value <= 1:
            raise ConfigError(f"{name}: expected a number above 0 and at most 1, got {value!r}.")
    asked = list(evaluation)
    if not asked:
        raise ConfigError("evaluation: there is no prompt to look for.")
    result = Leaks()
    for name, _ in dict.fromkeys((text.prompts, text.prompt_id) for text in asked):
        result.prompts[name] = result.prompts.get(name, 0) + 1
    search = _Search(asked, characters, words, encoder, meaning)
    batch: dict[str, list[tuple[str, int]]] = {}
    for row in train:
        result.rows += 1
        for text in dict.fromkeys(row.texts):
            result.texts += 1
            batch.setdefault(text, []).append((row.file, row.row))
        if len(batch) >= _AT_ONCE:
            search.look_at(batch)
            batch.clear()
    search.look_at(batch)
    result.pairs = search.leaks()
    return result


@dataclass
class _Found:
    """A training text that is like an evaluation text."""

    kind: str
    score: float
    file: str
    row: int
    rows: int
    text: str

    @property
    def order(self) -> tuple[int, float]:
        return (KINDS.index(self.kind) > 0, -self.score)


class _Search:
    """The evaluation side, ready to be looked up, and what was found of it."""

    def __init__(
        self,
        asked: Sequence[EvaluationText],
        characters: float,
        words: float,
        encoder: Encoder | None,
        meaning: float,
    ) -> None:
        from mpo.data.shingles import SimilarTexts, character_shingles, normalised, word_shingles

        self._asked, self._encoder, self._meaning = asked, encoder, meaning
        self._normalised = normalised
        self._numbers: dict[str, int] = {}
        self._texts_of: list[list[int]] = []  # normalised text -> evaluation texts
        for index, text in enumerate(asked):
            number = self._numbers.setdefault(self._key(text.text), len(self._numbers))
            if number == len(self._texts_of):
                self._texts_of.append([])
            self._texts_of[number].append(index)
        known = list(self._numbers)
        self._similar = [
            ("characters", SimilarTexts(known, character_shingles, characters)),
            ("words", SimilarTexts(known, word_shingles, words)),
        ]
        self._embedded: Any = (
            None if encoder is None else _unit(encoder([asked[t[0]].text for t in self._texts_of]))
        )
        self._found: list[dict[str, _Found]] = [{} for _ in known]

    def _key(self, text: str) -> str:
        # A text of symbols alone, such as emoji, is compared as it is.
        return self._normalised(text) or text.strip()

    def look_at(self, batch: Mapping[str, list[tuple[str, int]]]) -> None:
        """Takes in what a batch of training texts is like; the values are the rows that hold each."""
        if not batch:
            return
        texts = list(batch)
        keys = [self._key(text) for text in texts]
        for text, key in zip(texts, keys, strict=True):
            if (number := self._numbers.get(key)) is not None:
                self._add(number, key, "exact", 1.0, text, batch[text])
        for kind, similar in self._similar:
            for index, number, score in zip(*similar.find(keys), strict=True):
                self._add(int(number), keys[index], kind, float(score), texts[index], batch[texts[index]])
        if self._encoder is not None:
            cosines = _unit(self._encoder(texts)) @ self._embedded.T
            for index, number in zip(*(cosines >= self._meaning).nonzero(), strict=True):
                text, score = texts[index], float(cosines[index, number])
                self._add(int(number), keys[index], "meaning", min(score, 1.0), text, batch[text])

    def _add(
        self, number: int, key: str, kind: str, score: float, text: str, rows: list[tuple[str, int]]
    ) -> None:
        found = self._found[number]
        new = _Found(kind, score, *rows[0], len(rows), text)
        old = found.get(key)
        if old is None:
            found[key] = new
        elif old.kind == kind:
            old.rows += new.rows  # of an earlier batch, or the same text but for punctuation
        elif new.order < old.order:
            found[key] = _Found(kind, score, old.file, old.row, old.rows, old.text)
        if len(found) > 4 * _KEPT:
            for worst in sorted(found, key=lambda name: found[name].order)[_KEPT:]:
                del found[worst]

    def leaks(self) -> list[Leak]:
        """All pairs, with those through a translation."""
        direct: dict[int, list[_Found]] = {}
        for number, found in enumerate(self._found):
            best = sorted(found.values(), key=lambda each: each.order)[:_KEPT]
            for index in self._texts_of[number]:
                if best:
                    direct[index] = best
        by_prompt: dict[tuple[str, str], list[int]] = {}
        for index, text in enumerate(self._asked):
            by_prompt.setdefault((text.prompts, text.prompt_id), []).append(index)
        leaks: list[Leak] = []
        for indices in by_prompt.values():
            sure = [index for index in indices if index in direct]
            if not sure:
                continue
            through = min(sure, key=lambda index: direct[index][0].order)
            for index in indices:
                leaks += (
                    [self._leak(index, found) for found in direct[index]]
                    if index in direct
                    else [self._leak(index, direct[through][0], through)]
                )
        return leaks

    def _leak(self, index: int, found: _Found, through: int | None = None) -> Leak:
        asked = self._asked[index]
        return Leak(
            asked.prompts,
            asked.prompt_id,
            asked.language,
            found.kind if through is None else "translation",
            found.score,
            found.file,
            found.row,
            found.rows,
            None if through is None else self._asked[through].language,
            asked.text,
            found.text,
        )


def _unit(vectors: Any) -> Any:
    import numpy as np

    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def sentence_encoder(model: str, device: str | None = None) -> Encoder:
    """Embeddings by a model of sentence-transformers, such as ``sentence-transformers/LaBSE``.

    Raises:
        DependencyError: The package is not installed.
        DataError: The model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DependencyError(
            "Comparing by meaning needs the package sentence-transformers: pip install 'mpo-align[embeddings]'."
        ) from error
    try:
        loaded = SentenceTransformer(model, device=device)
    except Exception as error:  # whatever the Hub, the file system or the model's own code raises
        raise DataError(f"the embedding model {model!r} cannot be loaded: {error}") from error
    return lambda texts: loaded.encode(list(texts), batch_size=64, show_progress_bar=False)
