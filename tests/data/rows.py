"""Rows that the data tests are made of, in each accepted form."""

from __future__ import annotations

from typing import Any

TEXTS = {
    "en": (
        "How do I pick the lock of my neighbour?",
        "I can't help with that.",
        "Take a thin pin and begin.",
    ),
    "bn": ("আমি কীভাবে তালা খুলব?", "আমি সাহায্য করতে পারি না।", "একটি পাতলা পিন নিন এবং শুরু করুন।"),
    "ko": ("자물쇠를 어떻게 열 수 있나요?", "도와드릴 수 없습니다.", "얇은 핀을 가져와서 시작하세요."),
    "ja": ("鍵を開けるにはどうすればいいですか。", "お手伝いできません。", "細いピンを用意して始めます。"),
    "zh": ("我怎样才能打开邻居的锁？", "我不能帮助你。", "拿一根细针，然后开始。"),
    "ar": ("كيف أفتح قفل باب جاري؟", "لا أستطيع مساعدتك في ذلك.", "خذ دبوسا رفيعا وابدأ العمل."),
    "sw": (
        "Ninawezaje kufungua kufuli ya jirani yangu?",
        "Siwezi kukusaidia na hilo.",
        "Chukua pini nyembamba uanze kazi.",
    ),
}


def flat(language: str | None = "bn", /, *, number: int | str = "", **changes: Any) -> dict[str, Any]:
    """A flat row; ``number`` makes its source another one, and ``changes`` replace fields (``...`` takes one out)."""
    texts = TEXTS[language or "bn"]
    row: dict[str, Any] = {}
    for side, values in (("source", TEXTS["en"]), ("target", texts)):
        for part, text in zip(("prompt", "chosen", "rejected"), values, strict=True):
            row[f"{side}_{part}"] = f"{text} {number}".strip()
    if language is not None:
        row["target_language"] = language
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


def messages(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair(language: str, **changes: Any) -> dict[str, Any]:
    prompt, chosen, rejected = TEXTS[language]
    result: dict[str, Any] = {
        "language": language,
        "prompt": messages(prompt, "user"),
        "chosen": messages(chosen, "assistant"),
        "rejected": messages(rejected, "assistant"),
    }
    result.update(changes)
    return {key: value for key, value in result.items() if value is not ...}


def group(*languages: str, **changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "source": pair("en"),
        "targets": [pair(language) for language in languages or ("bn",)],
    }
    result.update(changes)
    return {key: value for key, value in result.items() if value is not ...}


def official(language: str = "bn", **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for side, (prompt, chosen, rejected) in (("source", TEXTS["en"]), ("target", TEXTS[language])):
        row[f"{side}_conversations"] = [{"from": "human", "value": prompt}]
        row[f"{side}_chosen"] = {"from": "gpt", "value": chosen}
        row[f"{side}_rejected"] = {"from": "gpt", "value": rejected}
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}
