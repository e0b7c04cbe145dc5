"""The report on a data file: counts, lengths, findings, and what it prints."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mpo.data import check_data, load_groups
from mpo.data.check import FINDINGS, DataReport
from mpo.data.refusals import opens_with_refusal, refusal_languages
from mpo.data.tokenization import tokenize_group
from mpo.errors import ConfigError, DataError
from tests.data.rows import TEXTS, flat, group


class WordTokenizer:
    """One token per word, and two per message for the template: the lengths can be counted by hand."""

    chat_template: str | None = "a template"

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> list[int]:
        assert tokenize and not return_dict
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        words = [word for message in messages for word in ["<", *message["content"].split(), ">"]]
        return [0] * (len(words) + add_generation_prompt)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [0] * len(text.split())}


def rows_of(report: DataReport, finding: str) -> dict[str, list[int]]:
    return {
        language.language: [flagged.row for flagged in language.flagged[finding]]
        for language in report.languages
        if finding in language.flagged
    }


def words(number: int) -> str:
    return " ".join(f"না{n}" for n in range(number))


def test_pairs_are_counted_per_language_and_sources_once() -> None:
    rows = [flat(code, number=number) for number in range(3) for code in ("bn", "ko", "sw")] + [
        flat("bn", number=9)
    ]
    report = check_data(rows)
    assert (report.groups, report.pairs) == (4, 10)
    assert [(x.language, x.is_source, x.pairs) for x in report.languages] == [
        ("en", True, 4),
        ("bn", False, 4),
        ("ko", False, 3),
        ("sw", False, 3),
    ]


def test_lengths_are_in_tokens_of_the_template_and_truncation_is_counted() -> None:
    rows = [
        flat("bn", number=n, target_prompt=words(10), target_chosen=words(n), target_rejected=words(30))
        for n in (1, 2, 3, 50)
    ]
    rows.append(
        flat("bn", number=60, target_prompt=words(60), target_chosen=words(4), target_rejected=words(5))
    )
    # The prompt takes 10 + 2 + 1 tokens; a response w + 2, of which the generation prompt has taken one.
    report = check_data(rows, tokenizer=WordTokenizer(), max_length=50)
    bengali = next(x for x in report.languages if x.language == "bn")
    assert report.length_unit == "tokens"
    assert str(bengali.lengths["prompt"]) == "13/13/63/63"
    assert str(bengali.lengths["chosen"]) == "2/4/51/51"
    assert str(bengali.lengths["rejected"]) == "6/31/31/31"
    assert rows_of(report, "truncated") == {"bn": [3]}
    assert rows_of(report, "prompt_too_long") == {"bn": [4]}
    assert "max_length (50)" in report.to_text()
    exactly = check_data(rows[:4], tokenizer=WordTokenizer(), max_length=13 + 51)
    assert rows_of(exactly, "truncated") == {}


def test_without_a_tokenizer_lengths_are_characters_and_the_report_says_so() -> None:
    report = check_data([flat("bn", target_chosen="না" * 4000)], max_length=10)
    assert report.length_unit == "characters" and report.max_length is None
    assert report.count("truncated") == report.count("prompt_too_long") == 0
    assert "Length in characters" in report.to_text()
    assert "Truncation was not checked" in report.to_text()
    assert next(x for x in report.languages if x.language == "bn").lengths["chosen"].max == 8000


def test_a_tokenizer_without_a_template_counts_the_texts_alone() -> None:
    tokenizer = WordTokenizer()
    tokenizer.chat_template = None
    report = check_data([flat("bn", target_prompt=words(7))], tokenizer=tokenizer)
    assert next(x for x in report.languages if x.language == "bn").lengths["prompt"].max == 7
    assert "tokens of the texts alone" in report.to_text()


def test_messages_that_the_template_refuses_are_reported() -> None:
    refused = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, what is this?"}]
    report = check_data([flat("bn"), flat("bn", number=1, source_prompt=refused)], tokenizer=WordTokenizer())
    assert rows_of(report, "template_refuses") == {"en": [1]}


def test_a_real_tokenizer_gives_the_lengths_of_its_own_template() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}"
    report = check_data([flat("bn", target_prompt=words(5), target_chosen=words(3))], tokenizer=tokenizer)
    bengali = next(x for x in report.languages if x.language == "bn")
    assert (bengali.lengths["prompt"].max, bengali.lengths["chosen"].max) == (7, 5)


def test_texts_in_another_language_are_found_per_part() -> None:
    rows = [
        flat("bn", number=0),
        flat("bn", number=1, target_chosen=TEXTS["en"][1] + " I am sorry about that."),
        flat("bn", number=2, target_rejected=TEXTS["ko"][2]),
        flat("bn", number=3, target_prompt=TEXTS["en"][0]),
        flat("sw", number=4, target_chosen="Siwezi."),
        flat("ko", number=5, source_prompt=TEXTS["sw"][0]),
    ]
    report = check_data(rows)
    assert rows_of(report, "chosen_language") == {"bn": [1]}
    assert rows_of(report, "rejected_language") == {"bn": [2]}
    assert rows_of(report, "prompt_language") == {"en": [5], "bn": [3]}


def test_languages_that_detection_does_not_know_are_said_to_be_unchecked() -> None:
    report = check_data([flat("ko", target_language="tlh")])
    assert report.count("prompt_language") == 0
    assert "Language not checked (detection does not know it): tlh (tlh)" in report.to_text()
    assert "Refusals not checked (no phrases): tlh (tlh)" in report.to_text()


def test_repeated_targets_sources_and_prompts_are_found() -> None:
    rows = [
        flat("bn"),
        flat("bn"),
        flat("bn", target_chosen="না, আমি পারব না।"),
        flat("ko"),
        flat("ko", number=1, source_prompt=TEXTS["en"][0]),
    ]
    report = check_data(rows)
    assert rows_of(report, "same_target") == {"bn": [1]}
    assert rows_of(report, "same_source_and_language") == {"bn": [2]}
    assert rows_of(report, "same_prompt") == {"en": [4]}


def test_responses_that_look_swapped_are_found() -> None:
    swapped = flat("bn", target_chosen=TEXTS["bn"][2], target_rejected=TEXTS["bn"][1])
    report = check_data(
        [swapped, flat("ko"), flat("sw", target_rejected="I'm sorry, but I can’t do that for you.")]
    )
    assert rows_of(report, "chosen_no_refusal") == {"bn": [0]}
    assert rows_of(report, "rejected_refusal") == {"bn": [0], "sw": [2]}


@pytest.mark.parametrize("code", list(TEXTS))
def test_refusals_are_told_from_answers_in_each_language_of_the_samples(code: str) -> None:
    _, refusal, answer = TEXTS[code]
    assert code in refusal_languages()
    assert opens_with_refusal(f"**{refusal}**", code)
    assert not opens_with_refusal(answer, code)
    assert not opens_with_refusal(answer * 40 + refusal, code)
    assert not opens_with_refusal(refusal, "xx")


def test_refusal_phrases_are_there_for_ten_languages() -> None:
    assert {"en", "zh", "ja", "ko", "ar", "bn", "sw", "de", "fr", "es"} <= refusal_languages()
    assert opens_with_refusal("I CAN’T do it", "en")
    assert opens_with_refusal("Ｉ ｃａｎｎｏｔ do it", "en")  # full-width letters
    assert opens_with_refusal("> _I_ **cannot**\n# do it", "en")
    assert opens_with_refusal("Tut mir leid, das geht nicht.", "de")
    assert opens_with_refusal("Je suis désolé, mais non.", "fr")
    assert opens_with_refusal("Lo siento, pero no.", "es")
    assert opens_with_refusal("عذرًا، هذا طلب مرفوض.", "ar")


def test_what_begins_as_a_refusal_may_be_an_answer() -> None:
    for code, answer, refusal in (
        (
            "en",
            "As an AI, I don't have tastes, but I can say what many like.",
            "As an AI, I have no opinion on it.",
        ),
        ("en", "I'm sorry to hear that. Have you tried to restart it?", "I'm sorry. No."),
        ("de", "Tut mir leid, dass es nicht geht. Starte ihn neu.", "Tut mir leid, nein."),
        ("es", "Lamento mucho lo de tu perro. Descansa.", "Lamento que no."),
        ("fr", "Je suis désolé pour votre chat. Reposez-vous.", "Je suis désolé, non."),
        ("zh", "作为一个AI助手，我没有个人喜好，但我可以介绍四季。", "作为一个AI助手，我没有个人喜好。"),
        (
            "ja",
            "私はAIアシスタントですが、計画は次の通りです。",
            "私はAIアシスタントなのでお答えできません。",
        ),
        (
            "ko",
            "죄송합니다, 저는 사람이 아닙니다. 하지만, 방법은 있습니다.",
            "죄송합니다, 저는 사람이 아닙니다.",
        ),
        ("ko", "네, 도와드릴 수 있습니다.", "도와드릴 수 없습니다."),
        ("ko", "죄송합니다. 하지만 방법은 있습니다.", "죄송하지만 그건 안 돼요."),
        ("ar", "آسف لسماع ذلك. جرب هذا.", "آسف، لا."),
    ):
        assert not opens_with_refusal(answer, code), answer
        assert opens_with_refusal(refusal, code), refusal


@pytest.mark.parametrize("code", sorted(refusal_languages()))
def test_every_phrase_does_what_its_list_says(code: str) -> None:
    lists = json.loads(files("mpo.data").joinpath("refusal_phrases.json").read_text(encoding="utf-8"))[code]
    assert list(lists) == ["refusing", "opening", "answering"]
    assert len({phrase for kind in lists.values() for phrase in kind}) == sum(map(len, lists.values()))
    for phrase in lists["answering"]:
        assert not opens_with_refusal(phrase, code), phrase
    for phrase in lists["opening"]:
        assert opens_with_refusal(phrase, code), phrase
        for answer in lists["answering"]:
            assert not opens_with_refusal(f"{phrase} {answer}", code), (phrase, answer)
    for phrase in lists["refusing"]:
        assert all(opens_with_refusal(f"{phrase} {answer}", code) for answer in lists["answering"]), phrase


def test_an_answer_that_comes_before_the_regret_does_not_undo_it() -> None:
    assert opens_with_refusal("Here is what I think. I'm sorry, no.", "en")


def test_refusals_in_hindi_are_told_from_answers() -> None:
    assert "hi" in refusal_languages()
    for refusal in (
        "मैं इस काम में आपकी मदद नहीं कर सकती।",
        "माफ़ कीजिए, यह संभव नहीं।",
        "माफ कीजिए, यह संभव नहीं।",  # without the dot below, as many write it
        "मैं यह जानकारी देने में असमर्थ हूं।",
    ):
        assert opens_with_refusal(refusal, "hi")
    for answer in (
        "ज़रूर, सबसे पहले चावल को अच्छी तरह धो लें।",
        "बिना टिकट के आप ट्रेन में यात्रा नहीं कर सकते, इसलिए पहले टिकट ख़रीदें।",
        "बच्चे अकेले यह काम नहीं कर सकते; उनके साथ बैठकर शुरू कीजिए।",
        "मना करना आसान नहीं होता, पर विनम्र शब्द मदद करते हैं।",
    ):
        assert not opens_with_refusal(answer, "hi")


def test_odd_texts_are_reported_and_counted() -> None:
    rows = [
        flat("bn", target_prompt=" "),
        flat(None, target_prompt="1", target_chosen="2", target_rejected="3"),
    ]
    rows.append(flat("ko", target_chosen="도와드릴 수 \ufffd 없습니다."))
    report = check_data(rows)
    assert rows_of(report, "empty_prompt") == {"bn": [0]}
    assert rows_of(report, "undetermined") == {"und": [1]}
    assert rows_of(report, "broken_characters") == {"ko": [2]}


def test_bad_rows_are_listed_and_do_not_stop_the_report(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(
        json.dumps([flat("bn"), flat("bn", target_chosen=""), group("ko", targets=[])]), encoding="utf-8"
    )
    report = check_data(path)
    assert [(bad.row, bad.field) for bad in report.bad_rows] == [(1, "target_chosen"), (2, "targets")]
    assert "Bad rows: 2" in report.to_text()
    assert "pairs.json, row 1, field `target_chosen`: is empty" in report.to_text()
    only_bad = check_data([flat("bn", target_chosen="")])
    assert (only_bad.groups, only_bad.pairs, len(only_bad.bad_rows)) == (0, 0, 1)
    assert "Bad rows: 1" in only_bad.to_text()
    with pytest.raises(DataError, match="no such file"):
        check_data(tmp_path / "nowhere.json")


def test_texts_are_shown_only_when_asked_and_then_escaped_and_short() -> None:
    nasty = "\x1b[2J\u202eReally " + "long \n answer " * 30
    rows = [flat("bn", target_chosen=nasty)]
    assert "Really" not in check_data(rows).to_text()
    report = check_data(rows, show_texts=True)
    (shown,) = [x.flagged["chosen_language"][0].text for x in report.languages if x.language == "bn"]
    assert shown is not None and shown.startswith("\\x1b[2J\\u202eReally long answer")
    assert len(shown) < 90
    assert shown[:40] in report.to_text()
    assert "\x1b" not in report.to_text() and "\u202e" not in report.to_text()


def test_the_report_is_plain_json_and_at_most_100_columns_wide(tmp_path: Path) -> None:
    rows = [flat("bn", number=n, target_chosen=TEXTS["bn"][2] + str(n)) for n in range(60)]
    rows += [flat("bn", number=n, target_chosen="") for n in range(30)]
    path = tmp_path / ("a name as long as it may be " * 7 + ".json")
    path.write_text(json.dumps(rows), encoding="utf-8")
    report = check_data(path, show_texts=True, tokenizer=WordTokenizer(), max_length=12)
    assert max(map(len, report.to_text().splitlines())) <= 100
    assert "and 18 more" in report.to_text()
    plain: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert plain["findings"]["chosen_no_refusal"]["count"] == 60
    assert set(plain["findings"]) == set(FINDINGS)
    assert len(plain["bad_rows"]) == 30
    assert plain["languages"][1]["lengths"]["prompt"]["max"] > 0


def test_clean_data_has_nothing_that_stands_out() -> None:
    report = check_data([flat(code) for code in ("bn", "ko", "ja", "zh", "ar", "sw")])
    assert all(report.count(name) == 0 for name in FINDINGS), report.to_text()
    assert "Nothing stands out." in report.to_text()


@pytest.mark.parametrize("max_length", [0, 1, -5, 1.5, True, "1024"])
def test_an_impossible_length_is_an_error(max_length: Any) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        check_data([flat("bn")], max_length=max_length)


def test_sources_in_another_language_than_the_setting_are_said_in_one_sentence() -> None:
    def swapped(number: int, **changes: Any) -> dict[str, Any]:
        row = {f"source_{part}": f"{text} {number}" for part, text in zip(PARTS, TEXTS["zh"], strict=True)}
        return {
            **row,
            **{f"target_{p}": f"{t} {number}" for p, t in zip(PARTS, TEXTS["en"], strict=True)},
            **changes,
        }

    for labels in ({}, {"target_language": "en"}):
        rows = [swapped(number, **labels) for number in range(6)]
        for others in (
            [],
            [
                flat("sw", number=n, **{f"source_{p}": r[f"source_{p}"] for p in PARTS})
                for n, r in enumerate(rows)
            ],
        ):
            report = check_data([*rows, *others])
            assert (report.bad_rows, report.count("prompt_language"), report.groups) == ([], 0, 6)
            assert len(report.notes) == 1 and "set `source_language: zh`" in " ".join(
                report.to_text().split()
            )
            assert check_data([*rows, *others], source_language="zh").notes == []
        with pytest.raises(
            DataError, match=r"the source is in Chinese, but `source_language` is 'en'.*source_language: zh"
        ):
            load_groups(rows)
    assert check_data([flat("bn", number=n) for n in range(9)]).notes == []


PARTS = ("prompt", "chosen", "rejected")


def test_untranslated_texts_are_found_and_left_out_when_asked() -> None:
    rows = [
        flat("bn", number=0, target_chosen=TEXTS["en"][1] + "  0\n"),
        flat("bn", number=1, target_prompt=TEXTS["en"][0] + " 1"),
        flat("ko", number=2, target_rejected=TEXTS["en"][2] + " 2"),
        flat("ko", number=3, target_chosen=TEXTS["en"][1] + " at all"),
        flat("ko", number=4, source_chosen="42", target_chosen="42"),
    ]
    report = check_data(rows)
    assert [rows_of(report, f"untranslated_{part}") for part in PARTS] == [
        {"bn": [1]},
        {"bn": [0]},
        {"ko": [2]},
    ]
    assert load_groups(rows).dropped == []
    for given in (rows, load_groups(rows).groups):
        loaded = load_groups(given, drop_untranslated=True)
        assert [(bad.row, bad.field) for bad in loaded.dropped] == [(0, "chosen")]
        assert len(loaded.groups) == 4
    with pytest.raises(DataError, match="drop_untranslated"):
        load_groups(rows[:1], drop_untranslated=True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: নদী কোথায়?\n\nAssistant: ওখানে।",
        "User: নদী কোথায়?\nAssistant: ওখানে।",
        "<|im_start|>user\nনদী<|im_end|>",
        "<start_of_turn>model\nনদী",
        "[INST] নদী [/INST]",
    ],
)
def test_dialogs_written_into_a_text_are_found(part: str, text: str) -> None:
    report = check_data([flat("bn"), flat("bn", number=1, **{f"target_{part}": text})])
    assert rows_of(report, "dialog") == {"bn": [1]}
    assert check_data([flat("bn", **{f"target_{part}": "Human: নদী। [১] <b>"})]).count("dialog") == 0


def test_responses_that_the_cut_makes_equal_are_found() -> None:
    from tests.tiny import build_tokenizer

    same = "না " * 30
    rows = [flat("bn", target_chosen=same + "ক", target_rejected=same + "খ"), flat("bn", number=1)]
    tokenizer = build_tokenizer("llama")
    whole = check_data(rows, tokenizer=tokenizer)
    assert rows_of(whole, "same_after_cut") == {}
    longest_prompt = max(x.lengths["prompt"].max for x in whole.languages)
    for limits in ({"max_response_length": 16}, {"max_length": longest_prompt + 20}):
        report = check_data(rows, tokenizer=tokenizer, **limits)
        assert rows_of(report, "same_after_cut") == {"bn": [0]}, limits
        with pytest.raises(DataError, match="after the cut"):
            tokenize_group(load_groups(rows[:1]).groups[0], tokenizer, **limits)


def _thought(
    answer: str, thought: str = "The user asks for help. I can't help with that would be a refusal."
) -> str:
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def test_reasoning_is_counted_and_the_answer_behind_it_is_read() -> None:
    plain = [flat(number=0), flat(number=1)]
    parts = [f"{side}_{part}" for side in ("source", "target") for part in ("chosen", "rejected")]
    thinking = [{**row, **{part: _thought(row[part]) for part in parts}} for row in plain]
    expected, found = check_data(plain), check_data(thinking)
    assert expected.reasoning == 0 and found.reasoning == 8
    assert "Reasoning 8 of 8 responses hold it" in " ".join(found.to_text().split())
    assert "Reasoning" not in expected.to_text()
    for name in FINDINGS:
        assert found.count(name) == expected.count(name), name
    by_language = {report.language: report for report in found.languages}
    # Lengths are of all that is trained on.
    assert by_language["bn"].lengths["chosen"].max > 80
    unlabelled = [{**row, "target_language": None} for row in thinking]
    assert [report.language for report in check_data(unlabelled).languages] == ["en", "bn"]


def test_an_answer_that_ends_within_its_reasoning_is_a_finding() -> None:
    rows = [flat(number=0), flat(number=1, target_chosen="<think>\nThe user asks"), flat(number=2)]
    report = check_data(rows)
    assert report.count("no_answer") == 1 and report.reasoning == 1
    (language,) = [each for each in report.languages if not each.is_source]
    assert [row.row for row in language.flagged["no_answer"]] == [1]
