"""Data: every file layout written by hand, good and bad, down to single pixels."""

from __future__ import annotations

import codecs
import collections
import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bbb_fast.experiments import data
from bbb_fast.experiments.data import DataError, ImageSet

pytestmark = pytest.mark.cpu_only("images are prepared on the CPU")

IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "notmnist": "notMNIST"}


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image_bytes(images: np.ndarray) -> bytes:
    return struct.pack(">4I", 0x803, *images.shape) + images.tobytes()


def label_bytes(labels: list[int]) -> bytes:
    return struct.pack(">2I", 0x801, len(labels)) + bytes(labels)


def write_idx(
    folder: Path,
    images: np.ndarray,
    labels: list[int],
    prefix: str = "t10k",
    dot: str = "-",
    gz: str = "",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if gz else bytes
    (folder / f"{prefix}-images{dot}idx3-ubyte{gz}").write_bytes(pack(image_bytes(images)))
    (folder / f"{prefix}-labels{dot}idx1-ubyte{gz}").write_bytes(pack(label_bytes(labels)))
    return folder


def image_set(n: int, channels: int = 1, classes: int = 10) -> ImageSet:
    return ImageSet(
        torch.from_numpy(pixels(n, channels, 32, 32)),
        torch.arange(n) % classes,
        tuple(map(str, range(classes))),
        "made-up",
    )


def same(a: ImageSet, b: ImageSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# ImageSet


def test_subset_takes_rows_in_the_given_order() -> None:
    whole = image_set(6)
    for indices in ([4, 0, 4], torch.tensor([4, 0, 4], dtype=torch.uint8), np.array([4, 0, 4])):
        part = whole.subset(indices)
        assert len(part) == 3 and part.labels.tolist() == [4, 0, 4]
        assert torch.equal(part.images[1], whole.images[0])
        assert part.classes == whole.classes and part.name == whole.name
    part.images.zero_()
    assert whole.images.any()
    assert len(whole.subset([])) == 0
    assert whole.subset(range(2)).labels.tolist() == [0, 1]


@pytest.mark.parametrize("bad", [[6], [-1], [True, False], [0.5], [[0]]])
def test_subset_refuses(bad: Any) -> None:
    with pytest.raises(DataError, match="ind"):
        image_set(6).subset(bad)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 32, 32), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "N, C"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "32x32"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\[2\]"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.zeros(2), "int64"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.tensor([0, 2]), "label 2 of image 1"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.tensor([-1, 0]), "0 to 1"),
    ],
)
def test_image_set_keeps_its_shape(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, ("a", "b"), "set")


def test_image_set_is_frozen() -> None:
    with pytest.raises(AttributeError):
        image_set(1).name = "other"  # type: ignore[misc]


# load: arguments and digits


def test_unknown_names_and_missing_folders() -> None:
    with pytest.raises(DataError, match="'svhn'.*digits, mnist.*cifar100"):
        data.load("svhn", "train")
    with pytest.raises(DataError, match="'val'.*'train' and 'test'"):
        data.load("digits", "val")
    with pytest.raises(DataError, match="mnist.*--data-dir"):
        data.load("mnist", "train")
    assert issubclass(DataError, ValueError)


def test_digits() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (1, 32, 32) and train.classes == tuple("0123456789")
    # stratified: the test set has a fifth of each class, to within one image
    counts = torch.bincount(torch.cat([train.labels, test.labels])) / 5
    assert (torch.bincount(test.labels) - counts).abs().max() <= 1
    # together they are load_digits, each image once and in place: the corner pixel of an image of
    # 8x8 is not interpolated, and a pixel 6 rows and 9 columns in is a known blend
    bunch = sklearn.load_digits()
    rows = collections.Counter(
        (int(label), round(image[0, 0] * 255 / 16), round(image[7, 7] * 255 / 16))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    got = collections.Counter(
        (int(label), int(image[0, 0, 0]), int(image[0, 31, 31]))
        for part in (train, test)
        for image, label in zip(part.images, part.labels, strict=True)
    )
    assert rows == got
    # the first digit of its class is a training image, here
    first = next(i for i in range(20) if bunch.target[i] == train.labels[0])
    source = bunch.images[first] * 255 / 16
    # output row 6 lies at (6 + .5) / 4 - .5 = 1.125, column 9 at 1.875
    weights = np.outer([0.875, 0.125], [0.125, 0.875])
    assert int(train.images[0, 0, 6, 9]) == round((source[1:3, 1:3] * weights).sum())
    # the split is fixed for good, and not touched by the global seeds
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(test, data.load("digits", "test"))
    digest = hashlib.sha256(test.images.numpy().tobytes() + bytes(test.labels.tolist())).hexdigest()
    assert digest == "353e38e1823f4acf9b1a2f079bbde868193c418619c360d384eac786f76a8b8c"


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        data.load("digits", "train")


# load: IDX


@pytest.mark.parametrize("name", list(IDX_FOLDERS))
@pytest.mark.parametrize("place", ["direct", "name", "torchvision"])
@pytest.mark.parametrize(("dot", "gz"), [("-", ""), ("-", ".gz"), (".", ""), (".", ".gz")])
def test_idx_layouts(tmp_path: Path, name: str, place: str, dot: str, gz: str) -> None:
    folder = {
        "direct": tmp_path,
        "name": tmp_path / name,
        "torchvision": tmp_path / IDX_FOLDERS[name] / "raw",
    }[place]
    train, test = pixels(5, 28, 28), pixels(3, 28, 28, seed=1)
    write_idx(folder, train, [0, 9, 2, 3, 4], "train", dot, gz)
    write_idx(folder, test, [7, 8, 9], "t10k", dot, gz)
    got = data.load(name, "train", tmp_path)
    assert got.name == name and len(got.classes) == 10
    assert got.images.shape == (5, 1, 32, 32) and got.labels.tolist() == [0, 9, 2, 3, 4]
    assert np.array_equal(got.images[:, 0, 2:30, 2:30].numpy(), train)  # row-major, not transposed
    assert int(got.images.sum()) == int(train.sum(dtype=np.int64))  # and black around it
    got = data.load(name, "test", str(tmp_path))
    assert np.array_equal(got.images[:, 0, 2:30, 2:30].numpy(), test)
    assert got.labels.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("mnist", "0", "9"), ("notmnist", "A", "J"), ("fashion-mnist", "T-shirt/top", "Ankle boot")],
)
def test_idx_class_names(tmp_path: Path, name: str, first: str, last: str) -> None:
    classes = data.load(name, "test", write_idx(tmp_path, pixels(1, 28, 28), [0])).classes
    assert classes[0] == first and classes[-1] == last and len(set(classes)) == 10


