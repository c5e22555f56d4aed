"""The backward of a KL beside that of its layer's output: one pass over the parameters where both run, and
the same gradients however the two meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bbb_fast
from bbb_fast import functional
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.layers.base import BayesianLayer


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def estimator(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


class Case:
    """A layer, an input and the gradients of its parameters through the output and through the KL alone."""

    def __init__(self, estimator: ModuleType) -> None:
        self.layer: BayesianLayer = estimator.BBBLinear(6, 4)
        self.x = torch.randn(3, 6, requires_grad=True)
        self.parameters = list(self.layer.parameters())
        self.of_output = torch.autograd.grad(self.forward().sum(), self.parameters)
        self.of_kl = torch.autograd.grad(fresh_kl(self.layer), self.parameters)

    def forward(self) -> Tensor:
        """The output of one and the same draw."""
        torch.manual_seed(3)
        return self.layer(self.x)

    def expected(self, output: float = 1.0, kl: float = 1.0) -> list[Tensor]:
        return [output * a + kl * b for a, b in zip(self.of_output, self.of_kl, strict=True)]

    def check(self, output: float = 1.0, kl: float = 1.0, got: Any = None) -> None:
        """The given gradients, or those accumulated, which are then cleared."""
        accumulated = got is None
        got = [p.grad for p in self.parameters] if accumulated else list(got)
        torch.testing.assert_close(got, self.expected(output, kl), rtol=1e-5, atol=1e-5)
        if accumulated:
            self.layer.zero_grad()


def fresh_kl(layer: Any) -> Tensor:
    mu, rho = zip(*layer.posterior(), strict=True)
    return functional.kl_divergence(mu, rho, layer.prior_mu, layer.prior_sigma)


@pytest.fixture
def case(backend: str, estimator: ModuleType) -> Case:
    return Case(estimator)


class Ops(TorchDispatchMode):
    """Records the names of our ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bbb_fast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def ops_of(run: Callable[[], Any]) -> list[str]:
    with Ops() as ops:
        run()
    return ops.names


class TestOnePass:
    """Who forms the gradient, seen by the ops that a backward calls."""

    def test_together(self, native: None, estimator: ModuleType) -> None:
        case = Case(estimator)
        (own,) = ops_of(case.forward().sum().backward)
        case.check(1, 0)
        loss = case.forward().sum() + case.layer.kl_loss()
        assert ops_of(loss.backward) == [own]
        case.check()

    def test_of_a_model(self, native: None) -> None:
        model = nn.Sequential(BBB.BBBLinear(5, 4), nn.ReLU(), BBB_LRT.BBBLinear(4, 3, bias=False))
        y = model(torch.randn(2, 5))
        names = ops_of((y.sum() + bbb_fast.kl_loss(model)).backward)
        assert sorted(names) == ["bbb_linear_backward", "lrt_linear_backward"]

    def test_where_one_layer_has_not_run(self, native: None) -> None:
        """One more pass, over the parameters of those that the output's graph does not hold."""
        model = nn.Sequential(*(BBB.BBBLinear(4, 4) for _ in range(3)))
        y = model[1](torch.randn(2, 4))
        names = ops_of((y.sum() + bbb_fast.kl_loss(model)).backward)
        assert sorted(names) == ["bbb_linear_backward", "posterior_backward"]
        for layer in (model[0], model[2]):
            expected = torch.autograd.grad(fresh_kl(layer), list(layer.parameters()))
            torch.testing.assert_close([p.grad for p in layer.parameters()], list(expected))

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.set_flag("prior_sigma", 0.7),
            lambda layer: layer.W_mu.requires_grad_(False),
            lambda layer: setattr(layer, "W_rho", nn.Parameter(layer.W_rho.detach().clone())),
            lambda layer: layer.register_parameter("bias_mu", None),
        ],
        ids=["prior", "frozen", "another parameter", "no bias"],
    )
    def test_not_with_another_layer(
        self, native: None, estimator: ModuleType, change: Callable[[BayesianLayer], Any]
    ) -> None:
        """What the output's node would form is not this KL's gradient."""
        case = Case(estimator)
        y = case.forward()
        change(case.layer)
        if case.layer.bias_mu is None:
            case.layer.bias_rho = None
        kl = case.layer.kl_loss()
        wanted = [p for p in case.layer.parameters() if p.requires_grad]
        through_kl = torch.autograd.grad(fresh_kl(case.layer), wanted)
        through_output = torch.autograd.grad(y.sum(), wanted, retain_graph=True, allow_unused=True)
        got = torch.autograd.grad(y.sum() + kl, wanted)
        for g, a, b in zip(got, through_output, through_kl, strict=True):
            torch.testing.assert_close(g, b if a is None else a + b, rtol=1e-5, atol=1e-5)

    def test_not_with_a_spent_output(self, native: None, estimator: ModuleType) -> None:
        case = Case(estimator)
        y = case.forward()
        y.sum().backward()
        case.check(1, 0)
        assert ops_of(case.layer.kl_loss().backward) == ["posterior_backward"]
        case.check(0, 1)


