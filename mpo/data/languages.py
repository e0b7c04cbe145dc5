"""Languages: names, scripts, normalised labels, and detection where a label is missing.

Detection takes two steps. The script of the letters settles most cases on its own (Hangul is Korean, kana is
Japanese, Han without kana is Chinese, Thai script is Thai). Where several languages share a script, the
``py3langid`` classifier chooses among the languages of that script only. It was chosen over
``lingua-language-detector`` because it needs 92 MB and half a second where lingua needs 900 MB and 7 seconds,
ships a 5 MB model (no pickle) inside a pure-Python package, was as accurate on MultiJail and PolyRefuse, and
knows Javanese, which lingua does not.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mpo.errors import ConfigError, DataError, DependencyError

UNDETERMINED = "und"
"""Label of texts that hold no letters (BCP 47's code for "undetermined")."""


@dataclass(frozen=True)
class Language:
    """One language of the table.

    Attributes:
        code: ISO 639-1 code, or ISO 639-3 where there is none.
        name: English name.
        native: Name in the language itself.
        iso3: ISO 639-3 and ISO 639-2/B codes that mean the same language.
        scripts: Scripts it is commonly written in, the usual one first.
    """

    code: str
    name: str
    native: str
    iso3: tuple[str, ...]
    scripts: tuple[str, ...]


_TABLE = """
af|Afrikaans|Afrikaans|afr|Latin
am|Amharic|አማርኛ|amh|Ethiopic
ar|Arabic|العربية|ara arb|Arabic
as|Assamese|অসমীয়া|asm|Bengali
az|Azerbaijani|azərbaycanca|aze azj|Latin
be|Belarusian|беларуская|bel|Cyrillic
bg|Bulgarian|български|bul|Cyrillic
bn|Bengali|বাংলা|ben|Bengali
bs|Bosnian|bosanski|bos|Latin
ca|Catalan|català|cat|Latin
cs|Czech|čeština|ces cze|Latin
cy|Welsh|Cymraeg|cym wel|Latin
da|Danish|dansk|dan|Latin
de|German|Deutsch|deu ger|Latin
el|Greek|ελληνικά|ell gre|Greek
en|English|English|eng|Latin
es|Spanish|español|spa|Latin
et|Estonian|eesti|est ekk|Latin
eu|Basque|euskara|eus baq|Latin
fa|Persian|فارسی|fas per pes|Arabic
fi|Finnish|suomi|fin|Latin
fr|French|français|fra fre|Latin
fy|Western Frisian|Frysk|fry|Latin
ga|Irish|Gaeilge|gle|Latin
gd|Scottish Gaelic|Gàidhlig|gla|Latin
gl|Galician|galego|glg|Latin
gu|Gujarati|ગુજરાતી|guj|Gujarati
ha|Hausa|Hausa|hau|Latin
he|Hebrew|עברית|heb|Hebrew
hi|Hindi|हिन्दी|hin|Devanagari
hr|Croatian|hrvatski|hrv|Latin
ht|Haitian Creole|kreyòl ayisyen|hat|Latin
hu|Hungarian|magyar|hun|Latin
hy|Armenian|հայերեն|hye arm|Armenian
id|Indonesian|Bahasa Indonesia|ind|Latin
ig|Igbo|Igbo|ibo|Latin
is|Icelandic|íslenska|isl ice|Latin
it|Italian|italiano|ita|Latin
ja|Japanese|日本語|jpn|Japanese
jv|Javanese|basa Jawa|jav|Latin
ka|Georgian|ქართული|kat geo|Georgian
kk|Kazakh|қазақ тілі|kaz|Cyrillic
km|Khmer|ខ្មែរ|khm|Khmer
kn|Kannada|ಕನ್ನಡ|kan|Kannada
ko|Korean|한국어|kor|Hangul
ku|Kurdish|kurdî|kur kmr|Latin Arabic
ky|Kyrgyz|кыргызча|kir|Cyrillic
lg|Ganda|Luganda|lug|Latin
ln|Lingala|lingála|lin|Latin
lo|Lao|ລາວ|lao|Lao
lt|Lithuanian|lietuvių|lit|Latin
lv|Latvian|latviešu|lav lvs|Latin
mg|Malagasy|Malagasy|mlg plt|Latin
mi|Maori|te reo Māori|mri mao|Latin
mk|Macedonian|македонски|mkd mac|Cyrillic
ml|Malayalam|മലയാളം|mal|Malayalam
mn|Mongolian|монгол|mon khk|Cyrillic
mr|Marathi|मराठी|mar|Devanagari
ms|Malay|Bahasa Melayu|msa may zsm|Latin
mt|Maltese|Malti|mlt|Latin
my|Burmese|မြန်မာ|mya bur|Myanmar
ne|Nepali|नेपाली|nep npi|Devanagari
nl|Dutch|Nederlands|nld dut|Latin
no|Norwegian|norsk|nor nob|Latin
ny|Chichewa|Chichewa|nya|Latin
om|Oromo|Afaan Oromoo|orm gaz|Latin
or|Odia|ଓଡ଼ିଆ|ori ory|Odia
pa|Punjabi|ਪੰਜਾਬੀ|pan|Gurmukhi
pl|Polish|polski|pol|Latin
ps|Pashto|پښتو|pus pbt|Arabic
pt|Portuguese|português|por|Latin
qu|Quechua|Runa Simi|que quy|Latin
ro|Romanian|română|ron rum|Latin
ru|Russian|русский|rus|Cyrillic
rw|Kinyarwanda|Kinyarwanda|kin|Latin
sd|Sindhi|سنڌي|snd|Arabic
si|Sinhala|සිංහල|sin|Sinhala
sk|Slovak|slovenčina|slk slo|Latin
sl|Slovenian|slovenščina|slv|Latin
sn|Shona|chiShona|sna|Latin
so|Somali|Soomaali|som|Latin
sq|Albanian|shqip|sqi alb als|Latin
sr|Serbian|српски|srp|Cyrillic Latin
st|Sesotho|Sesotho|sot|Latin
su|Sundanese|basa Sunda|sun|Latin
sv|Swedish|svenska|swe|Latin
sw|Swahili|Kiswahili|swa swh|Latin
ta|Tamil|தமிழ்|tam|Tamil
te|Telugu|తెలుగు|tel|Telugu
tg|Tajik|тоҷикӣ|tgk|Cyrillic
th|Thai|ไทย|tha|Thai
ti|Tigrinya|ትግርኛ|tir|Ethiopic
tl|Tagalog|Tagalog|tgl fil|Latin
tr|Turkish|Türkçe|tur|Latin
tt|Tatar|татарча|tat|Cyrillic
ug|Uyghur|ئۇيغۇرچە|uig|Arabic
uk|Ukrainian|українська|ukr|Cyrillic
ur|Urdu|اردو|urd|Arabic
uz|Uzbek|oʻzbekcha|uzb uzn|Latin Cyrillic
vi|Vietnamese|Tiếng Việt|vie|Latin
xh|Xhosa|isiXhosa|xho|Latin
yi|Yiddish|ייִדיש|yid ydd|Hebrew
yo|Yoruba|Yorùbá|yor|Latin
zh|Chinese|中文|zho chi cmn|Han
zu|Zulu|isiZulu|zul|Latin
"""


def _read_table() -> dict[str, Language]:
    table = {}
    for line in _TABLE.strip().splitlines():
        code, name, native, iso3, scripts = line.split("|")
        table[code] = Language(code, name, native, tuple(iso3.split()), tuple(scripts.split()))
    return table


LANGUAGES: dict[str, Language] = _read_table()
"""The languages known by name, keyed by code. Other well-formed codes are accepted as they are."""

# Codes that ISO 639 has withdrawn, or that are in use beside the one of the table.
_SYNONYM_CODES = {"iw": "he", "in": "id", "ji": "yi", "jw": "jv", "mo": "ro", "nb": "no"}

_SYNONYM_NAMES = {
    "bangla": "bn",
    "bokmål": "no",
    "burmese (myanmar)": "my",
    "castilian": "es",
    "farsi": "fa",
    "filipino": "tl",
    "kiswahili": "sw",
    "mandarin": "zh",
    "oriya": "or",
    "sinhalese": "si",
    "simplified chinese": "zh",
    "traditional chinese": "zh",
    "简体中文": "zh",
    "繁體中文": "zh",
    "汉语": "zh",
}

# Codes of countries and abbreviations that are often written where a language's code belongs. Two are codes of other
# languages, too: `kr` of Kanuri, `chn` of Chinook Jargon.
_MISTAKEN_CODES = {
    mistaken: code
    for code, several in {
        "be": "by",
        "bn": "bd",
        "cs": "cz",
        "da": "dk",
        "el": "gr",
        "en": "us gb",
        "es": "sp esp",
        "fa": "ir",
        "he": "il",
        "ja": "jp jap",
        "kk": "kz",
        "km": "kh",
        "ko": "kr",
        "ne": "np",
        "sr": "rs",
        "tl": "ph",
        "uk": "ua",
        "vi": "vn",
        "zh": "cn chn",
    }.items()
    for mistaken in several.split()
}

_CODE = re.compile(r"[a-z]{2,3}")
_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]{1,8})*")


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    names = dict(_SYNONYM_NAMES)
    for language in LANGUAGES.values():
        names[language.name.casefold()] = language.code
        names[language.native.casefold()] = language.code
    return names


