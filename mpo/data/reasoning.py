"""Where a reasoning model's thoughts end and its answer begins.

Such a model thinks in writing before it answers, between delimiters of its own. What it thinks is not said to the user: it
may spell out what the answer refuses, or weigh a refusal that the answer does not make.

Read are blocks at the beginning of a text, in the delimiters that are published with models (see ``_BLOCKS``), and the
channels of gpt-oss. A text with a closing delimiter and no opening one before it begins within its reasoning: some chat
templates write the opening one into the prompt (DeepSeek-R1, QwQ, Qwen3-Thinking). All that follows the *first* closing
delimiter is the answer, so that nothing said to the user is missed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BLOCKS = (
    ("<think>", "</think>"),  # DeepSeek-R1, QwQ, Qwen3, GLM-4.5, SmolLM3 and many others
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE-Deep
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL-Thinking
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
)
_CHANNELS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")  # gpt-oss ("harmony")

DELIMITERS = frozenset({*(delimiter for block in _BLOCKS for delimiter in block), *_CHANNELS})
"""All delimiters. Where one is a special token, it has to stay in the text that is read here."""

_CLOSING_OF = {opening.lower(): re.compile(re.escape(closing), re.I) for opening, closing in _BLOCKS}
_OPENING_OF = {closing.lower(): re.compile(re.escape(opening), re.I) for opening, closing in _BLOCKS}
_ANY_OPENING = "|".join(re.escape(opening) for opening, _ in _BLOCKS)
_OPENED = re.compile(rf"\s*+({_ANY_OPENING})", re.I)
_CLOSED = re.compile("|".join(re.escape(closing) for _, closing in _BLOCKS), re.I)
_LEFT_OPEN = re.compile(rf"(?:{_ANY_OPENING})\s*+\Z", re.I)

_IN_CHANNELS = re.compile(r"\s*+(?:<\|start\|>\s*+assistant\s*+)?<\|channel\|>", re.I)
_FINAL = re.compile(r"<\|channel\|>\s*+final\b[^<]*+(?:<\|constrain\|>[^<]*+)?<\|message\|>", re.I)
_LAST_TOKEN = re.compile(r"<\|(?:end|return)\|>\s*\Z", re.I)
# The same where a server took the special tokens out and left the words.
_BARE_CHANNELS = re.compile(r"\s*+analysis(?=\S)", re.I)
_BARE_FINAL = "assistantfinal"


class Parts(NamedTuple):
    """A text of a model.

    Attributes:
        reasoning: What it thought, delimiters included; empty where it did not.
        answer: What it says to the user.
        complete: False where the reasoning never ends, so that there is no answer.
    """

    reasoning: str
    answer: str
    complete: bool = True


def split_reasoning(text: str) -> Parts:
    """Reasoning and answer. A text without reasoning is all answer and comes back unchanged."""
    # How delimiters begin: texts without one are looked at no further.
    if not ("<" in text or "[" in text or "\u25c1" in text) and _BARE_CHANNELS.match(text) is None:
        return Parts("", text)
    end = 0
    while opened := _OPENED.match(text, end):
        closing = _CLOSING_OF[opened[1].lower()].search(text, opened.end())
        if closing is None:
            return Parts(text, "", complete=False)
        end = closing.end()
    if end:
        return Parts(text[:end], text[end:].strip())
    if _IN_CHANNELS.match(text):
        final = _FINAL.search(text)
        if final is None:
            return Parts(text, "", complete=False)
        return Parts(text[: final.start()], _LAST_TOKEN.sub("", text[final.end() :]).strip())
    if _BARE_CHANNELS.match(text) and (place := text.find(_BARE_FINAL)) > 0:
        return Parts(text[:place], text[place + len(_BARE_FINAL) :].strip())
    closed = _CLOSED.search(text)
    if closed and not _OPENING_OF[closed[0].lower()].search(text, 0, closed.start()):
        return Parts(text[: closed.end()], text[closed.end() :].strip())
    return Parts("", text)


def left_open(prompt: str) -> str:
    """The opening delimiter that a prompt ends in, with the white space after it; empty where it ends in none."""
    found = _LEFT_OPEN.search(prompt)
    return "" if found is None else found[0]