@pytest.mark.parametrize(("h", "w", "top", "left"), [(32, 32, 0, 0), (5, 31, 13, 0), (1, 1, 15, 15)])
def test_idx_pads_other_sizes(tmp_path: Path, h: int, w: int, top: int, left: int) -> None:
    images = pixels(2, h, w)
    got = data.load("mnist", "test", write_idx(tmp_path, images, [1, 2])).images[:, 0]
    assert np.array_equal(got[:, top : top + h, left : left + w].numpy(), images)
    assert int(got.sum()) == int(images.sum(dtype=np.int64))


def test_idx_gzip_is_told_by_content(tmp_path: Path) -> None:
    write_idx(tmp_path, pixels(1, 28, 28), [3], gz=".gz")
    packed = tmp_path / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.decompress(packed.read_bytes()))
    assert data.load("mnist", "test", tmp_path).labels.tolist() == [3]


def test_idx_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        data.load("mnist", "train", tmp_path)
    for part in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "--data-dir", "--download",
                 str(tmp_path / "mnist"), str(tmp_path / "MNIST" / "raw")):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(DataError, match="none of these folders exists"):
        data.load("mnist", "train", tmp_path / "nowhere")
    write_idx(tmp_path, pixels(1, 28, 28), [0])
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=f"{tmp_path} lacks t10k-labels-idx1-ubyte"):
        data.load("mnist", "test", tmp_path)
    with pytest.raises(DataError, match="only the test split") as error:
        data.load("notmnist", "train", tmp_path)
    assert "--download" not in str(error.value)


@pytest.mark.parametrize("owner", ["mnist", "MNIST/raw", "FashionMNIST"])
def test_another_sets_folder_does_not_pass_for_this_one(tmp_path: Path, owner: str) -> None:
    folder = write_idx(tmp_path / owner, pixels(1, 28, 28), [0])
    with pytest.raises(DataError, match="another data set"):
        data.load("notmnist", "test", folder)
    write_idx(folder / "notmnist", pixels(1, 28, 28), [5])
    assert data.load("notmnist", "test", folder).labels.tolist() == [5]


GOOD_IMAGES, GOOD_LABELS = image_bytes(pixels(4, 28, 28)), label_bytes([0, 1, 2, 3])


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD_LABELS, GOOD_LABELS, "images.*00 00 08 01.*2051"),
        (GOOD_IMAGES, GOOD_IMAGES, "labels.*00 00 08 03.*2049"),
        (b"", GOOD_LABELS, "images.*nothing"),
        (GOOD_IMAGES[:10], GOOD_LABELS, "images.*header"),
        (b"\x00\x00\x0d\x03" + GOOD_IMAGES[4:], GOOD_LABELS, "images.*00 00 0d 03"),
        (GOOD_IMAGES[:-1], GOOD_LABELS, "images.*3135 bytes.*4 x 28 x 28 = 3136"),
        (GOOD_IMAGES + b"x", GOOD_LABELS, "images.*more bytes.*3136"),
        (struct.pack(">4I", 0x803, 2**32 - 1, 28, 28) + b"x", GOOD_LABELS, "images.*holds 1 bytes"),
        (struct.pack(">4I", 0x803, 4, 2**31, 2**31), GOOD_LABELS, "images.*sides of 1 to 32"),
        (image_bytes(pixels(1, 33, 28)), label_bytes([0]), "images.*33 x 28"),
        (struct.pack(">4I", 0x803, 4, 0, 28), GOOD_LABELS, "images.*sides of 1 to 32"),
        (struct.pack(">4I", 0x803, 0, 28, 28), label_bytes([]), "images.*at least one"),
        (GOOD_IMAGES, label_bytes([0, 1, 2]), "labels.*3 labels.*4 images"),
        (GOOD_IMAGES, GOOD_LABELS[:-1], "labels.*3 bytes"),
        (GOOD_IMAGES, label_bytes([0, 10, 2, 3]), "labels.*label 10 of image 1.*0 to 9"),
    ],
)
def test_idx_damage(tmp_path: Path, gz: str, images: bytes, labels: bytes, message: str) -> None:
    pack = gzip.compress if gz else bytes
    (tmp_path / f"t10k-images-idx3-ubyte{gz}").write_bytes(pack(images))
    (tmp_path / f"t10k-labels-idx1-ubyte{gz}").write_bytes(pack(labels))
    with pytest.raises(DataError, match=message):
        data.load("mnist", "test", tmp_path)


