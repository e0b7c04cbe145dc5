"""Everything that can only be measured on a GPU, in one command of less than nine minutes that needs no network.

    make gpu                                     # the same as: python -m benchmarks.gpu
    make gpu LENGTHS=token_lengths.csv OUT=FOLDER
    python -m benchmarks.gpu --tables runs/gpu/results.json      # the tables of results into docs/performance.md
    python -m benchmarks.gpu --tiny --device cpu                 # shows that every part runs, in tiny shapes

The parts run one after another, the most important first, each in a process and with a time limit of its own: what fails
or takes too long is said and costs the others nothing. A part is told to come to an end before its limit, and what it has
measured by then counts, also where it is ended by force. A part whose package is missing is skipped. After each part
``OUT/results.json`` is written, and ``OUT/performance.md``; the tables also go between the two markers of
``docs/performance.md``, unless they are tiny.

Models have random weights in known shapes. Lengths are those of a table (``LENGTHS``, see :mod:`benchmarks.lengths`), else
made from the deciles of the paper's two files, which are below.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command
from mpo.common.files import write_json, write_text
from mpo.common.tables import TextTable
from mpo.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
MARKERS = "<!-- make gpu: begin -->", "<!-- make gpu: end -->"
SHAPES = {"llama-3.1-8b": "gemma", "gemma-2-9b": "gemma", "qwen2.5-7b": "llama"}
SMALL = "llama-3.2-1b"
_IN_HAND = 15  # seconds of a part for its imports and its last step

# Deciles of the tokens of the paper's two files under the tokenizer of Gemma-3: prompt, chosen, rejected.
_SOURCE_PROMPT = (10, 13, 17, 18, 24, 31, 34, 40, 45)
_SOURCE_REJECTED = (37, 53, 70, 77, 96, 108, 117, 133, 153)
_TARGET_PROMPT = (12, 15, 20, 23, 28, 34, 40, 47, 57)
DECILES = {
    "llama": (
        (_SOURCE_PROMPT, (8, 13, 18, 20, 28, 33, 46, 66, 131), _SOURCE_REJECTED),
        (
            _TARGET_PROMPT,
            (99, 350, 389, 413, 428, 437, 448, 462, 480),
            (83, 96, 314, 389, 412, 428, 442, 458, 483),
        ),
    ),
    "gemma": (
        (_SOURCE_PROMPT, (128, 128, 128, 128, 128, 129, 129, 129, 130), _SOURCE_REJECTED),
        (
            _TARGET_PROMPT,
            (103, 114, 124, 129, 137, 147, 156, 167, 177),
            (43, 65, 83, 98, 112, 130, 146, 168, 206),
        ),
    ),
}
_TARGETS = 6


def write_lengths(path: Path, divisor: int = 1) -> None:
    """A table of lengths as the two files have them: a group at each decile of the prompt, its responses over all deciles."""
    names = [f"{side}_{part}" for side in ("source", "target") for part in ("prompt", "chosen", "rejected")]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "source_id", *names])
        for name, (source, target) in DECILES.items():
            for group in range(9):
                for number in range(_TARGETS):
                    places = group, (group + 2 * number) % 9, (group + 4 * number + 1) % 9
                    sizes = [part[group] for part in source]
                    sizes += [part[place] for part, place in zip(target, places, strict=True)]
                    table.writerow([name, group, *(max(1, size // divisor) for size in sizes)])


# ---- The parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One call of this command: where results go, on what device, and whether shapes are tiny."""

    out: Path
    device: str
    tiny: bool
    lengths: str

    def model(self, shape: str) -> list[str]:
        """The options that name a model: a known shape, or a folder with a tiny one of its family."""
        return ["--model", str(tiny_folder(shape, self.out))] if self.tiny else ["--shape", shape]


@dataclass(frozen=True)
class Part:
    """
    Something to measure.

    Attributes:
        name: in the results.
        seconds: time limit.
        arguments: of Python, given the file that the result goes to and the seconds after which it should come to an end.
        tables: of its result.
        package: that must be installed.
        runs_tiny_without: whether tiny shapes run without it.
    """

    name: str
    seconds: int
    arguments: Callable[[Run, Path, float], list[str]]
    tables: Callable[[dict[str, Any]], list[TextTable]]
    package: str | None = None
    runs_tiny_without: bool = False


