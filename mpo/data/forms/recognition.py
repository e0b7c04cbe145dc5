"""Which form a row has, by its columns and the kinds of their values. A row's texts are never quoted."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpo.data.contract import PARTS
from mpo.data.forms.readers import (
    PROMPT_COLUMNS,
    Reader,
    holds_turns,
    prompt_column,
    read_completions,
    read_conversations,
    read_dialogs,
    read_labelled,
    read_output_list,
    read_pair,
    read_prompt,
    read_safe_rlhf,
    read_shared_beginning,
)
from mpo.data.languages import LANGUAGES

_SIDES = tuple(f"{side}_{part}" for side in ("source", "target") for part in (*PARTS, "conversations"))


@dataclass(frozen=True)
class Form:
    """A form in which prompts or pairs are published.

    Attributes:
        name: Its short name.
        title: What a file in it holds, for a sentence that begins "holds".
        fits: Whether a row without empty fields has this form.
        read: Reads one row.
        pairs: Whether the rows have two responses to prefer one of.
        guessed: Whether the end of the prompt is only guessed.
    """

    name: str
    title: str
    fits: Callable[[Mapping[Any, Any]], bool]
    read: Reader
    pairs: bool = True
    guessed: bool = False


def _ranked(row: Mapping[Any, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _either(row: Mapping[Any, Any]) -> bool:
    return "chosen" in row or "rejected" in row


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _has_prompt(row: Mapping[Any, Any]) -> bool:
    return prompt_column(row.keys()) is not None


def _conversations(row: Mapping[Any, Any]) -> bool:
    return not _has_prompt(row) and any(_is_list(row.get(n)) for n in ("conversations", "messages"))


def _is_language(column: object) -> bool:
    # A column `id` is hardly ever Indonesian.
    return isinstance(column, str) and len(column) == 2 and column != "id" and column in LANGUAGES


def _scored(row: Mapping[Any, Any]) -> bool:
    completions = row.get("completions")
    return _is_list(completions) and any(isinstance(each, Mapping) for each in completions or ())


FORMS: tuple[Form, ...] = (
    Form(
        "safe-rlhf",
        "PKU-SafeRLHF's pairs (`prompt`, `response_0`, `response_1`, `is_response_0_safe`)",
        lambda row: "response_0" in row and "response_1" in row,
        read_safe_rlhf,
    ),
    Form(
        "ultrafeedback-completions",
        "UltraFeedback's prompts with scored `completions`",
        lambda row: _has_prompt(row) and _scored(row),
        read_completions,
    ),
    Form(
        "sharegpt-ranking",
        "LLaMA-Factory's ranking on ShareGPT conversations (`conversations`, `chosen`, `rejected`)",
        lambda row: _is_list(row.get("conversations")) and _either(row) and not _has_prompt(row),
        read_pair,
    ),
    Form(
        "alpaca-ranking",
        "LLaMA-Factory's ranking (`instruction`, and two answers in `output`)",
        lambda row: "instruction" in row and _is_list(row.get("output")),
        read_output_list,
    ),
    Form(
        "alpaca-pairs",
        "LLaMA-Factory's ranking (`instruction`, `chosen`, `rejected`)",
        lambda row: "instruction" in row and "prompt" not in row and _ranked(row),
        read_pair,
    ),
    Form(
        "ultrafeedback",
        "UltraFeedback's pairs (`prompt`, and `chosen` and `rejected` as whole conversations)",
        lambda row: isinstance(row.get("prompt"), str) and _ranked(row) and _is_list(row["chosen"]),
        read_pair,
    ),
    Form(
        "trl",
        "preference pairs with a prompt, as TRL takes them (`prompt`, `chosen`, `rejected`)",
        lambda row: _has_prompt(row) and _ranked(row),
        read_pair,
    ),
    Form(
        "half-pairs",
        "prompts with one response each (`chosen` or `rejected` alone)",
        lambda row: _has_prompt(row) and _either(row),
        read_pair,
        pairs=False,
    ),
    Form(
        "hh",
        "HH-RLHF's dialogs (`chosen` and `rejected` with turns of `Human:` and `Assistant:`)",
        lambda row: _ranked(row) and (holds_turns(row["chosen"]) or holds_turns(row["rejected"])),
        read_dialogs,
    ),
    Form(
        "trl-implicit",
        "preference pairs as TRL takes them, whose prompt is what `chosen` and `rejected` begin with",
        lambda row: _ranked(row) and _is_list(row["chosen"]),
        read_conversations,
    ),
    Form(
        "trl-implicit-text",
        "preference pairs as TRL takes them, whose prompt is the text that `chosen` and `rejected` begin with",
        _ranked,
        read_shared_beginning,
        guessed=True,
    ),
    Form(
        "trl-unpaired",
        "TRL's unpaired answers (`prompt`, `completion`, `label`)",
        lambda row: _has_prompt(row) and "completion" in row and "label" in row,
        read_labelled,
        pairs=False,
    ),
    Form(
        "beavertails",
        "BeaverTails' answers (`prompt`, `response`, `is_safe`)",
        lambda row: _has_prompt(row) and "response" in row and "is_safe" in row,
        read_labelled,
        pairs=False,
    ),
    Form(
        "sharegpt-unpaired",
        "LLaMA-Factory's unpaired answers (`conversations` or `messages`, with a `label` or `kto_tag` that is true or false)",
        lambda row: _conversations(row) and any(isinstance(row.get(n), bool) for n in ("label", "kto_tag")),
        read_labelled,
        pairs=False,
    ),
    Form(
        "conversations",
        "conversations without a preference (`conversations` or `messages`)",
        lambda row: _conversations(row),
        read_prompt,
        pairs=False,
    ),
    Form("prompts", "prompts alone", _has_prompt, read_prompt, pairs=False),
    Form(
        "wide-prompts",
        "prompts alone, with a column per language",
        lambda row: len(language_columns(row)) > 1,
        read_prompt,
        pairs=False,
    ),
)
"""All forms, the more special ones first: the first that fits is taken."""

_COMMON = frozenset(
    (
        *PROMPT_COLUMNS,
        "conversations",
        "messages",
        "system",
        "system_prompt",
        "input",
        "history",
        "tools",
        "language",
        "lang",
    )
)
_ANSWERS = frozenset(("chosen", "rejected", "score_chosen", "score_rejected"))
_PAIRED = frozenset(f"{a}{i}{b}" for i in (0, 1) for a, b in (("response_", ""), ("is_response_", "_safe")))
_READ: dict[str, frozenset[str]] = {
    "safe-rlhf": _PAIRED | {"safer_response_id"},
    "ultrafeedback-completions": frozenset({"completions"}),
    "alpaca-ranking": frozenset({"output"}),
    "hh": _ANSWERS,
    "trl-implicit": _ANSWERS,
    "trl-implicit-text": _ANSWERS,
    "trl-unpaired": frozenset({"completion", "label"}),
    "beavertails": frozenset({"response", "is_safe"}),
    "sharegpt-unpaired": frozenset({"label", "kto_tag"}),
}
_KNOWN = frozenset({"id", "prompt_id", "kind"}).union(_COMMON, _ANSWERS, *_READ.values())


def language_columns(row: Mapping[Any, Any]) -> list[str]:
    """Columns called like a language that hold texts."""
    return [name for name, value in row.items() if _is_language(name) and isinstance(value, str)]


def is_group(row: object) -> bool:
    """Whether a row is meant to be one of :mod:`mpo.data.contract`: a group, or a flat row with a source and a target."""
    if not isinstance(row, Mapping):
        return False
    targets = "targets" in row and not isinstance(row["targets"], str)
    return targets or isinstance(row.get("source"), Mapping) or any(name in row for name in _SIDES)


def as_columns(row: Any, kept: Collection[str] = ()) -> Any:
    """A row under the names of columns that readers know.

    A text alone is a prompt, and ``Prompt`` or ``CHOSEN`` are ``prompt`` and ``chosen`` where the row has no such column besides.

    Args:
        row: Anything that stands for a row.
        kept: Columns that keep their names.
    """
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping):
        return row
    known = {
        name: plain
        for name in row
        if isinstance(name, str)
        and name not in kept
        and (plain := name.strip().lower()) != name
        and plain in _KNOWN
        and plain not in row
    }
    return {known.get(name, name): value for name, value in row.items()} if known else row


def unread_columns(form: Form, columns: Iterable[str]) -> list[str]:
    """Columns that a form's reader does not look at."""
    if form.name == "wide-prompts":
        return []
    read = _COMMON | _READ.get(form.name, _ANSWERS if form.read is read_pair else frozenset())
    return sorted(name for name in columns if name not in read)