class TestOrders:
    def test_one_after_the_other(self, case: Case) -> None:
        for first in ("output", "kl"):
            parts = {"output": case.forward().sum(), "kl": case.layer.kl_loss()}
            parts.pop(first).backward()
            case.check(first == "output", first == "kl")
            parts.popitem()[1].backward()
            case.check(first != "output", first != "kl")

    def test_several_kls(self, case: Case) -> None:
        y = case.forward()
        kls = [case.layer.kl_loss() for _ in range(3)]
        (kls[0] + y.sum() + 2 * kls[1]).backward(retain_graph=True)
        case.check(1, 3)
        kls[2].backward()
        case.check(0, 1)
        (y.sum() + kls[2].detach()).backward()
        case.check(1, 0)

    def test_several_forwards(self, case: Case) -> None:
        first, second = case.forward(), case.forward()
        kl = case.layer.kl_loss()
        (first.sum() + kl).backward(retain_graph=True)
        case.check()
        (first.sum() + second.sum() + kl).backward(retain_graph=True)
        case.check(2)
        second.sum().backward()
        case.check(1, 0)

    def test_two_losses_accumulate(self, case: Case) -> None:
        for _ in range(2):
            (case.forward().sum() + 0.5 * case.layer.kl_loss()).backward()
        case.check(2, 1)

    def test_the_output_is_gone(self, case: Case) -> None:
        case.forward()
        case.layer.kl_loss().backward()
        case.check(0, 1)
        y, kl = case.forward(), case.layer.kl_loss()
        del y
        kl.backward()
        case.check(0, 1)

    def test_the_kl_is_gone(self, case: Case) -> None:
        y = case.forward()
        for _ in range(3):
            case.layer.kl_loss()
        y.sum().backward()
        case.check(1, 0)

    @pytest.mark.parametrize("scale", [0.0, 1e-3, float("inf")])
    def test_scaled(self, case: Case, scale: float) -> None:
        (case.forward().sum() + scale * case.layer.kl_loss()).backward()
        if scale < 1:
            case.check(1, scale)
        else:
            assert not any(torch.isfinite(p.grad).any() for p in case.parameters)

    @pytest.mark.parametrize("keep", [True, False])
    def test_subsets_of_inputs(self, case: Case, keep: bool) -> None:
        """torch.autograd.grad for any of the input, the output and the parameters."""
        everything = [case.x, *case.parameters]
        y = case.forward()
        (of_x,) = torch.autograd.grad(y.sum(), case.x, retain_graph=True)
        expected = [of_x, *case.expected()]
        loss = y.sum() + case.layer.kl_loss()
        for bits in range(1, 32):
            if not keep:
                y = case.forward()
                loss = y.sum() + case.layer.kl_loss()
            chosen = [k for k in range(5) if bits >> k & 1]
            got = torch.autograd.grad(loss, [y, *(everything[k] for k in chosen)], retain_graph=keep)
            torch.testing.assert_close(
                list(got), [torch.ones_like(y), *(expected[k] for k in chosen)], rtol=1e-5, atol=1e-5
            )

    def test_a_spent_kl_raises(self, native: None, estimator: ModuleType) -> None:
        case = Case(estimator)
        y, kl = case.forward(), case.layer.kl_loss()
        kl.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            (y.sum() + kl).backward()


