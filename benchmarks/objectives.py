"""A training step of each objective, here and by TRL's own trainer with the same loss.

    python -m benchmarks.step --loss_type sigmoid kto orpo --model FOLDER --data FILE --groups 4

**What is timed.** Real training loops: ``MPOTrainer`` with ``loss_type``, and ``trl.DPOTrainer``, ``trl.KTOTrainer`` or
``trl.experimental``'s ``CPOTrainer`` and ``ORPOTrainer`` with the same loss, adapter and precision, on the same pairs, token
by token. A step is one group: collating, forward, backward, clipping, ``AdamW`` and what either trainer logs. Both run in
processes of their own, at the same time but in turns, a step each: other load on the machine hits them alike, and each has
a peak of its own. Times are medians over the steps after the warm-up, ratios medians of the ratios of the same step.

**The pairs.** Of each group the targets (``--train_on targets``), or the targets and once the source (``both``); TRL's
trainer gets the same as one batch. Tokens are random, of the lengths of the data: a step's cost depends on nothing else.
MPO, which TRL does not have, holds its source besides, and runs against TRL's DPO on the same pairs, as do other
objectives that TRL lacks; the table says so.

**Before the first step** the trainer here runs its reference once; TRL runs it in every step. The seconds of that are in
the result, and a column counts them in, for one epoch over the groups of the run. On a CPU the process here keeps freed
memory, as ``mpo train`` has it; ``--keep_memory`` lets TRL's do so as well.

**Counted operations** are those of :mod:`benchmarks.flops`, over all groups of the data, on the shapes of ``--shapes``; an
objective's own arithmetic counts nothing. ``--steps 0`` counts only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, flops, lengths
from benchmarks.lengths import GroupLengths, PairLengths, cut
from benchmarks.race import NAMES, SIDES, Case, baseline, race
from mpo.common.files import write_text
from mpo.common.tables import TextTable
from mpo.errors import ConfigError
from mpo.training.objectives import (
    MISMATCHED,
    PROMPT,
    REFERENCE,
    RETENTION,
    SOURCE_GAP,
    STATES,
    find_objective,
)


def record(case: Case, found: dict[str, dict[str, Any]], warmup: int) -> dict[str, Any]:
    """The medians of a race and the ratios of TRL's trainer to this one."""
    pairs = [len(case.pairs(group)) for group in case.order[warmup:]]
    result: dict[str, Any] = {
        "loss_type": case.loss_type,
        "train_on": case.train_on,
        "lora": case.lora,
        "baseline": baseline(case.loss_type),
        "sides": found,
    }
    rates, peaks = {}, {}
    for side, entry in found.items():
        steps = entry["steps"][warmup:]
        if entry["error"] or len(steps) < len(pairs):
            continue
        seconds = [step["seconds"] for step in steps]
        rates[side] = seconds
        peaks[side] = steps[-1]["peak_bytes"]
        entry |= {
            "pairs_per_second": statistics.median(n / s for n, s in zip(pairs, seconds, strict=True)),
            "seconds_per_step": statistics.median(seconds),
            "cpu_seconds_per_step": statistics.median(step["cpu_seconds"] for step in steps),
            "peak_bytes": peaks[side],
        }
    if len(rates) == 2:
        processor = [[step["cpu_seconds"] for step in found[side]["steps"][warmup:]] for side in SIDES]
        result["trl_over_here"] = {
            "seconds": statistics.median(
                b / a for a, b in zip(*(rates[side] for side in SIDES), strict=True)
            ),
            "cpu_seconds": statistics.median(b / a for a, b in zip(*processor, strict=True)),
        }
        # The reference is run once for all of the groups, whose mean step stands for a step of each.
        of_groups = found["here"]["preparation"] / len(case.groups)
        result["trl_over_here"]["seconds_with_preparation_one_epoch"] = statistics.mean(rates["TRL"]) / (
            statistics.mean(rates["here"]) + of_groups
        )
        if all(peaks.values()):
            result["here_over_trl_in_peak_memory"] = peaks["here"] / peaks["TRL"]
    return result


