"""The trainer's loss, gradients and weights against the plain computation of :mod:`tests.plain`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from mpo import MPOConfig, MPOTrainer
from tests.plain import (
    Exact,
    Group,
    Scored,
    add_lora,
    assert_same_tensors,
    gradients,
    group_ids,
    plain_model,
    reference_values,
    relative_error,
    router_loss,
    run_sequence,
    score_pair,
    step_loss,
)
from tests.tiny import build_model, build_tokenizer, random_groups

TOLERANCE = 1e-5
RANK, ALPHA = 3, 5


@dataclass(frozen=True)
class Case:
    """One way to train. ``targets``: number of target pairs of each group; ``harmless``: places of harmless groups."""

    family: str = "llama"
    lora: bool = False
    layout: str = "tree"
    pooling: str = "mean"
    attention: str = "eager"
    targets: tuple[int, ...] = (1, 3)
    beta: float = 1.0
    retain_weight: float = 1.0
    weights: dict[str, float] | None = None
    cut: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    harmless: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [self.family, "lora" if self.lora else "full", self.layout, self.pooling, self.attention]
        return "-".join([*parts, str(self.dtype).removeprefix("torch.")])

    def arithmetic(self) -> AbstractContextManager[Any]:
        """With ``exact``, the libraries' float32 parts in float64, too: cancellation costs nothing."""
        return Exact() if self.exact else nullcontext()


