"""Harmful and harmless prompts in the data: what a row may say, what is kept of it, and what divides by it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data import (
    as_groups,
    check_data,
    count_kinds,
    fingerprint_groups,
    group_features,
    load_groups,
    split_by_source,
)
from mpo.data.contract import RowError
from mpo.data.tokenization import tokenize_groups
from mpo.errors import DataError
from tests.data.rows import flat, group
from tests.tiny import build_tokenizer, random_groups

HARMLESS: dict[str, Any] = {"kind": "harmless"}


def kinds(groups: Any) -> list[str]:
    return list(groups["kind"])


def numbered(harmful: int, harmless: int) -> list[dict[str, Any]]:
    rows = random_groups(harmful * 31 + harmless, harmful + harmless, (1, 2), words=(1, 3))
    return [row if i < harmful else {**row, **HARMLESS} for i, row in enumerate(rows)]


@pytest.mark.parametrize("form", ["flat", "canonical", "jsonl", "csv", "parquet", "dataset"])
def test_the_kind_is_read_from_every_form_and_kept(form: str, tmp_path: Path) -> None:
    rows: Any = [flat(number=0), flat(number=1, **HARMLESS), flat(number=2, kind="harmful")]
    if form == "canonical":
        rows = [row | ({} if i != 1 else HARMLESS) for i, row in enumerate(random_groups(0, 3))]
    elif form == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = str(tmp_path / "a.jsonl")
    elif form in ("csv", "parquet"):
        import pandas as pd

        frame, path = pd.DataFrame(rows), tmp_path / f"a.{form}"
        frame.to_csv(path, index=False) if form == "csv" else frame.to_parquet(path)
        rows = str(path)
    elif form == "dataset":
        rows = load_groups(rows).groups
    groups = load_groups(rows).groups
    assert kinds(groups) == ["harmful", "harmless", "harmful"]
    assert groups.features == group_features(kinds=True)
    again = as_groups(groups)
    assert again.to_list() == groups.to_list()
    assert count_kinds(again) == {"harmful": 2, "harmless": 1}
    of_source = {str(row["source"]["prompt"]): row["kind"] for row in groups}
    divided = as_groups(groups, group_by_source=False).to_list()
    assert all(row["kind"] == of_source[str(row["source"]["prompt"])] for row in divided)


@pytest.mark.parametrize("none", ["harmful", None, ""])
def test_rows_that_are_all_harmful_are_as_without_the_field(none: str | None) -> None:
    with_field, without = (
        load_groups([{**flat(number=n), **more} for n in range(3)]) for more in ({"kind": none}, {})
    )
    assert with_field.groups.to_list() == without.groups.to_list()
    assert with_field.groups.column_names == ["source", "targets", "origin"]
    assert with_field.fingerprint == without.fingerprint
    assert count_kinds(without.groups) == {"harmful": 3, "harmless": 0}


def test_the_fingerprint_depends_on_the_kind() -> None:
    found = {
        load_groups([flat(number=0, kind=a), flat(number=1, kind=b)]).fingerprint
        for a in ("harmful", "harmless")
        for b in ("harmful", "harmless")
    }
    assert len(found) == 4
    groups = load_groups(numbered(2, 2))
    assert fingerprint_groups(groups.groups) == groups.fingerprint


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            "harmles",
            "is 'harmles'; expected 'harmful' (as without the field) or 'harmless'. Did you mean 'harmless'?",
        ),
        ("Harmless", "Did you mean 'harmless'?"),
        ("benign", "is 'benign'; expected"),
        (3, "is a number; expected 'harmful' or 'harmless'."),
        (["harmless"], "is a list; expected"),
    ],
)
@pytest.mark.parametrize("row", [flat(), group()], ids=["flat", "canonical"])
def test_another_kind_is_an_error_with_its_place(row: dict[str, Any], value: Any, problem: str) -> None:
    with pytest.raises(RowError) as error:
        load_groups([flat(number=7), {**row, "kind": value}])
    assert (error.value.row, error.value.field) == (1, "kind")
    assert problem in str(error.value)
    loaded = load_groups([flat(number=7), {**row, "kind": value}], bad_rows="drop")
    assert [bad.field for bad in loaded.dropped] == ["kind"] and len(loaded.groups) == 1


def test_a_source_has_one_kind() -> None:
    rows = [flat("bn"), flat("ko", number=1), flat("ko", source_prompt=flat()["source_prompt"], **HARMLESS)]
    with pytest.raises(
        DataError, match="row 2, field `kind`: is 'harmless', but the same source is 'harmful'"
    ):
        load_groups(rows)
    loaded = load_groups(rows, bad_rows="drop")
    assert [bad.row for bad in loaded.dropped] == [2]
    assert loaded.groups.num_rows == 2 and "kind" not in loaded.groups.column_names


@lru_cache
def nine_of_each() -> Any:
    return load_groups(numbered(9, 9)).groups


@given(st.integers(0, 9), st.integers(0, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_of_each_kind_the_same_share_is_held_out(harmful: int, harmless: int, data: Any) -> None:
    total = harmful + harmless
    if total < 2:
        return
    count = data.draw(st.integers(1, total - 1))
    groups = nine_of_each().select([*range(harmful), *range(9, 9 + harmless)])
    train, held = split_by_source(groups, count, seed=data.draw(st.integers(0, 3)))
    assert (len(train), len(held)) == (total - count, count)
    left, out = count_kinds(train), count_kinds(held)
    for kind, number in (("harmful", harmful), ("harmless", harmless)):
        assert left[kind] + out[kind] == number
        if min(harmful, harmless) > 1 and 2 <= count <= total - 2:
            assert left[kind] and out[kind]
            assert abs(out[kind] - count * number / total) <= 1
    order = [row["source"]["prompt"] for row in groups.to_list()]
    assert [order.index(row["source"]["prompt"]) for row in held.to_list()] == sorted(
        order.index(row["source"]["prompt"]) for row in held.to_list()
    )


def test_a_split_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = numbered(7, 5)
    held = [split_by_source(load_groups(some).groups, 4, seed=2)[1] for some in (rows, rows[::-1])]
    texts = [sorted(row["source"]["prompt"][-1]["content"] for row in part.to_list()) for part in held]
    assert texts[0] == texts[1]


def test_tokens_keep_their_kind_in_every_division() -> None:
    groups = load_groups(numbered(3, 2)).groups
    tokenized, _ = tokenize_groups(groups, build_tokenizer("llama"), max_targets_per_group=1)
    of_source = dict(zip(map(str, tokenized["source_prompt"]), tokenized["kind"], strict=True))
    assert len(tokenized) > 5 or all(len(row["targets"]) == 1 for row in groups)
    assert list(of_source.values()) == ["harmful"] * 3 + ["harmless"] * 2


def test_a_report_counts_kinds_and_looks_for_refusals_of_harmless_prompts() -> None:
    refuses = flat("ko", number=1, **HARMLESS)
    helps = {
        **flat("ko", number=2, **HARMLESS),
        "source_chosen": "Take bread, cheese and butter.",
        "source_rejected": flat()["source_chosen"],
        "target_chosen": "빵과 치즈를 준비하세요.",
        "target_rejected": flat("ko")["target_chosen"],
    }
    report = check_data([flat("ko"), refuses, helps])
    assert report.kinds == report.to_dict()["kinds"] == {"harmful": 1, "harmless": 2}
    assert "Kinds     1 harmful, 2 harmless" in report.to_text()
    assert report.count("harmless_refused") == 2
    assert report.count("chosen_no_refusal") == report.count("rejected_refusal") == 0
    alone = check_data([flat("ko")])
    assert "kinds" not in alone.to_dict() and "Kinds" not in alone.to_text()
