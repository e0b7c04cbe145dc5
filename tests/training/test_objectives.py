"""Every objective on preference trees against TRL's own code on padded pairs: the loss of a step and every gradient."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, add_fused_lm_head
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from mpo import MPOConfig
from mpo.errors import ConfigError
from mpo.training import objectives
from mpo.training.metrics import LanguageMetrics
from mpo.training.objectives import register_objective
from mpo.training.sampling import Trained
from tests.plain import (
    Ids,
    assert_same_tensors,
    gradients,
    relative_error,
    score_pair,
)
from tests.training.test_trainer_numerics import Bench, Case

TOLERANCE = 1e-5
# All that an objective can need: references of targets and sources, also of mismatched ones, and their first tokens.
EVERYTHING: dict[str, Any] = {
    "loss_type": ["sigmoid", "orpo", "kto"],
    "ld_alpha": 0.5,
    "train_on": "both",
}


class Settings(MPOConfig):
    """Settings beside a trainer's own: they leave the process group and the device as they are."""

    _setup_devices = torch.device("cpu")
    _n_gpu = 0
    distributed_state = None


BENCHES = [(family, lora) for lora in (False, True) for family in ("llama", "gemma2", "qwen2")]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A policy that has moved away from its reference, on ragged groups; its objective is chosen by :func:`choose`."""
    family, lora = request.param
    case = Case(family, lora, targets=(1, 4, 2), seed=31, cut=True)
    return Bench(case, tmp_path_factory.mktemp("bench"), **EVERYTHING)


def everywhere(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """Every case with all weights of a Llama, and in turn with another family or an adapter."""
    chosen = [
        (BENCHES[place], case) for i, case in enumerate(cases) for place in (0, 1 + i % (len(BENCHES) - 1))
    ]
    return pytest.mark.parametrize(("bench", "settings"), chosen, indirect=["bench"], ids=str)


def choose(bench: Bench, **settings: Any) -> MPOConfig:
    """Have the trainer minimise another objective, with no more in its batches than that one asks for."""
    trainer = bench.trainer
    defaults = {"output_dir": trainer.args.output_dir, "use_cpu": True, "report_to": "none"}
    args = Settings(**{**defaults, **settings})
    trainer.args = args
    trainer.data_collator = replace(
        trainer.data_collator, trained=Trained.by(args), run_source=args.holds_sources
    )
    trainer._metrics_per_language = LanguageMetrics(
        trainer.languages, beta=1.0, objectives=args.objectives, dtype=torch.float64
    )
    return args


def own_step(bench: Bench) -> tuple[Tensor, dict[str, Tensor]]:
    loader = bench.trainer.get_train_dataloader()
    groups = list(range(len(bench.groups)))
    batch = bench.trainer.data_collator(loader.dataset.__getitems__(groups))
    with bench.case.arithmetic():  # KTO's reference point, too, which the step begins with
        loss, found = bench.run([batch])
    return torch.tensor(loss), found


def trained_pairs(bench: Bench, train_on: str) -> list[Ids]:
    targets = [target for group in bench.groups for target in group.targets]
    sources = [group.source for group in bench.groups]
    return {"targets": targets, "source": sources, "both": targets + sources}[train_on]


def assert_same_step(bench: Bench, loss: Tensor, tolerance: float = TOLERANCE) -> None:
    """The trainer's step has this loss and its gradient."""
    expected = gradients(loss, bench.trainable())
    own_loss, found = own_step(bench)
    assert relative_error(own_loss, loss) <= tolerance
    assert max(float(g.norm()) for g in expected.values()) > 1e-6
    assert_same_tensors(found, expected, tolerance)


# ---- TRL's DPOTrainer ---------------------------------------------------------------------------------------------


def reference_model(bench: Bench) -> Any:
    """The model at the start, as TRL calls it."""
    if not hasattr(bench, "reference_model"):
        bench.reference_model = copy.deepcopy(bench.start)
        add_fused_lm_head(bench.reference_model)
    return bench.reference_model