def test_idx_damaged_gzip(tmp_path: Path) -> None:
    write_idx(tmp_path, pixels(4, 28, 28), [0, 1, 2, 3], gz=".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the stored checksum
    for content in (whole[:-4], whole[: len(whole) // 2], whole[:2], whole[:25], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz"):
            data.load("mnist", "test", tmp_path)


# load: CIFAR

CIFAR: dict[str, tuple[Any, ...]] = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py", 1),
    "cifar100": ("cifar-100-binary", "cifar-100-python", 2),
}
TRAIN_STEMS = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)], "cifar100": ["train"]}
TEST_STEMS = {"cifar10": ["test_batch"], "cifar100": ["test"]}


def cifar_bin(name: str, images: np.ndarray, labels: list[int]) -> bytes:
    coarse = b"\x13" if name == "cifar100" else b""
    return b"".join(
        coarse + bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)
    )


def cifar_py(name: str, images: np.ndarray, labels: list[int]) -> dict[bytes, Any]:
    rows = images.reshape(len(images), -1)
    if name == "cifar10":
        return {b"batch_label": b"batch", b"labels": labels, b"data": rows, b"filenames": [b"a"]}
    return {b"fine_labels": labels, b"coarse_labels": [19] * len(labels), b"data": rows, b"e": b""}


def write_cifar(root: Path, name: str, layout: str, protocol: int = 2) -> dict[str, Any]:
    folder = root / CIFAR[name][0 if layout == "bin" else 1]
    folder.mkdir(parents=True)
    wrote: dict[str, Any] = {}
    for split, stems in (("train", TRAIN_STEMS[name]), ("test", TEST_STEMS[name])):
        parts = []
        for number, stem in enumerate(stems):
            images = pixels(2, 3, 32, 32, seed=len(stem) + 10 * number)
            labels = [number, 9 if name == "cifar10" else 99 - number]
            if layout == "bin":
                (folder / f"{stem}.bin").write_bytes(cifar_bin(name, images, labels))
            else:
                content = pickle.dumps(cifar_py(name, images, labels), protocol=protocol)
                (folder / stem).write_bytes(content)
            parts.append((images, labels))
        images = np.concatenate([images for images, _ in parts])
        wrote[split] = images, [label for _, labels in parts for label in labels]
    return wrote


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("layout", "protocol"), [("bin", 0), *(("py", p) for p in range(5))])
@pytest.mark.parametrize("name", list(CIFAR))
def test_cifar_layouts(tmp_path: Path, name: str, layout: str, protocol: int, inside: bool) -> None:
    wrote = write_cifar(tmp_path, name, layout, protocol)
    folder = next(tmp_path.iterdir()) if inside else tmp_path
    for split, (images, labels) in wrote.items():
        got = data.load(name, split, folder)
        assert got.labels.tolist() == labels and got.name == name
        assert np.array_equal(got.images.numpy(), images)  # red, green, blue planes, row-major
    assert got.classes[0] == ("airplane" if name == "cifar10" else "apple")
    assert len(set(got.classes)) == (10 if name == "cifar10" else 100)


def test_cifar_below_a_folder_with_the_sets_name(tmp_path: Path) -> None:
    wrote = write_cifar(tmp_path / "cifar10", "cifar10", "bin")
    assert data.load("cifar10", "test", tmp_path).labels.tolist() == wrote["test"][1]


# As Python 2 and numpy 1 wrote the official files (GLOBAL, byte strings, short codes), by hand.
PYTHON2_PICKLE = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04"
    b"K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00%btb"
    b"U\x06labelsq\x08]q\x09K\x07au."
)


def test_cifar_python2_pickle(tmp_path: Path) -> None:
    image = pixels(3, 32, 32)
    content = PYTHON2_PICKLE.replace(b"%b", image.tobytes())
    (tmp_path / "test_batch").write_bytes(content)
    got = data.load("cifar10", "test", tmp_path)
    assert np.array_equal(got.images[0].numpy(), image) and got.labels.tolist() == [7]
    assert pickle.loads(content, encoding="bytes")[b"labels"] == [7]  # it is a true pickle


