"""What the benchmarks' command lines share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from mpo.common.files import write_json
from mpo.common.provenance import collect
from mpo.errors import MPOError


def run(main: Callable[[], None]) -> None:
    """Run a command; what the user can mend is one message and exit code 2."""
    try:
        main()
    except MPOError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write(path: str, result: Mapping[str, Any], **provenance: Any) -> None:
    """Write a result as JSON, with the hardware and all versions."""
    write_json(path, {**result, "provenance": collect(**provenance)})


def save(path: str, result: Mapping[str, Any], **provenance: Any) -> None:
    """Write a result as JSON, with the hardware and all versions, and say where."""
    write(path, result, **provenance)
    print(f"written to {path}")
