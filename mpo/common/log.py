"""Messages to the user: once per run, not once per rank."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any


class _MainProcess(logging.LoggerAdapter):
    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        # The launchers set RANK before anything is imported; a single process has none.
        if int(os.environ.get("RANK", "0")) == 0:
            super().log(level, msg, *args, **kwargs)

    @lru_cache(maxsize=None)  # noqa: B019, UP033  adapters live as long as their module
    def warning_once(self, message: str) -> None:
        """A warning that is given the first time only."""
        self.warning(message)


def get_logger(name: str) -> _MainProcess:
    """A logger that speaks on the main process only, whether or not training has begun."""
    return _MainProcess(logging.getLogger(name), {})
