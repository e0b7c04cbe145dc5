"""Time, memory and utilisation of a training step, for each way of computing it.

Model shapes by name with random weights, or a model folder; lengths from a table or a data file. On a GPU:

    python -m benchmarks.step --shape llama-3.1-8b --lengths token_lengths.csv --file gemma

On a CPU, a small shape and few groups:

    python -m benchmarks.step --shape gemma-3-270m --lengths token_lengths.csv --file gemma --groups 2

With ``--loss_type`` objectives are compared with TRL's trainers instead, see :mod:`benchmarks.objectives`.

**What is timed.** One optimizer step on one group: forward, backward, ``AdamW``. All formulations work on one model in
one process and take turns, step by step, so that what else the machine does hits them alike; a column of ratios
compares medians. On a machine that others use too, the ratio of the processor's time tells more than that of the
clock's; on CUDA it says how busy the host is. The reference pass of the trainer's formulations is made before; ``benchmarks.flops`` says what it costs.
On CUDA, time is between two events on the stream, and the step's inputs are built and copied within it.

**Model-FLOP utilisation.** The operations that any exact step must do, over the time, over the rate of a large matrix
product that is measured on the device in the dtype that is computed in:

    needed = L * (tokens of all trees) + A * (pairs of tokens of a tree that see each other)
             + (forward and gradient of a token's logits) * (target response tokens)
    utilisation = needed / (seconds * measured operations per second)

L and A are a token's and a score's operations, forward and backward, counted as in :mod:`benchmarks.flops`: with LoRA
without the gradients of frozen weights. A prompt counts once, a source once per group, padding and recomputation
nothing; so a formulation that does more than it must has a low utilisation, however busy the device is.

**Memory.** On CUDA the most that torch had allocated in a step. On a CPU the most memory that the process held in a
step that is run for that alone, before any is timed, on the longest group, while the allocator gives back what is freed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import math
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import command, flops, formulations, lengths, objectives
from benchmarks.formulations import Group, Setting
from benchmarks.lengths import GroupLengths
from mpo.common.tables import TextTable
from mpo.errors import ConfigError
from mpo.modeling.loading import ModelSource, load_config
from mpo.planning.known_models import SHAPES, shape_config
from mpo.training.allocator import keep_freed_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Measured:
    """What was measured of one formulation."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None


# ---- Devices -------------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a function takes on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1000


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations per second of a large square matrix product, the best of several."""
    size = size or (8192 if device.type == "cuda" else 1536)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: left @ right, device) for _ in range(10 if device.type == "cuda" else 4))
    return 2 * size**3 / best


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, after giving back what is not in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak(device: torch.device) -> int | None:
    """Bytes at the peak since :func:`reset_peak`: allocated on CUDA, resident on Linux, else unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            found = re.search(r"VmHWM:\s*(\d+) kB", file.read())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


# ---- Measuring -----------------------------------------------------------------------------------------------------


def spread(groups: Sequence[GroupLengths], quantiles: Sequence[float]) -> list[GroupLengths]:
    """The groups at these quantiles (0 to 1) of all groups' numbers of tokens, so that a few stand for the whole."""
    order = sorted(groups, key=lambda group: sum(pair.tree for pair in group.trees))
    return [order[min(int(quantile * len(order)), len(order) - 1)] for quantile in quantiles]


def needed_operations(costs: flops.Costs, group: GroupLengths) -> int:
    """What any exact step on a group must compute; see this module's formula."""
    (call,) = flops.calls("trees", group)
    return call._replace(head="logits_train").operations(costs, visible_only=True)