def form_of(row: object) -> Form | None:
    """The form of a row; None for groups, and where no form fits."""
    if not isinstance(row, Mapping) or is_group(row):
        return None
    filled = {key: value for key, value in row.items() if not is_empty(value)}
    return next((form for form in FORMS if form.fits(filled)), None)


def other_form(row: object) -> Form | None:
    """The form of a row where groups are expected. A column ``text`` alone says too little to call it prompts."""
    row = as_columns(row) if isinstance(row, Mapping) else row
    if isinstance(row, Mapping) and "text" in row:
        row = {name: value for name, value in row.items() if name != "text"}
    return form_of(row)


def header_of(rows: Iterable[object]) -> dict[Any, Any]:
    """All columns of some rows, each with its first value that is there."""
    header: dict[Any, Any] = {}
    for row in rows:
        if isinstance(row, Mapping):
            for name, value in row.items():
                if is_empty(header.get(name)):
                    header[name] = None if is_empty(value) else value
    return header


def is_empty(value: object) -> bool:
    """Null, an empty cell, an empty list."""
    if value is None or value != value:
        return True
    return isinstance(value, (str, list, tuple)) and not value


def advice(form: Form, name: str, row: object) -> str:
    """What to say where groups are needed and a file has another form.

    Args:
        form: The form of its rows.
        name: How the file is called.
        row: One of them.
    """
    # Data handed over in Python have no name to give.
    file = shlex.quote(name) if "." in name or "/" in name else "FILE"
    if is_plain(form):
        made = f"of this file: `mpo data build {_build_words(form, file, row)}`"
    else:
        made = f"of plain rows such as `mpo data convert {file} --output pairs.jsonl` writes"
    return (
        f"holds {form.title}. Groups are needed here: a pair and its translations. `mpo data build` makes them, {made}; where there "
        "is a file per language with both answers, `mpo data convert FILE FILE --key id --output groups.jsonl` joins them."
    )


