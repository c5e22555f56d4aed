"""Image data sets as 32x32 uint8 tensors: loading, downloading, splitting, normalizing, batching.

Everything a user or a file can get wrong raises :class:`DataError` with one sentence that names the
file or value and what is allowed. Files are never trusted: sizes are checked against the bytes that
are really there, and CIFAR's pickles are read without ever importing what they name.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import operator
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DATASETS", "DataError", "ImageSet", "batches", "channel_stats", "download", "from_torchvision",
    "load", "normalize", "split_validation",
]  # fmt: skip

DATASETS: tuple[str, ...] = ("digits", "mnist", "notmnist", "fashion-mnist", "cifar10", "cifar100")

_SIDE = 32
_CHUNK = 1 << 20
_DIGITS = tuple("0123456789")
_CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
_CLASSES: dict[str, tuple[str, ...]] = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "notmnist": tuple("ABCDEFGHIJ"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "cifar100": tuple(_CIFAR100_CLASSES.split()),
}  # fmt: skip

# The three IDX data sets, with the folder names torchvision gives them.
_IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "notmnist": "notMNIST"}


class _Cifar(NamedTuple):
    folders: tuple[str, str]  # binary layout, python layout
    meta: tuple[str, str]  # the files with the class names, likewise
    keys: tuple[str, str]  # of the labels and of the class names in the pickles
    label_bytes: int  # before each binary record's pixels; the last of them is the class
    files: dict[str, list[str]]  # by split; the binary layout appends ".bin"


_CIFAR = {
    "cifar10": _Cifar(
        ("cifar-10-batches-bin", "cifar-10-batches-py"), ("batches.meta.txt", "batches.meta"),
        ("labels", "label_names"), 1,
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    ),
    "cifar100": _Cifar(
        ("cifar-100-binary", "cifar-100-python"), ("fine_label_names.txt", "meta"),
        ("fine_labels", "fine_label_names"), 2, {"train": ["train"], "test": ["test"]},
    ),
}  # fmt: skip

# Per data set: mirrors in the order to try, and the MD5 its publishers state for each file.
_IDX_FILES = (
    "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz",
)  # fmt: skip
_TORONTO = ("https://www.cs.toronto.edu/~kriz/",)
_MIRRORS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "mnist": (
        ("https://ossci-datasets.s3.amazonaws.com/mnist/",
         "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        dict(zip(_IDX_FILES, (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
        ), strict=True)),
    ),
    "fashion-mnist": (
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        dict(zip(_IDX_FILES, (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
        ), strict=True)),
    ),
    "cifar10": (_TORONTO, {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "cifar100": (_TORONTO, {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}),
}  # fmt: skip


class DataError(ValueError):
    """Bad input data, a bad argument about data, or a failed download."""


class _MissingError(DataError):
    """Files are not there (as opposed to damaged), so a download may help."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one data set, in memory.

    Attributes:
        images: uint8 ``[N, C, 32, 32]``, pixel values 0..255.
        labels: int64 ``[N]``, each in ``0..len(classes)-1``.
        classes: the class names, by label.
        name: what to call the data set in messages and results.

    Raises:
        DataError: a wrong shape or dtype, or a label without a class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        _check_images(images, self.name)
        if images.shape[2:] != (_SIDE, _SIDE):
            raise DataError(f"{self.name}: images must be 32x32, not {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.name}: labels must be int64 [{len(images)}], one for each image, "
                f"not {labels.dtype} {list(labels.shape)}"
            )
        _check_labels(labels, len(self.classes), self.name)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | np.ndarray | Sequence[int]) -> ImageSet:
        """The images at ``indices`` (integers ``[M]``, each in ``0..N-1``), in that order, copied.

        Raises:
            DataError: indices that are not a flat list of integers, or out of range.
        """
        index = torch.as_tensor(indices, device=self.labels.device)
        if index.numel() == 0:
            index = index.to(torch.int64)  # an empty list arrives as float32
        if index.ndim != 1 or index.dtype == torch.bool or index.is_floating_point():
            raise DataError(f"{self.name}: indices must be a flat list of integers")
        index = index.to(torch.int64)  # uint8 would be taken for a mask
        outside = index[(index < 0) | (index >= len(self))]
        if len(outside):
            raise DataError(f"{self.name}: index {int(outside[0])} is out of range for {len(self)} images")
        return ImageSet(self.images[index], self.labels[index], self.classes, self.name)


