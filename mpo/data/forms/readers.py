"""One reader per form: a row as it was published becomes a prompt with the responses that it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from mpo.common.words import show_name
from mpo.data.contract import (
    _check_text,
    _describe,
    _message,
    _messages,
    _Place,
    _required,
    messages_identity,
    messages_text,
    same_response,
)

Messages = list[dict[str, str]]

PROMPT_COLUMNS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "text",
    "goal",
    "behavior",
    "forbidden_prompt",
)
"""Columns in which a prompt is looked for, in this order."""

LABEL_COLUMNS = ("label", "kto_tag", "is_safe")
"""Columns that say whether the only answer of a row is a good one."""

# Where a written dialog changes its speaker. In HH-RLHF an empty line stands before each turn, and an answer may quote a dialog
# that has none; elsewhere turns follow each other.
_TURN = re.compile(r"(?:\A|\n)\s*(Human|Assistant)\s*:[ \t]*")
_PARTED_TURN = re.compile(r"(?:\A|\n[ \t]*\n)\s*(Human|Assistant)\s*:[ \t]*")
# What chat templates put around a turn.
TEMPLATE_MARKS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id)\|>|<(?:start|end)_of_turn>|\[/?INST\]"
)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PlainRow:
    """A prompt and the responses that stand beside it.

    Attributes:
        prompt: Messages, the last of them the user's.
        chosen: Messages of the assistant, or None where the row has none.
        rejected: Messages of the assistant, or None where the row has none.
    """

    prompt: Messages
    chosen: Messages | None = None
    rejected: Messages | None = None

    def messages(self) -> Iterator[dict[str, str]]:
        """All messages."""
        for part in (self.prompt, self.chosen, self.rejected):
            yield from part or ()

    def to_dict(self) -> dict[str, Any]:
        """The plain form: a single message is its text, and a response that is not there has no key."""
        parts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return {
            part: messages[0]["content"] if len(messages) == 1 else messages
            for part, messages in parts.items()
            if messages is not None
        }


Reader = Callable[[Mapping[Any, Any], "_Place", AbstractSet[str]], PlainRow]
"""Takes a row, its place, and the columns that the file has; what the file has the row must have."""


def holds_marks(text: str) -> bool:
    """Whether marks that chat templates put around a turn stand in a text."""
    return TEMPLATE_MARKS.search(text) is not None


def holds_turns(value: object) -> bool:
    """Whether a text is a written dialog: turns of ``Human:`` and ``Assistant:``."""
    return isinstance(value, str) and {found[1] for found in _TURN.finditer(value)} == {*_SPEAKERS}


def prompt_column(columns: AbstractSet[str]) -> str | None:
    """The column that holds the prompt."""
    return next((name for name in PROMPT_COLUMNS if name in columns), None)


def read_pair(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """A prompt in a column of its own, with ``chosen``, ``rejected`` or both.

    Covers TRL's pairs with an explicit prompt, UltraFeedback's (whose responses repeat the prompt), LLaMA-Factory's (whose
    prompt is ``instruction`` and ``input``, or ``conversations``) and prompts written as dialogs.
    """
    prompt = _prompt(row, place, columns)
    chosen, rejected = (
        _response(row, name, prompt, place, columns) if name in columns else None
        for name in ("chosen", "rejected")
    )
    _check_scores(row, place)
    return _different(PlainRow(prompt, chosen, rejected), place.at("rejected"))


def read_output_list(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """LLaMA-Factory's older ranking: ``output`` is a list of the better and the worse answer."""
    where = place.at("output")
    output = _required(row, "output", place, columns)
    if not isinstance(output, (list, tuple)) or len(output) != 2:
        found = f"a list of {len(output)}" if isinstance(output, (list, tuple)) else _describe(output)
        raise where.error(f"is {found}; expected a list of two texts, the better answer first.")
    chosen, rejected = (_messages(text, where.at(i), role="assistant") for i, text in enumerate(output))
    return _different(PlainRow(_prompt(row, place, columns), chosen, rejected), where.at(1))


