from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from mpo.common import files
from mpo.common.files import (
    ABANDONED_AFTER,
    PART,
    check_writable,
    publish,
    remove_leftovers,
    whole_folder,
    write_bytes,
    write_json,
    write_text,
)
from mpo.errors import ModelError, MPOError, StorageError


def _fail(number: int) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file_and_no_remains(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_text(tmp_path / "metrics.json", "old")
    monkeypatch.setattr(step, _fail(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"metrics\.json: the disk .* is full") as caught:
        write_json(path, {"new": 1})
    assert isinstance(caught.value, MPOError) and isinstance(caught.value, OSError)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["metrics.json"]


def test_a_disk_that_is_really_full_is_a_storage_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    real = open
    # Every write to /dev/full fails with ENOSPC, as on a full disk, in the write or at the flush.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "builtins.open", lambda path, mode: (real(path, mode).close(), real("/dev/full", "wb"))[1]
        )
        with pytest.raises(StorageError, match="full"):
            write_bytes(tmp_path / "x.png", b"0" * 100_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.open", _fail(number))
    with pytest.raises(StorageError, match=r"no permission\. Choose another folder"):
        write_text(tmp_path / "a.txt", "text")


def test_a_file_in_the_place_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Cannot write"):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_an_interrupt_leaves_no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "text")
    assert os.listdir(tmp_path) == []


def test_the_file_is_never_seen_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text(tmp_path / "a.txt", "old")
    seen = []
    real = os.fsync

    def look(handle: int) -> None:
        seen.append(path.read_text())
        real(handle)

    monkeypatch.setattr("os.fsync", look)
    write_text(path, "new")
    assert seen == ["old"] and path.read_text() == "new"


def test_missing_folders_are_made_and_the_umask_decides_the_rights(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        path = write_text(tmp_path / "a" / "b" / "c.txt", "x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_json_is_strict_redacted_and_keeps_every_script(tmp_path: Path) -> None:
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), 1.5],
        "array": np.array([[1.0, np.nan]]),
        "scalar": np.float32(0.5),
        "name": "বাংলা",
        "hub_token": "plain words",
        "path": Path("a/b"),
        3: "key",
    }
    text = write_json(tmp_path / "m.json", value).read_text(encoding="utf-8")  # type: ignore[arg-type]
    assert "বাংলা" in text and text.endswith("}\n")
    assert json.loads(text) == {
        "nan": None,
        "inf": [None, 1.5],
        "array": [[1.0, None]],
        "scalar": 0.5,
        "name": "বাংলা",
        "hub_token": "[redacted]",
        "path": "a/b",
        "3": "key",
    }


def test_a_list_of_plain_values_takes_one_line_and_reads_back_the_same(tmp_path: Path) -> None:
    value = {
        "numbers": [1.5, None, True],
        "texts": ["a, b", "[ c ]", "line\nbreak,\n  more", '"quoted",'],
        "nested": [[1, 2], [3, {"a": [4, 5], "b": []}]],
    }
    text = write_json(tmp_path / "m.json", value).read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert '"numbers": [1.5, null, true],' in text and '"a": [4, 5],' in text


# ---- Folders -----------------------------------------------------------------------------------------------------------


def _fill(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"0" * 1000)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "config.json").write_text("{}")


def _is_whole(folder: Path) -> bool:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} == {
        "weights.bin",
        "deep",
        "deep/er",
        "deep/er/config.json",
    }


def test_a_folder_appears_when_all_of_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, flushed = tmp_path / "a" / "model", []
    real = files.sync

    def watch(path: Path) -> None:
        flushed.append((path, target.exists()))
        real(path)

    monkeypatch.setattr(files, "sync", watch)
    with whole_folder(target) as folder:
        assert folder.parent == target.parent and not target.exists()
        _fill(folder)
    assert _is_whole(target) and os.listdir(target.parent) == ["model"]
    inside = [folder, *(folder / p.relative_to(target) for p in target.rglob("*"))]
    assert sorted(flushed) == sorted([*((path, False) for path in inside), (target.parent, True)])


def test_the_umask_decides_the_rights_of_a_folder(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "model") as folder:
            _fill(folder)
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "model" / "weights.bin").stat().st_mode & 0o777 == 0o640


