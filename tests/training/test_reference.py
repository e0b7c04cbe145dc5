"""The reference pass and its cache: right values, computed once, and never those of something else."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

from mpo.data import as_groups
from mpo.data.tokenization import set_chat_template, tokenize_groups
from mpo.errors import ModelError, StorageError
from mpo.modeling.head import attach_reward_gap_head
from mpo.modeling.identity import fingerprint_folder, fingerprint_module
from mpo.modeling.layout import BatchShape
from mpo.training import reference as subject
from mpo.training.reference import HIDDEN, LOGPS, STATES, GroupReference, Stored, build_or_load, cache_bytes
from mpo.training.unique_pairs import unique_sources
from tests import runs
from tests.tiny import build_model, build_tokenizer, random_groups, save_tiny

SHAPE = BatchShape(
    layout="tree", max_tokens_per_row=128, pad_token_id=0, pooling="mean", tokens_per_batch=256
)


class OneRank:
    num_processes, process_index, is_main_process = 1, 0, True
    device = torch.device("cpu")

    def wait_for_everyone(self) -> None:
        pass


class Forward:
    """Counts how often the reference model is entered, called, and for how many trees."""

    def __init__(
        self, model: PreTrainedModel, before_call: Callable[[int], None] = lambda call: None
    ) -> None:
        self.model, self.before_call = model, before_call
        self.entered = self.calls = self.trees = 0

    @contextmanager
    def __call__(self) -> Iterator[Callable[..., Any]]:
        self.entered += 1

        def call(**batch: Any) -> Any:
            self.calls += 1
            self.before_call(self.calls)
            output = self.model(**batch)
            self.trees += len(output.response_logps)
            return output

        yield call


@contextmanager
def forbidden() -> Iterator[Any]:
    raise AssertionError("the reference model was entered, although the cache holds its values")
    yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = build_model("llama")
    attach_reward_gap_head(model)
    return model


def tokenize(rows: list[dict[str, Any]], **options: Any) -> Dataset:
    tokenizer = build_tokenizer("llama")
    set_chat_template(tokenizer, None)
    return tokenize_groups(as_groups(rows), tokenizer, **options)[0]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return random_groups(1, 7, (1, 3))


@pytest.fixture(scope="module")
def dataset(rows: list[dict[str, Any]]) -> Dataset:
    return tokenize(rows)


def build(
    dataset: Dataset,
    forward: Any,
    folder: Path,
    *,
    shape: BatchShape = SHAPE,
    key: Any = None,
    ranks: Any = None,
) -> GroupReference:
    return build_or_load(
        dataset,
        forward,
        cache_dir=str(folder),
        key=key or {"weights": "w"},
        shape=shape,
        hidden_size=32,
        ranks=ranks or OneRank(),
    )


def caches(folder: Path) -> list[Path]:
    """Finished cache folders below ``folder``."""
    return (
        sorted(path for path in folder.iterdir() if not path.name.endswith(".part"))
        if folder.exists()
        else []
    )


def values(reference: GroupReference) -> tuple[np.ndarray, np.ndarray]:
    return np.array(reference.gap), np.stack([reference.hidden(i) for i in range(len(reference.gap))])


# ---- What is computed --------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_values(model: PreTrainedModel, dataset: Dataset, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """One sequence at a time with full logits, in float64 after the model."""
    gaps, pooled = [], []
    for row in dataset:
        rewards, states = [], []
        for response in (row["source_chosen"], row["source_rejected"]):
            ids = torch.tensor([row["source_prompt"] + response])
            output = model(input_ids=ids, output_hidden_states=True)
            log_probs = output.logits.double().log_softmax(-1)[0, :-1]
            picked = log_probs.gather(-1, ids[0, 1:, None])[len(row["source_prompt"]) - 1 :, 0]
            rewards.append(picked.mean().item())
            hidden = output.hidden_states[-1][0].double()
            states.append((hidden.mean(0) if pooling == "mean" else hidden[-1]).numpy())
        gaps.append(rewards[0] - rewards[1])
        pooled.append(states)
    return np.array(gaps), np.array(pooled)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_the_values_are_those_of_a_direct_call_of_the_model(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, pooling: str, layout: str
) -> None:
    shape = BatchShape(layout, 128, 0, pooling, 256)
    gap, hidden = values(build(dataset, Forward(model), tmp_path, shape=shape))
    expected_gap, expected_hidden = plain_values(model, dataset, pooling)
    assert np.abs(expected_gap).max() > 0.05
    np.testing.assert_allclose(gap, expected_gap, atol=2e-5)
    np.testing.assert_allclose(hidden, expected_hidden, atol=2e-5)


@pytest.mark.parametrize(
    ("sources", "targets"),
    [((LOGPS, HIDDEN), ()), ((LOGPS, STATES), (LOGPS, STATES)), ((), (LOGPS, HIDDEN))],
    ids=str,
)
def test_what_the_cache_takes_of_the_disk_is_known_before_the_pass(
    model: PreTrainedModel,
    dataset: Dataset,
    tmp_path: Path,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
) -> None:
    stored = Stored(frozenset(sources), frozenset(targets))
    known = cache_bytes(dataset, stored, 32)
    build_or_load(
        dataset, Forward(model), cache_dir=str(tmp_path), key={"weights": "w"}, shape=SHAPE, hidden_size=32,
        ranks=OneRank(), stored=stored,
    )  # fmt: skip
    assert known == sum(np.load(path, mmap_mode="r").nbytes for path in tmp_path.rglob("*.npy")) > 0


def test_results_do_not_depend_on_the_token_budget(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    calls = []
    results = []
    for budget in (1, 100, 10_000):
        forward = Forward(model)
        shape = BatchShape("tree", max(budget, 64), 0, "mean", budget)
        results.append(values(build(dataset, forward, tmp_path / str(budget), shape=shape)))
        calls.append(forward.calls)
    assert calls[0] == len(dataset) and calls[0] > calls[1] > calls[2] == 1
    for gap, hidden in results[1:]:
        np.testing.assert_allclose(gap, results[0][0], atol=1e-5)
        np.testing.assert_allclose(hidden, results[0][1], atol=1e-5)


def test_a_source_that_several_groups_share_is_computed_once(model: PreTrainedModel, tmp_path: Path) -> None:
    rows = random_groups(2, 4, (6, 6), words=(1, 4))
    groups = tokenize(rows, max_targets_per_group=2)
    assert len(groups) == 12
    forward = Forward(model)
    reference = build(groups, forward, tmp_path)
    assert forward.trees == 4
    assert reference.store.logps.shape == (4, 2)
    for first in range(0, 12, 3):
        assert len(set(reference.gap[first : first + 3])) == 1
    gap, hidden = values(build(tokenize(rows), Forward(model), tmp_path / "whole"))
    np.testing.assert_array_equal(reference.gap[::3], gap)
    np.testing.assert_array_equal(np.stack([reference.hidden(i) for i in range(0, 12, 3)]), hidden)


def test_sources_that_differ_in_one_part_only_are_different(rows: list[dict[str, Any]]) -> None:
    base = {"source_prompt": [5, 6], "source_chosen": [7], "source_rejected": [8]}
    others = [
        {**base, "source_rejected": [9]},
        {**base, "source_chosen": [9]},
        {**base, "source_prompt": [5, 6, 6]},
        # The same tokens in a row, cut elsewhere.
        {**base, "source_prompt": [5], "source_chosen": [6, 7]},
        {**base, "source_chosen": [7, 8], "source_rejected": [8]},
    ]
    source_of_group, first_group, digest = unique_sources(Dataset.from_list([base, *others, base]))
    assert source_of_group.tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert first_group.tolist() == [0, 1, 2, 3, 4, 5]
    assert digest != unique_sources(Dataset.from_list([base, *others[::-1]]))[2]


def test_sources_are_found_through_a_selection_of_rows(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    order = [4, 2, 2, 6]
    gap, hidden = values(build(dataset.select(order), Forward(model), tmp_path))
    expected_gap, expected_hidden = plain_values(model, dataset, "mean")
    np.testing.assert_allclose(gap, expected_gap[order], atol=2e-5)
    np.testing.assert_allclose(hidden, expected_hidden[order], atol=2e-5)


# ---- What is read again ------------------------------------------------------------------------------------------


def test_a_second_run_reads_the_cache_without_entering_the_model(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    first = values(build(dataset, Forward(model), tmp_path))
    second = values(build(dataset, forbidden, tmp_path))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_reading_maps_the_files_instead_of_loading_them(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    for forward in (Forward(model), forbidden):
        store = build(dataset, forward, tmp_path).store
        for array in (store.logps, store.hidden):
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("weights", {"key": {"weights": "other"}}),
        ("a further part of the key", {"key": {"weights": "w", "dtype": "torch.bfloat16"}}),
        ("pooling", {"shape": BatchShape("tree", 128, 0, "last", 256)}),
    ],
)
def test_a_changed_key_misses_the_cache(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, name: str, changed: dict[str, Any]
) -> None:
    build(dataset, Forward(model), tmp_path)
    forward = Forward(model)
    build(dataset, forward, tmp_path, **changed)
    assert forward.entered == 1, name
    assert len(caches(tmp_path)) == 2


def test_one_changed_token_of_one_source_misses_the_cache(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    build(dataset, Forward(model), tmp_path)
    for part in ("source_prompt", "source_chosen", "source_rejected"):
        changed = list(dataset)
        changed[3][part][-1] ^= 1
        forward = Forward(model)
        build(Dataset.from_list(changed, features=dataset.features), forward, tmp_path)
        assert forward.entered == 1, part


def test_changed_targets_or_budgets_do_not_miss_the_cache(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    build(dataset, Forward(model), tmp_path)
    changed = list(dataset)
    for row in changed:
        row["target_chosen"][0] = [9, 9, 9]
    build(Dataset.from_list(changed, features=dataset.features), forbidden, tmp_path)
    build(dataset, forbidden, tmp_path, shape=BatchShape("tree", 512, 0, "mean", 4096))


# ---- What is not trusted -----------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "hidden.npy is truncated": lambda folder: truncate(folder / "hidden.npy"),
    "logps.npy is truncated": lambda folder: truncate(folder / "logps.npy"),
    "hidden.npy is longer": lambda folder: (folder / "hidden.npy").open("ab").write(b"\0"),
    "a byte of the first value is flipped": lambda folder: flip(folder / "hidden.npy", 128),
    "the last byte is flipped": lambda folder: flip(folder / "logps.npy", -1),
    "a header is flipped": lambda folder: flip(folder / "hidden.npy", 20),
    "hidden.npy is missing": lambda folder: (folder / "hidden.npy").unlink(),
    "the index is missing": lambda folder: (folder / "index.json").unlink(),
    "the index is empty": lambda folder: (folder / "index.json").write_text(""),
    "the index is a list": lambda folder: (folder / "index.json").write_text("[]"),
    "the index lists nothing": lambda folder: (folder / "index.json").write_text('{"files": {}}'),
    "the index lists no sizes": lambda folder: (folder / "index.json").write_text(
        '{"files": {"logps.npy": 1, "hidden.npy": 2}}'
    ),
    "the folder is empty": empty,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_noticed_and_built_again(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, damage: str
) -> None:
    expected = values(build(dataset, Forward(model), tmp_path))
    (folder,) = caches(tmp_path)
    DAMAGE[damage](folder)
    forward = Forward(model)
    again = values(build(dataset, forward, tmp_path))
    assert forward.entered == 1
    for a, b in zip(expected, again, strict=True):
        np.testing.assert_array_equal(a, b)
    build(dataset, forbidden, tmp_path)


def test_damage_is_reported_in_a_process_without_an_accelerator(
    model: PreTrainedModel,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build(dataset, Forward(model), tmp_path)
    (folder,) = caches(tmp_path)
    flip(folder / "logps.npy", -1)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    build(dataset, Forward(model), tmp_path)
    assert "damaged" in caplog.text and "logps.npy" in caplog.text


def test_damage_that_cannot_be_removed_is_an_error_and_not_used(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(dataset, Forward(model), tmp_path)
    (folder,) = caches(tmp_path)
    flip(folder / "logps.npy", -1)
    # What happens in a folder that may be read only; permissions do not bind the superuser who may run the tests.
    monkeypatch.setattr(subject.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(StorageError, match="damaged"):
        build(dataset, Forward(model), tmp_path)


def test_a_pass_that_was_killed_leaves_nothing_that_is_used(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    def stop(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    shape = BatchShape("tree", 128, 0, "mean", 64)
    with pytest.raises(KeyboardInterrupt):
        build(dataset, Forward(model, stop), tmp_path, shape=shape)
    assert caches(tmp_path) == [], "a pass that did not end has a finished cache"
    assert list(tmp_path.iterdir()), "the pass was stopped before it had written anything"
    forward = Forward(model)
    gap, _ = values(build(dataset, forward, tmp_path, shape=shape))
    assert forward.trees == len(dataset)
    np.testing.assert_allclose(gap, plain_values(model, dataset, "mean")[0], atol=2e-5)


def test_a_kill_before_the_index_is_whole_leaves_nothing_that_is_used(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        build(dataset, Forward(model), tmp_path)
    monkeypatch.undo()
    forward = Forward(model)
    build(dataset, forward, tmp_path)
    assert forward.entered == 1


def test_what_killed_passes_leave_is_removed_when_it_is_old(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    build(dataset, Forward(model), tmp_path)
    (folder,) = caches(tmp_path)
    old, young, foreign = (
        tmp_path / f".{name}.part" for name in (f"{folder.name}.aaa", f"{folder.name}.bbb", "another.ccc")
    )
    for path in (old, young, foreign):
        path.mkdir()
        (path / "hidden.npy").write_bytes(b"x")
    for path in (old / "hidden.npy", old, foreign / "hidden.npy", foreign):
        os.utime(path, (time.time() - 3 * 24 * 3600,) * 2)
    shutil.rmtree(folder)
    build(dataset, Forward(model), tmp_path)
    assert not old.exists() and young.exists() and foreign.exists()


def test_two_runs_that_compute_the_same_reference_at_once_do_not_spoil_it(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    # Two runs of a sweep have one key. The second starts while the first is in the middle of its pass, and ends first.
    shape = BatchShape("tree", 128, 0, "mean", 64)
    inner: list[GroupReference] = []

    def start_another(call: int) -> None:
        if call == 2:
            inner.append(build(dataset, Forward(model), tmp_path, shape=shape))

    outer = build(dataset, Forward(model, start_another), tmp_path, shape=shape)
    expected_gap, expected_hidden = plain_values(model, dataset, "mean")
    for reference in (*inner, outer, build(dataset, forbidden, tmp_path, shape=shape)):
        gap, hidden = values(reference)
        np.testing.assert_allclose(gap, expected_gap, atol=2e-5)
        np.testing.assert_allclose(hidden, expected_hidden, atol=2e-5)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_starts_during_the_pass_of_another_and_ends_later_gets_right_values(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    shape = BatchShape("tree", 128, 0, "mean", 64)
    started, finished = threading.Event(), threading.Event()
    results: dict[str, GroupReference] = {}

    def slow() -> None:
        def hold(call: int) -> None:
            if call == 2:
                started.set()
                assert finished.wait(30)

        results["late"] = build(dataset, Forward(model, hold), tmp_path, shape=shape)

    def first(call: int) -> None:
        if call == 2:
            thread.start()
            assert started.wait(30)

    thread = threading.Thread(target=slow)
    results["early"] = build(dataset, Forward(model, first), tmp_path, shape=shape)
    finished.set()
    thread.join(30)
    expected_gap, _ = plain_values(model, dataset, "mean")
    for name in ("early", "late"):
        np.testing.assert_allclose(values(results[name])[0], expected_gap, atol=2e-5, err_msg=name)


# ---- Where it is stored ------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_an_error_before_the_pass(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match="reference_cache_dir"):
        build(dataset, forbidden, blocked / "reference")


def test_a_disk_with_too_little_space_is_an_error_before_the_pass(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(StorageError, match="free"):
        build(dataset, forbidden, tmp_path)


def test_the_space_of_the_cache_is_reserved_before_the_pass(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path
) -> None:
    def look(call: int) -> None:
        (partial,) = (path for path in tmp_path.iterdir() if path.name.endswith(".part"))
        for path in partial.glob("*.npy"):
            status = path.stat()
            assert status.st_blocks * 512 >= status.st_size, (
                "a sparse file ends the process when the disk is full"
            )

    long = tokenize(random_groups(3, 40, (1, 1), words=(1, 2)))
    build(long, Forward(model, look), tmp_path)


def test_a_rank_that_does_not_see_the_folder_says_that_it_must_be_shared(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SecondRank(OneRank):
        num_processes, process_index, is_main_process = 2, 1, False

    monkeypatch.setattr("mpo.training.ranks.broadcast_object_list", lambda objects, from_process: objects)
    monkeypatch.setattr(subject, "_VISIBLE_WITHIN", 0.1)
    with pytest.raises(StorageError, match="shared"):
        build(dataset, forbidden, tmp_path, ranks=SecondRank())


def test_a_rank_that_sees_the_cache_late_waits_for_it_instead_of_starting_a_pass(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(build(dataset, Forward(model), tmp_path))
    (folder,) = caches(tmp_path)
    unseen = folder.rename(tmp_path / "not yet.part")

    class SecondRank(OneRank):
        num_processes, process_index, is_main_process = 2, 1, False

    def broadcast(objects: list[Any], from_process: int) -> None:
        assert objects == [False]
        objects[:] = [True]

    monkeypatch.setattr("mpo.training.ranks.broadcast_object_list", broadcast)
    appear = threading.Timer(0.3, unseen.rename, (folder,))
    appear.start()
    found = values(build(dataset, forbidden, tmp_path, ranks=SecondRank()))
    appear.join()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("budget", [64, 10_000])
def test_ranks_divide_the_sources_and_agree_with_a_single_one(
    model: PreTrainedModel, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    ranks = 3
    barrier = threading.Barrier(ranks, timeout=30)
    shared: list[Any] = []

    def broadcast(objects: list[Any], from_process: int) -> list[Any]:
        if threading.current_thread().name == str(from_process):
            shared[:] = objects
        barrier.wait()
        objects[:] = shared
        barrier.wait()
        return objects

    monkeypatch.setattr("mpo.training.ranks.broadcast_object_list", broadcast)

    class Rank(OneRank):
        num_processes = ranks

        def __init__(self, index: int) -> None:
            self.process_index, self.is_main_process = index, index == 0

        def wait_for_everyone(self) -> None:
            barrier.wait()

    shape = BatchShape("tree", 128, 0, "mean", budget)
    forwards = [Forward(model) for _ in range(ranks)]
    results: dict[int, GroupReference] = {}

    def work(index: int) -> None:
        results[index] = build(dataset, forwards[index], tmp_path / "ranks", shape=shape, ranks=Rank(index))

    threads = [threading.Thread(target=work, args=(i,), name=str(i)) for i in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # A forward is a collective where weights are sharded, so each rank makes as many as the others.
    assert len({forward.calls for forward in forwards}) == 1
    expected = values(build(dataset, Forward(model), tmp_path / "one", shape=shape))
    for index in range(ranks):
        for a, b in zip(values(results[index]), expected, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- What identifies weights -------------------------------------------------------------------------------------


def test_a_folder_of_shards_is_identified_by_its_content(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    first = fingerprint_folder(folder)
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert fingerprint_folder(copied) == first
    flip(copied / "model.safetensors", -1)
    assert fingerprint_folder(copied) != first
    assert fingerprint_folder(save_tiny("llama", tmp_path / "other", seed=1)) != first


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="safetensors"):
        fingerprint_folder(tmp_path)


def test_a_loaded_model_is_identified_by_all_its_tensors() -> None:
    model = build_model("llama")
    first = fingerprint_module(model)
    assert fingerprint_module(build_model("llama")) == first
    assert fingerprint_module(build_model("llama", dtype=torch.bfloat16)) != first
    for name, parameter in model.named_parameters():
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        assert fingerprint_module(model) != first, name
        parameter.data = old
    assert fingerprint_module(model) == first
    assert fingerprint_module(get_peft_model(copy.deepcopy(model), runs.lora())) != first


def test_weights_that_are_not_here_have_no_identity() -> None:
    assert fingerprint_module(build_model("llama").to("meta")) is None


# ---- The trainer's key -------------------------------------------------------------------------------------------

TEMPLATE = build_tokenizer("llama").chat_template


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def edited(folder: Path, copy_at: Path, file: str, **changes: Any) -> Path:
    """A copy of a model folder with changes in one JSON file."""
    shutil.copytree(folder, copy_at)
    content = json.loads((copy_at / file).read_text(encoding="utf-8"))
    (copy_at / file).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return copy_at


def long_rows() -> list[dict[str, Any]]:
    """Rows of which one source is longer than all the others."""
    rows = random_groups(0, 5, words=(1, 6))
    rows[1]["source"]["chosen"][0]["content"] += " river" * 60
    return rows


def look_up(folder: Path, tmp_path: Path, rows: Any = None, **arguments: Any) -> int:
    """Number of caches after a trainer with these arguments has its reference."""
    trainer = runs.trainer(folder, tmp_path, rows or long_rows(), **arguments)
    trainer.get_train_dataloader()
    return len(caches(tmp_path / "reference"))


def test_a_trainer_with_the_same_inputs_hits_the_cache_whatever_else_is_set(
    folder: Path, tmp_path: Path
) -> None:
    assert look_up(folder, tmp_path) == 1
    assert look_up(folder, tmp_path) == 1
    assert look_up(folder, tmp_path, learning_rate=1e-3, seed=9, beta=1.5, gradient_accumulation_steps=2) == 1
    assert look_up(folder, tmp_path, peft_config=runs.lora(r=2)) == 1, (
        "the base of an adapter is the same reference"
    )
    assert look_up(Path(shutil.copytree(folder, tmp_path / "moved")), tmp_path) == 1
    assert look_up(folder, tmp_path, max_length=900) == 1, "no row is that long"


CHANGES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "weights in a folder": lambda folder, tmp: {"folder": save_tiny("llama", tmp / "other", seed=1)},
    "config.json": lambda folder, tmp: {
        "folder": edited(folder, tmp / "other", "config.json", rms_norm_eps=0.1),
    },
    "the configuration by model_init_kwargs": lambda folder, tmp: {
        "model_init_kwargs": {"rms_norm_eps": 0.1},
    },
    "pooling": lambda folder, tmp: {"retain_pooling": "last"},
    "maximum length": lambda folder, tmp: {"max_length": 60},
    "maximum response length": lambda folder, tmp: {"max_response_length": 12},
    "chat template": lambda folder, tmp: {"chat_template": TEMPLATE.replace("<|eot_id|>", "<|eot_id|>\n")},
    "rows": lambda folder, tmp: {"rows": random_groups(1, 5, words=(1, 6))},
    "dtype of the weights": lambda folder, tmp: {
        "model_init_kwargs": {"dtype": "bfloat16"},
        "peft_config": runs.lora(),
    },
    "mixed precision": lambda folder, tmp: {"bf16": True},
    "explicit reference": lambda folder, tmp: {"ref_model": build_model("llama", seed=4)},
    "an adapter to go on from": lambda folder, tmp: {
        "folder": get_peft_model(build_model("llama"), runs.lora(init_lora_weights=False)),
        "processing_class": build_tokenizer("llama"),
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_trainer_with_a_changed_input_misses_the_cache(folder: Path, tmp_path: Path, change: str) -> None:
    assert look_up(folder, tmp_path) == 1
    arguments = {"folder": folder, "tmp_path": tmp_path, **CHANGES[change](folder, tmp_path)}
    assert look_up(**arguments) == 2


def test_adapters_to_go_on_from_are_told_apart(tmp_path: Path) -> None:
    for number, seed in enumerate((0, 1), start=1):
        torch.manual_seed(seed)
        model = get_peft_model(build_model("llama"), runs.lora(init_lora_weights=False))
        assert look_up(model, tmp_path, processing_class=build_tokenizer("llama")) == number


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}]
)
def test_adapters_of_the_same_tensors_that_compute_something_else_are_told_apart(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    for number, more in enumerate(({}, settings), start=1):
        torch.manual_seed(0)
        model = get_peft_model(build_model("llama"), runs.lora(init_lora_weights=False, **more))
        assert look_up(model, tmp_path, processing_class=build_tokenizer("llama")) == number


def test_an_adapter_that_starts_from_noise_is_neither_its_base_nor_other_noise(
    folder: Path, tmp_path: Path
) -> None:
    noise = runs.lora(init_lora_weights=False)
    assert look_up(folder, tmp_path, peft_config=runs.lora()) == 1
    assert look_up(folder, tmp_path, peft_config=noise) == 2
    assert look_up(folder, tmp_path, peft_config=noise) == 2, "the same seed draws the same noise"
    assert look_up(folder, tmp_path, peft_config=noise, seed=4) == 3


def test_a_tokenizer_with_other_ids_misses_the_cache(folder: Path, tmp_path: Path) -> None:
    assert look_up(folder, tmp_path) == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["river"])
    model = build_model("llama", vocab=len(tokenizer))
    look_up(model, tmp_path, processing_class=tokenizer)
    plain = runs.trainer(folder, tmp_path).train_dataset["source_prompt"]
    other = runs.trainer(model, tmp_path, processing_class=tokenizer).train_dataset["source_prompt"]
    assert list(plain) != list(other)
    assert len(caches(tmp_path / "reference")) == 2


def test_a_trainer_whose_cache_is_there_starts_without_any_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_groups(random.Random(5), 4, words=(1, 4))
    runs.trainer(folder, tmp_path, rows, eval_dataset=rows[:2], max_steps=1).train()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a reference pass was run")

    monkeypatch.setattr(subject, "_run_pass", refuse)
    runs.trainer(folder, tmp_path, rows, eval_dataset=rows[:2], max_steps=1).train()
    with pytest.raises(AssertionError, match="reference pass"):
        runs.trainer(folder, tmp_path, rows[1:], max_steps=1).train()