def read_dialogs(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """HH-RLHF: two written dialogs that differ in their last answer."""
    turns = [_turns(_text(row, name, place, columns), place.at(name)) for name in ("chosen", "rejected")]
    return _parted(turns, place)


def read_conversations(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """TRL's pairs with an implicit prompt: two lists of messages that begin alike."""
    both = []
    for name in ("chosen", "rejected"):
        value, where = _required(row, name, place, columns), place.at(name)
        if isinstance(value, Mapping) or not isinstance(value, (list, tuple)):
            raise where.error(f"is {_describe(value)}; expected a list of messages, as in the other rows.")
        both.append(_conversation(value, where))
    return _parted(both, place)


def read_shared_beginning(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """TRL's texts with an implicit prompt: what both begin with, up to its last line break, or else its last blank."""
    chosen, rejected = (_text(row, name, place, columns) for name in ("chosen", "rejected"))
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if end is None:
        end = min(len(chosen), len(rejected))
        if len(chosen) == len(rejected):
            raise place.at("rejected").error(
                "equal to chosen. A preference pair needs two different responses."
            )
    shared = chosen[:end]
    cut = shared.rfind("\n") if "\n" in shared.strip() else shared.rfind(" ")
    if cut < 1 or not shared[:cut].strip():
        raise place.at("rejected").error(
            "shares no beginning with chosen, and the row has no prompt. Add a column `prompt`."
        )
    answers = [
        _messages(text[cut:].strip(), place.at(name), role="assistant")
        for name, text in (("chosen", chosen), ("rejected", rejected))
    ]
    prompt = _messages(shared[:cut].strip(), place.at("chosen"), role="user")
    return _different(PlainRow(prompt, *answers), place.at("rejected"))


def read_safe_rlhf(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """PKU-SafeRLHF: two responses, each called safe or not, and which is the safer.

    The safer one is ``chosen`` if it is safe, the other ``rejected`` if it is not: an unsafe response is no model to follow,
    and a safe one none to avoid.
    """
    prompt = _prompt(row, place, columns)
    responses = [_response(row, f"response_{i}", prompt, place, columns) for i in (0, 1)]
    safe = []
    for i in (0, 1):
        name = f"is_response_{i}_safe"
        value = _required(row, name, place, columns)
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # a CSV file
            value = value.strip().lower() == "true"
        if value not in (True, False):
            raise place.at(name).error(f"is {_describe(value)}; expected true or false.")
        safe.append(bool(value))
    safer = _safer(row, place, safe)
    made = PlainRow(
        prompt,
        responses[safer] if safe[safer] else None,
        responses[1 - safer] if not safe[1 - safer] else None,
    )
    return _different(made, place.at(f"response_{1 - safer}"))


def read_completions(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """UltraFeedback: several completions with scores; the best is chosen, the worst rejected, of equals the first.

    A prompt whose completions all have the same score stays without responses.
    """
    prompt = _prompt(row, place, columns)
    where = place.at("completions")
    completions = _required(row, "completions", place, columns)
    if not isinstance(completions, (list, tuple)) or not completions:
        raise where.error(
            f"is {_describe(completions) if completions else 'empty'}; expected a list of completions."
        )
    scored = []
    for index, completion in enumerate(completions):
        at = where.at(index)
        if not isinstance(completion, Mapping):
            raise at.error(f"is {_describe(completion)}; expected an object with `response` and a score.")
        answer = _messages(
            _required(completion, "response", at, completion), at.at("response"), role="assistant"
        )
        scored.append((_score(completion, at), answer))
    best, worst = max(scored, key=lambda item: item[0]), min(scored, key=lambda item: item[0])
    if best[0] == worst[0]:
        return PlainRow(prompt)
    return _different(PlainRow(prompt, best[1], worst[1]), where)


def read_labelled(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """One answer that is called good or bad: TRL's and LLaMA-Factory's unpaired rows, BeaverTails."""
    if (name := next((n for n in ("completion", "response") if n in columns), None)) is not None:
        prompt = _prompt(row, place, columns)
        completion = _response(row, name, prompt, place, columns)
    else:
        name = "conversations" if "conversations" in columns else "messages"
        messages = _conversation(_required(row, name, place, columns), place.at(name))
        end = len(messages)
        while end and messages[end - 1]["role"] == "assistant":
            end -= 1
        if end == len(messages):
            raise place.at(name).error("does not end with an answer.")
        prompt = _checked_prompt([*_system(row, place, messages), *messages[:end]], place.at(name))
        completion = _messages(messages[end:], place.at(name), role="assistant")
    name = next((n for n in LABEL_COLUMNS if n in columns), LABEL_COLUMNS[0])
    label = _required(row, name, place, columns)
    if isinstance(label, str) and label.strip().lower() in ("true", "false", "1", "0"):
        label = label.strip().lower() in ("true", "1")
    if label not in (True, False):
        raise place.at(name).error(f"is {_describe(label)}; expected true or false.")
    return PlainRow(prompt, completion, None) if label else PlainRow(prompt, None, completion)


def read_prompt(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> PlainRow:
    """A prompt alone; an answer beside it, or at the end of a conversation, is no preference and is left out."""
    return PlainRow(_prompt(row, place, columns))


def read_column(row: Mapping[Any, Any], column: str, place: _Place) -> PlainRow:
    """The prompt of one column, where there is one per language."""
    return PlainRow(_messages(_required(row, column, place, row), place.at(column), role="user"))


def _prompt(row: Mapping[Any, Any], place: _Place, columns: AbstractSet[str]) -> Messages:
    _refuse_tools(row, place)
    for name in ("conversations", "messages"):
        if name in columns and prompt_column(columns) is None:
            where = place.at(name)
            value = _required(row, name, place, columns)
            messages = _conversation(value, where)
            if not {"chosen", "rejected"} & columns:
                while messages and messages[-1]["role"] == "assistant":
                    messages.pop()
                if not messages:
                    raise where.error("holds no message of the user.")
            return _checked_prompt([*_system(row, place, messages), *messages], where)
    name = prompt_column(columns) or "prompt"
    value, where = _required(row, name, place, columns), place.at(name)
    if holds_turns(value) or (isinstance(value, str) and value.rstrip().endswith("\nAssistant:")):
        messages = _turns(value, where, open_end=True)
    elif name == "instruction" and isinstance(value, str):
        text = _check_text(value, where)
        more = row.get("input")
        if isinstance(more, str) and more.strip():
            text = f"{text}\n{more}"
        messages = [*_history(row, place), *_messages(text, where, role="user")]
    else:
        messages = _messages(value, where, role="user")
    return _checked_prompt([*_system(row, place, messages), *messages], where)


def _checked_prompt(messages: Messages, place: _Place) -> Messages:
    return _messages(messages, place, role="user")


def _system(row: Mapping[Any, Any], place: _Place, messages: Messages) -> Messages:
    value = next((row[name] for name in ("system", "system_prompt") if row.get(name)), None)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if messages and messages[0]["role"] == "system":
        raise place.at("system").error("the conversation has a system message of its own. Keep one.")
    return [{"role": "system", "content": _check_text(value, place.at("system"))}]


def _history(row: Mapping[Any, Any], place: _Place) -> Messages:
    """LLaMA-Factory's earlier turns: a list of pairs of a question and its answer."""
    messages: Messages = []
    where = place.at("history")
    history = row.get("history") or []
    if not isinstance(history, (list, tuple)):
        raise where.error(f"is {_describe(history)}; expected a list of pairs [question, answer].")
    for index, turn in enumerate(history):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise where.at(index).error("expected a pair [question, answer].")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _check_text(text, where.at(index))})
    return messages


def _refuse_tools(row: Mapping[Any, Any], place: _Place) -> None:
    if row.get("tools") and row["tools"] != "[]":
        raise place.at("tools").error("tool calls are not supported. Take such rows out.")


def _response(
    row: Mapping[Any, Any], name: str, prompt: Messages, place: _Place, columns: AbstractSet[str]
) -> Messages:
    """A response; where its messages begin with the prompt's, these are taken off."""
    value, where = _required(row, name, place, columns), place.at(name)
    if not isinstance(value, (list, tuple)) or not value:
        return _messages(value, where, role="assistant")
    messages = _conversation(value, where)
    for start in (prompt, [m for m in prompt if m["role"] != "system"]):
        if len(messages) > len(start) and messages_identity(messages[: len(start)]) == messages_identity(
            start
        ):
            messages = messages[len(start) :]
            break
    else:
        if messages[0]["role"] != "assistant" and messages[-1]["role"] == "assistant":
            raise where.at(0).error(
                "the conversation is not the row's prompt. Expected the answer alone, or the prompt and the answer."
            )
    return _messages(messages, where, role="assistant")


def _conversation(value: object, place: _Place) -> Messages:
    """Messages of any roles, in the order given."""
    if not isinstance(value, (list, tuple)) or not value:
        raise place.error(f"is {_describe(value) if value else 'empty'}; expected a list of messages.")
    return [_message(message, place.at(index)) for index, message in enumerate(value)]


def _turns(text: str, place: _Place, *, open_end: bool = False) -> Messages:
    """The messages of a written dialog. ``open_end``: a prompt, which may end in an empty turn of the assistant."""
    marks = list(_PARTED_TURN.finditer(text))
    if {mark[1] for mark in marks} != {*_SPEAKERS}:
        marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise place.error(
            "is no dialog: expected it to begin with `Human:`, and turns of `Human:` and `Assistant:`."
        )
    messages: Messages = []
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        content = text[mark.end() : end].strip()
        if not content:
            if open_end and index == len(marks) - 1 and mark[1] == "Assistant":
                break
            raise place.error(f"turn {index + 1} of the dialog, by {mark[1]}, is empty.")
        messages.append({"role": _SPEAKERS[mark[1]], "content": _check_text(content, place)})
    return messages


def _parted(both: Sequence[Messages], place: _Place) -> PlainRow:
    """Two conversations as one prompt and two answers."""
    chosen, rejected = both
    shared = 0
    for first, second in zip(chosen, rejected, strict=False):
        if messages_identity([first]) != messages_identity([second]):
            break
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise place.at("rejected").error("equal to chosen. A preference pair needs two different responses.")
    if not shared:
        raise place.at("rejected").error(
            "begins with another message than chosen, and the row has no prompt. Both are expected to begin with the prompt."
        )
    while (
        shared and chosen[shared - 1]["role"] == "assistant"
    ):  # one answer begins like the other and goes on
        shared -= 1
    answers = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if any(message["role"] != "assistant" for message in messages[shared:]):
            raise place.at(name).error(
                "parts from the other conversation before its last answer. Expected one prompt with two answers to it."
            )
        if not messages[shared:]:
            raise place.at(name).error("ends with the prompt; expected an answer behind it.")
        answers.append(_messages(messages[shared:], place.at(name), role="assistant"))
    prompt = _checked_prompt(chosen[:shared], place.at("chosen"))
    return _different(PlainRow(prompt, *answers), place.at("rejected"))


def _different(row: PlainRow, place: _Place) -> PlainRow:
    if row.chosen is None or row.rejected is None:
        return row
    if same_response(messages_text(row.chosen), messages_text(row.rejected)):
        raise place.error("equal to chosen. A preference pair needs two different responses.")
    return row


def _text(row: Mapping[Any, Any], name: str, place: _Place, columns: AbstractSet[str]) -> str:
    return _check_text(_required(row, name, place, columns), place.at(name))


def _safer(row: Mapping[Any, Any], place: _Place, safe: Sequence[bool]) -> int:
    value = row.get("safer_response_id")
    if value is None:
        return safe.index(True) if True in safe else 0
    if isinstance(value, str) and value.strip() in ("0", "1"):
        value = int(value)
    if isinstance(value, bool) or value not in (0, 1):
        raise place.at("safer_response_id").error(f"is {show_name(value)!r}; expected 0 or 1.")
    safer = int(value)
    if safe[1 - safer] and not safe[safer]:
        raise place.at("safer_response_id").error(
            f"says {safer}, but response {safer} is marked unsafe and the other safe."
        )
    return safer


def _score(completion: Mapping[Any, Any], place: _Place) -> float:
    for name in ("overall_score", "fine-grained_score", "score"):
        value = completion.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return float(value)
    raise place.at("overall_score").error(
        "missing or no number; a completion has `overall_score`, `fine-grained_score` or `score`."
    )


def _check_scores(row: Mapping[Any, Any], place: _Place) -> None:
    better, worse = (row.get(f"score_{name}") for name in ("chosen", "rejected"))
    if isinstance(better, (int, float)) and isinstance(worse, (int, float)) and better < worse:
        raise place.at("score_chosen").error(
            "is lower than score_rejected. Change the responses, or the scores, over."
        )
