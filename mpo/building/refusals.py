"""Stock answers by language: refusals of harmful prompts, openings that comply with them, rejected answers to harmless ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from mpo.building.starter import starter_refusals
from mpo.common.files import read_named_text
from mpo.data.contract import same_response
from mpo.errors import ConfigError, DataError


class Refusals:
    """Refusals, or other stock answers, of a file or of those that come with the package.

    The same prompt gets the same one every time, and its translations the one at the same place of their lists.
    """

    def __init__(
        self, file: str | None = None, package: Callable[[str], tuple[str, ...]] | None = None
    ) -> None:
        """Reads the file.

        Args:
            file: JSON, ``{"en": [...], ...}``.
            package: Gives those of a language where there is no file; by default the package's refusals.

        Raises:
            DataError: It cannot be read, or does not hold lists of texts by language.
        """
        self._given: Mapping[str, Sequence[str]] | None = None if file is None else _read(file)
        self._package = package or starter_refusals
        self._found: dict[str, tuple[str, ...]] = {}

    def of(self, language: str) -> tuple[str, ...]:
        """All refusals in a language; none where there are none."""
        if language not in self._found:
            self._found[language] = self._read(language)
        return self._found[language]

    def _read(self, language: str) -> tuple[str, ...]:
        if self._given is not None:
            return tuple(self._given.get(language, ()))
        return self._of_package(language)

    def _of_package(self, language: str) -> tuple[str, ...]:
        try:
            return self._package(language)
        except ConfigError:  # it has none in this language
            return ()

    def for_prompt(self, prompt_id: str, language: str, unlike: str | None = None) -> str | None:
        """The refusal of a prompt in a language; None where there is none.

        Args:
            prompt_id: Of the prompt.
            language: Code of the language.
            unlike: A text that it may not be the same as, such as a refusal that the model wrote itself: then it is another one of
                the list, or of the package's.
        """
        found = self.of(language)
        if not found:
            return None
        place = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:4], "big") % len(found)
        if unlike is None or not same_response(found[place], unlike):
            return found[place]
        others = (*found[place:], *found[:place], *self._of_package(language))
        return next((text for text in others if not same_response(text, unlike)), None)

    def digest(self, languages: Sequence[str]) -> str:
        """Short hash of the refusals in these languages."""
        text = json.dumps({code: self.of(code) for code in languages}, sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


def _read(file: str) -> dict[str, list[str]]:
    try:
        found = json.loads(read_named_text(file))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error}). Expected JSON.", file=file) from None
    sound = isinstance(found, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in found.values()
    )
    if not sound:
        raise DataError(
            'expected a list of texts for each language, such as {"en": ["I can\'t help with that."]}.',
            file=file,
        )
    return dict(found)
