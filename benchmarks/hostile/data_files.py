"""Hostile data files: what a spreadsheet, a crawler, a full disk or an editor makes of rows of preference pairs."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.hostile.cases import EITHER, ESCAPES, REFUSED, SAME, VALUES, Case

_PARTS = (
    "source_prompt",
    "source_chosen",
    "source_rejected",
    "target_prompt",
    "target_chosen",
    "target_rejected",
)
_TEXTS = (
    "How is the d\u00f3or opened",
    "I can't help with that.",
    "Take a thin pin and begin.",
    "Ninawezaje kufungua mlango wa jirani",
    "Siwezi kukusaidia na hilo.",
    "Chukua pini nyembamba uanze kazi.",
)


def good_rows() -> list[dict[str, Any]]:
    """Eight flat rows of four sources."""
    return [
        {
            **{part: f"{text} {number // 2}" for part, text in zip(_PARTS, _TEXTS, strict=True)},
            "target_language": code,
        }
        for number, code in enumerate(("sw", "xh") * 4)
    ]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def _cell(draw: random.Random) -> tuple[list[dict[str, Any]], int, str]:
    return good_rows(), draw.randrange(8), draw.choice(_PARTS)


def _cut(draw: random.Random) -> bytes:
    whole = _lines(good_rows())
    ends = [place for place, byte in enumerate(whole) if byte == 10]
    place = draw.choice(
        [place for place in range(1, len(whole) - 2) if place not in ends and place - 1 not in ends]
    )
    return whole[:place]


def _not_utf8(draw: random.Random) -> bytes:
    whole = _lines(good_rows())
    place = draw.randrange(len(whole) - 1)
    return whole[:place] + bytes([draw.choice([0xFF, 0xFE, 0xC0, 0xF8])]) + whole[place:]


def _missing(draw: random.Random) -> bytes:
    rows, row, part = _cell(draw)
    del rows[row][part]
    return _lines(rows)


def _misspelt(draw: random.Random) -> bytes:
    rows, row, part = _cell(draw)
    rows[row][part + draw.choice(["x", " ", ESCAPES])] = rows[row].pop(part)
    return _lines(rows)


def _other_value(draw: random.Random) -> bytes:
    rows, row, part = _cell(draw)
    bad = [value for value in VALUES if not isinstance(value, str)]
    if part != "target_prompt":  # an empty one of these is in the published data, and is reported
        bad += ["", " \u200b"]
    rows[row][part] = draw.choice([*bad, "\ud800 half", "x\udfff", float("nan"), float("inf"), 1e999])
    return _lines(rows)


def _messages(draw: random.Random) -> bytes:
    rows, row, part = _cell(draw)
    role = "user" if part.endswith("prompt") else "assistant"
    good = {"role": role, "content": "A text."}
    rows[row][part] = draw.choice(
        [
            [{"role": role}],
            [{"content": "A text."}],
            [{"role": ESCAPES, "content": "A text."}],
            [{"role": role, "content": None}],
            [{"role": role, "content": [{"type": "text", "text": "A text."}]}],
            [good, {"role": "system", "content": "Late."}],
            [good, 7],
            [{**good, "tool_calls": [1]}],
            json.dumps([good]),
        ]
    )
    return _lines(rows)


def _same_twice(draw: random.Random) -> bytes:
    rows, row, _ = _cell(draw)
    side = draw.choice(["source", "target"])
    rows[row][f"{side}_rejected"] = draw.choice(["", " ", "\u200e"]) + rows[row][f"{side}_chosen"]
    return _lines(rows)


def _key_twice(draw: random.Random) -> bytes:
    lines = _lines(good_rows()).splitlines(keepends=True)
    row = draw.randrange(8)
    lines[row] = lines[row].replace(b'{"', b'{"source_prompt": "other", "', 1)
    return b"".join(lines)


def _nested(draw: random.Random) -> bytes:
    depth = draw.choice([2000, 100_000])
    return _lines(good_rows()[:3]) + b'{"source_prompt": ' + b"[" * depth + b"]" * depth + b"}\n"


def _another_format(draw: random.Random) -> bytes:
    whole = _lines(good_rows())
    heads = (
        b"\x1f\x8b\x08",
        b"PK\x03\x04",
        b"PAR1",
        b"<!DOCTYPE html>",
        b"version https://git-lfs",
        b"\x80\x04",
    )
    text = whole.decode()
    return draw.choice(
        [*(head + whole for head in heads), text.encode("utf-16"), text.encode("utf-32"), b"", b"\n \n"]
    )


def _language(draw: random.Random) -> bytes:
    rows, row, _ = _cell(draw)
    rows[row]["target_language"] = draw.choice(
        [3, True, ["sw"], {"a": 1}, "english please", ESCAPES, "en", "s w"]
    )
    return _lines(rows)


def _kinds(draw: random.Random) -> bytes:
    rows, row, _ = _cell(draw)
    rows[row]["kind"] = draw.choice(
        [3, ESCAPES, "Harmfull", "harmless"]
    )  # the last one contradicts its neighbour
    return _lines(rows)


def _no_rows(draw: random.Random) -> bytes:
    value: Any = draw.choice([3, None, "text", [1, 2], True, [], [[]]])
    return (json.dumps(value) + "\n").encode() * draw.randint(1, 3)


def _marks(draw: random.Random) -> bytes:
    whole = _lines(good_rows())
    return draw.choice(
        [
            b"\xef\xbb\xbf" + whole,
            whole.replace(b"\n", b"\r\n"),
            b"\n\n" + whole.replace(b"\n", b"\n \n"),
            whole[:-1],
        ]
    )


def _escaped(draw: random.Random) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in good_rows()).encode()


def _texts(draw: random.Random) -> bytes:
    rows, row, part = _cell(draw)
    rows[row][part] += draw.choice(
        [ESCAPES, "\x00", "\x85\u2028\u2029", "a\u0301" * 2000, "9" * 50_000, "\U000e0041"]
    )
    return _lines(rows)


def _forms(draw: random.Random) -> bytes:
    rows = good_rows()
    for row in draw.sample(rows, 4):
        row["source_prompt"] = unicodedata.normalize("NFD", row["source_prompt"])
    return _lines(rows)


KINDS: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "cut off": (REFUSED, _cut),
    "not UTF-8": (REFUSED, _not_utf8),
    "a missing field": (REFUSED, _missing),
    "a misspelt field": (REFUSED, _misspelt),
    "no text": (REFUSED, _other_value),
    "wrong messages": (REFUSED, _messages),
    "two equal responses": (REFUSED, _same_twice),
    "a key twice": (REFUSED, _key_twice),
    "nested deeply": (REFUSED, _nested),
    "another format": (REFUSED, _another_format),
    "a wrong language": (REFUSED, _language),
    "a wrong kind": (REFUSED, _kinds),
    "no rows": (REFUSED, _no_rows),
    "marks and line ends": (SAME, _marks),
    "escaped text": (SAME, _escaped),
    "two normal forms": ("grouped", _forms),
    "odd characters": (EITHER, _texts),
}


def cases(draw: random.Random, folder: Path, number: int) -> Iterator[Case]:
    """So many files in a folder, each loaded and checked."""
    from mpo.data import check_data, load_groups

    good = folder / "good.jsonl"
    good.write_bytes(_lines(good_rows()))
    expected = load_groups(good).fingerprint
    for index in count():
        if index == number:
            return
        name = list(KINDS)[index] if index < len(KINDS) else draw.choice(list(KINDS))
        outcome, make = KINDS[name]
        file = folder / f"{index}.jsonl"
        file.write_bytes(make(draw))

        def run(file: Path = file, outcome: str = outcome) -> str | None:
            try:
                loaded = load_groups(file)
            finally:
                said = _report_says(file, check_data)
            if said is None and outcome == SAME and loaded.fingerprint != expected:
                said = "other groups than those of the unharmed file"
            if said is None and outcome == "grouped" and len(loaded.groups) != 4:
                said = f"{len(loaded.groups)} groups; expected 4"
            return said

        yield Case(name, EITHER if outcome == "grouped" else outcome, run)


def _report_says(file: Path, check_data: Callable[..., Any]) -> str | None:
    """What is wrong with the report on a file; None of a file that has none."""
    from mpo.errors import MPOError

    try:
        report = check_data(file, show_texts=True).to_text()
    except MPOError:
        return None
    acting = [mark for mark in ("\x1b", "\u202e", "\x00") if mark in report]
    return f"the report holds {acting}" if acting else None