@lru_cache(maxsize=1)
def _codes() -> dict[str, str]:
    codes = dict(_SYNONYM_CODES)
    for language in LANGUAGES.values():
        codes[language.code] = language.code
        codes.update(dict.fromkeys(language.iso3, language.code))
    return codes


@lru_cache(maxsize=4096)
def _resolve(label: str) -> tuple[str, str]:
    """The code of a label and an empty text, or an empty code and what is wrong."""
    text = " ".join(label.split())
    name = text.casefold() if len(text) <= 100 else ""  # longer than any name, and slow to compare with one
    if name in _names():
        return _names()[name], ""
    bare_name = re.sub(r"\s*\(.*\)$", "", name)
    if bare_name in _names():
        return _names()[bare_name], ""
    tag = _TAG.fullmatch(text)
    if tag:
        code = tag.group(1).lower()
        if code in _codes():
            return _codes()[code], ""
        if code in _MISTAKEN_CODES:
            meant = LANGUAGES[_MISTAKEN_CODES[code]]
            return "", f"{label!r} is not taken for a language; the code of {meant.name} is {meant.code!r}."
        if _CODE.fullmatch(code):
            return code, ""
    near = difflib.get_close_matches(name, list(_names()), n=1, cutoff=0.6)
    hint = ""
    if near:
        meant = LANGUAGES[_names()[near[0]]]
        hint = f" Did you mean {meant.name!r} ({meant.code!r})?"
    shown = label if len(label) <= 40 else label[:37] + "..."
    return (
        "",
        f"unknown language {shown!a}.{hint} Give an ISO 639-1 code such as 'bn', or an English name.",
    )


