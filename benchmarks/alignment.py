"""Does training close the gap? MPO on a small real model, held-out pairs, several seeds and retention weights.

    python -m benchmarks.alignment --data FILE --harmless FILE --seeds 42 43 44 --retain_weights 1 0

For every seed and retention weight the model is trained on the first ``--train_sources`` sources (after ``--skip_sources``)
and scored on the next ``--held_out_sources``, before and after: the mean squared distance ``(beta * RG - RG_ref)^2`` of
the target pairs, the reward gap and share of positive pairs per language, the source language's gap, the retention term,
and the perplexity of harmless texts in the source language, as they stand and as a user's turn in the model's chat
template.
Prints a table per run and writes ``--out`` as JSON with the versions of all libraries.

The settings are those of a laptop: SmolLM2-135M-Instruct (unpacked by ``python -m mpo.jobs.demo``), LoRA of rank 16 on all
linear layers, one epoch at a constant rate, one group per step, responses cut to 96 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from mpo import MPOConfig, MPOTrainer
from mpo.common.progress import quiet_libraries
from mpo.common.provenance import collect
from mpo.data import load_groups
from mpo.evaluation import Scores, compare, summarize
from mpo.jobs.demo import prepare_demo_model
from mpo.modeling.likelihoods import perplexity
from mpo.training.allocator import keep_freed_memory


def squared_distance(scores: Scores, beta: float) -> float:
    """Mean of ``(beta * RG - RG_ref)^2`` over the target pairs."""
    values = [(beta * r.gap - r.reference_gap) ** 2 for r in scores.records if not r.is_source]
    return math.fsum(values) / len(values)


def perplexities(trainer: MPOTrainer, texts: list[str]) -> dict[str, float]:
    """Perplexity of the texts as they stand (``raw``) and as a user's turn (``chat``); empty without texts."""
    if not texts:
        return {}
    tokenizer = trainer.processing_class
    turns = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) for text in texts
    ]
    return {
        "raw": perplexity(trainer.model, tokenizer, texts),
        "chat": perplexity(trainer.model, tokenizer, turns),
    }


def run(options: argparse.Namespace, seed: int, retain_weight: float, texts: list[str]) -> dict[str, Any]:
    """Train once and measure before and after."""
    split = options.skip_sources + options.train_sources
    groups = load_groups(options.data, limit=split + options.held_out_sources).groups
    train = groups.select(range(options.skip_sources, split))
    held_out = groups.select(range(split, len(groups)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = MPOTrainer(
            model=str(prepare_demo_model(Path(options.model))),
            args=MPOConfig(
                output_dir=folder,
                beta=options.beta,
                retain_weight=retain_weight,
                min_source_gap=options.min_source_gap,
                learning_rate=options.learning_rate,
                lr_scheduler_type=options.lr_scheduler_type,
                warmup_steps=options.warmup_steps,
                max_grad_norm=options.max_grad_norm,
                num_train_epochs=options.num_train_epochs,
                max_length=2048,
                max_response_length=options.max_response_length,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=not options.progress,
                use_cpu=options.cpu,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        before = trainer.score()
        perplexity_before = perplexities(trainer, texts)
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
        after = trainer.score()
        perplexity_after = perplexities(trainer, texts)
    comparison = compare(
        summarize(before.records, beta=options.beta), summarize(after.records, beta=options.beta)
    )
    first, last = squared_distance(before, options.beta), squared_distance(after, options.beta)
    print(
        f"\nseed {seed}, retain_weight {retain_weight:g}: {len(train)} sources trained, {len(held_out)} held out"
    )
    print(comparison.to_text())
    print(f"squared distance {first:.3f} -> {last:.3f} ({last / first:.2f} of its start)")
    print(f"retention term {after.retention:.5f}, {seconds:.0f} s of training")
    for form, start_value in perplexity_before.items():
        end_value = perplexity_after[form]
        print(
            f"harmless perplexity, {form}: {start_value:.2f} -> {end_value:.2f} ({end_value / start_value - 1:+.2%})",
            flush=True,
        )
    return {
        "seed": seed,
        "retain_weight": retain_weight,
        "squared_distance": {"before": first, "after": last, "ratio": last / first},
        "perplexity": {"before": perplexity_before, "after": perplexity_after},
        "retention": after.retention,
        "train_seconds": seconds,
        "tables": comparison.to_dict(),
    }


def main() -> None:
    """Run all combinations, print them and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", required=True, help="groups in any accepted form")
    parser.add_argument("--harmless", help="JSON list of texts or of rows with an `instruction` field")
    parser.add_argument(
        "--model", default="runs/demo/model", help="folder of the demo's model, made if missing"
    )
    parser.add_argument("--train_sources", type=int, default=36)
    parser.add_argument("--held_out_sources", type=int, default=12)
    parser.add_argument(
        "--skip_sources",
        type=int,
        default=0,
        help="leave out the first sources of the file: a setting chosen on them is confirmed on others",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--retain_weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument(
        "--min_source_gap", type=float, help="leave out training sources whose reference gap is below this"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--lr_scheduler_type", default="constant")
    parser.add_argument("--warmup_steps", type=float, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=0.0, help="0 clips nothing")
    parser.add_argument("--num_train_epochs", type=float, default=1)
    parser.add_argument("--max_response_length", type=int, default=96)
    parser.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    parser.add_argument("--progress", action="store_true", help="show the trainer's logs")
    parser.add_argument("--out", default="runs/benchmarks/alignment.json")
    options = parser.parse_args()
    quiet_libraries()
    if options.cpu:
        keep_freed_memory()
    texts: list[str] = []
    if options.harmless:
        rows = json.loads(Path(options.harmless).read_text(encoding="utf-8"))
        texts = [row if isinstance(row, str) else row["instruction"] for row in rows][:200]
    runs = []
    for weight in options.retain_weights:
        # The spread over seeds is of interest for the first weight only.
        for seed in options.seeds if weight == options.retain_weights[0] else options.seeds[:1]:
            runs.append(run(options, seed, weight, texts))
            out = Path(options.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(
                json.dumps({"runs": runs, "provenance": collect(seed=None)}, indent=2, default=str)
            )
    ratios = [r["squared_distance"]["ratio"] for r in runs if r["retain_weight"] == options.retain_weights[0]]
    if len(ratios) > 1:
        print(
            f"\nover {len(ratios)} seeds: {statistics.mean(ratios):.3f} +- {statistics.stdev(ratios):.3f} of the start"
        )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