def dpo_loss(bench: Bench, args: MPOConfig, pairs: Sequence[Ids]) -> Tensor:
    """What TRL's trainer computes of these pairs, with the model and the reference of the bench."""
    trainer = bench.trainer
    trainer.loss_types, trainer.loss_weights = (
        args.loss_type,
        args.loss_weights or [1.0] * len(args.loss_type),
    )
    for name in ("beta", "ld_alpha", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"):
        setattr(trainer, name, getattr(args, name))
    trainer.precompute_ref_logps = False
    if not bench.case.lora:
        trainer.ref_model = reference_model(bench)
    collate = DataCollatorForPreference(pad_token_id=trainer._tokenizer.pad_token_id)
    batch = collate([{f"{name}_ids": ids for name, ids in pair._asdict().items()} for pair in pairs])
    with bench.case.arithmetic():
        return DPOTrainer._compute_loss(trainer, trainer.model.train(), batch, False)


DPO_FAMILY: list[dict[str, Any]] = [
    {"loss_type": "sigmoid", "beta": 0.3},
    {"loss_type": "sigmoid", "beta": 0.1, "train_on": "both"},
    {"loss_type": "sigmoid", "beta": 0.2, "ld_alpha": 0.4, "train_on": "source"},
    {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    {"loss_type": "sigmoid", "f_divergence_type": "js_divergence", "ld_alpha": 0.0},
    {"loss_type": "sigmoid_norm"},
    {"loss_type": "sigmoid_norm", "beta": 2.0, "ld_alpha": 0.7},
    {"loss_type": "hinge", "beta": 0.4},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "beta": 0.5, "f_divergence_type": "js_divergence"},
    {"loss_type": "exo_pair"},
    {"loss_type": "exo_pair", "beta": 0.5, "label_smoothing": 0.2, "ld_alpha": 0.5},
    {"loss_type": "nca_pair", "beta": 0.2},
    {"loss_type": "robust", "beta": 0.2},
    {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.3},
    {"loss_type": "bco_pair", "beta": 0.3},
    {"loss_type": "sppo_hard", "beta": 0.1},
    {"loss_type": "apo_zero", "beta": 0.2},
    {"loss_type": "apo_zero", "beta": 0.2, "train_on": "both"},
    {"loss_type": "apo_down", "beta": 0.3, "ld_alpha": 1.0},
    {"loss_type": "discopop", "beta": 0.05},
    {"loss_type": "discopop", "beta": 0.2, "discopop_tau": 0.5},
    {"loss_type": "sft"},
    {"loss_type": "sft", "train_on": "both"},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
    {"loss_type": ["apo_zero", "ipo", "sft"], "beta": 0.2, "train_on": "both"},
]


@everywhere(DPO_FAMILY)
def test_the_dpo_family_is_that_of_trl(bench: Bench, settings: dict[str, Any]) -> None:
    args = choose(bench, **settings)
    assert_same_step(bench, dpo_loss(bench, args, trained_pairs(bench, args.train_on)))


# ---- TRL's CPOTrainer and ORPOTrainer -----------------------------------------------------------------------------


def padded(pairs: Sequence[Ids]) -> dict[str, Tensor]:
    """A batch as the older trainers of TRL collate it."""
    batch = {}
    for name in ("chosen", "rejected"):
        texts = [[*pair.prompt, *getattr(pair, name)] for pair in pairs]
        width = max(map(len, texts))
        prompts = [len(pair.prompt) for pair in pairs]
        batch[f"{name}_input_ids"] = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])
        batch[f"{name}_attention_mask"] = torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]
        )
        batch[f"{name}_labels"] = torch.tensor(
            [
                [-100] * prompt + ids[prompt:] + [-100] * (width - len(ids))
                for prompt, ids in zip(prompts, texts, strict=True)
            ]
        )
    return batch


