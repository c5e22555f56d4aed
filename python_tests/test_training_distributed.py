"""Training in several processes: one step together, ranks that agree, and torchrun with a killed process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import command_line, write_output_to
from torch import Tensor

from bbb_fast import _noise
from bbb_fast.cli import main, train
from bbb_fast.cli.launch import Launch
from bbb_fast.experiments import checkpoint, data, training
from bbb_fast.experiments.options import OptionError
from bbb_fast.experiments.processes import Processes
from bbb_fast.experiments.training import TrainConfig, fit
from bbb_fast.layers import base

pytestmark = [
    pytest.mark.cpu_only("gloo"),
    pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed"),
    pytest.mark.skipif(os.name != "posix", reason="POSIX signals"),
]

QUICK = TrainConfig(activation="relu", epochs=2, batch_size=64, valid_samples=2, test_samples=3, threads=1)
SMALL = [
    "train", "--train-size", "200", "--valid-size", "81", "--batch-size", "63", "--threads", "1",
    "--valid-samples", "2", "--test-samples", "2", "--activation", "relu",
]  # fmt: skip

# Of one step: the layers, the rows of the minibatch (the last two do not divide by two) and the draws.
STEPS = [("lrt", 64, 1), ("bbb", 64, 2), ("flipout", 64, 1), ("none", 64, 1), ("none", 65, 1), ("none", 1, 1)]


# Whole runs. The batches of the second one are of 199 images and of 1.
FITS = {
    "lrt": replace(QUICK, lr_schedule="plateau"),
    "none": replace(QUICK, layer_type="none", batch_size=199, lr_schedule="plateau"),
}


def _sets() -> tuple[data.ImageSet, data.ImageSet, data.ImageSet]:
    """200 training, 81 validation and 61 test digits: the latter two do not divide by two."""
    train, valid = data.split_validation(data.load("digits", "train"), 81, 0, 200)
    return train, valid, data.load("digits", "test").subset(torch.arange(61))


def _step(layer_type: str, rows: slice, samples: int, share: float = 1.0) -> tuple[list[Any], Tensor]:
    """The gradients that a step on these rows is taken with, and what it says of itself."""
    config = replace(QUICK, layer_type=layer_type, train_samples=samples)
    train, valid, _ = _sets()
    with training._surroundings(config):
        run = training._Run(config, train, valid)
        x = data.normalize(train.images[rows], run.mean, run.std)
        stats = run._step(x, train.labels[rows], 0.3, share)
    return [p.grad for p in run.model.parameters()], stats


def _steps(processes: Processes) -> list[Any]:
    results = []
    for layer_type, count, samples in STEPS:
        part = processes.part(count)
        rows = part.stop - part.start
        # As in an epoch: where there is no row, one that does not count.
        grads, stats = _step(layer_type, part if rows else slice(0, 1), samples, 2 * rows / count)
        processes.average([stats])
        results.append((grads, stats))
    return results


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _fits(rank: int, folder: Path) -> dict[str, Any]:
    """The weights that runs end with on this rank, and what this rank says of them."""
    sets, found, judge = _sets(), {}, training._judge

    def look(run: Any, *args: Any) -> dict[str, Any]:
        found["model"] = run.model.state_dict()
        found["noise"] = torch.get_rng_state()
        return judge(run, *args)

    results = {}
    with mock.patch.object(training, "_judge", look):
        for layer_type, config in FITS.items():
            metrics = fit(config, *sets, folder / layer_type, progress=False)
            for entry in metrics["history"]:
                del entry["seconds"], entry["images_per_second"]
            kept = {key: metrics[key] for key in ("run", "config", "history", "best", "test", "processes")}
            results[layer_type] = {**found, "metrics": kept}
    return results


def _errors(rank: int, folder: Path) -> dict[str, str]:
    """What fit raises on this rank where something is wrong on both, on rank 0 or on rank 1."""
    train, valid, test = sets = _sets()
    wide = replace(QUICK, batch_size=200)

    def other_images() -> None:
        fit(QUICK, train.subset(torch.arange(100 + rank)), valid, test, folder / "new")

    def diverge() -> None:
        fit(replace(wide, lr=1e30), *sets, folder / "diverged", progress=False)

    def drift() -> None:
        step = training._Run._step

        def wrong(run: Any, *args: Any) -> Tensor:
            stats = step(run, *args)
            if rank == 1:
                next(run.model.parameters()).data.view(-1)[0] += 1e-6
            return stats

        with mock.patch.object(training._Run, "_step", wrong):
            fit(wide, *sets, folder / "drifted", progress=False)

    calls = {
        "options": lambda: fit(replace(QUICK, lr=(0.1, 0.2)[rank]), *sets, folder / "new"),
        "images": other_images,
        "batch": lambda: fit(replace(QUICK, batch_size=1), *sets, folder / "new"),
        "device": lambda: replace(QUICK, device="cuda").validate(2),
        "held": lambda: fit(QUICK, *sets, folder / "lrt", progress=False),
        "resume": lambda: fit(replace(QUICK, lr=0.5), *sets, folder / "lrt", True, False),
        "diverge": diverge,
        "drift": drift,
    }
    return {name: _error(call) for name, call in calls.items()}


def _exchanges(processes: Processes) -> dict[str, Any]:
    rank = processes.rank
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([1.0, 5.0]) * rank, torch.zeros(0)]
    processes.average(tensors)
    total = torch.tensor([1 + rank])
    processes.add(total)

    def fail() -> None:
        raise OptionError("lr", f"is wrong on {rank}")

    began: list[float] = []

    def turn() -> int:
        began.append(time.monotonic())
        time.sleep(0.1)
        return rank

    return {
        "average": tensors,
        "add": total,
        "first": processes.first(lambda: f"of {rank}"),
        "error": _error(lambda: processes.first(fail)),
        "gather": processes.gather(rank * 10),
        "turn": (processes.in_turn(turn), began),
        "part": [(processes.part(n).start, processes.part(n).stop) for n in (0, 1, 5, 6)],
    }


def _worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    folder = Path(path)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes()
    results = {
        "offset": _noise.rank_offset(),
        "exchanges": _exchanges(processes),
        "steps": _steps(processes),
        "fits": _fits(rank, folder),
        "errors": _errors(rank, folder),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    processes.gather(None)
    # Without gloo's teardown, whose threads now and then abort a finished process.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_worker, (str(folder),), 2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


class TestTogether:
    @pytest.mark.parametrize("case", [case for case in STEPS if case[1] % 2 == 0])
    def test_a_step_is_that_of_the_average_of_the_gradients(
        self, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, case: tuple[str, int, int]
    ) -> None:
        layer_type, count, samples = case
        alone = []
        for rank, part in ((0, slice(0, count // 2)), (1, slice(count // 2, count))):
            for module in (_noise, base):
                monkeypatch.setattr(module, "rank_offset", lambda offset=ranks[rank]["offset"]: offset)
            alone.append(_step(layer_type, part, samples))
        (a, of_a), (b, of_b) = alone
        for of_rank in ranks:
            grads, stats = of_rank["steps"][STEPS.index(case)]
            for grad, one, other in zip(grads, a, b, strict=True):
                torch.testing.assert_close(grad, (one + other) / 2, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(stats, (of_a + of_b) / 2, rtol=1e-6, atol=1e-6)
        if layer_type != "none":
            monkeypatch.undo()
            (under_noise_of_0, *_), _ = _step(layer_type, slice(count // 2, count), samples)
            assert not torch.allclose(under_noise_of_0, b[0], rtol=1e-3)

    @pytest.mark.parametrize("case", [case for case in STEPS if case[0] == "none"])
    def test_parts_count_by_their_rows(self, ranks: list[dict[str, Any]], case: tuple[str, int, int]) -> None:
        """Without noise the step is the one that a single process takes on the whole minibatch."""
        expected, expected_stats = _step("none", slice(0, case[1]), 1)
        for of_rank in ranks:
            grads, stats = of_rank["steps"][STEPS.index(case)]
            torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(stats, expected_stats, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("layer_type", FITS)
    def test_all_end_alike(self, ranks: list[dict[str, Any]], layer_type: str) -> None:
        a, b = (rank["fits"][layer_type] for rank in ranks)
        torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
        assert torch.equal(a["noise"], b["noise"])
        assert a["metrics"] == b["metrics"]
        assert a["metrics"]["processes"] == 2

    def test_without_noise_it_is_the_run_of_one_process(
        self, ranks: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        alone = fit(FITS["none"], *_sets(), tmp_path, progress=False)
        model = checkpoint.load(tmp_path / "last.pt")["model"]
        together = ranks[1]["fits"]["none"]
        torch.testing.assert_close(together["model"], model, rtol=1e-3, atol=1e-4)
        assert "processes" not in alone
        for one, other in zip(together["metrics"]["history"], alone["history"], strict=True):
            for key, value in one.items():
                assert value == pytest.approx(other[key], rel=1e-3), key

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("options", "ValueError: process 1 was given --lr 0.2, process 0 0.1: all need the same"),
            ("images", "ValueError: process 1 was given training images (number, checksum) [101, "),
            ("batch", "OptionError: batch_size must be at least the number of processes, 2, got 1"),
            ("held", "FileExistsError: "),
            ("resume", "ValueError: cannot resume "),
            ("diverge", "TrainingError: epoch 1: the model's outputs are not finite"),
            ("drift", "TrainingError: epoch 1: the weights of process 1 are no longer those of process 0"),
        ],
    )
    def test_an_error_is_everyones(self, ranks: list[dict[str, Any]], name: str, message: str) -> None:
        a, b = (rank["errors"][name] for rank in ranks)
        assert a.startswith(message)
        assert a == b

    def test_exchanges(self, ranks: list[dict[str, Any]]) -> None:
        (first, began), (second, began_after) = (rank["exchanges"]["turn"] for rank in ranks)
        assert (first, second) == (0, 1)
        assert began_after[0] >= began[0] + 0.1
        for rank in ranks:
            found = rank["exchanges"]
            expected = [torch.full((2, 3), 0.5), torch.tensor([0.5, 2.5]), torch.zeros(0)]
            torch.testing.assert_close(found["average"], expected, rtol=0, atol=0)
            assert found["add"].tolist() == [3]
            assert found["first"] == "of 0"
            assert found["error"] == "OptionError: lr is wrong on 0"
            assert found["gather"] == [0, 10]
        parts = [rank["exchanges"]["part"] for rank in ranks]
        assert parts == [[(0, 0), (0, 0), (0, 2), (0, 3)], [(0, 0), (0, 1), (2, 5), (3, 6)]]


def test_a_gpu_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = replace(QUICK, device="cuda:1")
    config.validate()
    with pytest.raises(OptionError, match="device must be cpu or cuda with 2 processes, .* got cuda:1"):
        config.validate(2)
    config = replace(QUICK, device="cuda")
    assert training._own_device(config) == torch.device("cuda:0")
    for rank in (0, 1, 2):
        monkeypatch.setattr(training, "Processes", lambda rank=rank: _FakeProcesses(rank))
        if rank < 2:
            assert training._own_device(config) == torch.device("cuda", rank)
    with pytest.raises(OptionError, match="device cuda:2 is not there: PyTorch finds only 2"):
        training._own_device(config)


class _FakeProcesses:
    def __init__(self, local_rank: int) -> None:
        self.local_rank, self.size = local_rank, 3


class TestNamedRuns:
    """What is started again under the same name goes on where it was."""

    def test_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("sklearn")
        sets, keep = _sets(), training._keep
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        fit(QUICK, *sets, whole, progress=False)

        def stop(run: Any, *args: Any) -> None:
            keep(run, *args)
            raise KeyboardInterrupt

        ways: tuple[dict[str, Any], ...] = ({}, {"overwrite": True})
        for how in ways:
            fit(replace(QUICK, seed=1), *sets, parts, progress=False, overwrite=True)  # an older one
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(training, "_keep", stop)
                fit(QUICK, *sets, parts, progress=False, overwrite=True, name="mine")
            begun = checkpoint.load(parts / "last.pt")["history"]
            assert len(begun) == 1
            with pytest.raises(FileExistsError, match="already holds a run"):
                fit(QUICK, *sets, parts, progress=False, name="another's")
            metrics = fit(QUICK, *sets, parts, progress=False, name="mine", **how)
            assert metrics["run"] == "mine"
            assert metrics["history"][:1] == begun  # the times are those of the first start
            one, other = (checkpoint.load(folder / "last.pt") for folder in (whole, parts))
            for key in ("model", "optimizer", "rng"):
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)

    def test_killed_while_it_replaced_another(self, tmp_path: Path) -> None:
        """The other's best.pt is still there, beside the last.pt of no epoch."""
        pytest.importorskip("sklearn")
        sets = _sets()
        fit(replace(QUICK, seed=1), *sets, tmp_path, progress=False)
        with training._surroundings(QUICK):
            run = training._Run(replace(QUICK, dataset=sets[0].name), *sets[:2], "mine")
            checkpoint.save(tmp_path / "last.pt", run.state())
        fit(QUICK, *sets, tmp_path, progress=False, name="mine")
        assert {checkpoint.load(tmp_path / name)["run"] for name in ("last.pt", "best.pt")} == {"mine"}

    @pytest.mark.parametrize("name", ["", 3])
    def test_names(self, tmp_path: Path, name: Any) -> None:
        pytest.importorskip("sklearn")
        with pytest.raises(ValueError, match="name must be a str that is not empty"):
            fit(QUICK, *_sets(), tmp_path, progress=False, name=name)


