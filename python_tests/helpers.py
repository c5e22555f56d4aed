"""What the tests share: the device, running an op on both implementations, and comparing."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bbb_fast
from bbb_fast._backend import BackendName
from bbb_fast.cli import main

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Where the tests' tensors are; conftest.py sets it before any test module is imported (--device).
DEVICE = torch.device("cpu")

# What inductor calls to compile C++, or None.
COMPILER = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))

# The folder of the tested package: the repository's, or where it was installed.
PACKAGE = Path(bbb_fast.__file__).parent


def repository_root() -> Path:
    """The repository that these tests are a part of; where they lie alone, skips who asks, test or module."""
    root = Path(__file__).parents[1]
    if not (root / "setup.py").is_file():
        pytest.skip("reads the repository, which is not around these tests", allow_module_level=True)
    return root


def command_line(arguments: list[str] | None) -> None:
    """What ``bbb-fast`` runs, in a process that the fixture ``processes`` starts; None: with ``sys.argv``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.exit(main(arguments))


def write_output_to(out: Path, err: Path) -> None:
    """Adds what this process, and not only Python, prints to two files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def rng(seed: int = 1234, stream: int = 5) -> Tensor:
    return torch.tensor([seed, stream])


def on(backend: BackendName, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Runs a function with the given backend chosen."""
    bbb_fast.set_backend(backend)
    try:
        return function(*args, **options)
    finally:
        bbb_fast.set_backend("auto")


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def grads(
    function: Callable[[], Any], leaves: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``function`` and the gradients of its leaves for the given output gradients."""
    used = [leaf for leaf in leaves if leaf is not None]
    outputs = flat(function())
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
    result = torch.autograd.grad([o for o, _ in pairs], used, [g for _, g in pairs], allow_unused=True)
    return [o.detach() for o in outputs], list(result)


def rng_state() -> Tensor:
    """The state of PyTorch's default generators, the CPU's and the GPU's."""
    state = torch.get_rng_state()
    return torch.cat((state, torch.cuda.get_rng_state(DEVICE))) if DEVICE.type == "cuda" else state


def unrelated(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs of a Bayesian layer share no noise: no element of one is close to the other's.

    On the CPU the generator gives the same numbers on every machine. Elsewhere one element in a thousand, or
    one alone, may meet its counterpart by accident.
    """
    close = int(torch.isclose(a, b).sum())
    return close == 0 if DEVICE.type == "cpu" else close <= max(1, a.numel() // 1000)


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, whether two outputs of products of the same numbers agree.

    A GPU library may add the summands of different rows or pixels in different orders.
    """
    return torch.isclose(a, b, atol=1e-8 if DEVICE.type == "cpu" else 2e-6)


@dataclass
class Kernel:
    """A call of an op that has a kernel for each device: its dense operands by name, and how to run it.

    ``run`` takes the operands as keywords and returns the results, an operand that is written to included.
    """

    operands: dict[str, Tensor]
    run: Callable[..., list[Tensor]]
    in_place: str | None = None

    def __call__(self, **changed: Tensor) -> list[Tensor]:
        """The results; the operands stay as they are, except those given here."""
        operands = {name: t.clone() for name, t in self.operands.items() if name not in changed}
        return self.run(**operands, **changed)


def kernels(count: int, dtype: torch.dtype, other: torch.dtype) -> dict[str, Kernel]:
    """Every op that has a kernel for each device, over ``count`` elements.

    ``dtype`` is that of parameters and of the mean product's operands, ``other`` that of what is formed from
    them: weights, variances, squares, and their gradients.
    """
    ops = torch.ops.bbb_fast
    r, prior = rng(), (0.05, 0.4)
    narrow = [torch.randn(count).to(dtype) for _ in range(3)]
    rho = (torch.randn(count) - 1.5).to(dtype)
    formed, v = torch.randn(count).to(other), torch.rand(count).to(other)
    x, y = {"mu": narrow[0], "rho": rho}, {"grad": formed, "mu": narrow[0], "rho": rho}
    own_prior = {"prior_mu": narrow[1], "prior_sigma": v + 0.1}
    grad_kl = torch.tensor(0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def sample_weights(mu: Tensor, rho: Tensor) -> list[Tensor]:
        return flat(ops.sample_weights([mu], [rho], r, *prior, True, other))

    def deviations(mu: Tensor, rho: Tensor) -> list[Tensor]:
        return flat(ops.sample_weights([mu], [rho], r, *prior, True, other, True))

    def posterior_backward(grad: Tensor, mu: Tensor, rho: Tensor) -> list[Tensor]:
        return flat(ops.posterior_backward([grad], grad_kl, [mu], [rho], r, *([p] for p in prior)))

    draws = torch.tensor([[1234, 5], [-6, 7], [8, -9]])

    def several(mu: Tensor, rho: Tensor) -> list[Tensor]:
        return flat(ops.sample_weights([mu], [rho], draws, *prior, True, other))

    def backward_of_several(grad: Tensor, mu: Tensor, rho: Tensor) -> list[Tensor]:
        out = [torch.empty_like(mu)], [torch.empty_like(rho)]
        priors = ([p] for p in prior)
        given = [grad, 0.5 * grad, 1 - grad]
        again = ops.posterior_backward_out(given, [], grad_kl, [mu], [rho], draws, *priors, *out, other)
        return [*flat(out), again]

    def kl_divergence(mu: Tensor, rho: Tensor) -> list[Tensor]:
        return [ops.kl_divergence([mu], [rho], *([p] for p in prior))]

    def tensor_prior(mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> list[Tensor]:
        return [ops.kl_tensor_prior(mu, rho, prior_mu, prior_sigma)]

    def tensor_prior_backward(mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> list[Tensor]:
        return ops.kl_tensor_prior_backward(grad_kl, mu, rho, prior_mu, prior_sigma)

    def backward_of_kl(mu: Tensor, rho: Tensor) -> list[Tensor]:
        return flat(ops.posterior_backward([None], grad_kl, [mu], [rho], None, *([p] for p in prior)))

    def variance(mu: Tensor, rho: Tensor) -> list[Tensor]:
        return flat(ops.variance([mu], [rho], *prior, True, other))

    def backward_and_again(grad: Tensor, mu: Tensor, rho: Tensor) -> list[Tensor]:
        out = [torch.empty_like(mu)], [torch.empty_like(rho)]
        priors = ([p] for p in prior)
        again = ops.posterior_backward_out([grad], [], grad_kl, [mu], [rho], r, *priors, *out, other)
        return [*flat(out), again]

    def backward_of_spread(
        stream: Tensor | None, grad: Tensor, grad_spread: Tensor, mu: Tensor, rho: Tensor
    ) -> list[Tensor]:
        out = [torch.empty_like(mu)], [torch.empty_like(rho)]
        priors = ([p] for p in prior)
        of_draws = [grad_spread] if stream is None or stream.dim() == 1 else [grad_spread] * len(stream)
        again = ops.posterior_backward_out(
            [grad], of_draws, grad_kl, [mu], [rho], stream, *priors, *out, other
        )
        return [*flat(out), again]

    def square_backward(grad_input: Tensor, input: Tensor, grad: Tensor) -> list[Tensor]:
        ops.square_backward_(grad_input, input, grad)
        return [grad_input]

    def add_flipped(base: Tensor, input: Tensor) -> list[Tensor]:
        ops.add_flipped_(base, input, r, 3, -1)
        return [base]

    def lrt_sample(m: Tensor, v: Tensor) -> list[Tensor]:
        ops.lrt_sample_(m, v, r)
        return [m]

    return {
        "normal": Kernel({}, lambda: [ops.normal([count], r, dtype)]),
        "uniform": Kernel({}, lambda: [ops.uniform([count], r, dtype)]),
        "drop_elements": Kernel({"input": narrow[0]}, lambda input: [ops.drop_elements(input, r, 0.3)]),
        "sample_weights": Kernel(x, sample_weights),
        "posterior_backward": Kernel(y, posterior_backward),
        "kl_divergence": Kernel(x, kl_divergence),
        "kl_tensor_prior": Kernel({**x, **own_prior}, tensor_prior),
        "kl_tensor_prior_backward": Kernel({**x, **own_prior}, tensor_prior_backward),
        "posterior_backward, KL alone": Kernel(x, backward_of_kl),
        "posterior_backward, and the weight": Kernel(y, backward_and_again),
        "sample_weights, centered": Kernel(x, deviations),
        "posterior_backward, variance": Kernel({**y, "grad_spread": v}, partial(backward_of_spread, None)),
        "posterior_backward, noise": Kernel({**y, "grad_spread": v}, partial(backward_of_spread, r)),
        "sample_weights, draws": Kernel(x, several),
        "posterior_backward, draws": Kernel(y, backward_of_several),
        "posterior_backward, noise of draws": Kernel(
            {**y, "grad_spread": v}, partial(backward_of_spread, draws)
        ),
        "variance": Kernel(x, variance),
        "square": Kernel({"input": narrow[0]}, lambda input: [ops.square(input, other)]),
        "square_backward_": Kernel(
            {"grad_input": narrow[1], "input": narrow[0], "grad": formed}, square_backward, "grad_input"
        ),
        "lrt_sample_": Kernel({"m": narrow[0], "v": v}, lrt_sample, "m"),
        "lrt_sample_backward": Kernel(
            {"grad": narrow[0], "v": v}, lambda grad, v: [ops.lrt_sample_backward(grad, v, r)]
        ),
        "flip_signs": Kernel({"input": narrow[0]}, lambda input: [ops.flip_signs(input, r, 2, -1)]),
        "add_flipped_": Kernel({"base": narrow[0], "input": narrow[1]}, add_flipped, "base"),
    }


# The names of kernels() and their operands, for parametrize.
KERNELS = {
    "normal": (),
    "uniform": (),
    "drop_elements": ("input",),
    "sample_weights": ("mu", "rho"),
    "posterior_backward": ("grad", "mu", "rho"),
    "kl_divergence": ("mu", "rho"),
    "kl_tensor_prior": ("mu", "rho", "prior_mu", "prior_sigma"),
    "kl_tensor_prior_backward": ("mu", "rho", "prior_mu", "prior_sigma"),
    "posterior_backward, KL alone": ("mu", "rho"),
    "posterior_backward, and the weight": ("grad", "mu", "rho"),
    "sample_weights, centered": ("mu", "rho"),
    "posterior_backward, variance": ("grad", "mu", "rho", "grad_spread"),
    "posterior_backward, noise": ("grad", "mu", "rho", "grad_spread"),
    "sample_weights, draws": ("mu", "rho"),
    "posterior_backward, draws": ("grad", "mu", "rho"),
    "posterior_backward, noise of draws": ("grad", "mu", "rho", "grad_spread"),
    "variance": ("mu", "rho"),
    "square": ("input",),
    "square_backward_": ("grad_input", "input", "grad"),
    "lrt_sample_": ("m", "v"),
    "lrt_sample_backward": ("grad", "v"),
    "flip_signs": ("input",),
    "add_flipped_": ("base", "input"),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A random leaf tensor that wants a gradient."""
    return (torch.randn(shape) * std + mean).to(dtype).requires_grad_()


def posterior(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A random (mu, rho) pair with sigma around 0.1."""
    return leaf(*shape, dtype=dtype, std=0.3), leaf(*shape, dtype=dtype, mean=-2.0, std=0.7)


# float32: a few roundings on either side. Half types: one rounding of the result (2^-8, 2^-11) on either
# side and what a library product accumulates differently.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    # The noise is float32 in every dtype, and its last bit may differ.
    torch.float64: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}


def assert_same(
    a: Tensor | None, b: Tensor | None, dtype: torch.dtype, loosen: float = 1.0, size: float = 1.0
) -> None:
    """Same shape and dtype, values within the dtype's tolerance.

    ``loosen`` widens both tolerances; ``size`` (of the summands behind a small sum) the absolute one.
    """
    assert (a is None) == (b is None)
    if a is None or b is None:
        return
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if DEVICE.type == "cuda" and dtype == torch.float32:
        loosen *= 4  # a GPU's library picks the order of a sum by the shape of the product
    rtol, atol = (TOLERANCE[dtype][kind] * loosen for kind in ("rtol", "atol"))
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol * size, equal_nan=False)


def compare(
    run: Callable[..., Any], leaves: Sequence[Tensor | None], dtype: torch.dtype, loosen: float = 1.0
) -> None:
    """Outputs, their strides and the gradients of ``leaves``: native against reference."""
    with torch.no_grad():
        shapes = flat(run())
    # The same memory format as the output, so that gradients of both formats are covered.
    grad = [torch.randn_like(t, dtype=torch.float32).to(t.dtype) for t in shapes]
    native = on("native", grads, run, leaves, grad)
    expected = on("reference", grads, run, leaves, grad)
    for a, b in zip(native[0] + native[1], expected[0] + expected[1], strict=True):
        # Gradients of parameters sum over the batch: an entry that cancels keeps the others' rounding.
        size = 1.0 if b is None or not b.numel() else max(1.0, float(b.detach().float().abs().max()))
        assert_same(a, b, dtype, loosen, size)
    for a, b in zip(native[0], expected[0], strict=True):
        # The stride of a dimension of size 1 means nothing.
        assert [s for s, n in zip(a.stride(), a.shape, strict=True) if n != 1] == [
            s for s, n in zip(b.stride(), b.shape, strict=True) if n != 1
        ]


def compare_subsets(
    run: Callable[..., Any], case: Sequence[Tensor], dtype: torch.dtype, loosen: float = 1.0
) -> None:
    """:func:`compare` of ``run(*case)`` for every choice of the arguments that want a gradient."""
    for wanted in product((False, True), repeat=len(case)):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(case, wanted, strict=True)]
        if any(wanted):
            compare(partial(run, *leaves), [t for t in leaves if t.requires_grad], dtype, loosen)


def ones_and_formats(spatial: int) -> Iterator[tuple[list[Any], bool]]:
    """Arguments of a convolution in every memory format of input and weight, with every choice of up to two
    dimensions of size 1; whether the input is to be given without its batch dimension of 1."""
    last = torch.channels_last if spatial == 2 else torch.channels_last_3d
    choices = [c for k in range(3) for c in combinations(range(3 + 2 * spatial), k)]
    for ones, of_input, of_weight in product(choices, (False, True), (False, True)):
        n, i, o, *kernel = (1 if d in ones else (2, 3, 4, 2, 2, 2)[d] for d in range(3 + spatial))
        size = [k if 3 + spatial + d in ones else 4 for d, k in enumerate(kernel)]
        case = conv_case(spatial, n, i, o, tuple(kernel), tuple(size))
        for k, wanted in enumerate((of_input, of_weight, of_weight)):
            if wanted:
                case[k] = case[k].detach().contiguous(memory_format=last).requires_grad_()
        for unbatched in (False, True) if n == 1 else (False,):
            yield case, unbatched


def linear_case(
    batch: tuple[int, ...],
    i: int,
    o: int,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
) -> list[Any]:
    """Input, W_mu, W_rho, bias_mu and bias_rho of a linear layer."""
    parameter_dtype = parameter_dtype or dtype
    W = posterior(o, i, dtype=parameter_dtype)
    b = posterior(o, dtype=parameter_dtype) if bias else (None, None)
    return [leaf(*batch, i, dtype=dtype), *W, *b]


def conv_case(
    spatial: int,
    n: int,
    i: int,
    o: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    groups: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
) -> list[Any]:
    """Input, W_mu, W_rho, bias_mu and bias_rho of a convolution."""
    parameter_dtype = parameter_dtype or dtype
    W = posterior(o, i // groups, *kernel, dtype=parameter_dtype)
    b = posterior(o, dtype=parameter_dtype) if bias else (None, None)
    return [leaf(n, i, *size, dtype=dtype), *W, *b]


# Batch dimensions, in_features, out_features.
LINEAR_CASES = [
    ((5,), 7, 3),
    ((1,), 1, 1),
    ((0,), 4, 3),
    ((4, 3), 5, 2),
    ((), 6, 5),
    ((65,), 33, 17),
    ((3,), 0, 2),
    ((3,), 2, 0),
    ((2, 0, 3), 4, 5),
]
# Spatial dimensions, batch, channels in and out, kernel, size, options.
CONV_CASES: list[tuple[int, int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (1, 3, 4, 6, (3,), (11,), {}),
    (1, 2, 4, 6, (3,), (11,), {"stride": 2, "padding": 2, "groups": 2}),
    (2, 2, 3, 5, (3, 3), (7, 9), {}),
    (
        2,
        3,
        4,
        6,
        (5, 2),
        (9, 8),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    ),
    (2, 2, 1, 6, (5, 5), (12, 12), {}),
    (2, 0, 3, 4, (3, 3), (6, 6), {}),
    (2, 2, 4, 4, (1, 1), (5, 5), {"groups": 4}),
    (2, 2, 3, 5, (4, 3), (7, 7), {"padding": "same"}),
    (3, 2, 2, 3, (2, 3, 2), (4, 5, 6), {"padding": 1}),
    # Where csrc/products.cpp goes around the library on the CPU: over few output pixels, in channels_last.
    (2, 16, 32, 33, (3, 3), (2, 2), {"padding": 1}),
    (2, 17, 33, 32, (3, 2), (4, 3), {"stride": 2, "padding": 1}),
    (2, 2, 32, 33, (3, 3), (8, 7), {"padding": 1}),
    (2, 1, 33, 32, (5, 4), (7, 9), {"padding": "same"}),
]


def variance_of(rho: Tensor, dtype: torch.dtype) -> Tensor:
    """The op ``variance`` of one tensor, without KL."""
    return torch.ops.bbb_fast.variance([rho], [rho], 0.0, 0.1, False, dtype)[0][0]


def variance_slope(grad: Tensor, rho: Tensor) -> Tensor:
    """The gradient of rho for that of sigma^2, by posterior_backward_out without KL."""
    out = [torch.empty_like(rho, memory_format=torch.contiguous_format) for _ in range(2)]
    zero = torch.zeros_like(grad)
    torch.ops.bbb_fast.posterior_backward_out(
        [zero], [grad], None, [rho], [rho], None, [0.0], [0.1], out[:1], out[1:]
    )
    return out[1]