def normalize_language(label: str) -> str:
    """Normalise a language label to its ISO 639 code.

    Regions and scripts are dropped (``zh-CN`` and ``zh_Hans`` become ``zh``), ISO 639-3 codes and names are
    looked up (``ben``, ``Bengali`` and ``বাংলা`` become ``bn``). Two- and three-letter codes that are not in
    the table are accepted in lower case.

    Raises:
        DataError: The label is no code and no known name. The text gives the nearest one.
    """
    code, problem = _resolve(label)
    if problem:
        raise DataError(problem)
    return code


def normalize_language_setting(label: str, setting: str) -> str:
    """As :func:`normalize_language`, for a value that the user gave as a setting.

    Raises:
        ConfigError: The label is no code and no known name.
    """
    if not isinstance(label, str) or not label.strip():
        raise ConfigError(f"{setting}: expected a language code such as 'en', got {label!r}.")
    code, problem = _resolve(label)
    if problem:
        raise ConfigError(f"{setting}: {problem}")
    return code


def language_of_file(path: Path) -> str | None:
    """The language that a file's name ends in: ``ar`` for ``harmful_test_ar.json``."""
    ending = re.split(r"[_.\-]", path.stem)[-1].lower()
    return ending if ending in LANGUAGES and ending != path.stem.lower() else None


def language_name(code: str) -> str:
    """English name of a language code, or the code itself where the table does not have it."""
    if code == UNDETERMINED:
        return "Undetermined"
    return LANGUAGES[code].name if code in LANGUAGES else code


