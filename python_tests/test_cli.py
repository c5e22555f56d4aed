"""The command line: exit codes, one-line errors, and real processes that are killed and resumed."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command_line

import bbb_fast
from bbb_fast import routes
from bbb_fast.cli import main, train
from bbb_fast.experiments import checkpoint, training

pytestmark = pytest.mark.cpu_only("the command line names its device itself")

SMALL = [
    "train", "--train-size", "200", "--valid-size", "80", "--batch-size", "64", "--threads", "1",
    "--valid-samples", "2", "--test-samples", "2", "--activation", "relu", "--quiet",
]  # fmt: skip


def start(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "bbb_fast", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c, **options,
    )  # fmt: skip


def heed_ctrl_c() -> None:
    """A shell's background jobs, and so this test run if it is one, inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def wait_for_an_epoch(out: Path, running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not (out / "last.pt").exists() or checkpoint.load(out / "last.pt")["epoch"] < 1:
        assert running()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
class TestSignals:
    @pytest.mark.parametrize("layer_type", ["lrt", pytest.param("bbb", marks=pytest.mark.slow)])
    def test_killed_and_resumed_is_as_if_unbroken(
        self, processes: ForkServerContext, tmp_path: Path, layer_type: str
    ) -> None:
        pytest.importorskip("sklearn")
        epochs = 40  # still running when the signal comes, on a busy machine too
        command = [*SMALL, "--layer-type", layer_type, "--epochs", str(epochs)]
        broken, whole = tmp_path / "broken", tmp_path / "whole"
        process = processes.Process(target=command_line, args=([*command, "--out", str(broken)],))
        process.start()
        wait_for_an_epoch(broken, process.is_alive)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert 1 <= checkpoint.load(broken / "last.pt")["epoch"] < epochs
        assert main([*command, "--out", str(broken), "--resume"]) == 0
        assert main([*command, "--out", str(whole)]) == 0
        for name in ("last.pt", "best.pt"):
            one, other = checkpoint.load(broken / name), checkpoint.load(whole / name)
            for key in ("model", "optimizer", "rng", "epoch", "best"):
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
        one, other = (json.loads((f / "metrics.json").read_text())["test"] for f in (broken, whole))
        assert one == other

    def test_a_live_run_keeps_its_folder_and_a_killed_one_does_not(
        self, processes: ForkServerContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("sklearn")
        command = [*SMALL, "--epochs", "100000", "--out", str(tmp_path)]
        process = processes.Process(target=command_line, args=(command,))
        process.start()
        assert process.pid is not None
        try:
            wait_for_an_epoch(tmp_path, process.is_alive)
            os.kill(process.pid, signal.SIGSTOP)
            before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            for option in ((), ("--resume",), ("--overwrite",)):
                assert main([*command, *option]) == 1
                assert f"{tmp_path}: process {process.pid} on " in error_line(capsys)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        finally:
            process.kill()
            process.join()
        (tmp_path / ".best.pt.0123abcd.tmp").touch()
        assert main([*SMALL, "--epochs", "1", "--out", str(tmp_path), "--overwrite"]) == 0
        assert {"last.pt", "best.pt", "metrics.json"} <= set(os.listdir(tmp_path)) <= set(training.FILES)

    def test_ctrl_c(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        process = start(*SMALL, "--epochs", "100000", "--out", tmp_path)
        wait_for_an_epoch(tmp_path, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process)
        assert code == 130
        assert "interrupted" in err
        assert "--resume" in err
        assert "Traceback" not in err
        assert set(os.listdir(tmp_path)) == {"last.pt", "best.pt"}


class TestTrain:
    def test_the_printed_scores(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        assert main([*SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        scores = json.loads((tmp_path / "metrics.json").read_text())["test"]
        assert lines[0] == "digits test set: 360 images, 2 draws, weights of epoch 1"
        assert [line.split() for line in lines[1:5]] == [
            [name, f"{scores[key]:.4f}"]
            for name, key in (("accuracy",) * 2, ("NLL", "nll"), ("Brier", "brier"), ("ECE", "ece"))
        ]

    def test_every_option_reaches_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("sklearn")
        calls: list[tuple[Any, ...]] = []

        def stop(*args: Any, **options: Any) -> None:
            calls.append((*args, options))
            raise RuntimeError("seen")

        monkeypatch.setattr(train, "fit", stop)
        options = {
            "model": "3conv3fc", "layer_type": "none", "activation": "relu", "prior_mu": -0.5,
            "prior_sigma": 0.3, "posterior_mu_initial": (0.1, 0.2),
            "posterior_rho_initial": (-4.0, 0.3), "epochs": 7, "batch_size": 9, "train_samples": 2,
            "valid_samples": 3, "test_samples": 4, "valid_size": 50, "train_size": 60,
            "beta": "Blundell", "lr": 0.5, "lr_schedule": "cosine", "weight_decay": 0.25, "seed": 11,
            "device": "cpu", "threads": 1, "dataset": "digits", "variance_dtype": "float32",
            "dropout": 0.3, "adversarial": 0.0,
        }  # fmt: skip
        command = ["train", "--overwrite", "--quiet"]
        for key, value in options.items():
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{key.replace('_', '-')}", *map(str, values)]
        assert main(command) == 1
        config, training, valid, test, out, resume, progress, rest = calls[0]
        assert vars(config) == options
        assert [len(training), len(valid), len(test)] == [60, 50, 360]
        assert out == Path("runs/digits-3conv3fc-none-seed11")
        assert (resume, progress, rest) == (False, False, {"overwrite": True, "name": None})

    def test_the_type_of_the_variance_reaches_the_layers(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        out = tmp_path / "run"
        assert main([*SMALL, "--epochs", "1", "--variance-dtype", "bfloat16", "--out", str(out)]) == 0
        model: Any = checkpoint.load_model(out / "best.pt").model
        assert model.conv1.variance_dtype == model.fc3.variance_dtype == torch.bfloat16

    def test_defaults(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("sklearn")
        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(train, "fit", lambda *args, **_: calls.append(args))
        main(["train"])
        config, training, valid, *_ = calls[0]
        assert config == bbb_fast.experiments.training.TrainConfig()
        assert (len(training), len(valid)) == (1294, 143)  # a tenth of 1437 is held out


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert err.startswith("bbb-fast: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("bbb-fast: error: ")


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--beta", "Bundell"], "--beta must be a finite number >= 0 or one of Blundell,"),
            (["--epochs", "0"], "--epochs must be an int >= 1, got 0"),
            (["--lr", "-1"], "--lr must be a finite number > 0, got -1.0"),
            (["--lr", "nan"], "--lr must be a finite number > 0, got nan"),
            (["--lr", "1e999"], "--lr must be a finite number > 0, got inf"),
            (["--prior-sigma", "0"], "--prior-sigma must be > 0, got 0.0"),
            (["--prior-mu", "nan"], "--prior-mu must be a finite number, got nan"),
            (["--posterior-rho-initial", "0", "-1"], "--posterior-rho-initial must have std >= 0, got -1.0"),
            (["--weight-decay", "0.1"], "--weight-decay must be 0 with layers of type lrt, got 0.1"),
            (["--seed", "-1"], "--seed must be an int >= 0, got -1"),
            (
                ["--seed", str(1 << 63)],
                "--seed must be an int <= 9223372036854775807, got 922337203685477580",
            ),
            (["--threads", str(10**9)], "--threads must be an int <= 1024, got 1000000000"),
            (["--threads", str(10**12)], "--threads must be an int <= 1024, got 1000000000000"),
            (["--batch-size", str(10**30)], "--batch-size must be an int <= 2147483647, got 1"),
            (["--device", "cuda:99"], "--device cuda:99 is not there"),
            (["--dataset", "mnist"], "mnist needs a folder: pass --data-dir"),
            (["--dataset", "cifar10", "--data-dir", "/no/such/folder"], "/no/such/folder"),
            (["--train-size", "100000"], "cannot train on 100000 samples"),
            (["--valid-size", "0"], "--valid-size must be an int >= 1"),
            (["--resume"], "nothing to resume"),
        ],
    )
    def test_one_line_and_nothing_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        pytest.importorskip("sklearn")
        assert main(["train", "--out", str(tmp_path / "out"), *options]) == 1
        assert message in error_line(capsys)
        assert os.listdir(tmp_path) == []

    @pytest.mark.skipif(os.name != "posix", reason="POSIX paths")
    def test_a_folder_that_cannot_be_made(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        assert main([*SMALL, "--out", "/dev/null/run"]) == 1
        assert error_line(capsys).strip() == "/dev/null/run: Not a directory"

    def test_a_folder_that_is_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        (tmp_path / "file").write_text("mine")
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        for name in ("file", "circle"):
            assert main([*SMALL, "--out", str(tmp_path / name)]) == 1
            assert error_line(capsys).strip() == f"{tmp_path / name}: is there, and is not a folder"
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("sklearn")

        def read_only(file: int) -> None:  # root may write anywhere, so chmod would not do
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "fsync", read_only)
        assert main([*SMALL, "--out", str(tmp_path)]) == 1
        line = error_line(capsys)
        assert line.startswith(f"{tmp_path / 'last.pt'}: cannot be written (Permission denied)")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (ValueError("two\nlines"), "two lines"),
            (ImportError("no module"), "no module"),
            (FileNotFoundError(2, "No such file", "x"), "x: No such file"),
            (RuntimeError(), "RuntimeError"),
            (KeyError("k"), "internal error (KeyError: 'k'); --debug shows where"),
            (FileNotFoundError(2, "No such\nfile", "a\nb"), "a b: No such file"),
            (MemoryError(), "out of memory"),
        ],
    )
    def test_no_traceback_unless_asked(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        error: Exception, line: str,
    ) -> None:  # fmt: skip
        def fail(_: Any) -> int:
            raise error

        monkeypatch.setattr(train, "run", fail)
        assert main(["train"]) == 1
        assert error_line(capsys).strip() == line
        for command in (["--debug", "train"], ["train", "--debug"]):
            with pytest.raises(type(error)):
                main(command)

    def test_interrupted_before_there_is_anything_to_resume(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("bbb_fast.experiments.data.load", interrupt)
        assert main([*SMALL, "--out", str(tmp_path)]) == 130
        assert capsys.readouterr().err == "bbb-fast: interrupted\n"

    @pytest.mark.parametrize(
        "command",
        [
            [], ["fly"], ["train", "--epochs", "many"], ["train", "--model", "vgg"],
            ["train", "--resume", "--overwrite"], ["train", "--dataset", "imagenet"],
            ["train", "--out", ""], ["train", "--data-dir", ""], ["train", "--data-dir", __file__],
            ["train", "--out", "~nobody-of-that-name/x"],
            ["train", "--epochs", "9" * 5000], ["uncertainty", "--ood", "noise", "--checkpoint", ""],
            ["uncertainty", "--ood", "noise", "--checkpoint", "x.pt", "--out", ""],
        ],
    )  # fmt: skip
    def test_usage(self, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
        assert "usage: bbb-fast" in capsys.readouterr().err


def with_lost_output(redirection: str, errors: Path, arguments: list[str]) -> None:
    """:func:`command_line` with the standard streams as Python has them after a shell's redirection."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    if redirection == "> /dev/full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif redirection == "| true":
        unread, write = os.pipe()
        os.close(unread)
        os.dup2(write, 1)
    else:
        os.close({">&-": 1, "2>&-": 2}[redirection])
    # closefd=False, as Python's own.
    sys.stdout = None if redirection == ">&-" else os.fdopen(1, "w", closefd=False)
    sys.stderr = None if redirection == "2>&-" else os.fdopen(2, "w", closefd=False)
    command_line(arguments)


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell's redirections")
class TestOutput:
    """Standard output that cannot take what is printed: the work is done all the same."""

    LOST = "bbb-fast: warning: standard output could not be written"
    TRAIN = [option for option in SMALL if option != "--quiet"] + ["--epochs", "1"]

    @staticmethod
    def run(redirection: str, *args: str | Path, **environment: str) -> tuple[int, str, str]:
        command = shlex.join([sys.executable, "-W", "ignore", "-m", "bbb_fast", *map(str, args)])
        result = subprocess.run(
            ["sh", "-c", f"{command} {redirection}"], capture_output=True, text=True, timeout=120,
            env={**os.environ, **environment}, check=False,
        )  # fmt: skip
        return result.returncode, result.stdout, result.stderr

    @pytest.mark.parametrize(
        ("redirection", "why"),
        [(">&-", ""), ("> /dev/full", "No space left on device"), ("| true", "Broken pipe"), ("2>&-", "")],
    )
    def test_train(self, processes: ForkServerContext, tmp_path: Path, redirection: str, why: str) -> None:
        pytest.importorskip("sklearn")
        if why == "No space left on device" and not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        errors, out = tmp_path / "errors", tmp_path / "run"
        command = [*self.TRAIN, "--out", str(out)]
        process = processes.Process(target=with_lost_output, args=(redirection, errors, command))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert errors.read_text() == (f"{self.LOST} ({why})\n" if why else "")
        assert json.loads((out / "metrics.json").read_text())["best"]["epoch"] == 1

    def test_what_only_prints(self) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        for command in ("info", "--help"):
            code, _, err = self.run("> /dev/full", command)
            assert code == 1
            assert err == f"{self.LOST} (No space left on device)\n"
        assert self.run(">&-", "info")[0::2] == (0, "")

    def test_characters_that_it_does_not_have(self, tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        code, out, err = self.run(
            "", *self.TRAIN, "--quiet", "--out", tmp_path / "läuft ☃", PYTHONIOENCODING="ascii", LC_ALL="C"
        )
        assert (code, err) == (0, "")
        assert out.endswith("l\\xe4uft \\u2603\n")

    def test_comes_back_as_it_was(self, capsys: pytest.CaptureFixture[str]) -> None:
        before = sys.stdout, sys.stderr, sys.stdout.errors, warnings.showwarning
        main(["info"])
        assert (sys.stdout, sys.stderr, sys.stdout.errors, warnings.showwarning) == before

    def test_a_warning_is_one_line(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def warn(_: Any) -> int:
            warnings.warn("careful", stacklevel=1)
            return 0

        monkeypatch.setattr(train, "run", warn)
        assert main(["train"]) == 0
        assert capsys.readouterr().err == "bbb-fast: warning: careful\n"


class TestInfo:
    def test_as_a_process(self) -> None:
        code, out, err = finish(start("info"))
        assert (code, err) == (0, "")
        assert bbb_fast.__version__ in out
        assert torch.__version__ in out

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert {"python", "platform", "cuda_devices"} <= info.keys()
        assert {key: info[key] for key in bbb_fast.build_info()} == bbb_fast.build_info()

    def test_the_reason_is_given(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = {
            "bbb_fast": "1", "torch": "2", "backend": "reference", "native": False,
            "reason": "no compiler", "build": {"devices": "cpu"}, "threads": 2,
        }  # fmt: skip
        monkeypatch.setattr("bbb_fast.cli.info.build_info", lambda: dict(record))
        assert main(["info"]) == 0
        rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        rows = {key.strip(): value.strip() for key, value in rows.items()}
        assert (rows["native"], rows["reason"]) == ("not loaded", "no compiler")
        assert rows["built: devices"] == "cpu"
        assert rows["bbb_fast"] == "1"  # names as in --json

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"bbb-fast {bbb_fast.__version__}\n"


@pytest.mark.skipif(not bbb_fast.build_info()["native"], reason="the reference path has nothing to tune")
class TestTune:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("BBB_FAST_CACHE", str(tmp_path))
        return tmp_path

    TUNE = (
        "tune",
        "--model",
        "lenet",
        "--inputs",
        "1",
        "--batch-size",
        "2",
        "--seconds",
        "1e-3",
        "--threads",
        "1",
    )

    def test_what_is_measured_is_kept_and_forgotten(
        self, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = routes.current()
        assert main(self.TUNE) == 0
        out = capsys.readouterr().out
        assert f"wrote {routes.cache_file()}" in out and out.count("conv1 ") >= 1
        kept = routes.load()
        assert kept is not None and sum(dimensions == 2 for dimensions, *_ in kept.ways) == 2
        assert routes.current() is before  # until the next import
        assert main(["tune", "--forget"]) == 0
        assert routes.load() is None
        assert main(["tune", "--forget"]) == 0
        assert "nothing was kept" in capsys.readouterr().out

    def test_dry_run_keeps_nothing(self, cache: Path) -> None:
        assert main([*self.TUNE, "--dry-run"]) == 0
        assert not list(cache.iterdir())

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [("--batch-size", "0", "must be in 1 ... 65536, got 0"), ("--seconds", "nan", "must be more than 0")],
    )
    def test_wrong_options(
        self, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*self.TUNE, option, value]) == 1
        assert f"{option} {message}" in error_line(capsys)

    def test_a_broken_file_is_named(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        routes.cache_file().write_text("[]")
        assert main(self.TUNE) == 1
        assert str(routes.cache_file()) in error_line(capsys)


FAULTS = """
import resource, torch
from bbb_fast.cli.memory import keep_freed_memory
kept = keep_freed_memory()

def step():
    tensors = [torch.ones(3 << 20) for _ in range(4)]
    del tensors

for _ in range(5): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_is_kept() -> None:
    """48 MB a step, which glibc otherwise mostly gives back and takes again: 12,288 pages of 4 KiB."""

    def faults(**environment: str) -> tuple[str, int]:
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
        }
        env |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0", **environment}
        command = [sys.executable, "-W", "ignore", "-c", FAULTS]
        out = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.split()
        return out[0], int(out[1])

    kept, few = faults()
    assert kept == "True" and few < 1000
    assert faults(MALLOC_TOP_PAD_="65536")[0] == "False"


def test_the_process_is_set_up_where_it_is_our_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `bbb-fast` and `python -m bbb_fast`, not for a program that calls main itself."""
    from bbb_fast import cli

    calls: list[None] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(sys, "argv", ["bbb-fast", "info"])
    assert main(["info"]) == 0 and not calls
    assert main() == 0 and len(calls) == 1
