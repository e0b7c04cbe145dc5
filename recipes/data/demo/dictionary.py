"""A translator for the demo: a program that reads lines and writes lines, as any program may that ``translation.command`` names.

``python dictionary.py SOURCE TARGET`` looks sentences up in ``phrases.tsv`` beside it and writes those it does not know as they
are. Two of the phrases are wrong on purpose, so that there is something for the filters to find.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path


def main() -> None:
    source, target = sys.argv[1:]
    with open(Path(__file__).with_name("phrases.tsv"), encoding="utf-8", newline="") as file:
        known = {row[source]: row[target] for row in csv.DictReader(file, delimiter="\t")}
    for line in sys.stdin.buffer.read().decode("utf-8").splitlines():
        sys.stdout.buffer.write(f"{known.get(line, line)}\n".encode())


if __name__ == "__main__":
    main()
