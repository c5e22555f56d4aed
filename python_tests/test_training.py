"""Training: the loss it minimizes, repeatability, runs that stop and continue, and every error."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bbb_fast import fixed_noise, kl_loss, routes
from bbb_fast._noise import draw_seed
from bbb_fast.experiments import checkpoint, data, training
from bbb_fast.experiments.data import ImageSet
from bbb_fast.experiments.plots import training_curves
from bbb_fast.experiments.training import TrainConfig, TrainingError, fit
from bbb_fast.layers import misc

pytestmark = pytest.mark.cpu_only("a run names its device itself; test_cuda.py has one on the GPU")

Sets = tuple[ImageSet, ImageSet, ImageSet]

QUICK = TrainConfig(activation="relu", epochs=3, batch_size=64, valid_samples=2, test_samples=3, threads=1)


@pytest.fixture(scope="module")
def sets() -> Sets:
    """200 training, 80 validation and 60 test digits."""
    pytest.importorskip("sklearn")
    train, valid = data.split_validation(data.load("digits", "train"), 80, 0, 200)
    return train, valid, data.load("digits", "test").subset(torch.arange(60))


@pytest.fixture(scope="module")
def finished(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the metrics of a quick run: not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, fit(QUICK, *sets, folder, progress=False)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes as long as a quick run's training, so only ``finished`` draws."""

    def missing(_: object) -> None:
        raise ImportError("turned off")

    monkeypatch.setattr("bbb_fast.experiments.plots.training_curves", missing)


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(a: Path, b: Path) -> None:
    """Both folders hold the same weights, state and history, bit for bit; timings aside."""
    for name in ("last.pt", "best.pt"):
        one, other = checkpoint.load(a / name), checkpoint.load(b / name)
        for key in ("model", "optimizer", "rng"):
            torch.testing.assert_close(one.pop(key), other.pop(key), rtol=0, atol=0)
        for state in (one, other):
            for entry in state["history"]:
                del entry["seconds"], entry["images_per_second"]
            for key in training._FREE_ON_RESUME:
                del state["config"][key]
        names = {one.pop("run"), other.pop("run")}
        assert len(names) == 2 and None not in names  # two runs, whatever they computed
        assert one == other


def change_files(folder: Path, **changes: Any) -> None:
    """Changes entries of a finished run's three files."""
    for name in ("last.pt", "best.pt"):
        checkpoint.save(folder / name, {**checkpoint.load(folder / name), **changes})
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, **changes}))


