"""Recipes as text, before and after a schema gives them types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.common.typed_yaml import UNKNOWN, Document, Key, beside
from mpo.errors import ConfigError

TOKEN = "hf_" + "a1B2" * 8


@dataclass(frozen=True)
class Part:
    name: str
    count: int = 1
    share: float | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"`count` is {self.count}; expected a number from 0.")


@dataclass(frozen=True)
class Whole:
    first: Part
    parts: tuple[Part, ...] = ()
    named: dict[str, Part] = field(default_factory=dict)
    extra: Part | None = None
    words: list[str] | None = None
    numbers: tuple[int, ...] = (1, 2)
    range: tuple[int, float] = (0, 1.0)
    mode: Literal["fast", "slow"] = "fast"
    weights: dict[str, float] = field(default_factory=dict)
    open: Mapping[str, Any] | None = None
    either: int | float = 1
    place: str | None = None
    made: Part = field(default_factory=lambda: Part("made", 7))


Read = Callable[..., Whole]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def _read(text: str, *overrides: str) -> Whole:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        return Document(path, overrides, noun="a whole", paths=frozenset({"place"})).build(Whole)

    return _read


# ---------------------------------------------------------------------------------------------------------------- types


def test_values_take_the_types_of_nested_fields(read: Read) -> None:
    whole = read(
        "first: {name: no, count: 1e2, share: 1, flag: on}\n"
        "parts:\n- name: a\n- {name: b, share: null}\n"
        "named: {x.y: {name: '7'}}\nextra: ~\nwords: on\nnumbers: 3\nrange: [1, 2]\nmode: slow\n"
        "weights: {no: 1}\nopen: {a: no, b: 1e1, c: [true, ~]}\neither: 2.0\n"
    )
    assert whole.first == Part("no", 100, 1.0, True)
    assert whole.parts == (Part("a"), Part("b"))
    assert whole.named == {"x.y": Part("7")} and whole.extra is None
    assert (whole.words, whole.numbers, whole.range, whole.mode) == (["on"], (3,), (1, 2.0), "slow")
    assert whole.weights == {"no": 1.0} and isinstance(whole.weights["no"], float)
    assert whole.open == {"a": "no", "b": 10.0, "c": [True, None]}
    assert whole.either == 2.0 and isinstance(whole.either, float)


def test_one_entry_may_stand_for_a_list_and_an_empty_section_for_its_default(read: Read) -> None:
    assert read("first: {name: a}\nparts: {name: b}\nextra:\n").parts == (Part("b"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mode: quick", "line 2: `mode` is 'quick'; expected 'fast' or 'slow'."),
        ("range: [1, 2, 3]", "line 2: `range` is ['1', '2', '3']; expected a list of whole numbers (2 of them)."),
        ("numbers: [1, x]", "line 2: `numbers` is ['1', 'x']; expected a list of whole numbers."),
        ("weights:\n  a: 1\n  b: x", "line 4: `weights` is {'a': '1', 'b': 'x'}; expected a mapping of numbers."),
        ("named: {a: b}", "line 2: `named.a` is 'b'; expected indented lines"),
        ("named: [a]", "line 2: `named` is ['a']; expected a mapping."),
        ("parts: [{name: a}, {count: 1}]", "line 2: `parts.1` needs `name`."),
        ("parts:\n- name: a\n  count: x", "line 4: `parts.0.count` is 'x'; expected a whole number."),
        ("extra: {name: a, count: [1]}", "line 2: `extra.count` is ['1']; expected one value, a whole number."),
        ("extra:\n  name: a\n  count: -1", "line 4: `extra`: `count` is -1; expected a number from 0."),
        ("extra:\n  nmae: a", "line 3: `extra.nmae` is not a key of a whole; the nearest is `extra.name`."),
        ("first: {name: b}", "line 2: `first` is set twice"),
        ("zzzzzz: 1", "All keys: `mpo keys --of whole`."),
    ],
)  # fmt: skip
def test_a_single_mistake_is_one_sentence_with_its_own_line(read: Read, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(f"first: {{name: a}}\n{text}\n")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [(), ("--made.share", "0.5")])
def test_a_mapping_that_is_there_by_default_keeps_what_is_not_set_anew(
    read: Read, words: tuple[str, ...]
) -> None:
    share = 0.5 if words else None
    assert read("first: {name: a}", *words).made == Part("made", 7, share)
    assert read("first: {name: a}\nmade: {flag: true}", *words).made == Part("made", 7, share, True)


def test_what_is_missing_is_named(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"r\.yaml: a whole needs `first`\."):
        read("mode: slow\n")


def test_a_key_of_unknown_type_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: [1, {b: c}]\n", encoding="utf-8")
    assert set(Document(path).values({"a": Key("a", UNKNOWN)})) == {"a"}
    with pytest.raises(ConfigError, match="`b` is not a key"):
        Document(path, ["--b", "1"]).values({"a": Key("a", UNKNOWN)})


_NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=8)
_PARTS = st.builds(
    Part,
    name=_NAMES,
    count=st.integers(0, 10**9),
    share=st.none() | st.floats(-1e6, 1e6),
    flag=st.booleans(),
)
_WHOLES = st.builds(
    Whole,
    first=_PARTS,
    parts=st.lists(_PARTS, max_size=3).map(tuple),
    named=st.dictionaries(st.sampled_from(["a", "b.c", "no", "1"]), _PARTS),
    extra=st.none() | _PARTS,
    words=st.none() | st.lists(_NAMES, min_size=1, max_size=3),
    numbers=st.lists(st.integers(-9, 9), max_size=3).map(tuple),
    range=st.tuples(st.integers(-9, 9), st.floats(0, 1)),
    mode=st.sampled_from(["fast", "slow"]),
    weights=st.dictionaries(st.sampled_from(["sw", "no"]), st.floats(0, 9)),
    open=st.none() | st.just({}) | st.just({"x": [1, None, "no", {"y": 0.5}]}),
    either=st.integers(0, 9) | st.floats(0.25, 0.75),
)


def plain(value: Any) -> Any:
    if isinstance(value, (Part, Whole)):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@given(_WHOLES)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, whole: Whole) -> None:
    path = tmp_path_factory.mktemp("round") / "r.yaml"
    path.write_text(yaml.safe_dump(plain(whole), allow_unicode=True), encoding="utf-8")
    assert Document(path).build(Whole) == whole


@given(_WHOLES)
@settings(max_examples=60, deadline=None)
def test_the_command_line_says_the_same_as_the_file(
    tmp_path_factory: pytest.TempPathFactory, whole: Whole
) -> None:
    """As one YAML text for each key, and entry by entry."""
    path = tmp_path_factory.mktemp("words") / "r.yaml"
    path.write_text(
        f"first: {{name: x}}\nnamed: {{{', '.join(f'{n!r}: {{name: x}}' for n in whole.named)}}}\n"
    )
    words = ["--range", *map(str, whole.range), f"--mode={whole.mode}", "--either", str(whole.either)]
    words += ["--first.count", str(whole.first.count)] + ["--first.flag"] * whole.first.flag
    for name, part in whole.named.items():
        words += [f"--named.{name}.share={'null' if part.share is None else part.share}"]
    for name in ("parts", "open", "weights"):
        words += [
            f"--{name}",
            yaml.safe_dump(plain(getattr(whole, name)), default_flow_style=True).partition("\n...")[0],
        ]
    built = Document(path, words).build(Whole)
    for name in ("range", "mode", "either", "parts", "weights", "open"):
        assert getattr(built, name) == getattr(whole, name)
    assert built.first == Part("x", whole.first.count, None, whole.first.flag)
    assert {n: p.share for n, p in built.named.items()} == {n: p.share for n, p in whole.named.items()}


# ------------------------------------------------------------------------------------------------------- all at once

_WRONG = {
    "modde": "`modde` is not a key of a whole",
    "numbers: x": "`numbers` is 'x'",
    "either: much": "`either` is 'much'",
    "mode: 1": "`mode` is '1'",
    "extra: {count: 1}": "`extra` needs `name`",
    "named: {a: {nam: 1}}": "`named.a.nam` is not a key",
    "words: {a: 1}": "`words` is {'a': '1'}",
    "place: !secret x": "the tag '!secret' is not accepted",
    f"weights: {{a: {TOKEN}}}": "the value of `weights.a` looks like a token",
    "parts: [{name: a, count: -2}]": "`parts.0`: `count` is -2",
}


@given(
    st.permutations(sorted(_WRONG)).flatmap(lambda all_: st.integers(2, len(all_)).map(lambda n: all_[:n]))
)
@settings(max_examples=40, deadline=None)
def test_all_mistakes_are_reported_at_once_each_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("wrong") / "r.yaml"
    texts = [line if ":" in line else f"{line}: 1" for line in lines]
    path.write_text("first: {name: a}\n" + "\n".join(texts) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        Document(path, ["--frist", "1"], noun="a whole").build(Whole)
    head, *found = str(caught.value).splitlines()
    assert head == f"{len(lines) + 1} settings are wrong:" and len(found) == len(lines) + 1
    for number, line in enumerate(lines, 2):
        assert any(f"{path}, line {number}: {_WRONG[line]}" in text for text in found), line
    assert any(text.startswith("  command line: `frist` is not a key") for text in found)
    assert TOKEN not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- overrides


def test_entries_of_lists_and_of_names_with_dots_can_be_set(read: Read) -> None:
    text = "first: {name: a}\nparts: [{name: b}, {name: c}]\nnamed: {v3.1: {name: d}}\n"
    whole = read(text, "--parts.1.count", "5", "--named.v3.1.flag", "--named.new.name=e", "--extra.name", "f")
    assert whole.parts == (Part("b"), Part("c", 5))
    assert whole.named == {"v3.1": Part("d", flag=True), "new": Part("e")}
    assert whole.extra == Part("f")
    whole = read(text, "--parts.0", "{name: g, count: 2}", "--extra", "{name: '{h}'}", "--named.i={name: j}")
    assert whole.parts == (Part("g", 2), Part("c")) and whole.extra == Part("{h}")
    assert whole.named["i"] == Part("j")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts.2.name", "x"], "`--parts.2.name`: there is no entry '2'; expected a number below 1."),
        (["--parts.b.name", "x"], "there is no entry 'b'"),
        (["--mode.x", "1"], "`--mode.x` sets an entry of a mapping, but the recipe sets the whole to 'slow'"),
        (["--either.x", "1"], "`--either.x` sets an entry of a mapping, but `either` takes a whole number or a number"),
        (["--named.a.count"], "`--named.a.count` needs a value: a whole number"),
        (["--first..name", "x"], "names no key"),
        (["--parts", "[{name: a}"], "this is not valid YAML"),
        ([TOKEN], "stands alone"),
    ],
)  # fmt: skip
def test_an_override_that_leads_nowhere_is_explained(read: Read, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read("first: {name: a}\nmode: slow\nparts: [{name: b}]\nnamed: {a: {name: b}}\n", *words)
    assert message in str(caught.value) and TOKEN not in str(caught.value)


# --------------------------------------------------------------------------------------------- secrets and terminals


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"words: [a, {TOKEN}]", []),
        (f"either: {TOKEN}", []),
        (f"first: {{name: b, count: {TOKEN}}}", []),
        (f"parts: [{{name: {TOKEN}}}]", []),
        ("open: {deep: {api_key: 0123456789}}", []),
        ("hub_token: 0123456789", []),
        (f"{TOKEN}: 1", []),
        (f"extra: {{name: a, {TOKEN}: 1}}", []),
        ("", ["--open.api_key", "0123456789"]),
        ("", ["--open", f"{{a: [{TOKEN}]}}"]),
        ("", ["--open", "{token: '0123456789'}"]),
        ("", ["--extra.name", TOKEN]),
    ],
)
def test_a_secret_is_refused_wherever_it_stands_and_not_repeated(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(("" if text.startswith("first") else "first: {name: a}\n") + text, encoding="utf-8")
    with pytest.raises(ConfigError, match="environment variable") as caught:
        Document(path, words).build(Whole)
    assert TOKEN not in str(caught.value) and "0123456789" not in str(caught.value)


@pytest.mark.parametrize("name", ["\x1b[31mred", "\u202eevil", "a\x07"])
def test_nothing_that_acts_on_a_terminal_is_printed(read: Read, name: str) -> None:
    quoted = '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
    for text in (
        f"{quoted}: 1",
        f"open: {{a: 1}}\nextra: {{{quoted}: 1}}",
        f"mode: {quoted}",
        f"named: {{{quoted}: x}}",
    ):
        with pytest.raises(ConfigError) as caught:
            read(f"first: {{name: a}}\n{text}\n")
        assert all(c.isprintable() or c == "\n" for c in str(caught.value))
    with pytest.raises(ConfigError) as caught:
        read("first: {name: a}\n", f"--{name}", "1", name)
    assert re.fullmatch(r"[ -~\n]+", str(caught.value))


# -------------------------------------------------------------------------------------------------------------- paths


def test_a_file_beside_the_recipe_is_found_and_one_here_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = tmp_path / "recipes", tmp_path / "here"
    for place in (folder, here):
        place.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    (folder / "a.txt").touch()
    assert beside("a.txt", folder) == str(folder / "a.txt")
    assert beside({"en": ["a.txt", "b.txt"]}, folder) == {"en": [str(folder / "a.txt"), "b.txt"]}
    (here / "a.txt").touch()
    assert beside("a.txt", folder) == "a.txt"
    assert beside("~/recipes/a.txt", folder) == str(folder / "a.txt")
    for text in ("", "org/name", "{{ messages }}" * 500, "~nobody-of-this-name/x", "a\0b", None, 3):
        assert beside(text, folder) == text
    (folder / "r.yaml").write_text("first: {name: a}\nplace: c.txt\n")
    (folder / "c.txt").touch()
    whole = Document(folder / "r.yaml", paths=frozenset({"place"})).build(Whole)
    assert whole.place == str(folder / "c.txt") and whole.first.name == "a"


def test_a_missing_recipe_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "llama.yaml").touch()
    with pytest.raises(ConfigError, match=r"There is no recipe .*lama\.yaml\. Recipes here: .*llama\.yaml\."):
        Document(tmp_path / "lama.yaml")
