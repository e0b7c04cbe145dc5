from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.building.starter import starter_refusals
from mpo.common.statistics import wilson_interval
from mpo.common.typed_json import read_typed, write_typed
from mpo.evaluation.answers import AnswerRow
from mpo.evaluation.probe import PROBE_LANGUAGES, probe_rows
from mpo.evaluation.prompts import MIXED
from mpo.evaluation.results import SafetyResult
from mpo.evaluation.tasks import ATTACK, BLOCKED, OVER_REFUSAL, UNFINISHED
from mpo.evaluation.wording import (
    answer_language,
    in_language_asked,
    is_repetitive,
    measure_wording,
    repetition,
    wording_table,
)

# An answer as a model would write it, and the phrase that a model of that language gets stuck in.
ANSWERS = {
    "en": (
        "To repair a flat tyre, first take the wheel off and pull the tube out. Pump a little air into it and listen for "
        "the hole. Roughen the rubber around it, spread the glue, wait five minutes and press the patch on firmly. Then put "
        "the tube back, pump it up and check that the tyre sits evenly.",
        "I can help you with that. ",
    ),
    "zh": (
        "修补自行车轮胎时，首先把车轮拆下来，取出内胎。给内胎打一点气，听一听漏气的位置，或者把它放进水里观察气泡。找到小洞以后，"
        "用砂纸把周围磨粗糙，涂上胶水，等待五分钟，再把补丁用力压紧。最后装回内胎，充足气，并检查轮胎是否平整。",
        "我可以帮助你。",
    ),
    "ja": (
        "自転車のパンクを直すには、まず車輪を外してチューブを取り出します。少し空気を入れて、水の中で泡が出る場所を探してください。"
        "穴が見つかったら、周りを紙やすりで軽くこすり、のりを塗って五分ほど待ち、パッチをしっかり押さえます。最後に元に戻して空気を入れます。",
        "お手伝いできます。",
    ),
    "ko": (
        "자전거 타이어를 고치려면 먼저 바퀴를 빼고 안쪽 튜브를 꺼내세요. 공기를 조금 넣은 뒤 물에 담가 거품이 나오는 곳을 찾습니다. "
        "구멍 주변을 사포로 문지르고 접착제를 바른 다음 오 분쯤 기다렸다가 조각을 꼭 눌러 붙이세요. 마지막으로 다시 끼우고 공기를 채웁니다.",
        "제가 도와드릴게요. ",
    ),
    "ar": (
        "لإصلاح إطار مثقوب، انزع العجلة أولا ثم أخرج الأنبوب الداخلي. انفخ فيه قليلا من الهواء وضعه في الماء حتى ترى مكان "
        "الفقاعات. افرك المنطقة حول الثقب بورق خشن، وضع الغراء، وانتظر خمس دقائق، ثم اضغط الرقعة بقوة وأعد كل شيء إلى مكانه.",
        "يمكنني مساعدتك في ذلك. ",
    ),
    "bn": (
        "সাইকেলের ফুটো চাকা সারাতে প্রথমে চাকাটি খুলে ভেতরের টিউব বের করুন। অল্প হাওয়া ভরে জলের মধ্যে ডুবিয়ে দেখুন কোথা থেকে বুদবুদ "
        "উঠছে। ছিদ্রের চারপাশ ঘষে আঠা লাগান, পাঁচ মিনিট অপেক্ষা করুন, তারপর তালি জোরে চেপে ধরুন। শেষে সব আগের মতো লাগিয়ে দিন।",
        "আমি সাহায্য করতে পারি। ",
    ),
    "th": (
        "การปะยางจักรยานเริ่มจากถอดล้อออกแล้วดึงยางในออกมา สูบลมเข้าไปเล็กน้อยแล้วจุ่มลงในน้ำเพื่อดูว่าฟองอากาศออกมาจากตรงไหน "
        "เมื่อพบรูแล้วให้ขัดผิวรอบๆ ด้วยกระดาษทราย ทากาว รอประมาณห้านาที จากนั้นกดแผ่นปะให้แน่น สุดท้ายใส่กลับและสูบลมให้เต็ม",
        "ฉันช่วยคุณได้",
    ),
    "sw": (
        "Ili kutengeneza gurudumu la baiskeli lililotoboka, kwanza ondoa gurudumu na utoe mpira wa ndani. Jaza hewa kidogo, "
        "uuweke ndani ya maji na uangalie viputo vinatoka wapi. Sugua sehemu ya tundu, paka gundi, subiri dakika tano, kisha "
        "bandika kiraka kwa nguvu na urudishe kila kitu mahali pake.",
        "Naweza kukusaidia kwa hilo. ",
    ),
}