# ---- Counted operations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """Model calls of a step here and in TRL's trainer, and of the reference pass here, which is made once."""

    here: list[flops.Call]
    trl: list[flops.Call]
    once: list[flops.Call]


def mismatched(
    groups: Sequence[GroupLengths], max_length: int
) -> list[tuple[list[PairLengths], PairLengths]]:
    """For KTO's reference point: lengths of each group's targets, and of its source, with the responses of the pair before."""

    def turned(pairs: Sequence[PairLengths]) -> list[PairLengths]:
        # The first has none before it and takes the last one's.
        others = [pairs[-1], *pairs[:-1]]
        return [cut(pair.prompt, *other[1:], max_length) for pair, other in zip(pairs, others, strict=True)]

    targets = iter(turned([pair for group in groups for pair in group.targets]))
    sources = turned([group.source for group in groups])
    return [
        ([next(targets) for _ in group.targets], source)
        for group, source in zip(groups, sources, strict=True)
    ]


def calls(
    loss_type: str,
    group: GroupLengths,
    train_on: str,
    others: tuple[list[PairLengths], PairLengths] | None = None,
    max_length: int = 1024,
) -> Calls:
    """
    The model calls of a step on a group.

    Args:
        loss_type: one of :data:`NAMES`.
        group: lengths.
        train_on: ``"targets"`` or ``"both"``.
        others: of :func:`mismatched`, for KTO.
        max_length: to which TRL cuts KTO's mismatched responses.
    """
    needs = find_objective(loss_type).needs
    pairs = list(group.trees if train_on == "both" else group.targets)
    responses = sum(pair.responses for pair in pairs)
    scored = responses + (sum(pair.prompt - 1 for pair in pairs) if PROMPT in needs else 0)
    held = [group.source] if RETENTION in needs else []
    stems = [PairLengths(group.source.prompt, 1, 1)] if STATES in needs and train_on == "targets" else []
    own = [flops.trees("train", [*pairs, *stems, *held], head="own_train", head_tokens=scored)]
    asked = pairs if REFERENCE in needs else [group.source] if SOURCE_GAP in needs else []
    once = []
    if asked:
        answers = sum(pair.responses for pair in asked)
        once.append(flops.trees("reference", asked, head="logits", head_tokens=answers))
    if MISMATCHED in needs:
        if others is None:
            raise ConfigError("KTO's calls need the lengths of the mismatched responses.")
        trees = [*others[0], others[1]] if train_on == "both" else others[0]
        answers = sum(pair.responses for pair in trees)
        own.append(flops.trees("policy", trees, head="logits", head_tokens=answers))
        once.append(flops.trees("reference", trees, head="logits", head_tokens=answers))
    return Calls(own, list(_trl_calls(loss_type, pairs, max_length)), once)


def _trl_calls(loss_type: str, pairs: Sequence[PairLengths], max_length: int) -> list[flops.Call]:
    responses = sum(pair.responses for pair in pairs)
    if loss_type in ("simpo", "cpo", "orpo"):
        call = flops.padded("train", pairs)
        return [call._replace(head="logits_train", head_tokens=call.tokens)]
    found = [
        flops.padded("train", pairs, head="kernel_train", head_tokens=responses),
        flops.padded("reference", pairs, head="logits", head_tokens=responses),
    ]
    if loss_type == "kto":
        sizes = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        turned = [sizes[-1], *sizes[:-1]]
        others = [
            cut(pair.prompt, turned[place], turned[place + len(pairs)], max_length)
            for place, pair in enumerate(pairs)
        ]
        answers = sum(pair.responses for pair in others)
        for part in ("policy", "reference"):
            found.append(flops.padded(part, others, head="logits", head_tokens=answers))
    return found


