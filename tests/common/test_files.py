from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo.common.files import check_writable, whole_folder, write_bytes, write_json, write_text
from mpo.errors import MPOError, StorageError


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
    real = os.fdopen
    # Every write to /dev/full fails with ENOSPC, as on a full disk, in the write or at the flush.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os,
            "fdopen",
            lambda handle, mode: (os.close(handle), real(os.open("/dev/full", os.O_WRONLY), mode))[1],
        )
        with pytest.raises(StorageError, match="full"):
            write_bytes(tmp_path / "x.png", b"0" * 100_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkstemp", _fail(number))
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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_folder_whose_files_cannot_be_stored_is_not_published(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network file system may take what is written and report at the flush that it could not keep it.
    monkeypatch.setattr("os.fsync", _fail(number))
    with pytest.raises(StorageError, match="Cannot write"), whole_folder(tmp_path / "result") as folder:
        (folder / "a.bin").write_bytes(b"1")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_is_left_alone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _fail(number))
    with whole_folder(tmp_path / "result") as folder:
        (folder / "a.bin").write_bytes(b"1")
    assert (tmp_path / "result" / "a.bin").read_bytes() == b"1"


# ---- Whether a folder can be written -----------------------------------------------------------------------------------

_KILLED_EVERYWHERE = """
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
    command = [sys.executable, "-c", _KILLED_EVERYWHERE, str(tmp_path)]
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
