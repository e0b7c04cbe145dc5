"""Result files: what was written is read, and what was tampered with is refused in one sentence or read as it stands."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo.common.journal import read_rows
from mpo.common.typed_json import as_dict, read_typed, write_typed
from mpo.errors import MPOError, StorageError
from mpo.evaluation import RewardGapTable, compare, summarize
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.results import (
    PerplexityResult,
    RewardGapResult,
    SafetyResult,
    SuiteIndex,
    TrainingMetrics,
    UtilityResult,
    read_reward_gap,
    write_reward_gap,
)
from mpo.evaluation.verdicts import VerdictRow
from mpo.hidden_space.results import HiddenSpace
from mpo.report.page import write_report
from tests.evaluation.simulated import simulated_scores
from tests.report.result_folder import (
    write_hidden_space,
    write_perplexity,
    write_safety,
    write_utility,
)

MADE = {
    "created": "2026-01-01T00:00:00+00:00",
    "libraries": {"torch": "2.13.0"},
    "devices": {"cpu": "a processor", "accelerators": {"a card": 2}},
    "identity": {"weights": "abc"},
}


@cache
def tables() -> tuple[RewardGapTable, RewardGapTable]:
    before, after = simulated_scores(("en", "sw"), groups=3)
    return summarize(before, beta=1.0, resamples=100), summarize(after, beta=1.0, resamples=100)


def write_metrics(file: Path) -> Path:
    before, after = tables()
    changed = compare(before, after)
    metrics = TrainingMetrics(
        beta=1.0,
        held_out_groups=3,
        before=before,
        after=after,
        change=changed.to_dict()["change"],
        retention_loss={"before": 0.0, "after": None},
        sources={"sources": 9, "dropped": 1},
        steps=4,
        train_runtime=1.5,
    )
    return write_typed(file, metrics)


def write_model(folder: Path, model: int) -> None:
    """One small model with every measurement."""
    before, after = tables()
    write_reward_gap(folder / "reward_gap.json", before if model == 0 else compare(before, after), MADE)
    for kind, verdicts in (
        ("attack", ["unsafe", "safe", "invalid"]),
        ("over_refusal", ["answer", "refusal"]),
    ):
        words = dict.fromkeys(("en", "zh", "sw"), verdicts[model % 2 :] + verdicts)
        write_safety(folder / kind / "set", kind, words)
        file = folder / kind / "set" / "result.json"
        second = {
            "name": "other",
            "unparsed": 0,
            "languages": {},
            "agreement": {"count": 3, "agreement": 0.5, "kappa": 0.2, "low": -0.1, "high": 0.6},
        }
        change(file, lambda values, second=second: values.update(second_judge=second, provenance=MADE))
    write_utility(folder, np.random.default_rng(0), model)
    items = ("exact_match,remove_whitespace", [1.0, 0.0])

    def shorten(values: dict[str, Any]) -> None:
        for task in values["tasks"].values():
            task["items"] = dict([items])
        values["provenance"] = MADE

    change(folder / "utility.json", shorten)
    write_perplexity(folder, model)


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    how(values)
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for n, name in enumerate(("base", "tuned")):
        write_model(root / name, n)
    write_typed(root / "suite.json", SuiteIndex(models=["base", "tuned"], done={"base/utility": "abc"}))
    write_hidden_space(root)
    write_metrics(root / "metrics.json")
    return root


FILES: dict[str, Callable[[Path], Any]] = {
    "base/reward_gap.json": read_reward_gap,
    "tuned/reward_gap.json": read_reward_gap,
    "tuned/attack/set/result.json": lambda path: read_typed(path, SafetyResult),
    "base/over_refusal/set/result.json": lambda path: read_typed(path, SafetyResult),
    "tuned/utility.json": lambda path: read_typed(path, UtilityResult),
    "tuned/perplexity.json": lambda path: read_typed(path, PerplexityResult),
    "suite.json": lambda path: read_typed(path, SuiteIndex),
    "metrics.json": lambda path: read_typed(path, TrainingMetrics),
    "hidden_space/hidden_space.json": lambda path: HiddenSpace.read(path.parent),
}
JOURNALS = {
    "tuned/attack/set/answers.jsonl": AnswerRow,
    "tuned/attack/set/verdicts.refusal-phrases.jsonl": VerdictRow,
}


def plain(value: Any) -> dict[str, Any]:
    """What a file of this value holds."""
    if isinstance(value, RewardGapResult):
        made = {"version": value.version, "provenance": value.provenance}
        measured = value.after if value.before is None else compare(value.before, value.after)
        return {**made, **measured.to_dict(records=True)}
    return as_dict(value)


# ------------------------------------------------------------------------------------------------------------ as it was


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_read_and_written_again_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    read = FILES[name]
    value = read(folder / name)
    if isinstance(value, RewardGapResult):
        again = value.after if value.before is None else compare(value.before, value.after)
        file = write_reward_gap(tmp_path / Path(name).name, again, value.provenance)
    else:
        file = write_typed(tmp_path / Path(name).name, value)
    assert read(file) == value
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (folder / name, file))
    assert second["version"] == 1
    assert agrees(second, first) and first.keys() <= second.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_version_is_the_first_one_and_a_newer_one_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / Path(name).name
    shutil.copyfile(folder / name, file)
    change(file, lambda values: values.pop("version", None))
    assert FILES[name](file) == FILES[name](folder / name)
    change(file, lambda values: values.update(version=2))
    with pytest.raises(
        StorageError, match=rf"{file.name} has version 2 .* up to version 1\. Install a newer mpo"
    ):
        FILES[name](file)


def test_a_byte_order_mark_and_sorted_keys_change_nothing(folder: Path, tmp_path: Path) -> None:
    for name, read in FILES.items():
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        file = tmp_path / Path(name).name
        file.write_text(json.dumps(values, sort_keys=True), encoding="utf-8-sig")
        assert read(file) == read(folder / name)


def test_the_sentence_names_the_place_what_is_there_what_belongs_there_and_what_to_do(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    shutil.copyfile(folder / "tuned/attack/set/result.json", file)
    change(file, lambda values: values["languages"]["sw"].update(rate=1.5))
    with pytest.raises(StorageError) as caught:
        read_typed(file, SafetyResult)
    assert str(caught.value) == (
        f"{file}: `languages.sw.rate` is 1.5; expected a share from 0 to 1. Delete it and evaluate again."
    )
    file.write_text('{"measurement": "attack", "languages": {"\\u001b[31m": 3}}', encoding="utf-8")
    with pytest.raises(StorageError) as caught:
        read_typed(file, SafetyResult)
    assert "`languages.[31m` is 3; expected" in str(caught.value) and "(and 1 more fault)" in str(
        caught.value
    )


# ----------------------------------------------------------------------------------------------------------- tampered

GONE = "gone"
OTHERS = (
    *("null", "true", "-1", "0", "7", "0.5", "-0.0", "1e-300", "3e11", "1e300", "1e999", "NaN", "-Infinity"),
    *(
        "1" + "0" * 30,
        "1" + "0" * 5000,
        '""',
        '"x"',
        '"\\ud83d"',
        '"a\\u0000b/\\u001b[2J"',
        f'"{"y" * 5000}"',
    ),
    *(
        "[]",
        "{}",
        "[1]",
        '["x", "y"]',
        '{"en": 1}',
        "[[[]]]",
        "[" * 300 + "]" * 300,
        '{"a":' * 99 + "1" + "}" * 99,
    ),
    GONE,
)
"""What a place in a file is replaced with, as JSON."""


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value but the whole; of long lists the ends."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        if not isinstance(value, list) or key in (0, 1, len(value) - 1):
            yield (*path, key)
            yield from places(entry, (*path, key))


def tampered(values: Any, path: tuple[str | int, ...], other: str) -> str:
    """The JSON text with another value at a place."""
    copy = json.loads(json.dumps(values))
    node = copy
    for key in path[:-1]:
        node = node[key]
    if other == GONE:
        del node[path[-1]]
    else:
        node[path[-1]] = "\0here"
    return json.dumps(copy).replace(json.dumps("\0here"), other)


def agrees(found: Any, raw: Any) -> bool:
    """Whether a value that was read says the same as its file, type by type: nothing was made of something else."""
    if isinstance(found, dict) and isinstance(raw, dict):
        return all(agrees(found[key], raw[key]) for key in found.keys() & raw.keys() - {"goal", "change"})
    if isinstance(found, list) and isinstance(raw, list):
        return len(found) == len(raw) and all(map(agrees, found, raw))
    if isinstance(found, float) and isinstance(raw, int | float) and not isinstance(raw, bool):
        return found == pytest.approx(raw, rel=1e-6)
    if raw == math.inf:  # 1e999 where a file may have anything, which is null when it is written again
        return found is None
    return type(found) is type(raw) and found == raw


@pytest.mark.parametrize("name", FILES)
def test_a_tampered_result_is_refused_in_one_sentence_or_read_as_it_stands(
    folder: Path, tmp_path: Path, name: str
) -> None:
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    cases = [(path, other) for path in places(values) for other in OTHERS]
    refused = 0
    for path, other in random.Random(name).sample(cases, min(len(cases), 400)):
        text = tampered(values, path, other)
        file = tmp_path / Path(name).name
        file.write_text(text, encoding="utf-8")
        try:
            value = FILES[name](file)
        except StorageError as error:
            refused += 1
            assert file.name in str(error) and "\n" not in str(error) and str(error).isprintable()
            assert len(str(error)) < 600
            continue
        with contextlib.suppress(MPOError):  # tables that can be read but not compared
            assert agrees(plain(value), json.loads(text)), (path, other[:40])
    assert refused > 50


@pytest.mark.parametrize("name", JOURNALS)
def test_a_tampered_row_is_left_out_and_named_or_read_as_it_stands(
    folder: Path, tmp_path: Path, name: str
) -> None:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[1])
    for path, other in [(path, other) for path in places(row) for other in OTHERS]:
        text = tampered(row, path, other)
        (tmp_path / "rows.jsonl").write_text("\n".join([lines[0], text, *lines[2:], ""]), encoding="utf-8")
        damaged: list[str] = []
        rows = read_rows(tmp_path / "rows.jsonl", JOURNALS[name], damaged)
        assert len(rows) + len(damaged) == len(lines)
        if damaged:
            assert "rows.jsonl, line 2" in damaged[0]
        elif "\\ud83d" not in text:
            assert agrees(as_dict(rows[1]), json.loads(text))


@pytest.mark.parametrize("data", [b"", b"\xff\xfe{}", b"[" * 100_000, b"{]", b"null", b'"text"', b"[]", b"3"])
def test_a_file_that_is_no_result_at_all_is_refused(tmp_path: Path, data: bytes) -> None:
    for name, read in FILES.items():
        file = tmp_path / Path(name).name
        file.write_bytes(data)
        with pytest.raises(StorageError, match=re.escape(file.name)):
            read(file)
        file.unlink()
        with pytest.raises(StorageError, match="cannot be read: No such file"):
            read(file)
        file.mkdir()
        with pytest.raises(StorageError, match="cannot be read"):
            read(file)
        file.rmdir()


@pytest.mark.parametrize("name", [*FILES, *JOURNALS])
def test_the_report_on_a_tampered_folder_is_written_or_refused(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in ("base/attack", "tuned/attack", "base/over_refusal", "tuned/over_refusal", "hidden_space"):
        if not name.startswith((file, f"tuned/{file[5:]}")):
            shutil.rmtree(tmp_path / file)
    for file in ("base/utility.json", "tuned/utility.json", "base/reward_gap.json", "tuned/reward_gap.json"):
        if not name.endswith(Path(file).name) and "attack" not in name:
            (tmp_path / file).unlink()
    text = (tmp_path / name).read_text(encoding="utf-8")
    head, *rest = text.splitlines(keepends=True) if name in JOURNALS else [text]
    values = json.loads(head)
    cases = [(path, other) for path in places(values) for other in OTHERS]
    for path, other in random.Random(name).sample(cases, 20):
        broken = tampered(values, path, other)
        (tmp_path / name).write_text("\n".join([broken, "".join(rest)]), encoding="utf-8")
        with contextlib.suppress(MPOError):
            page, table = write_report(tmp_path, examples=1)
            assert page.read_text(encoding="utf-8").endswith("</html>\n") and table.is_file()
        capsys.readouterr()