def counted(
    loss_type: str, train_on: str, costs: flops.Costs, groups: Sequence[GroupLengths], max_length: int = 1024
) -> dict[str, float]:
    """Operations of TRL's trainer over those here in an epoch, without the reference pass and with it in two epochs."""
    of_groups = [
        calls(loss_type, group, train_on, others, max_length)
        for group, others in zip(groups, mismatched(groups, max_length), strict=True)
    ]
    here_, theirs, once = (
        sum(call.operations(costs) for found in of_groups for call in getattr(found, part))
        for part in ("here", "trl", "once")
    )
    return {
        "here": here_,
        "trl": theirs,
        "once": once,
        "trl_over_here": theirs / here_,
        "trl_over_here_two_epochs": 2 * theirs / (2 * here_ + once),
    }


# ---- The command ---------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``--loss_type``."""
    parser.add_argument(
        "--loss_type",
        nargs="+",
        choices=[*NAMES, "all"],
        metavar="NAME",
        help=f"compare objectives with TRL's trainers instead: {', '.join(NAMES)}, or all",
    )
    parser.add_argument("--train_on", nargs="+", choices=["targets", "both"], default=["targets", "both"])
    parser.add_argument(
        "--steps", type=int, default=5, help="with --loss_type: steps that are measured; 0 only counts (5)"
    )
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=list(flops.DEFAULT_SHAPES),
        help="with --loss_type: shapes whose operations are counted; none with no name",
    )
    parser.add_argument("--keep_memory", action="store_true", help="let TRL's process keep freed memory, too")


def tables(result: dict[str, Any]) -> list[TextTable]:
    """The measured and the counted results, ready for the terminal and for a page."""
    rows, notes = [], []
    for entry in result["measured"]:
        name = _row_name(entry)
        sides = entry["sides"]
        notes += [f"{name}, {side}: {sides[side]['error']}" for side in sides if sides[side]["error"]]
        ratios = entry.get("trl_over_here", {})
        cells = [_number(sides[side].get("pairs_per_second"), ".3g") for side in SIDES if side in sides] + [
            _number(ratios.get("seconds"), ".2f"),
            _number(ratios.get("cpu_seconds"), ".2f"),
            _number(ratios.get("seconds_with_preparation_one_epoch"), ".2f"),
            *(_number(sides[side].get("peak_bytes"), ".2f", 2**30) for side in SIDES if side in sides),
            _number(entry.get("here_over_trl_in_peak_memory"), ".2f"),
        ]
        rows.append((name, entry["baseline"], *cells))
    header = (
        "Objective",
        "TRL's trainer",
        "Pairs / s",
        "TRL",
        "Times faster",
        "In CPU time",
        "With the reference pass",
        "Peak GiB",
        "TRL",
        "Of TRL's",
    )
    found = (
        [TextTable(title=result["title"], header=header, rows=tuple(rows), notes=tuple(notes))]
        if rows
        else []
    )
    shapes = list(result["counted"])
    if shapes:
        keys = list(result["counted"][shapes[0]])
        cells = tuple(
            (
                key,
                *(f"{result['counted'][shape][key]['trl_over_here']:.2f}" for shape in shapes),
                *(f"{result['counted'][shape][key]['trl_over_here_two_epochs']:.2f}" for shape in shapes),
            )
            for key in keys
        )
        header = ("Objective", *shapes, *(f"{shape}, with the reference pass" for shape in shapes))
        found.append(
            TextTable(title="Counted operations of TRL's trainer over those here", header=header, rows=cells)
        )
    return found


