"""From messages to tokens: the prompt whole, the response cut at its end, nothing lost or doubled between."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mpo.data import as_groups, tokenization
from mpo.data.tokenization import set_chat_template, tokenize_group, tokenize_groups, tokenize_pair
from mpo.errors import DataError, ModelError
from tests.plain import Group, Ids, group_ids
from tests.tiny import TOKENIZER_FAMILIES, build_tokenizer, random_groups

Message = dict[str, str]

# What ends an assistant's turn, with all that the family's template writes after it.
END_OF_TURN = {"llama": "<|eot_id|>", "gemma": "<end_of_turn>\n", "qwen": "<|im_end|>\n"}
FIRST_TOKEN = {"llama": "<|begin_of_text|>", "gemma": "<bos>", "qwen": None}


@lru_cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return build_tokenizer(family)


def written(family: str, messages: list[Message], generation: bool) -> str:
    """The conversation as the family's documentation shows it, without a template engine."""
    turns = [(message["role"], message["content"]) for message in messages]
    if family == "llama":
        text = "<|begin_of_text|>" + "".join(
            f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"
            for role, content in turns
        )
        return text + ("<|start_header_id|>assistant<|end_header_id|>\n\n" if generation else "")
    if family == "gemma":
        names = {"assistant": "model", "user": "user"}
        text = "<bos>" + "".join(
            f"<start_of_turn>{names[role]}\n{content.strip()}<end_of_turn>\n" for role, content in turns
        )
        return text + ("<start_of_turn>model\n" if generation else "")
    if turns[0][0] != "system":
        turns = [("system", "You are a tiny assistant."), *turns]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + ("<|im_start|>assistant\n" if generation else "")


def encode(family: str, text: str) -> list[int]:
    """Token ids of a text as it stands, nothing added."""
    return tokenizer_of(family).backend_tokenizer.encode(text, add_special_tokens=False).ids


# No character that a normalizer would change, so that what is decoded can be compared with what was written.
texts = st.text(st.sampled_from("aeriverbread. ,!?\n\t0179河流请窗ಕنهرنদী강물ß€🙂"), min_size=1, max_size=25)
families = st.sampled_from(TOKENIZER_FAMILIES)


@st.composite
def conversations(draw_from: st.DrawFn) -> list[Message]:
    """One to three turns that end with the user's."""
    turns = 2 * draw_from(st.integers(0, 1)) + 1
    return [
        {"role": "assistant" if turn % 2 else "user", "content": draw_from(texts)} for turn in range(turns)
    ]


def answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def visible(family: str, text: str) -> str:
    """What the family's template leaves of a message."""
    return text if family == "qwen" else text.strip()


@settings(deadline=None)
@given(families, conversations(), texts, texts)
def test_prompt_and_response_are_the_conversation_as_the_family_writes_it(
    family: str, prompt: list[Message], chosen: str, rejected: str
) -> None:
    assume(visible(family, chosen) != visible(family, rejected))
    pair = tokenize_pair(tokenizer_of(family), prompt, answer(chosen), answer(rejected))
    for text, response in ((chosen, pair.chosen), (rejected, pair.rejected)):
        whole = encode(family, written(family, [*prompt, *answer(text)], generation=False))
        assert pair.prompt + response == whole
    assert pair.prompt == encode(family, written(family, prompt, generation=True))


@settings(deadline=None)
@given(families, conversations(), texts)
def test_the_end_of_turn_and_the_newline_after_it_belong_to_the_response(
    family: str, prompt: list[Message], chosen: str
) -> None:
    tokenizer = tokenizer_of(family)
    pair = tokenize_pair(tokenizer, prompt, answer(chosen), answer("no"))
    assert tokenizer.decode(pair.chosen) == visible(family, chosen) + END_OF_TURN[family]
    assert tokenizer.decode(pair.rejected) == "no" + END_OF_TURN[family]


@settings(deadline=None)
@given(families, conversations(), texts)
def test_the_first_token_is_written_once(family: str, prompt: list[Message], chosen: str) -> None:
    tokenizer = tokenizer_of(family)
    pair = tokenize_pair(tokenizer, prompt, answer(chosen), answer("no"))
    first = FIRST_TOKEN[family]
    if first is None:
        assert tokenizer.bos_token is None
        return
    number = tokenizer.convert_tokens_to_ids(first)
    assert pair.prompt[0] == number
    assert (pair.prompt + pair.chosen).count(number) == 1


