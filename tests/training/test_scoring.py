"""Scores, evaluation loss and perplexity against one plain forward pass per sequence."""

from __future__ import annotations

import copy
import gc
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from mpo import MPOConfig, MPOTrainer
from mpo.data import as_groups
from mpo.errors import DataError, MPOError
from mpo.modeling.likelihoods import perplexity
from mpo.modeling.pairs import PairTensors
from mpo.training.ranks import SingleRank
from mpo.training.records import PairScore, Scores
from mpo.training.scoring import score_dataset, score_groups
from tests.plain import (
    Exact,
    Group,
    Scored,
    add_lora,
    group_ids,
    plain_model,
    reference_values,
    retention,
    run_sequence,
    score_pair,
    step_loss,
)
from tests.tiny import build_model, build_tokenizer, random_groups, random_text

RAGGED = (1, 4, 2, 5, 1)


def rows_of(seed: int, targets: tuple[int, ...] = RAGGED) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [row for k in targets for row in random_groups(rng, 1, (k, k), words=(1, 5))]


def make_trainer(model: Any, folder: Path, **options: Any) -> MPOTrainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "reference_cache_dir": str(folder / "reference"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        "max_length": None,
        "max_tokens_per_row": 90,
    }
    settings = {name: options.pop(name) for name in list(options) if name in MPOConfig.__dataclass_fields__}
    return MPOTrainer(
        model,
        args=MPOConfig(**{**arguments, **settings}),
        processing_class=build_tokenizer("llama"),
        **options,
    )


@torch.no_grad()
def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with its trained weights changed by about a tenth."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = float(parameter.square().mean().sqrt()) or 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15 * size)
    return model


def expected_records(model: PreTrainedModel, groups: list[Group], reference: list[Scored]) -> list[PairScore]:
    """Source, then targets, of every group."""
    records = []
    with torch.no_grad():
        for number, (group, constant) in enumerate(zip(groups, reference, strict=True)):
            pairs = [("en", group.source), *zip(group.languages, group.targets, strict=True)]
            for place, (language, pair) in enumerate(pairs):
                chosen, rejected = score_pair(model, pair).logps.tolist()
                records.append(
                    PairScore(
                        number, language, place == 0, chosen, rejected, chosen - rejected, float(constant.gap)
                    )
                )
    return records


def expected_retention(
    model: PreTrainedModel, groups: list[Group], reference: list[Scored], pooling: str = "mean"
) -> float:
    with torch.no_grad():
        values = [
            float(retention(score_pair(model, group.source, pooling), constant))
            for group, constant in zip(groups, reference, strict=True)
        ]
    return sum(values) / len(values)


def assert_records(found: list[PairScore], expected: list[PairScore], tolerance: float = 5e-6) -> None:
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual.group, actual.language, actual.is_source) == (
            wanted.group,
            wanted.language,
            wanted.is_source,
        )
        for name in ("chosen", "rejected", "gap", "reference_gap"):
            assert getattr(actual, name) == pytest.approx(getattr(wanted, name), abs=tolerance), (
                wanted,
                name,
            )


