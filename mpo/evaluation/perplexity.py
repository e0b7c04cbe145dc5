"""Perplexity of ordinary text per language: what training has cost a model of its language."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpo.common.bootstrap import ratio_interval
from mpo.common.checks import check_confidence, check_limit, check_max_length
from mpo.common.files import read_named_text
from mpo.common.provenance import collect
from mpo.common.tables import TextTable, printable_name
from mpo.common.typed_json import write_typed
from mpo.data.languages import language_name, normalize_language_setting
from mpo.errors import ConfigError, DataError
from mpo.evaluation.engines import ModelChoice
from mpo.evaluation.policy import load_policy
from mpo.evaluation.results import LARGEST_LOG, PERPLEXITY, PerplexityResult, TextPerplexity
from mpo.evaluation.safety import about_model, model_folder
from mpo.modeling.likelihoods import text_likelihoods


def measure_perplexity(
    texts: Mapping[str, str],
    *,
    model: ModelChoice,
    out: Path,
    name: str | None = None,
    max_length: int = 1024,
    limit: int | None = None,
    confidence: float = 0.95,
) -> PerplexityResult:
    """Measures, prints and writes ``out/NAME/perplexity.json``.

    Args:
        texts: ``{language: file}``; UTF-8, one text per line, empty lines left out.
        model: Which model, and how it is loaded.
        out: Folder of results, shared by all models.
        name: Name of the model's folder; by default the last part of the adapter's or the model's name.
        max_length: Texts are cut to this many tokens.
        limit: Take the first so many texts of each file.
        confidence: Coverage of the intervals, which resample texts.

    Returns:
        What was written.

    Raises:
        ConfigError: A setting has an impossible value.
        DataError: A file cannot be read, or has no text to predict.
        MPOError: Model or adapter cannot be used.
    """
    check_max_length(max_length)
    check_limit(limit)
    check_confidence(confidence)
    by_language = {
        normalize_language_setting(code, "texts"): read_lines(file, limit) for code, file in texts.items()
    }
    if len(by_language) < len(texts) or not texts:
        raise ConfigError(f"texts: expected one file per language, got {', '.join(texts) or 'none'}.")
    folder = out / model_folder(model, name)
    policy = load_policy(model)
    languages = {}
    for code, lines in by_language.items():
        print(f"Reading {len(lines)} texts in {printable_name(language_name(code))}", flush=True)
        scored = text_likelihoods(
            policy.model, policy.tokenizer, lines, max_length=max_length, batch_size=model.batch_size
        )
        cut = sum(len(policy.tokenizer(line)["input_ids"]) > max_length for line in lines)
        languages[code] = _summary(code, lines, scored, cut, confidence)
    result = PerplexityResult(
        model=about_model(model, folder.name),
        max_length=max_length,
        confidence=confidence,
        languages=languages,
        provenance=collect(base_model=model.model, precision=policy.dtype, identity=policy.identity),
    )
    path = write_typed(folder / PERPLEXITY, result)
    print()
    _table(languages, folder.name, confidence).show()
    print(f"\nWritten: {path}")
    return result


def read_lines(file: str, limit: int | None = None) -> list[str]:
    """The texts of a file, one per line.

    Raises:
        DataError: The file cannot be read, is no UTF-8, or has no text.
    """
    try:
        lines = read_named_text(file).splitlines()
    except OSError as error:
        raise DataError(
            f"{error.strerror or error}. Pass a text file, one text per line.", file=file
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"is no UTF-8 ({error.reason} at byte {error.start}). Convert it.", file=file
        ) from None
    found = [line.strip() for line in lines if line.strip()][:limit]
    if not found:
        raise DataError("holds no text; expected one text per line.", file=file)
    return found


def _summary(
    code: str, lines: Sequence[str], scored: Sequence[tuple[float, int]], cut: int, confidence: float
) -> TextPerplexity:
    kept = [(line, -total, count) for line, (total, count) in zip(lines, scored, strict=True) if count]
    if not kept:
        raise DataError(
            f"No text in {code} has two tokens or more, so there is nothing to predict. Give whole sentences, one a line."
        )
    nats, tokens = [part for _, part, _ in kept], [count for *_, count in kept]
    total = math.fsum(nats)
    if not math.isfinite(total):
        raise DataError(
            f"The model gave probabilities that are not finite for texts in {code}. Load it in another dtype."
        )
    ends = ratio_interval(nats, tokens, confidence=confidence)
    digest = hashlib.sha256("\n".join(line for line, *_ in kept).encode("utf-8")).hexdigest()
    return TextPerplexity(
        texts=len(kept),
        cut=cut,
        tokens=sum(tokens),
        perplexity=_exp(total / sum(tokens)),
        interval=None if ends is None else (_exp(ends[0]), _exp(ends[1])),
        bits_per_byte=None if cut else total / math.log(2) / sum(len(line.encode()) for line, *_ in kept),
        fingerprint=digest,
        tokens_per_text=tokens,
        nats_per_text=nats,
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, LARGEST_LOG))


def _table(languages: Mapping[str, TextPerplexity], name: str, confidence: float) -> TextTable:
    rows = [
        (
            printable_name(language_name(code)),
            str(row.texts),
            str(row.tokens),
            f"{row.perplexity:.3f}",
            "-" if row.interval is None else f"[{row.interval[0]:.3f}, {row.interval[1]:.3f}]",
            "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}",
        )
        for code, row in languages.items()
    ]
    header = ("Language", "Texts", "Tokens", "Perplexity", f"[{100 * confidence:g} %]", "Bits/byte")
    notes = ["Per token, the first of each text left out. Intervals: bootstrap over texts."]
    cut = sum(row.cut for row in languages.values())
    if cut:
        notes.append(f"{cut} texts were cut at the greatest length; their languages have no bits per byte.")
    return TextTable(
        f"Perplexity of text: {name}", header, tuple(rows), notes=tuple(notes), emphasis=frozenset({3})
    )