def measure(
    setting: Setting,
    groups: Sequence[Group],
    names: Sequence[str],
    *,
    rounds: int,
    warmup: int,
    keep_memory: bool = True,
    peaks: bool = True,
    deadline: float | None = None,
    report: Callable[[dict[str, Measured]], None] = lambda found: None,
    **options: Any,
) -> dict[str, Measured]:
    """
    Run every formulation on every group, in turns.

    With a deadline each formulation makes its first round by itself as soon as it is ready, so that a later one that is slow
    to prepare costs it nothing.

    Args:
        setting: models.
        groups: tokenized groups; a step is one of them.
        names: of :data:`benchmarks.formulations.NAMES`.
        rounds: times that all groups are run.
        warmup: steps of each formulation before, not counted.
        keep_memory: on a CPU, keep freed memory once the peaks are known, as a run of the trainer does. It cannot be
            undone, and no peak can be measured in the process afterwards.
        peaks: run a step of each formulation first, to measure its memory.
        deadline: of :func:`time.monotonic`, after which no step begins.
        report: called with what is known after each formulation's preparation and each round.
        options: of :func:`benchmarks.formulations.prepare`.

    Returns:
        By name. A formulation that fails, or is not measured by the deadline, has ``error`` set and no more times.
    """
    device = setting.device
    trained = [p for p in setting.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    found = {name: Measured() for name in names}
    steps: dict[str, Callable[[Sequence[Group]], torch.Tensor]] = {}
    longest = max(
        groups, key=lambda group: len(group["source_prompt"]) + sum(map(len, group["target_chosen"]))
    )

    def late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    def attempt(name: str, function: Callable[[], Any]) -> None:
        if found[name].error is not None or late():
            return
        try:
            function()
        except Exception as error:
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            what = "out of memory" if full else type(error).__name__
            found[name].error = f"{what}: {(str(error).splitlines() or [''])[0]}"
            if not full:
                traceback.print_exc()
        finally:
            optimizer.zero_grad(set_to_none=True)
        if (
            found[name].error is not None
        ):  # only now, since an error holds the tensors of the step that it ended
            steps.pop(name, None)
            with contextlib.suppress(RuntimeError):
                reset_peak(device)

    def one(name: str, group: Group) -> None:
        def whole() -> None:
            loss.append(steps[name]([group]))
            optimizer.step()

        loss: list[torch.Tensor] = []
        start = time.process_time()
        found[name].seconds.append(timed(whole, device))
        found[name].cpu_seconds.append(time.process_time() - start)
        found[name].loss.append(float(loss[0]))

    def memory(name: str) -> None:
        optimizer.state.clear()  # the first formulation has none yet
        reset_peak(device)
        steps[name]([longest])
        found[name].peak_bytes = peak(device)

    def prepare(name: str) -> None:
        def setup() -> None:
            steps[name] = formulations.prepare(name, setting, groups, **options)

        attempt(name, setup)
        if peaks:
            attempt(name, lambda: memory(name))

    keeps = device.type == "cpu" and keep_memory
    if keeps:
        for name in names:
            prepare(name)
        keep_freed_memory()
    for name in names:
        if not keeps:
            prepare(name)
        for _ in range(warmup):
            attempt(name, lambda name=name: one(name, groups[0]))
        for measured in (found[name].seconds, found[name].cpu_seconds, found[name].loss):
            measured.clear()
        for group in groups if deadline is not None else ():
            attempt(name, lambda name=name, group=group: one(name, group))
        report(found)
    for _ in range(rounds if deadline is None else rounds - 1):
        for group in groups:
            for name in names:
                attempt(name, lambda name=name, group=group: one(name, group))
        report(found)
    for entry in found.values():
        if entry.error is None and len(entry.seconds) < len(groups) and late():
            entry.error = "no time was left for a round"
    return found


def profiled(
    name: str, setting: Setting, groups: Sequence[Group], *, rows: int = 12, **options: Any
) -> TextTable:
    """Where one formulation's time goes: the operators that take the most of it, in one step on the first group."""
    from torch.profiler import ProfilerActivity, profile

    run = formulations.prepare(name, setting, groups, **options)
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run(groups[:1])
        if on_gpu:
            torch.cuda.synchronize()
    setting.policy.zero_grad(set_to_none=True)
    field_name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field_name))
    total = sum(getattr(event, field_name) for event in events) or 1
    return TextTable(
        title=f"{name}: where the time of a step goes",
        header=("Operator", "Share", "Calls"),
        rows=tuple(
            (event.key[:60], f"{getattr(event, field_name) / total:.1%}", str(event.count))
            for event in events[:rows]
        ),
    )


# ---- The command ---------------------------------------------------------------------------------------------------


