"""The ``uncertainty`` command and the functions behind it, on tiny untrained checkpoints."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import repository_root

from bbb_fast import cli, metrics, predict
from bbb_fast.experiments import checkpoint, uncertainty
from bbb_fast.experiments.checkpoint import LoadedModel
from bbb_fast.experiments.data import DataError, ImageSet, normalize
from bbb_fast.experiments.folder import OwnedFolder
from bbb_fast.experiments.training import TrainConfig
from bbb_fast.experiments.uncertainty import DERIVED, SCORES, Judged

pytestmark = pytest.mark.cpu_only("the command names its device itself")

pytest.importorskip("sklearn", reason="digits come with scikit-learn")

FILES = {"uncertainty.json", "uncertainty.npz", "uncertainty.png"}
PARTS = ("epistemic_softmax", "epistemic_normalized", "mutual_information")


def make(folder: Path, layer_type: str, inputs: int = 1, dataset: str = "digits") -> Path:
    """A LeNet as it is initialised, saved as `train` saves one."""
    options = TrainConfig(dataset=dataset, layer_type=layer_type, beta=0.25).to_dict()
    config = {**options, "inputs": inputs, "outputs": 10}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = checkpoint.build_model(config)
    empty: dict[str, Any] = {
        "optimizer": {},
        "scheduler": None,
        "rng": {},
        "epoch": 0,
        "best": {},
        "history": [],
    }
    scale = {"mean": [0.3] * inputs, "std": [0.35] * inputs, "classes": list("0123456789")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "best.pt"
    state = {"run": "abc", "config": config, "model": model.state_dict(), "data": {}, **empty, **scale}
    checkpoint.save(path, state)
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small gains nothing from threads, and much is lost on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return checkpoint.load_model(make(tmp_path, "lrt"))


@pytest.fixture
def images() -> ImageSet:
    known, *_ = uncertainty.load_pair("digits", "noise", limit=20)
    return known


def look(loaded: LoadedModel, images: ImageSet, **options: int) -> Judged:
    return uncertainty.judge(
        loaded.model, images, loaded.mean, loaded.std, **dict[str, Any](samples=6, seed=3) | options
    )


def command(path: Path, *options: str, out: str = "noise") -> list[str]:
    return [
        *("uncertainty", "--checkpoint", str(path), "--out-of-distribution", out),
        *("--samples", "6", "--limit", "30", *options),
    ]


def strict_json(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figure, which takes seconds, to the test that looks at it."""
    pytest.importorskip("matplotlib")
    from bbb_fast.experiments import uncertainty_plots

    monkeypatch.setattr(uncertainty_plots, "uncertainty_figure", lambda result: b"drawn")


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(("layer_type", "out"), [("lrt", "noise"), ("bbb", "rotated"), ("lrt", "inverted")])
def test_command_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layer_type: str, out: str
) -> None:
    path = make(tmp_path / "run", layer_type)
    assert cli.main(command(path, "--out", str(tmp_path / "new" / "out"), "--seed", "5", out=out)) == 0
    folder = tmp_path / "new" / "out"
    assert {file.name for file in folder.iterdir()} == FILES
    assert (folder / "uncertainty.png").read_bytes() == b"drawn"
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*SCORES.values(), *map(str, FILES)))

    document = strict_json(folder / "uncertainty.json")
    assert document["bayesian"] and document["notes"] == []
    assert (document["seed"], document["samples"], document["kl_weight"]) == (5, 6, 0.25)
    assert document["config"]["layer_type"] == layer_type
    assert (document["checkpoint"], document["run"], document["epoch"]) == (str(path), "abc", 0)
    assert document["build"]["torch"] == torch.__version__
    assert document["in"]["name"] == "digits" and out in document["out"]["name"]
    assert set(document["detection"]) == set(SCORES)

    arrays = np.load(folder / "uncertainty.npz")
    assert {key.partition("_")[0] for key in arrays} == {"in", "out"}
    assert all(len(arrays[key]) == 30 for key in arrays)
    for part in PARTS:
        assert (arrays[f"in_{part}"] > 0).all() and (arrays[f"out_{part}"] > 0).all()
    for score in SCORES:
        report = metrics.ood_report(*(torch.from_numpy(arrays[f"{s}_{score}"]) for s in ("in", "out")))
        assert document["detection"][score] == report
    assert document["in"]["scores"]["doubt"]["mean"] == pytest.approx(arrays["in_doubt"].mean())