@settings(deadline=None)
@given(families, conversations(), texts, texts, st.integers(1, 30), st.one_of(st.none(), st.integers(1, 30)))
def test_a_response_is_cut_at_its_end_and_the_prompt_never(
    family: str, prompt: list[Message], chosen: str, rejected: str, room: int, most: int | None
) -> None:
    tokenizer = tokenizer_of(family)
    assume(visible(family, chosen) != visible(family, rejected))
    whole = tokenize_pair(tokenizer, prompt, answer(chosen), answer(rejected))
    limit = len(whole.prompt) + room
    kept = room if most is None else min(room, most)
    assume(whole.chosen[:kept] != whole.rejected[:kept])
    cut = tokenize_pair(
        tokenizer, prompt, answer(chosen), answer(rejected), max_length=limit, max_response_length=most
    )
    assert cut.prompt == whole.prompt
    assert cut.chosen == whole.chosen[:kept]
    assert cut.rejected == whole.rejected[:kept]


@settings(deadline=None)
@given(families, conversations(), texts, st.integers(0, 5))
def test_a_prompt_that_leaves_no_room_for_a_response_is_an_error(
    family: str, prompt: list[Message], chosen: str, missing: int
) -> None:
    tokenizer = tokenizer_of(family)
    length = len(encode(family, written(family, prompt, generation=True)))
    with pytest.raises(DataError, match=f"prompt alone has {length} tokens") as error:
        tokenize_pair(tokenizer, prompt, answer(chosen), answer("no"), max_length=length - missing)
    assert error.value.field == "prompt"


# ---- Templates that render the prompt in two ways ----------------------------------------------------------

_PLAIN_TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = template
    return tokenizer


def shared(*sequences: list[int]) -> int:
    """How many tokens all sequences begin with in common."""
    count = 0
    while all(len(s) > count for s in sequences) and len({s[count] for s in sequences}) == 1:
        count += 1
    return count


openings = st.sampled_from(["", "dr", "draft", "draft:", "draft: ", "draft: x", "dread"])


@settings(deadline=None)
@given(openings, openings, texts, texts)
def test_both_responses_start_at_the_last_token_that_prompt_and_both_have_in_common(
    begin_chosen: str, begin_rejected: str, chosen: str, rejected: str
) -> None:
    tokenizer = with_template(_PLAIN_TURNS + "{% if add_generation_prompt %}[assistant]draft: {% endif %}")
    chosen, rejected = begin_chosen + chosen, begin_rejected + rejected
    texts_of = [f"[user]hello[assistant]{text}" for text in ("draft: ", chosen, rejected)]
    prompt_ids, chosen_ids, rejected_ids = (encode("llama", text) for text in texts_of)
    start = shared(prompt_ids, chosen_ids, rejected_ids)
    assume(start < min(len(chosen_ids), len(rejected_ids)) and chosen_ids != rejected_ids)
    pair = tokenize_pair(tokenizer, [{"role": "user", "content": "hello"}], answer(chosen), answer(rejected))
    assert pair.prompt == prompt_ids[:start]
    assert pair.chosen == chosen_ids[start:]
    assert pair.rejected == rejected_ids[start:]


def test_the_limit_holds_for_the_common_prompt_as_well() -> None:
    tokenizer = with_template(
        _PLAIN_TURNS + "{% if add_generation_prompt %}[assistant]a long opening{% endif %}"
    )
    prompt = [{"role": "user", "content": "hello"}]
    common = len(encode("llama", "[user]hello[assistant]"))
    pair = tokenize_pair(tokenizer, prompt, answer("yes yes"), answer("no no"), max_length=common + 2)
    assert [len(part) for part in pair] == [common, 2, 2]


def test_a_prompt_that_is_no_prefix_needs_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    # Scoring and checking data tokenize in processes where no trainer, and so no accelerator, was ever made.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    tokenizer = with_template(_PLAIN_TURNS + "{% if add_generation_prompt %}[assistant]so: {% endif %}")
    prompt = [{"role": "user", "content": "a prompt that no other test has"}]
    pair = tokenize_pair(tokenizer, prompt, answer("yes"), answer("no"))
    assert tokenizer.decode(pair.chosen) == "yes"


