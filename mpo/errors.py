"""Every failure a user can cause or mend is one of these types.

Each message says what was given, what was expected, and what to do about it. Code that catches
``MPOError`` catches all of them; nothing else is raised on purpose.
"""

from __future__ import annotations


class MPOError(Exception):
    """Base class of all errors this package raises on purpose."""


def advised(error: MPOError, advice: str) -> MPOError:
    """An error of the same kind, of those in this module, whose message ends with a line of advice."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == __name__)
    found: MPOError = kind(f"{error}\n{advice}")
    return found


class ConfigError(MPOError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(MPOError, ValueError):
    """Data does not fulfil the data contract. The message names the file, the row and the field.

    Args:
        message: What was found, what was expected and what to do.
        file: File or dataset the row came from.
        row: 0-based row in that file.
        field: Path of the field inside the row, for example ``targets[2].chosen``.
    """

    def __init__(
        self, message: str, *, file: str | None = None, row: int | None = None, field: str | None = None
    ) -> None:
        self.file, self.row, self.field = file, row, field
        place = ", ".join(
            part
            for part in (
                file,
                None if row is None else f"row {row}",
                None if field is None else f"field `{field}`",
            )
            if part
        )
        super().__init__(f"{place}: {message}" if place else message)


class ModelError(MPOError):
    """A model, adapter or tokenizer cannot be used: missing files, no chat template, unsupported parts."""


class DependencyError(MPOError, ImportError):
    """An optional dependency is missing. The message gives the command that installs it."""


class StorageError(MPOError, OSError):
    """A folder cannot be written, a disk is full, or a stored file is damaged."""


class TrainingError(MPOError, RuntimeError):
    """Training was stopped on purpose: a value that is not finite, or a collapse that the user asked to stop at."""


class ProcessLostError(TrainingError):
    """Another process of a run on several has died or cannot be reached."""


class StoppedBySignal(KeyboardInterrupt):
    """A run was told to end, by SIGTERM for example. No error: like any interruption it passes ``except Exception``.

    Args:
        number: The signal.
        message: What is left, and how to go on.

    Attributes:
        number: The signal.
        exit_code: What a shell expects of a process that a signal has ended.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number, message)
        self.number, self.exit_code = number, 128 + number
        self.message = message

    def __str__(self) -> str:
        return self.message


class ServerError(MPOError, ConnectionError):
    """A model server cannot be reached, refuses a request, or sends nothing that can be used."""
