"""Checks of the settings that several measurements share, so that each is refused in the same words and before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeGuard

from mpo.errors import ConfigError


def check_confidence(confidence: float) -> None:
    """Refuse a coverage that no interval can have.

    Raises:
        ConfigError: It is not strictly between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"`confidence` is {confidence!r}; expected a number between 0 and 1, such as 0.95.")


def check_beta(beta: float) -> None:
    """Refuse a scale of the target gap that there is no goal for.

    Raises:
        ConfigError: It is not a finite number above 0.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise ConfigError(f"`beta` is {beta!r}; expected a number above 0.")


def check_limit(limit: int | None) -> None:
    """Refuse to keep the first so many of something where that is none at all.

    Raises:
        ConfigError: It is neither None nor a whole number of at least 1.
    """
    if limit is not None and not is_whole(limit, 1):
        raise ConfigError(f"limit: expected a whole number of at least 1, got {limit!r}.")


def check_max_length(max_length: int | None) -> None:
    """Refuse a length in tokens that leaves nothing to predict.

    Raises:
        ConfigError: It is neither None nor a whole number of at least 2.
    """
    if max_length is not None and not is_whole(max_length, 2):
        raise ConfigError(f"max_length: expected a whole number of at least 2, got {max_length!r}.")


def check_name(name: str) -> None:
    """Refuse a name that is not one of a folder.

    Raises:
        ConfigError: It holds anything but letters, digits and a few signs, or begins with one of these.
    """
    if not re.fullmatch(r"\w[\w.+@-]*", name):
        raise ConfigError(f"name: expected letters, digits, '.', '_' or '-', got {name!r}.")


def require(settings: object, names: str, accepts: Callable[[Any], bool], expected: str) -> None:
    """Refuse settings, named with blanks between them, whose values are not accepted.

    Raises:
        ConfigError: It names the first one, and says what was expected.
    """
    for name in names.split():
        if not accepts(getattr(settings, name)):
            raise ConfigError(f"`{name}` is {getattr(settings, name)!r}; expected {expected}.")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return is_number(value) and value > 0


def is_at_least_0(value: Any) -> bool:
    """Whether it is a finite number of at least 0."""
    return is_number(value) and value >= 0


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