def test_cifar_fortran_ordered_array(tmp_path: Path) -> None:
    image = pixels(2, 3, 32, 32)
    rows = np.asfortranarray(image.reshape(2, -1))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": rows, "labels": [0, 1]}, 2))
    assert np.array_equal(data.load("cifar10", "test", tmp_path).images.numpy(), image)


def test_cifar_class_names_from_the_files(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(100)]
    write_cifar(tmp_path / "a", "cifar10", "bin")
    meta = tmp_path / "a" / "cifar-10-batches-bin" / "batches.meta.txt"
    meta.write_text("\n".join(names[:10]) + "\n\n")
    assert data.load("cifar10", "test", tmp_path / "a").classes == tuple(names[:10])
    meta.write_text("cat\n")
    with pytest.raises(DataError, match="batches.meta.txt must hold 10 class names"):
        data.load("cifar10", "test", tmp_path / "a")
    write_cifar(tmp_path / "b", "cifar100", "py")
    meta = tmp_path / "b" / "cifar-100-python" / "meta"
    meta.write_bytes(pickle.dumps({b"fine_label_names": [n.encode() for n in names]}, 2))
    assert data.load("cifar100", "train", tmp_path / "b").classes == tuple(names)
    meta.write_bytes(pickle.dumps({b"coarse": []}, 2))
    with pytest.raises(DataError, match="meta must hold 100 class names"):
        data.load("cifar100", "train", tmp_path / "b")


def test_cifar_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_batch_1.*cifar-10-batches-bin.*--data-dir"):
        data.load("cifar10", "train", tmp_path)
    write_cifar(tmp_path, "cifar10", "bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-bin lacks data_batch_3.bin"):
        data.load("cifar10", "train", tmp_path)
    (tmp_path / "train").mkdir()  # a folder of images is not CIFAR-100's python layout
    with pytest.raises(DataError, match="no cifar100 train files"):
        data.load("cifar100", "train", tmp_path)


@pytest.mark.parametrize("name", list(CIFAR))
def test_cifar_binary_damage(tmp_path: Path, name: str) -> None:
    classes, stem = (10, "test_batch") if name == "cifar10" else (100, "test")
    path = tmp_path / f"{stem}.bin"
    good = cifar_bin(name, pixels(2, 3, 32, 32), [0, 1])
    for content in (b"", good[:-1], good + b"x", good[:1000]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{stem}.bin has {len(content)} bytes.*multiple of"):
            data.load(name, "test", tmp_path)
    path.write_bytes(cifar_bin(name, pixels(2, 3, 32, 32), [0, classes]))
    with pytest.raises(DataError, match=f"{stem}.bin: label {classes} of image 1"):
        data.load(name, "test", tmp_path)


class Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (os.system, f"{os.name if os.name == 'nt' else 'posix'}.system"),
        (eval, "(builtins|__builtin__).eval"),
        (getattr, "(builtins|__builtin__).getattr"),
        (np.load, "numpy.load"),
    ],
)
def test_evil_pickle(tmp_path: Path, protocol: int, call: Any, names: str) -> None:
    trace = tmp_path / "trace"
    rows = pixels(1, 3072)
    content = {"data": rows, "labels": [0], "x": Evil(call, f"echo > {trace}")}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError, match=f"test_batch: refused.*global.*{names}"):
        data.load("cifar10", "test", tmp_path)
    assert not trace.exists()


def test_pickle_codecs(tmp_path: Path) -> None:
    # _codecs.encode is how Python 3 writes bytes for Python 2, but other codecs are plug-ins
    evil = pickle.dumps(Evil(codecs.encode, "text", "rot13"), 2)
    (tmp_path / "test_batch").write_bytes(evil)
    with pytest.raises(DataError, match="test_batch: refused.*rot13"):
        data.load("cifar10", "test", tmp_path)


ROWS = pixels(2, 3072)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [0, 1]}, "'data' must be"),
        ({"data": ROWS.tolist(), "labels": [0, 1]}, "'data' must be"),
        ({"data": ROWS[:, 1:], "labels": [0, 1]}, "'data' must be"),
        ({"data": ROWS.reshape(-1), "labels": [0, 1]}, "'data' must be"),
        ({"data": ROWS[:0], "labels": []}, "'data' must be"),
        ({"data": ROWS.astype(np.float32), "labels": [0, 1]}, "dtype.*f4"),
        ({"data": ROWS.astype(object), "labels": [0, 1]}, "dtype.*O"),
        ({"data": ROWS}, "'labels' must be a list of 2 integers"),
        ({"data": ROWS, "labels": [0]}, "'labels' must be a list of 2 integers"),
        ({"data": ROWS, "labels": [0, "1"]}, "'labels' must be a list of 2 integers"),
        ({"data": ROWS, "labels": [0, 2**70]}, "'labels' must be a list of 2 integers"),
        ({"data": ROWS, "labels": [0, 10]}, "label 10 of image 1"),
        ({"data": ROWS, "labels": [-1, 0]}, "label -1 of image 0"),
        ([ROWS], "must hold a dict"),
        (None, "must hold a dict"),
    ],
)
def test_cifar_python_damage(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match=f"test_batch.*{message}"):
        data.load("cifar10", "test", tmp_path)


