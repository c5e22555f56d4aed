"""Runs every op once on small tensors of awkward sizes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python python_tests/sanitize.py [--device cuda]

It checks no numbers (python_tests/ does) and stays with the elementwise ops, but for steps of a linear and of
a convolution layer: the products of the library are not what is watched. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 memcheck knows where each tensor ends. Exits with 1 if an op raised.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bbb_fast import functional
from bbb_fast._layer_functions import ESTIMATORS

SIZES = (0, 1, 3, 4, 5, 1023, 4097, 20011)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Elements that a slice starts behind the beginning of its allocation: 0 is aligned.
OFFSETS = (0, 1, 3)
PRIOR = (0.0, 0.1)


class Maker:
    """Makes tensors on one device, without random kernels of torch's among the ones to watch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rng = torch.tensor([1234567890123, 42], dtype=torch.int64).to(device)
        self.one = torch.ones(()).to(device)

    def tensor(self, n: int, dtype: torch.dtype, offset: int = 0, positive: bool = False) -> Tensor:
        """A slice that ends where its allocation ends."""
        generator = torch.Generator().manual_seed(n)
        values = torch.randn(n + offset, generator=generator)
        return (values.abs() + 0.01 if positive else values).to(dtype).to(self.device)[offset:]


class Runner:
    """Runs one case after the other and counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = 0
        self.failed = 0

    def __call__(self, name: str, call: Callable[[], Any]) -> None:
        self.count += 1
        try:
            call()
            if self.device.type == "cuda":
                # An error belongs to the op that made it.
                torch.cuda.synchronize(self.device)
        except Exception:
            self.failed += 1
            print(f"FAILED {name}\n{traceback.format_exc(limit=-1)}", flush=True)

    def op(self, name: str, what: str, *args: Any) -> None:
        """An op of ours, by its name."""
        self(f"{name}: {what}", lambda: getattr(torch.ops.bbb_fast, name)(*args))


def one_tensor(run: Runner, make: Maker, n: int, dtype: torch.dtype, offset: int) -> None:
    """Every elementwise op on single tensors."""
    what = f"{n} x {dtype} from {offset}"
    mu, rho, grad = (make.tensor(n, dtype, offset) for _ in range(3))
    v = make.tensor(n, dtype, offset, positive=True)
    # Gradients and variances come in other types and alignments than the tensors they belong to.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wide_v, wide_grad = make.tensor(n, wide, positive=True), make.tensor(n, wide)
    rng, one = make.rng, make.one
    priors = [PRIOR[0]], [PRIOR[1]]

    run.op("normal", what, [n], rng, dtype)
    run.op("uniform", what, [n], rng, dtype)
    run.op("drop_elements", what, mu, rng, 0.3)
    # By rows, with one mask for all, and by channels.
    for shape, channels, one_mask in (((1, n), False, True), ((1, n, 1), True, False)):
        run.op("dropout", what, mu.reshape(shape), rng, 0.3, channels, one_mask)
    run.op("flip_signs", what, mu.reshape(1, n), rng, 0, 1)
    run.op("add_flipped_", what, grad.reshape(1, n).clone(), mu.reshape(1, n), rng, 0, 1)
    prior = make.tensor(n, dtype), make.tensor(n, dtype, positive=True)
    run.op("kl_tensor_prior", what, mu, rho, *prior)
    run.op("kl_tensor_prior_backward", what, one, mu, rho, *prior)
    for with_kl, out in product((False, True), (None, torch.bfloat16)):
        run.op("sample_weights", what, [mu], [rho], rng, *PRIOR, with_kl, out)
    run.op("kl_divergence", what, [mu], [rho], *priors)
    for g_w, g_kl, noise in ((grad, None, rng), (wide_grad, one, rng), (None, one, None)):
        run.op("posterior_backward", what, [g_w], g_kl, [mu], [rho], noise, *priors)
    for out in (dtype, wide, torch.bfloat16):
        run.op("variance", f"{what} to {out}", [mu], [rho], *PRIOR, True, out)
        run.op("square", f"{what} to {out}", mu, out)
    for g in (grad, wide_grad):
        outs = [torch.empty_like(mu)], [torch.empty_like(rho)]
        run.op("posterior_backward_out", what, [g], [g], one, [mu], [rho], None, *priors, *outs, wide)
        run.op("square_backward_", what, make.tensor(n, dtype, offset), mu, g)
    for variance in (v, wide_v, torch.zeros_like(v)):
        run.op("lrt_sample_", what, make.tensor(n, dtype, offset), variance, rng)
        run.op("lrt_sample_backward", what, grad, variance, rng)


LISTS = (
    [(n, k % 4) for k, n in enumerate(SIZES)],
    [(4097, 0), (5, 1)],
    [(0, 0), (0, 0)],
    # More than the arguments of one launch may hold.
    [(7 + k % 5, k % 2) for k in range(300)],
)


def one_list(run: Runner, make: Maker, dtype: torch.dtype, shapes: list[tuple[int, int]]) -> None:
    """The ops that take lists, on tensors of these (size, offset)."""
    what = f"{len(shapes)} tensors of {dtype}"
    mu, rho = ([make.tensor(n, dtype, offset) for n, offset in shapes] for _ in range(2))
    grads = [None if k % 3 == 2 else make.tensor(n, dtype, o) for k, (n, o) in enumerate(shapes)]
    priors = [PRIOR[0]] * len(mu), [PRIOR[1] + 0.01 * (k % 7) for k in range(len(mu))]
    run.op("sample_weights", what, mu, rho, make.rng, *PRIOR, True, None)
    run.op("variance", what, mu, rho, *PRIOR, True, dtype)
    run.op("kl_divergence", what, mu, rho, *priors)
    run.op("posterior_backward", what, grads, make.one, mu, rho, make.rng, *priors)
    run.op("posterior_backward", what, [None] * len(mu), make.one, mu, rho, None, *priors)


def steps(run: Runner, make: Maker) -> None:
    """One training step of each estimator's layers, through autograd, with one draw and with several."""

    def leaf(*shape: int) -> Tensor:
        return make.tensor(math.prod(shape), torch.float32).reshape(shape).requires_grad_()

    def linear(name: str, rng: Tensor) -> None:
        layer = getattr(functional, f"{name}_linear")
        y, kl = layer(leaf(6, 7), leaf(3, 7), leaf(3, 7), leaf(3), leaf(3), rng, with_kl=True)
        (y.sum() + kl).backward()

    def conv(name: str, rng: Tensor) -> None:
        layer = getattr(functional, f"{name}_conv2d")
        weights = leaf(4, 3, 3, 3), leaf(4, 3, 3, 3), leaf(4), leaf(4)
        y, kl = layer(leaf(2, 3, 6, 5), *weights, rng, padding=1, with_kl=True)
        (y.sum() + kl).backward()

    for name, draws in product(ESTIMATORS, (1, 2)):
        rng = make.rng if draws == 1 else torch.stack([make.rng + k for k in range(draws)])
        run(f"{name}_linear, step of {draws} draws", partial(linear, name, rng))
        run(f"{name}_conv2d, step of {draws} draws", partial(conv, name, rng))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the single tensors")
    args = parser.parse_args()
    device = torch.device(args.device)
    make, run = Maker(device), Runner(device)
    for dtype in DTYPES:
        for n, offset in product(args.sizes, OFFSETS):
            one_tensor(run, make, n, dtype, offset)
        for shapes in LISTS:
            one_list(run, make, dtype, shapes)
    steps(run, make)
    print(f"sanitize: {run.count} cases on {device}, {run.failed} failed")
    return int(run.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