def _row_name(entry: dict[str, Any]) -> str:
    kind = f"LoRA {entry['lora']}" if entry["lora"] else "full"
    return f"{entry['loss_type']}, {'targets' if entry['train_on'] == 'targets' else 'source too'}, {kind}"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def compare(
    options: argparse.Namespace,
    *,
    config: Any,
    device: torch.device,
    half: bool,
    chosen: Sequence[GroupLengths],
    groups: Sequence[GroupLengths],
) -> None:
    """
    Measure and count the objectives that ``--loss_type`` names, print tables, write JSON and Markdown after each.

    What an earlier run with the same settings has measured is kept.

    Args:
        options: of ``benchmarks.step``.
        config: of the model.
        device, half: see :class:`Case`.
        chosen: groups to run.
        groups: all groups of the data, whose operations are counted.
    """
    if options.steps < 0 or options.warmup < 0:
        raise ConfigError(
            f"`--steps` is {options.steps}, `--warmup` {options.warmup}; expected none below 0."
        )
    names = list(NAMES) if "all" in options.loss_type else list(dict.fromkeys(options.loss_type))
    tokens = lengths.draw_tokens(chosen, config.get_text_config().vocab_size)
    order = [0] * options.warmup + [step % len(tokens) for step in range(options.steps)]
    model = options.shape or os.path.basename(options.model.rstrip("/"))
    settings = {
        "model": model,
        "device": str(device),
        "precision": "bfloat16" if half else "float32",
        "threads": options.threads or torch.get_num_threads(),
        "steps": options.steps,
        "warmup": options.warmup,
        "gradient_checkpointing": options.gradient_checkpointing,
        "call_tokens": options.call_tokens,
        "keep_memory": options.keep_memory,
        "max_length": options.max_length,
        "lengths": [asdict(group) for group in chosen],
    }
    settings = json.loads(json.dumps(settings))
    title = (
        f"{model}, {settings['precision']}, {device}: a step is one of {len(chosen)} groups, medians of {options.steps} "
        f"steps after {options.warmup}"
    )
    result: dict[str, Any] = {"title": title, "settings": settings, "measured": _kept(options.out, settings)}
    done = {_row_name(entry) for entry in result["measured"]}
    result["counted"] = {}
    for shape in options.shapes:
        for lora in options.lora:
            costs = flops.costs_of(shape, lora)
            for name in names:
                for train_on in ["targets"] if find_objective(name).targets_only else options.train_on:
                    key = _row_name({"loss_type": name, "train_on": train_on, "lora": lora})
                    counts = counted(name, train_on, costs, groups, options.max_length)
                    result["counted"].setdefault(shape, {})[key] = counts
    for name in names if options.steps else []:
        for train_on in ["targets"] if find_objective(name).targets_only else options.train_on:
            for lora in options.lora:
                case = Case(
                    name,
                    train_on,
                    lora,
                    options.model or config,
                    tokens,
                    order,
                    device=device.type,
                    half=half,
                    threads=options.threads,
                    checkpointing=options.gradient_checkpointing,
                    max_length=options.max_length,
                    keep_memory=options.keep_memory,
                    settings={}
                    if options.call_tokens is None
                    else {"max_tokens_per_call": options.call_tokens},
                )
                key = _row_name(vars(case))
                if key in done:
                    continue
                done.add(key)
                print(f"{key}, against TRL's {baseline(name)}", flush=True)
                result["measured"].append(record(case, race(case), options.warmup))
                _save(options.out, result)
    for table in tables(result):
        table.show()
    _save(options.out, result)
    print(f"written to {options.out} and {Path(options.out).with_suffix('.md')}")


def _kept(path: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier, perhaps interrupted run has measured under the same settings, without what failed."""
    try:
        earlier = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(earlier, dict) or earlier.get("settings") != settings:
        return []
    return [
        entry
        for entry in earlier.get("measured", [])
        if not any(side["error"] for side in entry["sides"].values())
    ]


def _save(path: str, result: dict[str, Any]) -> None:
    command.write(path, result)
    parts = [f"{table.title}\n\n{table.markdown()}\n" for table in tables(result)]
    write_text(Path(path).with_suffix(".md"), "\n".join(parts))