def test_an_empty_folder_may_be_there_and_anything_else_is_refused_before_the_work(tmp_path: Path) -> None:
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    file.write_text("mine")
    (full / "mine").write_text("x")
    with whole_folder(empty) as folder:
        _fill(folder)
    assert _is_whole(empty)
    for taken in (full, file):
        with pytest.raises(StorageError, match="is there already"), whole_folder(taken):
            raise AssertionError("the work began")
    assert file.read_text() == "mine" and os.listdir(full) == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "is full. Free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "is full. Free some space"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "is full"),
        (OSError(errno.EACCES, "Permission denied"), "no permission. Choose another folder"),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), "no permission"),
        (SafetensorError("Error while serializing: I/O error: Too many links (os error 31)"), "Cannot write"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long"),
    ],
    ids=str,
)  # fmt: skip
def test_what_keeps_a_folder_from_being_written_is_one_clear_error(
    error: Exception, message: str, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=message) as caught, whole_folder(tmp_path / "model") as folder:
        _fill(folder)
        raise error
    assert str(tmp_path / "model") in str(caught.value) and caught.value.__cause__ is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("no"), ModelError("no"), StorageError("no")], ids=repr
)
def test_another_error_passes_unchanged_and_leaves_no_remains(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, whole_folder(tmp_path / "model") as folder:
        _fill(folder)
        raise error
    assert caught.value is error and os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "pathlib.Path.mkdir"])
def test_a_disk_that_is_full_at_any_step_leaves_no_remains(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="full"), whole_folder(tmp_path / "model") as folder:
        _fill(folder)
        monkeypatch.setattr(step, _fail(errno.ENOSPC))
        (folder / "another").mkdir()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_cannot_flush_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _fail(errno.EINVAL))
    with whole_folder(tmp_path / "model") as folder:
        _fill(folder)
    assert _is_whole(tmp_path / "model")


def test_publishing_over_another_result_is_refused(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        _fill(tmp_path / name)
    (tmp_path / "old" / "mine").write_text("x")
    with pytest.raises(OSError):
        publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "mine").is_file() and _is_whole(tmp_path / "new")


# ---- Kills -------------------------------------------------------------------------------------------------------------