def parts(shapes: Sequence[str] = tuple(SHAPES)) -> list[Part]:
    """All parts, the most important first."""
    return [
        Part("numerics", 95, _inner("numerics"), _numerics_tables),
        *(Part(f"step {shape}", 55, _step(shape), _step_tables) for shape in shapes),
        Part("attention", 70, _attention, _step_tables),
        Part("memory", 40, _inner("memory"), _memory_tables),
        Part("options plain", 25, _inner("options plain"), _option_tables),
        Part("options liger", 25, _inner("options liger"), _option_tables, package="liger_kernel"),
        Part(
            "options 4-bit",
            30,
            _inner("options 4-bit"),
            _option_tables,
            package="bitsandbytes",
            runs_tiny_without=True,
        ),
        Part("options compile", 50, _inner("options compile"), _option_tables),
        Part("options full", 25, _inner("options full"), _option_tables),
    ]


def _inner(name: str) -> Callable[[Run, Path, float], list[str]]:
    def arguments(run: Run, result: Path, seconds: float) -> list[str]:
        tiny = ["--tiny"] if run.tiny else []
        given = [
            "--seconds",
            str(seconds),
            "--device",
            run.device,
            "--out",
            str(run.out),
            "--lengths",
            run.lengths,
            *tiny,
        ]
        return ["-m", "benchmarks.gpu", "--part", name, "--result", str(result), *given]

    return arguments


def _of_step(
    run: Run, result: Path, seconds: float, shape: str, names: Sequence[str], quantiles: Sequence[str]
) -> list[str]:
    return [
        *("-m", "benchmarks.step", "--seconds", str(seconds)),
        *(*run.model(shape), "--lengths", run.lengths, "--file", SHAPES[shape]),
        *("--device", run.device, "--quantiles", *quantiles, "--formulations", *names, "--out", str(result)),
        *(["--template_tokens", "1", "--rounds", "1", "--lora", "2", "--targets", "2"] if run.tiny else []),
    ]


def _step(shape: str) -> Callable[[Run, Path, float], list[str]]:
    names = ["trees (tree)", "official", "TRL DPO"]

    def arguments(run: Run, result: Path, seconds: float) -> list[str]:
        return _of_step(run, result, seconds, shape, names, ["0.5"] if run.tiny else ["0.2", "0.5", "0.8"])

    return arguments


def _attention(run: Run, result: Path, seconds: float) -> list[str]:
    names = ["trees (tree)", "trees (sdpa)", "trees (varlen)"]
    if run.device != "cpu":  # where flex_attention does not train
        names.append("trees (flex_attention)")  # the last, since it is compiled
        from benchmarks.varlen import torch_kernel

        if torch_kernel() is None:
            names.remove("trees (varlen)")
    return _of_step(run, result, seconds, "llama-3.1-8b", names, ["0.5"])


def tiny_config(shape: str) -> Any:
    """A model of a known shape's family that a CPU runs in no time."""
    from mpo.planning.known_models import shape_config

    config = shape_config(shape)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 256,
        "query_pre_attn_scalar": 8,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    known = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "head_dim")}
    kept = {key: value for key, value in small.items() if hasattr(config, key)}
    return type(config)(**{**known, **kept})


def tiny_folder(shape: str, out: Path) -> Path:
    """The same with random weights, as a model folder."""
    from transformers import AutoModelForCausalLM

    folder = out / "models" / f"tiny-{shape}"
    if not (folder / "config.json").is_file():
        AutoModelForCausalLM.from_config(tiny_config(shape)).save_pretrained(folder)
    return folder


# ---- What runs in a part's own process -----------------------------------------------------------------------------


def outcomes(log: str) -> dict[str, list[str]]:
    """Names of tests by outcome, from what ``pytest -v`` has printed so far; ``unfinished`` is the one that was running."""
    found: dict[str, list[str]] = {}
    for name, outcome in re.findall(
        r"^(tests/\S+::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED)\b.*$| *\Z)", log, re.MULTILINE
    ):
        found.setdefault(outcome.lower() or "unfinished", []).append(name)
    return found