def reference_free_loss(bench: Bench, kind: Any, pairs: Sequence[Ids], **attributes: Any) -> Tensor:
    """What one of the older trainers computes of these pairs."""
    trainer = kind.__new__(kind)
    common = {"is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": 0, "padding_value": 0}
    trainer.__dict__.update(common, accelerator=bench.trainer.accelerator, **attributes)
    with bench.case.arithmetic():
        loss: Tensor = trainer.get_batch_loss_metrics(bench.trainer.model.train(), padded(pairs))[0]
    return loss


@everywhere(
    [
        {"loss_type": "simpo"},
        {"loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.9, "label_smoothing": 0.1, "train_on": "both"},
        {"loss_type": "cpo"},
        {"loss_type": "cpo", "beta": 0.3, "cpo_alpha": 0.4, "label_smoothing": 0.2, "train_on": "source"},
        {"loss_type": "cpo", "cpo_alpha": 0.0, "train_on": "both"},
    ]
)
def test_simpo_and_cpo_are_those_of_trl(bench: Bench, settings: dict[str, Any]) -> None:
    args = choose(bench, **settings)
    simpo = args.loss_type == ["simpo"]
    loss = reference_free_loss(
        bench,
        CPOTrainer,
        trained_pairs(bench, args.train_on),
        loss_type="simpo" if simpo else "sigmoid",
        beta=args.beta,
        cpo_alpha=0.0 if simpo else args.cpo_alpha,
        simpo_gamma=args.simpo_gamma,
        label_smoothing=args.label_smoothing,
        alpha=0.0,
    )
    assert_same_step(bench, loss)


@everywhere([{}, {"beta": 0.7, "train_on": "both"}, {"train_on": "source"}])
def test_orpo_is_that_of_trl(bench: Bench, settings: dict[str, Any]) -> None:
    args = choose(bench, loss_type="orpo", **settings)
    loss = reference_free_loss(bench, ORPOTrainer, trained_pairs(bench, args.train_on), beta=args.beta)
    assert_same_step(bench, loss)


# ---- TRL's KTOTrainer ---------------------------------------------------------------------------------------------


def mismatched(bench: Bench, train_on: str) -> list[Ids]:
    """Each pair with the responses of the one before it in its language, cut to the maximum length."""
    found = []
    max_length = max(len(pair.prompt) for pair in trained_pairs(bench, "both")) + 3  # see `Bench`
    sides = {"targets": [False], "source": [True], "both": [False, True]}[train_on]
    for is_source in sides:
        if is_source:
            pairs = [("source", group.source) for group in bench.groups]
        else:
            pairs = [
                item for group in bench.groups for item in zip(group.languages, group.targets, strict=True)
            ]
        for i, (language, pair) in enumerate(pairs):
            before = [other for name, other in pairs[:i] if name == language]
            after = [other for name, other in pairs[i:] if name == language]
            other = before[-1] if before else after[-1]
            room = max_length - len(pair.prompt)
            found.append(Ids(pair.prompt, other.chosen[:room], other.rejected[:room]))
    return found


def kto_loss(bench: Bench, args: MPOConfig) -> tuple[Tensor, float]:
    """What TRL's trainer computes of the same responses, each an example of its own, and its reference point."""
    trainer = KTOTrainer.__new__(KTOTrainer)
    own = bench.trainer
    trainer.__dict__.update(
        {name: getattr(own, name) for name in ("accelerator", "model", "ref_model", "args")}
    )
    trainer.__dict__.update(
        loss_type="kto",
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
        calculate_KL=True,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    if not bench.case.lora:
        trainer.ref_model = reference_model(bench)
    pairs, others = trained_pairs(bench, args.train_on), mismatched(bench, args.train_on)
    examples = [
        {
            "prompt_ids": pair.prompt,
            "completion_ids": getattr(pair, name),
            "KL_completion_ids": getattr(other, name),
            "label": name == "chosen",
        }
        for name in ("chosen", "rejected")
        for pair, other in zip(pairs, others, strict=True)
    ]
    batch = DataCollatorForUnpairedPreference(pad_token_id=own._tokenizer.pad_token_id)(examples)
    with bench.case.arithmetic():
        loss = trainer._compute_loss(own.model.train(), batch, False)
    return loss, trainer._metrics["train"]["kl"][0]


@everywhere(
    [
        {},
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7, "train_on": "both"},
        {"train_on": "source"},
    ]
)
def test_kto_is_that_of_trl(bench: Bench, settings: dict[str, Any]) -> None:
    args = choose(bench, loss_type="kto", **settings)
    loss, kl = kto_loss(bench, args)
    assert_same_step(bench, loss)
    found = bench.trainer._metrics_per_language.log(1, bench.trainer.accelerator)
    assert found["kl"] == pytest.approx(kl, rel=1e-4)


# ---- What TRL does not have ---------------------------------------------------------------------------------------


@everywhere([{"rdpo_alpha": 0.0}, {"beta": 0.3, "rdpo_alpha": 0.2, "train_on": "both"}])
def test_length_regularised_dpo_is_its_formula(bench: Bench, settings: dict[str, Any]) -> None:
    args = choose(bench, loss_type="rdpo", **settings)
    model, leaves = bench.policy()
    losses = []
    for pair in trained_pairs(bench, args.train_on):
        with torch.no_grad():
            reference = score_pair(bench.start, pair).logps
        lengths = torch.tensor([len(pair.chosen), len(pair.rejected)], dtype=torch.float64)
        chosen, rejected = (score_pair(model, pair).logps - reference) * lengths
        reward = args.beta * (chosen - rejected) + args.rdpo_alpha * (lengths[0] - lengths[1])
        losses.append(torch.log1p(torch.exp(-reward)))
    expected = torch.stack(losses).mean()
    loss, found = own_step(bench)
    assert relative_error(loss, expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


FIRST: list[dict[str, Any]] = [
    {"loss_type": "first_token"},
    {"loss_type": ["sft", "first_token"], "loss_weights": [0.5, 2.0], "train_on": "both"},
]


@everywhere(FIRST)
def test_first_token_is_the_likelihood_of_what_a_response_begins_with(
    bench: Bench, settings: dict[str, Any]
) -> None:
    args = choose(bench, **settings)
    pairs = trained_pairs(bench, args.train_on)
    model = bench.trainer.model.train()
    first, words, tokens = [], [], 0
    with bench.case.arithmetic():
        for pair in pairs:
            logits = model(input_ids=torch.tensor([[*pair.prompt, *pair.chosen]])).logits[0].double()
            logps = torch.log_softmax(logits, dim=-1)[len(pair.prompt) - 1 : -1]
            of_tokens = logps.gather(1, torch.tensor(pair.chosen)[:, None])[:, 0]
            first.append(-of_tokens[0])
            words.append(-of_tokens.sum())
            tokens += len(pair.chosen)
    by_name = {"first_token": torch.stack(first).mean(), "sft": torch.stack(words).sum() / tokens}
    weights = args.loss_weights or [1.0]
    loss = sum(weight * by_name[name] for name, weight in zip(args.loss_type, weights, strict=True))
    assert_same_step(bench, torch.as_tensor(loss))


# ---- The step's mean ----------------------------------------------------------------------------------------------

RAGGED = (1, 4, 2, 6, 1)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ({"loss_type": "sft", "train_on": "both"}, {"per_device_train_batch_size": 1}),
        ({"loss_type": "first_token"}, {"per_device_train_batch_size": 5, "max_tokens_per_call": 100}),
        (
            {"loss_type": "orpo", "train_on": "both"},
            {"per_device_train_batch_size": 2, "max_targets_per_group": 2},
        ),
        ({"loss_type": "orpo"}, {"per_device_train_batch_size": 5, "max_tokens_per_call": 100}),
        (
            {"loss_type": "sigmoid", "ld_alpha": 0.3, "train_on": "both"},
            {"group_by_source": False, "batch_layout": "padded"},
        ),
        (
            {"loss_type": "cpo", "train_on": "source"},
            {"max_targets_per_group": 1, "per_device_train_batch_size": 4, "max_tokens_per_call": 1},
        ),
        (
            {"loss_type": "kto", "train_on": "both"},
            {"per_device_train_batch_size": 3, "max_tokens_per_call": 150},
        ),
        (
            {"loss_type": "kto"},
            {"per_device_train_batch_size": 1, "max_tokens_per_batch": 200},
        ),
        (
            {"loss_type": ["apo_zero", "sft"], "train_on": "both"},
            {"per_device_train_batch_size": 1, "max_tokens_per_batch": 150, "batch_layout": "padded"},
        ),
    ],
    ids=str,
)
def test_a_step_is_the_same_however_its_pairs_are_grouped(
    objective: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    case = Case("llama", layout=settings.get("batch_layout", "tree"), targets=RAGGED, seed=32)
    beta = {"beta": 0.2} if objective["loss_type"] not in ("sft", "first_token") else {"beta": 1.0}
    whole = Bench(case, tmp_path / "whole", **beta, **objective)
    loss, gradient = own_step(whole)
    bench = Bench(case, tmp_path / "parts", **beta, **objective, **settings)
    batches = bench.batches()
    if "max_tokens_per_call" in settings:
        assert all("calls" in batch for batch in batches)
    else:
        assert len(batches) > 1
    sources = sum(int(batch["is_source"].sum()) for batch in batches)
    assert sources == (0 if bench.trainer.args.train_on == "targets" else len(RAGGED))
    with case.arithmetic():
        own_loss, found = bench.run(batches)
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, gradient, TOLERANCE)


