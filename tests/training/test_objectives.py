"""Every objective on preference trees against TRL's own code on padded pairs: the loss of a step and every gradient."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, add_fused_lm_head
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from mpo import MPOConfig
from mpo.training.metrics import LanguageMetrics
from mpo.training.sampling import Trained
from tests.plain import Ids, assert_same_tensors, gradients, relative_error
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


@pytest.fixture(
    scope="module",
    params=[(f, lora) for f in ("llama", "gemma2", "qwen2") for lora in (False, True)],
    ids=str,
)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A policy that has moved away from its reference, on ragged groups; its objective is chosen by :func:`choose`."""
    family, lora = request.param
    case = Case(family, lora, targets=(1, 4, 2), seed=31, cut=True)
    return Bench(case, tmp_path_factory.mktemp("bench"), **EVERYTHING)


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


@pytest.mark.parametrize("settings", DPO_FAMILY, ids=str)
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


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "simpo"},
        {"loss_type": "simpo", "beta": 1.5, "simpo_gamma": 0.9, "label_smoothing": 0.1, "train_on": "both"},
        {"loss_type": "cpo"},
        {"loss_type": "cpo", "beta": 0.3, "cpo_alpha": 0.4, "label_smoothing": 0.2, "train_on": "source"},
        {"loss_type": "cpo", "cpo_alpha": 0.0, "train_on": "both"},
    ],
    ids=str,
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


@pytest.mark.parametrize("settings", [{}, {"beta": 0.7, "train_on": "both"}, {"train_on": "source"}], ids=str)
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7, "train_on": "both"},
        {"train_on": "source"},
    ],
    ids=str,
)
def test_kto_is_that_of_trl(bench: Bench, settings: dict[str, Any]) -> None:
    args = choose(bench, loss_type="kto", **settings)
    loss, kl = kto_loss(bench, args)
    assert_same_step(bench, loss)
    found = bench.trainer._metrics_per_language.log(1, bench.trainer.accelerator)
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
