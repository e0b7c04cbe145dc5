"""``python -m mpo``."""

from __future__ import annotations

import sys

from mpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