# What Unicode calls a script, where the table has another word for it. The prolonged sound mark is common to both kana.
_UNICODE_SCRIPTS = {"Odia": r"\p{Script=Oriya}", "Kana": r"\p{Script=Hiragana}\p{Script=Katakana}ー"}

# Characters that detection reads of a text: more does not change the answer, only the time.
TEXT_LIMIT = 2000
# Of these, what the classifier reads: it is hardly less accurate with 40 characters, and slow per character.
_CLASSIFIER_LIMIT = 600
# Below this the classifier's word among the languages of one script is a guess.
CERTAIN_LETTERS = 20
# Letters of one text that count in a pair's vote, so that a long response does not decide alone.
_VOTE_LIMIT = 200
# Kana among kana and Han from which a text is Japanese: Chinese quotes a の now and then.
_KANA_SHARE = 0.1


def script_names() -> list[str]:
    """Scripts of the table, sorted, kana and Han apart."""
    scripts = {script for language in LANGUAGES.values() for script in language.scripts}
    return sorted(scripts - {"Japanese"} | {"Kana"})


@lru_cache(maxsize=1)
def _letters() -> Any:
    """A pattern with one group for each script of the table, kana and Han apart."""
    import regex  # the standard library's `re` knows no scripts

    classes = {script: _UNICODE_SCRIPTS.get(script, rf"\p{{Script={script}}}") for script in script_names()}
    return regex.compile("|".join(f"(?P<{script}>[{letters}])" for script, letters in classes.items()))


@lru_cache(maxsize=65536)
def script_of(character: str) -> str | None:
    """The script of a letter; None for other characters and scripts that the table does not have."""
    match = _letters().match(character) if character.isalpha() else None
    return match.lastgroup if match else None


def count_scripts(text: str) -> dict[str, int]:
    """Number of letters per script in the first 2,000 characters, ``Han`` and ``Kana`` apart."""
    counts: dict[str, int] = {}
    for character, number in Counter(text[:TEXT_LIMIT]).items():
        script = script_of(character)
        if script is not None:
            counts[script] = counts.get(script, 0) + number
    return counts


def dominant_script(text: str) -> str | None:
    """The script most of a text is in, by letters; None where it has no letters of a known script.

    A Han, kana or Hangul letter stands for about two letters of an alphabet and counts twice. Han and kana
    together are ``Japanese`` when at least one in ten of them is kana, else ``Han``.
    """
    return _dominant(count_scripts(text))


def _dominant(counts: Mapping[str, int]) -> str | None:
    if len(counts) == 1 and "Kana" not in counts:
        return next(iter(counts))
    weights = dict(counts)
    kana, han = weights.pop("Kana", 0), weights.pop("Han", 0)
    if kana + han:
        weights["Japanese" if kana >= _KANA_SHARE * (kana + han) else "Han"] = 2 * (kana + han)
    if "Hangul" in weights:
        weights["Hangul"] *= 2
    if not weights:
        return None
    return max(sorted(weights), key=weights.__getitem__)


@lru_cache(maxsize=1)
def _languages_by_script() -> dict[str, tuple[str, ...]]:
    scripts: dict[str, list[str]] = {}
    for language in LANGUAGES.values():
        for script in language.scripts:
            scripts.setdefault(script, []).append(language.code)
    return {script: tuple(codes) for script, codes in scripts.items()}


def languages_of_script(script: str) -> tuple[str, ...]:
    """Codes of the table's languages that are written in a script."""
    return _languages_by_script()[script]


