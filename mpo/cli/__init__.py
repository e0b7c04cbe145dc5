"""The command line: ``mpo train``, ``mpo data check``, ``mpo evaluate ...``, ``mpo merge``."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; see :func:`mpo.cli.app.main`."""
    from mpo.cli.app import main as run

    return run(argv)