def test_a_prompt_without_a_common_token_is_an_error() -> None:
    tokenizer = with_template("{% if add_generation_prompt %}x{% else %}" + _PLAIN_TURNS + "{% endif %}")
    with pytest.raises(DataError, match="prompt"):
        tokenize_pair(tokenizer, [{"role": "user", "content": "hello"}], answer("yes"), answer("no"))


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_response_that_renders_to_nothing_is_an_error(field: str) -> None:
    responses = {"chosen": answer("yes"), "rejected": answer("no"), field: answer("")}
    tokenizer = with_template(_PLAIN_TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}")
    with pytest.raises(DataError, match="renders to no token") as error:
        tokenize_pair(tokenizer, [{"role": "user", "content": "hello"}], **responses)
    assert error.value.field == field


def test_messages_that_the_template_rejects_are_an_error_that_names_the_roles() -> None:
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    with pytest.raises(DataError, match=r"(?s)system turn is not supported.*\['system', 'user'\]"):
        tokenize_pair(tokenizer_of("gemma"), prompt, answer("yes"), answer("no"))


def test_extra_arguments_reach_the_template() -> None:
    tokenizer = with_template("{% if loud %}LOUD {% endif %}" + _PLAIN_TURNS)
    prompt = [{"role": "user", "content": "hello"}]
    pair = tokenize_pair(tokenizer, prompt, answer("yes"), answer("no"), template_kwargs={"loud": True})
    assert tokenizer.decode(pair.prompt) == "LOUD [user]hello"


# ---- Groups ------------------------------------------------------------------------------------------------


def as_plain(tokenized: Dataset) -> list[Group]:
    return [
        Group(
            Ids(*(row[f"source_{part}"] for part in Ids._fields)),
            [Ids(*parts) for parts in zip(*(row[f"target_{part}"] for part in Ids._fields), strict=True)],
            row["target_language"],
        )
        for row in tokenized
    ]


@pytest.mark.parametrize("family", TOKENIZER_FAMILIES)
@pytest.mark.parametrize("cut", [False, True])
def test_groups_are_tokenized_pair_by_pair(family: str, cut: bool) -> None:
    rows = random_groups(3, 5, (1, 5), words=(1, 4))
    whole = group_ids(tokenizer_of(family), rows)
    longest = max(len(pair.prompt) for group in whole for pair in [group.source, *group.targets])
    max_length = longest + 3 if cut else None
    tokenized, dropped = tokenize_groups(as_groups(rows), tokenizer_of(family), max_length=max_length)
    assert dropped == []
    assert as_plain(tokenized) == group_ids(tokenizer_of(family), rows, max_length)
    assert (as_plain(tokenized) != whole) == cut
    assert tokenized["row"] == [[target["row"] for target in row["targets"]] for row in rows]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"max_targets_per_group": 2}, 2),
        ({"group_by_source": False}, 1),
        ({"group_by_source": False, "max_targets_per_group": 3}, 1),
        ({"max_targets_per_group": 50}, 50),
    ],
)
def test_splitting_groups_keeps_every_target_once_with_its_source(
    options: dict[str, Any], limit: int
) -> None:
    rows = random_groups(4, 4, (1, 7), words=(1, 3))
    tokenizer = tokenizer_of("llama")
    tokenized, _ = tokenize_groups(as_groups(rows), tokenizer, **options)
    expected = []
    for group in group_ids(tokenizer, rows):
        for start in range(0, len(group.targets), limit):
            end = start + limit
            expected.append(Group(group.source, group.targets[start:end], group.languages[start:end]))
    assert as_plain(tokenized) == expected
    numbers = [number for row in tokenized["row"] for number in row]
    assert numbers == [target["row"] for row in rows for target in row["targets"]]


def long_prompt(pair: dict[str, Any]) -> None:
    pair["prompt"] = [{"role": "user", "content": "window " * 80}]


