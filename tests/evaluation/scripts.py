"""Requests in ten scripts, with what texts in them can lose on the way: marks, joiners, directions, forms."""

from __future__ import annotations

TEXTS = {
    "en": "Plain, with “quotes”, a\ttab, \\n and {prompt} {0} %s",
    "zh": "怎样打开窗户？　全角空格，和𠮷",
    "ja": "窓を開けるにはどうしますか。が＝か\u3099",
    "ko": "창문을 어떻게 열어요? 한=\u1112\u1161\u11ab",
    "ar": "كَيْفَ أَفْتَحُ النَّافِذَةَ؟ \u200f(abc)\u200e \u2067قلب\u2069 ـــ",
    "he": "אֵיךְ פּוֹתְחִים חַלּוֹן?",
    "bn": "জানালা কীভাবে খুলব? ক্ষ র\u200d্য ড\u09bc",
    "hi": "खिड़की कैसे खोलें? क्\u200dष क्\u200cष",
    "th": "เปิดหน้าต่างอย่างไร น้ำ",
    "ru": "Как открыть окно? й=и\u0306",
    "el": "Πώς ανοίγω το παράθυρο; ΐ=ι\u0308\u0301",
    "ta": "சாளரத்தை எப்படித் திறப்பது? கொ",
    "sw": 'Nifungueje dirisha? 🙂👩\u200d👧 \u2028 \x85 \u0301 line\nbreak\r\n, "comma"',
}
