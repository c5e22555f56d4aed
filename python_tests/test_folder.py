"""The lock of a folder: one owner at a time, gone with its process, and what stands in for it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bbb_fast.experiments import folder
from bbb_fast.experiments.folder import OwnedFolder

pytestmark = pytest.mark.cpu_only("files, whatever the device")


def own(path: Path, purpose: str = "training") -> OwnedFolder:
    return OwnedFolder(path, purpose, ("a.txt",))


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that owns the folder until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from bbb_fast.experiments.folder import OwnedFolder\n"
        "with OwnedFolder(Path(sys.argv[1]), 'training', ()): print('ready', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def assert_busy(path: Path, message: str) -> None:
    with pytest.raises(OSError, match=message) as caught, own(path):
        pass
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, str(path))


def test_leaves_nothing_but_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    for content in (b"one", b"two"):
        with own(path) as owned:
            owned.write("a.txt", content)
    assert os.listdir(path) == ["a.txt"]
    assert (path / "a.txt").read_bytes() == b"two"


def test_one_owner_in_a_process(tmp_path: Path) -> None:
    with own(tmp_path), own(tmp_path, "uncertainty"):  # another purpose is no conflict
        assert_busy(tmp_path, rf"process {os.getpid()} on .* is writing to it \(training\): wait .* --out")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(assert_busy, tmp_path, "is writing to it").result()
    with own(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_an_error_frees_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), own(tmp_path):
        raise KeyboardInterrupt
    with own(tmp_path):
        pass


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_kill_frees_it(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        (tmp_path / ".a.txt.0123abcd.tmp").touch()
        assert_busy(tmp_path, f"process {process.pid} on ")
        assert (tmp_path / ".a.txt.0123abcd.tmp").exists()  # it may be the owner's, at work
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert os.listdir(tmp_path) != []
    with own(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    """Nor does it free its parent's, when it leaves the context."""
    read, write = os.pipe()
    with own(tmp_path) as owned:
        child = os.fork()
        if child == 0:
            owned.__exit__(None, None, None)
            os.write(write, b"x")
            time.sleep(100)
            os._exit(0)
        assert os.read(read, 1) == b"x"
        assert_busy(tmp_path, "is writing to it")
    try:
        with own(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_deleted_folder_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with own(path) as owned:
        shutil.rmtree(path)
        with pytest.raises(OSError, match="or its lock was deleted or replaced") as caught:
            owned.write("a.txt", b"")
    assert caught.value.filename == str(path / "a.txt")
    assert not path.exists()


def test_a_folder_that_was_made_again_is_its_new_owners(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with own(path) as old:
        shutil.rmtree(path)
        new = own(path).__enter__()
        with pytest.raises(OSError, match="or its lock was deleted or replaced"):
            old.write("a.txt", b"old")
    try:
        assert_busy(path, "is writing to it")  # the old owner's end has not freed it
        new.write("a.txt", b"new")
    finally:
        new.__exit__(None, None, None)
    assert os.listdir(path) == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "circle", "dangling", "below a file"])
def test_not_a_folder(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    elif kind == "below a file":
        path.touch()
        path = path / "run"
    else:
        path.symlink_to(path if kind == "circle" else tmp_path / "nowhere")
    with pytest.raises(OSError, match="not a folder|Not a directory"), own(path):
        pass


def test_a_lock_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / ".training.lock").mkdir()
    with pytest.raises(OSError, match="cannot be written") as caught, own(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path)
    shutil.rmtree(tmp_path / ".training.lock")
    (tmp_path / ".training.lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="cannot be opened"), own(tmp_path):
        pass


class TestWithoutLocks:
    """Where the system or the file system has none, the file's existence excludes others."""

    @pytest.fixture(autouse=True, params=["system", "file system"])
    def no_locks(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "system":
            monkeypatch.setattr(folder, "fcntl", None)
            return

        def fail(file: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", fail)

    def test_what_an_owner_of_the_same_name_left(self, tmp_path: Path) -> None:
        """Only where there is one: who has the lock without a name keeps it."""
        own(tmp_path).__enter__()
        mine = OwnedFolder(tmp_path, "training", ("a.txt",), "run 1")
        with pytest.raises(OSError, match="is gone, delete"), mine:
            pass
        os.remove(tmp_path / ".training.lock")
        mine.__enter__()
        for name in (None, "run 2", "1"):
            with (
                pytest.raises(OSError, match=r"\(run 1\) is writing to it"),
                OwnedFolder(tmp_path, "training", (), name),
            ):
                pass
        with OwnedFolder(tmp_path, "training", ("a.txt",), "run 1") as owned:
            owned.write("a.txt", b"")
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_one_owner(self, tmp_path: Path) -> None:
        with own(tmp_path) as owned:
            assert_busy(tmp_path, rf"process {os.getpid()} on .*is gone, delete .*\.training\.lock")
            owned.write("a.txt", b"")
        with own(tmp_path):
            pass
        assert os.listdir(tmp_path) == ["a.txt"]