class Bench:
    """A trainer whose policy has moved away from the reference, and the plain models of both."""

    def __init__(
        self,
        case: Case,
        folder: Path,
        *,
        model: Any = None,
        ref_model: PreTrainedModel | None = None,
        move: bool = True,
        **settings: Any,
    ) -> None:
        self.case = case
        rng = random.Random(case.seed)
        self.rows = [row for k in case.targets for row in random_groups(rng, 1, (k, k), words=(1, 6))]
        for place in case.harmless:
            self.rows[place]["kind"] = "harmless"
        languages = {target["language"] for row in self.rows for target in row["targets"]}
        # A weight for a language that the data does not have is refused.
        self.weights = case.weights and {k: v for k, v in case.weights.items() if k in languages}
        tokenizer = build_tokenizer(case.family)
        uncut = group_ids(tokenizer, self.rows)
        max_length = None
        if case.cut:
            pairs = [pair for group in uncut for pair in [group.source, *group.targets]]
            max_length = 3 + max(len(pair.prompt) for pair in pairs)
            while any(  # answers that the cut makes equal are refused
                pair.chosen[: max_length - len(pair.prompt)] == pair.rejected[: max_length - len(pair.prompt)]
                for pair in pairs
            ):
                max_length += 1
        self.groups = group_ids(tokenizer, self.rows, max_length)
        assert (self.groups != uncut) == case.cut
        arguments: dict[str, Any] = {
            "output_dir": str(folder),
            "reference_cache_dir": str(folder / "reference"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": 1,
            "per_device_train_batch_size": len(self.rows),
            "max_tokens_per_row": 96,
            # A micro-batch is one model call, unless a test wants it split; a mixture of experts cannot be.
            "max_tokens_per_call": None if case.family == "mixtral" else 10**6,
            "max_length": max_length,
            "batch_layout": case.layout,
            "beta": case.beta,
            "retain_weight": case.retain_weight,
            "retain_pooling": case.pooling,
            "language_weights": self.weights,
            # Of the optimizer step, where one is made: plain gradient descent.
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 0.0,
        }
        model = model or build_model(case.family, dtype=case.dtype, attn_implementation=case.attention)
        peft_config = None
        if case.lora and not hasattr(model, "peft_config"):
            peft_config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        base = build_model(case.family, dtype=case.dtype) if hasattr(model, "peft_config") else model
        self.start = plain_model(ref_model or base)
        with case.arithmetic():
            self.trainer = MPOTrainer(
                model,
                ref_model=ref_model,
                args=MPOConfig(**{**arguments, **case.settings, **settings}),
                train_dataset=self.rows,
                processing_class=tokenizer,
                peft_config=peft_config,
            )
            self.trainer._prepare_references()
        assert self.trainer.data_collator.shape.layout == case.layout
        if move:
            move_weights(self.trainer.model, case.seed)

    def reference(self) -> list[Scored]:
        return reference_values(self.start, self.groups, self.case.pooling)

    def options(self) -> dict[str, Any]:
        case = self.case
        return {
            "beta": case.beta,
            "retain_weight": case.retain_weight,
            "pooling": case.pooling,
            "language_weights": self.weights,
        }

    def trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def policy(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """The plain model of the policy as it is now, and its leaves by the trainer's parameter names."""
        if not self.case.lora:
            model = plain_model(self.trainer.model)
            return model, dict(model.named_parameters())
        model = plain_model(build_model(self.case.family, dtype=self.case.dtype))
        leaves = {name: p.detach().double().clone().requires_grad_() for name, p in self.trainable().items()}
        factors: dict[str, dict[str, Tensor]] = {}
        for name, leaf in leaves.items():
            layer, which = name.removeprefix("base_model.model.").split(".lora_")
            factors.setdefault(layer, {})[which[0]] = leaf
        assert len(factors) == 7 * model.config.num_hidden_layers
        add_lora(model, {layer: (both["A"], both["B"]) for layer, both in factors.items()}, ALPHA / RANK)
        return model, leaves

    def expected(
        self, reference: list[Scored] | None = None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the step over all groups and its gradient, computed plainly."""
        model, leaves = self.policy()
        loss = step_loss(model, self.groups, reference or self.reference(), **{**self.options(), **options})
        return loss.detach(), gradients(loss, leaves)

    def batches(self) -> list[dict[str, Any]]:
        return list(self.trainer.get_train_dataloader())

    def run(self, batches: list[dict[str, Any]] | None = None) -> tuple[float, dict[str, Tensor]]:
        """The trainer's loss and gradients of one optimizer step, made of these micro-batches."""
        batches = self.batches() if batches is None else batches
        count = self.trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        self.trainer.model.zero_grad()
        with self.case.arithmetic():
            losses = [
                float(self.trainer.training_step(self.trainer.model, batch, count)) for batch in batches
            ]
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self.trainable().items()
        }
        return sum(losses), found

    def assert_step_is_plain(self, tolerance: float = TOLERANCE, **options: Any) -> None:
        loss, found = self.run()
        expected_loss, expected = self.expected(**options)
        assert relative_error(torch.tensor(loss), expected_loss) <= tolerance
        assert_same_tensors(found, expected, tolerance)


@torch.no_grad()
def move_weights(model: torch.nn.Module, seed: int) -> None:
    """Change every trained weight by about a tenth, as if training had gone on for a while."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = float(parameter.square().mean().sqrt()) or 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15 * size)


# ---- Loss and gradients ------------------------------------------------------------------------------------

WEIGHTS = {"zh": 0.0, "ja": 3.0, "ar": 0.5}


def cases() -> list[Case]:
    """All families, kinds of training, layouts and poolings; the other settings take turns."""
    combinations = product(("llama", "gemma2", "qwen2"), (False, True), ("tree", "padded"), ("mean", "last"))
    return [
        Case(
            family,
            lora,
            layout,
            pooling,
            attention="sdpa" if family != "gemma2" and i % 3 == 1 else "eager",
            targets=((1, 8), (5, 2, 1), (7,), (4, 6), (1, 1, 3))[i % 5],
            beta=(1.0, 1.5, 0.6)[i % 3],
            retain_weight=(1.0, 0.0, 2.5, 0.3)[(i + i // 4) % 4],
            weights=WEIGHTS if i % 7 in (2, 3) else None,
            cut=i % 5 in (0, 3),
            seed=100 + i,
            settings={"max_tokens_per_call": 100} if i // 3 % 2 else {},
        )
        for i, (family, lora, layout, pooling) in enumerate(combinations)
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_loss_and_every_gradient_of_a_step_equal_the_plain_computation(case: Case, tmp_path: Path) -> None:
    Bench(case, tmp_path).assert_step_is_plain()


# A reward gap is the difference of two means, and a gradient that of two sums, each of which float32 gives to
# seven digits: with the float32 parts of the libraries in, the worst tensor was off by 3e-5 in 96 random
# cases (float64 and float32 models alike), most by 3e-6. A wrong weight, mask or position changes tenths.
@pytest.mark.parametrize(
    "case",
    [
        Case(family, lora, layout, dtype=dtype, beta=1.5, targets=(4, 1), seed=30, exact=False)
        for family, lora, layout, dtype in (
            ("llama", False, "tree", torch.float64),
            ("llama", True, "padded", torch.float64),
            ("qwen2", True, "tree", torch.float64),
            ("llama", True, "tree", torch.float32),
            ("gemma2", True, "tree", torch.float32),
            ("gemma2", False, "padded", torch.float32),
            ("qwen2", False, "tree", torch.float32),
        )
    ],
    ids=str,
)
def test_with_the_float32_parts_of_the_libraries_a_step_differs_by_rounding(
    case: Case, tmp_path: Path
) -> None:
    Bench(case, tmp_path).assert_step_is_plain(tolerance=5e-5)


# ---- The reference -----------------------------------------------------------------------------------------


def collated_reference(bench: Bench) -> dict[int, tuple[Tensor, Tensor]]:
    """Reference gap and pooled states that the step is given for each group."""
    found = {}
    for batch in bench.batches():
        for place, group in enumerate(batch["groups"]):
            gaps = batch["reference_gap"][batch["group_of_pair"] == place]
            assert len(set(gaps.tolist())) == 1
            found[group] = gaps[0], batch["reference_hidden"][place]
    return found


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_what_the_starting_policy_says_of_each_source(
    layout: str, pooling: str, lora: bool, tmp_path: Path
) -> None:
    case = Case("gemma2", lora, layout, pooling, targets=(2, 1, 3, 1), cut=True, seed=8)
    # Too small for a source, so that each is a batch of its own, in another order than the data's.
    bench = Bench(case, tmp_path, reference_tokens_per_batch=1)
    found = collated_reference(bench)
    assert len(found) == 4
    for group, scored in enumerate(bench.reference()):
        # Stored in float32.
        assert abs(float(found[group][0]) - float(scored.gap)) <= 1e-6
        assert relative_error(found[group][1], scored.pooled) <= 1e-7


def test_the_reference_stays_what_it_was_while_the_policy_moves(tmp_path: Path) -> None:
    bench = Bench(Case("llama", targets=(2, 1)), tmp_path, move=False)
    before = collated_reference(bench)
    move_weights(bench.trainer.model, 1)
    after = collated_reference(bench)
    for group, (gap, hidden) in before.items():
        assert torch.equal(after[group][0], gap)
        assert torch.equal(after[group][1], hidden)


@pytest.mark.parametrize("lora", [False, True])
def test_an_explicit_reference_model_is_the_reference(lora: bool, tmp_path: Path) -> None:
    other = build_model("llama", seed=5, dtype=torch.float64)
    Bench(Case("llama", lora, targets=(3, 1), seed=4), tmp_path, ref_model=other).assert_step_is_plain()


def test_an_adapter_that_is_trained_on_is_its_own_reference_as_it_was(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(build_model("llama", dtype=torch.float64), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    move_weights(model, 3)
    bench = Bench(Case("llama", lora=True, targets=(3, 1), seed=6), tmp_path, model=model, move=False)
    reference = reference_values(bench.policy()[0], bench.groups, "mean")
    without_adapter = bench.reference()
    assert abs(float(reference[0].gap - without_adapter[0].gap)) > 1e-3
    move_weights(bench.trainer.model, 9)
    bench.assert_step_is_plain(reference=reference)


# ---- The step's mean ---------------------------------------------------------------------------------------

RAGGED = (1, 4, 2, 6, 1, 3)


def described(settings: Any) -> str:
    return (
        ",".join(f"{name}={value}" for name, value in settings.items()) if isinstance(settings, dict) else ""
    )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "group_by_source": False},
        {"per_device_train_batch_size": 1, "max_targets_per_group": 2},
        {"per_device_train_batch_size": 5, "max_targets_per_group": 1, "batch_layout": "padded"},
        {"per_device_train_batch_size": 6, "max_tokens_per_call": None},  # a CPU's own limit
        {"per_device_train_batch_size": 6, "max_tokens_per_call": 1},
        {"per_device_train_batch_size": 3, "max_tokens_per_call": 200, "batch_layout": "padded"},
    ],
    ids=described,
)
def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_pairs_however_they_are_grouped(
    lora: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    case = Case("llama", lora, settings.get("batch_layout", "tree"), targets=RAGGED, weights=WEIGHTS, seed=12)
    bench = Bench(case, tmp_path, **settings)
    split = settings.get("max_tokens_per_call", 10**6) != 10**6
    assert all(("calls" in batch) == split for batch in bench.batches())
    bench.assert_step_is_plain()


def changes(bench: Bench) -> dict[str, Tensor]:
    """How training changes each weight."""
    before = {name: p.detach().clone() for name, p in bench.trainable().items()}
    with bench.case.arithmetic():
        bench.trainer.train()
    return {name: p.detach() - before[name] for name, p in bench.trainable().items()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        # More accumulation than there are batches: the last step of an epoch has what is left.
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 17, "group_by_source": False},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_targets_per_group": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_tokens_per_call": 150},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 17, "max_tokens_per_batch": 200},
    ],
    ids=described,
)
def test_an_optimizer_step_through_train_moves_the_weights_along_the_plain_gradient(
    lora: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    bench = Bench(Case("qwen2", lora, targets=RAGGED, beta=1.5, seed=13), tmp_path, **settings)
    _, gradient = bench.expected()
    found = changes(bench)
    assert bench.trainer.state.global_step == 1
    rate = bench.trainer.args.learning_rate
    assert_same_tensors(found, {name: -rate * g for name, g in gradient.items()}, TOLERANCE)


@pytest.mark.parametrize("lora", [False, True])
def test_recomputing_activations_changes_nothing(lora: bool, tmp_path: Path) -> None:
    case = Case("qwen2", lora, targets=RAGGED, beta=1.5, seed=13, exact=False)
    bench = Bench(
        case,
        tmp_path,
        gradient_checkpointing=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    gradient = bench.expected()[1]
    calls = []
    for layer in bench.trainer.model.get_submodule("base_model.model.model" if lora else "model").layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = changes(bench)
    assert len(calls) == 2 * 3 * 2  # layers, micro-batches, and each of them once more for its gradient
    rate = bench.trainer.args.learning_rate
    assert_same_tensors(found, {name: -rate * g for name, g in gradient.items()}, 5e-5)


def test_the_second_step_still_aims_at_the_reference_of_the_start(tmp_path: Path) -> None:
    case = Case("gemma2", targets=(2, 1, 3), seed=14)
    bench = Bench(case, tmp_path, move=False, max_steps=2, per_device_train_batch_size=3)
    plain, leaves = bench.policy()
    reference = bench.reference()
    start = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    losses = []
    for _ in range(2):
        loss = step_loss(plain, bench.groups, reference, **bench.options())
        losses.append(float(loss))
        with torch.no_grad():
            for name, gradient in gradients(loss, leaves).items():
                leaves[name] -= bench.trainer.args.learning_rate * gradient
    found = changes(bench)
    assert_same_tensors(
        found, {name: leaf.detach() - start[name] for name, leaf in leaves.items()}, TOLERANCE
    )
    logged = [entry["loss"] for entry in bench.trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """The accelerator as it is on one of several ranks, but without the others."""
    with (
        mock.patch.object(Accelerator, "num_processes", ranks),
        mock.patch.object(Accelerator, "process_index", rank),
    ):
        yield


@pytest.mark.parametrize(
    ("ranks", "size", "tokens"),
    [(2, 1, None), (2, 2, None), (4, 1, None), (4, 3, None), (7, 1, None), (2, 1, 200), (7, 1, 400)],
)
def test_the_average_over_ranks_is_the_gradient_of_the_mean_over_all_pairs(
    ranks: int, size: int, tokens: int | None, tmp_path: Path
) -> None:
    case = Case("llama", targets=RAGGED, weights=WEIGHTS, seed=15)
    bench = Bench(case, tmp_path)
    trainer = bench.trainer
    trainer._train_batch_size = size
    trainer.args.max_tokens_per_batch = tokens
    loaders = []
    for rank in range(ranks):
        with as_rank(rank, ranks):
            loaders.append(list(trainer.get_train_dataloader()))
    assert len({len(loader) for loader in loaders}) == 1
    total = sum(batch["num_pairs"] for loader in loaders for batch in loader)
    assert total == sum(RAGGED)
    trainer.model.zero_grad()
    for rank, loader in enumerate(loaders):
        with as_rank(rank, ranks), bench.case.arithmetic():
            for batch in loader:
                # What DistributedDataParallel does: the mean of the ranks' gradients.
                (
                    trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=total) / ranks
                ).backward()
    found = {name: p.grad for name, p in bench.trainable().items()}
    assert_same_tensors(found, bench.expected()[1], TOLERANCE)


@pytest.mark.parametrize("tokens", [10**6, 1])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_filler_group_changes_nothing(layout: str, tokens: int, tmp_path: Path) -> None:
    case = Case("llama", layout=layout, targets=(2, 3, 1), seed=16)
    bench = Bench(case, tmp_path, max_tokens_per_call=tokens)
    loader = bench.trainer.get_train_dataloader()
    collate, data = bench.trainer.data_collator, loader.dataset
    batches = [collate(data.__getitems__(indices)) for indices in ([0, ~1], [~0], [1, ~2, 2], [~2, ~1])]
    assert [batch["num_pairs"] for batch in batches] == [2, 0, 4, 0]
    loss, found = bench.run(batches)
    expected_loss, expected = bench.expected()
    assert relative_error(torch.tensor(loss), expected_loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_groups_below_the_least_source_gap_are_left_out_of_the_mean(
    weights: dict[str, float] | None, tmp_path: Path
) -> None:
    case = Case("llama", targets=(2, 3, 6, 2), weights=weights, seed=18)
    gaps = [float(scored.gap) for scored in Bench(case, tmp_path).reference()]
    limit = sorted(gaps)[1] + 1e-4
    kept = [i for i, gap in enumerate(gaps) if gap > limit]
    assert len(kept) == 2
    bench = Bench(case, tmp_path, min_source_gap=limit)
    assert bench.trainer.source_report["dropped"] == 2
    loss, found = bench.run()
    model, leaves = bench.policy()
    reference = bench.reference()
    # Weights have mean 1 over the pairs that are trained on.
    expected = step_loss(
        model, [bench.groups[i] for i in kept], [reference[i] for i in kept], **bench.options()
    )
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


def test_balanced_weights_give_every_language_the_same_say(tmp_path: Path) -> None:
    case = Case("llama", targets=(6, 2, 1, 3), seed=19, settings={"language_weights": "balanced"})
    bench = Bench(case, tmp_path)
    present = [language for group in bench.groups for language in group.languages]
    assert len({present.count(language) for language in present}) > 1
    bench.assert_step_is_plain(language_weights={name: 1 / present.count(name) for name in present})


# ---- A loss of one's own -----------------------------------------------------------------------------------


class HingeTrainer(MPOTrainer):
    """Asks for a gap of at least half the reference's, and for states that point where the reference's do."""

    def pair_loss(self, pairs: Any) -> Tensor:
        gap = pairs.chosen_logps - pairs.rejected_logps
        angle = 1 - torch.cosine_similarity(pairs.source_hidden, pairs.reference_hidden, dim=-1).mean(dim=1)
        return torch.relu(0.5 * pairs.reference_gap - gap) + angle[pairs.group_of_pair]


@pytest.mark.parametrize("tokens", [10**6, 1])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_loss_of_ones_own_is_averaged_over_the_pairs_of_the_step_as_well(
    layout: str, tokens: int, tmp_path: Path
) -> None:
    case = Case("llama", layout=layout, targets=(3, 1, 2), seed=20)
    bench = Bench(case, tmp_path, per_device_train_batch_size=2, max_tokens_per_call=tokens)
    bench.trainer.__class__ = HingeTrainer
    assert all(("calls" in batch) == (tokens == 1) for batch in bench.batches())
    loss, found = bench.run()
    model, leaves = bench.policy()
    losses = []
    for group, constant in zip(bench.groups, bench.reference(), strict=True):
        states = score_pair(model, group.source).pooled
        angle = 1 - torch.cosine_similarity(states, constant.pooled, dim=-1).mean()
        losses += [
            torch.relu(0.5 * constant.gap - score_pair(model, pair).gap) + angle for pair in group.targets
        ]
    expected = torch.stack(losses).mean()
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


# ---- Mixture of experts ------------------------------------------------------------------------------------


def router_passes(groups: list[Group], layout: str, with_sources: bool) -> list[tuple[list[int], range]]:
    """The sequences of a batch and which of their tokens it reads: a tree's prompt once, two rows' twice."""
    passes = []
    for group in groups:
        for pair in [*group.targets, *([group.source] if with_sources else [])]:
            chosen, rejected = [*pair.prompt, *pair.chosen], [*pair.prompt, *pair.rejected]
            first = len(pair.prompt) if layout == "tree" else 0
            passes += [(chosen, range(len(chosen))), (rejected, range(first, len(rejected)))]
    return passes


@pytest.mark.parametrize("retain_weight", [1.0, 0.0])
@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("size", [3, 2])
def test_the_router_loss_of_a_mixture_of_experts_is_in_the_loss_and_its_gradient(
    layout: str, retain_weight: float, size: int, tmp_path: Path
) -> None:
    model = build_model("mixtral", dtype=torch.float64)
    model.config.router_aux_loss_coef = 0.5  # as much as the rest of the loss, so that it cannot hide
    case = Case("mixtral", layout=layout, retain_weight=retain_weight, targets=(2, 1, 3), seed=21)
    bench = Bench(case, tmp_path, model=model, per_device_train_batch_size=size)
    batches = bench.batches()
    loss, found = bench.run(batches)

    plain, leaves = bench.policy()
    expected = step_loss(plain, bench.groups, bench.reference(), **bench.options())
    for batch in batches:
        groups = [bench.groups[i] for i in batch["groups"]]
        # It is a figure of a micro-batch, which counts like each of the micro-batch's pairs.
        share = sum(len(group.targets) for group in groups) / 6
        expected = expected + 0.5 * share * router_loss(
            plain, router_passes(groups, layout, retain_weight > 0)
        )
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


def test_the_plain_router_loss_is_that_of_the_library() -> None:
    model = plain_model(build_model("mixtral", dtype=torch.float64))
    ids = list(range(30, 50))
    library = run_sequence(model, ids, output_router_logits=True).aux_loss
    assert relative_error(router_loss(model, [(ids, range(len(ids)))]), library) <= 1e-12


# ---- What a log says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_logged_metrics_are_the_means_per_language_over_the_whole_step(weights: Any, tmp_path: Path) -> None:
    case = Case("llama", targets=RAGGED, weights=weights, beta=1.5, seed=22, exact=False)
    bench = Bench(case, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=6)
    model, _ = bench.policy()
    seen: dict[str, list[tuple[float, float, float]]] = {}
    with torch.no_grad():
        for group, constant in zip(bench.groups, bench.reference(), strict=True):
            for language, pair in zip(group.languages, group.targets, strict=True):
                chosen, rejected = score_pair(model, pair).logps.tolist()
                seen.setdefault(language, []).append((chosen, rejected, float(constant.gap)))
    loss = float(bench.expected()[0])
    # Languages weigh in what is minimised, and not in what is said of it.
    alike = float(bench.expected(language_weights=None)[0])
    gap_loss = float(bench.expected(retain_weight=0.0, language_weights=None)[0])
    bench.trainer.train()
    logged = bench.trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["loss/reward_gap"] == pytest.approx(gap_loss, rel=1e-5)
    assert logged["loss/retention"] == pytest.approx(alike - gap_loss, rel=1e-4)
    for language, values in seen.items():
        count = len(values)
        gaps = [chosen - rejected for chosen, rejected, _ in values]
        expected = {
            "reward_gap": sum(gaps) / count,
            "gap_to_source": sum(gap - v[2] for gap, v in zip(gaps, values, strict=True)) / count,
            "positive": sum(gap > 0 for gap in gaps) / count,
            "logps/chosen": sum(v[0] for v in values) / count,
            "logps/rejected": sum(v[1] for v in values) / count,
        }
        for name, value in expected.items():
            assert logged[f"{name}/{language}"] == pytest.approx(value, rel=1e-5, abs=2e-5), (name, language)
