from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from mpo.training import notebook
from mpo.training.config import MPOConfig
from mpo.training.notebook import NotebookProgress
from mpo.training.progress import TrainingProgress
from tests import runs


class Screen:
    """What a notebook would show: each display by its handle, as it was last written."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.written = 0

    def display(self, page: str, display_id: bool = False) -> Any:
        assert display_id
        place = len(self.shown)
        self.shown.append(page)

        def update(page: str) -> None:
            self.written += 1
            self.shown[place] = page

        return types.SimpleNamespace(update=update)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A stand-in for IPython's display, which is not among the dependencies."""
    screen = Screen()
    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, screen.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return screen


def test_one_table_is_rewritten_with_the_held_out_gaps_the_sources_first(
    screen: Screen, tmp_path: Path
) -> None:
    args = MPOConfig(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(max_steps=20, is_world_process_zero=True), TrainerControl()
    progress = NotebookProgress()
    progress.on_train_begin(args, state, control)
    assert "Step 0 of 20" in screen.shown[0] and "<table>" not in screen.shown[0]
    for step in range(1, 21):
        state.global_step = step
        progress.on_log(args, state, control, logs={"loss": 1 / step, "loss/reward_gap": 0.5})
        if step % 10 == 0:
            gaps = {"eval_reward_gap/sw": -0.25, "eval_reward_gap/en": step / 10, "eval_reward_gap/<b>": 1.0}
            progress.on_log(args, state, control, logs={"eval_loss": 0.5, **gaps})
        progress.on_step_end(args, state, control)
    progress.on_train_end(args, state, control)
    (page,) = screen.shown
    assert "Step 20 of 20" in page and "left" not in page
    assert "loss 0.0500, gap 0.5000" in page
    assert "<th>step 10</th><th>step 20</th>" in page
    rows = [row.split("</th>")[0].removeprefix("<th>") for row in page.split("<tr>")[2:]]
    assert rows == ["en", "&lt;b&gt;", "sw"]
    assert "<td>+1.000</td><td>+2.000</td>" in page and "<td>\N{MINUS SIGN}0.250</td>" in page
    assert screen.written < 8  # not at every step


def test_many_evaluations_keep_the_first_and_the_last(screen: Screen, tmp_path: Path) -> None:
    args = MPOConfig(output_dir=str(tmp_path), use_cpu=True)
    state, progress = TrainerState(max_steps=20, is_world_process_zero=True), NotebookProgress()
    progress.on_train_begin(args, state, TrainerControl())
    for step in range(1, 21):
        state.global_step = step
        progress.on_log(args, state, TrainerControl(), logs={"eval_reward_gap/en": float(step)})
    page = screen.shown[0]
    shown = [int(part.split("<")[0]) for part in page.split("<th>step ")[1:]]
    assert shown == [1, 14, 15, 16, 17, 18, 19, 20]


def test_other_ranks_write_nothing(screen: Screen, tmp_path: Path) -> None:
    args = MPOConfig(output_dir=str(tmp_path), use_cpu=True)
    state, progress = TrainerState(max_steps=2, is_world_process_zero=False), NotebookProgress()
    progress.on_train_begin(args, state, TrainerControl())
    progress.on_train_end(args, state, TrainerControl())
    assert screen.shown == []


@pytest.mark.usefixtures("accelerator_of_its_own")
@pytest.mark.parametrize("in_notebook", [True, False])
def test_a_trainer_shows_its_run_as_fits_the_place(
    in_notebook: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "is_in_notebook", lambda: in_notebook)
    wanted, other = (
        (NotebookProgress, TrainingProgress) if in_notebook else (TrainingProgress, NotebookProgress)
    )
    run = runs.trainer(model, tmp_path)
    kinds = [type(each) for each in run.callback_handler.callbacks]
    assert kinds.count(wanted) == 1
    assert not {other, PrinterCallback, ProgressCallback} & {*kinds}
    given = runs.trainer(model, tmp_path, callbacks=[other()])
    kinds = [type(each) for each in given.callback_handler.callbacks]
    assert kinds.count(other) == 1 and wanted not in kinds
