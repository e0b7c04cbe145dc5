"""Malformed inputs: each ends in an error of our own that says where, or, where harmless, loads as it should."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from mpo.data import load_groups
from mpo.errors import DataError
from tests.data.rows import flat, group, official, pair

GOOD = flat("ko")


def dump(*rows: Any) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False).encode("utf-8")


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n" for row in rows)


def table(*rows: dict[str, Any]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


# name, file name, row or None for the whole file, field or None, a piece of the reason
BAD_ROWS: list[tuple[str, Any, str, str]] = [
    ("field missing", flat(target_rejected=...), "target_rejected", "missing"),
    ("column misspelt", flat(source_chosen=..., source_choosen="no"), "source_chosen", "`source_choosen`"),
    ("field null", flat(source_rejected=None), "source_rejected", "null"),
    ("field not a number", flat(target_chosen=float("nan")), "target_chosen", "NaN"),
    ("field infinite", flat(target_chosen=float("inf")), "target_chosen", "a number"),
    ("field a number", flat(target_prompt=17), "target_prompt", "a number"),
    ("field a boolean", flat(target_prompt=True), "target_prompt", "a boolean"),
    ("response empty", flat(target_chosen=""), "target_chosen", "is empty"),
    ("response whitespace", flat(target_rejected=" \n\t\u00a0\u3000"), "target_rejected", "is empty"),
    ("response zero-width", flat(source_chosen="\u200b\u200d\ufeff\u2060"), "source_chosen", "invisible"),
    (
        "response direction marks",
        flat(target_chosen="\u200f\u202b\u202c\u2067\u2069"),
        "target_chosen",
        "invisible",
    ),
    ("response fillers", flat(target_chosen="\u3164\u115f\u2800\ufe0f"), "target_chosen", "invisible"),
    ("source prompt empty", flat(source_prompt=""), "source_prompt", "is empty"),
    ("source prompt BOM", flat(source_prompt="\ufeff"), "source_prompt", "is empty"),
    ("chosen equal", flat(target_chosen="না", target_rejected="না"), "target_rejected", "equal to chosen"),
    (
        "chosen equal but blanks",
        flat(source_rejected="No. \u200f", source_chosen=" No."),
        "source_rejected",
        "equal",
    ),
    (
        "lone surrogate",
        flat(target_chosen="no \ud83d no"),
        "target_chosen",
        "lone surrogate (U+D83D) at character 3",
    ),
    (
        "messages written as text",
        flat(target_prompt="[{'role': 'user', 'content': 'x'}]"),
        "target_prompt",
        "as a text",
    ),
    ("messages written as JSON", flat(target_chosen='{"role": "assistant"}'), "target_chosen", "as a text"),
    ("empty list", flat(target_prompt=[]), "target_prompt", "empty list"),
    ("list of lists", flat(target_prompt=[["a"]]), "target_prompt[0]", "a list"),
    ("list of texts", flat(target_prompt=["a", "b"]), "target_prompt[0]", "a text"),
    ("role unknown", flat(target_prompt=[{"role": "bot", "content": "x"}]), "target_prompt[0].role", "'bot'"),
    (
        "role misspelt",
        flat(target_prompt=[{"role": "User", "content": "x"}]),
        "target_prompt[0].role",
        "'user'?",
    ),
    ("role null", flat(target_prompt=[{"role": None, "content": "x"}]), "target_prompt[0].role", "null"),
    ("role a number", flat(target_prompt=[{"role": 3, "content": "x"}]), "target_prompt[0].role", "a number"),
    ("content missing", flat(target_prompt=[{"role": "user"}]), "target_prompt[0].content", "missing"),
    (
        "content misspelt",
        flat(source_prompt=[{"role": "user", "contnet": "x"}]),
        "source_prompt[0].content",
        "contnet",
    ),
    (
        "content of parts",
        flat(target_prompt=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        "target_prompt[0].content",
        "list of parts",
    ),
    (
        "prompt ends with an answer",
        flat(target_prompt=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]),
        "target_prompt[1]",
        "must be from 'user'",
    ),
    (
        "system message late",
        flat(target_prompt=[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]),
        "target_prompt[1]",
        "beginning",
    ),
    (
        "system message empty",
        flat(target_prompt=[{"role": "system", "content": ""}, {"role": "user", "content": "y"}]),
        "target_prompt[0].content",
        "is empty",
    ),
    (
        "response from user",
        flat(target_chosen=[{"role": "user", "content": "x"}]),
        "target_chosen[0]",
        "'assistant'",
    ),
    (
        "tool calls",
        flat(target_chosen=[{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]),
        "target_chosen[0].tool_calls",
        "not supported",
    ),
    ("language of the source", flat(target_language="en"), "target_language", "language of the source"),
    ("language unknown", flat(target_language="Bengaly"), "target_language", "'Bengali' ('bn')"),
    ("language a country", flat(target_language="jp"), "target_language", "'ja'"),
    ("language a number", flat(target_language=5), "target_language", "a number"),
    ("language column misspelt", flat(None, target_lang="bn"), "target_lang", "`target_language`"),
    ("language column bare", flat(None, language="bn"), "language", "`target_language`"),
    (
        "target not translated",
        flat(
            None,
            **{key.replace("source", "target"): flat()[key] for key in flat() if key.startswith("source")},
        ),
        "target_language",
        "all in English",
    ),
    ("official without answer", official(target_chosen=...), "target_chosen", "missing"),
    (
        "official with nested null",
        official(target_chosen={"from": "gpt", "value": None}),
        "target_chosen[0].value",
        "null",
    ),
    (
        "official wrong role",
        official(source_chosen={"from": "human", "value": "x"}),
        "source_chosen[0]",
        "'assistant'",
    ),
    ("group without targets", group(targets=...), "targets", "missing"),
    ("group with target", group(targets=..., target=pair("bn")), "targets", "`target`"),
    ("group with no targets", group(targets=[]), "targets", "empty list"),
    ("group with targets null", group(targets=None), "targets", "null"),
    (
        "group with one bad target",
        group(targets=[pair("bn"), pair("ko", chosen=...)]),
        "targets[1].chosen",
        "missing",
    ),
    ("group with a text target", group(targets=["x"]), "targets[0]", "a text"),
    (
        "group with a nested wrong role",
        group(targets=[pair("bn", rejected=[{"role": "tool", "content": "x"}])]),
        "targets[0].rejected[0].role",
        "'tool'",
    ),
    ("group with a text source", group(source="x"), "source", "a text"),
]


@pytest.mark.parametrize(
    ("row", "field", "reason"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS]
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_bad_row_is_an_error_that_names_file_row_and_field(
    tmp_path: Path, row: Any, field: str, reason: str, suffix: str
) -> None:
    path = tmp_path / f"pairs.{suffix}"
    rows = [GOOD, GOOD, row, GOOD]
    # Escapes, so that lone surrogates reach the file as a writer that knows no better puts them there.
    text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(r) for r in rows)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_groups(path)
    assert f"pairs.{suffix}, row 2, field `{field}`: " in str(caught.value)
    assert reason in str(caught.value)
    assert (caught.value.file, caught.value.row, caught.value.field) == (path.name, 2, field)


@pytest.mark.parametrize(
    ("row", "field", "reason"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS]
)
def test_a_bad_row_is_dropped_and_listed_when_asked(
    tmp_path: Path, row: Any, field: str, reason: str
) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row, GOOD]), encoding="utf-8")
    loaded = load_groups(path, bad_rows="drop")
    (bad,) = loaded.dropped
    assert (bad.file, bad.row, bad.field) == ("pairs.json", 0, field)
    assert reason in bad.reason
    good_targets = 1 if len(loaded.groups) == 1 and len(loaded.groups[0]["targets"]) == 1 else 2
    kept = [target["row"] for g in loaded.groups for target in g["targets"]]
    # Only the group with two targets has a good one beside the bad one.
    assert kept == ([0, 1] if good_targets == 2 else [1])
    assert (good_targets == 2) == (field == "targets[1].chosen")


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# name, file name, content, row (None: the whole file), pieces of the message
BAD_FILES: list[tuple[str, str, bytes, int | None, tuple[str, ...]]] = [
    ("empty file", "a.json", b"", None, ("empty",)),
    ("only blanks", "a.jsonl", b" \n\n ", None, ("empty",)),
    ("only a BOM", "a.json", b"\xef\xbb\xbf", None, ("empty",)),
    ("empty list", "a.json", b"[]", None, ("empty list",)),
    ("truncated in a text", "a.json", dump(GOOD, flat("sw"))[:-50], 1, ("line 1", "truncated")),
    ("truncated in a character", "a.json", dump(GOOD, flat("bn"))[:-30], 1, ("line 1", "truncated")),
    (
        "truncated in a character of a line",
        "a.jsonl",
        lines(GOOD, flat("bn"))[:-30],
        1,
        ("line 2", "truncated"),
    ),
    ("half a character at the end", "a.json", dump(GOOD) + b"\xe0\xa6", 0, ("behind the end",)),
    ("truncated between rows", "a.json", dump(GOOD)[:-1] + b",", 1, ("truncated",)),
    ("truncated at the end", "a.json", dump(GOOD)[:-1], 1, ("does not end", "truncated")),
    ("truncated last line", "a.jsonl", lines(GOOD, flat("sw"))[:-50], 1, ("line 2", "truncated")),
    ("an object", "a.json", b'{"data": [], "version": 1}', None, ("`data`", "list of rows")),
    ("a number", "a.json", b"42", None, ("one number",)),
    ("a text", "a.json", b'"hello"', None, ("one text",)),
    ("null", "a.json", b"null", None, ("null",)),
    ("no JSON at all", "a.json", b"hello there", None, ("line 1, column 1", "not JSON")),
    ("Python literals", "a.json", b"[{'source_prompt': 1}]", 0, ("line 1, column 3",)),
    ("comma missing", "a.json", b"[" + dump(GOOD)[1:-1] + dump(GOOD)[1:], 1, ("expected ','",)),
    ("comma behind the last row", "a.json", dump(GOOD)[:-1] + b",]", 1, ("not JSON",)),
    ("text behind the list", "a.json", dump(GOOD) + b" more", 0, ("behind the end",)),
    ("rows without a list", "a.json", dump(GOOD)[1:-1] + b",\n" + dump(GOOD)[1:-1], 1, ("put [",)),
    ("a row that is a list", "a.json", b"[[1, 2], [3]]", 0, ("is a list",)),
    ("rows that are numbers", "a.json", b"[1, 2]", 0, ("is a number",)),
    ("rows that are null", "a.json", b"[null]", 0, ("is null",)),
    ("nested too deeply", "a.json", nested(200_000), 0, ("nested too deeply",)),
    ("a number of 5,000 digits", "a.json", b'[{"a": ' + b"9" * 5000 + b"}]", 0, ("digits",)),
    (
        "a key twice",
        "a.json",
        dump(GOOD)[:-2] + b', "target_chosen": "x"}]',
        0,
        ("field `target_chosen`", "twice"),
    ),
    (
        "a key twice inside a message",
        "a.jsonl",
        lines(GOOD) + b'{"source": {"prompt": [{"role": "user", "role": "user"}]}, "targets": []}\n',
        1,
        ("field `source.prompt[0].role`", "twice"),
    ),
    ("a list in JSON Lines", "a.jsonl", json.dumps([GOOD], indent=1).encode(), None, ("line 1", ".json")),
    (
        "a line that is no JSON",
        "a.jsonl",
        lines(GOOD) + b"\n{oops}\n" + lines(GOOD),
        1,
        ("line 3, column 2",),
    ),
    ("a line that is a text", "a.jsonl", lines(GOOD, "x"), 1, ("is a text",)),
    ("UTF-16", "a.json", dump(GOOD).decode().encode("utf-16"), None, ("UTF-16", "iconv")),
    ("UTF-32", "a.json", dump(GOOD).decode().encode("utf-32"), None, ("UTF-32",)),
    ("Latin-1", "a.json", b'[{"source_prompt": "caf\xe9 au lait"}]', None, ("0xe9", "byte 23", "iconv")),
    ("Latin-1 line", "a.jsonl", lines(GOOD) + b'{"a": "caf\xe9"}\n', 1, ("line 2", "0xe9")),
    ("Latin-1 CSV", "a.csv", table(GOOD) + "né,b".encode("latin-1"), 1, ("line 3", "0xe9")),
    ("gzip named JSON", "a.json", gzip.compress(dump(GOOD)), None, ("gzip",)),
    ("zip named Parquet", "a.parquet", b"PK\x03\x04 rest", None, ("zip",)),
    (
        "Git LFS pointer",
        "a.json",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        None,
        ("git lfs pull",),
    ),
    ("an HTML page", "a.jsonl", b"\n<!DOCTYPE html><html></html>", None, ("HTML",)),
    ("a pickle", "a.jsonl", pickle.dumps([GOOD]), None, ("pickle", "never loaded")),
    ("Parquet named JSON", "a.json", parquet([GOOD]), None, ("Parquet", "Rename")),
    ("JSON named Parquet", "a.parquet", dump(GOOD), None, ("no Parquet file",)),
    ("Parquet cut short", "a.parquet", parquet([GOOD] * 50)[:-40], 0, ("damaged",)),
    (
        "Parquet without the columns",
        "a.parquet",
        parquet([{"text": "x"}]),
        0,
        ("field `source_prompt`", "`text`"),
    ),
    (
        "Parquet with a null",
        "a.parquet",
        parquet([GOOD, {**GOOD, "target_chosen": None}]),
        1,
        ("field `target_chosen`", "null"),
    ),
    ("CSV without rows", "a.csv", table(GOOD).split(b"\n")[0] + b"\n", None, ("no rows",)),
    (
        "CSV without a column",
        "a.csv",
        table({k: v for k, v in GOOD.items() if k != "target_chosen"}),
        0,
        ("field `target_chosen`", "missing"),
    ),
    (
        "CSV with a cell too many",
        "a.csv",
        table(GOOD) + b"1,2,3,4,5,6,7,8\n",
        1,
        ("line 3", "8 cells", "has 7"),
    ),
    ("CSV with a cell too few", "a.csv", table(GOOD) + b"1,2,3\n", 1, ("3 cells", "field `target_prompt`")),
    ("CSV with an open quote", "a.csv", table(GOOD) + b'"abc,2\n', 1, ("line 3", "broken CSV")),
    ("CSV with text behind a quote", "a.csv", table(GOOD) + b'"abc"d,2\n', 1, ("line 3", "broken CSV")),
    ("CSV with a column twice", "a.csv", b"a,b,a\n1,2,3\n", None, ("field `a`", "twice")),
    ("CSV with semicolons", "a.csv", table(GOOD).replace(b",", b";"), None, ("semicolons",)),
    (
        "CSV with an empty cell",
        "a.csv",
        table({**GOOD, "target_chosen": ""}),
        0,
        ("field `target_chosen`", "empty"),
    ),
    (
        "CSV of other data",
        "a.csv",
        b"id,source,en\n1,x,y\n",
        0,
        ("field `source_prompt`", "`id`, `source`, `en`"),
    ),
    ("unsupported suffix", "a.tsv", table(GOOD), None, ("'.tsv'", ".csv")),
    ("suffix misspelt", "a.jsonn", dump(GOOD), None, ("Did you mean .json",)),
]


@pytest.mark.parametrize(
    ("name", "content", "row", "pieces"),
    [case[1:] for case in BAD_FILES],
    ids=[case[0] for case in BAD_FILES],
)
def test_a_bad_file_is_an_error_that_names_it_and_says_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, row: int | None, pieces: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_groups(tmp_path / name)
    assert str(caught.value).startswith(name)
    assert (caught.value.file, caught.value.row) == (name, row)
    if row is not None:
        assert f"row {row}" in str(caught.value)
    for piece in pieces:
        assert piece in str(caught.value)


def test_errors_do_not_quote_the_texts_of_the_data(tmp_path: Path) -> None:
    for index, (_, row, _, _) in enumerate(BAD_ROWS):
        path = tmp_path / f"{index}.json"
        path.write_text(json.dumps([row]), encoding="utf-8")
        with pytest.raises(DataError) as caught:
            load_groups(path)
        for texts in (flat("bn"), flat("ko")):
            for key, text in texts.items():
                assert key == "target_language" or text not in str(caught.value)


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "gemma_pairs.json").write_bytes(dump(GOOD))
    with pytest.raises(DataError, match=r"gema_pairs.json: no such file. Did you mean 'gemma_pairs.json'"):
        load_groups(tmp_path / "gema_pairs.json")
    with pytest.raises(DataError, match="does not exist either"):
        load_groups(tmp_path / "nowhere" / "pairs.json")


def test_a_folder_is_an_error_that_lists_its_data_files(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(DataError, match=r"is a folder; expected a file. Give its files one by one: b.jsonl"):
        load_groups(tmp_path)
    Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="load_from_disk"):
        load_groups(tmp_path / "saved")


def test_a_hub_name_without_network_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(
        DataError, match=r"nobody/nothing: is no local file, and could not be loaded from the Hub"
    ):
        load_groups("nobody/nothing")
    with pytest.raises(DataError, match=r"A file 'pairs.jsonl' is in this folder"):
        load_groups("pairs_jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "an empty list"),
        ("", "an empty text"),
        ([GOOD, "a.json"], "mixes"),
        (GOOD, "Put one row into a list"),
        (17, "cannot load data from a int"),
        (Dataset.from_list([]), "is empty"),
        (DatasetDict({"test": Dataset.from_list([GOOD])}), "has no split 'train'. Its splits are 'test'"),
        ([GOOD, {"source_prompt": 3}], "list of rows, row 1, field `source_chosen`"),
        (Dataset.from_list([GOOD, {**GOOD, "target_chosen": ""}]), "dataset, row 1, field `target_chosen`"),
    ],
    ids=[
        "empty list",
        "empty text",
        "mixed",
        "object",
        "number",
        "empty dataset",
        "no split",
        "bad row",
        "bad dataset",
    ],
)
def test_data_in_memory_that_cannot_be_used_is_an_error(data: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_groups(data)
    assert message in str(caught.value)


def test_nothing_left_after_dropping_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_bytes(dump(flat(target_chosen=""), flat(source_chosen="")))
    with pytest.raises(
        DataError, match=r"no good row is left: 2 bad ones. The first is row 0, field `target_chosen`"
    ):
        load_groups(path, bad_rows="drop")


def test_a_bad_line_of_json_lines_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(GOOD) + b"{oops}\n" + b'{"a": "caf\xe9"}\n' + lines(flat("bn")))
    loaded = load_groups(path, bad_rows="drop")
    assert [bad.row for bad in loaded.dropped] == [1, 2]
    assert [target["row"] for target in loaded.groups[0]["targets"]] == [0, 3]


def one_target(path: Path) -> dict[str, Any]:
    (only,) = load_groups(path).groups
    (target,) = only["targets"]
    return target


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.json", dump), ("a.jsonl", lines), ("a.csv", table), ("a.json", lambda row: lines(row))],
    ids=["JSON", "JSON Lines", "CSV", "JSON Lines named JSON"],
)
def test_a_byte_order_mark_is_accepted(tmp_path: Path, name: str, write: Callable[..., bytes]) -> None:
    target = one_target(written(tmp_path, name, b"\xef\xbb\xbf" + write(GOOD)))
    assert target["prompt"] == [{"role": "user", "content": GOOD["target_prompt"]}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_odd_but_sound_texts_load_unchanged(tmp_path: Path, name: str) -> None:
    odd = {
        "direction marks": "\u202bمرحبا\u202c \u200fكيف\u200e",
        "one token of 1 MB": "না" * 170_000,
        "emoji": "👩‍👩‍👧 না 🇧🇩",
        "line breaks": 'না,\r\n"না"\n\tনা;',
        "BOM inside": "না\ufeffনা",
        "blanks around": "  না \n",
        "line separators": "না\u2028না\u2029\x85\x0b\x0cনা",
    }
    rows = [flat("bn", number=index, target_chosen=text) for index, text in enumerate(odd.values())]
    write = {"a.json": dump, "a.jsonl": lines, "a.csv": table, "a.parquet": lambda *r: parquet(list(r))}[name]
    groups = load_groups(written(tmp_path, name, write(*rows))).groups
    assert [g["targets"][0]["chosen"][0]["content"] for g in groups] == list(odd.values())


def test_an_empty_target_prompt_loads_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = one_target(written(tmp_path, "a.json", dump(flat(target_prompt=""))))
    assert target["prompt"] == [{"role": "user", "content": ""}]
    assert "Empty target prompts, kept: 1 (a.json row 0)" in caplog.text


def test_rows_of_different_types_do_not_end_in_an_arrow_error(tmp_path: Path) -> None:
    rows = [
        flat("bn"),
        official("ko"),
        group("ar"),
        flat("sw", target_prompt=[{"role": "user", "content": "Habari?"}]),
    ]
    (only,) = load_groups(written(tmp_path, "a.json", dump(*rows))).groups
    assert [(target["language"], target["row"]) for target in only["targets"]] == [
        ("bn", 0),
        ("ko", 1),
        ("ar", 2),
        ("sw", 3),
    ]


def test_the_limit_of_csv_fields_is_as_before_after_loading(tmp_path: Path) -> None:
    before = csv.field_size_limit(12_345)
    try:
        load_groups(written(tmp_path, "a.csv", table(GOOD)))
        assert csv.field_size_limit() == 12_345
    finally:
        csv.field_size_limit(before)


def test_a_file_name_with_brackets_and_stars_is_taken_literally(tmp_path: Path) -> None:
    assert one_target(written(tmp_path, "a[1]*.parquet", parquet([GOOD])))["language"] == "ko"


@pytest.mark.parametrize(
    ("encoding", "text", "fits"),
    [
        ("latin-1", "Où est le café? Ça, là-bas, près du château.", True),
        ("latin-1", "Straße, Übung und Äpfel", True),
        ("gb18030", "我怎样才能打开邻居的锁", False),
        ("shift_jis", "鍵を開けるにはどうすればいいですか", False),
        ("euc-kr", "자물쇠를 어떻게 열 수 있나요", False),
        ("cp1256", "كيف أفتح قفل باب جاري", False),
        ("cp1251", "Как открыть замок соседа", False),
    ],
)
def test_latin_1_is_advised_only_where_the_bytes_read_as_it(
    tmp_path: Path, encoding: str, text: str, fits: bool
) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(f'[{{"source_prompt": "{text}"}}]'.encode(encoding))
        with pytest.raises(DataError, match="not UTF-8") as error:
            load_groups(tmp_path / name)
        assert ("LATIN1" in str(error.value)) == fits


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_pipe_as_data_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is a pipe or a device"):
        load_groups(tmp_path / name)
    link = tmp_path / f"link-{name}"
    link.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a pipe or a device"):
        load_groups(link)