@lru_cache(maxsize=1)
def classifier() -> Any:
    """The py3langid model, loaded when the first text needs it."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DependencyError(
            "Detecting languages needs the package py3langid: pip install 'py3langid>=0.4,<0.5'. "
            "It is not needed when every row carries `target_language`."
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


class Detection(NamedTuple):
    """What detection says of one text.

    Attributes:
        language: ISO 639 code, or ``und`` for a text without letters.
        letters: Letters of the script it is written in.
        certain: The script alone decides, or there are enough letters for the classifier's word.
    """

    language: str
    letters: int
    certain: bool


EXPECTED: dict[str, Detection] = {}
"""What :func:`mpo.data.detection.expect` has found out beforehand, many texts at once."""


def detect(text: str) -> Detection:
    """Detect the language of one text. Pure: the same text always gives the same answer."""
    return EXPECTED.get(text) or detect_alone(text)


def detect_alone(text: str) -> Detection:
    """As :func:`detect`, without a look at what was found out beforehand."""
    counts = count_scripts(text)
    script, letters, decided = by_script(text, counts)
    if decided is not None or script is None:
        return decided or Detection(UNDETERMINED, 0, False)
    candidates = languages_of_script(script)
    for language, _ in classifier().rank(classified_part(text, counts, script)):
        if language in candidates:
            return Detection(language, letters, letters >= CERTAIN_LETTERS)
    return Detection(
        candidates[0], letters, False
    )  # pragma: no cover - every shared script has a trained language


def by_script(text: str, counts: Mapping[str, int]) -> tuple[str | None, int, Detection | None]:
    """A text's script, how many of its letters are in it, and the answer where the script decides.

    Args:
        text: The text.
        counts: Its letters, see :func:`count_scripts`.
    """
    script = _dominant(counts)
    if script is None:
        return None, 0, Detection(UNDETERMINED, 0, False)
    letters = (
        counts.get("Han", 0) + counts.get("Kana", 0) if script in ("Han", "Japanese") else counts[script]
    )
    candidates = languages_of_script(script)
    if len(candidates) == 1:
        return script, letters, Detection(candidates[0], letters, True)
    if script == "Bengali":
        # Two letters that Assamese uses all the time and Bengali not at all.
        assamese = sum(text.count(letter, 0, TEXT_LIMIT) for letter in "ৰৱ")
        return script, letters, Detection("as" if assamese > 0.01 * letters else "bn", letters, True)
    return script, letters, None


def classified_part(text: str, counts: Mapping[str, int], script: str) -> str:
    """What the classifier reads of a text."""
    kept = text[:_CLASSIFIER_LIMIT]
    if len(counts) > 1:
        # Quoted names and code in another script mislead the classifier.
        kept = "".join(c if not c.isalpha() or script_of(c) == script else " " for c in kept)
    return kept


def detect_language(text: str) -> str:
    """ISO 639 code of the language of one text; ``und`` where it has no letters.

    Raises:
        DependencyError: ``py3langid`` is missing and the script alone does not decide.
    """
    return detect(text).language


def detect_pair_language(prompt: str, chosen: str, rejected: str, source_language: str) -> str:
    """Language of a target pair, from its three texts.

    Real target sides hold untranslated texts: in the published MPO data one text in twenty is
    English. So the three texts vote, each with its number of letters up to 200, and a text in the source
    language counts only when all are. The first of prompt, chosen, rejected wins a tie. Texts too short to be
    sure of do not vote unless all three are; they are then read as one.

    Returns:
        The code; ``source_language`` when every text is in that language (the caller decides what that
        means); ``und`` when there are no letters at all.
    """
    detections = [detect(text) for text in (prompt, chosen, rejected)]
    sure = [detection for detection in detections if detection.certain]
    if not sure:
        return detect("\n".join((prompt, chosen, rejected))).language
    votes: dict[str, int] = {}
    for detection in sure:
        if detection.language != source_language:
            votes[detection.language] = votes.get(detection.language, 0) + min(detection.letters, _VOTE_LIMIT)
    if not votes:
        return source_language
    return max(votes, key=votes.__getitem__)


# Written forms so close that a classifier's choice between them says nothing about the text.
_CLOSE = [
    frozenset(codes.split()) for codes in ("id ms", "bs hr sr", "da no nn", "zu xh", "cs sk", "st tn nso")
]


def same_language(first: str, second: str) -> bool:
    """True where two codes are equal or too close for detection to tell apart in a short text."""
    return first == second or any(first in close and second in close for close in _CLOSE)


def known_to_detection(codes: Iterable[str]) -> set[str]:
    """Those of ``codes`` that :func:`detect` can return: table languages whose script or classifier has them."""
    result = set()
    for code in codes:
        language = LANGUAGES.get(code)
        if language is None:
            continue
        alone = any(_languages_by_script()[script] == (code,) for script in language.scripts)
        if alone or code in classifier().labels:
            result.add(code)
    return result