def table(
    found: dict[str, Measured],
    groups: Sequence[GroupLengths],
    *,
    needed: float,
    rate: float,
    counted: dict[str, float],
    title: str,
    note: str,
) -> tuple[TextTable, list[dict[str, Any]]]:
    """The results as a table and as JSON; times are means over the groups of the median over rounds."""
    pairs = sum(len(group.targets) for group in groups) / len(groups)
    rows, records = [], []
    times = {name: _mean_of_medians(entry.seconds, len(groups)) for name, entry in found.items()}
    cpu_times = {name: _mean_of_medians(entry.cpu_seconds, len(groups)) for name, entry in found.items()}
    for name, entry in found.items():
        seconds = times[name]
        record: dict[str, Any] = {
            "formulation": name,
            "error": entry.error,
            "peak_bytes": entry.peak_bytes,
            "seconds_of_steps": entry.seconds,
            "cpu_seconds_of_steps": entry.cpu_seconds,
            "losses": entry.loss,
        }
        if seconds is not None:
            official = times.get("official")
            record |= {
                "seconds_per_step": seconds,
                "pairs_per_second": pairs / seconds,
                "model_flop_utilisation": needed / seconds / rate,
                "official_over_this": official / seconds if official else None,
                "official_over_this_in_cpu_time": _ratio(cpu_times.get("official"), cpu_times[name]),
            }
        records.append(record)
        rows.append(
            (
                name,
                f"{seconds:.3f}" if seconds is not None else "-",
                f"{pairs / seconds:.2f}" if seconds is not None else "-",
                f"{entry.peak_bytes / 2**30:.2f}" if entry.peak_bytes else "-",
                f"{needed / seconds / rate:.1%}" if seconds is not None and "DPO" not in name else "-",
                _shown_ratio(times.get("official"), seconds),
                _shown_ratio(cpu_times.get("official"), cpu_times[name]),
                f"{counted[name]:.2f}" if name in counted else "-",
            )
        )
    errors = [f"{name}: {entry.error}" for name, entry in found.items() if entry.error]
    header = (
        "Formulation",
        "s / step",
        "Pairs / s",
        "Peak GiB",
        "MFU",
        "Official / this",
        "In CPU time",
        "Counted",
    )
    return TextTable(title=title, header=header, rows=tuple(rows), notes=(note, *errors)), records


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _shown_ratio(one: float | None, other: float | None) -> str:
    ratio = _ratio(one, other)
    return "-" if ratio is None else f"{ratio:.2f}"


def _mean_of_medians(seconds: Sequence[float], groups: int) -> float | None:
    """Steps come as whole rounds over the groups; an interrupted last round is left out."""
    rounds = len(seconds) // groups
    if not rounds:
        return None
    return statistics.mean(
        statistics.median(seconds[place : rounds * groups : groups]) for place in range(groups)
    )