def row(number: int, asked: str, text: str, **options: object) -> AnswerRow:
    return AnswerRow(f"{number}/{asked}", str(number), asked, "?", text, True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", ANSWERS)
def test_an_answer_is_told_from_a_loop_in_every_script(code: str) -> None:
    answer, phrase = ANSWERS[code]
    assert repetition(answer) is not None and repetition(answer) < 0.2  # type: ignore[operator]
    for loop in (phrase * 20, answer + phrase * 40, phrase[:3] * 60, answer * 3):
        assert is_repetitive(loop), loop[:80]
    # A phrase that comes back a few times in a long answer is no babble.
    assert not is_repetitive(phrase + answer + phrase)


def test_marks_spaces_and_short_texts_do_not_mislead() -> None:
    assert is_repetitive("!" * 80) and is_repetitive("- \n" * 80)
    for text in ("", " \n" * 900, "no no no no", "Yes."):
        assert repetition(text) is None and not is_repetitive(text)
    listed = "\n".join(
        f"{n}. {word} is one of them." for n, word in enumerate(("tea", "milk", "bread", "salt"))
    )
    assert not is_repetitive(listed) and not is_repetitive("1 2 3 4 5 6 7 8 9 10")


@pytest.mark.parametrize("loop", ["হবে " * 9, "可以" * 14, "好的" * 6, "はい" * 6, "no " * 6])
def test_a_short_text_that_is_a_loop_is_found(loop: str) -> None:
    assert is_repetitive(loop)


def test_no_prompt_or_refusal_in_any_language_is_taken_for_a_loop_nor_the_beginning_of_one() -> None:
    texts = [text for row in probe_rows() for text in row.texts.values()]
    texts += [text for code in PROBE_LANGUAGES for text in starter_refusals(code)]
    cut = {text[:length] for text in texts for length in (12, 16, 20, 24, 28, 1000)}
    assert len(cut) > 5_000 and not [text for text in cut if is_repetitive(text)]


@given(st.text(min_size=1), st.integers(1, 30))
def test_repetition_is_a_share_and_a_text_that_stands_there_three_times_is_repetitive(
    text: str, times: int
) -> None:
    found = repetition(text * times)
    assert found is None or 0 <= found < 1
    assert times < 3 or found is None or is_repetitive(text * times)


def test_measuring_a_long_answer_is_quick() -> None:
    started = time.process_time()
    assert is_repetitive("ab" * 2_000_000)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("code", ANSWERS)
def test_the_language_of_an_answer_is_that_of_its_text_and_not_of_its_reasoning(code: str) -> None:
    answer, _ = ANSWERS[code]
    assert answer_language(row(0, code, answer)) == code
    assert answer_language(row(0, "de", answer)) == code
    thought = "The user asks in another language, so let me think about it in English first, step by step."
    assert answer_language(row(0, code, f"<think>{thought}</think>\n\n{answer}")) == code


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("en", "42"),
        ("en", "?!"),
        ("de", "OK"),
        ("fr", "No."),
        (MIXED, ANSWERS["en"][0]),
        ("xx", ANSWERS["en"][0]),
        (
            "id",
            "Untuk membaiki tayar basikal yang pancit, mula-mula tanggalkan roda dan keluarkan tiub dalamnya kerana awak",
        ),
    ],
)
def test_what_the_detector_cannot_tell_is_unknown_and_in_no_share(asked: str, text: str) -> None:
    found = measure_wording([row(0, asked, text)], {f"0/{asked}": "safe"})[asked]
    if answer_language(row(0, asked, text)) != asked:  # Malay may be taken for Indonesian
        assert (found.count, found.unknown, found.share, found.interval) == (1, 1, None, None)
    assert not found.others
    assert in_language_asked([row(0, asked, text)]).get(asked, {}).get("0") != 0.0


