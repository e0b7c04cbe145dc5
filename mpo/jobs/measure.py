"""Measures the reward gap of a model per language without training, with the same code as the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo.common.checks import check_beta, check_confidence, check_max_length
from mpo.common.files import check_writable
from mpo.errors import DependencyError
from mpo.evaluation import Comparison, RewardGapTable, compare, summarize
from mpo.evaluation.engines import ModelChoice

if TYPE_CHECKING:
    from mpo.data.loading import LoadedGroups


def load_pairs(data: str | list[str], *, source_language: str = "en", **options: Any) -> LoadedGroups:
    """Reads the pairs that are measured.

    Args:
        data, source_language, options: See :func:`mpo.data.load_groups`.

    Raises:
        DataError: They cannot be read, or every source is labelled with another language than `source_language`.
    """
    from mpo.data.loading import check_source_language, load_groups

    loaded = load_groups(data, source_language=source_language, **options)
    check_source_language(loaded, source_language)
    return loaded


def measure_reward_gap(
    data: str | list[str],
    model: ModelChoice,
    *,
    before: RewardGapTable | None = None,
    out: Path | None = None,
    beta: float = 1.0,
    confidence: float = 0.95,
    source_language: str = "en",
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    split: str = "train",
    bad_rows: str = "error",
    max_length: int | None = 1024,
    max_response_length: int | None = None,
    batch_layout: str = "tree",
    max_tokens_per_row: int | None = None,
) -> RewardGapTable | Comparison:
    """Scores every pair, prints a table per language and writes it to ``out``.

    Args:
        data: File(s) of pairs, or a name on the Hub.
        model: Where it has an adapter, it is scored without it and with it, and the reference gap is that of the model
            without it.
        before: Table of the model without the adapter, where it was measured already on the same data with the same
            settings; it is then not scored again.
        out: Folder for ``reward_gap.json``, ``reward_gap.txt`` and ``reward_gap.png``; where there are harmless groups,
            their table is in ``reward_gap_harmless.json``, and not in these.
        beta: Scale of the target gap in the error column.
        confidence: Coverage of the bootstrap intervals.
        source_language, languages, limit, split, bad_rows: See :func:`mpo.data.load_groups`.
        max_length, max_response_length: Limits of prompt plus response and of the response alone, in tokens.
        batch_layout, max_tokens_per_row: See :class:`mpo.training.config.MPOConfig`.

    Returns:
        The table, or with an adapter the comparison.

    Raises:
        MPOError: Model, adapter or data cannot be used; found out before weights are loaded where possible.
    """
    from mpo.training.scoring import score_groups

    check_confidence(confidence)
    check_beta(beta)
    check_max_length(max_length)
    if out is not None:
        check_writable(out, setting="out")
    opened = model.open(batch_layout)
    loaded = load_pairs(
        data,
        source_language=source_language,
        split=split,
        bad_rows=bad_rows,
        limit=limit,
        languages=languages,
    )
    if loaded.dropped:
        print(f"{len(loaded.dropped)} bad rows were dropped; `mpo data check` lists them.", flush=True)
    print(f"Loading {model.model}", flush=True)
    policy = opened.load(with_adapter=False)

    def score(name: str) -> list[RewardGapTable]:
        print(f"Scoring {len(loaded.groups)} groups with {name}", flush=True)
        scores = score_groups(
            policy,
            loaded.groups,
            opened.tokenizer,
            source_language=source_language,
            max_length=max_length,
            max_response_length=max_response_length,
            template_kwargs=opened.chat_template_kwargs,
            layout=batch_layout,
            max_tokens_per_row=max_tokens_per_row,
            bad_rows=bad_rows,
        )
        kinds = [records for kind in (False, True) if (records := scores.of_kind(harmless=kind))]
        return [summarize(records, beta=beta, confidence=confidence) for records in kinds]

    measured: list[RewardGapTable | Comparison] = []
    tables = score(model.model) if before is None or model.adapter is None else [before]
    if model.adapter is None:
        measured.extend(tables)
    else:
        policy = opened.put_adapter(policy)
        # Of harmless groups there is nothing to compare with where the table before was given.
        measured.extend(compare(*both) for both in zip(tables, score(model.adapter), strict=False))
    result, *harmless = measured
    print()
    result.show()
    for further in harmless:
        print()
        further.harmless_table().show()
    if out is not None:
        _write(
            result,
            out,
            harmless=harmless[0] if harmless else None,
            base_model=model.model,
            adapter=model.adapter,
            data_fingerprint=loaded.fingerprint,
            precision=str(opened.dtype),
            identity=opened.identity().to_dict(),
        )
    return result


def _write(
    result: RewardGapTable | Comparison,
    out: Path,
    *,
    harmless: RewardGapTable | Comparison | None,
    **made_of: Any,
) -> None:
    from mpo.common.files import write_text
    from mpo.common.provenance import collect
    from mpo.evaluation.results import HARMLESS_GAP, REWARD_GAP, write_reward_gap
    from mpo.report.plots import reward_gap_before_after, reward_gap_single

    provenance = collect(**made_of)
    written = [
        write_reward_gap(out / REWARD_GAP, result, provenance),
        write_text(out / "reward_gap.txt", result.to_text() + "\n"),
    ]
    if harmless is not None:
        written.append(write_reward_gap(out / HARMLESS_GAP, harmless, provenance))
    try:
        if isinstance(result, Comparison):
            written.append(reward_gap_before_after(result.before, result.after, out / "reward_gap.png"))
        else:
            written.append(reward_gap_single(result, out / "reward_gap.png"))
    except DependencyError as error:
        print(f"No plot: {error}")
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
