"""Activation checkpointing: what a forward drew is what its recomputation draws, wherever backward runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import DEVICE, unrelated
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from bbb_fast import _recompute, fixed_noise, predict
from bbb_fast._noise import posterior_means
from bbb_fast.layers import BBB, BBB_LRT, Flipout

# A reentrant checkpoint within a forward that records none says so.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

Way = Callable[..., Tensor]


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    """Four blocks on [N, 6]."""
    estimator: ModuleType = request.param
    return nn.Sequential(*(nn.Sequential(estimator.BBBLinear(6, 6), nn.Tanh()) for _ in range(4)))


def each(model: nn.Sequential, x: Tensor, **options: Any) -> Tensor:
    for block in model:
        x = checkpoint(block, x, **options)
    return x


def nested(model: nn.Sequential, x: Tensor, **options: Any) -> Tensor:
    def halves(y: Tensor) -> Tensor:
        return checkpoint(model[2:], checkpoint(model[:2], y, **options), **options)

    return checkpoint(halves, x, **options)


def mixed(model: nn.Sequential, x: Tensor, **options: Any) -> Tensor:
    other = {**options, "use_reentrant": not options["use_reentrant"]}
    return checkpoint(lambda y: checkpoint(model, y, **other), x, **options)


WAYS: dict[str, Way] = {
    "whole": lambda model, x, **options: checkpoint(model, x, **options),
    "each": each,
    "sequential": lambda model, x, **options: checkpoint_sequential(model, 2, x, **options),
    "nested": nested,
    "mixed": mixed,
}
all_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])


def gradients(loss: Tensor, model: nn.Module, x: Tensor) -> list[Tensor]:
    leaves = [*model.parameters(), x]
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def inputs() -> Tensor:
    return torch.randn(5, 6, requires_grad=True)


@both_kinds
@all_ways
@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_backward_after_several_contexts(
    backend: str, model: nn.Sequential, way: Way, reentrant: bool, preserve: bool, early_stop: bool
) -> None:
    x = inputs()

    def loss(run: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(())
        for k in range(3):
            with fixed_noise(3, sample=k):
                total = total + (k + 1) * run(x).square().sum()
        with posterior_means():
            total = total + run(x).sin().sum()
        with fixed_noise(11), posterior_means():
            return total + run(x).cos().sum()

    options = {"use_reentrant": reentrant, "preserve_rng_state": preserve}
    with set_checkpoint_early_stop(early_stop):
        actual = gradients(loss(lambda x: way(model, x, **options)), model, x)
    assert_same(actual, gradients(loss(model), model, x))


@both_kinds
@all_ways
def test_backward_in_another_context_or_thread(model: nn.Sequential, way: Way, reentrant: bool) -> None:
    x = inputs()
    with fixed_noise(3, sample=2):
        expected = gradients(model(x).square().sum(), model, x)
        inside = gradients(way(model, x, use_reentrant=reentrant).square().sum(), model, x)
        losses = [way(model, x, use_reentrant=reentrant).square().sum() for _ in range(3)]
        found = [inside]
        # As the autograd engine does it for a GPU: the context is open, but in another thread.
        thread = threading.Thread(target=lambda: found.append(gradients(losses[0], model, x)))
        thread.start()
        thread.join()
    with fixed_noise(9):
        found.append(gradients(losses[1], model, x))
    with posterior_means():
        found.append(gradients(losses[2], model, x))
    assert len(found) == 4
    for actual in found:
        assert_same(actual, expected)


@both_kinds
@all_ways
def test_a_free_forward_is_drawn_again_as_it_was(model: nn.Sequential, way: Way, reentrant: bool) -> None:
    """Also where backward runs in a context, which is not the forward's."""
    x = inputs()
    torch.manual_seed(5)
    expected = gradients(model(x).square().sum(), model, x)
    for context in (fixed_noise(9), posterior_means()):
        torch.manual_seed(5)
        loss = way(model, x, use_reentrant=reentrant).square().sum()
        with context:
            assert_same(gradients(loss, model, x), expected)


@both_kinds
@all_ways
def test_no_other_noise_without_the_random_state(model: nn.Sequential, way: Way, reentrant: bool) -> None:
    x = inputs()
    loss = way(model, x, use_reentrant=reentrant, preserve_rng_state=False).sum()
    with pytest.raises(RuntimeError, match="preserve_rng_state=False would draw other noise in backward"):
        loss.backward()


