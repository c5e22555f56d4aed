"""What only a GPU can show: the CPU's numbers, streams, graphs, no waiting for the host, size, precision.

Run with ``--device cuda``; the other tests of this folder run there too.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    DTYPES,
    KERNELS,
    flat,
    grads,
    kernels,
    leaf,
    on,
    posterior,
    rng,
    unrelated,
    variance_of,
    variance_slope,
)
from test_errors import LAYERS, SAMPLERS, message_of, valid
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import bbb_fast
from bbb_fast import fixed_noise, functional, kl_loss, predict, reference
from bbb_fast._backend import BackendName
from bbb_fast.experiments import data
from bbb_fast.experiments.training import TrainConfig, fit
from bbb_fast.layers import BBB, BBB_LRT, FlattenLayer, Flipout, ModuleWrapper

pytestmark = pytest.mark.cuda_only

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ops = torch.ops.bbb_fast


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def estimator(request: pytest.FixtureRequest) -> ModuleType:
    """The module that holds the layers of one estimator."""
    return request.param


PRIORS = {"posterior_mu_initial": (0, 0.3), "posterior_rho_initial": (-2, 0.2)}


class Net(ModuleWrapper):
    """A convolution and a linear layer on [N, 2, 5, 5]; returns (output, kl)."""

    def __init__(self, estimator: ModuleType) -> None:
        super().__init__()
        self.conv = estimator.BBBConv2d(2, 3, 3, priors=PRIORS)
        self.act = nn.Softplus()
        self.flatten = FlattenLayer(27)
        self.fc = estimator.BBBLinear(27, 4, priors=PRIORS)


def make(estimator: ModuleType, kind: str) -> tuple[nn.Module, Tensor]:
    """A layer or a model, and an input; the layers return tensors, the model a pair."""
    if kind == "linear":
        return estimator.BBBLinear(13, 9, priors=PRIORS), torch.randn(6, 13)
    if kind == "conv2d":
        return estimator.BBBConv2d(3, 5, 3, priors=PRIORS), torch.randn(4, 3, 8, 7)
    return Net(estimator), torch.randn(6, 2, 5, 5)


KINDS = ["linear", "conv2d", "model"]


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return first(model(x)).float().square().mean() + 1e-3 * kl_loss(model)


def to(device: str | torch.device, value: Any) -> Any:
    """Copies of the tensors in ``value`` on a device, leaves as leaves."""

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().to(device).requires_grad_(t.requires_grad)

    return tree_map(move, value)


def test_the_build_has_cuda_kernels(native: None) -> None:
    assert "cuda" in bbb_fast.build_info()["extension"]["devices"].split(",")
    mu, rho = posterior(3)
    node: Any = functional.kl_divergence(mu, rho).grad_fn
    assert "kl_backward" in node.name()


class TestBothDevices:
    """One rng, one noise: the GPU's numbers are the CPU's, on either implementation."""

    @pytest.mark.parametrize("dtype", [F32, F64])
    @pytest.mark.parametrize("numbers", [(0, 0), (42, 7), (-1, -(2**63)), (2**63 - 1, 2**32 + 1)])
    def test_noise(self, backend: str, numbers: tuple[int, int], dtype: torch.dtype) -> None:
        r = rng(*numbers)
        there = functional.normal(1_000_003, r, dtype=dtype)
        assert there.device == DEVICE
        here = functional.normal(1_000_003, r.cpu(), dtype=dtype)
        assert here.device.type == "cpu"
        assert (there.cpu() - here).abs().max() <= 1e-5

    def both(self, arguments: Sequence[Any], run: Callable[..., Any], tolerance: float = 1e-5) -> None:
        """Outputs and all gradients of ``run(*arguments)`` on either device."""
        with torch.no_grad():
            shapes = flat(run(*arguments))
        grad = [torch.randn(t.shape) for t in shapes]
        results = []
        for place in (DEVICE, torch.device("cpu")):
            moved = to(place, list(arguments))
            leaves = [t for t in moved if isinstance(t, Tensor) and t.requires_grad]
            outputs, gradients = grads(partial(run, *moved), leaves, to(place, grad))
            found: list[Any] = [*outputs, *gradients]
            assert all(t.device == place for t in found)
            results.append([t.cpu() for t in found])
        for a, b in zip(*results, strict=True):
            size = max(1.0, float(b.abs().max()))
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)

    def test_sample_weight(self, backend: str) -> None:
        mu, rho = posterior(300, 77)
        self.both([mu, rho, rng()], lambda m, r, n: functional.sample_weight(m, r, n, 0.1, 0.4, with_kl=True))

    def test_kl_divergence(self, backend: str) -> None:
        (m0, r0), (m1, r1) = posterior(300, 77), posterior(5)
        self.both([m0, r0, m1, r1], lambda a, b, c, d: functional.kl_divergence([a, c], [b, d], 0.1, 0.4))

    @pytest.mark.parametrize("bias", [True, False])
    def test_lrt_linear(self, backend: str, bias: bool) -> None:
        b = posterior(33) if bias else (None, None)
        arguments = [leaf(40, 50), *posterior(33, 50), *b, rng()]
        self.both(arguments, functional.lrt_linear, 1e-4)

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_lrt_conv2d(self, backend: str, channels_last: bool) -> None:
        x = torch.randn(4, 6, 9, 8)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        arguments = [x.requires_grad_(), *posterior(10, 3, 3, 2), *posterior(10), rng()]
        self.both(arguments, partial(functional.lrt_conv2d, padding=(1, 0), groups=2), 1e-4)

    @pytest.mark.parametrize("spatial", [1, 3])
    def test_lrt_conv1d_and_3d(self, backend: str, spatial: int) -> None:
        function: Callable[..., Any] = {1: functional.lrt_conv1d, 3: functional.lrt_conv3d}[spatial]
        x, W = leaf(3, 4, *(6, 5, 7)[:spatial]), posterior(5, 4, *(2, 3, 2)[:spatial])
        self.both([x, *W, *posterior(5), rng()], lambda *a: function(*a, stride=2, padding=1), 1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_fixed_noise(self, backend: str, estimator: ModuleType, kind: str) -> None:
        """One function on both devices, for any batch size."""
        model, x = make(estimator, kind)
        twin, here = copy.deepcopy(model).cpu(), x.cpu()
        with torch.no_grad():
            for numbers in ((1, 0), (-5, 2**31 - 1)):
                with fixed_noise(*numbers):
                    expected = first(twin(here))
                for batch in (1, 4, len(x)):
                    with fixed_noise(*numbers):
                        y = torch.cat([first(model(part)) for part in x.split(batch)])
                    assert y.device == DEVICE
                    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)

    def test_predict(self, backend: str, estimator: ModuleType) -> None:
        model, x = make(estimator, "model")
        expected = predict(copy.deepcopy(model).cpu(), x.cpu(), 3, seed=3)
        for batch_size in (None, 2):
            y = predict(model, x, 3, seed=3, batch_size=batch_size)
            torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)

    def test_a_model_moves(self, backend: str, estimator: ModuleType) -> None:
        """There and back: the KL and the state stay."""
        model, _ = make(estimator, "model")
        kl = kl_loss(model)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        torch.testing.assert_close(kl_loss(model.cpu()), kl.cpu(), rtol=1e-6, atol=0)
        model = model.to(DEVICE)
        assert kl_loss(model).device == DEVICE and torch.equal(kl_loss(model), kl)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def upcast(value: Any) -> Any:
    """float64 copies of floating tensors."""

    def widen(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return tree_map(widen, value)


def check_error(arguments: Sequence[Any], run: Callable[..., Any]) -> None:
    """Outputs and gradients are off by at most twice what the textbook formulas in PyTorch are.

    The truth: the reference in float64 on the same numbers with the same noise. Beside that, an eighth of a
    unit of the result's type and 1e-5, what the noise of two implementations may differ by, are allowed.
    """
    with torch.no_grad():
        shapes = flat(run(*arguments))
    grad = [torch.randn_like(t, dtype=F32).to(t.dtype) for t in shapes]

    def results(backend: BackendName, given: Sequence[Any], grad: list[Tensor]) -> list[Tensor]:
        leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        outputs, gradients = on(backend, grads, lambda: run(*given), leaves, grad)
        return [*outputs, *gradients]

    ours, plain = (results(name, arguments, grad) for name in ("native", "reference"))
    truth = results("reference", upcast(list(arguments)), upcast(grad))
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert a.shape == exact.shape and a.dtype == b.dtype and bool(a.isfinite().all())
        if not a.numel():
            continue
        # The largest error finds one bad element, the norm a bias of all.
        for size in (lambda t: t.abs().max(), lambda t: t.norm()):
            allowed = 2 * size(b.double() - exact) + (torch.finfo(a.dtype).eps / 8 + 1e-5) * size(exact)
            assert float(size(a.double() - exact)) <= float(allowed) + 1e-12


def check_precision(op: str, dtype: torch.dtype, own: torch.dtype) -> None:
    """``dtype`` of the activations or the drawn weights, ``own`` of the parameters."""

    def parameters(*shape: int) -> tuple[Tensor, Tensor]:
        return posterior(*shape, dtype=own)

    if op == "sample_weights":

        def draw(m0: Tensor, r0: Tensor, m1: Tensor, r1: Tensor, n: Tensor) -> Any:
            out = None if m0.dtype == F64 else dtype
            return functional.sample_weights([m0, m1], [r0, r1], n, 0.1, 0.4, with_kl=True, dtype=out)

        check_error([*parameters(129, 65), *parameters(129), rng()], draw)
    elif op == "kl_divergence":
        check_error([*parameters(129, 65)], lambda m, r: functional.kl_divergence(m, r, 0.1, 0.4))
    elif op == "lrt_linear":
        for bias in (True, False):
            b = parameters(65) if bias else (None, None)
            check_error([leaf(70, 129, dtype=dtype), *parameters(65, 129), *b, rng()], functional.lrt_linear)
    else:
        spatial = int(op[-2])
        x = leaf(3, 8, *(9, 8, 7)[:spatial], dtype=dtype)
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        for memory_format in (torch.contiguous_format, *([formats[spatial]] if spatial in formats else [])):
            given = x.detach().contiguous(memory_format=memory_format).requires_grad_()
            arguments = [given, *parameters(16, 8, *(3,) * spatial), *parameters(16), rng()]
            check_error(arguments, lambda *a: getattr(functional, op)(*a, padding=1))


class TestPrecision:
    """Against the truth in float64: no worse than twice PyTorch itself, in every type."""

    OPS = ("sample_weights", "kl_divergence", "lrt_linear", "lrt_conv1d", "lrt_conv2d", "lrt_conv3d")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op", OPS)
    def test_of_one_type(self, native: None, op: str, dtype: torch.dtype) -> None:
        check_precision(op, dtype, dtype)

    @pytest.mark.parametrize("dtype", [BF16, F16])
    @pytest.mark.parametrize("op", [op for op in OPS if op != "kl_divergence"])
    def test_of_float32_parameters(self, native: None, op: str, dtype: torch.dtype) -> None:
        check_precision(op, dtype, F32)

    def test_kl_of_many_weights(self, backend: str) -> None:
        """Six digits, also where all roundings have one sign."""
        for rho in (torch.full((10_000_000,), -3.0), torch.randn(10_000_000) * 0.3 - 3):
            mu = torch.full_like(rho, 0.05)
            p = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(0.1, dtype=F64))
            q = torch.distributions.Normal(mu.double(), F.softplus(rho.double()))
            exact = torch.distributions.kl_divergence(q, p).sum()
            kl = functional.kl_divergence(mu, rho)
            torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)


COUNT = 2**20 + 3


class TestDeterminism:
    @pytest.mark.parametrize(("dtype", "other"), [(F32, F32), (F32, BF16), (BF16, BF16), (F64, F64)])
    @pytest.mark.parametrize("name", KERNELS)
    def test_every_run_gives_the_same_bits(
        self, native: None, name: str, dtype: torch.dtype, other: torch.dtype
    ) -> None:
        """Twenty times, half of them on another stream while the first is busy."""
        kernel = kernels(COUNT, dtype, other)[name]
        expected = kernel()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(10):
            with torch.cuda.stream(side):
                there = kernel()
            here = kernel()
            torch.cuda.synchronize()
            assert all(map(torch.equal, there, expected)) and all(map(torch.equal, here, expected))

    def test_kl_of_a_list(self, native: None) -> None:
        pairs = [posterior(n) for n in (COUNT, 5, 300_001, 4096)]
        mu, rho = ([p[k].detach() for p in pairs] for k in (0, 1))
        results = [functional.kl_divergence(mu, rho) for _ in range(20)]
        assert all(torch.equal(kl, results[0]) for kl in results)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_step_repeats(self, native: None, estimator: ModuleType, kind: str) -> None:
        """With the library's products repeatable too (cudnn.deterministic, one stream)."""
        model, x = make(estimator, kind)
        results = []
        for _ in range(3):
            torch.manual_seed(5)
            loss = loss_of(model, x)
            results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of ``step`` and the tensors it writes to, warmed up as PyTorch's notes say."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