def test_pairs_that_fail_are_dropped_and_named_or_stop_everything() -> None:
    rows = random_groups(5, 3, (3, 3), words=(1, 3))
    long_prompt(rows[0]["targets"][1])
    long_prompt(rows[2]["source"])
    tokenizer = tokenizer_of("qwen")
    groups = as_groups(rows)
    with pytest.raises(DataError, match=r"targets\[1\]\.prompt") as error:
        tokenize_groups(groups, tokenizer, max_length=150)
    assert "random_groups" in str(error.value)

    tokenized, dropped = tokenize_groups(groups, tokenizer, max_length=150, bad_rows="drop")
    del rows[0]["targets"][1], rows[2]
    assert as_plain(tokenized) == group_ids(tokenizer, rows, 150)
    assert len(dropped) == 2
    assert "targets[1].prompt" in dropped[0]
    assert "source.prompt" in dropped[1]


def test_data_of_which_nothing_is_left_is_an_error() -> None:
    rows = random_groups(6, 2, (1, 1), words=(1, 3))
    for row in rows:
        long_prompt(row["source"])
    with pytest.raises(DataError, match="2 bad rows"):
        tokenize_groups(as_groups(rows), tokenizer_of("qwen"), max_length=150, bad_rows="drop")


def test_an_error_names_the_file_the_row_and_the_field() -> None:
    group = random_groups(random.Random(7), 1, (2, 2), words=(1, 3))[0]
    group["origin"] = "pairs.jsonl"
    group["targets"][1]["row"] = 17
    long_prompt(group["targets"][1])
    with pytest.raises(DataError) as error:
        tokenize_group(group, tokenizer_of("llama"), max_length=150)
    message = str(error.value)
    assert all(part in message for part in ("pairs.jsonl", "17", "targets[1].prompt"))


# ---- The tokenizer -----------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_padding_token_pads_with_its_last_token() -> None:
    tokenizer = build_tokenizer("llama")
    assert tokenizer.pad_token is None
    set_chat_template(tokenizer, None)
    assert tokenizer.pad_token == "<|eot_id|>"
    gemma = build_tokenizer("gemma")
    set_chat_template(gemma, None)
    assert gemma.pad_token == "<pad>"


def test_a_chat_template_is_taken_from_text_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(_PLAIN_TURNS, encoding="utf-8")
    for given_template in (_PLAIN_TURNS, str(file)):
        tokenizer = build_tokenizer("gemma")
        set_chat_template(tokenizer, given_template)
        assert tokenizer.chat_template == _PLAIN_TURNS


def test_a_tokenizer_without_a_chat_template_or_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("gemma")
    with pytest.raises(ModelError, match="neither Jinja text nor an existing file"):
        set_chat_template(tokenizer, str(tmp_path / "nowhere.jinja"))
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="some-model has no chat template"):
        set_chat_template(tokenizer, None, "some-model")


def test_the_prompt_that_is_no_prefix_is_warned_of_with_what_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = with_template(_PLAIN_TURNS + "{% if add_generation_prompt %}[assistant]hmm{% endif %}")
    with caplog.at_level(logging.WARNING):
        tokenize_pair(tokenizer, [{"role": "user", "content": "hello"}], answer("yes"), answer("no"))
    assert "'hmm'" in caplog.text


@pytest.mark.parametrize(
    "limits", [{"max_response_length": 4}, {"max_length": 0}, {"max_response_length": 4, "max_length": 0}]
)
def test_responses_that_the_cut_makes_equal_are_refused_or_dropped(limits: dict[str, int]) -> None:
    tokenizer = tokenizer_of("llama")
    prompt = [{"role": "user", "content": "river"}]
    same = "river bread river bread river bread "
    whole = tokenize_pair(tokenizer, prompt, answer(same + "yes"), answer(same + "no"))
    if "max_length" in limits:
        limits = {**limits, "max_length": len(whole.prompt) + 4}
    with pytest.raises(DataError, match=r"`rejected`: is equal to chosen after the cut to 4 tokens"):
        tokenize_pair(tokenizer, prompt, answer(same + "yes"), answer(same + "no"), **limits)
    # The first difference decides, not the length.
    tokenize_pair(tokenizer, prompt, answer("yes " + same), answer("no " + same), **limits)

    pair = {
        "language": "bn",
        "row": 3,
        "prompt": prompt,
        "chosen": answer(same + "yes"),
        "rejected": answer(same + "no"),
    }
    good = {**pair, "language": "en", "chosen": answer("yes " + same), "row": 3}
    for group, place in (
        ({"source": good, "targets": [pair, good], "origin": "a.json"}, "targets[0].rejected"),
        ({"source": pair, "targets": [good], "origin": "a.json"}, "source.rejected"),
    ):
        with pytest.raises(DataError, match="after the cut") as error:
            tokenize_group(group, tokenizer, **limits)
        assert (error.value.row, error.value.field) == (3, place)
        kept = tokenize_group(group, tokenizer, bad_rows="drop", **limits)
        assert len(kept["errors"]) == 1 and len(kept["target_chosen"]) == (place != "source.rejected")


