"""Checkpoints are complete or absent: the marker, finding the last complete one, and rotation."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState, TrainingArguments

from mpo.training import checkpoints as subject
from mpo.training.checkpoints import (
    MARKER,
    checkpoints,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    rotate,
    saved_state,
)
from mpo.training.trainer import MPOTrainer
from tests import runs
from tests.tiny import random_groups, save_tiny

FILES = {"model.safetensors": b"m" * 100, "optimizer.pt": b"o" * 50, "nested/rng_state_0.pth": b"r" * 10}


def write(folder: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if complete:
        mark_complete(checkpoint, {"data_seed": 1})
    return checkpoint


def test_a_best_step_that_was_not_saved_is_said(caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_steps=3, use_cpu=True
    )
    state = TrainerState(global_step=6, best_global_step=1)
    subject.warn_if_none_is_best(args, state)
    assert (
        "`eval_loss` was best at step 1, of which there is none. The model has the weights of its last step, 6"
        in (caplog.text)
    )
    caplog.clear()
    state.best_model_checkpoint = "checkpoint-1"
    subject.warn_if_none_is_best(args, state)
    assert not caplog.text


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


def test_a_marked_checkpoint_is_complete_and_carries_its_state(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 5, complete=False)
    assert not is_complete(checkpoint)
    assert saved_state(checkpoint) == {}
    mark_complete(checkpoint, {"data_seed": 7, "min_source_gap": None})
    assert is_complete(checkpoint)
    assert saved_state(checkpoint) == {"data_seed": 7, "min_source_gap": None}
    assert not list(checkpoint.glob("*.part"))


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("harm", ["truncated", "grown", "missing"])
def test_a_checkpoint_with_a_file_of_another_size_is_not_complete(
    tmp_path: Path, name: str, harm: str
) -> None:
    checkpoint = write(tmp_path, 5)
    if harm == "missing":
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(FILES[name][:-1] if harm == "truncated" else FILES[name] + b"x")
    assert not is_complete(checkpoint)
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "marker",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"files": 3}',
        '{"files": ["a"]}',
        '{"files": {"a": 1}}',
        "\x00\xff",
    ],
)
def test_a_damaged_marker_marks_nothing(tmp_path: Path, marker: str) -> None:
    checkpoint = write(tmp_path, 5)
    (checkpoint / MARKER).write_text(marker, encoding="latin-1")
    assert not is_complete(checkpoint)
    assert saved_state(checkpoint) == {}


def test_files_are_on_the_disk_before_the_marker_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path, 5, complete=False)
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watch_replace(source: str | Path, target: str | Path) -> None:
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    mark_complete(checkpoint, {})
    written = events[: events.index("renamed")]
    assert {Path(name).name for name in FILES} <= set(written)
    assert written[-1].lstrip(".").startswith(MARKER)


def test_a_marker_that_was_being_written_marks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path, 5, complete=False)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        mark_complete(checkpoint, {})
    assert not is_complete(checkpoint)


def test_checkpoints_are_ordered_by_step_and_nothing_else_is_one(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        write(tmp_path, step)
    for other in (
        "checkpoint-",
        "checkpoint-12a",
        "checkpoint-5.partial",
        "my-checkpoint-7",
        "checkpoint--3",
    ):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert steps(tmp_path) == [9, 20, 100]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "absent") == []
    assert last_complete_checkpoint(tmp_path / "absent") is None
    assert last_complete_checkpoint(tmp_path) is None
    rotate(tmp_path, 1)
    rotate(tmp_path / "absent", 1)


def test_the_last_complete_checkpoint_is_not_the_half_written_one_after_it(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    write(tmp_path, 30, complete=False)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_rotation_keeps_the_newest(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    rotate(tmp_path, keep)
    assert steps(tmp_path) == left


def test_rotation_keeps_the_protected_one_within_the_limit(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    rotate(tmp_path, 2, protected=str(tmp_path / "checkpoint-1"))
    assert steps(tmp_path) == [1, 4]
    rotate(tmp_path, 1, protected=str(tmp_path / "checkpoint-1"))
    assert steps(tmp_path) == [1, 4]


def test_rotation_deletes_half_written_ones_before_the_newest_and_never_counts_them(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, complete=False)
    write(tmp_path, 3)
    write(tmp_path, 4, complete=False)
    rotate(tmp_path, 2)
    assert steps(tmp_path) == [1, 3, 4]


def test_rotation_without_any_complete_checkpoint_deletes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, complete=False)
    write(tmp_path, 2, complete=False)
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [1, 2]


def test_a_kill_during_rotation_leaves_no_folder_that_only_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(tmp_path, step)

    def half(folder: Path, **_: object) -> None:
        (Path(folder) / "nested" / "rng_state_0.pth").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(subject.shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    assert not (tmp_path / "checkpoint-1" / MARKER).exists()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    monkeypatch.undo()
    rotate(tmp_path, 1)
    assert steps(tmp_path) == [2]


@settings(deadline=None, max_examples=30)
@given(
    present=st.dictionaries(st.integers(min_value=1, max_value=50), st.booleans(), max_size=8),
    keep=st.one_of(st.none(), st.integers(min_value=1, max_value=5)),
    data=st.data(),
)
def test_whatever_is_there_rotation_keeps_what_a_run_can_resume_from(
    present: dict[int, bool], keep: int | None, data: st.DataObject
) -> None:
    complete = sorted(step for step, is_whole in present.items() if is_whole)
    protected = data.draw(st.sampled_from([None, *complete]))
    folder = Path(tempfile.mkdtemp())
    try:
        for step, is_whole in present.items():
            write(folder, step, complete=is_whole)
        rotate(folder, keep, None if protected is None else str(folder / f"checkpoint-{protected}"))
        left = steps(folder)
        if not complete:
            assert left == sorted(present)
            return
        newest = complete[-1]
        kept = [step for step in left if present[step]]
        assert newest in kept
        assert protected is None or protected in kept
        if keep is None:
            assert kept == complete
        else:
            # The protected one stays even where the limit is one.
            assert len(kept) == min(len(complete), max(keep, len({newest, protected} - {None})))
            others = [step for step in kept if step not in (newest, protected)]
            assert (
                others
                == [step for step in complete if step not in (newest, protected)][
                    -len(others) or len(complete) :
                ]
            )
        assert [step for step in left if not present[step]] == sorted(
            step for step, is_whole in present.items() if not is_whole and step > newest
        )
    finally:
        shutil.rmtree(folder)


def test_the_marker_can_be_read_by_a_person(tmp_path: Path) -> None:
    marker = json.loads((write(tmp_path, 5) / MARKER).read_text(encoding="utf-8"))
    assert marker["files"] == {name: len(content) for name, content in FILES.items()}


# ---- A disk that is full -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


class AtStep(TrainerCallback):
    """Does something after step ``step``, before it is saved, and undoes it before the next step."""

    def __init__(self, step: int, begin: Callable[[], Any], end: Callable[[], Any]) -> None:
        self.step, self.begin, self.end = step, begin, end

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.end()


def saved_run(model: Path, folder: Path, callback: AtStep | None = None, **settings: Any) -> MPOTrainer:
    return runs.trainer(
        model,
        folder,
        random_groups(0, 4, (1, 2), words=(1, 4)),
        save_strategy="steps",
        save_steps=1,
        callbacks=[callback] if callback else None,
        **settings,
    )


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")

FAILURES: dict[str, tuple[str, Exception]] = {
    "the optimizer": ("torch.save", NO_SPACE),
    "the optimizer, as torch reports it": (
        "torch.save",
        RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos 64 vs 0"),
    ),
    "the model": ("transformers.modeling_utils.safe_save_file", NO_SPACE),
    "the model, as safetensors reports it": (
        "transformers.modeling_utils.safe_save_file",
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ),
    "the trainer's state": ("transformers.TrainerState.save_to_json", NO_SPACE),
    "the marker": ("mpo.training.checkpoints.mark_complete", NO_SPACE),
}


@pytest.mark.parametrize("part", FAILURES)
def test_a_checkpoint_that_cannot_be_saved_does_not_end_the_run_or_leave_a_half(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    name, error = FAILURES[part]
    patch = pytest.MonkeyPatch()
    out = tmp_path / "out"
    during: list[list[int]] = []

    def end() -> None:
        patch.undo()
        during.append(steps(out))

    trainer = saved_run(
        model, tmp_path, AtStep(3, lambda: patch.setattr(name, failing(error)), end), save_total_limit=1
    )
    try:
        trainer.train()
    finally:
        patch.undo()
    assert trainer.state.global_step == 4
    assert during == [[2]], "the older checkpoint survives, and no half of the new one is left"
    assert steps(out) == [4] and is_complete(out / "checkpoint-4")
    message = next(r.getMessage() for r in caplog.records if "could not be saved" in r.getMessage())
    assert "step 3" in message and "checkpoint-2" in message
    assert trainer.args.save_total_limit == 1


def test_a_real_limit_of_the_file_system_does_not_end_the_run(model: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    during: list[list[int]] = []

    def end() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        during.append(steps(out))

    # The model's file is longer than this.
    callback = AtStep(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)), end)
    trainer = saved_run(model, tmp_path, callback, save_total_limit=1)
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert during == [[1]]
    assert steps(out) == [4] and is_complete(out / "checkpoint-4")


def test_a_run_that_could_not_save_resumes_from_the_one_before(model: Path, tmp_path: Path) -> None:
    patch = pytest.MonkeyPatch()
    stop = KeyboardInterrupt()

    def end() -> None:
        patch.undo()
        raise stop

    trainer = saved_run(
        model, tmp_path, AtStep(3, lambda: patch.setattr("torch.save", failing(NO_SPACE)), end)
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        patch.undo()
    again = saved_run(model, tmp_path)
    again.train(resume_from_checkpoint="auto")
    whole = saved_run(model, tmp_path / "whole")
    whole.train()
    assert runs.differing(runs.weights(again.model), runs.weights(whole.model)) == []


def test_what_another_rank_could_not_save_is_not_declared_complete(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = saved_run(model, tmp_path, max_steps=1)
    trainer.train()
    trainer.state.global_step = 2
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr("mpo.training.ranks.gather_object", lambda problems: [*problems, "full over there"])
    trainer._save_checkpoint(trainer.model_wrapped, None)
    assert steps(tmp_path / "out") == [1]
    assert any("full over there" in message for message in caplog.messages)


def test_only_the_main_process_declares_and_removes_checkpoints(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = saved_run(model, tmp_path, max_steps=2, save_total_limit=1)
    trainer.train()
    out = tmp_path / "out"
    assert steps(out) == [2]
    left = out / "checkpoint-3" / "of-another-rank"
    left.parent.mkdir()
    left.touch()
    trainer.state.global_step = 3
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    trainer._save_checkpoint(trainer.model_wrapped, None)
    assert steps(out) == [2, 3] and left.exists()
    assert not is_complete(out / "checkpoint-3")
    trainer._run.set_earlier_aside(None)
    assert last_complete_checkpoint(out) == out / "checkpoint-2"


def test_an_error_that_is_not_the_disks_is_not_swallowed(model: Path, tmp_path: Path) -> None:
    patch = pytest.MonkeyPatch()
    fail = failing(RuntimeError("a mistake in the program"))
    trainer = saved_run(model, tmp_path, AtStep(2, lambda: patch.setattr("torch.save", fail), patch.undo))
    try:
        with pytest.raises(RuntimeError, match="a mistake in the program"):
            trainer.train()
    finally:
        patch.undo()
    assert last_complete_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-1"