def load(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
) -> ImageSet:
    """Load one split of a known data set, as 32x32 images.

    Args:
        name: one of :data:`DATASETS`. ``digits`` needs scikit-learn and no files.
        split: ``"train"`` or ``"test"``.
        data_dir: folder with the data set's usual files, or its parent. IDX files (raw or gzip) may
            lie in it, in ``<name>/`` or in torchvision's ``<Name>/raw/``; CIFAR may have the binary
            or the python layout. Images smaller than 32x32 are centred on black.
        download: fetch files that are missing into ``data_dir`` first (see :func:`download`).

    Returns:
        The split: images uint8 ``[N, 1 or 3, 32, 32]``, labels int64 ``[N]``, in file order.

    Raises:
        DataError: an unknown name or split, or files that are missing or damaged.
    """
    _check_name(name)
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}: allowed are 'train' and 'test'")
    if name == "digits":
        return _load_digits(split)
    if data_dir is None:
        raise DataError(f"{name} needs a folder: pass --data-dir FOLDER (data_dir=...)")
    folder = Path(data_dir).expanduser()
    read = _load_idx if name in _IDX_FOLDERS else _load_cifar
    try:
        return read(name, split, folder)
    except _MissingError:
        if not download:
            raise
    _download(name, folder)
    return read(name, split, folder)


def _check_name(name: str) -> None:
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: allowed are {', '.join(DATASETS)}")


def _check_images(images: Tensor, source: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"{source}: images must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}"
        )


def _check_labels(labels: Tensor, classes: int, source: object) -> None:
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise DataError(
            f"{source}: label {int(labels[i])} of image {i} is out of range: "
            f"allowed are 0 to {classes - 1}"
        )


def _pad(images: np.ndarray) -> Tensor:
    """uint8 [N, C, H, W], sides <= 32, centred on black 32x32; always a copy."""
    n, c, h, w = images.shape
    top, left = (_SIDE - h) // 2, (_SIDE - w) // 2
    padded = np.zeros((n, c, _SIDE, _SIDE), np.uint8)
    padded[:, :, top : top + h, left : left + w] = images
    return torch.from_numpy(padded)


def _load_digits(split: str) -> ImageSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"digits needs scikit-learn ({error}): pip install scikit-learn") from error
    bunch = load_digits()
    target = np.asarray(bunch.target, np.int64)
    # A stratified split: shuffled, grouped by class, every fifth to the test set. RandomState's
    # stream is frozen by numpy (default_rng's is not), so the split never changes.
    order = np.random.RandomState(0).permutation(len(target))
    order = order[np.argsort(target[order], kind="stable")]
    test = np.zeros(len(target), bool)
    test[order[::5]] = True
    chosen = np.flatnonzero(test if split == "test" else ~test)
    pixels = torch.from_numpy(np.asarray(bunch.images, np.float32)[chosen, None])
    # Integers 0..16 and weights of n/8: every product below is exact in float32, so the bytes are
    # the same on every machine.
    pixels = torch.nn.functional.interpolate(
        pixels, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False
    )
    images = (pixels * 255 / 16).round().to(torch.uint8)
    return ImageSet(images, torch.from_numpy(target[chosen]), _CLASSES["digits"], "digits")