@pytest.mark.parametrize("loss_type", ["sft", "kto"])
def test_a_filler_changes_nothing(loss_type: str, tmp_path: Path) -> None:
    case = Case("llama", targets=(2, 3, 1), seed=39)
    bench = Bench(case, tmp_path, loss_type=loss_type, train_on="both")
    loss, gradient = own_step(bench)
    collate, data = bench.trainer.data_collator, bench.trainer.get_train_dataloader().dataset
    batches = [collate(data.__getitems__(indices)) for indices in ([0, ~1], [~0], [1, ~2, 2], [~2, ~1])]
    with case.arithmetic():
        own_loss, found = bench.run(batches)
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, gradient, TOLERANCE)


def test_pairs_weigh_by_language_and_the_source_language_is_one(tmp_path: Path) -> None:
    case = Case("llama", targets=(3, 2), seed=33)
    settings = {"loss_type": "simpo", "train_on": "both", "language_weights": {"en": 3.0}}
    bench = Bench(case, tmp_path, **settings)
    (batch,) = bench.batches()
    weights = batch["weight"]
    assert bench.trainer.languages[-1] == "en"
    assert float(weights.mean()) == pytest.approx(1.0)
    assert weights[batch["is_source"]].tolist() == pytest.approx([3 * float(weights[0])] * 2)


