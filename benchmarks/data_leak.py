"""How long ``mpo data leak`` takes, and how much memory: training rows made of an evaluation set's own words.

    python -m benchmarks.data_leak --rows 100000
    python -m benchmarks.data_leak --rows 20000 --minhash     # beside datasketch's MinHash (pip install datasketch)

Rows are flat ones on disk, six translations to a source, whose prompts are drawn word by word from the evaluation set in the
row's language; so every word and most n-grams are known, which is the worst case. Every thousandth row holds an evaluation
prompt with its last word changed, and all of these must be found. Against the probe set by default.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.command import run
from mpo.data.leaks import CHARACTERS, EvaluationText, find_leaks
from mpo.data.prompt_texts import training_texts
from mpo.data.shingles import normalised
from mpo.evaluation.evaluation_texts import evaluation_texts

TARGETS = 6
PLANTED = 1000


def main() -> None:
    """Makes the rows, looks for leaks and prints seconds, rows a second and the peak of memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--against", default="probe")
    parser.add_argument("--minhash", action="store_true", help="measure datasketch on the same prompts, too")
    options = parser.parse_args()
    asked = evaluation_texts(options.against)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        planted = write_rows(path, options.rows, asked)
        size = path.stat().st_size
        start, before = time.perf_counter(), time.process_time()
        leaks = find_leaks(training_texts(str(path)), asked)
        seconds, busy = time.perf_counter() - start, time.process_time() - before
        found = {(leak.prompts, leak.prompt_id) for leak in leaks.pairs}
        missed = len(planted - found)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        print(
            f"{options.rows:,} rows ({size / 1e6:.0f} MB) against {len(asked):,} evaluation texts: {seconds:.1f} s "
            f"({busy:.1f} s of a processor), {options.rows / busy:,.0f} rows a second of it, {peak:.2f} GiB at the peak; {missed} of {len(planted)} planted "
            "prompts missed"
        )
        if options.minhash:
            compare_with_minhash(path, asked)


def write_rows(path: Path, rows: int, asked: Sequence[EvaluationText]) -> set[tuple[str, str]]:
    """Writes flat rows, and returns the evaluation prompts that were planted."""
    generator = random.Random(0)
    vocabulary: dict[str, list[str]] = {}
    for text in asked:
        vocabulary.setdefault(text.language, []).extend(text.text.split())
    languages = sorted(vocabulary)
    planted = set()

    def prompt(language: str) -> str:
        return " ".join(
            generator.choices(vocabulary[language], k=12 if len(vocabulary[language]) > 400 else 3)
        )

    with open(path, "w", encoding="utf-8") as file:
        source = ""
        for number in range(rows):
            if number % TARGETS == 0:
                source = prompt("en")
            language = languages[number % len(languages)]
            target = prompt(language)
            if number % PLANTED == 0:
                text = generator.choice([text for text in asked if len(text.text.split()) > 9])
                target = " ".join([*text.text.split()[:-1], "instead"])
                planted.add((text.prompts, text.prompt_id))
            sides = {"source": source, "target": target}
            row = {f"{side}_prompt": text for side, text in sides.items()}
            row |= {f"{side}_chosen": f"No. {text} " * 4 for side, text in sides.items()}
            row |= {f"{side}_rejected": f"Yes. {text} " * 4 for side, text in sides.items()}
            file.write(json.dumps({**row, "target_language": language}, ensure_ascii=False) + "\n")
    return planted


def compare_with_minhash(path: Path, asked: Sequence[EvaluationText]) -> None:
    """Seconds of the comparison alone, and the pairs found, of the exact search and of MinHash with LSH."""
    from datasketch import MinHash, MinHashLSH

    from mpo.data.shingles import SimilarTexts, character_shingles

    texts = list(dict.fromkeys(normalised(text) for row in training_texts(str(path)) for text in row.texts))
    known = list(dict.fromkeys(normalised(text.text) for text in asked))
    start = time.process_time()
    similar = SimilarTexts(known, character_shingles, CHARACTERS)
    exact = set()
    for first in range(0, len(texts), 8192):
        left, right, _ = similar.find(texts[first : first + 8192])
        exact |= {(int(a) + first, int(b)) for a, b in zip(left, right, strict=True)}
    ours = time.process_time() - start

    def signatures(batch: Sequence[str]) -> list[MinHash]:
        found = character_shingles(batch)  # the same sets as above
        parts = np.split(found.hashes, np.cumsum(found.sizes)[:-1])
        return list(MinHash.generator([[h.tobytes() for h in part] for part in parts], num_perm=128))

    start = time.process_time()
    index = MinHashLSH(threshold=CHARACTERS, num_perm=128)
    for number, signature in enumerate(signatures(known)):
        index.insert(number, signature)
    found = set()
    for first in range(0, len(texts), 8192):
        for number, signature in enumerate(signatures(texts[first : first + 8192])):
            found |= {(number + first, other) for other in index.query(signature)}
    theirs = time.process_time() - start
    print(
        f"{len(texts):,} different prompts by characters: exact {ours:.1f} s of a processor, {len(exact)} pairs; MinHash with 128 permutations "
        f"{theirs:.1f} s, {len(found)} candidates, of which {len(found & exact)} are among the exact pairs"
    )


if __name__ == "__main__":
    run(main)