def _build_words(form: Form, file: str, row: object) -> str:
    """What makes groups of a file as it is: a recipe of a build, and what is changed in it."""
    columns = row if isinstance(row, Mapping) else {}
    unsaid = " --prompts.kind harmful" if is_empty(columns.get("kind")) else ""
    if form.pairs:
        return f"data/build --prompts.data {file}{unsaid} --answers.chosen column --answers.rejected column"
    if "texts" in columns or len(LANGUAGES.keys() & columns.keys()) > 1:  # nothing has to be translated
        return f"data/refuse_or_answer --prompts.data {file} starter-harmless starter-everyday --model.model MODEL"
    return f"data/build --prompts.data {file} starter-harmless{unsaid} --model.model MODEL"


def is_plain(form: Form) -> bool:
    """Whether a build takes rows of a form without their conversion: what they hold stands in columns that it reads."""
    return form.read in (read_pair, read_prompt) and form.name not in ("sharegpt-ranking", "conversations")


def known_columns() -> str:
    """The columns by which forms are recognised, for errors."""
    return (
        "Expected a prompt ("
        + ", ".join(f"`{name}`" for name in PROMPT_COLUMNS)
        + ", `conversations` or `messages`), "
        "with `chosen` and `rejected` where there are responses; see docs/data.md"
    )
