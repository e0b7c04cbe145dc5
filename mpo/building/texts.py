"""Translating whole texts: pieces in, the same texts in another language out, each piece asked once a block."""

from __future__ import annotations

from collections.abc import Mapping

from mpo.building.stages import Kept
from mpo.building.translation import Translated, TranslationChoice, Translator
from mpo.building.translation.segments import join, split, with_code_of


def translate_texts(
    texts: Mapping[str, str],
    translator: Translator,
    choice: TranslationChoice,
    *,
    source: str,
    target: str,
    kept: Kept,
) -> dict[str, Translated]:
    """Translates the texts of a block.

    Args:
        texts: By name.
        translator: What translates.
        choice: Its settings.
        source, target: Codes of the languages.
        kept: What the block has got already.

    Returns:
        What became of each text, by its name.

    Raises:
        MPOError: The translator cannot be used. What it has translated is kept.
    """
    pieces = {
        text: split(text, lines=not choice.whole_passages, longest=choice.piece)
        for text in dict.fromkeys(texts.values())
    }
    wanted = list(
        dict.fromkeys(piece.text for text in texts.values() for piece in pieces[text] if piece.translate)
    )
    done = {index for index in range(len(wanted)) if f"{target} {index}" in kept}
    for index, made in translator.translate(wanted, source, target, done):
        kept.keep(f"{target} {index}", [made.text, made.fault])
    found = {text: Translated(*kept[f"{target} {index}"]) for index, text in enumerate(wanted)}
    whole = {}
    for text, parts in pieces.items():
        translated = [found[piece.text] for piece in parts if piece.translate]
        fault = next((made.fault for made in translated if made.fault is not None), None)
        originals = [piece.text for piece in parts if piece.translate]
        kept_code = [with_code_of(made.text, o) for made, o in zip(translated, originals, strict=True)]
        whole[text] = Translated(join(parts, kept_code, target), fault)
    return {name: whole[text] for name, text in texts.items()}