def numerics(run: Run, seconds: float) -> dict[str, Any]:
    """The tests that need the device: float64 on the CPU against every attention, precision and kernel."""
    chosen = (
        ["-k", "packed_trees and fp32 and llama or frozen_head and fp32 or one_kernel"] if run.tiny else []
    )
    log = run.out / "numerics.log"
    with open(log, "w", encoding="utf-8") as file:
        arguments = ["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", *chosen]
        process = subprocess.Popen(
            [sys.executable, *arguments, "tests/gpu/test_numerics.py", "tests/gpu/test_training.py"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MPO_GPU_SUITE_DEVICE": run.device},
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    return {"outcomes": outcomes(log.read_text()), "finished": code is not None, "exit_code": code}


def memory_cases(tiny: bool) -> list[tuple[str, Any]]:
    """What is compared with the plan: shapes, and what of them is trained on how many tokens."""
    from benchmarks.plan_memory import Case

    if tiny:
        return [("llama-3.2-1b", Case(True, True, 32, 2, half=True))]
    return [
        ("llama-3.1-8b", Case(True, True, 640, 8, half=True)),
        ("llama-3.1-8b", Case(True, False, 640, 2, half=True)),
        (SMALL, Case(False, True, 640, 8, half=True)),
        (SMALL, Case(False, False, 640, 4, half=True)),
    ]


def memory(run: Run) -> Iterator[dict[str, Any]]:
    """What ``mpo plan`` counts of a step against what torch had allocated in it; all cases so far, after each."""
    from benchmarks.plan_memory import counted, measured
    from mpo.planning.known_models import shape_config

    records = []
    for shape, case in memory_cases(run.tiny):
        config = tiny_config(shape) if run.tiny else shape_config(shape)
        record: dict[str, Any] = {
            "shape": shape,
            "trained": "an adapter" if case.adapter else "all weights",
            "activations": "recomputed" if case.recomputed else "kept",
            "tokens": case.tokens,
            "counted_bytes": counted(config, case, head=run.device == "cpu").tensors,
        }
        try:
            record["measured_bytes"] = measured(config, case, run.device)
        except Exception as error:
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        records.append(record)
        yield {"cases": records}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "liger": {"settings": {"use_liger_kernel": True}},
    "4-bit": {"four_bit": True, "folder": True},  # a base is quantised while it is read
    # Read from a folder, a model gets the attention that the trainer chooses for what is compiled.
    "compile": {"settings": {"torch_compile": True}, "folder": True},
    "full": {"lora": 0},
}


class _Late(Exception):
    pass


def option(name: str, run: Run, seconds: float) -> dict[str, Any]:
    """Steps of the trainer with one of its options, on a small shape and the same groups for all options; no new one after
    so many seconds."""
    deadline = time.monotonic() + seconds
    import torch

    from benchmarks import lengths, race
    from benchmarks.step import peak, reset_peak, spread
    from mpo.planning.known_models import shape_config

    config = tiny_config(SMALL) if run.tiny else shape_config(SMALL)
    groups = spread(lengths.read_csv(run.lengths, "gemma", 1 if run.tiny else 15, 1024), [0.2, 0.5, 0.8])
    of = {**OPTIONS[name]}
    settings = of.pop("settings", {})
    if name == "compile" and run.device == "cpu":
        settings = {**settings, "torch_compile_backend": "aot_eager"}
    model = config
    if of.pop("folder", False):
        if run.tiny:
            model = str(tiny_folder(SMALL, run.out))
        else:
            model = str(run.out / "models" / SMALL)
            plain = race.Case("mpo", "targets", 16, config, (), device=run.device, half=True)
            plain.load(None).save_pretrained(model)
    if run.device == "cpu":
        of["four_bit"] = False
    warmup = 1 if run.tiny else 3  # a step on each of the groups, which compilation needs
    order = [step % len(groups) for step in range(warmup + (1 if run.tiny else 9))]
    case = race.Case(
        "mpo",
        "targets",
        of.pop("lora", 2 if run.tiny else 16),
        model,
        lengths.draw_tokens(groups, config.vocab_size),
        order,
        device=run.device,
        half=run.device != "cpu",
        settings=settings,
        **of,
    )
    device = torch.device(run.device)
    steps: list[dict[str, Any]] = []
    started: list[float] = []

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wait() -> None:
        if len(steps) > warmup and time.monotonic() >= deadline:
            raise _Late
        if len(steps) == warmup:
            reset_peak(device)

    def start() -> None:
        started[:] = [clock()]

    def stop() -> dict[str, Any]:
        return {"seconds": clock() - started[0], "peak_bytes": peak(device)}

    with contextlib.suppress(_Late):
        race.run("here", case, wait=wait, start=start, stop=stop, report=steps.append)
    measured = steps[warmup:]
    taken = order[warmup : len(steps)]
    rates = [len(case.pairs(place)) / step["seconds"] for place, step in zip(taken, measured, strict=True)]
    return {
        "option": name,
        "shape": SMALL,
        "lora": case.lora,
        "warmup_seconds": sum(step["seconds"] for step in steps[:warmup]),
        "pairs_per_second": statistics.median(rates),
        "peak_bytes": measured[-1]["peak_bytes"],
        "losses": [step["loss"] for step in steps],
    }


def run_part(name: str, run: Run, seconds: float) -> Iterator[dict[str, Any]]:
    """The result of a part that is measured by this module, each time that there is more of it."""
    if name == "memory":
        yield from memory(run)
    elif name == "numerics":
        yield numerics(run, seconds)
    else:
        yield option(name.removeprefix("options "), run, seconds)


# ---- Tables --------------------------------------------------------------------------------------------------------


def _numerics_tables(result: dict[str, Any]) -> list[TextTable]:
    outcomes = result["outcomes"]
    kinds = ("passed", "failed", "error", "skipped")
    notes = [f"{kind}: {name}" for kind in ("failed", "error") for name in outcomes.get(kind, [])]
    if not result["finished"]:
        running = ", ".join(outcomes.get("unfinished", [])) or "none"
        notes.append(f"its time was up before all tests had run; running then: {running}")
    row = ("tests that need the device", *(str(len(outcomes.get(kind, []))) for kind in kinds))
    return [TextTable("Numerics", ("", *(kind.capitalize() for kind in kinds)), (row,), notes=tuple(notes))]


def _step_tables(result: dict[str, Any]) -> list[TextTable]:
    rows = []
    for entry in result["formulations"]:
        if entry["error"] or "seconds_per_step" not in entry:
            rows.append((f"{entry['formulation']}: {entry['error'] or 'no step'}", *["-"] * 6))
            continue
        ratio = entry.get("official_over_this")
        counted = result["counted_official_over"].get(entry["formulation"])
        peak, used = entry["peak_bytes"], entry["model_flop_utilisation"]
        rows.append(
            (
                entry["formulation"],
                f"{entry['seconds_per_step']:.3f}",
                f"{entry['pairs_per_second']:.2f}",
                f"{peak / 2**30:.1f}" if peak else "-",
                f"{used:.0%}" if "DPO" not in entry["formulation"] else "-",
                f"{ratio:.2f}" if ratio else "-",
                f"{counted:.2f}" if ratio and counted else "-",
            )
        )
    header = ("Formulation", "s / step", "Pairs / s", "Peak GiB", "Utilisation", "Official / this", "Counted")
    title = f"{result['model']}, {result['provenance'].get('precision', '')}, LoRA {result['lora']}"
    rate = f"matrix product: {result['matmul_operations_per_second'] / 1e12:.3g} TFLOP/s"
    return [TextTable(title, header, tuple(rows), notes=(rate,))]


def _memory_tables(result: dict[str, Any]) -> list[TextTable]:
    rows = []
    for case in result["cases"]:
        counted, real = case["counted_bytes"], case.get("measured_bytes")
        found = (
            (f"{real / 2**30:.2f}", f"{counted / real - 1:+.1%}") if real else (case.get("error", "-"), "-")
        )
        cells = (
            case["trained"],
            case["activations"],
            f"{case['tokens']:,}",
            f"{counted / 2**30:.2f}",
            *found,
        )
        rows.append((case["shape"], *cells))
    header = ("Shape", "Trained", "Activations", "Tokens", "Counted GiB", "Allocated GiB", "Deviation")
    return [
        TextTable("What `mpo plan` counts, against `torch.cuda.max_memory_allocated`", header, tuple(rows))
    ]


def _option_tables(result: dict[str, Any]) -> list[TextTable]:
    peak = result["peak_bytes"]
    row = (
        result["option"],
        f"{result['pairs_per_second']:.2f}",
        f"{peak / 2**30:.2f}" if peak else "-",
        f"{result['warmup_seconds']:.1f}",
    )
    header = ("Option", "Pairs / s", "Peak GiB", "First steps, s")
    return [TextTable(f"The trainer's options, {result['shape']}", header, (row,))]


def page(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    sections: dict[str, TextTable] = {}
    missing = []
    for part in parts():
        found = results["parts"].get(part.name)
        if found is None:
            missing.append(f"- {part.name}: not run")
        elif found["error"]:
            missing.append(f"- {part.name}: {found['error']}")
        if found is not None and found["result"]:
            for table in part.tables(found["result"]):
                title = f"Attention: {table.title}" if part.name == "attention" else table.title
                if title in sections:  # a row each of one table
                    old = sections[title]
                    table = TextTable(
                        title, old.header, (*old.rows, *table.rows), notes=(*old.notes, *table.notes)
                    )
                sections[title] = table
    blocks = [f"On {results['device']}, torch {results['torch']}, {results['seconds']:.0f} s for all of it:"]
    for title, table in sections.items():
        blocks.append(
            "\n".join([f"**{title}**", "", table.markdown(), *(f"\n{note}" for note in table.notes)])
        )
    if missing:
        blocks.append("Not measured, or not to the end:\n\n" + "\n".join(missing))
    return "\n\n".join(blocks) + "\n"


def insert(text: str, into: Path) -> None:
    """
    Put Markdown between the two markers of a page.

    Raises:
        ConfigError: the page has no markers.
    """
    old = into.read_text(encoding="utf-8")
    before, begin, rest = old.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not begin or not end:
        raise ConfigError(
            f"{into} has no lines {' and '.join(MARKERS)}, between which the tables belong. Add them."
        )
    write_text(into, f"{before}{begin}\n{text}{end}{after}")


# ---- The command ---------------------------------------------------------------------------------------------------


def carry_out(part: Part, run: Run, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; ``result`` or ``error``, and the ``seconds`` that it took."""
    missing = part.package is not None and importlib.util.find_spec(part.package) is None
    if missing and not (run.tiny and part.runs_tiny_without):
        return {"error": f"{part.package} is not installed", "result": None, "seconds": 0.0}
    name = part.name.replace(" ", "-")
    result, log = run.out / f"{name}.json", run.out / f"{name}.log"
    result.unlink(missing_ok=True)
    # One GPU, as the trainers expect of one process, and no requests.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    error = None
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments(run, result, max(1.0, seconds - _IN_HAND))],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        except BaseException:  # Ctrl-C ends the part, too
            _end(process)
            raise
        else:
            last = [
                line
                for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
                if line.strip()
            ]
            if code:
                error = f"exit code {code}: {last[-1] if last else 'no output'}"
    _end(process)
    found = None
    if result.is_file():  # also what a part had by the time it was stopped
        found = json.loads(result.read_text(encoding="utf-8"))
    elif error is None:
        error = "it wrote no result"
    return {"error": error, "result": found, "seconds": time.monotonic() - began}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(run: Run, seconds: float, chosen: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts within a time limit for all; what was measured is on disk after each."""
    import torch

    device = torch.cuda.get_device_name(0) if run.device != "cpu" else "a CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "tiny": run.tiny, "parts": {}}
    began = time.monotonic()
    for part in parts():
        if chosen and part.name not in chosen:
            continue
        left = seconds - (time.monotonic() - began)
        if left < 10:
            results["parts"][part.name] = {"error": "no time was left", "result": None, "seconds": 0.0}
        else:
            print(f"{part.name} ...", flush=True)
            results["parts"][part.name] = carry_out(part, run, left if run.tiny else min(part.seconds, left))
        found = results["parts"][part.name]
        print(f"{part.name}: {found['error'] or 'done'} ({found['seconds']:.0f} s)", flush=True)
        results["seconds"] = time.monotonic() - began
        command.write(str(run.out / "results.json"), results)
        write_text(run.out / "performance.md", page(results))
    return results


def main() -> None:
    """Measure and write; or put measured tables into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument(
        "--lengths", default="", help="CSV of lengths; unset: the deciles of the paper's files"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that all parts run")
    parser.add_argument("--seconds", type=float, default=525, help="for all parts together (525)")
    parser.add_argument("--only", nargs="+", help="some of the parts, by name")
    parser.add_argument(
        "--tables", type=Path, metavar="RESULTS", help="put these results into the page instead"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (docs/performance.md)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tables:
        insert(page(json.loads(options.tables.read_text(encoding="utf-8"))), options.page)
        return
    run = Run(options.out.resolve(), options.device, options.tiny, options.lengths)
    if options.part:
        for result in run_part(options.part, run, options.seconds):
            write_json(options.result, result)
        return
    names = [part.name for part in parts()]
    if unknown := sorted(set(options.only or ()) - set(names)):
        raise ConfigError(f"there is no part {', '.join(unknown)}; expected some of {', '.join(names)}.")
    import torch

    if run.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU here. `python -m benchmarks.gpu --tiny --device cpu` shows that every part runs."
        )
    run.out.mkdir(parents=True, exist_ok=True)
    if not run.lengths:
        run = Run(run.out, run.device, run.tiny, str(run.out / "lengths.csv"))
        write_lengths(Path(run.lengths), divisor=20 if run.tiny else 1)
    results = measure(run, options.seconds, options.only)
    if not run.tiny:
        insert(page(results), options.page)
    print(f"written to {run.out / 'results.json'} and {run.out / 'performance.md'}")
    if not any(part["result"] for part in results["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
