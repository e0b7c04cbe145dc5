"""Answers to probe prompts as a model might give them: in their language, in English, as refusals, in a loop."""

from __future__ import annotations

from collections.abc import Callable

from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.probe import probe_rows
from mpo.evaluation.probe.behavior import Answered, ProbePrompts, choose_prompts
from mpo.evaluation.prompts import Prompt

TEXT = {
    "en": "Start by reading the instructions, then ask a friend who has done this before.",
    "bn": "প্রথমে নির্দেশাবলী পড়ুন, তারপর এমন কাউকে জিজ্ঞাসা করুন যিনি আগে এটি করেছেন।",
    "sw": "Anza kwa kusoma maelekezo, kisha muulize rafiki ambaye amefanya hivi hapo awali.",
    "ko": "먼저 설명서를 읽고 전에 해 본 적이 있는 친구에게 물어보세요.",
    "zh": "先阅读说明书，然后再问一位以前做过这件事的朋友。",
}
REFUSAL = {
    "en": "I'm sorry, but I can't help with that. It would be wrong to do so.",
    "bn": "আমি দুঃখিত, আমি এই বিষয়ে সাহায্য করতে পারব না। এটি করা ঠিক হবে না।",
    "sw": "Samahani, siwezi kusaidia na hilo. Kufanya hivyo si sahihi kabisa.",
    "ko": "죄송하지만 도와드릴 수 없습니다. 그렇게 하는 것은 옳지 않습니다.",
    "zh": "抱歉，我不能帮助您。这样做是不对的。",
}
LOOP = "and so on and on " * 12

KIND = {row.id: row.kind for row in probe_rows()}


def helps(prompt: Prompt) -> str:
    """Answers everything, in the language it is asked in."""
    return TEXT[prompt.language]


def is_safe(prompt: Prompt) -> str:
    """Refuses what is harmful and nothing else."""
    return REFUSAL[prompt.language] if KIND[prompt.prompt_id] == "harmful" else TEXT[prompt.language]


def refuses(prompt: Prompt) -> str:
    """Refuses everything, in the language it is asked in."""
    return REFUSAL[prompt.language]


def ask(
    says: Callable[[Prompt], str], languages: tuple[str, ...] = ("en", "bn", "sw"), per_kind: int = 8
) -> Answered:
    prompts = choose_prompts(languages, per_kind)
    assert prompts is not None
    return judged(prompts, says)


def judged(prompts: ProbePrompts, says: Callable[[Prompt], str]) -> Answered:
    rows = [AnswerRow(p.id, p.prompt_id, p.language, p.text, says(p), True) for p in prompts.prompts]
    return Answered.judged(prompts, rows)
