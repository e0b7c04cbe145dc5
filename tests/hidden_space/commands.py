"""Commands of this package one after another in one process, since importing the libraries takes longer than they do.

accelerate launch ... tests/hidden_space/commands.py '[["analyze", ...], ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpo.cli import main
from tests.distributed.launching import end_after_limit

if __name__ == "__main__":
    end_after_limit()
    for words in json.loads(sys.argv[1]):
        if code := main(words):
            sys.exit(code)
