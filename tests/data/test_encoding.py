"""What is encoded once for several texts has the ids that each text has alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mpo.data.encoding import PairEncoder, PairTexts

TEXT = "the cat sat on the mat and sang of rain ; ẞtraße İstanbul naïve  两只 猫 <s> assistant user turn\n"
KINDS: dict[str, tuple[Any, Any]] = {
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a space before": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words, marked": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "words, the first marked": (None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a mark before each part": (
        normalizers.Prepend("\u2581"),
        pre_tokenizers.Metaspace(prepend_scheme="never"),
    ),
    "folded": (
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizers.Whitespace(),
    ),
    "stripped": (normalizers.Strip(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
}
TOKENS: dict[str, dict[str, bool]] = {
    "plain": {"normalized": False},
    "normalized": {"normalized": True},
    "takes spaces on its left": {"normalized": False, "lstrip": True},
    "takes spaces on its right": {"normalized": False, "rstrip": True},
    "single words only": {"normalized": False, "single_word": True},
}
PIECES = ["<t>", "<t>x", "<u>", " ", "\n", "the cat", "sat", "X", "ẞ", "İ", "é", "两", "<", "t>", "<T>", ""]


def made(kind: str, token: str) -> PreTrainedTokenizerFast:
    normalizer, splitter = KINDS[kind]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT * 3, "".join(PIECES)],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    backend.add_tokens([AddedToken(text, **TOKENS[token]) for text in ("<t>", "<u>", "<t>x")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


text = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_each_text_alone(kind: str, token: str) -> None:
    tokenizer = made(kind, token)

    @settings(deadline=None, max_examples=80)
    @given(st.lists(st.tuples(text, text, text, text), min_size=1, max_size=3))
    def check(parts: list[tuple[str, str, str, str]]) -> None:
        pairs = [PairTexts(a + b, a + c, a + b + d) for a, b, c, d in parts]
        alone = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"] for t in pair) for pair in pairs]
        assert PairEncoder(tokenizer).pairs(pairs) == alone

    check()


def test_a_token_that_is_read_after_normalization_is_no_place_to_cut() -> None:
    tokenizer = made("stripped", "normalized")
    pair = PairTexts("<T><t>x", "<T>\n<t>x", "<T><t>xt>")  # found by chance: the cut changed the second
    alone = tuple(tokenizer(each, add_special_tokens=False)["input_ids"] for each in pair)
    assert PairEncoder(tokenizer).pairs([pair]) == [alone]


def test_a_prompt_is_encoded_once() -> None:
    tokenizer = made("bytes", "plain")
    asked: list[str] = []
    encoder = PairEncoder(tokenizer)
    plain = encoder.encode

    def counted(texts: Any) -> Any:
        asked.extend(texts)
        return plain(texts)

    encoder.encode = counted  # type: ignore[method-assign]
    prompt = "<t>user the cat sat on the mat <u>"
    pairs = [PairTexts(prompt, f"{prompt}{answer}<u>", f"{prompt}no<u>") for answer in ("meow", "sang")]
    encoder.pairs(pairs)
    assert asked == [prompt, prompt, "<u>", "<u>meow<u>", "<u>no<u>", "<u>sang<u>", "<u>no<u>"]
