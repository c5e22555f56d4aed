"""Checkpoints: written in one step, read without trust, and fitted exactly."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bbb_fast import predict
from bbb_fast.experiments import checkpoint
from bbb_fast.experiments.checkpoint import CheckpointError
from bbb_fast.experiments.uncertainty import is_bayesian
from bbb_fast.layers import ConcreteDropout, MCDropout
from bbb_fast.layers.base import BayesianLayer

pytestmark = pytest.mark.cpu_only("files, whatever the device")


def model_config(**changes: Any) -> dict[str, Any]:
    config = {"model": "lenet", "layer_type": "lrt", "activation": "softplus", "dataset": "digits"}
    return {**config, "inputs": 1, "outputs": 10, "prior_sigma": 0.2, **changes}


BEST = {"epoch": 2, "accuracy": 0.5, "nll": 1.0, "ece": 0.25}


def make_entry(epoch: int, **changes: Any) -> dict[str, Any]:
    scores = {"valid_accuracy": 0.5, "valid_nll": 1.0, "valid_ece": 0.25}
    times = {"seconds": 2.0, "images_per_second": 50.0}
    return {"epoch": epoch, "lr": 0.1, "loss": 2.0, "nll": 1.5, "accuracy": 0.4, **scores, **times, **changes}


def make_state(**changes: Any) -> dict[str, Any]:
    """A small state that load() accepts."""
    config = changes.get("config", model_config())
    state = {
        "config": config,
        "model": dict(checkpoint.build_model(config).state_dict()),
        "optimizer": {},
        "scheduler": None,
        "rng": {},
        "epoch": 3,
        "best": dict(BEST),
        "history": [make_entry(epoch) for epoch in (1, 2, 3)],
        "data": {},
        "mean": [0.5] * config["inputs"],
        "std": [0.25] * config["inputs"],
        "classes": [str(i) for i in range(config["outputs"])],
    }
    return {**state, **changes}


class TestLoad:
    def test_round_trip(self, tmp_path: Path) -> None:
        path, state = tmp_path / "c.pt", make_state(rng={"torch": torch.get_rng_state(), "cuda": []})
        checkpoint.save(path, state)
        loaded = checkpoint.load(path)
        assert (loaded.pop("format"), loaded.pop("version")) == ("bbb_fast-checkpoint", 1)
        assert loaded.keys() == state.keys()
        for key in ("model", "rng"):
            torch.testing.assert_close(loaded.pop(key), state.pop(key), rtol=0, atol=0)
        assert loaded == state

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"there is no checkpoint .*c\.pt"):
            checkpoint.load(tmp_path / "c.pt")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(tmp_path)

    @pytest.mark.skipif(os.name != "posix", reason="POSIX files")
    def test_what_may_never_end(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "c.pt")
        for path in (tmp_path / "c.pt", Path("/dev/zero")):
            with pytest.raises(CheckpointError, match="is not a file"):
                checkpoint.load(path)

    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "c.pt").symlink_to(tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(tmp_path / "c.pt")

    def test_torchscript(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match="is not a bbb_fast checkpoint"):
            checkpoint.load(tmp_path / "c.pt")

    def test_another_zip_file(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
            archive.writestr("notes.txt", "mine")
        with pytest.raises(CheckpointError, match="is not a bbb_fast checkpoint"):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"epoch": -1}, "its epoch is -1"),
            ({"epoch": True}, "its epoch is True"),
            ({"history": []}, "its history is of 0 epochs, but it completed 3"),
            ({"epoch": 4}, "its history is of 3 epochs, but it completed 4"),
            ({"epoch": 0, "history": []}, "it has a best epoch before the first"),
            ({"best": {}}, "its best epoch is None of 3"),
            ({"best": {**BEST, "epoch": -2}}, "its best epoch is -2 of 3"),
            ({"best": {**BEST, "epoch": 4}}, "its best epoch is 4 of 3"),
            ({"best": {**BEST, "epoch": 2.0}}, "its best epoch is 2.0 of 3"),
            ({"best": {**BEST, "accuracy": 9.0}}, "its best scores are not"),
            ({"best": {"epoch": 2}}, "its best scores are not"),
            ({"best": {"epoch": torch.tensor(2)}}, "its best holds something besides"),
            ({"mean": [math.nan]}, "its mean and std are"),
            ({"std": [0.0]}, "its mean and std are"),
            ({"std": [-1.0]}, "its mean and std are"),
            ({"std": [math.inf]}, "its mean and std are"),
            ({"std": [0.1, 0.1]}, "its mean and std are"),
            ({"mean": ["x"]}, "its mean and std are"),
            ({"classes": [1] * 10}, "its classes are not names"),
            ({"config": {**model_config(), "beta": math.nan}}, "its config holds something besides"),
            ({"config": {**model_config(), "beta": torch.ones(1)}}, "its config holds something besides"),
            ({"run": 7}, "its run has no name"),
        ],
    )
    def test_values_that_no_run_has(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        checkpoint.save(tmp_path / "c.pt", {**make_state(), **changes})
        with pytest.raises(CheckpointError, match=f"is inconsistent: {message}"):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize("key", [key for key in make_entry(2) if key != "epoch"])
    @pytest.mark.parametrize("value", [None, "0.1", True, [], math.nan])
    def test_an_epoch_that_no_run_has(self, tmp_path: Path, key: str, value: Any) -> None:
        state = make_state()
        state["history"][1][key] = value
        checkpoint.save(tmp_path / "c.pt", state)
        with pytest.raises(CheckpointError, match="is inconsistent: its history "):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize(
        "entry", [{}, 3, make_entry(3), make_entry(2, seconds=0.0), make_entry(2, kl=1.0)]
    )
    def test_another_kind_of_epoch(self, tmp_path: Path, entry: Any) -> None:
        state = make_state()
        state["history"][1] = entry
        checkpoint.save(tmp_path / "c.pt", state)
        with pytest.raises(CheckpointError, match="its history says nothing sensible of epoch 2"):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04."])
    def test_another_kind_of_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"c\.pt is not a bbb_fast checkpoint.*allowed"):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1], torch.ones(2)])
    def test_another_pytorch_file(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "c.pt")
        with pytest.raises(CheckpointError, match="is not a bbb_fast checkpoint"):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
    def test_cut_short(self, tmp_path: Path, part: float) -> None:
        path = tmp_path / "c.pt"
        checkpoint.save(path, make_state())
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CheckpointError, match=r"c\.pt is damaged or cut short"):
            checkpoint.load(path)

    def test_one_flipped_bit_in_a_weight(self, tmp_path: Path) -> None:
        path = tmp_path / "c.pt"
        checkpoint.save(path, make_state())
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = bytearray(path.read_bytes())
        content[largest.header_offset + largest.file_size // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)

    def test_a_pickled_object_is_refused_and_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "executed"),)

        checkpoint.save(tmp_path / "c.pt", make_state(best={"surprise": Evil()}))
        with pytest.raises(CheckpointError, match=r"c\.pt was refused.*mkdir.*allowed are tensors"):
            checkpoint.load(tmp_path / "c.pt")
        assert not (tmp_path / "executed").exists()

    def test_another_version(self, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c.pt", make_state(version=2))
        with pytest.raises(CheckpointError, match="version 2: this bbb_fast reads 1"):
            checkpoint.load(tmp_path / "c.pt")

    @pytest.mark.parametrize(("key", "value"), [("history", {}), ("rng", None), ("epoch", "3")])
    def test_an_entry_of_the_wrong_kind(self, tmp_path: Path, key: str, value: Any) -> None:
        checkpoint.save(tmp_path / "c.pt", make_state(**{key: value}))
        with pytest.raises(CheckpointError, match=f"incomplete.*'{key}'"):
            checkpoint.load(tmp_path / "c.pt")

    def test_a_missing_entry(self, tmp_path: Path) -> None:
        state = make_state()
        del state["scheduler"]  # None is a value of its own here
        checkpoint.save(tmp_path / "c.pt", state)
        with pytest.raises(CheckpointError, match="incomplete.*'scheduler'"):
            checkpoint.load(tmp_path / "c.pt")


class TestBuildModel:
    @pytest.mark.parametrize("name", checkpoint.MODELS)
    @pytest.mark.parametrize("layer_type", checkpoint.MODEL_LAYER_TYPES)
    def test_every_model(self, name: str, layer_type: str) -> None:
        model = checkpoint.build_model(model_config(model=name, layer_type=layer_type, inputs=3, outputs=7))
        result = model(torch.zeros(2, 3, 32, 32))
        output = result[0] if isinstance(result, tuple) else result
        assert output.shape == (2, 7)

    @pytest.mark.parametrize("name", checkpoint.MODELS)
    @pytest.mark.parametrize("layer_type", checkpoint.MODEL_LAYER_TYPES)
    def test_what_is_random(self, name: str, layer_type: str) -> None:
        model = checkpoint.build_model(model_config(model=name, layer_type=layer_type, inputs=3, outputs=7))
        assert is_bayesian(model) == (layer_type != "none")
        x = torch.rand(1, 3, 32, 32)
        one, other = predict(model, x, 2, seed=0)
        assert torch.equal(one, other) == (layer_type == "none")

    def test_the_last_layer_alone(self) -> None:
        model: Any = checkpoint.build_model(model_config(layer_type="last"))
        names = [name for name, module in model.named_modules() if isinstance(module, BayesianLayer)]
        assert names == ["fc3"]
        assert model.fc3.prior_sigma == 0.2

    def test_dropout_of_the_network_of_gal_and_ghahramani(self) -> None:
        """Single elements, behind both convolutions and the first linear layer."""
        config = model_config(model="caffe-lenet", layer_type="dropout", dropout=0.5)
        model = checkpoint.build_model(config)
        found = {name: module.p for name, module in model.named_modules() if isinstance(module, MCDropout)}
        assert found == {"dropout1": 0.5, "dropout2": 0.5, "dropout3": 0.5}
        assert type(model.dropout1) is MCDropout
        behind = list(dict(model.named_children()))
        assert [behind[behind.index(name) - 1] for name in found] == ["conv1", "conv2", "act3"]

    def test_rates_that_are_learned(self) -> None:
        """Of what follows on the image: an image of one channel, dropped, would leave a constant answer."""
        model = checkpoint.build_model(model_config(layer_type="concrete", dropout=0.25))
        layers = {name: m for name, m in model.named_modules() if isinstance(m, ConcreteDropout)}
        assert list(layers) == ["conv2", "fc1", "fc2", "fc3"]
        for layer in layers.values():
            assert float(layer.p) == pytest.approx(0.25)
            assert layer.length_scale == pytest.approx(1 / 0.2)

    def test_priors_and_activation_reach_the_layers(self) -> None:
        model: Any = checkpoint.build_model(model_config(activation="relu"))
        assert model.conv1.prior_sigma == 0.2
        assert isinstance(model.act1, torch.nn.ReLU)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "vgg"}, "unknown model 'vgg'; allowed: lenet, alexnet, 3conv3fc"),
            ({"layer_type": "mcmc"}, "unknown layer_type 'mcmc'"),
            ({"activation": "tanh"}, "unknown activation_type 'tanh'"),
            ({"inputs": 0}, "inputs must be an int >= 1, got 0"),
            ({"outputs": True}, "outputs must be an int >= 1, got True"),
            ({"prior_sigma": -1.0}, "prior_sigma"),
        ],
    )
    def test_errors(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checkpoint.build_model(model_config(**changes))

    def test_a_missing_key(self) -> None:
        with pytest.raises(ValueError, match="lacks model, inputs"):
            checkpoint.build_model(
                {"layer_type": "lrt", "activation": "relu", "outputs": 2},
            )


class TestLoadModel:
    @pytest.mark.parametrize("layer_type", checkpoint.MODEL_LAYER_TYPES)
    def test_the_same_weights_and_no_random_state_used(self, tmp_path: Path, layer_type: str) -> None:
        state = make_state(config=model_config(layer_type=layer_type))
        checkpoint.save(tmp_path / "c.pt", state)
        before = torch.get_rng_state()
        loaded = checkpoint.load_model(tmp_path / "c.pt")
        assert torch.equal(torch.get_rng_state(), before)
        assert not loaded.model.training
        torch.testing.assert_close(dict(loaded.model.state_dict()), state["model"], rtol=0, atol=0)
        assert loaded.config == state["config"]
        assert (loaded.mean, loaded.std, loaded.epoch) == ([0.5], [0.25], 3)
        assert (loaded.classes, loaded.dataset) == (tuple("0123456789"), "digits")

    def check_error(self, tmp_path: Path, state: dict[str, Any], message: str) -> None:
        checkpoint.save(tmp_path / "c.pt", state)
        with pytest.raises(CheckpointError, match=rf"c\.pt.*{message}"):
            checkpoint.load_model(tmp_path / "c.pt")

    def test_weights_of_another_model(self, tmp_path: Path) -> None:
        other = checkpoint.build_model(model_config(model="alexnet")).state_dict()
        self.check_error(
            tmp_path,
            make_state(model=dict(other)),
            r"does not fit BBBLeNet: conv1\.W_mu has shape \[64, 1, 11, 11\], needed is \[6, 1, 5, 5\]",
        )

    def test_a_point_model_does_not_take_bayesian_weights(self, tmp_path: Path) -> None:
        bayesian = make_state()["model"]
        state = make_state(config=model_config(layer_type="none"), model=bayesian)
        self.check_error(tmp_path, state, r"does not fit LeNet: it lacks conv1\.weight")

    def test_a_missing_weight(self, tmp_path: Path) -> None:
        state = make_state()
        del state["model"]["fc2.bias_rho"]
        self.check_error(tmp_path, state, r"lacks fc2\.bias_rho")

    def test_a_weight_too_many(self, tmp_path: Path) -> None:
        state = make_state()
        state["model"]["fc9.W_mu"] = torch.ones(1)
        self.check_error(tmp_path, state, r"fc9\.W_mu is not one of its parameters")

    def test_a_weight_that_is_no_tensor(self, tmp_path: Path) -> None:
        state = make_state()
        state["model"]["fc2.W_mu"] = [1.0]
        self.check_error(tmp_path, state, r"fc2\.W_mu has shape list, needed is \[84, 120\]")

    def test_a_weight_of_another_type(self, tmp_path: Path) -> None:
        state = make_state()
        state["model"]["fc2.W_mu"] = state["model"]["fc2.W_mu"].to(torch.complex64)
        self.check_error(tmp_path, state, r"fc2\.W_mu is torch\.complex64, .*needed is torch\.float32")

    def test_an_unknown_model(self, tmp_path: Path) -> None:
        state = make_state()
        state["config"] = model_config(model="vgg")
        self.check_error(tmp_path, state, "describes no model of this bbb_fast: unknown model 'vgg'")

    @pytest.mark.parametrize(("key", "value"), [("classes", ["a"]), ("mean", []), ("std", ["x"])])
    def test_parts_that_contradict_each_other(self, tmp_path: Path, key: str, value: Any) -> None:
        self.check_error(tmp_path, make_state(**{key: value}), "is inconsistent")

    def test_an_absurd_size_costs_no_memory(self, tmp_path: Path) -> None:
        state = make_state()
        state["config"] = model_config(outputs=10**12)
        self.check_error(tmp_path, state, "is inconsistent")