class TestGraphs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_forward(self, native: None, estimator: ModuleType, kind: str) -> None:
        """Fresh noise at each replay, and torch.manual_seed governs it as it does eager calls."""
        model, x = make(estimator, kind)
        with torch.no_grad():
            graph, captured = capture(lambda: first(model(x)))
            graph.replay()
            one = captured.clone()
            graph.replay()
            other = captured.clone()
            assert one.isfinite().all() and unrelated(one, other)
            torch.manual_seed(3)
            graph.replay()
            one = captured.clone()
            graph.replay()
            assert unrelated(captured, one)
            torch.manual_seed(3)
            graph.replay()
            assert torch.equal(captured, one)
            torch.manual_seed(3)
            torch.testing.assert_close(first(model(x)), one, rtol=1e-5, atol=1e-6)
            # A graph reads its input where it was.
            x.zero_()
            torch.manual_seed(3)
            graph.replay()
            torch.manual_seed(3)
            torch.testing.assert_close(first(model(x)), captured, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_step(self, native: None, estimator: ModuleType, kind: str) -> None:
        """Forward, KL, backward and update in one graph: as many eager steps end at the same weights."""
        model, x = make(estimator, kind)
        twin = copy.deepcopy(model)

        def step(model: nn.Module) -> Tensor:
            parameters = list(model.parameters())
            loss = loss_of(model, x)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p.sub_(g, alpha=0.05)
            return loss.detach()

        graph, captured = capture(lambda: step(model))
        with torch.no_grad():
            for p, start in zip(model.parameters(), twin.parameters(), strict=True):
                p.copy_(start)
        losses = []
        torch.manual_seed(9)
        for _ in range(4):
            graph.replay()
            losses.append(captured.clone())
        torch.manual_seed(9)
        expected = [step(twin) for _ in range(4)]
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        for p, want in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)
        assert len({float(loss) for loss in losses}) == 4

    @pytest.mark.parametrize("name", KERNELS)
    def test_every_op(self, native: None, name: str) -> None:
        """Captured alone, and right at a replay over operands that were put back."""
        kernel = kernels(10_007, F32, F32)[name]
        given = {operand: t.clone() for operand, t in kernel.operands.items()}
        graph, captured = capture(lambda: kernel.run(**given))
        for operand, t in given.items():
            t.copy_(kernel.operands[operand])
        graph.replay()
        assert all(map(torch.equal, captured, kernel()))

    def test_rng_is_read_at_replay(self, native: None) -> None:
        r = rng(1, 2)
        graph, captured = capture(lambda: functional.normal(1000, r))
        for numbers in ((1, 2), (3, 4)):
            r.copy_(rng(*numbers))
            graph.replay()
            assert torch.equal(captured, functional.normal(1000, rng(*numbers)))

    def test_fixed_noise(self, native: None, estimator: ModuleType) -> None:
        """A pinned draw can be captured and stays the same."""
        model, x = make(estimator, "model")
        with torch.no_grad(), fixed_noise(4, sample=2):
            graph, captured = capture(lambda: model(x)[0])
            expected = model(x)[0]
        for _ in range(2):
            graph.replay()
            torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-6)