# ---- No more than is asked for ------------------------------------------------------------------------------------


def test_dpo_on_targets_runs_no_source_and_neither_does_its_reference_pass(tmp_path: Path) -> None:
    bench = Bench(Case("llama", targets=(2, 3), seed=34), tmp_path, loss_type="sigmoid")
    (batch,) = bench.batches()
    targets = trained_pairs(bench, "targets")
    assert int((batch["tree_ids"] >= 0).sum()) == sum(len(part) for pair in targets for part in pair)
    assert batch["pool_index"].numel() == 0
    assert not {"reference_hidden", "prompt_index", "score_shared", "mismatched"} & set(batch)
    (folder,) = (tmp_path / "reference").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "logps.npy"]
    with torch.no_grad():
        plain = torch.stack([score_pair(bench.start, pair).logps for pair in targets])
    np.testing.assert_allclose(np.load(folder / "logps.npy"), plain.numpy(), rtol=1e-6)


@pytest.mark.parametrize("loss_type", ["simpo", "cpo", "orpo", "sft", "first_token"])
def test_an_objective_without_a_reference_makes_no_reference_pass(loss_type: str, tmp_path: Path) -> None:
    bench = Bench(Case("llama", targets=(2, 1), exact=False), tmp_path, loss_type=loss_type)
    bench.trainer.train()
    assert not (tmp_path / "reference").exists()
    assert bench.trainer.source_report == {"sources": 2, "dropped": 0}
    (logged, *_) = bench.trainer.state.log_history
    assert {f"reward_gap/{language}" for language in bench.trainer.languages} <= set(logged)
    assert not any("source" in name or "loss/" in name or "rewards" in name for name in logged)


