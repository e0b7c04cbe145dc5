"""From the settings of a recipe to what translates."""

from __future__ import annotations

from collections.abc import Mapping

from mpo.building.translation.translator import TranslationChoice, Translator
from mpo.common.words import listed
from mpo.errors import ConfigError


def make_translator(choice: TranslationChoice, missing: Mapping[str, int] | None = None) -> Translator:
    """The translator of a choice, nothing large loaded yet.

    Args:
        choice: What translates.
        missing: Prompts that are not given, by language, where they are known; an error names them.

    Raises:
        MPOError: A model cannot be used, a program is missing, or nothing is chosen.
    """
    if choice.engine == "command":
        from mpo.building.translation.command import CommandTranslator

        return CommandTranslator(choice)
    if choice.engine == "seq2seq":
        from mpo.building.translation.seq2seq import Seq2SeqTranslator

        return Seq2SeqTranslator(choice)
    if choice.engine == "chat":
        from mpo.building.translation.chat import ChatTranslator

        return ChatTranslator(choice)
    lacking = [f"{count:,} in {code}" for code, count in (missing or {}).items() if count]
    what = f"prompts are missing ({listed(lacking)})" if lacking else "texts are missing in a language"
    raise ConfigError(
        f"translation: {what} and nothing is set that translates them. Expected `translation:` with "
        "`engine: command`, `seq2seq` or `chat`, the texts in the file of prompts, or `prompts: {missing: skip}`, which "
        "leaves such languages out."
    )