def costs_of_alike_layers(config: Any, lora: int) -> flops.Costs:
    """What :func:`benchmarks.flops.measure` counts for a model whose layers cost the same, from two of them and four."""

    def measured(layers: int) -> flops.Costs:
        shallow = copy.deepcopy(config)
        text = shallow.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        return flops.measure(shallow, lora)

    layers = config.get_text_config().num_hidden_layers
    if layers <= 4:
        return flops.measure(config, lora)
    two, four = measured(2), measured(4)

    def whole(part: str) -> flops.Backbone:
        ends = zip(getattr(two, part), getattr(four, part), strict=True)
        return flops.Backbone(*(low + (high - low) // 2 * (layers - 2) for low, high in ends))

    return replace(two, train=whole("train"), reference=whole("reference"), policy=whole("policy"))


def counted_ratios(
    costs: flops.Costs, groups: Sequence[GroupLengths], row_tokens: int | None
) -> dict[str, float]:
    """Operations of the official formulation over those of each, on these groups, as ``benchmarks.flops`` counts them."""
    totals = flops.epoch(costs, groups, row_tokens or 2048)
    ratios = {name: totals["official"] / totals[name] for name in flops.FORMULATIONS}
    names = {"trees (tree)": "trees"} | (
        {f"trees ({kind})": "trees, masked rows" for kind in ("sdpa", "eager")} if row_tokens else {}
    )
    return {
        **{name: ratios[name] for name in formulations.NAMES if name in ratios},
        **{name: ratios[of] for name, of in names.items()},
    }


def main() -> None:
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", help=f"random weights of a known shape: {', '.join(SHAPES)}")
    model.add_argument("--model", help="model folder, run with its own weights")
    lengths.add_options(parser)
    parser.add_argument("--groups", type=int, default=8, help="groups, spread over all lengths (8)")
    parser.add_argument(
        "--quantiles", type=float, nargs="+", help="groups at these quantiles of length instead"
    )
    parser.add_argument("--targets", type=int, help="at most so many targets of a group")
    parser.add_argument("--formulations", nargs="+", choices=formulations.NAMES, help="all that can run")
    parser.add_argument(
        "--lora",
        type=int,
        nargs="+",
        default=[16],
        help="rank of the adapter; 0 is full fine-tuning (16); several with --loss_type",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument(
        "--row_tokens", type=int, help="row budget of trees under a mask; the trainer's default"
    )
    parser.add_argument(
        "--call_tokens", type=int, help="budget of a model call; the trainer's, 0 for no limit"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3, help="times that all groups are run (3)")
    parser.add_argument(
        "--seconds", type=float, help="begin no step after so many, and write what was measured by then"
    )
    parser.add_argument("--warmup", type=int, default=1, help="steps before, not counted (1)")
    parser.add_argument(
        "--no_memory", action="store_true", help="measure times alone, which saves a step each"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show where the time goes instead of measuring it"
    )
    parser.add_argument("--threads", type=int, help="threads of a CPU")
    objectives.add_options(parser)
    parser.add_argument("--out", help="runs/benchmarks/step.json, or objectives.json beside it")
    options = parser.parse_args()
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    options.out = options.out or f"runs/benchmarks/{'objectives' if options.loss_type else 'step'}.json"

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "`--device cuda` asks for a GPU, and torch sees none here. Leave it out, or say `cpu`."
        )
    dtype = _DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if options.threads:
        torch.set_num_threads(options.threads)
    config: Any = shape_config(options.shape) if options.shape else load_config(ModelSource(options.model))
    quantiles = options.quantiles or [(place + 0.5) / options.groups for place in range(options.groups)]
    if not all(0 <= quantile <= 1 for quantile in quantiles) or not quantiles:
        raise ConfigError(
            f"`--quantiles` are {options.quantiles}; expected numbers from 0 to 1, and a group at least."
        )
    if options.data and not options.tokenizer:
        options.tokenizer = options.model
    everything = lengths.from_options(options)
    chosen = spread(everything, quantiles)
    if options.targets:
        chosen = [GroupLengths(group.source, group.targets[: options.targets]) for group in chosen]
    if options.loss_type:
        objectives.compare(
            options,
            config=config,
            device=device,
            half=dtype is torch.bfloat16,
            chosen=chosen,
            groups=everything,
        )
        return
    if len(options.lora) > 1:
        raise ConfigError("`--lora` takes several ranks with `--loss_type` only; expected one.")
    (lora,) = options.lora
    names = options.formulations or formulations.available(config, device)
    mixed = dtype if dtype is not torch.float32 else None

    torch.manual_seed(0)
    setting = formulations.build_setting(
        config if options.shape else options.model,
        device=device,
        dtype=dtype,
        lora=lora,
        beta=options.beta,
        autocast=mixed,
        checkpointing=options.gradient_checkpointing,
    )
    groups = lengths.draw_tokens(chosen, config.get_text_config().vocab_size)
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                profiled(
                    name,
                    setting,
                    groups,
                    folder=folder,
                    row_tokens=options.row_tokens,
                    call_tokens=options.call_tokens,
                ).show()
        return
    # Known shapes have layers that cost the same.
    costs = costs_of_alike_layers(config, lora) if options.shape else flops.measure(config, lora)
    rate = matmul_rate(device, dtype)
    needed = math.fsum(needed_operations(costs, group) for group in chosen) / len(chosen)
    counted = counted_ratios(costs, chosen, options.row_tokens)
    name = options.shape or os.path.basename(options.model.rstrip("/"))
    precision = str(dtype).removeprefix("torch.")

    def result(found: dict[str, Measured]) -> tuple[TextTable, dict[str, Any]]:
        shown, records = table(
            found,
            chosen,
            needed=needed,
            rate=rate,
            counted=counted,
            title=(
                f"{name}, {precision}, {'LoRA ' + str(lora) if lora else 'full'}: {len(chosen)} groups of "
                f"{options.file or 'the file'}, {sum(len(g.targets) for g in chosen)} pairs, {options.rounds} rounds"
            ),
            note=f"matrix product: {rate / 1e12:.3g} TFLOP/s; needed per step: {needed / 1e12:.3g} TFLOP",
        )
        return shown, {
            "model": name,
            "random_weights": bool(options.shape),
            "lora": lora,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "row_tokens": options.row_tokens,
            "call_tokens": options.call_tokens,
            "gradient_checkpointing": options.gradient_checkpointing,
            "matmul_operations_per_second": rate,
            "needed_operations_per_step": needed,
            "counted_official_over": counted,
            "lengths": [{"source": group.source, "targets": group.targets} for group in chosen],
            "formulations": records,
        }

    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            setting,
            groups,
            names,
            rounds=options.rounds,
            warmup=options.warmup,
            peaks=not options.no_memory,
            deadline=deadline,
            report=lambda found: command.write(options.out, result(found)[1], precision=precision),
            folder=folder,
            row_tokens=options.row_tokens,
            call_tokens=options.call_tokens,
        )
    shown, content = result(found)
    shown.show()
    command.save(options.out, content, precision=precision)


if __name__ == "__main__":
    command.run(main)