def test_a_least_source_gap_makes_a_pass_over_the_sources_alone(tmp_path: Path) -> None:
    case = Case("llama", targets=(2, 1, 3, 1), seed=35)
    gaps = [float(scored.gap) for scored in Bench(case, tmp_path / "mpo").reference()]
    limit = sorted(gaps)[1] + 1e-4
    bench = Bench(case, tmp_path, loss_type="simpo", min_source_gap=limit)
    assert bench.trainer.source_report["dropped"] == 2
    (folder,) = (tmp_path / "reference").iterdir()
    assert np.load(folder / "logps.npy").shape == (4, 2) and not (folder / "hidden.npy").exists()
    kept = sum(len(group.targets) for group, gap in zip(bench.groups, gaps, strict=True) if gap > limit)
    assert sum(batch["num_pairs"] for batch in bench.batches()) == kept


# ---- Logs and evaluation ------------------------------------------------------------------------------------------


def test_several_objectives_are_logged_one_by_one_and_the_source_language_as_the_others(
    tmp_path: Path,
) -> None:
    case = Case("llama", targets=(2, 3), seed=36, exact=False)
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2], "train_on": "both", "beta": 0.3}
    bench = Bench(case, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, **settings)
    pairs = trained_pairs(bench, "both")
    alone = {"output_dir": "x", "use_cpu": True}
    terms = [
        float(dpo_loss(bench, Settings(**alone, loss_type="sigmoid", beta=0.3), pairs)),
        float(dpo_loss(bench, Settings(**alone, loss_type="sft"), pairs)),
    ]
    trl = bench.trainer._metrics["train"]
    rewards = {name: trl[name][0] for name in trl if name.startswith("rewards/")}
    model, _ = bench.policy()
    with torch.no_grad():
        gaps = [float(score_pair(model, group.source).gap) for group in bench.groups]
    bench.trainer.train()
    logged = bench.trainer.state.log_history[0]
    assert [logged["loss/sigmoid"], logged["loss/sft"]] == pytest.approx(terms, rel=1e-4)
    assert logged["loss"] == pytest.approx(0.7 * terms[0] + 0.2 * terms[1], rel=1e-4)
    # TRL's have the temperature of the objective that was last set, 1 for the likelihood alone.
    assert len(rewards) == 4
    found = {name: logged[name] / (1 if name == "rewards/accuracies" else 0.3) for name in rewards}
    assert found == pytest.approx(
        {name: value / (1 if name == "rewards/accuracies" else 0.3) for name, value in rewards.items()},
        rel=1e-3,
        abs=1e-4,
    )
    assert logged["reward_gap/en"] == pytest.approx(sum(gaps) / 2, abs=2e-5)
    assert "loss/reward_gap" not in logged and "loss/retention" not in logged


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "sft"], "train_on": "both", "beta": 0.2},
        {"loss_type": "sft"},
        {"loss_type": "ipo", "train_on": "source", "ld_alpha": 0.5},
    ],
    ids=str,
)
def test_the_evaluation_loss_is_that_of_all_held_out_pairs_together(
    settings: dict[str, Any], size: int, tmp_path: Path
) -> None:
    case = Case("llama", True, targets=(1, 4, 2), seed=37, exact=False)
    bench = Bench(case, tmp_path, max_targets_per_group=2, per_device_eval_batch_size=size, **settings)
    args = bench.trainer.args
    expected = float(dpo_loss(bench, args, trained_pairs(bench, args.train_on)))
    metrics = bench.trainer.evaluate(bench.rows)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert "eval_reward_gap/en" in metrics