@both_kinds
@pytest.mark.parametrize("outside", [lambda: fixed_noise(3, sample=2), posterior_means], ids=["pin", "means"])
def test_contexts_within_the_checkpointed_function(
    model: nn.Sequential, reentrant: bool, outside: Callable[[], Any]
) -> None:
    """They are entered again there; what is around them is the forward's."""
    x = inputs()

    def run(y: Tensor) -> Tensor:
        with fixed_noise(77):
            y = model[0](y)
        y = model[1](y)
        with posterior_means():
            y = model[2](y)
        return model[3](y)

    with outside():
        expected = gradients(run(x).square().sum(), model, x)
        loss = checkpoint(run, x, use_reentrant=reentrant).square().sum()
    assert_same(gradients(loss, model, x), expected)


@both_kinds
def test_a_context_in_the_function_says_nothing_about_the_rest(model: nn.Sequential, reentrant: bool) -> None:
    x = inputs()

    def run(y: Tensor) -> Tensor:
        with fixed_noise(77):
            y = model[0](y)
        return model[1](y)

    torch.manual_seed(5)
    expected = gradients(run(x).square().sum(), model, x)
    torch.manual_seed(5)
    loss = checkpoint(run, x, use_reentrant=reentrant).square().sum()
    assert_same(gradients(loss, model, x), expected)


class _Again(torch.autograd.Function):
    """A checkpoint as other libraries have it."""

    @staticmethod
    def forward(ctx: Any, run: nn.Module, x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(grad)
        return None, x.grad


class _Unknown(_Again):
    """One that cannot be told from an ordinary function."""

    @staticmethod
    def forward(node: Any, run: nn.Module, x: Tensor) -> Tensor:
        node.run = run
        node.save_for_backward(x)
        return run(x)


def test_other_libraries_checkpoints(model: nn.Sequential) -> None:
    x = inputs()
    with fixed_noise(3):
        expected = gradients(model(x).square().sum(), model, x)
        loss = _Again.apply(model, x).square().sum()
        unknown = _Unknown.apply(model, x).sum()
    assert_same(gradients(loss, model, x), expected)
    with pytest.raises(RuntimeError, match="call backward in the same one"):
        unknown.backward()


def test_a_forward_in_backward_is_no_recomputation(model: nn.Sequential) -> None:
    """A hook may run a model: under its thread's context, or freely."""
    x = inputs()
    seen: Any = []
    with fixed_noise(1):
        expected = model(x)
    free = model(x)
    for context in (fixed_noise(1), None):
        y = x * 2
        y.register_hook(lambda grad: seen.append(model(x).detach()) or grad)
        if context is None:
            y.sum().backward()
        else:
            with context:
                y.sum().backward()
    # On a GPU, hooks run in autograd's thread, in which no context was entered.
    if DEVICE.type == "cpu":
        assert torch.equal(seen[0], expected)
    else:
        assert unrelated(seen[0], expected)
    assert unrelated(seen[1], free) and unrelated(seen[1], expected)


def test_other_saved_tensor_hooks(model: nn.Sequential) -> None:
    """The checkpoint's need not be the innermost, and all stay as they were."""
    x, seen = inputs(), []

    def run(y: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            y = model[:2](y)
        return model[2:](y)

    def pack(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    with fixed_noise(3):
        expected = gradients(run(x).square().sum(), model, x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = checkpoint(run, x, use_reentrant=False).square().sum()
            before = len(seen)
            model(x)
        assert len(seen) > before
    assert_same(gradients(loss, model, x), expected)
    assert list(_recompute._checkpoints()) == []


def test_the_generator_is_untouched(model: nn.Sequential) -> None:
    x = inputs()
    before, seed = torch.get_rng_state(), torch.initial_seed()
    with fixed_noise(3):
        assert torch.initial_seed() == seed
        loss = checkpoint(model, x, use_reentrant=False).sum()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before) and torch.initial_seed() == seed


@both_kinds
def test_predict_in_a_checkpointed_function(model: nn.Sequential, reentrant: bool) -> None:
    x = inputs()

    def run(y: Tensor) -> Tensor:
        return y * predict(model, y, 2, seed=4).mean(0)

    expected = gradients(run(x).sum(), model, x)
    assert_same(gradients(checkpoint(run, x, use_reentrant=reentrant).sum(), model, x), expected)
