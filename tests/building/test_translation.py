"""What translates: programs, translation models and chat models, right and wrong."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import M2M100Config, M2M100ForConditionalGeneration, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

from mpo.building.translation import TranslationChoice, make_translator
from mpo.building.translation.seq2seq import LanguageTokens
from mpo.errors import ConfigError, DependencyError, ModelError
from mpo.evaluation.engines import ModelChoice
from tests.evaluation.chat_server import ChatServer, serve

SCRIPT = """
import sys
lines = sys.stdin.read().splitlines()
{body}
"""


def program(folder: Path, body: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(SCRIPT.format(body=body), encoding="utf-8")
    return [sys.executable, str(path), "{source}", "{target}"]


def translated(
    choice: TranslationChoice, pieces: list[str], done: tuple[int, ...] = ()
) -> dict[int, tuple[str, str | None]]:
    translator = make_translator(choice)
    found = {i: (made.text, made.fault) for i, made in translator.translate(pieces, "en", "sw", done)}
    translator.close()
    return found


# ---------------------------------------------------------------------------------------------------------------- programs


def test_a_program_gets_a_text_a_line_and_the_codes(tmp_path: Path) -> None:
    command = program(tmp_path, "for l in lines: print(sys.argv[1:], l.upper() if l != 'b' else '')")
    choice = TranslationChoice("command", command, codes={"sw": "swh"})

    assert translated(choice, ["one\tline\u2028or two", "b", "ß"], (2,)) == {
        0: ("['en', 'swh'] ONE LINE OR TWO", None),
        1: ("['en', 'swh']", None),
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('one line only')", "wrote 1 lines for 2"),
        ("[print(l, '\\nand more') for l in lines]", "wrote 4 lines for 2"),
        ("sys.exit('no such pair: en-sw')", "ended with 1: no such pair: en-sw"),
        ("import time; time.sleep(30)", "did not translate 2 lines in 0.5 seconds"),
    ],
)
def test_a_program_that_does_something_else_is_named(tmp_path: Path, body: str, message: str) -> None:
    choice = TranslationChoice("command", program(tmp_path, body), timeout=0.5 if "sleep" in body else 60.0)

    with pytest.raises(ModelError, match=message):
        translated(choice, ["a", "b"])


# Takes lines that follow each other for one text, and moves its words between them, as Apertium does.
MOVES = """
texts = "\\n".join(lines).strip("\\n").split("\\n\\n")
print("\\n\\n".join("\\n".join(reversed(text.split("\\n"))) for text in texts){end})
"""


@pytest.mark.parametrize("end", ["", ", end='\\n\\n'", ", end=''"])
def test_a_program_that_moves_words_between_lines_gets_empty_ones_between_texts(
    tmp_path: Path, end: str
) -> None:
    command = program(tmp_path, MOVES.format(end=end))

    apart = TranslationChoice("command", command, blank_lines=True)
    assert translated(apart, ["the big", "red  house", "cat"]) == {
        0: ("the big", None),
        1: ("red house", None),
        2: ("cat", None),
    }
    if not end:
        assert translated(TranslationChoice("command", command), ["a", "b"])[0] == ("b", None)
    with pytest.raises(ConfigError, match="only the engine `command`"):
        TranslationChoice("chat", model=ModelChoice("x"), blank_lines=True)


def test_a_text_where_an_empty_line_should_be_is_an_error(tmp_path: Path) -> None:
    command = program(tmp_path, "for l in lines: print(l or 'and more')")
    with pytest.raises(ModelError, match="one line for each that it reads, empty ones too"):
        translated(TranslationChoice("command", command, blank_lines=True), ["a", "b"])


@pytest.mark.parametrize(
    ("command", "given", "apart"),
    [
        (["apertium", "-u", "{source}-{target}"], None, True),
        (["nice", "/usr/bin/apertium", "en-es"], None, True),
        (["apertium", "en-es"], False, False),
        (["translate", "--model", "apertium.bin"], None, False),
    ],
)
def test_apertium_gets_empty_lines_unless_told_otherwise(
    command: list[str], given: bool | None, apart: bool
) -> None:
    assert TranslationChoice("command", command, blank_lines=given).parts_lines is apart


@pytest.mark.skipif(
    shutil.which("apertium") is None, reason="needs Apertium: apt-get install apertium-eng-spa"
)
def test_apertium_moves_no_words_between_texts() -> None:
    choice = TranslationChoice(
        "command", ["apertium", "-u", "{source}-{target}"], codes={"en": "eng", "sw": "spa"}
    )
    pieces = ["the big", "red house", "[a ] ^b$ {c} @d", "I see", "a cat.", "Ends."]
    together = translated(choice, pieces)
    assert together == {i: translated(choice, [piece])[0] for i, piece in enumerate(pieces)}
    assert together[1] == ("Casa roja", None)


def test_an_empty_line_is_no_translation_and_a_missing_program_is_said(tmp_path: Path) -> None:
    choice = TranslationChoice("command", program(tmp_path, "for l in lines: print()"))
    assert translated(choice, ["a"]) == {0: ("", "the translator wrote an empty line")}
    with pytest.raises(DependencyError, match="there is no program 'no-such-translator'"):
        make_translator(TranslationChoice("command", ["no-such-translator"]))
    with pytest.raises(ConfigError, match=r"one command without `\{target\}`"):
        make_translator(TranslationChoice("command", ["cat"])).check("en", ["sw", "zh"])


# -------------------------------------------------------------------------------------------------------------- chat models


def test_a_chat_model_is_asked_with_the_names_of_the_languages_and_its_wrapping_is_taken_off(
    tmp_path: Path,
) -> None:
    def reply(body):
        asked = body["messages"][-1]["content"]
        assert "from English into Swahili" in asked
        return "<think>hm</think>-----\nHabari {text}\n-----" if "Hello" in asked else ""

    with serve(ChatServer(reply=reply)) as server:
        choice = TranslationChoice("chat", model=ModelChoice("toy", engine="server", url=server.url))
        found = translated(choice, ["Hello {text}", "silence"])

    assert found == {0: ("Habari {text}", None), 1: ("", "the translator wrote nothing")}


def test_ones_own_prompt_needs_its_slots(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Into {target}, please.", encoding="utf-8")
    model = ModelChoice("toy", engine="server", url="http://localhost:1")
    with pytest.raises(ConfigError, match=r"has no slot \{text\}"):
        make_translator(TranslationChoice("chat", model=model, prompt=str(tmp_path / "prompt.txt")))


def test_a_translation_that_is_cut_off_says_so() -> None:
    with serve(ChatServer(reply=lambda body: "Haba", finish_reason=lambda body: "length")) as server:
        choice = TranslationChoice("chat", model=ModelChoice("toy", engine="server", url=server.url))
        ((text, fault),) = translated(choice, ["Hello"]).values()
    assert text == "Haba" and fault and "cut off" in fault


# ------------------------------------------------------------------------------------------------------- translation models

WORDS = ["the", "window", "is", "open", "a", "b", "c"]


def save_seq2seq(folder: Path, style: str) -> Path:
    """A tiny random translation model whose vocabulary names languages in one of the published ways."""
    names = {
        "nllb": ["eng_Latn", "swh_Latn", "zho_Hant", "zho_Hans", "arb_Arab"],
        "m2m": ["__en__", "__sw__", "__zh__"],
        "madlad": ["<2en>", "<2sw>", "<2zh>"],
    }[style]
    vocabulary = {
        token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *names, *WORDS])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=names,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    size = len(vocabulary)
    if style == "madlad":
        model = T5(T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1))  # fmt: skip
    else:
        model = M2M100ForConditionalGeneration(
            M2M100Config(
                vocab_size=size,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=2,
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("style", ["nllb", "m2m", "madlad"])
def test_a_translation_model_is_told_the_languages_in_its_own_way(tmp_path: Path, style: str) -> None:
    folder = save_seq2seq(tmp_path / style, style)
    choice = TranslationChoice(
        "seq2seq", model=ModelChoice(str(folder), batch_size=2, device="cpu"), max_new_tokens=5
    )
    pieces = ["the window", "is open", "a b c the window is open", "a"]
    translator = make_translator(choice)
    translator.check("en", ["sw", "zh"])
    calls = []
    model = translator._load()
    generate = model.generate

    def recorded(**given):
        written = generate(**given)
        calls.append(
            (given["input_ids"][:, 0].tolist(), given["forced_bos_token_id"], written[:, 1].tolist())
        )
        return written

    model.generate = recorded
    whole = dict(translator.translate(pieces, "en", "sw", ()))
    rest = dict(translator.translate(pieces, "en", "sw", (0, 2)))

    assert sorted(whole) == [0, 1, 2, 3] and rest == {index: whole[index] for index in (1, 3)}
    token = {name: translator.names.id(name) for name in ("en", "sw")}
    for first, forced, begun in calls:
        assert {*first} == {token["sw" if style == "madlad" else "en"]}
        assert forced == (None if style == "madlad" else token["sw"])
        assert style == "madlad" or {*begun} == {token["sw"]}


def test_languages_are_found_under_the_codes_that_models_use() -> None:
    nllb = LanguageTokens(dict.fromkeys(["eng_Latn", "zho_Hant", "zho_Hans", "arb_Arab", "swh_Latn", "zsm_Latn", "ory_Orya", "lvs_Latn", "pes_Arab"], 1), {}, "a model")  # fmt: skip
    assert [nllb.token(c) for c in ("en", "zh", "ar", "sw", "ms", "or", "lv", "fa")] == [
        "eng_Latn", "zho_Hans", "arb_Arab", "swh_Latn", "zsm_Latn", "ory_Orya", "lvs_Latn", "pes_Arab",
    ]  # fmt: skip
    own = LanguageTokens({"zho_Hant": 1, "zho_Hans": 2}, {"zh": "zho_Hant"}, "a model")
    assert own.token("zh") == "zho_Hant"
    mbart = LanguageTokens({"en_XX": 1, "zh_CN": 2}, {}, "a model")
    assert mbart.token("zh") == "zh_CN"
    with pytest.raises(ConfigError, match=r"has no language .*Bengali.*`codes: \{bn: TOKEN\}`"):
        mbart.token("bn")
    with pytest.raises(ModelError, match="names no languages"):
        LanguageTokens({"the": 1, "window": 2}, {}, "a model")