class TestBackwardsOfOneGraph:
    """Each backward gets the KL's gradient once: inside each other, in threads, after failures."""

    @pytest.mark.parametrize("where", ["y", "kl"])
    def test_inside_a_hook(self, case: Case, where: str) -> None:
        y, kl = case.forward(), case.layer.kl_loss()
        loss = y.sum() + kl
        inner: list[Any] = []

        def hook(_: Tensor) -> None:
            if not inner:
                inner.append(None)
                inner.append(torch.autograd.grad(loss, case.parameters, retain_graph=True))

        (y if where == "y" else kl).register_hook(hook)
        loss.backward(retain_graph=True)
        case.check(got=inner[1])
        case.check()
        loss.backward()
        case.check()

    def test_inside_a_hook_of_a_part(self, case: Case) -> None:
        """The inner backward runs one of the two nodes only."""
        y, kl = case.forward(), case.layer.kl_loss()
        loss = y.sum() + kl
        for part, share in ((y.sum(), (1, 0)), (kl, (0, 1))):
            inner: list[Any] = []
            handle = y.register_hook(
                lambda _, part=part, inner=inner: inner.append(
                    torch.autograd.grad(part, case.parameters, retain_graph=True)
                )
                if not inner and not inner.append(None)
                else None
            )
            loss.backward(retain_graph=True)
            handle.remove()
            case.check(*share, got=inner[1])
            case.check()

    def test_in_threads(self, case: Case) -> None:
        y, kl = case.forward(), case.layer.kl_loss()
        loss, wrong = y.sum() + kl, []
        expected = case.expected()

        def run() -> None:
            for _ in range(150):
                got = torch.autograd.grad(loss, case.parameters, retain_graph=True)
                if not all(
                    torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True)
                ):
                    wrong.append(got)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.parametrize("where", ["y", "x"])
    def test_after_a_failure(self, case: Case, where: str) -> None:
        """Between the two nodes, or after both."""
        y = case.forward()
        kl = case.layer.kl_loss()
        loss = y.sum() + kl

        def fail(_: Tensor) -> None:
            raise ArithmeticError("stop")

        handle = (y if where == "y" else case.x).register_hook(fail)
        for _ in range(3):
            with pytest.raises(ArithmeticError, match="stop"):
                loss.backward(retain_graph=True)
        handle.remove()
        case.layer.zero_grad()
        y.sum().backward(retain_graph=True)
        case.check(1, 0)
        loss.backward(retain_graph=True)
        case.check()
        kl.backward()
        case.check(0, 1)

    def test_a_gradient_is_let_go(self, native: None, estimator: ModuleType) -> None:
        """Nothing of many backwards of a kept graph stays, failed or not."""
        case = Case(estimator)
        y = case.forward()
        loss = y.sum() + case.layer.kl_loss()
        alive: list[Any] = []

        class Weight(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, kl: Tensor) -> Tensor:
                return kl.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                left = grad * 1.0
                alive.append(vars(torch._C)["_WeakTensorRef"](left))
                return left

        loss = y.sum() + Weight.apply(case.layer.kl_loss())
        fails = [False]

        def maybe_fail(_: Tensor) -> None:
            if fails[0]:
                raise ArithmeticError("stop")

        y.register_hook(maybe_fail)
        for k in range(20):
            fails[0] = k % 2 == 1
            with suppress(ArithmeticError):
                loss.backward(retain_graph=True)
        fails[0] = False
        loss.backward(retain_graph=True)
        assert len(alive) == 21 and all(ref.expired() for ref in alive)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, case: Case, reentrant: bool) -> None:
        for together in (True, False):
            torch.manual_seed(3)
            y = checkpoint(case.layer, case.x, use_reentrant=reentrant)
            kl = case.layer.kl_loss()
            if together:
                (y.sum() + kl).backward()
            else:
                kl.backward()
                y.sum().backward()
            case.check()
            case.layer.kl_loss().backward()
            case.check(0, 1)

    def test_saved_tensor_hooks(self, case: Case) -> None:
        with torch.autograd.graph.save_on_cpu():
            loss = case.forward().sum() + case.layer.kl_loss()
        loss.backward()
        case.check()
