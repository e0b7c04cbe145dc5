"""Work in several processes: the same results in the same order, and no process that outlives what began it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from mpo.common import processes
from mpo.common.processes import in_order
from mpo.data import RowError
from mpo.errors import ProcessLostError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def squares(number: int, first: int, step: int) -> Iterator[int]:
    for part in range(first, number, step):
        time.sleep(0.001 * (part % 3))
        yield part * part


@pytest.mark.parametrize("number", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("several", [1, 2, 3])
def test_results_come_in_the_order_of_the_parts(number: int, several: int) -> None:
    assert list(in_order(partial(squares, number), several)) == [part * part for part in range(number)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("several", [1, 2, 3])
def test_an_error_comes_behind_the_results_before_it_and_as_it_was(several: int) -> None:
    def work(first: int, step: int) -> Iterator[int]:
        for part in range(first, 9, step):
            if part >= 4:
                raise RowError("is empty.", file=f"pairs {part}", row=part, field="chosen")
            yield part

    found = []
    with pytest.raises(RowError) as caught:
        for result in in_order(work, several):
            found.append(result)
    assert found == [0, 1, 2, 3]
    assert str(caught.value) == "pairs 4, row 4, field `chosen`: is empty."
    assert (caught.value.reason, caught.value.row) == ("is empty.", 4)


def test_an_error_that_cannot_be_sent_is_told() -> None:
    class Local(Exception):
        pass

    def work(first: int, step: int) -> Iterator[int]:
        raise Local("what happened")
        yield 0

    with pytest.raises(RuntimeError, match="what happened"):
        list(in_order(work, 2))


@pytest.mark.parametrize("when", [0, 5])
def test_a_process_that_is_killed_is_an_error_and_no_hang(when: int) -> None:
    def work(first: int, step: int) -> Iterator[int]:
        for part in range(first, 100, step):
            if part == when:
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

    found = []
    with pytest.raises(ProcessLostError, match="ended by SIGKILL"):
        for result in in_order(work, 2):
            found.append(result)
    assert found == list(range(when))
    assert not multiprocessing.active_children()


def test_who_stops_early_leaves_no_process() -> None:
    results = in_order(partial(squares, 1000), 2)
    assert list(islice(results, 3)) == [0, 1, 4]
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("begun", [0, 1])
def test_without_room_for_a_process_the_work_is_done_here(
    monkeypatch: pytest.MonkeyPatch, begun: int
) -> None:
    fork, calls = os.fork, []

    def refuse() -> int:
        calls.append(1)
        if len(calls) > begun:
            raise OSError(12, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    assert list(in_order(partial(squares, 5), 3)) == [0, 1, 4, 9, 16]
    assert len(calls) == begun + 1 and not multiprocessing.active_children()


_ENDLESS = """
import os, time
from mpo.common.processes import in_order

def work(first, step):
    os.write(1, b"%d\\n" % os.getpid())
    while True:
        time.sleep(0.05)
        yield bytes(1 << 20)

for result in in_order(work, 2):
    pass
"""


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # one that nobody has asked for its status has ended, too


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, None), (signal.SIGKILL, -9)])
def test_nothing_runs_on_when_the_first_process_is_told_to_end(
    tmp_path: Path, sent: signal.Signals, status: int | None
) -> None:
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    root = Path(processes.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    ) as started:
        assert started.stdout is not None and started.stderr is not None
        try:
            others = [int(started.stdout.readline()) for _ in range(2)]
            time.sleep(0.2)
            if sent == signal.SIGINT:
                os.killpg(started.pid, sent)  # as a terminal does
                started.wait(30)
        finally:
            started.kill()
        # With another process alive, which holds the pipe, this would not end.
        errors = started.stderr.read()
        ended = started.wait(30)
    assert status is None or ended == status
    assert errors.count("Traceback") == (sent == signal.SIGINT)
    latest = time.monotonic() + 30  # files are closed a moment before a process has ended
    while any(map(_runs, others)):
        assert time.monotonic() < latest
        time.sleep(0.05)


def test_ranks_of_a_run_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 8)
    assert processes.available() == 8
    monkeypatch.setattr(processes, "cores", lambda: 128)
    assert processes.available() == 8
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert processes.available() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert processes.available() == 1