def test_harmless_responses_that_the_cut_makes_equal_stay_where_nothing_is_preferred() -> None:
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content | lower }}{% endfor %}"
    same = "river bread " * 20
    rows = random_groups(7, 4, (2, 2), ("bn", "sw"))
    for number, row in enumerate(rows):
        row["kind"] = "harmless" if number % 2 else "harmful"
        row["targets"][0] |= {"chosen": answer(same + "yes"), "rejected": answer(same + "no")}
    settings: dict[str, Any] = {"max_response_length": 30, "bad_rows": "drop"}
    for alike, lost in ((False, 4), (True, 2)):
        groups = as_groups(Dataset.from_list(rows))
        kept, errors = tokenize_groups(groups, tokenizer, harmless_alike=alike, **settings)
        assert len(errors) == lost
        sizes = {
            kind: {len(g["target_chosen"]) for g in kept if g["kind"] == kind}
            for kind in ("harmful", "harmless")
        }
        assert sizes == {"harmful": {1}, "harmless": {2 if alike else 1}}
    # What is the same before it is cut is a mistake of the data.
    rows[1]["targets"][0]["rejected"] = answer(same + "YES")
    _, errors = tokenize_groups(
        as_groups(Dataset.from_list(rows)), tokenizer, harmless_alike=True, **settings
    )
    assert len([error for error in errors if "has the same tokens as chosen" in error]) == 1


def test_responses_that_render_to_the_same_tokens_are_refused() -> None:
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content | lower }}{% endfor %}"
    with pytest.raises(DataError, match="has the same tokens as chosen"):
        tokenize_pair(tokenizer, [{"role": "user", "content": "bread"}], answer("River"), answer("river"))


def test_a_cache_of_token_ids_has_the_name_of_all_that_decides_them() -> None:
    def fresh(kind: Any = None) -> Any:
        tokenizer = build_tokenizer("llama")
        if kind is not None:
            tokenizer.__class__ = kind
        return tokenizer

    def named(tokenizer: Any, rows: Any = None, **settings: Any) -> str:
        groups = as_groups(random_groups(0, 2) if rows is None else rows)
        return tokenize_groups(groups, tokenizer, **settings)[0]._fingerprint

    def changed(change: Callable[[Any], Any]) -> Any:
        tokenizer = fresh()
        change(tokenizer)
        return tokenizer

    first = named(fresh())
    assert named(fresh()) == first
    others = [
        named(fresh(), random_groups(1, 2)),
        named(fresh(), max_length=900),
        named(fresh(), max_response_length=7),
        named(fresh(), harmless_max_response_length=7),
        named(fresh(), max_targets_per_group=1),
        named(fresh(), bad_rows="drop"),
        named(fresh(), template_kwargs={"loud": True}),
        named(changed(lambda t: setattr(t, "chat_template", t.chat_template + " "))),
        named(changed(lambda t: t.add_tokens(["riverbread"]))),
        named(changed(lambda t: setattr(t.backend_tokenizer, "encode_special_tokens", True))),
        named(changed(lambda t: setattr(t, "bos_token", "<|eot_id|>"))),
    ]
    assert len({first, *others}) == 1 + len(others)

    class Foreign(PreTrainedTokenizerFast):  # its code is not the library's, so the library names the cache
        pass

    assert tokenization._fingerprint(as_groups(random_groups(0, 2)), fresh(Foreign)) is None
