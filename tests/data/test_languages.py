"""Labels are normalised, and languages detected from script and letters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo.data.languages import (
    LANGUAGES,
    detect,
    detect_language,
    detect_pair_language,
    dominant_script,
    known_to_detection,
    language_name,
    normalize_language,
)
from mpo.errors import DataError
from tests.data.rows import TEXTS


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("en", "en"),
        ("EN", "en"),
        ("English", "en"),
        (" english ", "en"),
        ("eng", "en"),
        ("zh-CN", "zh"),
        ("zh_Hant_TW", "zh"),
        ("zho_Hans", "zh"),
        ("cmn", "zh"),
        ("中文", "zh"),
        ("Chinese (Simplified)", "zh"),
        ("Simplified Chinese", "zh"),
        ("ben_Beng", "bn"),
        ("Bangla", "bn"),
        ("বাংলা", "bn"),
        ("arb_Arab", "ar"),
        ("swh", "sw"),
        ("Kiswahili", "sw"),
        ("iw", "he"),
        ("nb-NO", "no"),
        ("pt-BR", "pt"),
        ("yue", "yue"),
        ("xx", "xx"),
    ],
)
def test_a_label_is_normalised(label: str, code: str) -> None:
    assert normalize_language(label) == code


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("Engish", "'English' ('en')"),
        ("Swahilli", "'Swahili' ('sw')"),
        ("jp", "the code of Japanese is 'ja'"),
        ("cn", "the code of Chinese is 'zh'"),
        ("kr", "the code of Korean is 'ko'"),
        ("jap", "the code of Japanese is 'ja'"),
        ("chn", "the code of Chinese is 'zh'"),
        ("CHN-Hans", "the code of Chinese is 'zh'"),
        ("sp", "the code of Spanish is 'es'"),
        ("ir", "the code of Persian is 'fa'"),
        ("b", "ISO 639-1"),
        ("12", "ISO 639-1"),
        ("en;de", "ISO 639-1"),
        ("x" * 500, "..."),
        ("\x1b[31mred", "\\x1b"),
    ],
)
def test_an_unknown_label_is_an_error_with_a_hint(label: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        normalize_language(label)
    assert hint in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 250


@given(st.text(max_size=12))
@settings(deadline=None)
def test_normalising_ends_in_a_code_that_stays_or_in_a_data_error(label: str) -> None:
    try:
        code = normalize_language(label)
    except DataError:
        return
    assert code.isascii() and code.islower() and len(code) in (2, 3)
    assert normalize_language(code) == code


def test_the_table_is_large_and_each_entry_leads_back_to_its_code() -> None:
    assert len(LANGUAGES) >= 60
    assert {"zh", "ja", "ko", "ar", "bn", "sw", "en", "de", "fr", "es", "it", "vi", "th", "jv", "hi"} <= set(
        LANGUAGES
    )
    for code, language in LANGUAGES.items():
        for label in (code, language.name, language.native, *language.iso3):
            assert normalize_language(label) == code
    assert language_name("sw") == "Swahili"
    assert language_name("tlh") == "tlh"


SENTENCES = {
    "de": "Wie kann ich morgen mit dem Zug nach Hamburg fahren?",
    "fr": "Je voudrais savoir comment on prépare une bonne soupe.",
    "es": "¿Cuál es la mejor manera de aprender a nadar en el mar?",
    "it": "Vorrei sapere come si prepara un buon piatto di pasta.",
    "vi": "Tôi muốn biết cách nấu một món ăn ngon cho gia đình.",
    "jv": "Aku arep lunga menyang pasar tuku sayuran karo ibu.",
    "th": "ฉันอยากรู้วิธีทำอาหารอร่อย ๆ สำหรับครอบครัว",
    "hi": "मैं जानना चाहता हूँ कि अच्छा खाना कैसे बनाया जाता है।",
    "mr": "मला चांगले जेवण कसे बनवायचे ते जाणून घ्यायचे आहे.",
    "fa": "می‌خواهم بدانم چگونه می‌توان یک غذای خوب پخت.",
    "ur": "میں جاننا چاہتا ہوں کہ اچھا کھانا کیسے بنایا جاتا ہے۔",
    "ru": "Я хотел бы узнать, как приготовить вкусный суп.",
    "uk": "Я хотів би дізнатися, як приготувати смачний борщ.",
    "as": "মই জানিব বিচাৰোঁ ভাল খাদ্য কেনেকৈ ৰান্ধিব লাগে।",
    "he": "אני רוצה לדעת איך מבשלים מרק טעים למשפחה.",
    "el": "Θέλω να μάθω πώς να μαγειρεύω μια καλή σούπα.",
    "am": "ጥሩ ምግብ እንዴት እንደሚዘጋጅ ማወቅ እፈልጋለሁ።",
}


@pytest.mark.parametrize(
    ("code", "text"), [*SENTENCES.items(), *((code, texts[0]) for code, texts in TEXTS.items())]
)
def test_a_sentence_is_detected(code: str, text: str) -> None:
    assert detect_language(text) == code


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("我喜欢の这个品牌，因为它的质量非常好而且价格便宜", "Han"),
        ("周杰伦・蔡依林・林俊杰", "Han"),
        ("東京に行きます", "Japanese"),
        ("ラーメン", "Japanese"),
        ("コーーーーーーーー", "Japanese"),
        ("佐々木", "Han"),
        ("µ ½ ™", None),
        ("ଓଡ଼ିଆ ଭାଷା", "Odia"),
        ("GPT-4 모델을 사용합니다 (AI)", "Hangul"),
        ("Use import torch, dann 你好", "Latin"),
        ("42 + 1 = 43 🎉", None),
        ("", None),
    ],
)
def test_the_dominant_script_is_found(text: str, script: str | None) -> None:
    assert dominant_script(text) == script


def test_an_english_name_in_another_script_does_not_mislead() -> None:
    assert detect_language("أريد أن أعرف كيف يمكنني أن أستخدم Microsoft Windows مع Linux في البيت") == "ar"
    assert detect_language("Как использовать Microsoft Windows Server вместе с Linux на компьютере?") == "ru"


def test_untranslated_texts_of_a_pair_do_not_decide_its_language() -> None:
    english, korean, swahili = TEXTS["en"], TEXTS["ko"], TEXTS["sw"]
    long_english = "This is a long answer in English that goes on and on about nothing in particular. " * 10
    assert detect_pair_language(english[0], korean[1], korean[2], "en") == "ko"
    assert detect_pair_language(korean[0], long_english, english[2], "en") == "ko"
    assert detect_pair_language(english[0], long_english, swahili[2], "en") == "sw"
    assert detect_pair_language(english[0], english[1], english[2], "en") == "en"
    assert detect_pair_language(english[0], english[1], english[2], "zh") == "en"
    assert detect_pair_language(swahili[0], swahili[1], "Wow", "en") == "sw"
    assert detect_pair_language("", swahili[1], swahili[2], "en") == "sw"
    assert detect_pair_language("1 + 1", "2", "3", "en") == "und"


def test_texts_too_short_to_be_sure_of_are_read_together() -> None:
    assert detect_pair_language("Ninawezaje", "kufungua kufuli", "ya jirani yangu", "en") == "sw"
    assert not detect("kufuli").certain
    assert detect("자물쇠").certain
    assert detect(SENTENCES["jv"]).certain


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_detection_takes_any_text_and_is_deterministic(text: str) -> None:
    first = detect(text)
    assert detect(text) == first
    assert first.language == "und" or first.language in LANGUAGES


def test_detection_knows_most_of_the_table() -> None:
    known = known_to_detection([*LANGUAGES, "tlh"])
    assert len(known) >= 95
    assert {"zh", "ja", "ko", "ar", "bn", "sw", "en", "jv", "th"} <= known
    assert "tlh" not in known
