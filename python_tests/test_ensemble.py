"""``Ensemble``, adversarial inputs, and members that are trained one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bbb_fast
from bbb_fast import Ensemble, fixed_noise, multi_sample, posterior_means, predict
from bbb_fast.layers import BBB_LRT_Linear
from bbb_fast.methods import fgsm, train_members


def members(count: int, bayesian: bool = False) -> list[nn.Module]:
    torch.manual_seed(0)
    layer = BBB_LRT_Linear if bayesian else nn.Linear
    return [layer(4, 3) for _ in range(count)]


def test_a_draw_is_a_member(backend: str) -> None:
    models = members(3)
    x = torch.randn(5, 4)
    outputs = predict(Ensemble(models), x, samples=7, seed=1)
    for k in range(7):
        torch.testing.assert_close(outputs[k], models[k % 3](x), rtol=0, atol=0)
    assert torch.equal(multi_sample(Ensemble(models), x, 7, seed=1), outputs)


def test_random_members_take_their_own_draw(backend: str) -> None:
    ensemble = Ensemble(members(2, bayesian=True))
    x = torch.randn(5, 4)
    outputs = predict(ensemble, x, samples=4, seed=1)
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 4
    for k in range(4):
        with fixed_noise(1, k, model=ensemble):
            assert torch.equal(ensemble.members[k % 2](x), outputs[k])


def test_every_combination_of_two_ensembles(backend: str) -> None:
    first, second = members(2), [nn.Linear(3, 2) for _ in range(2)]
    model = nn.Sequential(Ensemble(first), Ensemble(second))
    x = torch.randn(5, 4)
    outputs = predict(model, x, samples=4, seed=0)
    wanted = [b(a(x)) for b in second for a in first]
    for output, combination in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, combination, rtol=0, atol=0)


def test_without_a_pinned_draw_torch_draws_the_member() -> None:
    ensemble, x = Ensemble(members(3)), torch.randn(5, 4)
    torch.manual_seed(0)
    seen = [ensemble(x) for _ in range(30)]
    torch.manual_seed(0)
    assert all(torch.equal(ensemble(x), output) for output in seen)
    assert len({tuple(o.flatten().tolist()) for o in seen}) == 3


def test_posterior_means_average_the_members(backend: str) -> None:
    models = members(3)
    x = torch.randn(5, 4)
    with posterior_means():
        output = Ensemble(models)(x)
    torch.testing.assert_close(output, torch.stack([m(x) for m in models]).mean(0))


def test_tuples_of_module_wrappers(backend: str) -> None:
    ensemble = Ensemble([bbb_fast.models.BBBLeNet(3, 1) for _ in range(2)])
    x = torch.randn(2, 1, 32, 32)
    assert predict(ensemble, x, samples=2, seed=0).shape == (2, 2, 3)
    with posterior_means():
        output, kl = ensemble(x)
    torch.testing.assert_close(kl, sum(bbb_fast.kl_loss(m) for m in ensemble.members) / 2)
    assert output.shape == (2, 3)


@pytest.mark.parametrize("wrong", [[], [1], None])
def test_wrong_members(wrong: object) -> None:
    if wrong is None:
        same = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="twice"):
            Ensemble([same, same])
        return
    with pytest.raises((TypeError, ValueError), match="member"):
        Ensemble(wrong)  # type: ignore[arg-type]


def test_fgsm_moves_by_epsilon_up_the_loss() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))

    def loss(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y)

    moved = fgsm(model, x, loss, 0.05)
    torch.testing.assert_close((moved - x).abs(), torch.full_like(x, 0.05))
    # A linear classifier's loss is convex in x: along its gradient it rises by that much at least.
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(leaf)), leaf)
    assert loss(model(moved)) - loss(model(x)) >= 0.05 * gradient.abs().sum() * (1 - 1e-4)
    assert all(p.grad is None for p in model.parameters()) and not moved.requires_grad
    with pytest.raises(ValueError, match=r"epsilon must be >= 0, got -1"):
        fgsm(model, x, loss, -1)
    with pytest.raises(TypeError, match="floating"):
        fgsm(model, y, loss, 0.1)


def make() -> nn.Module:
    return nn.Linear(2, 1)


def train(model: nn.Module, number: int) -> None:
    x = torch.randn(32, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        optimizer.step()


def fails_at_two(model: nn.Module, number: int) -> None:
    if number == 2:
        raise RuntimeError("stopped")
    train(model, number)


def weights(ensemble: Ensemble) -> list[Tensor]:
    return [member.get_parameter("weight").detach().clone() for member in ensemble.members]


def test_members_resume_one_by_one(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    whole = weights(train_members(make, train, 3, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(whole[0], whole[1])
    with pytest.raises(RuntimeError, match="stopped"):
        train_members(make, fails_at_two, 3, seed=5, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["member-0.pt", "member-1.pt"]
    calls = []

    def counted(model: nn.Module, number: int) -> None:
        calls.append(number)
        train(model, number)

    resumed = train_members(make, counted, 3, seed=5, folder=tmp_path)
    assert calls == [2]
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), whole, strict=True))
    (tmp_path / "member-1.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"member-1\.pt does not fit"):
        train_members(make, train, 3, seed=5, folder=tmp_path)


def test_members_side_by_side() -> None:
    pytest.importorskip("joblib")
    one = weights(train_members(make, train, 2, seed=3))
    two = weights(train_members(make, train, 2, seed=3, jobs=2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("wrong", [{"members": 0}, {"members": 2, "jobs": 0}])
def test_wrong_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be an int >= 1, got 0"):
        train_members(make, train, **wrong)


def test_copies_and_state_dicts() -> None:
    ensemble = Ensemble(members(2))
    twin = copy.deepcopy(ensemble)
    twin.load_state_dict(ensemble.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(predict(twin, x, 2, seed=0), predict(ensemble, x, 2, seed=0))