_KILLED_EVERYWHERE = """
import itertools, os, signal, sys
from pathlib import Path
from mpo.common import files
from tests.common.test_files import _fill, _is_whole

place, kind = Path(sys.argv[1]), sys.argv[2]

def write(target):
    if kind == "file":
        files.write_text(target, "new" * 1000)
    else:
        with files.whole_folder(target) as folder:
            _fill(folder)

def is_right(target):
    if kind == "file":
        return target.read_text() in ("old", "new" * 1000)
    return not target.exists() or _is_whole(target)

def killed_at(line):
    seen = itertools.count(1)
    def trace(frame, event, argument):
        if event == "line" and next(seen) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

left = 0
for line in itertools.count(1):
    target = place / str(line) / "target"
    target.parent.mkdir()
    if kind == "file":
        target.write_text("old")
    child = os.fork()
    if not child:
        sys.settrace(killed_at(line))
        write(target)
        sys.settrace(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert is_right(target), line
    others = [name for name in os.listdir(target.parent) if name != "target"]
    assert all(name.startswith(".target.") and name.endswith(files.PART) for name in others), others
    left += len(others)
    files.ABANDONED_AFTER = -1.0
    files.remove_leftovers(target)
    files.ABANDONED_AFTER = 24 * 3600.0
    assert is_right(target) and os.listdir(target.parent) in ([], ["target"]), line
    if not os.WIFSIGNALED(status):
        print(line, left)
        break
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_at_any_line_leaves_the_old_or_the_new_and_what_can_be_removed(
    kind: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _KILLED_EVERYWHERE, str(tmp_path), kind]
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert child.returncode == 0, child.stderr
    lines, left = map(int, child.stdout.split())
    assert lines > 20 and left > 3


def _leftover(path: Path, age: float, kind: str = "folder") -> Path:
    if kind == "folder":
        path.mkdir()
        _fill(path)
    else:
        path.write_text("x")
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_left_is_removed_once_it_is_old(kind: str, tmp_path: Path) -> None:
    name = "model [v*]?"
    old = _leftover(tmp_path / f".{name}.0123{PART}", ABANDONED_AFTER + 60, kind)
    young = _leftover(tmp_path / f".{name}.4567{PART}", ABANDONED_AFTER - 600, kind)
    strange = [
        _leftover(tmp_path / stranger, 2 * ABANDONED_AFTER, kind)
        for stranger in (
            f".model v.0123{PART}",
            f".{name}2.0123{PART}",
            f"{name}.0123{PART}",
            f".{name}",
            "mine.part",
        )
    ]
    if kind == "file":
        write_text(tmp_path / name, "x")
    else:
        with whole_folder(tmp_path / name) as folder:
            _fill(folder)
    assert not old.exists() and young.exists() and all(path.exists() for path in strange)


def test_a_folder_in_which_anything_was_written_lately_is_somebodys(tmp_path: Path) -> None:
    leftover = _leftover(tmp_path / f".model.0123{PART}", 2 * ABANDONED_AFTER)
    os.utime(leftover / "deep" / "er" / "config.json")
    remove_leftovers(tmp_path / "model")
    assert _is_whole(leftover)


def test_a_leftover_that_cannot_be_removed_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = _leftover(tmp_path / f".a.txt.0123{PART}", 2 * ABANDONED_AFTER, "file")
    broken = tmp_path / f".a.txt.4567{PART}"
    broken.mkdir()
    (broken / "link").symlink_to("/nowhere")
    os.utime(broken / "link", (0, 0), follow_symlinks=False)
    os.utime(broken, (0, 0))
    monkeypatch.setattr("pathlib.Path.unlink", _fail(errno.EACCES))
    assert write_text(tmp_path / "a.txt", "x").read_text() == "x"
    assert leftover.exists() and not broken.exists()


# ---- Several at once ---------------------------------------------------------------------------------------------------


def test_several_writers_of_one_file_leave_one_of_their_texts_and_readers_see_whole_ones(
    tmp_path: Path,
) -> None:
    texts = [letter * 50_000 for letter in "abcd"]
    path = write_text(tmp_path / "a.txt", texts[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_text(path, texts[n % 4]), range(40)))
    done.set()
    reader.join()
    assert seen <= set(texts) and path.read_text() in texts and os.listdir(tmp_path) == ["a.txt"]


def test_of_several_writers_of_one_folder_one_wins_and_the_others_are_told(tmp_path: Path) -> None:
    together = threading.Barrier(6)

    def write(number: int) -> bool:
        try:
            with whole_folder(tmp_path / "model") as folder:
                _fill(folder)
                together.wait()
            return True
        except StorageError as error:
            assert "Cannot write" in str(error)
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(write, range(6))) == 1
    assert _is_whole(tmp_path / "model") and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_folder_whose_files_cannot_be_stored_is_not_published(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network file system may take what is written and report at the flush that it could not keep it.
    monkeypatch.setattr("os.fsync", _fail(number))
    with pytest.raises(StorageError, match="Cannot write"), whole_folder(tmp_path / "result") as folder:
        (folder / "a.bin").write_bytes(b"1")
    assert os.listdir(tmp_path) == []


# ---- Whether a folder can be written -----------------------------------------------------------------------------------

_KILLED_WHILE_LOOKING = """
import itertools, os, signal, sys
from pathlib import Path
from mpo.common.files import check_writable

folder = Path(sys.argv[1])

def killed_at(line):
    seen = itertools.count(1)
    def trace(frame, event, argument):
        if event == "line" and next(seen) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    return trace

for line in itertools.count(1):
    child = os.fork()
    if not child:
        sys.settrace(killed_at(line))
        check_writable(folder)
        sys.settrace(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    left = os.listdir(folder)
    assert not left, (line, left)
    if not os.WIFSIGNALED(status):
        print(line)
        break
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files without a name are Linux's")
def test_a_process_killed_while_it_looks_whether_a_folder_can_be_written_leaves_nothing_there(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", _KILLED_WHILE_LOOKING, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) > 10  # lines at which it was killed


def test_a_folder_that_is_only_looked_at_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_writable(folder, create=False)
    assert os.listdir(tmp_path) == []
    check_writable(folder)
    assert folder.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"is a file\. Choose another with `out`"):
        check_writable(tmp_path / "file", setting="out")


def test_a_pipe_or_a_device_is_refused_where_a_file_is_named(tmp_path: Path) -> None:
    from mpo.building.refusals import Refusals
    from mpo.building.translation.chat import read_prompt
    from mpo.common.typed_json import read_typed
    from mpo.errors import MPOError
    from mpo.evaluation.judges.judge import read_judging_prompt
    from mpo.evaluation.perplexity import read_lines
    from mpo.evaluation.prompts import load_template
    from mpo.evaluation.results import SafetyResult
    from mpo.training.recipe import load_recipe

    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        for read in (
            load_recipe,
            lambda name: read_lines(str(name)),
            read_judging_prompt,
            lambda name: load_template(str(name)),
            read_prompt,
            lambda name: Refusals(str(name)),
            lambda name: read_typed(name, SafetyResult),
        ):
            with pytest.raises(MPOError, match="pipe or a device"):
                read(path)