# ---- With a trainer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_the_trainer_scores_every_pair_with_the_policy_and_every_source_with_the_reference(
    layout: str, size: int, tmp_path: Path
) -> None:
    model = build_model("llama", dtype=torch.float64)
    start = plain_model(model)
    rows = rows_of(1)
    trainer = make_trainer(
        model,
        tmp_path,
        train_dataset=rows_of(2),
        eval_dataset=rows,
        batch_layout=layout,
        per_device_eval_batch_size=size,
        retain_pooling="last",
    )
    trainer._prepare_references()
    moved(trainer.model, 5)
    policy = plain_model(trainer.model)
    groups = group_ids(build_tokenizer("llama"), rows)
    reference = reference_values(start, groups, "last")
    scores = trainer.score()
    assert_records(scores.records, expected_records(policy, groups, reference))
    assert scores.retention == pytest.approx(expected_retention(policy, groups, reference, "last"), rel=1e-5)
    pairs = [pair for group in groups for pair in [group.source, *group.targets]]
    prompts = 1 if layout == "tree" else 2
    assert scores.tokens == sum(prompts * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("retain_weight", [0.0, 0.7])
def test_the_evaluation_loss_is_the_mean_over_all_pairs_of_ragged_groups(
    size: int, retain_weight: float, tmp_path: Path
) -> None:
    model = build_model("llama", dtype=torch.float64)
    start = plain_model(model)
    rows = rows_of(3)
    trainer = make_trainer(
        model,
        tmp_path,
        train_dataset=rows_of(2),
        eval_dataset=rows,
        beta=1.5,
        retain_weight=retain_weight,
        per_device_eval_batch_size=size,
        language_weights={"ja": 5.0},  # of training: an evaluation weighs all pairs alike
    )
    trainer._prepare_references()
    moved(trainer.model, 6)
    policy = plain_model(trainer.model)
    groups = group_ids(build_tokenizer("llama"), rows)
    reference = reference_values(start, groups, "mean")
    metrics = trainer.evaluate()
    with torch.no_grad():
        loss = step_loss(policy, groups, reference, beta=1.5, retain_weight=retain_weight)
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["eval_loss/retention"] == pytest.approx(
        expected_retention(policy, groups, reference), rel=1e-5
    )

    records = [record for record in expected_records(policy, groups, reference) if not record.is_source]
    for language in {record.language for record in records}:
        mine = [record for record in records if record.language == language]
        for name, values in {
            "reward_gap": [r.gap for r in mine],
            "gap_to_source": [r.gap - r.reference_gap for r in mine],
            "positive": [float(r.gap > 0) for r in mine],
            "logps/chosen": [r.chosen for r in mine],
            "logps/rejected": [r.rejected for r in mine],
        }.items():
            wanted = sum(values) / len(values)
            assert metrics[f"eval_{name}/{language}"] == pytest.approx(wanted, abs=1e-5), (name, language)


def test_an_adapter_is_scored_on_and_its_reference_off(tmp_path: Path) -> None:
    base = build_model("llama", dtype=torch.float64)
    start, policy = plain_model(base), plain_model(base)
    rows = rows_of(4, (2, 1))
    trainer = make_trainer(
        base,
        tmp_path,
        train_dataset=rows_of(2, (6, 6)),
        eval_dataset=rows,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    )
    trainer._prepare_references()
    moved(trainer.model, 7)
    add_lora(policy, lora_factors(trainer.model), 2.0)
    groups = group_ids(build_tokenizer("llama"), rows)
    reference = reference_values(start, groups, "mean")
    scores = trainer.score()
    assert_records(scores.records, expected_records(policy, groups, reference))
    assert scores.retention == pytest.approx(expected_retention(policy, groups, reference), rel=1e-5)
    # The base is still there to say what it says of sources that nobody had asked it about.
    new = rows_of(5, (1, 2))
    groups = group_ids(build_tokenizer("llama"), new)
    reference = reference_values(start, groups, "mean")
    scores = trainer.score(new)
    assert_records(scores.records, expected_records(policy, groups, reference))
    assert scores.retention == pytest.approx(expected_retention(policy, groups, reference), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_new_data_is_never_compared_with_another_model_than_the_explicit_reference(
    lora: bool, tmp_path: Path
) -> None:
    other = build_model("llama", seed=9, dtype=torch.float64)
    start = plain_model(other)
    trainer = make_trainer(
        build_model("llama", dtype=torch.float64),
        tmp_path,
        ref_model=other,
        train_dataset=rows_of(2, (6, 6)),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
    )
    trainer._prepare_references()
    rows = rows_of(6, (1, 2))
    try:
        records = trainer.score(rows).records
    except MPOError:
        return  # the reference model may be gone by now, if it is said so
    expected = reference_values(start, group_ids(build_tokenizer("llama"), rows), "mean")
    for record in records:
        assert record.reference_gap == pytest.approx(float(expected[record.group].gap), abs=5e-6)


def lora_factors(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    state = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    layers = {name.split(".lora_")[0] for name in state}
    return {
        layer.removeprefix("base_model.model."): (
            state[f"{layer}.lora_A.default.weight"],
            state[f"{layer}.lora_B.default.weight"],
        )
        for layer in layers
    }


def test_data_given_to_score_gets_its_own_reference_even_at_the_address_of_data_that_is_gone(
    tmp_path: Path,
) -> None:
    model = build_model("llama", dtype=torch.float64)
    trainer = make_trainer(model, tmp_path, train_dataset=rows_of(2, (6, 6)))
    plain = plain_model(model)
    rows = rows_of(11, (2, 1))
    data = trainer._evaluation_data(rows)
    other = trainer._evaluation_data(rows_of(10, (2, 1)))
    for _ in range(20):
        gone = copy.copy(other)
        trainer.score(gone)
        address = id(gone)
        del gone
        gc.collect()
        # Python gives freed memory to the next objects of that size, unless others were faster.
        copies = [copy.copy(data) for _ in range(2000)]
        taken = [copy for copy in copies if id(copy) == address]
        if taken:
            data = taken[0]
            break
    groups = group_ids(build_tokenizer("llama"), rows)
    reference = reference_values(plain, groups, "mean")
    assert_records(trainer.score(data).records, expected_records(plain, groups, reference))


def test_scoring_leaves_the_model_in_the_mode_it_was_in(tmp_path: Path) -> None:
    trainer = make_trainer(build_model("llama"), tmp_path, train_dataset=rows_of(2), eval_dataset=rows_of(1))
    for training in (True, False):
        trainer.model.train(training)
        trainer.score()
        assert trainer.model.training is training


def test_scoring_without_data_or_with_a_new_language_is_an_error(tmp_path: Path) -> None:
    rows = random_groups(1, 2, (1, 1), languages=["ja"], words=(1, 3))
    trainer = make_trainer(build_model("llama"), tmp_path, train_dataset=rows)
    with pytest.raises(DataError, match="no evaluation data"):
        trainer.score()
    with pytest.raises(DataError, match="sw"):
        trainer.score(random_groups(2, 2, (1, 1), languages=["sw"], words=(1, 3)))


@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (3, 2), (7, 1)])
def test_several_ranks_together_give_the_scores_of_one(
    ranks: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(5)
    trainer = make_trainer(build_model("llama"), tmp_path, train_dataset=rows_of(2), eval_dataset=rows)
    trainer._prepare_references()
    data = trainer.eval_dataset
    reference = trainer._reference_of(data)
    with torch.no_grad():  # away from the reference, where retention is zero on every rank
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)

    def run(rank: int, of: int) -> tuple[Scores, float]:
        one: Any = SingleRank(torch.device("cpu"))
        one.process_index, one.num_processes = rank, of
        return score_dataset(
            trainer.model.eval(),
            data,
            reference,
            languages=trainer.languages,
            source_language="en",
            shape=trainer.data_collator.shape,
            ranks=one,
            batch_size=size,
            pair_loss=trainer.pair_loss,
            progress=False,
        )

    alone, alone_loss = run(0, 1)
    # Every rank's part is collected first, then handed to a rank as the others would.
    parts: list[Any] = []
    monkeypatch.setattr("mpo.training.ranks.gather_object", lambda part: parts.extend(part) or part)
    for rank in range(ranks):
        run(rank, ranks)
    assert len(parts) == ranks
    monkeypatch.setattr("mpo.training.ranks.gather_object", lambda part: parts)
    together, together_loss = run(ranks - 1, ranks)
    assert_records(together.records, alone.records)
    assert alone.retention is not None and alone.retention > 1e-3
    assert together.retention == pytest.approx(alone.retention, rel=1e-5)
    assert together_loss == pytest.approx(alone_loss, rel=1e-5)
    assert together.tokens == alone.tokens


# ---- Without a trainer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_groups_are_scored_without_a_trainer_as_with_one(family: str, layout: str) -> None:
    rows = rows_of(8, (3, 1))
    tokenizer = build_tokenizer(family)
    model = build_model(family, dtype=torch.float64)
    plain = plain_model(model)
    cut = 2 + max(
        len(pair.prompt) for group in group_ids(tokenizer, rows) for pair in [group.source, *group.targets]
    )
    groups = group_ids(tokenizer, rows, cut)
    # Exact: where a padding token sees nothing, float64's minimum is too much for eager attention's float32.
    with Exact():
        scores = score_groups(
            model, as_groups(rows), tokenizer, max_length=cut, layout=layout, batch_size=2, progress=False
        )
    assert_records(scores.records, expected_records(plain, groups, reference_values(plain, groups, "mean")))
    assert scores.retention == pytest.approx(0.0, abs=1e-12)


def test_an_adapter_is_measured_against_the_model_it_was_made_from() -> None:
    rows = rows_of(9, (2, 2))
    base = build_model("llama", dtype=torch.float64)
    start, policy = plain_model(base), plain_model(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    model = moved(get_peft_model(base, config), 3)
    add_lora(policy, lora_factors(model), 2.0)
    groups = group_ids(build_tokenizer("llama"), rows)
    reference = reference_values(start, groups, "last")
    scores = score_groups(model, as_groups(rows), build_tokenizer("llama"), pooling="last", progress=False)
    assert_records(scores.records, expected_records(policy, groups, reference))
    assert scores.retention == pytest.approx(expected_retention(policy, groups, reference, "last"), rel=1e-5)


def test_a_model_that_takes_no_trees_is_scored_without_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A warning of the fallback must not need what only a trainer sets up.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr("mpo.modeling.masks.TREE_ATTENTION", ("sdpa",))
    rows = rows_of(8, (1, 2))
    model = build_model("llama", dtype=torch.float64, attn_implementation="eager")
    plain = plain_model(model)
    groups = group_ids(build_tokenizer("llama"), rows)
    scores = score_groups(model, as_groups(rows), build_tokenizer("llama"), progress=False)
    assert_records(scores.records, expected_records(plain, groups, reference_values(plain, groups, "mean")))


# ---- Perplexity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("max_length", [1024, 9])
def test_perplexity_is_that_of_a_plain_loop_over_all_tokens_but_the_first(
    family: str, max_length: int
) -> None:
    rng = random.Random(1)
    texts = [random_text(rng, language, rng.randint(1, 9)) for language in ("en", "sw", "ar", "zh", "en")]
    model = build_model(family)  # float32: see the remark on padding and float64 above
    tokenizer = build_tokenizer(family)
    plain = plain_model(model)
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text)["input_ids"][:max_length]
            log_probs = torch.log_softmax(run_sequence(plain, ids).logits[0], dim=-1)
            for place in range(1, len(ids)):
                total -= float(log_probs[place - 1, ids[place]])
                count += 1
    expected = math.exp(total / count)
    for size in (1, 2, 8):
        assert perplexity(model, tokenizer, texts, max_length=max_length, batch_size=size) == pytest.approx(
            expected, rel=1e-5
        )


def test_the_perplexity_of_a_peft_model_is_that_with_its_adapter() -> None:
    base = build_model("llama")
    policy = plain_model(base)
    tokenizer = build_tokenizer("llama")
    before = perplexity(base, tokenizer, ["the river and the bread"])
    model = moved(
        get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])), 4
    )
    add_lora(policy, {k: (a.double(), b.double()) for k, (a, b) in lora_factors(model).items()}, 2.0)
    ids = tokenizer("the river and the bread")["input_ids"]
    with torch.no_grad():
        log_probs = torch.log_softmax(run_sequence(policy, ids).logits[0], dim=-1)
    likelihood = sum(float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)))
    found = perplexity(model, tokenizer, ["the river and the bread"])
    assert found == pytest.approx(math.exp(-likelihood / (len(ids) - 1)), rel=1e-5)
    assert abs(found - before) > 1e-3 * before


def test_texts_of_one_token_have_no_perplexity() -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        perplexity(build_model("qwen2"), build_tokenizer("qwen2"), ["a", ""])


def test_the_documented_names_are_found_where_they_are_documented() -> None:
    import mpo.scoring as documented

    assert documented.score_groups is score_groups and documented.perplexity is perplexity
    assert documented.PairTensors is PairTensors and documented.PairScore is PairScore
