"""Lengths of real preference pairs in tokens: what the cost of a training step depends on."""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mpo.data.contract import PARTS
from mpo.errors import ConfigError, DataError


class PairLengths(NamedTuple):
    """Tokens of the three parts of a preference pair, cut as training cuts them."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def tree(self) -> int:
        """Tokens of the preference tree, which holds the prompt once."""
        return self.prompt + self.chosen + self.rejected

    @property
    def branches(self) -> tuple[int, int]:
        """Tokens of the two sequences: prompt and chosen, prompt and rejected."""
        return self.prompt + self.chosen, self.prompt + self.rejected

    @property
    def responses(self) -> int:
        """Tokens of both responses."""
        return self.chosen + self.rejected


@dataclass(frozen=True)
class GroupLengths:
    """A source pair and its target pairs."""

    source: PairLengths
    targets: tuple[PairLengths, ...]

    @property
    def trees(self) -> tuple[PairLengths, ...]:
        """All pairs, the source last, as the trainer's collator orders them."""
        return (*self.targets, self.source)


def cut(prompt: int, chosen: int, rejected: int, max_length: int) -> PairLengths:
    """
    The prompt whole, the responses cut at their end, prompt plus response at most ``max_length``.

    Raises:
        DataError: the prompt leaves no room for a response.
    """
    room = max_length - prompt
    if room < 1 or min(prompt, chosen, rejected) < 1:
        raise DataError(
            f"a pair of {prompt} prompt, {chosen} chosen and {rejected} rejected tokens does not fit "
            f"max_length={max_length} with all parts present. Raise `--max_length`, or leave it out of the file."
        )
    return PairLengths(prompt, min(chosen, room), min(rejected, room))


def read_csv(path: str | Path, part: str | None, template_tokens: int, max_length: int) -> list[GroupLengths]:
    """
    Groups of a table of lengths.

    Args:
        path: CSV with ``source_id``, ``source_prompt``, ``source_chosen``, ``source_rejected``, ``target_prompt``,
            ``target_chosen``, ``target_rejected`` and, where it holds several data sets, ``file``. One row is a target
            pair; rows with the same ``source_id`` are a group.
        part: the data set to read, or None for all rows.
        template_tokens: tokens of a chat template, added to every prompt.
        max_length: see :func:`cut`.

    Raises:
        DataError: the file cannot be read, a column is missing or no number, or no row is left.
    """
    sources: dict[str, PairLengths] = {}
    targets: dict[str, list[PairLengths]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                if part is not None and row.get("file") != part:
                    continue
                try:
                    sizes = {
                        kind: cut(
                            int(row[f"{kind}_prompt"]) + template_tokens,
                            int(row[f"{kind}_chosen"]),
                            int(row[f"{kind}_rejected"]),
                            max_length,
                        )
                        for kind in ("source", "target")
                    }
                    key = row["source_id"]
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{path}, line {number}: expected whole numbers in the columns source_id, source_prompt, ..., "
                        f"target_rejected ({error})."
                    ) from error
                sources.setdefault(key, sizes["source"])
                targets.setdefault(key, []).append(sizes["target"])
    except OSError as error:
        raise DataError(f"the lengths {path} cannot be read: {error.strerror or error}.") from error
    if not sources:
        raise DataError(
            f"{path} has no rows" + (f" with file={part!r}" if part else "") + "; check `--file`."
        )
    return [GroupLengths(source, tuple(targets[key])) for key, source in sources.items()]


def of_groups(tokenized: Iterable[Mapping[str, Any]]) -> list[GroupLengths]:
    """Lengths of tokenized groups (:data:`mpo.data.tokenization.TOKENIZED_FEATURES`)."""
    return [
        GroupLengths(
            PairLengths(*(len(group[f"source_{part}"]) for part in PARTS)),
            tuple(
                PairLengths(*map(len, pair))
                for pair in zip(*(group[f"target_{part}"] for part in PARTS), strict=True)
            ),
        )
        for group in tokenized
    ]


def read_data(path: str, tokenizer: str, max_length: int, source_language: str = "en") -> list[GroupLengths]:
    """Lengths of a data file in any form the trainer takes, with a model's tokenizer and chat template."""
    from mpo.data import load_groups
    from mpo.data.tokenization import tokenize_groups
    from mpo.modeling.loading import ModelSource, load_tokenizer

    groups = load_groups(path, source_language=source_language, bad_rows="drop").groups
    tokenized, _ = tokenize_groups(
        groups, load_tokenizer(ModelSource(tokenizer)), max_length=max_length, bad_rows="drop"
    )
    return of_groups(tokenized)


def shorten(groups: Sequence[GroupLengths], most: int | None) -> list[GroupLengths]:
    """The groups with responses of at most so many tokens; None leaves them as they are."""

    def shorter(pair: PairLengths) -> PairLengths:
        return PairLengths(pair.prompt, *(size if most is None else min(size, most) for size in pair[1:]))

    return [GroupLengths(shorter(group.source), tuple(map(shorter, group.targets))) for group in groups]


def draw_tokens(lengths: Sequence[GroupLengths], vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """
    Tokenized groups of these lengths, of random tokens.

    The same source is the same tokens in all of its target pairs; no token is one of the first ten, where special tokens
    tend to be.
    """
    rng = random.Random(seed)
    first = min(10, vocabulary - 1)

    def draw(size: int) -> list[int]:
        return [rng.randrange(first, vocabulary) for _ in range(size)]

    groups = []
    for place, group in enumerate(lengths):
        columns: dict[str, Any] = {
            "origin": "lengths",
            "row": [place] * len(group.targets),
            "target_language": ["xx"] * len(group.targets),
        }
        for number, part in enumerate(PARTS):
            columns[f"source_{part}"] = draw(group.source[number])
            columns[f"target_{part}"] = [draw(pair[number]) for pair in group.targets]
        groups.append(columns)
    return groups


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where lengths come from."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--lengths", help="CSV of lengths, see benchmarks/lengths.py")
    source.add_argument("--data", help="preference pairs in any form the trainer takes, with --tokenizer")
    parser.add_argument("--file", help="which of the data sets in the CSV (column `file`)")
    parser.add_argument(
        "--tokenizer", help="model folder or Hub name whose tokenizer counts the tokens of --data"
    )
    parser.add_argument("--template_tokens", type=int, default=15, help="added to the prompts of a CSV (15)")
    parser.add_argument("--max_length", type=int, default=1024, help="prompt plus response (1024)")
    parser.add_argument("--max_response_length", type=int, help="responses alone, cut at their end")


def from_options(options: argparse.Namespace, file: str | None = None) -> list[GroupLengths]:
    """
    The lengths that the options of :func:`add_options` ask for.

    Raises:
        ConfigError: ``--data`` without ``--tokenizer``.
        DataError: the file cannot be read.
    """
    if options.lengths:
        found = read_csv(options.lengths, file or options.file, options.template_tokens, options.max_length)
    elif not options.tokenizer:
        raise ConfigError("`--data` needs `--tokenizer`, the model whose tokens are to be counted.")
    else:
        found = read_data(options.data, options.tokenizer, options.max_length)
    return shorten(found, options.max_response_length)