def test_cifar_python_truncated(tmp_path: Path) -> None:
    content = PYTHON2_PICKLE.replace(b"%b", bytes(3072))
    for cut in (*range(0, 250, 7), 1000, len(content) - 1):
        (tmp_path / "test_batch").write_bytes(content[:cut])
        with pytest.raises(DataError, match="test_batch.*pickle"):
            data.load("cifar10", "test", tmp_path)
    # an array that claims more than it holds, and bytes that are no pickle at all
    for bad in (content.replace(b"M\x00\x0c", b"J\xff\xff\xff\x7f"), b"\xff" * 50, b"\x80\x02]"):
        (tmp_path / "test_batch").write_bytes(bad)
        with pytest.raises(DataError, match="test_batch.*pickle"):
            data.load("cifar10", "test", tmp_path)


# download


def publish(monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes], *bases: Path) -> None:
    """Serve files from the last of the mirror folders through file:// addresses."""
    bases[-1].mkdir(exist_ok=True)
    for file, content in files.items():
        (bases[-1] / file).write_bytes(content)
    sums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(data._MIRRORS, name, (tuple(f"{b.as_uri()}/" for b in bases), sums))


def tar_bytes(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def mnist_files() -> dict[str, bytes]:
    return {
        f"{prefix}-{kind}.gz": gzip.compress(content)
        for prefix in ("train", "t10k")
        for kind, content in (
            ("images-idx3-ubyte", GOOD_IMAGES),
            ("labels-idx1-ubyte", GOOD_LABELS),
        )
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.part")]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_download_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # the first mirror does not answer, the second does
    publish(monkeypatch, name, mnist_files(), tmp_path / "down", tmp_path / "up")
    got = data.load(name, "train", tmp_path / "here", download=True)
    assert got.labels.tolist() == [0, 1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "here" / name).iterdir()) == sorted(mnist_files())
    for path in (tmp_path / "up").iterdir():  # now nothing is fetched any more
        path.unlink()
    assert same(got, data.load(name, "test", tmp_path / "here", download=True))
    assert data.download(name, tmp_path / "here") == tmp_path / "here" / name


@pytest.mark.parametrize("name", list(CIFAR))
def test_download_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wrote = write_cifar(tmp_path / "made", name, "bin")
    folder = tmp_path / "made" / CIFAR[name][0]
    members = {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    archive = next(iter(data._MIRRORS[name][1]))
    names = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}[name]
    count = 10 if name == "cifar10" else 100
    members |= {
        f"{folder.name}/{names}": "\n".join(f"c{i}" for i in range(count)).encode(),
        f"{folder.name}/readme.html": b"<html>",
        f"{folder.name}/../../outside.bin": b"x",
        f"../{'test_batch' if name == 'cifar10' else 'test'}.bin": b"not the test set",
        "/tmp/absolute-from-test-data.bin": b"x",
    }
    publish(monkeypatch, name, {archive: tar_bytes(members)}, tmp_path / "up")
    got = data.load(name, "test", tmp_path / "a" / "here", download=True)
    assert got.labels.tolist() == wrote["test"][1] and got.classes[1] == "c1"
    assert np.array_equal(got.images.numpy(), wrote["test"][0])
    here = {p.relative_to(tmp_path / "a" / "here") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    expected = {f"{s}.bin" for s in (*TRAIN_STEMS[name], *TEST_STEMS[name])} | {names}
    assert here == {Path(folder.name) / file for file in expected}  # no archive, nothing outside
    assert not Path("/tmp/absolute-from-test-data.bin").exists()
    (tmp_path / "up" / archive).unlink()
    data.download(name, tmp_path / "a" / "here")  # complete: nothing to fetch


def test_download_ignores_links_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    members = {f"cifar-10-batches-bin/{stem}.bin": b"x" for stem in TRAIN_STEMS["cifar10"]}
    content = tar_bytes(members, links={"cifar-10-batches-bin/test_batch.bin": str(victim)})
    publish(monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": content}, tmp_path / "up")
    with pytest.raises(DataError, match="lacks test_batch.bin"):
        data.download("cifar10", tmp_path / "here")
    assert victim.read_bytes() == b"mine"
    assert not (tmp_path / "here" / "cifar-10-batches-bin" / "cifar-10-binary.tar.gz").exists()


def test_download_damaged_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tar_bytes({"cifar-100-binary/train.bin": pixels(9000).tobytes()})
    for content in (b"not a tar", whole[:-200], whole[:4000]):
        publish(monkeypatch, "cifar100", {"cifar-100-binary.tar.gz": content}, tmp_path / "up")
        with pytest.raises(DataError, match=r"cifar-100-binary.tar.gz (cannot be unpacked|lacks)"):
            data.download("cifar100", tmp_path / "here")
        assert not leftovers(tmp_path)


def test_download_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "mnist", mnist_files(), tmp_path / "up")
    first = next(iter(data._MIRRORS["mnist"][1]))
    (tmp_path / "up" / first).write_bytes(b"<html>please log in</html>")
    with pytest.raises(DataError, match=f"up/{first}: its MD5 is .*, not .* by hand") as error:
        data.load("mnist", "train", tmp_path / "here", download=True)
    assert str(tmp_path / "here" / "mnist") in str(error.value)
    assert not list((tmp_path / "here" / "mnist").iterdir())  # neither the file nor a part of it
    publish(monkeypatch, "cifar10", {}, tmp_path / "gone")
    monkeypatch.setitem(
        data._MIRRORS, "cifar10", data._MIRRORS["cifar10"][:1] + ({"cifar-10-binary.tar.gz": "0"},)
    )
    with pytest.raises(DataError, match=f"gone/cifar-10-binary.tar.gz: .*unpack it in {tmp_path}"):
        data.download("cifar10", tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot create the folder"):
        data.download("mnist", tmp_path / "file")


def test_download_keeps_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "mnist", mnist_files(), tmp_path / "up")
    write_idx(tmp_path / "mnist", pixels(1, 28, 28), [0], "train")
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(b"mine")
    with pytest.raises(DataError, match="train-images-idx3-ubyte starts with"):
        data.load("mnist", "train", tmp_path, download=True)
    assert (tmp_path / "mnist" / "train-images-idx3-ubyte").read_bytes() == b"mine"
    assert not list(tmp_path.glob("mnist/*.gz"))  # no fetching around it either


def test_nothing_to_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="notmnist has no official mirror"):
        data.load("notmnist", "train", tmp_path, download=True)
    with pytest.raises(DataError, match="scikit-learn"):
        data.download("digits", tmp_path)
    with pytest.raises(DataError, match="unknown data set"):
        data.download("svhn", tmp_path)


def test_published_sums() -> None:
    for name in set(data.DATASETS) - {"digits", "notmnist"}:
        mirrors, sums = data._MIRRORS[name]
        assert all(m.startswith(("https://", "http://")) and m.endswith("/") for m in mirrors)
        assert all(len(bytes.fromhex(md5)) == 16 for md5 in sums.values())


# from_torchvision


class Pairs:
    """A map-style data set of whatever pairs it is given."""

    def __init__(self, *pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Any:
        return self.pairs[i]


class Vision:
    """As torchvision's data sets: .data and .targets, and items made from them."""

    def __init__(self, values: Any, targets: Any, transform: Any = None) -> None:
        self.data, self.targets, self.transform = values, targets, transform
        self.target_transform = self.transforms = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = np.asarray(self.data[i])
        return self.transform(image) if self.transform else image, int(self.targets[i])


class Picture:
    """As much of a PIL image as there needs to be."""

    def __init__(self, values: np.ndarray, mode: str) -> None:
        self.values, self.mode = values, mode

    def convert(self, mode: str) -> Picture:
        if mode == self.mode:
            return self
        grey = self.values[..., 0] if self.values.ndim == 3 else self.values
        return Picture(grey if mode == "L" else np.stack([grey] * 3, -1), mode)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.values


def test_from_torchvision_whole_tensors() -> None:
    values = pixels(4, 28, 28)
    source = Vision(torch.from_numpy(values), torch.tensor([3, 1, 0, 2]))
    got = data.from_torchvision(source)
    assert got.name == "vision" and got.classes == ("0", "1", "2", "3")
    assert np.array_equal(got.images[:, 0, 2:30, 2:30].numpy(), values)
    assert got.labels.tolist() == [3, 1, 0, 2]
    source.data.zero_(), source.targets.zero_()
    assert got.images.any() and got.labels.any()  # a copy
    source.classes = list("abcdefghij")  # type: ignore[attr-defined]
    assert data.from_torchvision(source, "mine").classes == tuple("abcdefghij")
    assert data.from_torchvision(source, "mine").name == "mine"


@pytest.mark.parametrize("to", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("targets", [[2, 0, 1], np.array([2, 0, 1]), torch.tensor([2, 0, 1])])
def test_from_torchvision_colour_arrays(to: Any, targets: Any) -> None:
    values = pixels(3, 32, 32, 3)  # as CIFAR's: height, width, channels
    got = data.from_torchvision(Vision(to(values), targets))
    assert np.array_equal(got.images.numpy(), values.transpose(0, 3, 1, 2))
    items = Vision(values, targets, transform=lambda image: image)  # not read at once
    assert same(got, data.from_torchvision(items))
    got = data.from_torchvision(Vision(to(values.transpose(0, 3, 1, 2).copy()), targets))
    assert np.array_equal(got.images.numpy(), values.transpose(0, 3, 1, 2))


def test_from_torchvision_transforms_are_applied() -> None:
    values = pixels(3, 28, 28)

    def to_tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(255 - image).float()[None] / 255

    got = data.from_torchvision(Vision(values, [0, 1, 2], to_tensor))
    assert np.array_equal(got.images[:, 0, 2:30, 2:30].numpy(), 255 - values)
    part: Any = torch.utils.data.Subset(Vision(values, [0, 1, 2]), [2, 0])  # type: ignore[arg-type]
    got = data.from_torchvision(part)
    assert np.array_equal(got.images[:, 0, 2:30, 2:30].numpy(), values[[2, 0]])
    assert got.labels.tolist() == [2, 0]


def test_from_torchvision_kinds_of_images() -> None:
    grey = pixels(20, 32)
    bits = grey > 127
    images = [
        grey,
        grey[..., None],
        grey.astype(np.int64),
        grey / 255,
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
        torch.from_numpy(grey)[None].double() / 255,
        (torch.from_numpy(grey) / 255).half(),
        (torch.from_numpy(grey) / 255).requires_grad_(),
        Picture(grey, "L"),
        Picture(np.stack([grey, grey], -1), "LA"),
        Picture(grey.astype(np.int32), "I"),
        Picture((grey / 255).astype(np.float32), "F"),
    ]
    got = data.from_torchvision(Pairs(*((image, np.int64(i)) for i, image in enumerate(images))))
    assert torch.equal(got.images[:, 0, 6:26], torch.from_numpy(grey).expand(len(images), -1, -1))
    assert not got.images[:, :, :6].any() and not got.images[:, :, 26:].any()
    assert got.labels.tolist() == list(range(len(images)))
    for image in (bits, torch.from_numpy(bits), Picture(grey, "P")):
        kind = data.from_torchvision(Pairs((image, torch.tensor(0))))
        expected = torch.from_numpy(grey if isinstance(image, Picture) else bits * np.uint8(255))
        assert all(torch.equal(plane[6:26], expected) for plane in kind.images[0])
    thin = pixels(3, 20, 3)  # both ends could be channels: arrays have them last, tensors first
    got = data.from_torchvision(Pairs((thin, 0)))
    assert np.array_equal(got.images[0, :, 14:17, 6:26].numpy(), thin.transpose(2, 0, 1))
    got = data.from_torchvision(Pairs((torch.from_numpy(thin), 0)))
    assert np.array_equal(got.images[0, :, 6:26, 14:17].numpy(), thin)


GREY = pixels(28, 28)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Pairs(), "empty"),
        ((pair for pair in [(GREY, 0)]), "map-style"),
        (Pairs((GREY, 0), GREY), "item 1 must be"),
        (Pairs((GREY, 0), (GREY, 1.0)), "item 1 must be"),
        (Pairs((GREY, [1, 0])), "item 0 must be"),
        (Pairs((GREY, -1)), "label -1 of image 0"),
        (Pairs(("a.png", 0)), "item 0 must be a PIL image.*not str"),
        (Pairs((pixels(33, 28), 0)), r"item 0.*\[33, 28\].*1 to 32"),
        (Pairs((pixels(28, 28, 4), 0)), r"item 0.*\[28, 28, 4\].*1 or 3 channels"),
        (Pairs((pixels(28), 0)), "item 0 has images of shape"),
        (Pairs((pixels(0, 28), 0)), "item 0 has images of shape"),
        (Pairs((GREY, 0), (pixels(28, 28, 3), 0)), "item 1 has 3 channels, but item 0 1"),
        (Pairs((GREY / 100, 0)), r"item 0.*float64 from .*\[0, 1\]"),
        (Pairs((torch.full((28, 28), torch.nan), 0)), "item 0.*nan"),
        (Pairs((torch.full((1, 28, 28), -1.0), 0)), "item 0.*Normalize"),
        (Pairs((GREY.astype(int) + 1, 0)), "item 0.*int64 from .* to 256"),
        (Pairs((GREY.astype(complex), 0)), "item 0.*complex"),
        (Vision(pixels(2, 64, 64, 3), [0, 1]), r"\.data.*64"),
        (Vision(pixels(2, 28, 28), [0.0, 1.0]), r"\.targets must be 2 integers"),
        (Vision(pixels(2, 28, 28), ["a", "b"]), r"\.targets must be 2 integers"),
        (Vision(pixels(2, 28, 28), [[0], [1]]), r"\.targets must be 2 integers"),
    ],
)
def test_from_torchvision_refuses(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.from_torchvision(source)


def test_from_torchvision_labels_beyond_the_classes() -> None:
    source = Vision(pixels(2, 28, 28), [0, 2])
    source.classes = ["a", "b"]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="vision: label 2 of image 1"):
        data.from_torchvision(source)


