"""Studies of classifiers: what they train and share, what is left out, and the commands over them."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bbb_fast import metrics, predict
from bbb_fast.cli import main
from bbb_fast.experiments import checkpoint, classifiers, data
from bbb_fast.experiments.classifiers import NETWORKS, USUAL, Entry, Judging, Network, Study
from bbb_fast.experiments.corruptions import CORRUPTIONS, corrupt
from bbb_fast.experiments.data import DataError
from bbb_fast.experiments.document import read
from bbb_fast.experiments.options import OptionError
from bbb_fast.methods.ensemble import Ensemble
from bbb_fast.methods.laplace import LaplaceLinear
from bbb_fast.methods.temperature import TemperatureScaling

pytestmark = pytest.mark.cpu_only("a run names its device itself")

TINY = ["--epochs", "1", "--train-size", "64", "--valid-size", "30", "--limit", "24", "--samples", "3"]
QUIET = ["--quiet", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def sklearn() -> None:
    pytest.importorskip("sklearn")


def ran(command: str, out: Path, *options: str) -> dict[str, Any]:
    """The JSON of a command that succeeds."""
    assert main([command, *options, *QUIET, "--out", str(out)]) == 0
    return json.loads((out / f"{command}.json").read_text())


def without_times(value: Any) -> Any:
    """A document but for what was measured."""
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if "seconds" not in k and k not in ("tables", "build")
        }
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of compare: not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "compare"
    options = ["--methods", "deterministic", "temperature", "ensemble", "lrt", "--ensemble-sizes", "2", "3"]
    return out, ran("compare", out, *TINY, *options, "--seeds", "2", "--seed", "5")


class TestStudy:
    def test_every_method_is_valid(self) -> None:
        study = Study()
        study.validate()
        assert {entry.method for entry in study.entries()} == set(USUAL)
        assert {network.kind for network in study.networks()} == set(NETWORKS)

    def test_networks_are_shared(self) -> None:
        """A small ensemble is the first members of a large one, and begins with the deterministic network."""
        study = Study(
            methods=("ensemble", "deterministic", "temperature"), ensemble_sizes=(5, 2), seed=3, seeds=2
        )
        names = [network.task for network in study.networks()]
        assert sorted(names) == sorted(
            f"deterministic-seed{seed}{member}"
            for seed in (3, 4)
            for member in ("", "-member1", "-member2", "-member3", "-member4")
        )
        large, small, alone, scaled = study.entries()
        assert large.networks(3)[:2] == small.networks(3)
        assert alone.networks(3) == scaled.networks(3) == small.networks(3)[:1]

    def test_members_differ_in_the_seed_alone(self) -> None:
        study = Study(seeds=3, ensemble_sizes=(10,))
        configs = [study.config(network) for network in study.networks() if network.kind == "deterministic"]
        assert len({config.seed for config in configs}) == len(configs) == 30
        assert len({replace(config, seed=0) for config in configs}) == 1
        assert study.config(Network("deterministic", 2)).seed == study.config(Network("lrt", 2)).seed == 2

    def test_what_a_kind_of_network_is_trained_with(self) -> None:
        study = Study(options={"lr": 0.5, "epochs": 7}, overrides={"lrt": {"lr": 0.25, "model": "smallcnn"}})
        lrt, bbb = (study.config(Network(kind, 0)) for kind in ("lrt", "bbb"))
        assert (lrt.lr, lrt.epochs, lrt.model, lrt.layer_type) == (0.25, 7, "smallcnn", "lrt")
        assert (bbb.lr, bbb.epochs, bbb.model, bbb.layer_type) == (0.5, 7, "lenet", "bbb")
        assert bbb.posterior_rho_initial == classifiers.DEFAULTS["posterior_rho_initial"]

    def test_temperature_scaling_of_all(self) -> None:
        entries = Study(methods=("deterministic", "temperature", "lrt"), scaled=True).entries()
        assert [(entry.name, entry.scaled) for entry in entries] == [
            ("deterministic", False), ("temperature", True), ("lrt", False), ("lrt-scaled", True)
        ]  # fmt: skip

    def test_as_json(self) -> None:
        study = Study(leave_out=(1, 2), overrides={"lrt": {"posterior_rho_initial": [-4.0, 0.2]}})
        again = Study.from_dict(json.loads(json.dumps(study.to_dict())))
        assert again == study
        assert again.config(Network("lrt", 0)).posterior_rho_initial == (-4.0, 0.2)

    def test_says_which_package_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(classifiers, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match=r"laplace needs laplace-torch.*pip install laplace-torch"):
            Study(methods=("laplace",)).validate()
        Study().validate()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": ("sgld",)}, "methods must be some of deterministic, .*, got 'sgld'"),
            ({"methods": ()}, "methods must be one or more"),
            ({"methods": ("lrt", "lrt")}, "methods must be one or more, each once"),
            ({"seeds": 0}, "seeds must be an int >= 1"),
            ({"seed": -1}, "seed must be an int >= 0"),
            ({"seed": (1 << 63) - 1, "seeds": 2}, "seeds must leave the last seed at most"),
            ({"ensemble_sizes": (1,)}, "ensemble_sizes must be an int >= 2, got 1"),
            ({"ensemble_sizes": (3, 3)}, "ensemble_sizes must be different numbers"),
            ({"options": {"lr": -1}}, "lr must be a finite number > 0, got -1"),
            ({"options": {"seed": 1}}, "options can change model, .*, got 'seed'"),
            ({"overrides": {"lrt": {"layer_type": "bbb"}}}, "set can change model, .*, got 'layer_type'"),
            (
                {"overrides": {"sgld": {}}},
                "set can change the networks of deterministic, .* here, got 'sgld'",
            ),
            ({"overrides": {"lrt": {"weight_decay": 0.1}}}, "weight_decay must be 0 with layers of type lrt"),
        ],
    )
    def test_errors(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Study(**changes).validate()


class TestSets:
    def test_classes_left_out(self) -> None:
        whole = data.load("digits", "test")
        known, left = classifiers.leave_out(whole, (2, 7))
        assert known.classes == ("0", "1", "3", "4", "5", "6", "8", "9")
        assert set(left.labels.tolist()) == {2, 7}
        assert len(known) + len(left) == len(whole)
        # The names of the labels stay those of the same images.
        original = whole.subset(((whole.labels != 2) & (whole.labels != 7)).nonzero().flatten())
        assert torch.equal(known.images, original.images)
        names = [whole.classes[label] for label in original.labels]
        assert [known.classes[label] for label in known.labels] == names

    @pytest.mark.parametrize(
        ("labels", "message"),
        [((10,), "no class 10 to leave out"), (range(9), "at least two classes .* not 1")],
    )
    def test_left_out_wrongly(self, labels: Sequence[int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            classifiers.leave_out(data.load("digits", "test"), labels)

    def test_what_is_left_out_is_nowhere_in_training(self) -> None:
        study = Study(leave_out=(9,), seed=1, seeds=2, valid_size=40)
        one, other = (
            classifiers.load_sets(study, seed, Judging(limit=50, outside=classifiers.LEFT_OUT))
            for seed in (1, 2)
        )
        for sets in (one, other):
            assert sets.outside is not None
            assert set(sets.outside.labels.tolist()) == {9}
            assert [len(sets.train.classes), len(sets.valid), len(sets.test)] == [9, 40, 50]
        # Each seed is trained on images of its own, and judged by the same.
        assert torch.equal(one.test.images, other.test.images)
        assert not torch.equal(one.valid.images, other.valid.images)
        everything = classifiers.load_sets(replace(study, leave_out=()), 1, Judging()).test
        nine, _ = classifiers.leave_out(everything, (9,))
        assert torch.equal(nine.images[one.numbers], one.test.images)

    def test_derived_and_other_sets(self) -> None:
        sets = classifiers.load_sets(Study(), 0, Judging(limit=10, outside="inverted"))
        assert sets.outside is not None
        assert torch.equal(sets.outside.images, 255 - sets.test.images)


class TestEntries:
    def opened(self, out: Path, entry: Entry) -> tuple[classifiers.Opened, classifiers.Sets]:
        study, tasks = classifiers.read_study(out)
        sets = classifiers.load_sets(study, 5, Judging(limit=24))
        return classifiers.open_entry(tasks, entry, 5, 4, sets, "cpu"), sets

    def test_an_ensemble_asks_each_member_once(self, finished: tuple[Path, dict[str, Any]]) -> None:
        opened, sets = self.opened(finished[0], Entry("ensemble-3", "", "ensemble", 3))
        assert isinstance(opened.model, Ensemble)
        assert (opened.draws, opened.temperature) == (3, None)
        x = data.normalize(sets.test.images, opened.mean, opened.std)
        expected = []
        for name in ("", "-member1", "-member2"):
            run = finished[0] / f"tasks/deterministic-seed5{name}/run"
            expected.append(checkpoint.load_model(run / "best.pt").model(x).detach())
        assert len({float(outputs.sum()) for outputs in expected}) == 3
        probs = torch.stack(expected).double().softmax(-1).mean(0)
        said = classifiers.ask(opened, sets.test, 5, "cpu")
        torch.testing.assert_close(said.probs, probs, rtol=1e-5, atol=1e-7)

    def test_laplace_is_fitted_to_the_training_set(self, finished: tuple[Path, dict[str, Any]]) -> None:
        pytest.importorskip("laplace")
        opened, sets = self.opened(finished[0], Entry("laplace", "", "laplace"))
        (layer,) = (m for m in opened.model.modules() if isinstance(m, LaplaceLinear))
        assert opened.draws == 4
        # The more images, the narrower.
        fewer = sets._replace(train=sets.train.subset(torch.arange(len(sets.train) // 4)))
        study, tasks = classifiers.read_study(finished[0])
        wide = classifiers.open_entry(tasks, Entry("laplace", "", "laplace"), 5, 4, fewer, "cpu").model
        (wider,) = (m for m in wide.modules() if isinstance(m, LaplaceLinear))
        assert layer.bias_scale is not None and wider.bias_scale is not None
        assert float(layer.bias_scale.mean()) < 0.9 * float(wider.bias_scale.mean())

    def test_temperature_is_fitted_to_the_validation_set(self, finished: tuple[Path, dict[str, Any]]) -> None:
        opened, sets = self.opened(finished[0], Entry("lrt-scaled", "", "lrt", scaled=True))
        assert isinstance(opened.model, TemperatureScaling)
        x = data.normalize(sets.valid.images, opened.mean, opened.std)
        outputs = predict(opened.model.model, x, 4, seed=5).double()

        def nll(temperature: float) -> float:
            probs = (outputs / temperature).softmax(-1).mean(0)
            return metrics.nll(probs, sets.valid.labels)

        assert opened.temperature is not None
        assert opened.temperature == pytest.approx(float(opened.model.temperature))
        best = nll(opened.temperature)
        assert best < min(nll(opened.temperature * 1.05), nll(opened.temperature / 1.05), nll(1.0))

    def test_the_folder_of_another_run(self, tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
        with pytest.raises(OptionError, match="from must be the folder of a run: there is no"):
            classifiers.read_study(tmp_path)
        (tmp_path / "settings.json").write_text('{"command": "toy"}')
        with pytest.raises(OptionError, match="from must be the folder of a run of compare, ood or shift"):
            classifiers.read_study(tmp_path)
        with pytest.raises(OptionError, match="from has no trained bbb-seed5"):
            classifiers.read_study(finished[0], methods=("bbb",))
        with pytest.raises(OptionError, match="from has no trained deterministic-seed5-member3"):
            classifiers.read_study(finished[0], ensemble_sizes=(4,))
        with pytest.raises(OptionError, match="from has no trained .*seed7"):
            classifiers.read_study(finished[0], seeds=3)


class TestCompare:
    def test_what_it_reports(self, finished: tuple[Path, dict[str, Any]]) -> None:
        out, document = finished
        entries = document["results"]["entries"]
        assert list(entries) == ["deterministic", "temperature", "ensemble-2", "ensemble-3", "lrt"]
        assert all(len(of_seeds) == 2 for of_seeds in entries.values())
        assert [one["draws"] for one in (of_seeds[0] for of_seeds in entries.values())] == [1, 1, 2, 3, 3]
        assert (
            (out / "scores.png").read_bytes()[:4] == (out / "reliability.png").read_bytes()[:4] == b"\x89PNG"
        )
        (table,) = read(out / "compare.json").tables
        assert [row[0] for row in table.rows] == [
            "deterministic", "temperature scaling", "ensemble of 2", "ensemble of 3", "LRT"
        ]  # fmt: skip
        of_seeds = entries["lrt"]
        mean = 50 * sum(one["accuracy"] for one in of_seeds)
        error = 50 * abs(of_seeds[0]["accuracy"] - of_seeds[1]["accuracy"])
        assert table.rows[-1][1] == f"{mean:.2f} ± {error:.2f}"

    def test_scores_are_those_of_the_metrics(self, finished: tuple[Path, dict[str, Any]]) -> None:
        """Of the networks' own outputs, by the explicit loop."""
        out, document = finished
        study, tasks = classifiers.read_study(out)
        sets = classifiers.load_sets(study, 6, Judging(limit=24, outside="rotated"))
        loaded = checkpoint.load_model(tasks / "lrt-seed6/run/best.pt")
        draws = {}
        for name, images in (("known", sets.test), ("other", sets.outside)):
            assert images is not None
            x = data.normalize(images.images, loaded.mean, loaded.std)
            draws[name] = predict(loaded.model, x, 3, seed=6).double().softmax(-1)
        probs = draws["known"].mean(0)
        one = document["results"]["entries"]["lrt"][1]
        report = metrics.classification_report(probs, sets.test.labels)
        assert {key: one[key] for key in report} == pytest.approx(report, rel=1e-4)
        scores = [metrics.mutual_information(draws[name]) for name in ("known", "other")]
        expected = metrics.ood_report(*scores)
        # Ranks of nearly equal numbers hang on how they are rounded.
        assert one["detection"]["mutual_information"] == pytest.approx(expected, abs=0.01)
        diagram = one["reliability"]
        gaps = [
            n * abs(a - c)
            for n, a, c in zip(diagram["count"], diagram["accuracy"], diagram["confidence"], strict=True)
        ]
        assert sum(gaps) / sum(diagram["count"]) == pytest.approx(one["ece"], abs=1e-9)

    def test_networks_of_an_earlier_run(self, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        """Everything is as there, the times of the training too."""
        options = ["--from", str(finished[0]), "--methods", "ensemble", "--limit", "24", "--samples", "3"]
        document = ran("compare", tmp_path / "a", *options, "--ensemble-sizes", "3")
        for mine, theirs in zip(
            document["results"]["entries"]["ensemble-3"], finished[1]["results"]["entries"]["ensemble-3"],
            strict=True,
        ):  # fmt: skip
            assert without_times(mine) == without_times(theirs)
            assert mine["train_seconds"] == theirs["train_seconds"]

    def test_time_is_that_of_all_networks(self, finished: tuple[Path, dict[str, Any]]) -> None:
        results = finished[1]["results"]
        for seed, one in zip((5, 6), results["entries"]["ensemble-3"], strict=True):
            networks = [
                results["networks"][f"deterministic-seed{seed}{m}"] for m in ("", "-member1", "-member2")
            ]
            assert one["train_seconds"] == pytest.approx(sum(n["train_seconds"] for n in networks))
            assert one["parameters"] == 3 * networks[0]["parameters"]

    @pytest.mark.slow
    def test_side_by_side_is_the_same(self, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        pytest.importorskip("joblib")
        options = ["--methods", "lrt", "--seeds", "2", "--seed", "5", "--jobs", "2"]
        other = ran("compare", tmp_path / "a", *TINY, *options)
        mine, theirs = (without_times(d["results"]["entries"]["lrt"]) for d in (finished[1], other))
        assert mine == theirs

    def test_networks_of_a_kind_with_options_of_their_own(self, tmp_path: Path) -> None:
        changes = [
            "--set", "mc-dropout.dropout=0.4", "--set", "mc-dropout.model=caffe-lenet",
            "--set", "deterministic.weight-decay=0.001", "--set", "last-layer.posterior_rho_initial=-4,0.2",
        ]  # fmt: skip
        methods = ["--methods", "deterministic", "mc-dropout", "last-layer", "--scaled"]
        document = ran("compare", tmp_path / "a", *TINY, *methods, *changes)
        assert len(document["results"]["entries"]) == 6
        config = {
            kind: checkpoint.load_model(tmp_path / f"a/tasks/{kind}-seed0/run/best.pt").config
            for kind in ("deterministic", "mc-dropout", "last-layer")
        }
        assert (config["mc-dropout"]["dropout"], config["mc-dropout"]["model"]) == (0.4, "caffe-lenet")
        assert (config["deterministic"]["weight_decay"], config["deterministic"]["model"]) == (0.001, "lenet")
        assert config["last-layer"]["posterior_rho_initial"] == [-4.0, 0.2]


class TestOod:
    def test_classes_left_out(self, tmp_path: Path) -> None:
        document = ran("ood", tmp_path / "a", *TINY, "--methods", "mc-dropout", "--leave-out", "3", "8")
        assert document["settings"]["study"]["leave_out"] == [3, 8]
        (one,) = document["results"]["entries"]["mc-dropout"]
        assert one["sets"] == ["digits", "digits, classes left out"]
        assert one["known"]["images"] == one["unknown"]["images"] == 24
        assert one["known"]["highest_entropy"] == pytest.approx(math.log(8))
        for side in ("known", "unknown"):
            assert sum(one[side]["entropy_histogram"]) == 24
        assert len(document["tables"]) == 4
        assert (tmp_path / "a/entropy.png").exists()
        loaded = checkpoint.load_model(tmp_path / "a/tasks/mc-dropout-seed0/run/best.pt")
        assert loaded.classes == ("0", "1", "2", "4", "5", "6", "7", "9")

    def test_networks_of_an_earlier_run(self, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
        """With the same images and draws the numbers are those of that run."""
        options = ["--from", str(finished[0]), "--ood", "rotated", "--limit", "24", "--samples", "3"]
        document = ran(
            "ood", tmp_path / "a", *options, "--methods", "lrt", "ensemble", "--ensemble-sizes", "2"
        )
        entries = document["results"]["entries"]
        assert list(entries) == ["lrt", "ensemble-2"]
        assert not list((tmp_path / "a/tasks").glob("*/run"))
        for name, of_seeds in entries.items():
            for mine, theirs in zip(of_seeds, finished[1]["results"]["entries"][name], strict=True):
                for key in ("accuracy", "nll", "detection"):
                    assert mine[key] == theirs[key]


@pytest.fixture(scope="module")
def shifted(
    finished: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of shift, over the networks of the run of compare."""
    out = tmp_path_factory.mktemp("runs") / "shift"
    options = ["--limit", "24", "--samples", "3", "--corruptions", "rotation", "noise"]
    options += ["--methods", "deterministic", "lrt"]
    document = ran("shift", out, "--from", str(finished[0]), *options)
    names = {figure["file"] for figure in document["figures"]}
    assert names == {"shift.png", "shift-deterministic.png", "shift-lrt.png"}
    assert all((out / name).exists() for name in names)
    return document


class TestShift:
    def test_curves_begin_without_corruption(
        self, finished: tuple[Path, dict[str, Any]], shifted: dict[str, Any]
    ) -> None:
        for kind, curves in shifted["results"]["curves"].items():
            assert list(curves) == ["deterministic", "lrt"]
            for name, of_seeds in curves.items():
                for points, clean in zip(of_seeds, finished[1]["results"]["entries"][name], strict=True):
                    strengths = [point["strength"] for point in points]
                    assert strengths == [0, *CORRUPTIONS[kind].strengths]
                    for key in ("accuracy", "nll", "ece"):
                        assert points[0][key] == clean[key]

    def test_points_are_those_of_the_corrupted_images(
        self, finished: tuple[Path, dict[str, Any]], shifted: dict[str, Any]
    ) -> None:
        study, tasks = classifiers.read_study(finished[0])
        sets = classifiers.load_sets(study, 6, Judging(limit=24))
        # The study's seed, also for the networks of another.
        harder = corrupt(sets.test, "noise", 0.3, 5, sets.numbers)
        loaded = checkpoint.load_model(tasks / "deterministic-seed6/run/best.pt")
        x = data.normalize(harder.images, loaded.mean, loaded.std)
        probs = loaded.model(x).detach().double().softmax(-1)
        point = shifted["results"]["curves"]["noise"]["deterministic"][1][3]
        assert point["strength"] == 0.3
        report = metrics.classification_report(probs, sets.test.labels)
        for key in ("accuracy", "nll", "ece"):
            assert point[key] == pytest.approx(report[key], rel=1e-4)
        assert point["entropy"] == pytest.approx(float(torch.special.entr(probs).sum(-1).mean()), rel=1e-4)

    def test_tables(self, shifted: dict[str, Any]) -> None:
        titles = [table["title"] for table in shifted["tables"]]
        assert titles == [
            "Clean and corrupted images", "Accuracy under rotation", "ECE under rotation",
            "Accuracy under Gaussian noise", "ECE under Gaussian noise",
        ]  # fmt: skip
        assert [column["name"] for column in shifted["tables"][1]["columns"][1:]] == [
            "0", "15", "30", "45", "60", "75", "90"
        ]  # fmt: skip


class TestResume:
    def test_killed_and_resumed_is_as_if_unbroken(self, tmp_path: Path) -> None:
        """Killed in the middle of a training, which goes on after its last epoch."""
        options = ["--methods", "ensemble", "bbb", "--ensemble-sizes", "2", *TINY, *QUIET]
        options[options.index("--epochs") + 1] = "12"
        command = [sys.executable, "-m", "bbb_fast", "compare", *options, "--out"]
        run = tmp_path / "parts/tasks/deterministic-seed0-member1/run"
        process = subprocess.Popen([*command, str(tmp_path / "parts")], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (run / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (run / "last.pt").exists()
        assert not (tmp_path / "parts/compare.json").exists()
        parts = ran("compare", tmp_path / "parts", *options[: options.index("--quiet")], "--resume")
        whole = ran("compare", tmp_path / "whole", *options[: options.index("--quiet")])
        assert without_times(parts) == without_times(whole)

    def test_other_options(
        self, finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(finished[0], tmp_path / "a")
        assert main(["compare", *TINY, *QUIET, "--out", str(tmp_path / "a"), "--resume"]) == 1
        assert "cannot resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare --set lrt", "--set must be NETWORK.OPTION=VALUE, got 'lrt'"),
        ("compare --set lrt.lr=fast", "--set must give lr as float, got 'fast'"),
        ("compare --set lrt.posterior_rho_initial=a", "--set must give posterior_rho_initial as two numbers"),
        ("compare --set lrt.threads=2", "--set can change model, .*, got 'threads'"),
        ("compare --methods bbb --set lrt.lr=1", "--set can change the networks of bbb here, got 'lrt'"),
        ("compare --epochs 0", "--epochs must be an int >= 1, got 0"),
        ("compare --samples 0", "--samples must be an int >= 1, got 0"),
        ("compare --limit 0", "--limit must be an int >= 1, got 0"),
        ("compare --seeds 0", "--seeds must be an int >= 1, got 0"),
        ("compare --ensemble-sizes 1", "--ensemble-sizes must be an int >= 2, got 1"),
        ("compare --valid-size 2000", "digits: cannot hold out 2000 of 1437 images"),
        ("compare --ood digits", "--out-of-distribution must be another set than digits"),
        ("compare --ood notmnist", "notmnist needs a folder: pass --data-dir"),
        ("compare --dataset mnist", "mnist needs a folder: pass --data-dir"),
        ("compare --device cuda:77", "--device cuda:77 is not there"),
        ("ood --leave-out ten", "--leave-out must name some of 0, 1, .*, got 'ten'"),
        ("ood --leave-out 0 1 2 3 4 5 6 7 8", "digits: at least two classes must be left, not 1 of 10"),
        ("shift --from .", "--from must be the folder of a run: there is no settings.json"),
        ("shift --corruptions noise noise", "--corruptions must be one or more, each once"),
    ],
)
def test_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), *QUIET, "--out", "out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"bbb-fast: error: {message}", line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "3", "--ood", "noise"], "--epochs cannot be given with --from"),
        (["--set", "lrt.lr=1", "--ood", "noise"], "--set cannot be given with --from"),
        (["--leave-out", "8"], "--leave-out cannot be given with --from"),
        (["--dataset", "digits", "--ood", "noise"], "--dataset cannot be given with --from"),
        (["--seed", "4", "--ood", "noise"], "--seed cannot be given with --from: .* begin at 5"),
        ([], "--out-of-distribution must say which images are never seen"),
        (["--methods", "bbb", "--ood", "noise"], "--from has no trained bbb-seed5"),
    ],
)
def test_contradicts_the_run_that_it_is_from(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main(["ood", "--from", str(finished[0]), *options, *QUIET, "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"bbb-fast: error: {message}", line)
    assert not out.exists()


def test_without_matplotlib(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "bbb_fast.experiments.classifier_plots", raising=False)
    monkeypatch.delattr("bbb_fast.experiments.classifier_plots", raising=False)
    options = ["--from", str(finished[0]), "--methods", "deterministic", "--ood", "noise", "--limit", "24"]
    document = ran("ood", tmp_path / "a", *options)
    assert document["figures"] == []
    assert any("matplotlib is missing" in note for note in document["notes"])