SLEEP = 200_000_000  # cycles: about a tenth of a second


class TestStreams:
    @pytest.mark.parametrize("name", [name for name, operands in KERNELS.items() if operands])
    def test_ops_run_on_the_current_stream(self, native: None, name: str) -> None:
        """Their operands are ready there after a while; until then they are NaN."""
        kernel = kernels(100_003, F32, F32)[name]
        expected = kernel()
        late = {operand: torch.full_like(t, torch.nan) for operand, t in kernel.operands.items()}
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            for operand, t in late.items():
                t.copy_(kernel.operands[operand])
            result = kernel.run(**late)
        side.synchronize()
        assert all(map(torch.equal, result, expected))

    def test_rng_is_read_on_the_current_stream(self, native: None) -> None:
        r, real = rng(0, 0), rng(5, 6)
        expected = functional.normal(1000, real)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            r.copy_(real)
            noise = functional.normal(1000, r)
        side.synchronize()
        assert torch.equal(noise, expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_step_on_a_side_stream(self, backend: str, estimator: ModuleType, kind: str) -> None:
        """Forward and backward of a model whose input comes late."""
        model, x = make(estimator, kind)
        parameters = list(model.parameters())
        torch.manual_seed(2)
        loss = loss_of(model, x)
        expected = [loss.detach(), *torch.autograd.grad(loss, parameters)]
        late = torch.full_like(x, torch.nan)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            late.copy_(x)
            torch.manual_seed(2)
            loss = loss_of(model, late)
            result = [loss.detach(), *torch.autograd.grad(loss, parameters)]
        side.synchronize()
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_threads_of_the_host(self, native: None) -> None:
        """Four at once, each on a stream of its own."""
        work = {name: kernels(50_021, F32, F32)[name] for name in KERNELS}
        expected = {name: kernel() for name, kernel in work.items()}
        streams = [torch.cuda.Stream() for _ in range(4)]
        results: list[dict[str, list[Tensor]]] = [{} for _ in streams]
        torch.cuda.synchronize()

        def run(k: int) -> None:
            # Default devices are set for each thread.
            with torch.device(DEVICE), torch.cuda.stream(streams[k]):
                for _ in range(20):
                    results[k] = {name: kernel() for name, kernel in work.items()}

        pool = [threading.Thread(target=run, args=(k,)) for k in range(len(streams))]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        torch.cuda.synchronize()
        for result in results:
            assert result.keys() == expected.keys()
            for name, tensors in result.items():
                assert all(map(torch.equal, tensors, expected[name])), name


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, PyTorch raises where the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(model.parameters(), 0.01, foreach=True),
        "adam": torch.optim.Adam(model.parameters(), 0.01, foreach=True, capturable=True),
    }