def test_from_torchvision_targets_under_another_name() -> None:
    source = Vision(pixels(2, 28, 28), [1, 0])  # as SVHN: .data and .labels
    plain = Pairs(source[0], source[1])
    plain.data = source.data  # type: ignore[attr-defined]
    assert data.from_torchvision(plain).labels.tolist() == [1, 0]


# splitting, statistics, batches


def test_split_validation() -> None:
    whole = image_set(50, classes=50)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    train, validation = data.split_validation(whole, 20, seed=7)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (len(train), len(validation)) == (30, 20)
    assert sorted(train.labels.tolist() + validation.labels.tolist()) == list(range(50))
    assert torch.equal(validation.images, whole.images[validation.labels])
    assert validation.labels.tolist() != list(range(20))
    torch.manual_seed(4)
    again = data.split_validation(whole, 20, seed=7)
    assert same(train, again[0]) and same(validation, again[1])
    assert not same(validation, data.split_validation(whole, 20, seed=8)[1])
    fewer, held_out = data.split_validation(whole, 20, seed=7, train_samples=10)
    assert same(held_out, validation) and same(fewer, train.subset(range(10)))
    assert [len(part) for part in data.split_validation(whole, 0, 0)] == [50, 0]
    assert [len(part) for part in data.split_validation(whole, 49, 0, 1)] == [1, 49]


