"""Harmless groups beside harmful ones: the step against a plain computation in float64, its order, its logs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_groups
from mpo.errors import ConfigError, DataError
from mpo.modeling.pairs import PairTensors
from mpo.training.order import GroupBatchSampler, ShareSampler
from mpo.training.unique_pairs import fingerprint_rows
from mpo.training.workload import count_work, schedule
from tests import runs
from tests.plain import Ids, Scored, assert_same_tensors, gradients, relative_error, retention, score_pair
from tests.tiny import random_groups
from tests.training.test_trainer_numerics import Bench, Case

TOLERANCE = 1e-5
RAGGED: dict[str, Any] = {"targets": (1, 3, 2, 2, 1), "harmless": (1, 4)}


# ---- The loss of a step ------------------------------------------------------------------------------------------


def dpo(now: Scored, then: Scored, pair: Ids, beta: float) -> Tensor:
    moved = [(now.logps[i] - then.logps[i]) * len(ids) for i, ids in enumerate((pair.chosen, pair.rejected))]
    return -logsigmoid(beta * (moved[0] - moved[1]))


def next_tokens(model: Any, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """States and log-probabilities after each token of prompt and response but the last, ``[N, H]`` and ``[N, V]``."""
    found = model(input_ids=torch.tensor([[*prompt, *response[:-1]]]), output_hidden_states=True)
    return found.hidden_states[-1][0], torch.log_softmax(found.logits[0], dim=-1)


def moved(model: Any, start: Any, by: str, pair: Ids) -> Tensor:
    """How far a pair has moved: over its prompt, where the answer is decided on, and over the answer."""

    def after(response: list[int]) -> tuple[Tensor, Tensor]:
        """How far each token after that of prompt and response has moved, and its log-probabilities under the policy."""
        now = next_tokens(model, pair.prompt, response)
        with torch.no_grad():
            then = next_tokens(start, pair.prompt, response)
        if by == "kl":
            return (then[1].exp() * (then[1] - now[1])).sum(dim=1), now[1]
        if by in ("reverse_kl", "mixed_kl"):
            far = (now[1].exp() * (now[1] - then[1])).sum(dim=1)
            if by == "mixed_kl" and response is pair.chosen:
                text = (then[1].exp() * (then[1] - now[1])).sum(dim=1)
                far = torch.where(torch.arange(len(far)) >= len(pair.prompt) - 1, far, text)
            return far, now[1]
        return (now[0] - then[0]).square().mean(dim=1), now[1]

    last = len(pair.prompt) - 1
    far, _ = after(pair.chosen)
    refusing, says = after(pair.rejected)
    decision, comes_to = far[last], torch.ones((), dtype=torch.float64)
    for i, token in enumerate(pair.rejected[:-1]):
        comes_to = comes_to * says[last + i, token].exp()
        decision = decision + comes_to * refusing[last + i + 1]
    parts = [decision] + [part.mean() for part in (far[:last], far[last + 1 :]) if len(part)]
    return torch.stack(parts).mean()


def plain_step(bench: Bench) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of one step over all groups: each kind's mean, from one sequence a forward pass."""
    args, case = bench.trainer.args, bench.case
    model, leaves = bench.policy()

    def both(pair: Ids) -> tuple[Scored, Scored]:
        with torch.no_grad():
            then = score_pair(bench.start, pair, case.pooling)
        return score_pair(model, pair, case.pooling), then

    harmful: list[Tensor] = []
    harmless: list[Tensor] = []
    taught = [pair for i in case.harmless for pair in [bench.groups[i].source, *bench.groups[i].targets]]
    adapted = bench.trainer.retain_weights
    weights = (
        {} if adapted is None else dict(zip(bench.trainer.languages, adapted.values.double(), strict=True))
    )
    for place, group in enumerate(bench.groups):
        source = both(group.source)
        if place not in case.harmless:
            for target in group.targets:
                if args.loss_type == ["mpo"]:
                    gap = score_pair(model, target).gap
                    kept = retention(*source)
                    error = args.beta * gap - source[1].gap
                    near = error if args.mpo_delta is None else error.clamp(-args.mpo_delta, args.mpo_delta)
                    harmful.append(near**2 + 2 * near * (error - near) + args.retain_weight * kept)
                else:
                    harmful.append(dpo(*both(target), target, args.beta))
            continue
        targets = [*zip(group.targets, group.languages, strict=True)]
        pairs = {
            "targets": targets,
            "source": [(group.source, "en")],
            "both": [*targets, (group.source, "en")],
        }
        for pair, language in pairs[args.harmless_train_on or "both"]:
            now, then = both(pair)
            retain_weight = weights.get(language, args.harmless_retain_weight)
            loss = torch.zeros((), dtype=torch.float64)
            if args.harmless_loss_type in (None, ["sigmoid"]):
                loss = dpo(now, then, pair, args.harmless_beta or 0.1)
            elif args.harmless_loss_type == ["sft"]:
                loss = (
                    -now.logps[0] * len(pair.chosen) * len(taught) / sum(len(each.chosen) for each in taught)
                )
            elif args.harmless_loss_type == ["gap_retention"]:
                loss = (now.gap - then.gap) ** 2
            loss = args.harmless_loss_weight * loss
            if args.harmless_retention == "hidden":
                change = (now.pooled[0] - then.pooled[0]).square().sum() / now.pooled.shape[1]
                loss = loss + retain_weight * change
            elif args.harmless_retention != "none":
                change = moved(model, bench.start, args.harmless_retention, pair)
                loss = loss + retain_weight * change
            harmless.append(loss)
    mean = torch.stack(harmful).mean()
    mean = mean + torch.stack(harmless).mean()
    return mean.detach(), gradients(mean, leaves)


