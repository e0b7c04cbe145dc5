"""Trains a recipe, on one GPU or many:

accelerate launch scripts/train.py recipes/llama.yaml
accelerate launch --config_file recipes/accelerate/zero2.yaml scripts/train.py recipes/llama_full.yaml
accelerate launch scripts/train.py recipes/llama.yaml --learning_rate 1e-4 --languages bn sw --dry_run
"""

from __future__ import annotations

import sys
from pathlib import Path

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
