"""What translates texts: any command, a translation model, or a chat model. All have one interface, :class:`Translator`."""

from __future__ import annotations

from mpo.building.translation.factory import make_translator
from mpo.building.translation.translator import ENGINES, Translated, TranslationChoice, Translator

__all__ = ["ENGINES", "Translated", "TranslationChoice", "Translator", "make_translator"]
