"""What ``make demo`` runs: a Bayesian LeNet, its point-estimate twin, and inputs neither has ever seen.

Trains both on scikit-learn's digits and judges both on the test images; then shows them noise, inverted
and rotated digits, and letters. The same seed and number of threads give the same numbers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import bbb_fast
from bbb_fast.experiments import checkpoint, data, training, uncertainty
from bbb_fast.experiments.data import ImageSet
from bbb_fast.experiments.document import Cell, Column, Table

MARKER = "made-by-demo.txt"
SAMPLES = 50
CONFIG = training.TrainConfig(
    dataset="digits",
    model="lenet",
    activation="softplus",
    prior_sigma=0.1,
    posterior_rho_initial=(-5.0, 0.1),
    epochs=40,
    batch_size=32,
    test_samples=SAMPLES,
    beta=0.03,
    lr=2e-3,
    lr_schedule="cosine",
)
MODELS = {"lrt": "Bayesian", "none": "point estimate"}

# Letters of 8 x 8 pixels, a byte a row, the leftmost pixel its highest bit. Those that can pass for a
# digit (B, D, G, I, O, Q, S, Z and the like) are left out.
LETTERS = {
    "A": "183c66667e666666", "E": "7e60607c6060607e", "F": "7e60607c60606060",
    "H": "6666667e7e666666", "K": "666c787070786c66", "M": "63777f6b63636363",
    "N": "6676767e6e6e6666", "P": "7c66667c60606060", "R": "7c66667c786c6666",
    "T": "7e7e181818181818", "U": "666666666666663c", "V": "66666666663c3c18",
    "W": "636363636b7f7763", "X": "66663c18183c6666", "Y": "6666663c18181818",
}  # fmt: skip


def letters(each: int, seed: int) -> ImageSet:
    """Each letter ``each`` times, bent, softened and dimmed at random to look handwritten."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([list(bytes.fromhex(glyph)) for glyph in LETTERS.values()])
    pixels = (rows[:, :, None] >> torch.arange(7, -1, -1) & 1).float().repeat_interleave(each, 0)
    pen = torch.tensor([[0.05, 0.15, 0.05], [0.15, 1.0, 0.15], [0.05, 0.15, 0.05]])
    pixels = F.conv2d(pixels[:, None], pen[None, None], padding=1).clamp(max=1)
    # A random affine map: how far each entry may be from the identity.
    spread = torch.tensor([[0.12, 0.25, 0.12], [0.12, 0.12, 0.06]])
    bend = spread * (2 * torch.rand(len(pixels), 2, 3, generator=generator) - 1)
    grid = F.affine_grid(torch.eye(2, 3) + bend, [len(pixels), 1, 32, 32], align_corners=False)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    pixels = pixels * (0.7 + 0.3 * torch.rand(len(pixels), 1, 1, 1, generator=generator))
    labels = torch.arange(len(LETTERS)).repeat_interleave(each)
    return ImageSet((pixels * 255).round().to(torch.uint8), labels, tuple(LETTERS), "letters")


def own_folder(path: str) -> Path:
    """The demo's folder; ValueError if it holds anything that the demo did not make."""
    folder = Path(path)
    if folder.exists() and not (folder / MARKER).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files: choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("benchmarks/demo.py replaces what it wrote here when it runs again.\n")
    return folder


def train(layer_type: str, folder: Path, seed: int, threads: int) -> checkpoint.LoadedModel:
    """Trains one of the two models; returns the weights of the last epoch."""
    config = replace(CONFIG, layer_type=layer_type, seed=seed, threads=threads)
    whole, test = data.load("digits", "train"), data.load("digits", "test")
    images, valid = data.split_validation(whole, len(whole) // 10, seed)
    print(
        f"training the {MODELS[layer_type]} LeNet (layers {layer_type}): {config.epochs} epochs of "
        f"{len(images)} digits ...",
        end=" ",
        flush=True,
    )
    start = time.perf_counter()
    training.fit(config, images, valid, test, folder / layer_type, progress=False, overwrite=True)
    print(f"{time.perf_counter() - start:.0f} s")
    # Not best.pt: validation accuracies of so few images tie, and the schedule ends at a rate of 0.
    return checkpoint.load_model(folder / layer_type / training.LAST)


Results = Mapping[str, Sequence[uncertainty.Comparison]]


def tables(results: Results) -> list[Table]:
    """Both models side by side, on what they know and on what they have never seen."""
    strange = [result.outside.images.name.split()[0] for result in results["lrt"]]
    scores = (("lrt", "predictive_entropy"), ("none", "predictive_entropy"), ("lrt", "mutual_information"))
    quality: list[list[Cell]] = [[MODELS[kind], *all_[0].quality.values()] for kind, all_ in results.items()]
    auroc: list[list[Cell]] = [
        [f"{MODELS[kind]}, {score.replace('_', ' ')}", *(r.detection[score]["auroc"] for r in results[kind])]
        for kind, score in scores
    ]
    sure: list[list[Cell]] = [
        [MODELS[kind], *(one.share_above(0.9) for one in (all_[0].inside, *(r.outside for r in all_)))]
        for kind, all_ in results.items()
    ]
    seen = [results["lrt"][0].inside, *(result.outside for result in results["lrt"])]
    doubt = [float(judged.mutual_information.mean()) for judged in seen]
    parts: tuple[tuple[str, Sequence[str], str, Sequence[Sequence[Cell]]], ...] = (
        ("the digits of the test set", ("accuracy", "NLL", "Brier", "ECE"), ".3f", quality),
        ("AUROC of digits against what neither has seen", strange, ".3f", auroc),
        ("called with a probability above 0.9", ("digits", *strange), ".1%", sure),
        ("how much the draws disagree, nats", ("digits", *strange), ".3f", [["mutual information", *doubt]]),
    )
    return [
        Table(title, [Column(""), *(Column(name, form) for name in names)], rows)
        for title, names, form, rows in parts
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="demo-out", help="a folder of its own (default: demo-out)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    args = parser.parse_args()
    try:
        folder = own_folder(args.out)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    # One by default: batches this small gain little from a second, and lose a lot on a busy machine.
    torch.set_num_threads(args.threads)
    info = bbb_fast.build_info()
    print(f"bbb_fast {info['bbb_fast']}, {info['backend']} backend, {args.threads} thread(s)")

    loaded = {kind: train(kind, folder, args.seed, args.threads) for kind in MODELS}
    known = data.load("digits", "test")
    others = [uncertainty.unseen(kind, known, args.seed) for kind in uncertainty.DERIVED]
    others.append(letters(len(known) // len(LETTERS), args.seed))
    print(f"judging both: {len(known)} digits of the test set, and images they have never seen ...")
    results = {
        kind: [uncertainty.compare(one, known, other, samples=SAMPLES, seed=args.seed) for other in others]
        for kind, one in loaded.items()
    }
    for table in tables(results):
        print(f"\n{table.text()}")
    print(
        "\nNo letter is a digit, yet both models must call it one. Mutual information is how much the draws\n"
        "of the Bayesian model's weights disagree; a point estimate has but one, so always 0. Neither\n"
        "notices everything: the figure shows the letters that the Bayesian one is most certain of.\n"
    )
    settings = {
        "samples": SAMPLES,
        "seed": args.seed,
        "kl_weight": CONFIG.beta,
        "config": loaded["lrt"].config,
    }
    with uncertainty.own_folder(folder, overwrite=True) as owned:
        written, notice = uncertainty.save(results["lrt"][-1], owned, settings)
    print(notice or f"figure: {written[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
