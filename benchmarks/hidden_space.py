"""How long do all measures of the hidden space take, and how much memory?

    python -m benchmarks.hidden_space

Makes embeddings of ``--texts`` texts in each of ``--languages`` languages by two models (Gaussian clouds with the falling
spectrum of hidden states, the second model with noise and with the classes moved apart in one language) and measures them
as ``mpo analyze hidden-space`` measures a layer, with intervals and permutation tests. The defaults are 20,000 embeddings
of 4,096 dimensions, before and after. Prints seconds of wall clock and of CPU, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import numpy as np

from mpo.common.files import write_json
from mpo.common.provenance import collect
from mpo.data.languages import language_name
from mpo.hidden_space.compare import AFTER, BEFORE, LanguageTexts, Settings, measure_layer

_LANGUAGES = ("en", "hi", "zh", "de", "ar", "fr", "sw", "bn")


def cloud(seed: int, texts: int, dimensions: int, distance: float) -> np.ndarray:
    """``[texts, dimensions]`` float32; the first half is harmful and lies ``distance`` away along 50 dimensions."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((texts, dimensions), dtype=np.float32)
    points *= (1 / np.sqrt(np.arange(1, dimensions + 1))).astype(np.float32)
    points[: texts // 2, :50] += distance
    return points


def main() -> None:
    """Measure once and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hidden_space", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--texts", type=int, default=5000, help="per language")
    parser.add_argument("--dimensions", type=int, default=4096)
    parser.add_argument("--languages", type=int, default=4, choices=range(1, len(_LANGUAGES) + 1))
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--out", default="runs/benchmarks/hidden_space.json")
    options = parser.parse_args()
    languages = _LANGUAGES[: options.languages]
    harmful = np.arange(options.texts) < options.texts // 2
    clouds = {}
    for number, code in enumerate(languages):
        before = cloud(number, options.texts, options.dimensions, 0.1)
        after = before + 0.3 * cloud(
            100 + number, options.texts, options.dimensions, 0.3 if number == 0 else 0.0
        )
        clouds[BEFORE, code], clouds[AFTER, code] = before, after
    settings = Settings(resamples=options.resamples, permutations=options.permutations)
    texts = {
        code: LanguageTexts(harmful, np.arange(options.texts) + (number << 32))
        for number, code in enumerate(languages)
    }
    wall, cpu = time.perf_counter(), time.process_time()
    result = measure_layer(texts, lambda state, code: clouds[state, code], settings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{len(languages) * options.texts:,} texts, {options.dimensions:,} dimensions, before and after, "
        f"{options.resamples:,} resamples, {options.permutations:,} permutations, {os.cpu_count()} cores"
    )
    print(f"{wall:.0f} s of wall clock, {cpu:.0f} s of CPU, {memory / 2**30:.1f} GiB at the peak")
    for code, one in result.languages.items():
        change = one.change["between_class_ratio"]
        print(
            f"  {language_name(code):10} between-class ratio {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
        )
    write_json(
        options.out,
        {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "peak_bytes": memory,
            "options": vars(options),
            "provenance": collect(),
        },
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