class TestNoWaiting:
    """The host queues a whole training step and never waits for the GPU."""

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        output, kl = model(x)
        loss = F.cross_entropy(output, y) + 0.1 / 1000 * kl
        loss.backward()
        optimizer.step()
        return loss.detach()

    def test_the_mode_raises(self) -> None:
        """Otherwise the tests below would show nothing."""
        x = torch.ones(3)
        with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()

    @pytest.mark.parametrize("name", ["sgd", "adam"])
    def test_training_step(self, native: None, estimator: ModuleType, name: str) -> None:
        model, x = make(estimator, "model")
        y, optimizer = torch.randint(4, (6,)), optimizers(model)[name]
        self.step(model, optimizer, x, y)  # libraries load, memory is allocated
        with no_waiting():
            losses = [self.step(model, optimizer, x, y) for _ in range(3)]
        assert all(loss.isfinite() for loss in losses)

    def test_training_step_under_autocast(self, native: None, estimator: ModuleType) -> None:
        model, x = make(estimator, "model")
        y, optimizer = torch.randint(4, (6,)), optimizers(model)["sgd"]
        with torch.autocast("cuda", BF16):
            self.step(model, optimizer, x, y)
            with no_waiting():
                loss = self.step(model, optimizer, x, y)
        assert loss.isfinite()

    def test_inference(self, native: None, estimator: ModuleType) -> None:
        model, x = make(estimator, "model")
        expected = predict(model, x, 3, seed=1, batch_size=4)
        with no_waiting():
            y = predict(model, x, 3, seed=1, batch_size=4)
            with torch.no_grad(), fixed_noise(1, sample=2):
                pinned = model(x)[0]
            means = model(x, sample=False)[0]
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(pinned, expected[2], rtol=1e-4, atol=1e-5)
        assert means.isfinite().all()

    @pytest.mark.parametrize("name", KERNELS)
    def test_every_op(self, native: None, name: str) -> None:
        kernel = kernels(10_007, F32, BF16)[name]
        expected = kernel()
        with no_waiting():
            result = kernel()
        assert all(map(torch.equal, result, expected))

    def test_the_host_runs_ahead(self, native: None, estimator: ModuleType) -> None:
        """Two steps are queued while the GPU still sleeps: whatever waits for it would show."""
        model, x = make(estimator, "model")
        y, optimizer = torch.randint(4, (6,)), optimizers(model)["adam"]
        for _ in range(2):
            self.step(model, optimizer, x, y)
        slept = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda._sleep(20 * SLEEP)  # seconds, for what takes milliseconds
        slept.record()
        for _ in range(2):
            loss = self.step(model, optimizer, x, y)
        assert not slept.query()
        assert loss.isfinite()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestSecondDevice:
    """Tensors on cuda:1 while cuda:0 is the current device."""

    other = torch.device("cuda", 1)

    @pytest.mark.parametrize("name", KERNELS)
    def test_every_op(self, native: None, name: str) -> None:
        here = kernels(10_007, F32, F32)[name]
        expected = here()
        with torch.device(self.other):
            there = kernels(10_007, F32, F32)[name]
            operands = {operand: t.to(self.other) for operand, t in here.operands.items()}
            assert torch.cuda.current_device() == 0
            result = there.run(**operands)
            assert torch.cuda.current_device() == 0
        for a, b in zip(result, expected, strict=True):
            assert a.device == self.other
            torch.testing.assert_close(a.to(DEVICE), b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("kind", KINDS)
    def test_layers(self, backend: str, estimator: ModuleType, kind: str) -> None:
        model, x = make(estimator, kind)
        there, moved = copy.deepcopy(model).to(self.other), x.to(self.other)
        loss = loss_of(there, moved)
        assert loss.device == self.other
        loss.backward()
        slopes = [p.grad for p in there.parameters()]
        assert all(g is not None and g.device == self.other and g.isfinite().all() for g in slopes)
        with torch.no_grad(), fixed_noise(2):
            expected = first(model(x))
        with torch.no_grad(), fixed_noise(2):
            torch.testing.assert_close(first(there(moved)).to(DEVICE), expected, rtol=1e-5, atol=1e-6)
        assert torch.cuda.current_device() == 0

    def test_generators_are_apart(self, backend: str) -> None:
        torch.manual_seed(0)
        before = torch.cuda.get_rng_state(0)
        functional.draw_rng(self.other)
        assert torch.equal(torch.cuda.get_rng_state(0), before)

    def test_operands_on_two_gpus(self, backend: str) -> None:
        mu, rho = torch.zeros(3, device=self.other), torch.zeros(3)
        kind, text = message_of(functional.sample_weight, mu, rho, rng().to(self.other))
        assert kind is ValueError and "cuda:0" in text and "cuda:1" in text


class TestAutocast:
    @pytest.mark.parametrize("dtype", [BF16, F16])
    @pytest.mark.parametrize("kind", ["linear", "conv2d"])
    def test_layers(self, backend: str, estimator: ModuleType, kind: str, dtype: torch.dtype) -> None:
        """Products narrow, parameters and their gradients float32."""
        layer: Any
        layer, x = make(estimator, kind)
        x.requires_grad_()
        torch.manual_seed(1)
        full = layer(x).detach()
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype):
            y = layer(x)
            kl = layer.kl_loss()
        assert y.dtype == dtype and kl.dtype == F32
        torch.testing.assert_close(y.float(), full, rtol=0.05, atol=0.1)
        (y.float().square().mean() + 1e-3 * kl).backward()
        for p in (x, *layer.parameters()):
            assert p.grad is not None and p.grad.dtype == F32 and p.grad.isfinite().all() and p.grad.any()

    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_scaled_steps(self, backend: str, estimator: ModuleType, dtype: torch.dtype) -> None:
        """GradScaler finds finite gradients, steps, and the loss falls."""
        model, x = make(estimator, "model")
        y = torch.arange(6) % 4
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        before = [p.detach().clone() for p in model.parameters()]
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                output, kl = model(x)
                loss = F.cross_entropy(output, y) + 1e-4 * kl
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 2.0**10  # never reduced: no overflow was found
        assert all(not torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
        assert sum(losses[-10:]) < sum(losses[:10])


def _triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


@pytest.mark.skipif(not _triton(), reason="torch.compile needs triton on a GPU")
class TestCompiled:
    """torch.compile(fullgraph=True, mode="reduce-overhead"): inductor's kernels inside CUDA graphs."""

    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("kind", KINDS)
    def test_forward_draws_afresh(self, native: None, estimator: ModuleType, kind: str) -> None:
        model, x = make(estimator, kind)
        compiled = torch.compile(lambda x: first(model(x)), fullgraph=True, mode="reduce-overhead")
        outputs = []
        with torch.no_grad():
            for _ in range(6):  # the first calls warm up and record, the later ones replay
                torch.compiler.cudagraph_mark_step_begin()
                outputs.append(compiled(x).clone())
        for i, y in enumerate(outputs):
            assert y.isfinite().all()
            assert all(unrelated(y, other) for other in outputs[:i])

    @pytest.mark.parametrize("kind", KINDS)
    def test_training(self, native: None, estimator: ModuleType, kind: str) -> None:
        model, x = make(estimator, kind)
        compiled = torch.compile(lambda x: loss_of(model, x), fullgraph=True, mode="reduce-overhead")
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        losses = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            loss = compiled(x)
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert len(set(losses)) == len(losses)

    @pytest.mark.parametrize("op", ["sample_weight", "lrt_linear", "lrt_conv2d"])
    def test_ops_equal_eager(self, native: None, op: str) -> None:
        """The same rng, the same numbers, forward and backward, recorded and replayed."""
        if op == "sample_weight":
            arguments = [*posterior(40, 30), rng()]
        elif op == "lrt_linear":
            arguments = [leaf(20, 30), *posterior(40, 30), *posterior(40), rng()]
        else:
            arguments = [leaf(2, 3, 8, 7), *posterior(5, 3, 3, 3), *posterior(5), rng()]
        leaves = [t for t in arguments if t.requires_grad]
        function = getattr(functional, op)
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")

        def run(function: Callable[..., Tensor]) -> list[Tensor]:
            y = function(*arguments)
            return [y.detach().clone(), *torch.autograd.grad((y * y).sum(), leaves)]

        expected = run(function)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            for a, b in zip(run(compiled), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def need(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory; {free:.1f} GB are")


class TestManyElements:
    """Indices that 32 bits do not hold."""

    count = 2**31 + 5
    # Elements whose noise is compared: the first, around 2^31, and the last.
    places = (0, 2**31 - 4, 2**31)

    def exact(self, place: int, length: int, stream: int = 5) -> Tensor:
        blocks = torch.arange(place // 4, (place + length + 3) // 4)
        return vars(reference)["_normal_blocks"](blocks, rng(stream=stream)).flatten()[:length]

    def test_normal(self, native: None) -> None:
        need(6)
        noise = functional.normal(self.count, rng(), dtype=F16)
        for place in self.places:
            part = noise[place : place + 8]
            torch.testing.assert_close(part, self.exact(place, len(part)).half(), rtol=1e-3, atol=1e-4)
        assert len(noise[2**31 :]) == 5
        # No stretch was left out: every stretch has a normal sample's spread.
        for start in range(0, self.count - 4096, 2**27):
            assert 0.9 < float(noise[start : start + 4096].float().std()) < 1.1

    def test_sample_weights(self, native: None) -> None:
        need(30)
        mu, rho = torch.zeros(self.count, dtype=BF16), torch.full((self.count,), -1.0, dtype=BF16)
        sigma = F.softplus(torch.tensor(-1.0))
        (w,), kl = ops.sample_weights([mu], [rho], rng(), 0.0, 0.5, True, None)
        for place in self.places:
            part = w[place : place + 8].float()
            exact = sigma * self.exact(place, len(part))
            torch.testing.assert_close(part, exact, rtol=2.0**-7, atol=1e-4)
        one = functional.kl_divergence(torch.zeros(1, dtype=F64), torch.full((1,), -1.0, dtype=F64), 0.0, 0.5)
        torch.testing.assert_close(kl.double(), self.count * one, rtol=1e-6, atol=0)
        torch.testing.assert_close(ops.kl_divergence([mu], [rho], [0.0], [0.5]), kl, rtol=1e-6, atol=0)

        w.fill_(1.0)  # its own gradient: sum of the weights
        (g_mu,), (g_rho,) = ops.posterior_backward([w], None, [mu], [rho], rng(), [0.0], [0.5])
        for place in self.places:
            part = g_rho[place : place + 8].float()
            assert bool((g_mu[place : place + 8] == 1).all())
            exact = torch.sigmoid(torch.tensor(-1.0)) * self.exact(place, len(part))
            torch.testing.assert_close(part, exact, rtol=2.0**-7, atol=1e-4)

    def test_lrt_sample(self, native: None) -> None:
        need(20)
        m, v = torch.zeros(self.count, dtype=BF16), torch.full((self.count,), 4.0, dtype=BF16)
        ops.lrt_sample_(m, v, rng())
        for place in self.places:
            part = m[place : place + 8].float()
            torch.testing.assert_close(part, 2 * self.exact(place, len(part)), rtol=2.0**-7, atol=1e-4)
        grad_v = ops.lrt_sample_backward(v, v, rng())
        for place in self.places:
            part = grad_v[place : place + 8].float()  # 4 * eps / (2 * 2)
            torch.testing.assert_close(part, self.exact(place, len(part)), rtol=2.0**-7, atol=1e-4)

    def test_passes_without_noise(self, native: None) -> None:
        need(40)
        x = torch.arange(-3.0, 3.0, 6 / 1024).to(BF16).repeat(self.count // 1024 + 1)[: self.count]
        for place in self.places:
            few = slice(place, place + 8)
            part = x[few]
            assert torch.equal(variance_of(x, BF16)[few], variance_of(part, BF16))
            assert torch.equal(variance_slope(x, x)[few], variance_slope(part, part))
            assert torch.equal(ops.square(x, BF16)[few], ops.square(part, BF16))
        y, few = x.clone(), slice(2**31 - 4, None)
        expected = x[few].clone()
        ops.square_backward_(expected, x[few], x[few])
        ops.square_backward_(y, x, x)
        assert torch.equal(y[few], expected)


def elsewhere() -> list[tuple[str, str]]:
    """An op and the argument of it that is on the CPU while the others are on the GPU."""
    cases = [(op, name) for op in LAYERS for name in ("W_mu", "W_rho", "bias_mu", "bias_rho", "rng")]
    cases += [(op, name) for op in SAMPLERS for name in ("rho", "rng")]
    return [*cases, ("kl_divergence", "rho")]


class TestErrors:
    @pytest.mark.parametrize(("op", "name"), elsewhere())
    def test_tensor_on_the_cpu(self, backend: str, op: str, name: str) -> None:
        arguments = valid(op)
        arguments[name] = tree_map(lambda t: t.cpu(), arguments[name])
        kind, text = message_of(lambda: getattr(functional, op)(**arguments))
        assert kind is ValueError, text
        assert text.endswith(f"{name} is on cpu, expected {DEVICE}"), text

    @pytest.mark.parametrize("op", ["sample_weight", "kl_divergence", "lrt_linear", "lrt_conv2d"])
    def test_tensor_on_the_gpu(self, backend: str, op: str) -> None:
        """The first operand says where the others should be."""
        arguments = valid(op)
        main = "input" if op.startswith("lrt") else "mu"
        arguments[main] = tree_map(lambda t: t.cpu(), arguments[main])
        kind, text = message_of(lambda: getattr(functional, op)(**arguments))
        assert kind is ValueError, text
        assert text.endswith(f"is on {DEVICE}, expected cpu"), text

    def test_second_tensor_of_a_list(self, backend: str) -> None:
        here, there = torch.zeros(3), torch.zeros(3, device="cpu")
        for function, extra in ((functional.sample_weights, [rng()]), (functional.kl_divergence, [])):
            kind, text = message_of(function, [here, there], [here, there], *extra)
            assert kind is ValueError and text.endswith(f"mu is on cpu, expected {DEVICE}"), text

    def test_layer_and_input_apart(self, backend: str, estimator: ModuleType) -> None:
        layer, x = make(estimator, "linear")
        for module, given in ((layer, x.cpu()), (copy.deepcopy(layer).cpu(), x)):
            kind, text = message_of(lambda m=module, g=given: m(g))
            assert kind in (ValueError, RuntimeError) and "cpu" in text and "cuda" in text, text

    def test_wrong_arguments_leave_the_gpu_usable(self, native: None) -> None:
        """An error is raised before anything is launched."""
        for op in ("sample_weight", "lrt_linear", "lrt_conv2d"):
            with pytest.raises(TypeError, match="rng must be int64"):
                getattr(functional, op)(**{**valid(op), "rng": rng().float()})
        torch.cuda.synchronize()
        assert functional.normal(5, rng()).isfinite().all()


@pytest.mark.parametrize("layer_type", ["lrt", "bbb"])
def test_digits_are_learned_as_well_as_on_the_cpu(tmp_path: Path, layer_type: str) -> None:
    pytest.importorskip("sklearn")
    config = TrainConfig(
        layer_type=layer_type, activation="relu", epochs=12, batch_size=32, lr=3e-3, lr_schedule="cosine",
        beta=0.01, posterior_rho_initial=(-5.0, 0.1), valid_samples=5, test_samples=20, threads=1,
    )  # fmt: skip
    accuracy = {}
    # As users have it: no default device.
    with torch.device("cpu"):
        train, valid_part = data.split_validation(data.load("digits", "train"), 200, 0, None)
        test = data.load("digits", "test")
        for place in ("cpu", str(DEVICE)):
            run = replace(config, device=place)
            metrics = fit(run, train, valid_part, test, tmp_path / place.replace(":", ""), progress=False)
            accuracy[place] = metrics["test"]["accuracy"]
            losses = [entry["loss"] for entry in metrics["history"]]
            assert losses[-1] < 0.7 * losses[0]
    assert accuracy[str(DEVICE)] >= 0.93
    assert accuracy[str(DEVICE)] >= accuracy["cpu"] - 0.04
