"""Grouping, order, fingerprints and splitting, on random rows and on each accepted form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo.data import as_groups, check_data, fingerprint_groups, group_features, load_groups, split_by_source
from mpo.errors import ConfigError, DataError
from tests.data.rows import TEXTS, flat, group, official, pair

# Datasets are slow to build, and these tests build many.
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

CODES = ["bn", "ko", "ja", "zh", "ar", "sw"]
numbered = st.tuples(st.integers(0, 5), st.sampled_from(CODES), st.integers(0, 3))


def numbered_row(source: int, language: str, variant: int) -> dict[str, Any]:
    return flat(language, number=source, target_chosen=f"{TEXTS[language][1]} {source} {variant}")


def texts(pair: dict[str, Any]) -> tuple[Any, ...]:
    return (pair["language"], *(pair[part][0]["content"] for part in ("prompt", "chosen", "rejected")))


def expected_texts(row: dict[str, Any], side: str) -> tuple[Any, ...]:
    language = row["target_language"] if side == "target" else "en"
    return (language, *(row[f"{side}_{part}"] for part in ("prompt", "chosen", "rejected")))


def same(first: Dataset, second: Dataset) -> bool:
    return first.features == second.features and first.to_list() == second.to_list()


@relaxed
@given(st.lists(numbered, min_size=1, max_size=30))
def test_grouping_loses_no_pair_invents_none_and_keeps_their_order(items: list[tuple[int, str, int]]) -> None:
    rows = [numbered_row(*item) for item in items]
    groups = load_groups(rows).groups
    assert groups.features == group_features()
    first_seen = list(dict.fromkeys(expected_texts(row, "source") for row in rows))
    assert [texts(g["source"]) for g in groups] == first_seen
    for g in groups:
        members = [i for i, row in enumerate(rows) if expected_texts(row, "source") == texts(g["source"])]
        assert [target["row"] for target in g["targets"]] == members
        assert [texts(target) for target in g["targets"]] == [
            expected_texts(rows[i], "target") for i in members
        ]
        assert g["source"]["row"] == members[0]
        assert g["origin"] == "list of rows"


@relaxed
@given(st.lists(numbered, min_size=1, max_size=30), st.booleans(), st.none() | st.integers(1, 4))
def test_as_groups_changes_nothing_the_second_time(
    items: list[tuple[int, str, int]], by_source: bool, most: int | None
) -> None:
    settings_: dict[str, Any] = {"group_by_source": by_source, "max_targets_per_group": most}
    once = as_groups([numbered_row(*item) for item in items], **settings_)
    twice = as_groups(once, **settings_)
    assert same(once, twice)
    assert fingerprint_groups(once) == fingerprint_groups(twice)


@relaxed
@given(st.lists(numbered, min_size=1, max_size=30), st.integers(1, 4))
def test_large_groups_are_divided_and_every_pair_stays(items: list[tuple[int, str, int]], most: int) -> None:
    rows = [numbered_row(*item) for item in items]
    whole, divided = load_groups(rows).groups, load_groups(rows, max_targets_per_group=most).groups
    assert all(1 <= len(g["targets"]) <= most for g in divided)
    flattened = [
        [(texts(g["source"]), texts(t), t["row"]) for g in x for t in g["targets"]] for x in (whole, divided)
    ]
    assert flattened[0] == flattened[1]
    fewest = sum(-(-len(g["targets"]) // most) for g in whole)
    assert len(divided) == fewest


@relaxed
@given(st.lists(numbered, min_size=1, max_size=30))
def test_without_grouping_every_pair_is_its_own_group_in_file_order(
    items: list[tuple[int, str, int]],
) -> None:
    rows = [numbered_row(*item) for item in items]
    groups = load_groups(rows, group_by_source=False).groups
    assert [[t["row"] for t in g["targets"]] for g in groups] == [[i] for i in range(len(rows))]
    assert [g["source"]["row"] for g in groups] == list(range(len(rows)))
    assert [texts(g["source"]) for g in groups] == [expected_texts(row, "source") for row in rows]


@relaxed
@given(
    st.lists(numbered, min_size=1, max_size=30),
    st.integers(1, 6),
    st.sets(st.sampled_from(CODES), min_size=1),
)
def test_limit_and_languages_keep_the_first_sources_that_have_such_targets(
    items: list[tuple[int, str, int]], limit: int, wanted: set[str]
) -> None:
    rows = [numbered_row(*item) for item in items]
    if not wanted <= {row["target_language"] for row in rows}:
        with pytest.raises(DataError, match="no pair is in"):
            load_groups(rows, languages=sorted(wanted))
        return
    kept = [row for row in rows if row["target_language"] in wanted]
    sources = list(dict.fromkeys(expected_texts(row, "source") for row in kept))[:limit]
    groups = load_groups(rows, limit=limit, languages=sorted(wanted)).groups
    assert [texts(g["source"]) for g in groups] == sources
    expected = Counter(
        expected_texts(row, "target") for row in kept if expected_texts(row, "source") in sources
    )
    assert Counter(texts(t) for g in groups for t in g["targets"]) == expected


@relaxed
@given(
    st.lists(numbered, min_size=1, max_size=40),
    st.one_of(st.floats(0, 0.99), st.integers(0, 5)),
    st.integers(0, 1000),
    st.booleans(),
)
def test_a_split_divides_the_groups_and_never_a_source(
    items: list[tuple[int, str, int]], held_out: float | int, seed: int, by_source: bool
) -> None:
    groups = load_groups([numbered_row(*item) for item in items], group_by_source=by_source).groups
    prompts = {g["source"]["prompt"][0]["content"] for g in groups}
    if isinstance(held_out, int) and held_out and held_out >= len(prompts):
        with pytest.raises(ConfigError, match="nothing to train on"):
            split_by_source(groups, held_out, seed)
        return
    if isinstance(held_out, float) and held_out and len(prompts) == 1:
        with pytest.raises(ConfigError, match="nothing to train on"):
            split_by_source(groups, held_out, seed)
        return
    train, held = split_by_source(groups, held_out, seed)
    left, right = ([g["source"]["prompt"][0]["content"] for g in part] for part in (train, held))
    assert not set(left) & set(right)
    assert len(train) > 0
    everything = groups.to_list()
    assert sorted(train.to_list() + held.to_list(), key=everything.index) == everything
    positions = [everything.index(g) for g in train.to_list()]
    assert positions == sorted(positions)
    if isinstance(held_out, int):
        assert len(set(right)) == held_out
    elif held_out == 0:
        assert not right
    else:
        assert 1 <= len(set(right)) <= len(prompts) - 1
        assert abs(len(set(right)) - held_out * len(prompts)) <= 1


def test_which_sources_are_held_out_depends_on_the_seed_and_not_on_the_order() -> None:
    rows = [flat("bn", number=number) for number in range(40)]
    forward, backward = load_groups(rows).groups, load_groups(rows[::-1]).groups

    def held(groups: Dataset, seed: int) -> set[str]:
        return {g["source"]["prompt"][0]["content"] for g in split_by_source(groups, 10, seed)[1]}

    assert held(forward, 1) == held(backward, 1)
    assert len({frozenset(held(forward, seed)) for seed in range(5)}) == 5


def test_a_split_keeps_equal_prompts_with_other_responses_together() -> None:
    rows = [flat("bn", number=n // 2, source_chosen=f"I can't. {n}") for n in range(20)]
    groups = load_groups(rows).groups
    assert len(groups) == 20
    for seed in range(5):
        train, held = split_by_source(groups, 3, seed)
        assert (len(train), len(held)) == (14, 6)


@pytest.mark.parametrize("held_out", [-1, -0.1, 1.0, 2.5, float("nan"), True, "3", None])
def test_an_impossible_share_is_an_error(held_out: Any) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        split_by_source(load_groups([flat(number=n) for n in range(4)]).groups, held_out, 0)


def plain(language: str) -> dict[str, str]:
    return dict(zip(("prompt", "chosen", "rejected"), TEXTS[language], strict=True))


FORMS = {
    "flat": flat("bn"),
    "flat, detected": flat(None),
    "flat, with messages": flat(
        "bn",
        target_language="ben_Beng",
        source_prompt=[{"role": "user", "content": TEXTS["en"][0]}],
        target_chosen={"from": "gpt", "value": TEXTS["bn"][1]},
    ),
    "official": official("bn"),
    "official, labelled": official("bn", target_language="Bengali"),
    "group": group("bn"),
    "group of plain texts": {"source": plain("en"), "targets": [plain("bn")]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_becomes_the_same_group(form: str) -> None:
    groups = load_groups([FORMS[form]]).groups
    expected = {**group("bn"), "origin": "list of rows"}
    for one in (expected["source"], *expected["targets"]):
        one["row"] = 0
    assert groups.to_list() == [expected]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_format_gives_the_same_groups(tmp_path: Path, suffix: str) -> None:
    rows = [flat(code, number=number) for number in range(3) for code in CODES]
    path = tmp_path / f"pairs.{suffix}"
    dataset = Dataset.from_list(rows)
    if suffix == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    else:
        getattr(dataset, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[suffix])(str(path))
    loaded, expected = load_groups(path), load_groups(rows)
    assert loaded.fingerprint == expected.fingerprint
    assert loaded.origin == f"pairs.{suffix}"
    assert (
        loaded.groups.remove_columns("origin").to_list() == expected.groups.remove_columns("origin").to_list()
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_saved_groups_load_again_with_their_rows_and_origins(tmp_path: Path, suffix: str) -> None:
    groups = load_groups([flat(code, number=number) for code in CODES for number in range(3)]).groups
    path = str(tmp_path / f"groups.{suffix}")
    groups.to_json(path) if suffix == "jsonl" else groups.to_parquet(path)
    assert same(load_groups(path).groups, groups)


def test_datasets_with_splits_and_streams_load() -> None:
    rows = [flat(code) for code in CODES]
    expected = load_groups(rows).fingerprint
    dataset = Dataset.from_list(rows)
    assert load_groups(dataset).fingerprint == expected
    assert load_groups(dataset.with_format("numpy")).fingerprint == expected
    assert (
        load_groups(DatasetDict({"train": dataset.select([0]), "test": dataset}), split="test").fingerprint
        == expected
    )
    assert load_groups(IterableDataset.from_generator(lambda: iter(rows))).fingerprint == expected


def test_sources_are_grouped_over_several_files(tmp_path: Path) -> None:
    paths = []
    for code in ("bn", "ko"):
        paths.append(tmp_path / f"{code}.jsonl")
        paths[-1].write_text("\n".join(json.dumps(flat(code, number=n)) for n in range(3)), encoding="utf-8")
    loaded = load_groups(paths)
    assert loaded.origin == "bn.jsonl, ko.jsonl"
    assert [[(t["language"], t["row"]) for t in g["targets"]] for g in loaded.groups] == [
        [("bn", n), ("ko", n)] for n in range(3)
    ]
    assert set(loaded.groups["origin"]) == {"bn.jsonl, ko.jsonl"}


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(str(tmp_path / folder / "pairs.jsonl"))
        Path(paths[-1]).write_text(json.dumps(flat(number=folder)), encoding="utf-8")
    assert load_groups(paths).groups["origin"] == paths


def test_a_conversation_before_the_question_is_kept() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Hello."},
        {"role": "user", "content": "And now?", "name": None},
    ]
    (only,) = load_groups([flat(source_prompt=turns)]).groups
    assert [m["role"] for m in only["source"]["prompt"]] == ["system", "user", "assistant", "user"]
    assert only["source"]["prompt"][1] == {"role": "user", "content": "Hi."}


def test_a_label_of_the_source_wins_over_the_setting() -> None:
    assert load_groups([flat(source_language="Dutch")]).groups[0]["source"]["language"] == "nl"
    assert load_groups([flat()], source_language="zh-CN").groups[0]["source"]["language"] == "zh"


def test_groups_without_a_source_in_the_dominant_language_are_not_trained_on() -> None:
    rows = [flat("bn", number=number, source_language="zh") for number in range(9)]
    with pytest.raises(DataError, match=r"labelled as Chinese.*Set `source_language: zh`"):
        as_groups(rows)
    assert len(as_groups(rows, source_language="zh")) == 9
    assert len(as_groups([*rows, flat("bn", number=9)])) == 10
    report = check_data(rows)
    assert len(report.notes) == 1 and "Every source is labelled as Chinese" in report.notes[0]
    (note,) = check_data(rows, source_language="Chinese").notes  # they are English
    assert "Mend the labels" in note
    undetermined = [flat("bn", number=number, source_language="und") for number in range(9)]
    assert len(as_groups(undetermined)) == 9


def test_sources_in_different_languages_are_different_sources() -> None:
    assert len(load_groups([flat("bn"), flat("ko", source_language="nl")]).groups) == 2


def test_the_fingerprint_depends_on_texts_languages_and_order_and_on_nothing_else(tmp_path: Path) -> None:
    rows = [flat(code, number=number) for number in range(2) for code in ("bn", "ko")]
    base = load_groups(rows).fingerprint
    (tmp_path / "moved.json").write_text(json.dumps([{**row, "id": 7} for row in rows]), encoding="utf-8")
    assert load_groups(tmp_path / "moved.json").fingerprint == base
    changed = [
        load_groups(rows[::-1]).fingerprint,
        load_groups(rows[:-1]).fingerprint,
        load_groups([*rows[:-1], {**rows[-1], "target_language": "xx"}]).fingerprint,
        load_groups(rows, source_language="nl").fingerprint,
        load_groups(rows, group_by_source=False).fingerprint,
        *(
            load_groups([{**rows[0], key: rows[0][key] + "."}, *rows[1:]]).fingerprint
            for key in rows[0]
            if "lang" not in key
        ),
    ]
    assert len({base, *changed}) == len(changed) + 1


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from mpo.data import load_groups; from tests.data.rows import flat; "
        "print(load_groups([flat('bn'), flat('ko', number=1), flat(None)]).fingerprint)"
    )
    root = Path(__file__).parents[2]
    seen = {load_groups([flat("bn"), flat("ko", number=1), flat(None)]).fingerprint}
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(result.stdout.strip())
    assert len(seen) == 1


@pytest.mark.parametrize("far_apart", [True, False])
def test_many_pairs_across_storage_chunks_keep_their_places(far_apart: bool) -> None:
    # More pairs and groups than one Arrow chunk holds.
    sources = [n % 1500 if far_apart else n // 3 for n in range(4500)]
    rows = [flat("ko", number=source, target_chosen=f"아니요 {n}") for n, source in enumerate(sources)]
    groups = load_groups(rows).groups
    assert len(groups) == 1500
    for number, g in enumerate(groups):
        assert g["source"]["prompt"][0]["content"].endswith(f" {number}")
        assert [t["row"] for t in g["targets"]] == [n for n, source in enumerate(sources) if source == number]
        assert all(t["chosen"][0]["content"] == f"아니요 {t['row']}" for t in g["targets"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"bad_rows": "ignore"},
        {"limit": 0},
        {"limit": 1.5},
        {"max_targets_per_group": 0},
        {"max_targets_per_group": True},
        {"languages": []},
        {"languages": ["Klingonish"]},
        {"source_language": ""},
        {"source_language": "Englisch language"},
    ],
    ids=str,
)
def test_an_impossible_setting_is_an_error_that_names_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_groups([flat()], **wrong)
    assert next(iter(wrong)) in str(caught.value)


def test_a_bad_target_of_a_group_leaves_the_good_ones() -> None:
    row = group("bn", targets=[pair("bn"), pair("ko", chosen=""), pair("ja")])
    loaded = load_groups([row], bad_rows="drop")
    assert [t["language"] for t in loaded.groups[0]["targets"]] == ["bn", "ja"]
    assert [(bad.row, bad.field) for bad in loaded.dropped] == [(0, "targets[1].chosen")]


def test_importing_the_package_imports_neither_torch_nor_datasets() -> None:
    program = "import sys, mpo.data; print([name for name in ('torch', 'datasets', 'py3langid') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("part", ["source_prompt", "source_chosen", "source_rejected"])
def test_sources_that_are_stored_in_another_unicode_form_are_one_group(part: str) -> None:
    composed = {f"source_{name}": f"Où est le café {name}?" for name in ("prompt", "chosen", "rejected")}
    other = unicodedata.normalize("NFD", composed[part])
    rows = [flat("bn", **composed), flat("ko", **{**composed, part: other})]
    groups = load_groups(rows).groups
    assert [target["language"] for target in groups[0]["targets"]] == ["bn", "ko"]
    assert groups[0]["source"]["prompt"][0]["content"] == composed["source_prompt"]


def test_texts_keep_the_unicode_form_in_which_they_were_given() -> None:
    given = unicodedata.normalize("NFD", "Où est le café?")
    group = load_groups([flat("bn", source_prompt=given, target_prompt=given)]).groups[0]
    assert group["source"]["prompt"][0]["content"] == group["targets"][0]["prompt"][0]["content"] == given


def test_prompts_that_differ_in_unicode_form_only_are_held_out_together() -> None:
    prompts = [f"Où est le café numéro {number}?" for number in range(12)]
    rows = [flat("bn", source_prompt=prompt, number=f"é {n}") for n, prompt in enumerate(prompts)]
    rows += [
        flat("ko", source_prompt=unicodedata.normalize("NFD", prompt), source_chosen=f"No, {n}.")
        for n, prompt in enumerate(prompts)
    ]
    groups = load_groups(rows).groups
    assert len(groups) == 24
    for seed in range(5):
        train, held = split_by_source(groups, 4, seed)
        assert (len(train), len(held)) == (16, 8)
        sides = [
            {unicodedata.normalize("NFC", s["prompt"][0]["content"]) for s in x["source"]}
            for x in (train, held)
        ]
        assert not sides[0] & sides[1]


def test_responses_that_differ_in_unicode_form_only_are_refused() -> None:
    row = flat("bn", source_chosen="café", source_rejected=unicodedata.normalize("NFD", "café"))
    with pytest.raises(DataError, match="equal to chosen"):
        load_groups([row])
