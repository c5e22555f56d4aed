"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bbb_fast import _files


class TestAtomicWrite:
    def test_replaces_the_content_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        target = tmp_path / "file"
        _files.atomic_write(target, b"old")
        _files.atomic_write(target, memoryview(b"new"))
        assert target.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["file"]

    @pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            _files.atomic_write(tmp_path / "file", b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failure_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        target = tmp_path / "file"
        _files.atomic_write(target, b"old")

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left on device.*unchanged") as caught:
            _files.atomic_write(target, b"new")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]

    def test_an_interrupt_leaves_no_temporary_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _files.atomic_write(tmp_path / "file", b"new")
        assert os.listdir(tmp_path) == []

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="cannot be written .*; there is no folder .*no") as caught:
            _files.atomic_write(tmp_path / "no" / "file", b"")
        assert "unchanged" not in str(caught.value)
        assert caught.value.filename == str(tmp_path / "no" / "file")


class TestRemoveLeftovers:
    def test_only_what_atomic_write_names_so(self, tmp_path: Path) -> None:
        kept = [".last.pt.0123abcd.tmp~", ".last.pt.0123abc.tmp", "last.pt", ".lastXpt.0123abcd.tmp"]
        for name in (*kept, ".last.pt.0123abcd.tmp", ".a.json.99999999.tmp"):
            (tmp_path / name).touch()
        (tmp_path / ".last.pt.00000000.tmp").mkdir()  # cannot be removed, and is no reason to fail
        _files.remove_leftovers(tmp_path, ("last.pt", "a.json"))
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".last.pt.00000000.tmp"])

    def test_what_a_killed_write_leaves(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys; from bbb_fast import _files\n"
            "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
            "_files.atomic_write(sys.argv[1], b'new')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "last.pt")], check=False, timeout=120)
        assert len(os.listdir(tmp_path)) == 1
        _files.remove_leftovers(tmp_path, ("last.pt",))
        assert os.listdir(tmp_path) == []