def environment(store: dist.TCPStore, rank: int, attempt: int) -> dict[str, str]:
    """What torchrun, which keeps ``store``, tells one of two processes."""
    return {
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "RANK": str(rank),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }  # fmt: skip


class TestLaunch:
    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Launch]:
        """Makes this process one of two that a launcher has started."""
        store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=10))

        def start(rank: int, attempt: int) -> Launch:
            for key, value in environment(store, rank, attempt).items():
                monkeypatch.setenv(key, value)
            launch: Any = Launch.here()
            launch.keep = store  # as long as its clients
            return launch

        return start

    def test_without_a_launcher(self) -> None:
        launch = Launch.here()
        assert (launch.rank, launch.size, launch.run_name()) == (0, 1, None)
        assert launch.is_first_to_say("x") and launch.is_first_to_say("x")
        assert launch.join("cpu").size == 1

    def test_the_name_outlives_an_attempt(self, started: Callable[[int, int], Launch]) -> None:
        names = {started(rank, attempt).run_name() for attempt in (0, 1) for rank in (1, 0)}
        assert len(names) == 1
        assert None not in names

    def test_the_first_report_is_told(
        self, started: Callable[[int, int], Launch], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for attempt in (0, 1):
            for rank in (1, 0):
                started(rank, attempt).report(f"{attempt}: rank {rank}")
        assert capsys.readouterr().err == "0: rank 1\n1: rank 1\n"

    def test_a_gpu_that_is_not_there(
        self, started: Callable[[int, int], Launch], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rank 1 says so by itself; rank 0 has one and would wait for the other."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(OptionError, match="device cuda:1 is not there: PyTorch finds only 1"):
            started(1, 0).join("cuda")

    @pytest.mark.parametrize(
        "command", [["tune"], ["info"], ["uncertainty", "--checkpoint", "x.pt", "--ood", "noise"]]
    )
    def test_commands_of_one_process(
        self, started: Callable[[int, int], Launch], capsys: pytest.CaptureFixture[str], command: list[str]
    ) -> None:
        for rank in (1, 0):
            started(rank, 0)
            assert main(command) == 1
        out, err = capsys.readouterr()
        problem = "runs in one process, but torchrun started 2: start it without torchrun"
        assert err == f"bbb-fast: error: {command[0]} {problem}\n"
        assert out == ""

    def test_a_warning_is_told_once(
        self, started: Callable[[int, int], Launch], capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def warn(_: Any) -> int:
            warnings.warn("both know", stacklevel=1)
            warnings.warn(f"only {os.environ['RANK']} knows", stacklevel=1)
            print("out")
            return 0

        monkeypatch.setattr(train, "run", warn)
        for rank in (1, 0):
            started(rank, 0)
            assert main(["train"]) == 0
        out, err = capsys.readouterr()
        assert [line.removeprefix("bbb-fast: warning: ") for line in err.splitlines()] == [
            "both know", "only 1 knows", "only 0 knows",
        ]  # fmt: skip
        assert out == "out\n"  # rank 0's

    def test_usage_is_told_once(
        self, started: Callable[[int, int], Launch], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for rank in (0, 1):
            started(rank, 0)
            with pytest.raises(SystemExit) as caught:
                main(["train", "--epochs", "many"])
            assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.count("usage:") == err.count("argument --epochs: invalid int value: 'many'") == 1


def torchrun(*args: str | Path, processes: int = 2, restarts: int = 0) -> subprocess.Popen[str]:
    """The launcher in its plainest form, whose run id is the same every time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen(
        [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
            "--nproc-per-node", str(processes), "--max-restarts", str(restarts),
            "--master-port", str(port), "-m", "bbb_fast", *map(str, args),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends its processes too
        process.communicate()
        raise
    return process.returncode, out, err


def process_of_rank(rank: int, launcher: int) -> int:
    """The process id of a rank that a launcher has started."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = (Path("/proc") / process / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (Path("/proc") / process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == launcher and f"RANK={rank}".encode() in environment:
            return int(process)
    raise AssertionError(f"no process of rank {rank}")


def _launched(variables: dict[str, str], out: Path, err: Path, arguments: list[str]) -> None:
    """What a process that torchrun starts runs; its output is added to two files."""
    os.environ.update(variables)
    write_output_to(out, err)
    sys.argv = ["bbb-fast", *arguments]
    command_line(None)


class Together:
    """Two processes that are started as torchrun does, but forked; if one fails, nobody ends the other."""

    def __init__(self, processes: ForkServerContext, folder: Path) -> None:
        self._processes, self._folder = processes, folder
        self._store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60))

    def run(self, *args: str | Path, attempts: int = 1) -> tuple[list[int | None], str, str]:
        """The last attempt's exit codes, and what all of them have printed."""
        files = self._folder / "out", self._folder / "err"
        for attempt in range(attempts):
            started = [
                self._processes.Process(
                    target=_launched,
                    args=(environment(self._store, rank, attempt), *files, [*map(str, args)]),
                )
                for rank in (0, 1)
            ]
            for process in started:
                process.start()
            for process in started:
                process.join(120)
                process.kill()
        out, err = (file.read_text() for file in files)
        return [process.exitcode for process in started], out, err


@pytest.fixture
def together(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(processes, tmp_path_factory.mktemp("output"))


EPOCHS = 30


@pytest.fixture(scope="module")
def unbroken(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("unbroken")
    together = Together(processes, tmp_path_factory.mktemp("output"))
    codes, out, err = together.run(*SMALL, "--epochs", str(EPOCHS), "--out", folder)
    assert codes == [0, 0], err
    lines = out.splitlines()
    assert lines[0].endswith(", cpu, 2 processes")
    assert len([line for line in lines if line.startswith("epoch ")]) == EPOCHS
    assert len([line for line in lines if line.startswith("digits test set")]) == 1
    assert "bbb-fast" not in err
    assert set(os.listdir(folder)) <= set(training.FILES)
    return folder


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc")
def test_killed_processes(unbroken: Path, tmp_path: Path) -> None:
    """The launcher starts all of them again, and the run goes on from its last checkpoint by itself."""
    process = torchrun(*SMALL, "--epochs", str(EPOCHS), "--out", tmp_path, restarts=2)
    epoch, deadline = 0, time.monotonic() + 100
    for rank in (0, 1):
        awaited = epoch + 1
        while epoch < awaited:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
            if (tmp_path / "last.pt").exists():
                epoch = checkpoint.load(tmp_path / "last.pt")["epoch"]
        victim = process_of_rank(rank, process.pid)
        os.kill(victim, signal.SIGKILL)
        while os.path.exists(f"/proc/{victim}"):
            time.sleep(0.01)
        # Once more: it may have written before its end, and the next victim is one that began after it.
        epoch = checkpoint.load(tmp_path / "last.pt")["epoch"]
        assert epoch < EPOCHS
    code, out, err = finish(process)
    assert code == 0, err
    assert out.count(", cpu, 2 processes\n") == 1  # the first start; the others say that they resume
    assert out.count(", cpu, 2 processes, resuming after epoch ") == 2
    assert err.count("bbb-fast: error") <= 2  # a survivor's: another process has ended
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(tmp_path / name), checkpoint.load(unbroken / name)
        for key in ("model", "optimizer", "rng", "epoch", "best"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
        assert one["processes"] == other["processes"] == 2
    assert set(os.listdir(tmp_path)) <= set(training.FILES)


def test_a_restart_leaves_other_runs_alone(together: Together, tmp_path: Path) -> None:
    """A run that is there already was not begun by this launch, though its run id may be the same."""
    pytest.importorskip("sklearn")
    assert main([*SMALL, "--epochs", "1", "--quiet", "--out", str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    codes, out, err = together.run(*SMALL, "--epochs", "1", "--out", tmp_path, attempts=2)
    assert codes == [1, 1]
    assert err.count(f"bbb-fast: error: {tmp_path} already holds a run") == 2  # once for each attempt
    assert err.count("bbb-fast: error") == 2
    assert out == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_checkpoints_pass_between_one_process_and_several(together: Together, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path, whole = tmp_path / "changing", tmp_path / "whole"
    assert main([*SMALL, "--epochs", "3", "--quiet", "--out", str(whole)]) == 0
    assert main([*SMALL, "--epochs", "1", "--quiet", "--out", str(path)]) == 0
    alone = checkpoint.load(path / "last.pt")
    # Another number of processes may have another number of threads.
    command = [option if option != "1" else "2" for option in SMALL]
    codes, _, err = together.run(*command, "--epochs", "2", "--resume", "--quiet", "--out", path)
    assert codes == [0, 0], err
    of_both = checkpoint.load(path / "last.pt")
    assert (of_both["epoch"], of_both["processes"], of_both["config"]["threads"]) == (2, 2, 2)
    assert of_both["history"][0] == alone["history"][0]
    assert alone.keys() == of_both.keys() - {"processes"}
    assert main([*SMALL, "--epochs", "3", "--resume", "--quiet", "--out", str(path)]) == 0
    one, other = (checkpoint.load(folder / "last.pt") for folder in (path, whole))
    assert "processes" not in one
    # The generators are where they would be in one process, which took other noise in the second epoch.
    torch.testing.assert_close(one["rng"], other["rng"], rtol=0, atol=0)
    assert not torch.equal(one["model"]["fc1.W_mu"], other["model"]["fc1.W_mu"])
    for entry, expected in zip(one["history"], other["history"], strict=True):
        assert entry["kl"] == pytest.approx(expected["kl"], rel=0.01)
        assert entry["nll"] == pytest.approx(expected["nll"], rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "-1"], "--lr must be a finite number > 0, got -1.0"),
        (["--lr", "1e30"], "epoch 1, step 2 of 4: the loss is nan; try a lower --lr (it is 1e+30)"),
    ],
)
def test_one_message(together: Together, tmp_path: Path, options: list[str], message: str) -> None:
    pytest.importorskip("sklearn")
    codes, _, err = together.run(*SMALL, *options, "--out", tmp_path / "out")
    assert codes == [1, 1]
    assert err.count("bbb-fast: error: ") == err.count(f"bbb-fast: error: {message}\n") == 1
