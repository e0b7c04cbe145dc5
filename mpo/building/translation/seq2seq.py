"""Translations from a sequence-to-sequence model of transformers: NLLB, M2M-100, MADLAD-400, mBART-50.

These models are told the languages by tokens of their own vocabulary, so the vocabulary is the table of languages:

- ``zho_Hans`` (NLLB) and ``zh_CN`` (mBART-50): before the text the token of its language, and the first token of the translation
  is that of the other one;
- ``__zh__`` (M2M-100): the same;
- ``<2zh>`` (MADLAD-400): before the text the token of the language to translate into.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from mpo.building.translation.translator import Translated, TranslationChoice
from mpo.data.languages import LANGUAGES, language_name
from mpo.errors import ConfigError, ModelError
from mpo.evaluation.engines.local import by_length
from mpo.modeling.identity import identify_files
from mpo.modeling.padding import padded

_M2M, _MADLAD = re.compile(r"__([a-z]{2,4})__"), re.compile(r"<2([a-zA-Z]{2,3}(?:_[A-Za-z]+)?)>")
_NLLB, _MBART = re.compile(r"([a-z]{3})_([A-Z][a-z]{3})"), re.compile(r"([a-z]{2})_([A-Z]{2})")
# ISO 15924 codes of the scripts that the table of languages names.
_SCRIPTS = {
    "Arabic": "Arab", "Armenian": "Armn", "Bengali": "Beng", "Cyrillic": "Cyrl", "Devanagari": "Deva", "Ethiopic": "Ethi",
    "Georgian": "Geor", "Greek": "Grek", "Gujarati": "Gujr", "Gurmukhi": "Guru", "Han": "Hans", "Hangul": "Hang",
    "Hebrew": "Hebr", "Japanese": "Jpan", "Kannada": "Knda", "Khmer": "Khmr", "Lao": "Laoo", "Latin": "Latn",
    "Malayalam": "Mlym", "Myanmar": "Mymr", "Odia": "Orya", "Sinhala": "Sinh", "Tamil": "Taml", "Telugu": "Telu",
    "Thai": "Thai", "Tibetan": "Tibt",
}  # fmt: skip
# A macrolanguage's most spoken member, where FLORES-200 has that and not the macrolanguage.
_MEMBERS = {
    "est": "est", "lav": "lvs", "mon": "khk", "uzb": "uzn", "ori": "ory", "kur": "kmr", "mlg": "plt", "sqi": "als",
    "alb": "als", "yid": "ydd", "orm": "gaz", "pus": "pbt", "nep": "npi", "aze": "azj", "msa": "zsm", "swa": "swh",
}  # fmt: skip


class Seq2SeqTranslator:
    """Beams or greedy search over batches of similar length.

    Which pieces share a batch depends on all pieces of a block, never on what is translated already.
    """

    def __init__(self, choice: TranslationChoice) -> None:
        """Reads configuration and tokenizer, but no weights.

        Raises:
            ModelError: The model cannot be used, or its vocabulary names no languages.
        """
        assert choice.model is not None
        self.choice, self.source = choice, choice.model
        options = {"revision": self.source.revision, "trust_remote_code": self.source.trust_remote_code}
        try:
            self.config = AutoConfig.from_pretrained(self.source.model, **options)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.source.model, **options)
        except Exception as error:  # each library behind them has errors of its own
            raise ModelError(
                f"{self.source.model} cannot be opened as a translation model: {error} Give the folder or the Hub name of a "
                "sequence-to-sequence model such as facebook/nllb-200-distilled-600M."
            ) from None
        if not self.config.is_encoder_decoder:
            raise ModelError(
                f"{self.source.model} is no sequence-to-sequence model; a chat model translates with `engine: chat`."
            )
        self.device = torch.device(self.source.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.names = LanguageTokens(self.tokenizer.get_vocab(), choice.codes, self.source.model)
        self._model: Any = None

    def settings(self) -> dict[str, Any]:
        return {
            "engine": "seq2seq",
            "model": identify_files(self.source.model, "config.json", self.source.revision),
            "dtype": self.source.dtype,
            "device": self.device.type,
            "batch_size": self.source.batch_size,
            "num_beams": self.choice.num_beams,
            "max_new_tokens": self.choice.max_new_tokens,
            "codes": self.choice.codes,
        }

    def check(self, source: str, targets: Sequence[str]) -> None:
        for code in (source, *targets):
            self.names.token(code)

    def translate(
        self, pieces: Sequence[str], source: str, target: str, done: Collection[int]
    ) -> Iterator[tuple[int, Translated]]:
        answered = set(done)
        if len(answered) == len(pieces):
            return
        encoded = [self._encode(piece, source, target) for piece in pieces]
        for batch in by_length(encoded, self.source.batch_size):
            if answered.issuperset(batch):
                continue
            for index, translated in zip(
                batch, self._batch([encoded[i] for i in batch], target), strict=True
            ):
                if index not in answered:
                    yield index, translated

    def close(self) -> None:
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, piece: str, source: str, target: str) -> list[int]:
        ids = list(self.tokenizer(" ".join(piece.split()), add_special_tokens=False)["input_ids"])
        first = self.names.id(target if self.names.target_first else source)
        return [first, *ids, self.tokenizer.eos_token_id]

    def _batch(self, batch: Sequence[list[int]], target: str) -> list[Translated]:
        model = self._load()
        ids, mask = padded(batch, self.device, fill=self.tokenizer.pad_token_id)
        forced = None if self.names.target_first else self.names.id(target)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                forced_bos_token_id=forced,
                max_new_tokens=self.choice.max_new_tokens,
                num_beams=self.choice.num_beams,
                do_sample=False,
            ).tolist()
        out = []
        for tokens in written:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            finished = self.tokenizer.eos_token_id in tokens[1:]
            fault = None if text else "the translator wrote nothing"
            if not finished:
                fault = "the translation was cut off; raise `max_new_tokens`"
            out.append(Translated(text, fault))
        return out

    def _load(self) -> Any:
        if self._model is None:
            source = self.source
            dtype = source.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
            model = AutoModelForSeq2SeqLM.from_pretrained(
                source.model,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
                dtype=dtype,
            )
            self._model = model.to(self.device).eval()
        return self._model


class LanguageTokens:
    """The tokens by which a model is told languages.

    Attributes:
        target_first: The text begins with the token of the language to translate into.
    """

    def __init__(self, vocabulary: Mapping[str, int], codes: Mapping[str, str], model: str) -> None:
        """Finds out how the vocabulary names languages.

        Args:
            vocabulary: Ids by token.
            codes: Tokens, or the codes in them, of languages that the user names.
            model: For messages.

        Raises:
            ModelError: The vocabulary names no languages.
        """
        self._vocabulary, self._codes, self._model = vocabulary, codes, model
        patterns = {"m2m": _M2M, "madlad": _MADLAD, "nllb": _NLLB, "mbart": _MBART}
        found = {
            name: [token for token in vocabulary if pattern.fullmatch(token)]
            for name, pattern in patterns.items()
        }
        self._style = max(found, key=lambda name: len(found[name]))
        self._tokens = frozenset(found[self._style])
        if len(self._tokens) < 2:
            raise ModelError(
                f"The vocabulary of {model} names no languages (`__zh__`, `<2zh>`, `zho_Hans` or `zh_CN`), so it cannot be told "
                "what to translate into. Take a model of many languages, such as NLLB, M2M-100 or MADLAD-400; one of a single "
                "pair can be run by `engine: command`."
            )
        self.target_first = self._style == "madlad"

    def id(self, code: str) -> int:
        """Id of a language's token."""
        return self._vocabulary[self.token(code)]

    def token(self, code: str) -> str:
        """A language's token.

        Raises:
            ConfigError: The model does not know it under any of its codes.
        """
        candidates = [self._codes[code]] if code in self._codes else [*self._candidates(code)]
        for candidate in candidates:
            for token in (candidate, f"__{candidate}__", f"<2{candidate}>"):
                if token in self._tokens:
                    return token
        own = sorted(token for token in self._tokens if token.strip("_<2>")[:2] == code[:2])[:8]
        near = f" Its tokens that begin alike: {', '.join(own)}." if own else ""
        raise ConfigError(
            f"codes: {self._model} has no language {', '.join(candidates)} ({language_name(code)}).{near} Say what it calls it: "
            f"`codes: {{{code}: TOKEN}}`."
        )

    def _candidates(self, code: str) -> Iterator[str]:
        """What a model may call a language, the likeliest first."""
        language = LANGUAGES.get(code)
        long = language.iso3 if language else (code,)
        if self._style in ("m2m", "madlad"):
            yield from (code, *long)
            return
        if self._style == "mbart":
            yield from sorted(token for token in self._tokens if token.startswith(f"{code}_"))
            return
        scripts = [_SCRIPTS.get(script, script[:4]) for script in language.scripts] if language else []
        names = dict.fromkeys((*long, *(_MEMBERS[name] for name in long if name in _MEMBERS)))
        for name in names:
            yield from (f"{name}_{script}" for script in scripts)
        for name in names:
            yield from sorted(token for token in self._tokens if token.startswith(f"{name}_"))