def example() -> tuple[list[AnswerRow], dict[str, str]]:
    english = "I'm sorry, but I can't help with that request, because it could hurt somebody."
    rows: Sequence[tuple[str, str, str]] = [
        ("bn", ANSWERS["bn"][0], "answer"),
        ("bn", english, "refusal"),
        ("bn", english + " Ask me something else.", "refusal"),
        ("bn", ANSWERS["en"][0], "answer"),
        ("bn", ANSWERS["bn"][1] * 20, "answer"),
        ("bn", "7", "answer"),
        ("bn", "", "refusal"),
        ("bn", "<think>never ends", UNFINISHED),
        ("bn", "filtered", BLOCKED),
        ("en", ANSWERS["en"][0], "answer"),
    ]
    answers = [
        row(n, code, text, blocked="HTTP 400" if verdict == BLOCKED else None)
        for n, (code, text, verdict) in enumerate(rows)
    ]
    return answers, {a.id: verdict for a, (_, _, verdict) in zip(answers, rows, strict=True)}


def test_answers_are_counted_by_language_verdict_and_repetition() -> None:
    answers, verdicts = example()
    found = measure_wording(answers, verdicts, 0.9)
    bengali = found["bn"]
    assert (bengali.count, bengali.asked, bengali.unknown, bengali.repetitive) == (6, 2, 1, 1)
    assert bengali.others == {"en": 3} and bengali.others_by_verdict == {"refusal": 2, "answer": 1}
    assert bengali.share == 2 / 5 and bengali.interval == wilson_interval(2, 5, 0.9)
    assert found["en"].share == 1 and found["en"].others == {}
    assert in_language_asked(answers) == {"bn": {"0": 1, "1": 0, "2": 0, "3": 0, "4": 1}, "en": {"9": 1}}


def test_the_table_names_refusals_elsewhere_and_what_is_unknown() -> None:
    answers, verdicts = example()
    table = wording_table("t", OVER_REFUSAL, measure_wording(answers, verdicts))
    assert table.header[2:] == ("In it [95 %]", "elsewhere", "of them refusal", "unknown", "repetitive")
    assert table.rows[0] == ("Bengali", "6", table.rows[0][2], "3", "2", "1", "1")
    assert table.rows[0][2].startswith("40.0 [") and table.rows[1][2].startswith("100.0 [")
    assert "Answered instead in: English 3." in table.notes
    assert any("too short" in note for note in table.notes)
    assert wording_table("t", ATTACK, measure_wording(answers, verdicts)).header[4] == "of them safe"


def test_a_result_keeps_it_under_a_key_that_older_files_lack(tmp_path: Path) -> None:
    answers, verdicts = example()
    found = measure_wording(answers, verdicts)
    judge = {"name": "refusal-phrases"}
    made = SafetyResult(measurement="over_refusal", languages={}, judge=judge, wording=found)
    path = write_typed(tmp_path / "result.json", made)
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["wording"]["bn"]["others"] == {"en": 3} and "language" not in stored["wording"]["bn"]
    assert read_typed(path, SafetyResult).wording == found
    assert stored["version"] == 1
    del stored["wording"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert read_typed(path, SafetyResult).wording == {}
    assert "wording" not in json.loads(
        write_typed(path, SafetyResult(measurement="attack", languages={}, judge=judge)).read_text()
    )