def stop_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many epochs are done."""
    original = training._epoch_line

    def line(entry: dict[str, Any], *rest: Any) -> str:
        if entry["epoch"] == epoch:
            raise KeyboardInterrupt
        return original(entry, *rest)

    monkeypatch.setattr(training, "_epoch_line", line)


class TestConfig:
    def test_the_defaults_are_valid(self) -> None:
        TrainConfig().validate()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "vgg"}, "unknown model 'vgg'; allowed: lenet, alexnet, 3conv3fc"),
            ({"layer_type": "mcmc"}, "unknown layer_type 'mcmc'; allowed: .*lrt"),
            ({"activation": "tanh"}, "unknown activation 'tanh'; allowed: softplus, relu"),
            ({"lr_schedule": "step"}, "unknown lr_schedule 'step'; allowed: constant, cosine, plateau"),
            ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
            ({"epochs": 2.0}, "epochs must be an int"),
            ({"batch_size": -1}, "batch_size must be an int >= 1, got -1"),
            ({"train_samples": 0}, "train_samples must be an int >= 1"),
            ({"valid_samples": True}, "valid_samples must be an int >= 1"),
            ({"test_samples": None}, "test_samples must be an int >= 1"),
            ({"valid_size": 0}, "valid_size must be an int >= 1"),
            ({"threads": 0}, "threads must be an int >= 1"),
            ({"seed": -1}, "seed must be an int >= 0"),
            ({"seed": 1 << 63}, "seed must be an int <= 9223372036854775807, got 9223372036854775808"),
            ({"epochs": 10**30}, "epochs must be an int <= 2147483647"),
            ({"threads": 10**9}, "threads must be an int <= 1024, got 1000000000"),
            (
                {"beta": "Bundell"},
                "beta must be a finite number >= 0 or one of Blundell, Soenderby, .*, got 'Bundell'",
            ),
            ({"beta": -0.1}, "beta must be .*, got -0.1"),
            ({"beta": math.nan}, "beta must be .*, got nan"),
            ({"lr": -1e-3}, "lr must be a finite number > 0, got -0.001"),
            ({"lr": math.inf}, "lr must be a finite number > 0"),
            ({"lr": 0}, "lr must be a finite number > 0"),
            ({"weight_decay": -1.0, "layer_type": "none"}, "weight_decay must be a finite number >= 0"),
            ({"weight_decay": 0.1}, "weight_decay must be 0 with layers of type lrt, got 0.1"),
            (
                {"weight_decay": 0.1, "layer_type": "concrete"},
                "weight_decay must be 0 with layers of type conc",
            ),
            ({"dropout": 1.0}, "dropout must be a number above 0 and below 1, got 1.0"),
            ({"dropout": 0}, "dropout must be a number above 0 and below 1, got 0"),
            ({"adversarial": -0.1}, "adversarial must be a finite number >= 0, got -0.1"),
            (
                {"adversarial": 0.01, "train_samples": 2},
                "adversarial must be 0 with 2 draws in a training step, got 0.01",
            ),
            ({"variance_dtype": "float16"}, "unknown variance_dtype 'float16'; allowed: float32, bfloat16"),
            (
                {"variance_dtype": "bfloat16", "layer_type": "bbb"},
                "variance_dtype must be float32 with layers of type bbb, got bfloat16",
            ),
            ({"prior_sigma": 0.0}, "^prior_sigma must be > 0, got 0.0"),
            ({"posterior_mu_initial": (0.0, -1.0)}, "posterior_mu_initial.*std >= 0"),
            ({"device": "tpu"}, "device must be cpu, cuda, cuda:0, .*, got 'tpu'"),
            ({"device": "meta"}, "device must be .*, got 'meta'"),
            ({"device": 0}, "device must be .*, got 0"),
        ],
    )
    def test_errors(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**changes).validate()

    def test_dropout_takes_weight_decay(self) -> None:
        TrainConfig(layer_type="dropout", weight_decay=0.1).validate()

    def test_cuda_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device cuda:1 is not there: PyTorch finds no CUDA device"):
            TrainConfig(device="cuda:1").validate()

    def test_to_dict_is_what_json_gives_back(self) -> None:
        options = TrainConfig().to_dict()
        assert json.loads(json.dumps(options)) == options


class TestObjective:
    """One step of a whole epoch's size, so that its loss can be computed apart."""

    config = replace(QUICK, epochs=1, batch_size=200, train_samples=3, beta=0.3)

    def test_gradient_and_loss(self, sets: Sets, monkeypatch: pytest.MonkeyPatch) -> None:
        config, n = self.config, len(sets[0])
        with training._surroundings(config):
            run = training._Run(config, *sets[:2])
            x = data.normalize(sets[0].images, run.mean, run.std)
            noise = torch.get_rng_state()
            seed, outputs = draw_seed(), []
            for k in range(config.train_samples):
                with fixed_noise(seed, k, model=run.model, draw="activations"):
                    outputs.append(run.model(x)[0])
            nll = torch.stack([F.cross_entropy(output, sets[0].labels) for output in outputs]).mean()
            kl = kl_loss(run.model)
            loss = nll + 0.3 * kl / n
            loss.backward()
            expected = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]

            calls: Any = []
            for module in (misc, training):
                monkeypatch.setattr(module, "kl_loss", lambda model: calls.append(1) or kl_loss(model))
            torch.set_rng_state(noise)
            stats = run._step(x, sets[0].labels, 0.3)
        # float32 sums in another order
        torch.testing.assert_close([p.grad for p in run.model.parameters()], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            stats[:3], torch.stack([loss, nll, kl]).detach().double(), rtol=1e-5, atol=0
        )
        assert len(calls) == 1  # three draws, one KL

    def test_the_history_adds_up(self, sets: Sets, tmp_path: Path) -> None:
        (entry,) = fit(self.config, *sets, tmp_path, progress=False)["history"]
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.3 * entry["kl"] / 200, rel=1e-5)
        assert entry["kl_weight"] == pytest.approx(0.3)

    @pytest.mark.parametrize("beta", ["Blundell", "Standard"])
    def test_schedules_that_share_out_one_kl(self, sets: Sets, tmp_path: Path, beta: str) -> None:
        config = replace(QUICK, epochs=1, beta=beta)
        (entry,) = fit(config, *sets, tmp_path, progress=False)["history"]
        assert entry["kl_weight"] == pytest.approx(1.0)

    def test_the_point_model_has_no_kl(self, sets: Sets, tmp_path: Path) -> None:
        metrics = fit(replace(self.config, layer_type="none"), *sets, tmp_path, progress=False)
        (entry,) = metrics["history"]
        assert entry["loss"] == entry["nll"]
        assert "kl" not in entry
        assert metrics["kl_weight"] is None
        assert metrics["test"]["samples"] == 1

    def test_dropout_is_random_and_has_no_kl(self, sets: Sets, tmp_path: Path) -> None:
        config = replace(self.config, layer_type="dropout", dropout=0.4, train_samples=1)
        metrics = fit(config, *sets, tmp_path, progress=False)
        assert metrics["history"][0]["loss"] == metrics["history"][0]["nll"]
        assert metrics["kl_weight"] is None
        assert metrics["test"]["samples"] == config.test_samples

    @pytest.mark.parametrize("layer_type", ["concrete", "last"])
    def test_a_kl_of_some_layers(self, sets: Sets, tmp_path: Path, layer_type: str) -> None:
        config = replace(self.config, layer_type=layer_type)
        (entry,) = fit(config, *sets, tmp_path, progress=False)["history"]
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.3 * entry["kl"] / 200, rel=1e-5)
        assert entry["kl"] != 0

    @pytest.mark.parametrize("layer_type", ["none", "lrt"])
    def test_adversarial_images(self, sets: Sets, layer_type: str) -> None:
        """Half of the loss is that of images moved by 1 % of the range of pixels, each against the model."""
        config = replace(self.config, layer_type=layer_type, train_samples=1, adversarial=0.01)
        seen = []
        with training._surroundings(config):
            run: Any = training._Run(config, *sets[:2])
            x, y = data.normalize(sets[0].images, run.mean, run.std), sets[0].labels
            run.model.conv1.register_forward_hook(
                lambda _module, args, _output: seen.append(args[0].detach())
            )
            stats = run._step(x, y, 0.3)
        assert len(seen) == 3  # the images, for the gradient of the loss, and what came out
        torch.testing.assert_close(seen[0], x)
        moved = (seen[2] - x) * run.std[0]
        # A pixel that the loss does not hang on stays.
        assert set(moved.mul(1e4).round().unique().tolist()) <= {-100.0, 0.0, 100.0}
        assert float((moved != 0).double().mean()) > 0.5
        if layer_type == "none":
            torch.manual_seed(config.seed)
            model = checkpoint.build_model(run.model_config())
            moved = x.clone().requires_grad_()
            clean = F.cross_entropy(model(moved), y)
            clean.backward()
            assert moved.grad is not None
            against = F.cross_entropy(model(x + 0.01 / run.std[0] * moved.grad.sign()), y)
            assert stats[1].item() == pytest.approx((clean + against).item() / 2, rel=1e-5)
            assert against.item() > clean.item()


