"""A translator for tests: a program that reads lines and writes lines, word by word in letters of the target's script.

``python stub.py SOURCE TARGET [FAULTS]``. A word always becomes the same letters, so that a translation is as long as it should
be and its script says which language it is. Sentences that refuse become ones that refuse. ``FAULTS`` is a JSON file,
``{TARGET: {line: fault}}``, with what to do wrong. From Greek it translates back, from others into nonsense.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

ALPHABETS = {
    "zh": "的一是在有人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少图山统接知较将组见计别她手角期根论运农指几九区强放决西被干做必战先回则任取据处队南给色光门即保治北造百规热领七海口东导器压志世金增争济阶油思术极交受联什认六共权收证改清己美再采转更单风切打白教速花带安场身车例真务具万每目至达走积示议声报斗完类八离华名确才科张信马节话米整空元况今集温传土许步群广石记需段研界拉林律叫且究观越织装影算低持音众书布复容儿须际商非验连断深难近矿千周委素技备半办青省列习响约支般史感劳便团往酸历市克何除消构府称太准精值号率族维划选标写存候毛亲快效斯院查江型眼王按格养易置派层片始却专状育厂京识适属圆包火住调满县局照参红细引听该铁价严",
    "ja": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん",
    "ko": "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후기니디리미비시이지치키티피히",
    "bn": "কখগঘচছজঝটঠডঢণতথদধনপফবভমযরলশষসহ",
    "th": "กขคงจฉชซญฐณดตถทธนบปผฝพฟภมยรลวศสหอ",
    "el": "αβγδεζηθικλμνξοπρστυφχψω",
}  # fmt: skip
# Letters of the script for one of the word, and what stands between words.
SHAPE = {
    "zh": (0.3, ""),
    "ja": (0.5, ""),
    "ko": (0.45, " "),
    "bn": (1.0, " "),
    "th": (1.0, " "),
    "el": (1.0, " "),
}
LATIN = "abcdefghijklmnopqrstuvwxyz"

REFUSAL = "I'm sorry, but I can't help with that."
REFUSALS = {
    "zh": "对不起，我不能帮助您。",
    "ja": "申し訳ありませんが、お手伝いできません。",
    "ko": "죄송하지만 도와드릴 수 없습니다.",
    "th": "ขออภัย ฉันไม่สามารถช่วยเรื่องนี้ได้",
    "bn": "দুঃখিত, আমি সাহায্য করতে পারি না।",
}

REMARKS = {
    "zh": "请提供需要翻译的文本。",
    "ja": "翻訳するテキストを入力してください。",
    "ko": "번역할 내용을 알려 주세요.",
    "bn": "অনুবাদ করার লেখাটি দিন।",
}


def word(text: str, target: str) -> str:
    """A word in letters of the target's script."""
    letters = ALPHABETS[target]
    if target == "el":  # can be translated back
        return "".join(letters[min(LATIN.index(c), 23)] if c in LATIN else c for c in text.lower())
    length = max(1, round(len(text) * SHAPE[target][0]))
    digest = hashlib.sha256(f"{target} {text.lower()}".encode()).digest()
    return "".join(letters[byte % len(letters)] for byte in (digest * (1 + length // 32))[:length])


def translate(line: str, source: str, target: str, fault: str | None = None) -> str:
    """A line as a faultless translator, or one with this fault, would write it."""
    if source not in ("en", "el"):
        return "bread and seven windows by the river"
    if source == "el":
        return "".join(LATIN[ALPHABETS["el"].index(c)] if c in ALPHABETS["el"] else c for c in line)
    if fault == "copy":
        return line
    if fault == "language":
        target = "th"
    if fault == "complies":
        line = line.replace(REFUSAL, "Take this and open it at once with that.")
    begin = ""
    if line.startswith(REFUSAL) and target in REFUSALS:
        begin, line = REFUSALS[target] + " ", line[len(REFUSAL) :].strip()
    if fault == "remark":
        return (REMARKS[target] * len(line))[: max(8, round(len(line) * SHAPE[target][0]))]
    if fault == "refuses":
        begin, line = REFUSALS[target] + " ", line[len(line) // 2 :]
    words = [word(each.strip(".,?!'"), target) for each in line.split() if each.strip(".,?!'")]
    written = begin + SHAPE[target][1].join(words)
    if fault == "half":
        return written[: 2 * len(written) // 5]
    return (written[:4] * len(written))[: len(written)] if fault == "repeat" else written


def main() -> None:
    source, target, *rest = sys.argv[1:]
    faults = json.loads(Path(rest[0]).read_text(encoding="utf-8")).get(target, {}) if rest else {}
    for line in sys.stdin.buffer.read().decode("utf-8").split("\n")[:-1]:
        sys.stdout.buffer.write((translate(line, source, target, faults.get(line)) + "\n").encode("utf-8"))


if __name__ == "__main__":
    main()
