"""Translations from any program that reads one text a line and writes one line for each: Apertium, Argos, CTranslate2, ..."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from mpo.building.translation.translator import Translated, TranslationChoice
from mpo.common.characters import printable
from mpo.common.words import shortened
from mpo.errors import ConfigError, DependencyError, ModelError

_BLANKS = re.compile(r"[ \t]{2,}")


class CommandTranslator:
    """Starts the program once for each block of texts.

    A program may keep back what it writes until its input ends, so the input of a block is closed before its output is read.
    It is started without a shell.
    """

    def __init__(self, choice: TranslationChoice) -> None:
        """Looks for the program.

        Raises:
            DependencyError: There is no such program.
        """
        self.choice = choice
        program = choice.command[0]
        if shutil.which(program) is None:
            raise DependencyError(
                f"command: there is no program {program!r} to translate with. Install it, or give its path."
            )

    def settings(self) -> dict[str, Any]:
        parted = {"blank_lines": True} if self.choice.parts_lines else {}
        return {"engine": "command", "command": self.choice.command, "codes": self.choice.codes, **parted}

    def check(self, source: str, targets: Sequence[str]) -> None:
        if len(targets) > 1 and not any("{target}" in word for word in self.choice.command):
            raise ConfigError(
                f"command: one command without `{{target}}` cannot translate into {', '.join(targets)}. Write `{{target}}` "
                "where the language's code belongs, or build one language after another."
            )

    def translate(
        self, pieces: Sequence[str], source: str, target: str, done: Collection[int]
    ) -> Iterator[tuple[int, Translated]]:
        missing = [index for index in range(len(pieces)) if index not in done]
        if not missing:
            return
        # A line is a piece: whatever else would break it becomes a blank.
        lines = [" ".join(pieces[index].split()) for index in missing]
        for index, line in zip(missing, self._run(lines, source, target), strict=True):
            text = _BLANKS.sub(" ", line).strip()  # as its input was: a blank between two words
            yield index, Translated(text, None if text else "the translator wrote an empty line")

    def close(self) -> None:
        pass

    def _run(self, lines: Sequence[str], source: str, target: str) -> list[str]:
        codes = {code: self.choice.codes.get(code, code) for code in (source, target)}
        command = [
            word.replace("{source}", codes[source]).replace("{target}", codes[target])
            for word in self.choice.command
        ]
        shown = printable(shortened(" ".join(command)), lines=False)
        parted = self.choice.parts_lines
        end = "\n\n" if parted else "\n"
        try:
            done = subprocess.run(
                command,
                input="".join(f"{line}{end}" for line in lines).encode("utf-8", "replace"),
                capture_output=True,
                timeout=self.choice.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ModelError(
                f"`{shown}` did not translate {len(lines)} lines in {self.choice.timeout:g} seconds. Raise `timeout`, or lower "
                "`block`."
            ) from None
        except OSError as error:
            raise ModelError(f"`{shown}` cannot be started: {error.strerror or error}.") from None
        said = printable(shortened(done.stderr.decode("utf-8", "replace").strip()[-300:], 300), lines=False)
        if done.returncode != 0:
            raise ModelError(f"`{shown}` ended with {done.returncode}: {said or 'it said nothing'}.")
        written = done.stdout.decode("utf-8", "replace").split("\n")
        if written and not written[-1]:
            written.pop()
        given = len(lines)
        if parted:  # the last empty line may be missing
            given, written = 2 * given, written + [""] * (len(written) == 2 * given - 1)
        if len(written) != given or (parted and any(line.strip() for line in written[1::2])):
            raise ModelError(
                f"`{shown}` wrote {len(written)} lines for {given}. It has to write one line for each that it reads, empty "
                f"ones too{f'; it said: {said}' if said else ''}."
            )
        return written[::2] if parted else written