def _find(
    what: str, candidates: list[tuple[Path, list[list[str]]]], note: str, fetchable: bool
) -> list[Path]:
    """One path per group of alternative file names, all from the first folder that has them all."""
    for folder, groups in candidates:
        found = [next((folder / n for n in g if os.path.isfile(folder / n)), None) for g in groups]
        paths = [path for path in found if path is not None]
        if len(paths) == len(groups):
            return paths
        if paths:
            lacks = [g[0] for g, path in zip(groups, found, strict=True) if path is None]
            note += f"; {folder} lacks {', '.join(lacks)}"
    if not any(os.path.isdir(folder) for folder, _ in candidates):
        note += "; none of these folders exists"
    folders = dict.fromkeys(str(folder) for folder, _ in candidates)
    cure = " or fetch them with --download (download=True)" if fetchable else ""
    raise _MissingError(
        f"no {what}: looked in {', '.join(folders)}{note}; "
        f"pass the folder that holds them with --data-dir (data_dir=...){cure}"
    )


def _load_idx(name: str, split: str, data_dir: Path) -> ImageSet:
    prefix = "train" if split == "train" else "t10k"
    groups = [
        [f"{prefix}-{kind}{dot}{tail}{gz}" for dot in "-." for gz in ("", ".gz")]
        for kind, tail in (("images", "idx3-ubyte"), ("labels", "idx1-ubyte"))
    ]
    folders = [data_dir / name, data_dir / _IDX_FOLDERS[name] / "raw"]
    # All three sets use the same file names. A folder that carries another set's name must not pass
    # for this one: out-of-distribution scores would be computed on the training set's own data.
    place = Path(os.path.abspath(data_dir))
    owner = (place.parent if place.name == "raw" else place).name.lower()
    others = {n.lower() for key, tv in _IDX_FOLDERS.items() if key != name for n in (key, tv)}
    note = ""
    if owner in others:
        note += f"; not in {data_dir} itself, whose name says that it holds another data set"
    else:
        folders.append(data_dir)
    if name == "notmnist" and split == "train":
        note += "; many copies of notMNIST have only the test split"
    what = f"{name} {split} files {groups[0][0]}[.gz] and {groups[1][0]}[.gz]"
    candidates = [(folder, groups) for folder in folders]
    image_path, label_path = _find(what, candidates, note, name in _MIRRORS)
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{label_path} holds {len(labels)} labels, but {image_path.name} {len(images)} images"
        )
    target = torch.from_numpy(labels.astype(np.int64))
    _check_labels(target, len(_CLASSES[name]), label_path)
    return ImageSet(_pad(images[:, None]), target, _CLASSES[name], name)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array of an IDX file, raw or gzip (told by its content, not by its name)."""
    magic = 0x0800 + dims
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if int.from_bytes(header[:4], "big") != magic or len(header) < 4 + 4 * dims:
                raise DataError(
                    f"{path} starts with {header[:4].hex(' ') or 'nothing'}, not with the header "
                    f"of an IDX {'image' if dims == 3 else 'label'} file (magic number {magic})"
                )
            shape = struct.unpack(f">{dims}I", header[4:])
            if shape[0] < 1 or not all(1 <= side <= _SIDE for side in shape[1:]):
                raise DataError(
                    f"{path} says that it holds {' x '.join(map(str, shape))} bytes: allowed are "
                    "at least one item and sides of 1 to 32 pixels"
                )
            # Piecewise, so that a lying header costs no memory; and up to one byte too far, which
            # shows trailing data and makes gzip verify its checksum.
            need, body = math.prod(shape), bytearray()
            while (left := need + 1 - len(body)) and (chunk := file.read(min(left, _CHUNK))):
                body += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read, it may be damaged: {error}") from error
    if len(body) != need:
        raise DataError(
            f"{path} holds {'more' if len(body) > need else len(body)} bytes after the header, "
            f"which promises {' x '.join(map(str, shape))} = {need}"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _load_cifar(name: str, split: str, data_dir: Path) -> ImageSet:
    kind = _CIFAR[name]
    stems = kind.files[split]
    candidates = [
        (folder, [[stem + suffix] for stem in stems])
        for layout, suffix in zip(kind.folders, (".bin", ""), strict=True)
        for root in (data_dir, data_dir / name)
        for folder in (root / layout, root)
    ]
    what = f"{name} {split} files {', '.join(stems)} (.bin, or the python layout's)"
    paths = _find(what, candidates, "", name in _MIRRORS)
    binary = paths[0].suffix == ".bin"
    meta = paths[0].with_name(kind.meta[0 if binary else 1])
    classes = _CLASSES[name]
    if os.path.isfile(meta):
        classes = _read_cifar_names(meta, None if binary else kind.keys[1], len(classes))
    images, labels = [], []
    for path in paths:
        pixels, target = _read_cifar_bin(path, kind) if binary else _read_cifar_py(path, kind)
        _check_labels(torch.from_numpy(target), len(classes), path)
        images.append(pixels.reshape(-1, 3, _SIDE, _SIDE))
        labels.append(target)
    return ImageSet(
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(np.concatenate(labels)),
        classes,
        name,
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_cifar_bin(path: Path, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    content = np.frombuffer(_read_bytes(path), np.uint8)
    record = kind.label_bytes + 3 * _SIDE * _SIDE
    if not content.size or content.size % record:
        raise DataError(
            f"{path} has {content.size} bytes: expected a multiple of {record}, one record an image"
        )
    rows = content.reshape(-1, record)
    return rows[:, kind.label_bytes :], rows[:, kind.label_bytes - 1].astype(np.int64)


def _read_cifar_py(path: Path, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    content = _read_pickle(path)
    pixels = getattr(content.get("data"), "array", None)
    if pixels is None or not pixels.size or pixels.shape[1:] != (3 * _SIDE * _SIDE,):
        raise DataError(f"{path}: 'data' must be a uint8 array [N, 3072] with N > 0")
    labels = content.get(kind.keys[0])
    if (
        not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(isinstance(label, int) and abs(label) < 2**63 for label in labels)
    ):
        raise DataError(f"{path}: '{kind.keys[0]}' must be a list of {len(pixels)} integers")
    return pixels, np.array(labels, np.int64)


def _read_cifar_names(path: Path, key: str | None, count: int) -> tuple[str, ...]:
    """Class names: the lines of a text file, or (with a key) a list in a pickle."""
    if key is None:
        names: Any = _read_bytes(path).split(b"\n")
    else:
        names = _read_pickle(path).get(key)
    if isinstance(names, list):
        names = [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names]
        names = [stripped for n in names if (stripped := n.strip())]
    if not isinstance(names, list) or len(names) != count:
        raise DataError(f"{path} must hold {count} class names")
    return tuple(names)


class _PickledDtype:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and the like, which single bytes do not have


class _PickledArray:
    """Stands in for numpy.ndarray, so that untrusted state never reaches numpy's __setstate__."""

    array: np.ndarray

    def __init__(self, *_: object) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, fortran, content = state
        order: Literal["C", "F"] = "F" if fortran else "C"
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _pickled_encode(text: str | bytes, encoding: str | bytes) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text encoding {encoding!r}")
    return text if isinstance(text, bytes) else text.encode("latin1")