def test_the_evaluation_loss_of_kto_has_the_reference_point_of_all_held_out_pairs(tmp_path: Path) -> None:
    case = Case("llama", True, targets=(1, 4, 2), seed=37, exact=False, cut=True)
    bench = Bench(case, tmp_path, loss_type="kto")
    metrics = bench.trainer.evaluate(bench.rows)
    assert metrics["eval_loss"] == pytest.approx(float(kto_loss(bench, bench.trainer.args)[0]), rel=1e-4)


# ---- Names of one's own -------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(objectives, "_known", dict(objectives._known))


def absolute(pairs: Any, args: MPOConfig) -> Tensor:
    return (args.beta * (pairs.chosen_logps - pairs.rejected_logps) - pairs.reference_gap).abs()


@pytest.mark.usefixtures("registry")
def test_a_registered_objective_can_be_named_and_combined(tmp_path: Path) -> None:
    register_objective("gap_distance", absolute, published={"beta": 2.0}, needs=["source_gap"])
    case = Case("llama", targets=(2, 1), seed=38, beta=2.0)
    bench = Bench(case, tmp_path, loss_type=["gap_distance", "sft"], loss_weights=[1.0, 0.5])
    assert all("reference_hidden" not in batch for batch in bench.batches())
    model, leaves = bench.policy()
    losses, likelihood, length = [], torch.zeros((), dtype=torch.float64), 0
    for group, reference in zip(bench.groups, bench.reference(), strict=True):
        for pair in group.targets:
            scored = score_pair(model, pair)
            losses.append((2.0 * scored.gap - reference.gap).abs())
            likelihood, length = likelihood + scored.logps[0] * len(pair.chosen), length + len(pair.chosen)
    expected = torch.stack(losses).mean() - 0.5 * likelihood / length
    loss, found = bench.run()
    assert relative_error(torch.tensor(loss), expected) <= TOLERANCE
    assert_same_tensors(found, gradients(expected, leaves), TOLERANCE)


@pytest.mark.usefixtures("registry")
def test_an_installed_package_can_bring_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "their_losses-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[mpo.objectives]\nzero = their_losses:zero\nodd = their_losses:odd\nbroken = their_losses:missing\n"
    )
    (tmp_path / "their_losses.py").write_text(
        "from mpo.training.objectives import register_objective\n"
        "zero = register_objective('zero', lambda pairs, args: 0 * pairs.chosen_logps)\n"
        "odd = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Settings(output_dir="x", use_cpu=True, loss_type="zero").objectives.names == ["zero"]
    with pytest.raises(ConfigError, match="a NoneType; expected"):
        Settings(output_dir="x", use_cpu=True, loss_type="odd")
    with pytest.raises(ConfigError, match="cannot be loaded from their_losses:missing"):
        Settings(output_dir="x", use_cpu=True, loss_type="broken")


def test_a_name_that_is_taken_and_a_need_that_nothing_meets_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is an objective `sigmoid` already"):
        register_objective("sigmoid", absolute)
    with pytest.raises(ConfigError, match="needs attention, which nothing provides"):
        register_objective("other", absolute, needs=["attention"])


@pytest.mark.usefixtures("registry")
def test_an_objective_that_holds_the_source_does_not_train_on_it() -> None:
    register_objective("held", lambda pairs, args: pairs.retention, needs=["retention"])
    settings: dict[str, Any] = {"output_dir": "x", "use_cpu": True, "loss_type": "held"}
    assert Settings(**settings).holds_sources
    assert not Settings(**settings, retain_weight=0.0).holds_sources
    with pytest.raises(ConfigError, match="`train_on: both` does not go with `held`"):
        Settings(**settings, train_on="both")
