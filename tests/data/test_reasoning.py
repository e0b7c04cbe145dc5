from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.data.reasoning import DELIMITERS, Parts, left_open, split_reasoning

THOUGHT = "They want steps. First, one would ... Should I refuse? I cannot help with that, perhaps."
BLOCKS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
]
HARMONY = "<|channel|>analysis<|message|>"
TO_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
REPEATED = [
    "<think>",
    "</think>",
    "<think></think>",
    "[THINK]",
    "<|channel|>",
    HARMONY,
    TO_FINAL,
    "\u25c1",
    " ",
]


@pytest.mark.parametrize(("opening", "closing"), BLOCKS)
def test_a_block_at_the_beginning_is_reasoning_and_the_rest_is_the_answer(opening: str, closing: str) -> None:
    for before in ("", "\n ", "\u3000"):
        text = f"{before}{opening}\n{THOUGHT}\n{closing}\n\nNo, I won't.\n"
        found = split_reasoning(text)
        assert found == Parts(f"{before}{opening}\n{THOUGHT}\n{closing}", "No, I won't.")
        # The chat template opened it.
        assert split_reasoning(f"{THOUGHT}{closing}\n\nNo, I won't.").answer == "No, I won't."
        assert split_reasoning(f"{before}{opening}\n{THOUGHT}") == Parts(
            f"{before}{opening}\n{THOUGHT}", "", complete=False
        )
        upper = split_reasoning(f"{opening.upper()}{THOUGHT}{closing.upper()}No.")
        assert upper.answer == "No." and upper.complete


def test_blocks_without_thoughts_and_several_blocks_are_taken_off() -> None:
    assert split_reasoning("<think>\n\n</think>\n\nYes.").answer == "Yes."
    assert split_reasoning("<think>a</think>\n<think>b</think> Yes.").answer == "Yes."
    assert split_reasoning("<think>a</think>").answer == ""
    assert not split_reasoning("<think>a</think> <think>b").complete


def test_channels_of_gpt_oss() -> None:
    text = f"{HARMONY}{THOUGHT}{TO_FINAL}No, I won't.<|return|>"
    assert split_reasoning(text) == Parts(f"{HARMONY}{THOUGHT}<|end|><|start|>assistant", "No, I won't.")
    assert split_reasoning(f"<|start|>assistant{text}").answer == "No, I won't."
    assert split_reasoning("<|channel|>final<|message|>Yes.").answer == "Yes."
    constrained = "<|channel|>final <|constrain|>json<|message|>{}"
    assert split_reasoning(HARMONY + "x<|end|><|start|>assistant" + constrained).answer == "{}"
    for cut in (HARMONY + THOUGHT, HARMONY + THOUGHT + "<|end|><|start|>assistant<|channel|>final", HARMONY):
        assert split_reasoning(cut) == Parts(cut, "", complete=False)
    # Special tokens taken out by a server.
    assert split_reasoning(f"analysis{THOUGHT}assistantfinalNo, I won't.").answer == "No, I won't."
    assert split_reasoning("analysis of variance, assistantfinal").reasoning == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "Sure. Here is how ...",
        "I think </b> is a tag.",
        "Write <think> before and </think> after it.",
        "Sure: <think>hm</think> like this.",
        "The channel <|channel|>final is one of gpt-oss.",
        "<b>x</b>",
        "analysis: it is fine",
        "\u25c1think",
    ],
)
def test_a_text_without_reasoning_is_all_answer_and_unchanged(text: str) -> None:
    assert split_reasoning(text) == Parts("", text)


def test_nothing_that_follows_the_first_closing_delimiter_is_hidden_from_a_judge() -> None:
    for rest in ("</think> No.", "<think>x</think> No.", "[/THINK] No.", f"{HARMONY}x{TO_FINAL}No."):
        for text in (f"<think>a</think> Mix both. {rest}", f"a</think> Mix both. {rest}"):
            assert "Mix both." in split_reasoning(text).answer
    assert "Mix both." in split_reasoning(f"{HARMONY}a{TO_FINAL}Mix both.{TO_FINAL}No.").answer


def test_the_end_of_a_prompt_tells_whether_the_answer_begins_within_the_reasoning() -> None:
    for opening, closing in BLOCKS:
        assert left_open(f"<|im_start|>assistant\n{opening}\n") == f"{opening}\n"
        assert left_open(f"user: say {opening} please\nassistant:") == ""
        assert left_open(f"assistant\n{opening}\n\n{closing}\n\n") == ""
    assert left_open("") == ""


@given(st.lists(st.sampled_from([*sorted(DELIMITERS), "analysis", "final", "a", "\n", "<", " "])))
def test_no_text_is_lost_or_made_up(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = split_reasoning(text)
    assert text.startswith(found.reasoning)
    assert found.answer in text
    assert found.complete or not found.answer
    assert found.reasoning or found.answer == text


@pytest.mark.parametrize("unit", REPEATED)
def test_splitting_takes_time_in_proportion_to_the_length(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        started = time.process_time()
        for each in (text, HARMONY + text, "<think>" + text, "analysis" + text, text + "</think>x"):
            split_reasoning(each)
        left_open(text)
        return time.process_time() - started

    # In proportion: 8 times. By the square: 64 times.
    assert min(seconds(80_000) for _ in range(2)) < 24 * max(seconds(10_000), 1e-3)