USES: list[dict[str, Any]] = [
    {},
    {"harmless_loss_weight": 0.3, "harmless_beta": 0.7, "harmless_train_on": "targets"},
    {"harmless_train_on": "source"},
    {"harmless_loss_type": "sft", "harmless_loss_weight": 2.0},
    {"harmless_retention": "hidden", "harmless_retain_weight": 3.0},
    {"harmless_loss_type": "none", "harmless_retention": "hidden"},
    {"loss_type": "sigmoid", "harmless_retention": "hidden", "harmless_train_on": "targets"},
    {"harmless_retention": "states", "harmless_retain_weight": 2.0},
    {"harmless_loss_type": "none", "harmless_retention": "kl", "harmless_retain_weight": 20.0},
    {"loss_type": "sigmoid", "harmless_retention": "kl", "harmless_train_on": "targets"},
    {"harmless_loss_type": "sft", "harmless_retention": "kl", "harmless_retain_weight": 3.0},
    {"harmless_retention": "kl", "harmless_retain_weight": 3.0, "harmless_retain_target": 0.1},
    {"harmless_loss_type": "none", "harmless_retention": "hidden", "harmless_retain_target": 0.1},
    {"harmless_loss_type": "none", "harmless_retention": "reverse_kl", "harmless_retain_weight": 20.0},
    {"harmless_loss_type": "none", "harmless_retention": "mixed_kl", "harmless_retain_weight": 20.0},
    {"harmless_loss_type": "gap_retention", "harmless_loss_weight": 3.0, "mpo_delta": 0.05},
    {"harmless_loss_type": "gap_retention", "harmless_train_on": "targets", "harmless_retention": "hidden"},
]
MADE_UP: list[dict[str, Any]] = [
    {},
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 2, "max_targets_per_group": 1},
    {"per_device_train_batch_size": 1, "max_tokens_per_batch": 150},
    {"per_device_train_batch_size": 5, "max_tokens_per_call": 120},
    {"per_device_train_batch_size": 3, "max_tokens_per_call": 120, "batch_layout": "padded"},
]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("use", USES, ids=str)
def test_a_step_is_the_sum_of_the_means_over_either_kind(
    use: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    pooling = "last" if lora else "mean"
    case = Case("qwen2" if lora else "llama", lora, pooling=pooling, seed=41, cut=True, **RAGGED)
    if "kl" in use.get("harmless_retention", "") and not lora:
        with pytest.raises(ConfigError, match="`harmless_retention: states`, which needs no head"):
            Bench(case, tmp_path, **use)
        return
    bench = Bench(case, tmp_path, **use)
    if (adapted := bench.trainer.retain_weights) is not None:
        # Another weight for each language.
        adapted.restore(
            {code: {"log_change": 0.4 * n - 0.7} for n, code in enumerate(bench.trainer.languages)}
        )
    loss, expected = plain_step(bench)
    own_loss, found = bench.run()
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


@pytest.mark.parametrize("made_up", MADE_UP[1:], ids=str)
@pytest.mark.parametrize("use", [USES[0], USES[4], USES[7], USES[8], USES[11], USES[13], USES[14]], ids=str)
def test_a_step_is_the_same_however_its_groups_are_made_up(
    use: dict[str, Any], made_up: dict[str, Any], tmp_path: Path
) -> None:
    lora = "kl" in use.get("harmless_retention", "")
    case = Case("llama", lora, layout=made_up.get("batch_layout", "tree"), seed=42, **RAGGED)
    bench = Bench(case, tmp_path, **use, **made_up)
    loss, expected = plain_step(bench)
    batches = bench.batches()
    assert len(batches) > 1 or "calls" in batches[0]
    own_loss, found = bench.run(batches)
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


def test_a_filler_of_either_kind_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(Case("llama", seed=43, **RAGGED), tmp_path, harmless_retention="hidden")
    loss, expected = plain_step(bench)
    collate, data = bench.trainer.data_collator, bench.trainer.get_train_dataloader().dataset
    parts = ([0, ~1, 2], [~0], [1, ~4], [~2, 3, 4])
    own_loss, found = bench.run([collate(data.__getitems__(indices)) for indices in parts])
    assert relative_error(torch.tensor(own_loss), loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


def test_a_filler_of_a_kind_that_the_step_has_none_of_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(Case("llama", seed=43, **RAGGED), tmp_path, loss_type="sft")
    collate, data = bench.trainer.data_collator, bench.trainer.get_train_dataloader().dataset
    loss, expected = bench.run([collate(data.__getitems__([1, 4]))])
    own_loss, found = bench.run([collate(data.__getitems__(indices)) for indices in ([1, ~0], [~2, 4])])
    assert own_loss == pytest.approx(loss, rel=TOLERANCE)
    assert_same_tensors(found, expected, TOLERANCE)


def test_kto_is_evaluated_on_harmless_groups_alone(tmp_path: Path) -> None:
    bench = Bench(Case("llama", True, seed=45, exact=False, **RAGGED), tmp_path, loss_type="kto")
    model, _ = bench.policy()
    rows = [bench.rows[place] for place in RAGGED["harmless"]]
    groups = [bench.groups[place] for place in RAGGED["harmless"]]
    pairs = [pair for group in groups for pair in [group.source, *group.targets]]
    with torch.no_grad():
        losses = [dpo(score_pair(model, pair), score_pair(bench.start, pair), pair, 0.1) for pair in pairs]
    found = bench.trainer.evaluate(rows)
    assert found["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_languages_weigh_within_a_kind(tmp_path: Path) -> None:
    case = Case("llama", seed=44, weights={"zh": 3.0, "ja": 0.5, "ko": 2.0, "bn": 0.0}, **RAGGED)
    (batch,) = Bench(case, tmp_path).batches()
    for kind in (False, True):
        own = batch["weight"][batch["is_harmless"] == kind]
        assert len(own.unique()) > 1
        assert float(own.mean()) == pytest.approx(1.0)


def test_what_is_left_to_neither_loss_nor_retention_is_not_run(tmp_path: Path) -> None:
    bench = Bench(Case("llama", seed=45, **RAGGED), tmp_path, harmless_loss_type="none")
    (batch,) = bench.batches()
    assert batch["groups"] and not set(batch["groups"]) & set(bench.case.harmless)
    loss, found = bench.run()
    harmful = [group for i, group in enumerate(bench.groups) if i not in bench.case.harmless]
    bench.groups = harmful
    expected_loss, expected = bench.expected()
    assert relative_error(torch.tensor(loss), expected_loss) <= TOLERANCE
    assert_same_tensors(found, expected, TOLERANCE)


def test_a_least_source_gap_is_for_harmful_groups_alone(tmp_path: Path) -> None:
    case = Case("llama", seed=46, **RAGGED)
    gaps = [float(scored.gap) for scored in Bench(case, tmp_path / "all").reference()]
    harmful = [i for i in range(len(gaps)) if i not in case.harmless]
    limit = max(gaps[i] for i in harmful) - 1e-4
    bench = Bench(case, tmp_path / "some", min_source_gap=limit)
    (batch,) = bench.batches()
    assert sorted(batch["groups"]) == sorted([max(harmful, key=gaps.__getitem__), *case.harmless])
    assert bench.trainer.source_report["sources"] == 3
    assert bench.trainer.source_report["dropped"] == 2
    assert bench.trainer.source_report["harmless"] == 2


def test_a_loss_without_a_reference_makes_no_pass_over_harmless_groups(tmp_path: Path) -> None:
    settings = {"loss_type": "simpo", "beta": 1.0, "harmless_loss_type": "sft"}
    Bench(Case("llama", seed=47, **RAGGED), tmp_path, **settings)
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"harmless_loss_type": "sigmoyd"}, "Did you mean 'sigmoid'"),
        ({"harmless_loss_type": ["sft", "none"]}, "or 'none' alone"),
        (
            {"harmless_loss_type": "kto"},
            "`harmless_loss_type` names 'kto', which needs other pairs' responses",
        ),
        ({"harmless_loss_type": "mpo", "harmless_train_on": "both"}, "`harmless_train_on: both` does not go"),
        ({"harmless_loss_type": "mpo", "harmless_retention": "hidden"}, "holds the source still"),
        ({"harmless_loss_type": "sft", "harmless_beta": 0.2}, "has no temperature"),
        ({"harmless_loss_type": ["sigmoid", "simpo"]}, "Set `harmless_beta`"),
        ({"harmless_loss_weight": -1}, "`harmless_loss_weight` is -1"),
        (
            {"harmless_retention": "logits"},
            "expected 'none', 'hidden', 'states', 'kl', 'reverse_kl' or 'mixed_kl'",
        ),
        ({"harmless_train_on": "all"}, "expected 'targets', 'source' or 'both'"),
        ({"harmless_max_response_length": 0}, "a whole number of at least 1"),
        ({"harmless_share": 1.0}, "above 0 and below 1"),
        ({"harmless_retain_target": 0}, "`harmless_retain_target` is 0; expected a number above 0"),
        ({"harmless_retain_target": 0.1}, "but nothing is held. Set `harmless_retention: mixed_kl`"),
        ({"harmless_refusal_target": 0.1}, "`harmless_refusal_target: 0.1` adapts .* but nothing is held"),
        (
            {"harmless_refusal_target": 1},
            "`harmless_refusal_target` is 1; expected a share above 0 and below 1",
        ),
        (
            {"harmless_refusal_target": 0.1, "harmless_retain_target": 0.1, "harmless_retention": "kl"},
            "both adapt `harmless_retain_weight`. Remove one",
        ),
        ({"harmless_share": 0.3, "max_tokens_per_batch": 100}, "Remove one of them"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        MPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_a_harmless_objective_has_its_own_options(tmp_path: Path) -> None:
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    args = MPOConfig(**common, beta=1.5, harmless_loss_type="simpo", simpo_gamma=0.9)
    assert (args.beta, args.harmless.beta, args.harmless.train_on) == (1.5, 2.0, "both")
    assert MPOConfig(**common, harmless_loss_type="mpo").harmless.train_on == "targets"
    for weight in (0.0, 0.5):
        held = MPOConfig(**common, harmless_retention="hidden", harmless_retain_weight=weight)
        assert held.harmless.keeps_own == (weight > 0) and not held.keeps_own
    with pytest.raises(ConfigError, match="simpo_gamma"):  # as without harmless groups
        MPOConfig(**common, simpo_gamma=0.9)


# ---- The order ---------------------------------------------------------------------------------------------------


@st.composite
def drawn(draw: Any) -> tuple[np.ndarray, np.ndarray, float]:
    harmless = np.array(draw(st.lists(st.booleans(), min_size=2, max_size=40)))
    harmless[:2] = False, True
    return 3 + np.arange(len(harmless)), harmless, draw(st.floats(0.02, 0.98))


@given(drawn(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))
@hypothesis(max_examples=60, deadline=None)
def test_every_step_holds_the_share_on_any_number_of_ranks(
    data: tuple[np.ndarray, np.ndarray, float], size: int, ranks: int, accumulated: int, epoch: int
) -> None:
    indices, harmless, share = data
    of = dict(zip(indices.tolist(), harmless.tolist(), strict=True))

    def batches(rank: int, num_ranks: int, batch_size: int) -> list[list[int]]:
        sampler = ShareSampler(
            indices, batch_size, harmless=harmless, share=share, seed=7, rank=rank, num_ranks=num_ranks
        )
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    alone = [group for batch in batches(0, 1, 1) for group in batch]
    harmful = [group for group in alone if not of[group]]
    assert sorted(harmful) == indices[~harmless].tolist()
    expected = len(harmful) * share / (1 - share)
    assert len(alone) - len(harmful) == max(1, round(expected))
    actual = (len(alone) - len(harmful)) / len(alone)
    of_ranks = [batches(rank, ranks, size) for rank in range(ranks)]
    micro = [sorted(g for rank in of_ranks for g in rank[i] if g >= 0) for i in range(len(of_ranks[0]))]
    assert Counter(g for batch in micro for g in batch) == Counter(alone)
    for start in range(0, len(micro), accumulated):
        step = [g for batch in micro[start : start + accumulated] for g in batch]
        count = sum(of[group] for group in step)
        assert math.floor(actual * len(step)) <= count <= math.ceil(actual * len(step))
        where = start * size * ranks
        assert sorted(step) == sorted(alone[where : where + len(step)])


def test_harmless_groups_take_turns_over_the_epochs() -> None:
    harmless = np.arange(12) >= 5
    sampler = ShareSampler(np.arange(12), 2, harmless=harmless, share=0.3, seed=1)
    seen: list[int] = []
    orders = []
    for epoch in range(7):
        sampler.set_epoch(epoch)
        order = [group for batch in sampler for group in batch]
        orders.append(tuple(order))
        seen += [group for group in order if group >= 5]
    assert len(set(orders)) == 7
    assert Counter(seen) == dict.fromkeys(range(5, 12), 2)
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(5, 12))
    assert seen[:7] != seen[7:]


@pytest.mark.parametrize("kind", [False, True])
def test_a_share_of_nothing_is_refused(kind: bool) -> None:
    with pytest.raises(ConfigError, match=f"no {'harmful' if kind else 'harmless'} groups"):
        ShareSampler(np.arange(3), 1, harmless=np.full(3, kind), share=0.5)


# ---- Whole runs --------------------------------------------------------------------------------------------------

runs_alone = pytest.mark.usefixtures("accelerator_of_its_own")


def mixed() -> list[dict[str, Any]]:
    rows = random_groups(4, 9, (1, 3), words=(1, 5))
    for row in rows[5:]:
        row["kind"] = "harmless"
    return rows


@runs_alone
def test_the_plan_counts_the_steps_that_are_taken(model: Path, tmp_path: Path) -> None:
    settings = {"harmless_share": 0.6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = runs.trainer(model, tmp_path, mixed(), peft_config=runs.lora(), num_train_epochs=3, **settings)
    work = count_work(run.train_dataset, run.args)
    assert work.harmless is not None and work.harmless.sum() == 4
    batches = list(run.get_train_dataloader())
    tokens = sum(int((batch["tree_ids"] >= 0).sum()) for batch in batches)
    drawn = [group for batch in batches for group in batch["groups"]]
    assert sum(work.group_tokens[group] for group in drawn) == tokens == work.tokens
    run.train()
    planned = schedule(work.group_tokens, run.args, 1, work.harmless)
    assert run.state.global_step == planned.steps == 12  # 5 harmful and 8 harmless groups in each epoch


@runs_alone
@pytest.mark.parametrize("target", [None, 1e-4])
def test_a_resumed_run_ends_with_the_same_weights(target: float | None, model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "harmless_share": 0.4,
        "harmless_retain_target": target,
        "harmless_retention": "hidden",
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_dropout": False,
    }

    def build() -> Any:
        return runs.trainer(model, tmp_path, mixed(), peft_config=runs.lora(lora_dropout=0.2), **settings)

    unbroken = build()
    unbroken.train()
    losses = [log["loss"] for log in unbroken.state.log_history if "loss" in log]
    assert len(losses) == 8
    weights = runs.weights(unbroken.model)
    for step in (3, 5):  # within either epoch
        again = build()
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert runs.differing(runs.weights(again.model), weights) == []
        assert [log["loss"] for log in again.state.log_history if "loss" in log] == losses
        if target:
            assert again.retain_weights.state() == unbroken.retain_weights.state()
            assert 1.0 not in again.retain_weights.values.tolist()
    settings["harmless_share"] = 0.5
    with pytest.raises(ConfigError, match="harmless_share"):
        build().resolve_checkpoint(str(tmp_path / "out" / "checkpoint-3"))
    settings |= {"harmless_share": 0.4, "harmless_loss_weight": 2.0}
    with pytest.raises(ConfigError, match=r"harmless_loss_weight: 1\.0 then, 2\.0 now"):
        build().resolve_checkpoint(str(tmp_path / "out" / "checkpoint-3"))


@runs_alone
def test_groups_that_a_model_is_only_held_on_are_refused_in_python_too(model: Path, tmp_path: Path) -> None:
    rows = mixed()[5:]
    held = {"harmless_loss_type": "none", "harmless_retention": "hidden"}
    with pytest.raises(DataError, match=r"train_dataset: all 4 groups are harmless, .* Add harmful groups"):
        runs.trainer(model, tmp_path, rows, **held)
    with pytest.raises(DataError, match="and a `harmless_loss_weight` of 0"):
        runs.trainer(model, tmp_path, rows, harmless_loss_weight=0.0)

    class Own(MPOTrainer):
        def pair_loss(self, pairs: PairTensors) -> Tensor:
            return -pairs.chosen_logps

    # What teaches something is not refused: an objective, another loss, another reference.
    runs.trainer(model, tmp_path, rows)
    runs.trainer(model, tmp_path, rows, kind=Own, **held)
    runs.trainer(model, tmp_path, rows, ref_model=AutoModelForCausalLM.from_pretrained(model), **held)


@pytest.mark.parametrize("made_up", [MADE_UP[0], MADE_UP[2], MADE_UP[5]], ids=str)
@pytest.mark.parametrize("lora", [False, True])
def test_a_log_says_which_responses_greedy_decoding_gives(
    lora: bool, made_up: dict[str, Any], tmp_path: Path
) -> None:
    """Against the plain model: the shares of either kind, and what the weights of the retention follow."""
    settings = {"harmless_loss_type": "none", "harmless_retention": "hidden", "harmless_refusal_target": 0.1}
    layout = made_up.get("batch_layout", "tree")
    case = Case("llama", lora, layout=layout, seed=48, exact=False, **RAGGED)
    whole = {key: value for key, value in made_up.items() if key == "max_tokens_per_call"}
    bench = Bench(case, tmp_path, per_device_train_batch_size=5, max_steps=1, **settings, **whole)
    model, _ = bench.policy()

    def below(pair: Ids, response: list[int]) -> float:
        _, log_probs = next_tokens(model, pair.prompt, response)
        own = log_probs[len(pair.prompt) - 1 :]
        return sum(float(row[token] - row.max()) for row, token in zip(own, response, strict=True))

    said: dict[str, list[float]] = {}
    with torch.no_grad():
        for place, group in enumerate(bench.groups):
            kind = "harmless/" if place in case.harmless else ""
            pairs = [*zip(group.languages, group.targets, strict=True)]
            for language, pair in [*pairs, ("en", group.source)] if kind else pairs:
                for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                    said.setdefault(f"{kind}greedy/{name}/{language}", []).append(below(pair, response))
    bench.trainer.train()
    logged = bench.trainer.state.log_history[0]
    for name, values in said.items():
        assert logged[name] == sum(value == 0 for value in values) / len(values), name
        if name.startswith("harmless/greedy/rejected/"):
            near = sum(math.exp(3 * value) for value in values) / len(values)
            assert logged[name.replace("greedy/rejected", "refusal")] == pytest.approx(near, rel=1e-3), name
            assert near > 0


@runs_alone
def test_each_kind_is_logged_and_evaluated_apart(model: Path, tmp_path: Path) -> None:
    run = runs.trainer(model, tmp_path, mixed(), per_device_train_batch_size=9, eval_dataset=mixed()[3:8])
    run.train()
    (logged, *_) = run.state.log_history
    scores = runs.trainer(model, tmp_path, mixed(), eval_dataset=mixed()).score()
    own = [record for record in scores.records if record.group >= 5]
    assert scores.of_kind(harmless=True) == own
    for language in {record.language for record in own}:
        gaps = [record.gap for record in own if record.language == language]
        assert logged[f"harmless/reward_gap/{language}"] == pytest.approx(np.mean(gaps), abs=1e-4)
    harmful = [r for r in scores.records if r.group < 5 and not r.is_source]
    for language in {record.language for record in harmful}:
        gaps = [record.gap for record in harmful if record.language == language]
        assert logged[f"reward_gap/{language}"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert "reward_gap/en" not in logged and "loss/reward_gap" in logged
    assert logged["harmless/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert "harmless/loss/reward_gap" not in logged and "rewards/margins" not in logged
    assert logged["loss"] == pytest.approx(logged["loss/reward_gap"] + math.log(2), rel=1e-4)
    found = run.evaluate()
    assert {"eval_loss/retention", "eval_harmless/loss/retention", "eval_harmless/reward_gap/en"} <= set(
        found
    )
    assert found["eval_reward_gap/en"] != found["eval_harmless/reward_gap/en"]


@runs_alone
@pytest.mark.parametrize(
    "parts", [{}, {"harmless_train_on": "targets"}, {"max_targets_per_group": 1}], ids=str
)
@pytest.mark.parametrize("kept", ["states", "kl", "reverse_kl", "mixed_kl"])
def test_what_is_held_token_by_token_is_measured_where_it_was_at_the_start(
    kept: str, parts: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "harmless_retention": kept,
        "harmless_loss_type": "none",
        "learning_rate": 1e-2,
    }
    settings |= parts
    rows = mixed()
    run = runs.trainer(
        model, tmp_path, rows, eval_dataset=rows, peft_config=runs.lora(), max_steps=3, **settings
    )
    before = run.evaluate()
    assert before["eval_harmless/loss/retention"] == pytest.approx(0.0, abs=1e-6)
    run.train()
    after = run.evaluate()
    assert after["eval_harmless/loss/retention"] > 1e-4
    assert math.isfinite(after["eval_loss"])
    folders = [
        folder for folder in (tmp_path / "reference").iterdir() if (folder / "token_states.npy").exists()
    ]
    assert folders


@runs_alone
def test_what_is_held_token_by_token_does_not_depend_on_how_sources_are_pooled(
    model: Path, tmp_path: Path
) -> None:
    def moved(pooling: str) -> float:
        settings: dict[str, Any] = {"harmless_retention": "kl", "retain_weight": 0.0, "max_steps": 2}
        settings |= {"peft_config": runs.lora(), "retain_pooling": pooling}
        run = runs.trainer(model, tmp_path / pooling, mixed(), eval_dataset=mixed(), **settings)
        run.train()
        return float(run.evaluate()["eval_harmless/loss/retention"])

    assert moved("mean") == pytest.approx(moved("last"), rel=1e-6)


@runs_alone
def test_a_reference_with_a_head_of_its_own_has_no_next_tokens_to_hold(model: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(model)
    settings: dict[str, Any] = {"peft_config": runs.lora(), "ref_model": other}
    runs.trainer(model, tmp_path / "states", mixed(), harmless_retention="states", **settings)
    with pytest.raises(ConfigError, match="the reference here is another model"):
        runs.trainer(model, tmp_path / "kl", mixed(), harmless_retention="kl", **settings)


@runs_alone
def test_answers_to_harmless_prompts_may_be_cut_shorter_than_refusals(model: Path, tmp_path: Path) -> None:
    def longest(**settings: Any) -> dict[str, int]:
        groups = runs.trainer(model, tmp_path, mixed(), **settings).train_dataset.with_format(None)
        return {
            kind: max(
                len(response)
                for group in groups
                if group["kind"] == kind
                for responses in (group["target_chosen"], [group["source_chosen"]])
                for response in responses
            )
            for kind in ("harmful", "harmless")
        }

    whole = longest()
    assert min(whole.values()) > 7
    assert longest(harmless_max_response_length=3) == {**whole, "harmless": 3}
    assert longest(max_response_length=7) == {"harmful": 7, "harmless": 7}
    assert longest(max_response_length=7, harmless_max_response_length=4) == {"harmful": 7, "harmless": 4}


@runs_alone
def test_a_run_on_harmless_groups_alone_trains_them(model: Path, tmp_path: Path) -> None:
    rows = mixed()[5:]
    run = runs.trainer(model, tmp_path, rows, eval_dataset=rows, per_device_train_batch_size=4, max_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert run.source_report == {"sources": 0, "dropped": 0, "harmless": 4}
    found = run.evaluate()
    assert "eval_loss/retention" not in found and found["eval_harmless/loss/retention"] > 0


# What the code gave before there were kinds, on the rows of this file as harmful ones.
BEFORE: dict[str, Any] = {
    "fingerprint": "fa6642299bd541f39078f9b3deac5f0d0b81cb504c3eca37eb29f1effc7d798b",
    "dataset": "6581ad534fba6d0a",
    "rows": "0b05c55894ed896863d1bfbeadf21a2a",
    "order": [[[5], [6], [2], [1], [4], [3], [0]], [[2], [1], [4], [0], [5], [6], [3]]],
}
LOSSES: dict[str, list[str]] = {
    "mpo": [
        "0x1.c7bc5e0000000p+0",
        "0x1.c2c9340000000p+0",
        "0x1.184e4a0000000p+2",
        "0x1.3197b40000000p-2",
        "0x1.1fb0560000000p-3",
        "0x1.1fa1640000000p-2",
        "0x1.b812d00000000p-2",
        "0x1.78b0ae0000000p-5",
    ],
    "sigmoid": [
        "0x1.62e4300000000p-1",
        "0x1.6519480000000p-1",
        "0x1.4a1d300000000p-1",
        "0x1.8024020000000p-1",
        "0x1.1edb0e0000000p-2",
        "0x1.f5cccc0000000p-3",
        "0x1.ed951e0000000p-3",
        "0x1.9677ba0000000p-2",
    ],
}


@runs_alone
@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_data_without_harmless_groups_train_as_before_there_were_kinds(
    loss_type: str, stated: bool, model: Path, tmp_path: Path
) -> None:
    rows = random_groups(4, 7, (1, 3), words=(1, 5))
    if stated:
        rows = [{**row, "kind": "harmful"} for row in rows]
    loaded = load_groups(rows)
    run = runs.trainer(
        model,
        tmp_path,
        rows,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        peft_config=runs.lora(),
        loss_type=loss_type,
        train_on="both" if loss_type == "sigmoid" else "targets",
    )
    run.train()
    loader = run.get_train_dataloader()
    order = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        order.append(list(loader.batch_sampler))
    assert isinstance(loader.batch_sampler, GroupBatchSampler)
    assert {
        "fingerprint": loaded.fingerprint,
        "dataset": loaded.groups._fingerprint,
        "rows": fingerprint_rows(run.train_dataset),
        "order": order,
    } == BEFORE
    losses = [float(log["loss"]) for log in run.state.log_history if "loss" in log]
    # Exact on one machine; another processor may round the last digit otherwise, and steps pass it on.
    assert losses == pytest.approx([float.fromhex(value) for value in LOSSES[loss_type]], rel=1e-4)