@pytest.mark.parametrize(
    ("validation", "seed", "samples", "message"),
    [
        (50, 0, None, "hold out 50 of 50"),
        (-1, 0, None, "hold out -1 of 50.*0 to 49"),
        (20, 0, 31, "31 samples.*50 images less 20.*leave 30"),
        (20, 0, 0, "0 samples"),
        (20, -1, None, "seed -1"),
        (20, 2**63, None, "seed"),
    ],
)
def test_split_validation_refuses(validation: int, seed: int, samples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.split_validation(image_set(50), validation, seed, samples)


def test_channel_stats() -> None:
    images = image_set(40, channels=3).images
    images[:, 1] //= 2
    means, stds = data.channel_stats(images)
    exact = images.double() / 255
    torch.testing.assert_close(torch.tensor(means).double(), exact.mean((0, 2, 3)))
    expected = exact.std((0, 2, 3), correction=0)
    assert (torch.tensor(stds, dtype=torch.float64) - expected).abs().max() < 1e-12
    order = torch.randperm(40)
    assert (means, stds) == data.channel_stats(images[order])  # to the last bit
    assert (means, stds) == data.channel_stats(images.contiguous(memory_format=torch.channels_last))


def test_channel_stats_by_hand() -> None:
    images = torch.zeros(1, 2, 2, 2, dtype=torch.uint8)
    images[0, 0] = torch.tensor([[0, 255], [255, 0]])
    images[0, 1] = 51
    assert data.channel_stats(images) == ([0.5, 0.2], [0.5, 1 / 255])


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).byte(), torch.zeros(0, 1, 4, 4).byte()]
)
def test_channel_stats_refuses(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="channel_stats"):
        data.channel_stats(bad)