@pytest.mark.parametrize("layer_type", ["lrt", "bbb"])
def test_it_learns(sets: Sets, tmp_path: Path, layer_type: str) -> None:
    train, valid = data.split_validation(data.load("digits", "train"), 80, 0, 400)
    config = replace(
        QUICK, layer_type=layer_type, epochs=5, batch_size=32, lr=5e-3, beta=0.01,
        posterior_rho_initial=(-5.0, 0.1),
    )  # fmt: skip
    metrics = fit(config, train, valid, sets[2], tmp_path, progress=False)
    losses = [entry["loss"] for entry in metrics["history"]]
    assert losses == sorted(losses, reverse=True)
    assert metrics["test"]["accuracy"] > 0.75
    assert metrics["best"]["accuracy"] == max(e["valid_accuracy"] for e in metrics["history"])


class TestRepeatability:
    @pytest.mark.parametrize("layer_type", ["lrt", "bbb", "dropout", "none"])
    def test_the_same_run_twice(self, sets: Sets, tmp_path: Path, layer_type: str) -> None:
        config = replace(QUICK, layer_type=layer_type, epochs=2, lr_schedule="cosine")
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one = fit(config, *sets, tmp_path / "a", progress=False)
        assert torch.equal(torch.get_rng_state(), before)  # the caller's
        torch.manual_seed(2)
        other = fit(config, *sets, tmp_path / "b", progress=False)
        assert_same_run(tmp_path / "a", tmp_path / "b")
        assert one["test"] == other["test"]

    def test_another_seed_is_another_run(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path
    ) -> None:
        fit(replace(QUICK, seed=1, epochs=1), *sets, tmp_path, progress=False)
        one, other = (checkpoint.load(f / "last.pt")["model"] for f in (finished[0], tmp_path))
        assert not torch.equal(one["fc1.W_mu"], other["fc1.W_mu"])

    def test_validation_does_not_disturb_the_noise(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path
    ) -> None:
        train, valid, test = sets
        half = valid.subset(torch.arange(40))
        fit(replace(QUICK, valid_samples=5), train, half, test, tmp_path, progress=False)
        one, other = (checkpoint.load(f / "last.pt") for f in (finished[0], tmp_path))
        for key in ("model", "optimizer", "rng"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)

    def test_threads_come_back(self, copied: Path, sets: Sets) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            # Not told otherwise, a resumed run takes the number it was started with.
            metrics = fit(replace(QUICK, threads=None), *sets, copied, resume=True, progress=False)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
        assert metrics["config"]["threads"] == metrics["versions"]["threads"] == 1


