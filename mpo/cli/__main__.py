"""``python -m mpo.cli``, which also `accelerate launch -m mpo.cli` runs."""

from __future__ import annotations

import sys

from mpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