def test_normalize() -> None:
    images = image_set(5, channels=3).images
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    expected = images.double() / 255
    for c in range(3):
        expected[:, c] = (expected[:, c] - mean[c]) / std[c]
    kept = images.clone()
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        got = data.normalize(given, mean, std)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert (got - expected).abs().max() < 1e-6
    assert torch.equal(images, kept)
    standard = data.normalize(images, *data.channel_stats(images))
    assert standard.mean((0, 2, 3)).abs().max() < 1e-5
    assert (standard.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert data.normalize(images[:0], mean, std).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "mean", "std", "message"),
    [
        (torch.zeros(1, 1, 4, 4), [0.0], [1.0], "uint8"),
        (torch.zeros(1, 4, 4).byte(), [0.0], [1.0], "N, C"),
        (torch.zeros(1, 3, 4, 4).byte(), [0.0], [1.0, 1.0, 1.0], "3 channels.*1 and 3"),
        (torch.zeros(1, 1, 4, 4).byte(), [0.0], [0.0], "stds > 0"),
        (torch.zeros(1, 1, 4, 4).byte(), [float("nan")], [1.0], "finite"),
    ],
)
def test_normalize_refuses(images: Any, mean: Any, std: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.normalize(images, mean, std)


def test_batches() -> None:
    assert [b.tolist() for b in data.batches(5, 2, None)] == [[0, 1], [2, 3], [4]]
    assert [b.tolist() for b in data.batches(4, 2, None)] == [[0, 1], [2, 3]]
    assert [b.tolist() for b in data.batches(2, 9, None)] == [[0, 1]]
    assert list(data.batches(0, 4, None)) == []
    generator = torch.Generator().manual_seed(5)
    first, second = (list(data.batches(100, 32, generator)) for _ in range(2))
    assert [len(b) for b in first] == [32, 32, 32, 4] and first[0].dtype == torch.int64
    assert torch.cat(first).sort().values.tolist() == list(range(100))
    assert not torch.equal(torch.cat(first), torch.cat(second))  # another epoch, another order
    expected = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(first), expected)
    for n, size in ((-1, 2), (5, 0)):
        with pytest.raises(DataError, match=f"{n} images into batches of {size}"):
            data.batches(n, size, None)  # at the call, not at the first batch