class TestResume:
    @pytest.mark.parametrize(
        ("layer_type", "schedule", "stop"),
        [
            ("lrt", "cosine", 1),
            ("bbb", "plateau", 2),
            ("none", "constant", 1),
            ("dropout", "cosine", 2),
            ("concrete", "constant", 1),
            ("last", "constant", 1),
        ],
    )
    def test_bit_for_bit(
        self, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        layer_type: str, schedule: str, stop: int,
    ) -> None:  # fmt: skip
        config = replace(QUICK, layer_type=layer_type, lr_schedule=schedule)
        fit(config, *sets, tmp_path / "whole", progress=False)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(stop, patch)
            fit(config, *sets, tmp_path / "parts", progress=False)
        assert checkpoint.load(tmp_path / "parts/last.pt")["epoch"] == stop
        assert not (tmp_path / "parts/metrics.json").exists()
        fit(config, *sets, tmp_path / "parts", resume=True, progress=False)
        assert_same_run(tmp_path / "whole", tmp_path / "parts")

    def test_takes_the_routes_it_began_with(
        self, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever was measured in between; and leaves the process with its own."""
        before = routes.current()
        fit(QUICK, *sets, tmp_path / "whole", progress=False)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(1, patch)
            fit(QUICK, *sets, tmp_path / "parts", progress=False)
        key = routes.conv_key((64, 1, 32, 32), (6, 1, 5, 5), (1, 1), (0, 0), (1, 1), 1)
        other = replace(before, ways={key: "channels_last"})
        routes.use(other)
        try:
            fit(QUICK, *sets, tmp_path / "parts", resume=True, progress=False)
            assert routes.current() is other
        finally:
            routes.use(before)
        assert_same_run(tmp_path / "whole", tmp_path / "parts")

    def test_stopped_in_the_first_epoch(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training._Run, "_step", interrupt)
            fit(QUICK, *sets, tmp_path, progress=False)
        fit(QUICK, *sets, tmp_path, resume=True, progress=False)
        assert_same_run(finished[0], tmp_path)

    def test_more_epochs(self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path) -> None:
        fit(replace(QUICK, epochs=1), *sets, tmp_path, progress=False)
        fit(QUICK, *sets, tmp_path, resume=True, progress=False)
        assert_same_run(finished[0], tmp_path)

    def test_a_finished_run_is_judged_again(
        self, finished: tuple[Path, dict[str, Any]], copied: Path, sets: Sets
    ) -> None:
        config = replace(QUICK, test_samples=5)
        metrics = fit(config, *sets, copied, resume=True, progress=False)
        assert metrics["test"]["samples"] == 5
        assert metrics["history"] == finished[1]["history"]
        again = fit(QUICK, *sets, copied, resume=True, progress=False)
        assert again["test"] == finished[1]["test"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": 0.01}, "--lr is 0.01 now, but the run was started with 0.002"),
            ({"layer_type": "bbb"}, "--layer-type is bbb now, but the run was started with lrt"),
            ({"beta": "Standard"}, "--beta is Standard now, but the run was started with 0.1"),
            ({"posterior_rho_initial": (-4.0, 0.1)}, r"--posterior-rho-initial is \[-4.0, 0.1\] now"),
            ({"valid_samples": 3}, "--valid-samples is 3 now, but the run was started with 2"),
            ({"threads": 2}, "--threads is 2 now, but the run was started with 1"),
            ({"epochs": 2}, "--epochs is 2 now, but was 3 at the start and has completed 3"),
        ],
    )
    def test_other_options(self, copied: Path, sets: Sets, changes: dict[str, Any], message: str) -> None:
        before = contents(copied)
        with pytest.raises(ValueError, match=rf"cannot resume .*last\.pt: {message}"):
            fit(replace(QUICK, **changes), *sets, copied, resume=True, progress=False)
        assert contents(copied) == before

    def test_a_run_from_before_there_was_an_option(
        self, finished: tuple[Path, dict[str, Any]], copied: Path, sets: Sets
    ) -> None:
        for name in ("last.pt", "best.pt"):
            state = checkpoint.load(copied / name)
            for option in training._ADDED:
                del state["config"][option]
            checkpoint.save(copied / name, state)
        again = fit(QUICK, *sets, copied, resume=True, progress=False)
        assert again["test"] == finished[1]["test"]
        with pytest.raises(ValueError, match="--dropout is 0.3 now, but the run was started with 0.1"):
            fit(replace(QUICK, dropout=0.3), *sets, copied, resume=True, progress=False)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"lr_schedule": "cosine"}, "cosine schedule"), ({"beta": "Soenderby"}, "KL warm-up")],
    )
    def test_more_epochs_where_the_schedule_spans_them(
        self, sets: Sets, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        config = replace(QUICK, epochs=1, **changes)
        fit(config, *sets, tmp_path, progress=False)
        with pytest.raises(ValueError, match=f"--epochs is 2 now, but was 1 .*{message}"):
            fit(replace(config, epochs=2), *sets, tmp_path, resume=True, progress=False)

    def test_other_images(self, copied: Path, sets: Sets) -> None:
        train, valid, test = sets
        images = train.images.clone()
        images[0, 0, 0, 0] += 1
        changed = replace(train, images=images)
        with pytest.raises(ValueError, match="images are not those it was started with"):
            fit(QUICK, changed, valid, test, copied, resume=True, progress=False)

    def test_nothing_there(self, sets: Sets, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"nothing to resume: .*last\.pt does not exist"):
            fit(QUICK, *sets, tmp_path / "new", resume=True, progress=False)
        assert not (tmp_path / "new").exists()

    def test_the_best_weights_are_gone(self, copied: Path, sets: Sets) -> None:
        (copied / "best.pt").unlink()
        with pytest.raises(ValueError, match=r"there is no checkpoint .*best\.pt"):
            fit(QUICK, *sets, copied, resume=True, progress=False)

    @pytest.mark.parametrize("name", ["best.pt", "metrics.json"])
    @pytest.mark.parametrize("named", [True, False])
    def test_a_file_of_another_run(
        self, finished: tuple[Path, dict[str, Any]], copied: Path, sets: Sets, tmp_path: Path, name: str,
        named: bool,
    ) -> None:  # fmt: skip
        """Its best epoch is the same; runs of earlier releases, without a name, are told apart as well."""
        fit(replace(QUICK, seed=1), *sets, tmp_path / "other", progress=False)
        for folder in (copied, tmp_path / "other"):
            change_files(folder, **({} if named else {"run": None}))
        best = checkpoint.load(copied / "best.pt")["epoch"]
        state = checkpoint.load(tmp_path / "other/last.pt")
        scores = {key: state["history"][best - 1][f"valid_{key}"] for key in ("accuracy", "nll", "ece")}
        cut = {"epoch": best, "history": state["history"][:best], "best": {"epoch": best, **scores}}
        checkpoint.save(tmp_path / "other/best.pt", {**state, **cut})
        shutil.copy(tmp_path / "other" / name, copied)
        before = contents(copied)
        with pytest.raises(ValueError, match=rf"cannot resume .*: {name} belongs to another run"):
            fit(QUICK, *sets, copied, resume=True, progress=False)
        assert contents(copied) == before

    def test_two_continuations_of_one_run(self, sets: Sets, tmp_path: Path) -> None:
        fit(replace(QUICK, epochs=1), *sets, tmp_path / "a", progress=False)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        for folder in ("a", "b"):
            fit(QUICK, *sets, tmp_path / folder, resume=True, progress=False)
        shutil.copy(tmp_path / "b/metrics.json", tmp_path / "a")
        with pytest.raises(ValueError, match="metrics.json belongs to another run"):
            fit(QUICK, *sets, tmp_path / "a", resume=True, progress=False)

    @pytest.mark.parametrize("content", ["mine", "[]", "{}", '{"history": 3}', '"history"'])
    def test_metrics_that_no_run_wrote(self, copied: Path, sets: Sets, content: str) -> None:
        (copied / "metrics.json").write_text(content)
        with pytest.raises(ValueError, match="metrics.json is not what a run writes"):
            fit(QUICK, *sets, copied, resume=True, progress=False)
        assert (copied / "metrics.json").read_text() == content

    def test_weights_that_are_not_the_best(self, copied: Path, sets: Sets) -> None:
        """Of the same run, but of an epoch that last.pt knows to be a worse one."""
        state = checkpoint.load(copied / "last.pt")
        assert state["best"]["epoch"] == 1
        checkpoint.save(copied / "best.pt", {**state, "epoch": 2, "history": state["history"][:2]})
        with pytest.raises(ValueError, match=r"best\.pt is of epoch 2, which last\.pt does not know"):
            fit(QUICK, *sets, copied, resume=True, progress=False)

    @pytest.mark.parametrize("epochs", [1, 3])
    def test_a_run_of_an_earlier_release(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path, epochs: int
    ) -> None:
        """It has no name, goes on without one, and ends with the same weights."""
        fit(replace(QUICK, epochs=epochs), *sets, tmp_path, progress=False)
        change_files(tmp_path, run=None)
        metrics = fit(QUICK, *sets, tmp_path, resume=True, progress=False)
        assert metrics["run"] is None
        assert checkpoint.load(tmp_path / "best.pt")["run"] is None
        one, other = (checkpoint.load(folder / "last.pt") for folder in (finished[0], tmp_path))
        for key in ("model", "optimizer", "rng"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)

    @pytest.mark.parametrize(("key", "value"), [("optimizer", {}), ("rng", {"torch": torch.zeros(3)})])
    def test_a_state_that_does_not_fit(
        self, copied: Path, sets: Sets, key: str, value: dict[str, Any]
    ) -> None:
        state = checkpoint.load(copied / "last.pt")
        checkpoint.save(copied / "last.pt", {**state, key: value})
        with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt cannot be resumed"):
            fit(QUICK, *sets, copied, resume=True, progress=False)

    @pytest.mark.parametrize("change", ["shape", "missing"])
    def test_an_optimizer_that_does_not_fit(self, copied: Path, sets: Sets, change: str) -> None:
        state = checkpoint.load(copied / "last.pt")
        moments = state["optimizer"]["state"]
        if change == "missing":
            del moments[3]
        else:
            moments[3]["exp_avg"] = torch.zeros(1)
        checkpoint.save(copied / "last.pt", state)
        with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt cannot be resumed: its optimizer"):
            fit(QUICK, *sets, copied, resume=True, progress=False)

    def test_a_number_of_threads_that_does_not_fit(self, copied: Path, sets: Sets) -> None:
        state = checkpoint.load(copied / "last.pt")
        checkpoint.save(copied / "last.pt", {**state, "config": {**state["config"], "threads": 10**9}})
        with pytest.raises(ValueError, match="threads must be an int <= 1024"):
            fit(replace(QUICK, threads=None), *sets, copied, resume=True, progress=False)


class TestOutput:
    def test_metrics_json(self, finished: tuple[Path, dict[str, Any]]) -> None:
        folder, metrics = finished

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        stored = json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)
        assert stored == json.loads(json.dumps(metrics))
        assert stored["config"] == {**QUICK.to_dict(), "inputs": 1, "outputs": 10}
        assert stored["kl_weight"] == pytest.approx(0.1)
        assert stored["seeds"] == {"train": 0, "valid": 0, "test": -1}
        assert {"python", "torch", "bbb_fast", "backend"} <= stored["versions"].keys()
        assert stored["parameters"] == 123412
        assert stored["images"] == {"train": 200, "valid": 80, "test": 60}
        assert stored["best"].keys() == {"epoch", "accuracy", "nll", "ece"}
        assert stored["test"].keys() == {"accuracy", "nll", "brier", "ece", "samples"}
        assert stored["timing"].keys() == {"train_seconds", "images_per_second", "test_seconds"}
        assert [entry["epoch"] for entry in stored["history"]] == [1, 2, 3]
        assert stored["history"][0].keys() == {
            "epoch", "lr", "loss", "nll", "accuracy", "kl", "kl_weight",
            "valid_accuracy", "valid_nll", "valid_ece", "seconds", "images_per_second",
        }  # fmt: skip

    def test_files(self, finished: tuple[Path, dict[str, Any]]) -> None:
        pytest.importorskip("matplotlib")
        folder, _ = finished
        assert set(os.listdir(folder)) == {"last.pt", "best.pt", "metrics.json", "curves.png"}
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_the_best_epoch_is_kept(self, finished: tuple[Path, dict[str, Any]]) -> None:
        folder, metrics = finished
        history = metrics["history"]
        order = [(entry["valid_accuracy"], -entry["valid_nll"]) for entry in history]
        assert metrics["best"]["epoch"] == order.index(max(order)) + 1
        assert checkpoint.load_model(folder / "best.pt").epoch == metrics["best"]["epoch"]

    def test_the_test_scores_are_those_of_the_best_weights(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets
    ) -> None:
        folder, metrics = finished
        best = checkpoint.load_model(folder / "best.pt")
        probs = training.predict_probs(best.model, sets[2].images, best.mean, best.std, 3, -1)
        assert float((probs.argmax(1) == sets[2].labels).double().mean()) == metrics["test"]["accuracy"]

    def test_curves_need_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError):
            training_curves([])

    @pytest.mark.parametrize("history", [[], [{"epoch": 1}], [{"epoch": 1, "seconds": 2.0}]])
    def test_nothing_to_draw(self, history: list[dict[str, Any]]) -> None:
        pytest.importorskip("matplotlib")
        with pytest.raises(ValueError, match="no epochs with an nll"):
            training_curves(history)

    @pytest.mark.parametrize("panels", [2, 3])
    def test_curves(self, finished: tuple[Path, dict[str, Any]], panels: int) -> None:
        pytest.importorskip("matplotlib")
        history = [dict(entry) for entry in finished[1]["history"]]
        if panels == 2:  # a point model
            for entry in history:
                del entry["kl"], entry["kl_weight"]
        axes = training_curves(history).axes
        assert len(axes) == panels
        shown: Any = axes[1].lines[1].get_ydata()
        assert list(shown) == [entry["valid_accuracy"] for entry in history]

    def test_without_matplotlib_and_without_a_test_set(
        self, sets: Sets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        metrics = fit(replace(QUICK, epochs=1), *sets[:2], None, tmp_path)
        assert metrics["test"] is None
        assert not (tmp_path / "curves.png").exists()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3  # what is trained, one epoch, the notice
        assert lines[-1].startswith("no curves.png: matplotlib is missing")

    def test_an_existing_run_is_kept(self, copied: Path, sets: Sets) -> None:
        before = contents(copied)
        with pytest.raises(FileExistsError, match="already holds a run .*--resume.*--overwrite"):
            fit(QUICK, *sets, copied, progress=False)
        with pytest.raises(ValueError, match="contradict"):
            fit(QUICK, *sets, copied, True, False, overwrite=True)
        assert contents(copied) == before

    @pytest.mark.parametrize("name", training.FILES)
    def test_a_file_of_that_name_is_kept(self, sets: Sets, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=rf"already holds a run \({name}\)"):
            fit(QUICK, *sets, tmp_path, progress=False)
        assert contents(tmp_path) == {name: b"mine"}

    def test_overwrite(self, copied: Path, sets: Sets) -> None:
        metrics = fit(replace(QUICK, epochs=1), *sets, copied, progress=False, overwrite=True)
        assert checkpoint.load(copied / "last.pt")["epoch"] == 1
        assert json.loads((copied / "metrics.json").read_text())["test"] == metrics["test"]

    def test_the_folder_is_a_file(self, sets: Sets, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match="is not a folder"):
            fit(QUICK, *sets, tmp_path / "file", progress=False)
        assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Every write after the first ``writes["left"]`` fails."""
    writes, fsync = {"left": 0}, os.fsync

    def full(file: int) -> None:
        if writes["left"] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        writes["left"] -= 1
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield writes


class TestFailures:
    def test_disk_full_from_the_start(self, copied: Path, sets: Sets, full_disk: dict[str, int]) -> None:
        before = contents(copied)
        with pytest.raises(OSError, match="No space left"):
            fit(QUICK, *sets, copied, progress=False, overwrite=True)
        assert contents(copied) == before

    def test_disk_full_later_and_resumed(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path,
        full_disk: dict[str, int],
    ) -> None:  # fmt: skip
        full_disk["left"] = 3  # last.pt of epoch 0, best.pt and last.pt of epoch 1
        with pytest.raises(OSError, match="No space left"):
            fit(QUICK, *sets, tmp_path, progress=False)
        assert set(os.listdir(tmp_path)) == {"last.pt", "best.pt"}
        assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1
        full_disk["left"] = -1
        fit(QUICK, *sets, tmp_path, resume=True, progress=False)
        assert_same_run(finished[0], tmp_path)

    def test_the_loss_is_not_finite(self, sets: Sets, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"epoch 1, step 2 of 4: the loss is (nan|inf)"):
            fit(replace(QUICK, lr=1e30), *sets, tmp_path, progress=False)
        assert os.listdir(tmp_path) == ["last.pt"]

    def test_a_run_that_never_completed_an_epoch_is_in_nobodys_way(
        self, finished: tuple[Path, dict[str, Any]], sets: Sets, tmp_path: Path
    ) -> None:
        with pytest.raises(TrainingError):
            fit(replace(QUICK, lr=1e30), *sets, tmp_path, progress=False)
        fit(QUICK, *sets, tmp_path, progress=False)
        assert_same_run(finished[0], tmp_path)

    def test_divergence_after_an_epoch(
        self, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The message says how to try again, as the folder holds something worth keeping now."""
        step = training._Run._step

        def diverge(run: Any, *args: Any) -> torch.Tensor:
            return step(run, *args) + (math.inf if run.epoch == 1 else 0)

        monkeypatch.setattr(training._Run, "_step", diverge)
        with pytest.raises(TrainingError, match=r"epoch 2.* lower --lr .*--overwrite .* 1 epoch"):
            fit(QUICK, *sets, tmp_path, progress=False)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prior_sigma": 1e-30}, r"the KL is inf before anything was trained; look at --prior-mu .*"
             r"--prior-sigma \(it is 1e-30\), --posterior-mu-initial"),
            ({"posterior_mu_initial": (0.0, 1e30), "beta": 0.0}, "the KL is inf"),
            ({"posterior_mu_initial": (0.0, 1e18), "prior_sigma": 1e20}, "the NLL is nan .*--posterior-mu"),
            ({"beta": 1e300}, r"the loss is inf .* look at --beta \(it is 1e\+300\)"),
        ],
    )  # fmt: skip
    def test_the_loss_is_not_finite_from_the_start(
        self, sets: Sets, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        """The learning rate has had no say yet."""
        with pytest.raises(TrainingError, match=f"epoch 1, step 1 of 4: {message}") as caught:
            fit(replace(QUICK, **changes), *sets, tmp_path, progress=False)
        assert "--lr" not in str(caught.value)

    def test_the_folder_is_deleted(self, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, advance = tmp_path / "run", training._Run.advance

        def delete(run: Any, progress: bool) -> bool:
            shutil.rmtree(folder)
            return advance(run, progress)

        monkeypatch.setattr(training._Run, "advance", delete)
        with pytest.raises(OSError, match="cannot be written: .*run or its lock was deleted"):
            fit(QUICK, *sets, folder, progress=False)
        assert not folder.exists()

    def test_two_at_once(self, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the second one asks for, the first one's results are what stays."""
        refused, advance = [], training._Run.advance

        def intrude(run: Any, progress: bool) -> bool:
            before = contents(tmp_path)
            ways: tuple[dict[str, Any], ...] = ({}, {"resume": True}, {"overwrite": True})
            for how in ways:
                with pytest.raises(OSError, match=f"process {os.getpid()} on .* is writing to it") as caught:
                    fit(replace(QUICK, seed=1), *sets, tmp_path, progress=False, **how)
                refused.append(caught.value.errno)
            assert contents(tmp_path) == before
            return advance(run, progress)

        monkeypatch.setattr(training._Run, "advance", intrude)
        fit(replace(QUICK, epochs=2), *sets, tmp_path, progress=False)
        assert refused == [errno.EBUSY] * 6
        assert checkpoint.load(tmp_path / "last.pt")["config"]["seed"] == 0
        assert set(os.listdir(tmp_path)) == {"last.pt", "best.pt", "metrics.json"}

    def test_what_a_kill_left(self, copied: Path, sets: Sets) -> None:
        for name in (".last.pt.0123abcd.tmp", ".metrics.json.00000000.tmp", ".notes.txt.0123abcd.tmp"):
            (copied / name).write_text("cut sho")
        fit(QUICK, *sets, copied, resume=True, progress=False)
        assert [name for name in os.listdir(copied) if name.endswith("tmp")] == [".notes.txt.0123abcd.tmp"]

    def test_the_outputs_are_not_finite(self, sets: Sets, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="epoch 1: the model's outputs are not finite"):
            fit(replace(QUICK, lr=1e30, batch_size=200), *sets, tmp_path, progress=False)

    def test_sets_that_do_not_go_together(self, sets: Sets, tmp_path: Path) -> None:
        train, valid, test = sets
        out = tmp_path / "new"
        with pytest.raises(ValueError, match="the validation set is empty"):
            fit(QUICK, train, valid.subset([]), test, out)
        colour = ImageSet(test.images.expand(-1, 3, -1, -1), test.labels, test.classes, "colour")
        with pytest.raises(ValueError, match="the test set has 3 channels, the training set 1"):
            fit(QUICK, train, valid, colour, out)
        other = ImageSet(valid.images, valid.labels, (*valid.classes, "ten"), "other")
        with pytest.raises(ValueError, match="the validation set has 11 classes, the training set 10"):
            fit(QUICK, train, other, test, out)
        assert not out.exists()