@pytest.mark.parametrize("layer_type", ["lrt", "none"])
def test_figure(tmp_path: Path, layer_type: str) -> None:
    pytest.importorskip("matplotlib")
    # Warnings are errors: matplotlib warns of a layout that cannot work and of missing glyphs.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(command(make(tmp_path, layer_type), "--limit", "4")) == 0
    content = (tmp_path / "uncertainty.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content.rstrip().endswith(b"IEND\xaeB`\x82")


@pytest.mark.usefixtures("no_drawing")
def test_default_folder_is_the_checkpoints(tmp_path: Path) -> None:
    path = make(tmp_path / "run", "lrt")
    assert cli.main(command(path)) == 0
    assert {file.name for file in path.parent.iterdir()} == {*FILES, "best.pt"}


@pytest.mark.usefixtures("no_drawing")
def test_earlier_results_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, "lrt")
    assert cli.main(command(path)) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    capsys.readouterr()
    assert cli.main(command(path, "--seed", "9")) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert f"{tmp_path} already holds results (uncertainty.json, uncertainty.npz" in printed.err
    assert "--overwrite" in printed.err and "--out" in printed.err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert cli.main(command(path, "--seed", "9", "--overwrite")) == 0
    assert strict_json(tmp_path / "uncertainty.json")["seed"] == 9


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_of_that_name_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = make(tmp_path, "lrt")
    (tmp_path / name).write_text("mine")
    assert cli.main(command(path)) == 1
    assert f"already holds results ({name})" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.usefixtures("no_drawing")
def test_two_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training may go on meanwhile; its files are others."""
    path = make(tmp_path, "lrt")
    with uncertainty.own_folder(tmp_path):
        for options in ((), ("--overwrite",)):
            assert cli.main(command(path, *options)) == 1
            assert "is writing to it (uncertainty)" in capsys.readouterr().err
    with OwnedFolder(tmp_path, "training", ()):
        assert cli.main(command(path)) == 0


@pytest.mark.usefixtures("no_drawing")
def test_point_estimate_has_no_epistemic_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, "none")
    assert cli.main(command(path)) == 0
    document = strict_json(tmp_path / "uncertainty.json")
    assert (document["bayesian"], document["samples"], document["kl_weight"]) == (False, 1, None)
    assert len(document["notes"]) == 1 and document["notes"][0] in capsys.readouterr().out
    arrays = np.load(tmp_path / "uncertainty.npz")
    for part in PARTS:
        assert (arrays[f"in_{part}"] == 0).all() and (arrays[f"out_{part}"] == 0).all()
        assert document["detection"][part]["auroc"] == 0.5
    assert (arrays["in_aleatoric_softmax"] > 0).all()


def test_draws_are_independent_functions(loaded: LoadedModel, images: ImageSet) -> None:
    x = normalize(images.images, loaded.mean, loaded.std)
    outputs = predict(loaded.model, x, samples=6, seed=3)
    assert len(outputs.flatten(1).unique(dim=0)) == 6
    # What is judged is the mean of exactly these six.
    expected = outputs.double().softmax(-1).mean(0)
    judged = look(loaded, images, batch_size=20)
    torch.testing.assert_close(judged.probs, expected)
    # One draw has no spread; a draw shared by all samples would have none either.
    assert (look(loaded, images, samples=1).epistemic_softmax == 0).all()
    assert (judged.epistemic_softmax > 0).all()


def test_parts_add_up(loaded: LoadedModel, images: ImageSet) -> None:
    judged = look(loaded, images)
    torch.testing.assert_close(judged.expected_entropy + judged.mutual_information, judged.predictive_entropy)
    torch.testing.assert_close(
        judged.epistemic_softmax + judged.aleatoric_softmax,
        (judged.probs - judged.probs.square()).sum(-1),
    )
    torch.testing.assert_close(1 - judged.doubt, judged.probs.amax(-1))
    assert torch.equal(judged.prediction, judged.probs.argmax(-1))


def test_batches_do_not_matter(loaded: LoadedModel, images: ImageSet) -> None:
    small, whole = (look(loaded, images, batch_size=size).arrays() for size in (7, 64))
    for name, values in whole.items():
        # The products of another batch size may round differently in float32.
        np.testing.assert_allclose(small[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_seed_decides(loaded: LoadedModel, images: ImageSet) -> None:
    first = look(loaded, images)
    torch.manual_seed(123)  # the global generator must not matter
    again, other = look(loaded, images), look(loaded, images, seed=4)
    assert all(
        np.array_equal(a, b) for a, b in zip(*(j.arrays().values() for j in (first, again)), strict=True)
    )
    assert not torch.equal(first.probs, other.probs)


def test_channels_must_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, "lrt", inputs=3, dataset="cifar10")
    assert cli.main(command(path, "--in", "digits")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cifar10" in error and "digits" in error and "3" in error
    assert not FILES & {file.name for file in tmp_path.iterdir()}


def test_classes_must_match(loaded: LoadedModel, images: ImageSet) -> None:
    more = replace(images, classes=tuple("0123456789A"))
    with pytest.raises(ValueError, match="10 classes, but digits has 11"):
        uncertainty.compare(loaded, more, images, samples=1)
    renamed = replace(images, classes=tuple("abcdefghij"))
    assert "other names" in uncertainty.compare(loaded, renamed, images, samples=1).notes[0]


@pytest.mark.parametrize("option", ["--in", "--out-of-distribution"])
def test_unknown_set(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*command(make(tmp_path, "lrt")), option, "imagenet"])
    assert left.value.code == 2 and "imagenet" in capsys.readouterr().err


def test_wrong_values(tmp_path: Path, loaded: LoadedModel, images: ImageSet) -> None:
    with pytest.raises(DataError, match="imagenet"):
        uncertainty.load_pair("imagenet", "noise")
    with pytest.raises(ValueError, match="imagenet.*noise, rotated, inverted"):
        uncertainty.load_pair("digits", "imagenet")
    with pytest.raises(ValueError, match="itself"):
        uncertainty.load_pair("digits", "digits")
    with pytest.raises(ValueError, match="limit"):
        uncertainty.load_pair("digits", "noise", limit=0)
    with pytest.raises(ValueError, match="unknown kind"):
        uncertainty.unseen("sunset", images, 0)
    for wrong in ({"samples": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            look(loaded, images, **wrong)
    with pytest.raises(ValueError, match="no images"):
        look(loaded, images.subset([]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--checkpoint", "gone.pt"), "gone.pt"),
        (("--samples", "0"), "--samples must be an int >= 1, got 0"),
        (("--batch-size", "-1"), "--batch-size must be an int >= 1, got -1"),
        (("--limit", "0"), "--limit must be an int >= 1, got 0"),
        (("--threads", "0"), "--threads must be an int >= 1, got 0"),
        (("--threads", str(10**9)), "--threads must be an int <= 1024, got 1000000000"),
        (("--threads", str(10**12)), "--threads must be an int <= 1024, got 1000000000000"),
        (("--samples", str(10**30)), "--samples must be an int <= 2147483647, got 1"),
        (("--seed", "-1"), "--seed must be an int >= 0, got -1"),
        (("--seed", str(1 << 64)), "--seed must be an int <= 9223372036854775807, got 18446744073709551616"),
        (("--device", "tpu"), "--device must be cpu, cuda, cuda:0, cuda:1, ..., got 'tpu'"),
        (("--checkpoint", "/dev/null"), "/dev/null is not a file"),
        (("--out", "/dev/null"), "/dev/null: is there, and is not a folder"),
        (("--out-of-distribution", "notmnist"), "--data-dir"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str], message: str
) -> None:
    assert cli.main([*command(make(tmp_path, "lrt")), *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bbb_fast.experiments.uncertainty_plots", raising=False)
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(command(make(tmp_path, "lrt"))) == 0
    assert "matplotlib is missing" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, "best.pt"} - {"uncertainty.png"}
    # An older figure would pass for that of these results.
    (tmp_path / "uncertainty.png").touch()
    assert cli.main(command(tmp_path / "best.pt", "--overwrite")) == 0
    assert not (tmp_path / "uncertainty.png").exists()


def test_unseen_images(images: ImageSet) -> None:
    noise, rotated, inverted = (uncertainty.unseen(kind, images, 1) for kind in DERIVED)
    assert torch.equal(noise.images, uncertainty.unseen("noise", images, 1).images)
    assert not torch.equal(noise.images, uncertainty.unseen("noise", images, 2).images)
    # 20480 pixels uniform in 0..255 have mean 127.5 and deviation 73.9: five standard errors.
    assert abs(noise.images.double().mean() - 127.5) < 5 * 73.9 / noise.images.numel() ** 0.5
    assert noise.images.unique().tolist() == list(range(256))
    # Against the clock: the right column becomes the top row.
    assert torch.equal(rotated.images[:, :, 0], images.images[:, :, :, -1])
    assert torch.equal(255 - inverted.images, images.images)


def test_pick(images: ImageSet) -> None:
    some = uncertainty.pick(images, 7, seed=0)
    assert len(some.unique()) == 7 and torch.equal(some, some.sort().values)
    assert torch.equal(some, uncertainty.pick(images, 7, seed=0))
    assert not torch.equal(some, uncertainty.pick(images, 7, seed=1))
    for limit in (None, 20, 500):
        assert torch.equal(uncertainty.pick(images, limit, seed=0), torch.arange(20))


def test_indices_lead_back_to_the_images(tmp_path: Path) -> None:
    known, other, known_index, other_index = uncertainty.load_pair("digits", "inverted", limit=9, seed=2)
    whole, *_ = uncertainty.load_pair("digits", "noise")
    assert torch.equal(whole.images[known_index], known.images)
    assert torch.equal(255 - whole.images[other_index], other.images)


def test_roc_curve_has_the_area_of_auroc() -> None:
    pytest.importorskip("matplotlib")
    from bbb_fast.experiments.uncertainty_plots import _roc_points

    generator = torch.Generator().manual_seed(0)
    # Whole numbers, so that there are ties.
    inside = torch.randint(0, 9, (50,), generator=generator).double()
    outside = torch.randint(4, 12, (30,), generator=generator).double()
    false, true = _roc_points(inside, outside)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    area = float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())
    assert area == pytest.approx(metrics.auroc(inside, outside))


def test_demo_spares_other_peoples_files(tmp_path: Path) -> None:
    path = repository_root() / "benchmarks" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    assert demo.own_folder(tmp_path / "new") == demo.own_folder(tmp_path / "new")
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        demo.own_folder(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"new", "precious"}
    drawn = demo.letters(2, seed=0)
    assert len(drawn) == 2 * len(drawn.classes) == len(drawn.images.flatten(1).unique(dim=0))
    assert torch.equal(drawn.images, demo.letters(2, seed=0).images)