def _pickled_bytes() -> bytes:  # how protocol 2 spells b""
    return b""


# Every global that a CIFAR pickle (of Python 2 or 3, numpy 1 or 2) names, with what we use instead:
# nothing that a file asks for is imported, and none of these can do harm whatever the arguments.
_PICKLE_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("_codecs", "encode"): _pickled_encode,
    ("__builtin__", "bytes"): _pickled_bytes,
    ("builtins", "bytes"): _pickled_bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PICKLE_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the forbidden global {module}.{name}") from None


def _read_pickle(path: Path) -> dict[str, Any]:
    content = _read_bytes(path)
    try:
        # Python 2's strings are bytes: CIFAR's file names and keys.
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: refused or damaged pickle ({error}): " "allowed are plain values and uint8 arrays"
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: damaged pickle ({type(error).__name__}: {error})") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: this pickle must hold a dict, not {type(loaded).__name__}")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in loaded.items()}


def download(name: str, data_dir: str | os.PathLike[str]) -> Path:
    """Fetch a data set's official files into ``data_dir``, where :func:`load` finds them.

    Files appear under their final names only when complete and verified (MD5): MNIST and
    Fashion-MNIST in ``data_dir/<name>/`` as published, CIFAR in ``data_dir/cifar-.../``, unpacked
    from the binary archive. Files already in place are kept: delete a
    damaged one to fetch it anew.

    Returns:
        The folder that holds the files.

    Raises:
        DataError: a set without a download, no network, or content that is not what was published.
    """
    _check_name(name)
    if name == "digits":
        raise DataError("digits comes with scikit-learn: there is nothing to download")
    if name not in _MIRRORS:
        raise DataError(
            f"{name} has no official mirror in IDX format: put its files "
            "(t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz, ...) in a folder yourself "
            "and pass it with --data-dir"
        )
    folder = Path(data_dir).expanduser() / (_CIFAR[name].folders[0] if name in _CIFAR else name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {folder}: {error}") from error
    for file, md5 in _MIRRORS[name][1].items():
        if name in _CIFAR:
            needed = {f"{s}.bin" for stems in _CIFAR[name].files.values() for s in stems}
            if all(os.path.isfile(folder / member) for member in needed):
                continue
            archive = folder / file
            _fetch(name, file, md5, archive)
            try:
                _extract(archive, folder, needed, {_CIFAR[name].meta[0]})
            finally:
                archive.unlink(missing_ok=True)
        elif not os.path.isfile(folder / file):
            _fetch(name, file, md5, folder / file)
    return folder


_download = download  # load has an argument of that name


def _part(target: Path) -> Path:
    """A temporary name beside target, so that os.replace is atomic; one per process."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _fetch(name: str, file: str, md5: str, target: Path) -> None:
    failures = []
    part = _part(target)
    try:
        for mirror in _MIRRORS[name][0]:
            url = mirror + file
            digest = hashlib.md5(usedforsecurity=False)
            try:
                with urlopen(url, timeout=30) as reply, open(part, "wb") as out:
                    while chunk := reply.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                if digest.hexdigest() == md5:
                    os.replace(part, target)
                    return
                failures.append(f"{url}: its MD5 is {digest.hexdigest()}, not {md5}")
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{url}: {error}")
    finally:
        part.unlink(missing_ok=True)
    tar = file.endswith(".tar.gz")
    by_hand = f"unpack it in {target.parent.parent}" if tar else f"put it in {target.parent}"
    raise DataError(
        f"could not download {name} ({'; '.join(failures)}): get {file} by hand, {by_hand}, "
        "and use --data-dir without --download"
    )


def _extract(archive: Path, folder: Path, needed: set[str], optional: set[str]) -> None:
    """Write the wanted regular members to folder, by base name; nothing else in it is touched."""
    missing = set(needed)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                where = PurePosixPath(member.name)
                strange = where.is_absolute() or ".." in where.parts or not member.isfile()
                if strange or where.name not in needed | optional:
                    continue
                source = tar.extractfile(member)
                assert source is not None  # it is a regular file
                part = _part(folder / where.name)
                try:
                    with source, open(part, "wb") as out:
                        shutil.copyfileobj(source, out)
                    os.replace(part, folder / where.name)
                finally:
                    part.unlink(missing_ok=True)
                missing.discard(where.name)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error
    if missing:
        raise DataError(f"{archive} lacks {', '.join(sorted(missing))}")


def from_torchvision(dataset: Any, name: str | None = None) -> ImageSet:
    """Take over a map-style data set of ``(image, label)`` pairs, such as torchvision's.

    An image is a PIL image, an array (``[H, W]`` or ``[H, W, C]``) or a tensor (``[H, W]`` or
    ``[C, H, W]``) with one or three channels, at most 32x32 (centred on black): integers 0..255 or
    floats in [0, 1], so without a ``Normalize`` transform. A label is an int. A data set without
    transforms that has ``.data`` and ``.targets`` is read from those, all at once.

    Args:
        dataset: anything with ``len()`` and integer indexing; torchvision itself is not needed.
        name: default: the class name in lower case.

    Returns:
        The same images and labels; class names are ``dataset.classes`` where given, else numbers.

    Raises:
        DataError: an empty data set, or items unlike the above; the message names the first.
    """
    name = type(dataset).__name__.lower() if name is None else name
    hooks = ("transform", "target_transform", "transforms")
    data: Any = getattr(dataset, "data", None)
    targets: Any = getattr(dataset, "targets", None)
    try:
        count = len(dataset)
        whole = isinstance(data, np.ndarray | Tensor) and targets is not None
        whole = whole and count == len(data) == len(targets)
    except TypeError as error:
        raise DataError(f"{name}: a map-style data set with a length is needed: {error}") from error
    if count < 1:
        raise DataError(f"{name}: the data set is empty")
    if whole and all(getattr(dataset, hook, None) is None for hook in hooks):
        images = _to_images(data, isinstance(data, Tensor), f"{name}: .data")
        try:
            labels = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{name}: .targets must be {count} integers: {error}") from error
        if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
            raise DataError(f"{name}: .targets must be {count} integers, one for each image")
        labels = labels.to("cpu", torch.int64, copy=True)
    else:
        parts, numbers = [], []
        for i in range(count):
            where = f"{name}: item {i}"
            try:
                image, label = dataset[i]
                numbers.append(operator.index(label))
            except (TypeError, ValueError) as error:
                raise DataError(f"{where} must be (image, integer label): {error}") from error
            if hasattr(image, "convert") and hasattr(image, "mode"):  # PIL, without importing it
                if image.mode[0] not in "IF":  # those hold numbers, judged as such
                    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
                image = np.asarray(image)
            if not isinstance(image, np.ndarray | Tensor):
                raise DataError(
                    f"{where} must be a PIL image, an array or a tensor, not {type(image).__name__}"
                )
            parts.append(_to_images(image[None], isinstance(image, Tensor), where))
            if parts[-1].shape != parts[0].shape:
                raise DataError(f"{where} has {parts[-1].shape[1]} channels, but item 0 {parts[0].shape[1]}")
        images, labels = torch.cat(parts), torch.tensor(numbers, dtype=torch.int64)
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple) or not classes:
        classes = range(max(int(labels.max()), 0) + 1)
    return ImageSet(images, labels, tuple(map(str, classes)), name)


def _to_images(batch: np.ndarray | Tensor, channels_first: bool, source: str) -> Tensor:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] of any sane dtype, to uint8 [N, C, 32, 32].

    Where both axes could be the channels, channels_first decides.
    """
    pixels: np.ndarray
    if isinstance(batch, Tensor):
        on_cpu = batch.detach().cpu()
        pixels = (on_cpu.float() if on_cpu.is_floating_point() else on_cpu).numpy()
    else:
        pixels = batch
    shape = pixels.shape
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4:
        axes = (1, 3) if channels_first else (3, 1)
        axis = next((axis for axis in axes if shape[axis] in (1, 3)), None)
        pixels = pixels[:0] if axis is None else np.moveaxis(pixels, axis, 1)
    if pixels.ndim != 4 or not pixels.size or max(pixels.shape[2:]) > _SIDE:
        raise DataError(
            f"{source} has images of shape {list(shape[1:])}: allowed are 1 or 3 channels "
            "and sides of 1 to 32 pixels"
        )
    kind = pixels.dtype.kind
    low, high = (pixels.min(), pixels.max()) if kind in "iuf" else (0, 1)
    if kind == "b":
        pixels = pixels * np.uint8(255)
    elif kind == "f" and low >= -1e-4 and high <= 1 + 1e-4:  # resizing overshoots a little
        pixels = np.rint(np.clip(pixels.astype(np.float32), 0, 1) * 255)
    elif not (kind in "iu" and low >= 0 and high <= 255):
        raise DataError(
            f"{source} has pixels of dtype {pixels.dtype} from {low:g} to {high:g}: allowed are "
            "integers 0..255 or floats in [0, 1] (leave out Normalize)"
        )
    return _pad(pixels.astype(np.uint8, copy=False))


def split_validation(
    dataset: ImageSet, validation: int, seed: int, train_samples: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """Hold out ``validation`` images chosen by ``seed``; the global random state is not involved.

    The held-out images depend on ``seed`` and ``validation`` alone. ``train_samples`` keeps the
    first so many of the shuffled rest, so a larger number includes the images of a smaller one.

    Returns:
        ``(train, validation)``; a validation of 0 gives an empty second set.

    Raises:
        DataError: numbers out of range, or more images asked for than there are.
    """
    total = len(dataset)
    if not 0 <= validation < total:
        raise DataError(
            f"{dataset.name}: cannot hold out {validation} of {total} images for validation: "
            f"allowed are 0 to {total - 1}"
        )
    rest = total - validation
    if train_samples is not None and not 1 <= train_samples <= rest:
        raise DataError(
            f"{dataset.name}: cannot train on {train_samples} samples: {total} images less "
            f"{validation} for validation leave {rest}, allowed are 1 to {rest}"
        )
    if not 0 <= seed < 2**63:
        raise DataError(f"seed {seed} is out of range: allowed are 0 to 2**63 - 1")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    train = order[validation : None if train_samples is None else validation + train_samples]
    return dataset.subset(train), dataset.subset(order[:validation])


def channel_stats(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and (population) standard deviation of each channel, in units of the range [0, 1].

    Computed in integers from 256-bin histograms, so exact up to one final rounding and the same on
    every machine. A deviation below one grey level, 1/255, counts as one, so none is 0.

    Args:
        images: uint8 ``[N, C, H, W]``, not empty.

    Returns:
        ``(means, stds)``, each a list of C floats.

    Raises:
        DataError: another shape or dtype, or no images.
    """
    _check_images(images, "channel_stats")
    if images.numel() == 0:
        raise DataError("channel_stats: statistics of no images do not exist")
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.reshape(-1), minlength=256).tolist()
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        means.append(total / (255 * n))
        variance = (n * squares - total * total) / (255 * n) ** 2
        stds.append(max(math.sqrt(variance), 1 / 255))
    return means, stds


def normalize(images_uint8: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std`` for each channel.

    Args:
        images_uint8: uint8 ``[N, C, H, W]``, on any device.
        mean: C numbers, in [0, 1] units.
        std: C numbers > 0, in [0, 1] units.

    Returns:
        float32 ``[N, C, H, W]``, contiguous, on the same device.

    Raises:
        DataError: another shape or dtype, or numbers that do not fit the channels.
    """
    _check_images(images_uint8, "normalize")
    channels = images_uint8.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise DataError(
            f"images of {channels} channels need as many means and stds, " f"not {len(mean)} and {len(std)}"
        )
    if not all(math.isfinite(m) for m in mean) or not all(0 < s < math.inf for s in std):
        raise DataError(f"means must be finite and stds > 0, not {list(mean)} and {list(std)}")
    shift, scale = (
        torch.tensor([float(x) for x in values], device=images_uint8.device).view(-1, 1, 1)
        for values in (mean, std)
    )
    result = images_uint8.to(torch.float32, memory_format=torch.contiguous_format)
    return result.div_(255).sub_(shift).div_(scale)


def batches(n: int, batch_size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Index tensors of one epoch over ``n`` images; the last batch may be short.

    Args:
        n: number of images; 0 gives no batches.
        batch_size: at least 1.
        generator: shuffles with :func:`torch.randperm`, at the call and not at the first batch;
            None keeps the order.

    Returns:
        An iterator of int64 ``[<= batch_size]``, on the generator's device, each index once.

    Raises:
        DataError: a negative ``n`` or a batch size below 1.
    """
    if n < 0 or batch_size < 1:
        raise DataError(f"cannot cut {n} images into batches of {batch_size}: at least 1 each")
    if generator is None:
        order = torch.arange(n)
    else:
        order = torch.randperm(n, generator=generator, device=generator.device)
    return iter(torch.split(order, batch_size) if n else ())
