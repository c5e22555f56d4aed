"""KL of whole models, the ELBO, and the schedules of the KL's weight."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bbb_fast
from bbb_fast import losses
from bbb_fast.layers import BBB, BBB_LRT, ModuleWrapper
from bbb_fast.layers.base import BayesianLayer
from bbb_fast.losses import ELBO, get_beta, kl_loss, kl_weight


def exact_kl(*layers: BayesianLayer) -> Tensor:
    """The KL in float64, by torch.distributions."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        p = torch.distributions.Normal(
            torch.tensor(layer.prior_mu).double(), torch.tensor(layer.prior_sigma).double()
        )
        for mu, rho in layer.posterior():
            q = torch.distributions.Normal(mu.double(), F.softplus(rho.double()))
            total = total + torch.distributions.kl_divergence(q, p).sum()
    return total


class OwnKl(nn.Module):
    """A module of another library: parameters and a KL of its own."""

    def __init__(self, value: float = 2.5) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def kl_loss(self) -> Tensor:
        return self.value * 2


class TestKlLoss:
    def test_sums_layers_of_all_kinds_and_priors(self, backend: str) -> None:
        wide = BBB.BBBLinear(5, 4, priors={"prior_sigma": 2.0})
        conv = BBB_LRT.BBBConv2d(2, 3, 3, bias=False, priors={"prior_mu": -0.5})
        deep = BBB_LRT.BBBLinear(4, 2)
        model = nn.Sequential(wide, nn.Linear(3, 3), nn.ModuleDict({"a": nn.ModuleList([conv, deep])}))
        kl, exact = kl_loss(model), exact_kl(wide, conv, deep)
        assert kl.shape == () and kl.dtype == torch.float32
        torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)
        kl.backward()
        parameters = [p for layer in (wide, conv, deep) for p in layer.parameters()]
        expected = torch.autograd.grad(exact, parameters)
        torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-5, atol=1e-6)
        assert model[1].weight.grad is None

    def test_is_a_sum_not_a_mean(self, backend: str) -> None:
        """Twice the weights, twice the KL; twice the layers, twice the KL."""
        start = {"posterior_mu_initial": (0.3, 0), "posterior_rho_initial": (-2, 0)}
        one = kl_loss(BBB.BBBLinear(10, 1, bias=False, priors=start)).item()
        assert kl_loss(BBB.BBBLinear(10, 2, bias=False, priors=start)).item() == pytest.approx(2 * one)
        pair = nn.Sequential(*(BBB.BBBLinear(10, 1, bias=False, priors=start) for _ in range(2)))
        assert kl_loss(pair).item() == pytest.approx(2 * one)

    def test_mixed_dtypes(self, backend: str) -> None:
        layers: list[Any] = [
            BBB.BBBLinear(5, 4).to(t) for t in (torch.float32, torch.bfloat16, torch.float16)
        ]
        kl = kl_loss(nn.Sequential(*layers))
        assert kl.dtype == torch.float32
        torch.testing.assert_close(kl.double(), exact_kl(*layers), rtol=1e-6, atol=0)
        layers.append(BBB_LRT.BBBLinear(5, 4, dtype=torch.float64))
        kl = kl_loss(nn.Sequential(*layers))
        assert kl.dtype == torch.float64
        torch.testing.assert_close(kl, exact_kl(*layers), rtol=1e-6, atol=0)
        kl.backward()
        for layer in layers:
            assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())

    def test_of_a_single_layer(self, backend: str) -> None:
        layer = BBB.BBBLinear(5, 4)
        assert torch.equal(kl_loss(layer), layer.kl_loss())

    def test_shared_layers_count_once(self, backend: str) -> None:
        layer = BBB.BBBLinear(4, 4)
        torch.testing.assert_close(kl_loss(nn.Sequential(layer, nn.ReLU(), layer)), layer.kl_loss())

    def test_without_bayesian_layers(self) -> None:
        for model in (nn.Linear(3, 2), nn.ReLU(), nn.Sequential()):
            kl = kl_loss(model)
            assert kl.shape == () and kl.item() == 0
        assert kl_loss(nn.Linear(3, 2, device="meta")).device.type == "meta"

    def test_modules_with_a_kl_of_their_own(self, backend: str) -> None:
        layer, other = BBB.BBBLinear(4, 4), OwnKl()
        kl = kl_loss(nn.Sequential(layer, nn.Sequential(other)))
        torch.testing.assert_close(kl, layer.kl_loss() + 5.0)
        kl.backward()
        assert other.value.grad == 2
        assert kl_loss(nn.Sequential(OwnKl(), OwnKl(1.0))).item() == 7

    def test_a_model_may_define_kl_loss_by_it(self, backend: str) -> None:
        """No endless recursion, and no layer counted twice, through wrappers either."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = BBB.BBBLinear(4, 4)

            def kl_loss(self) -> Tensor:
                return kl_loss(self)

        class Wrapper(ModuleWrapper):
            def __init__(self) -> None:
                super().__init__()
                self.fc = BBB.BBBLinear(4, 4)

            def kl_loss(self) -> Tensor:
                return kl_loss(self)

        for model in (Model(), Wrapper()):
            assert torch.equal(model.kl_loss(), model.fc.kl_loss())
            assert torch.equal(kl_loss(nn.Sequential(model)), model.fc.kl_loss())
            twice = nn.ModuleList([model, nn.Sequential(model, nn.ReLU())])
            assert torch.equal(kl_loss(twice), model.fc.kl_loss())

    def test_a_module_speaks_for_what_is_below_it(self, backend: str) -> None:
        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(BBB.BBBLinear(4, 4), nn.Sequential(BBB.BBBLinear(4, 4)))

            def kl_loss(self) -> Tensor:
                return kl_loss(self) / 2

        part, rest = Half(), BBB_LRT.BBBLinear(4, 4)
        body: Any = part.body
        expected = exact_kl(body[0], body[1][0]) / 2 + exact_kl(rest)
        kl = kl_loss(nn.Sequential(part, rest)).double()
        torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)

    def test_is_public(self) -> None:
        assert bbb_fast.kl_loss is kl_loss and bbb_fast.ELBO is ELBO and bbb_fast.get_beta is get_beta


class TestForwardKl:
    """kl_loss(model) after a forward: of the parameters as they are, and its backward beside the output's."""

    @staticmethod
    def model() -> nn.Sequential:
        layers = [BBB.BBBLinear(5, 4, priors={"prior_sigma": 2.0}), BBB_LRT.BBBLinear(4, 4), nn.ReLU()]
        return nn.Sequential(*layers, BBB_LRT.BBBLinear(4, 3, bias=False, priors={"prior_mu": -0.5}))

    @staticmethod
    def check(model: nn.Module, kl: Tensor) -> None:
        """Value and gradients, by torch.distributions."""
        layers = [m for m in model.modules() if isinstance(m, BayesianLayer)]
        parameters = [p for layer in layers for p in layer.parameters()]
        exact = exact_kl(*layers)
        torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(kl, parameters, retain_graph=True),
            torch.autograd.grad(exact, parameters),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_is_that_of_the_layers(self, backend: str) -> None:
        model = self.model()
        before = kl_loss(model)
        model(torch.randn(7, 5))
        taken, fresh = kl_loss(model), kl_loss(model)
        for kl in (before, taken, fresh):
            self.check(model, kl)
        torch.testing.assert_close(taken, fresh, rtol=1e-6, atol=0)

    def test_where_some_layers_have_not_run(self, backend: str) -> None:
        model = self.model()
        model[1](torch.randn(7, 4))
        self.check(model, kl_loss(model))

    def test_where_a_layer_was_asked_before(self, backend: str) -> None:
        model: Any = self.model()
        model(torch.randn(7, 5))
        own = model[0].kl_loss()
        self.check(model, kl_loss(model))
        self.check(model[0], own)

    @pytest.mark.parametrize("order", ["together", "output first", "KL first"])
    def test_gradients_beside_those_of_the_output(self, backend: str, order: str) -> None:
        """The sum's backward, or one after the other: the same gradients."""
        model, x = self.model(), torch.randn(7, 5)
        parameters = list(model.parameters())

        def parts() -> list[Tensor]:
            torch.manual_seed(3)
            y = model(x)
            return [y.square().sum(), kl_loss(model)]

        nll, _ = parts()
        layers = [m for m in model if isinstance(m, BayesianLayer)]
        expected = [
            a + b
            for a, b in zip(
                torch.autograd.grad(nll, parameters),
                torch.autograd.grad(exact_kl(*layers), parameters),
                strict=True,
            )
        ]
        nll, kl = parts()
        if order == "together":
            (nll + kl).backward()
        else:
            for part in (nll, kl) if order == "output first" else (kl, nll):
                part.backward()
        torch.testing.assert_close([p.grad for p in parameters], expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("fused", [False, True])
    def test_training_steps(self, backend: str, fused: bool) -> None:
        """At every step the KL of that step's parameters, asked for before or after the update."""
        model, x = self.model(), torch.randn(7, 5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        for _ in range(3):
            loss = model(x).square().sum() + kl_loss(model)
            optimizer.zero_grad()
            loss.backward()
            model(x)
            optimizer.step()
            self.check(model, kl_loss(model))

    def test_a_layer_that_runs_twice_counts_once(self, backend: str) -> None:
        layer = BBB_LRT.BBBLinear(4, 4)
        model = nn.Sequential(layer, nn.ReLU(), layer)
        y = model(torch.randn(7, 4))
        kl = kl_loss(model)
        self.check(model, kl)
        (y.sum() + kl).backward()

    def test_no_grad_between_forward_and_loss(self, backend: str) -> None:
        model = self.model()
        model(torch.randn(7, 5))
        with torch.no_grad():
            quiet = kl_loss(model)
        assert not quiet.requires_grad
        self.check(model, kl_loss(model))

    def test_copy_after_a_forward(self, backend: str) -> None:
        model = self.model()
        model(torch.randn(7, 5))
        copied = copy.deepcopy(model)
        for one in (copied, model):
            self.check(one, kl_loss(one))

    def test_module_wrapper(self, backend: str) -> None:
        """Its output and KL in one backward, step after step, under sample=False too."""

        class Net(ModuleWrapper):
            def __init__(self) -> None:
                super().__init__()
                self.first = BBB.BBBLinear(5, 4)
                self.second = BBB_LRT.BBBLinear(4, 3)

        net = Net()
        for sample in (True, False, True):
            y, kl = net(torch.randn(7, 5), sample=sample)
            self.check(net, kl)
            (y.sum() + kl).backward()


class TestElbo:
    def test_value(self) -> None:
        log_p = torch.log_softmax(torch.randn(5, 3), 1).requires_grad_()
        target = torch.tensor([0, 2, 1, 1, 0])
        kl = torch.tensor(7.0, requires_grad=True)
        loss = ELBO(1000)(log_p, target, kl, 0.25)
        nll = -sum(log_p[i, t] for i, t in enumerate(target)) / 5
        torch.testing.assert_close(loss, 1000 * nll + 0.25 * 7)
        loss.backward()
        assert kl.grad == 0.25
        expected = torch.zeros(5, 3)
        expected[torch.arange(5), target] = -200.0
        torch.testing.assert_close(log_p.grad, expected)

    def test_takes_numbers_and_tensors(self) -> None:
        log_p, target = torch.log_softmax(torch.randn(2, 3), 1), torch.tensor([1, 0])
        loss = ELBO(10)
        a = loss(log_p, target, 3.0, torch.tensor(0.5))
        torch.testing.assert_close(a, loss(log_p, target, torch.tensor(3.0), 0.5))
        torch.testing.assert_close(loss(log_p, target, 3.0, 0), 10 * F.nll_loss(log_p, target))

    def test_does_not_depend_on_the_batch_size(self) -> None:
        log_p, target = torch.log_softmax(torch.randn(4, 3), 1), torch.tensor([1, 0, 2, 1])
        loss = ELBO(100)
        halves = [loss(log_p[i : i + 2], target[i : i + 2], 6.0, 1.0) for i in (0, 2)]
        torch.testing.assert_close(sum(halves) / 2, loss(log_p, target, 6.0, 1.0))

    def test_of_an_example(self) -> None:
        """The mean is the sum divided by the number of examples, gradients too."""
        log_p, target = torch.randn(5, 3).log_softmax(1).requires_grad_(), torch.tensor([0, 2, 1, 1, 0])
        kl = torch.tensor(7.0, requires_grad=True)
        arguments = (log_p, target, kl, 0.25)
        mean, whole = ELBO(1000, reduction="mean")(*arguments), ELBO(1000)(*arguments)
        torch.testing.assert_close(mean, F.nll_loss(log_p, target) + 0.25 * 7 / 1000)
        torch.testing.assert_close(mean * 1000, whole)
        gradients = [torch.autograd.grad(loss, (log_p, kl)) for loss in (mean, whole)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one * 1000, other)

    @pytest.mark.parametrize(("reduction", "learns"), [("mean", True), ("sum", False)])
    def test_a_plain_models_learning_rate(self, reduction: str, learns: bool) -> None:
        """SGD at a rate of 0.1 learns with the loss of an example, and diverges with that of the data set."""
        x = torch.randn(200, 4)
        y = (x[:, 0] > 0).long()
        model = nn.Sequential(BBB_LRT.BBBLinear(4, 16), nn.ReLU(), BBB_LRT.BBBLinear(16, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        elbo = ELBO(60_000, reduction=reduction, from_logits=True)
        for _ in range(100):
            loss = elbo(model(x), y, kl_loss(model), 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (loss < 0.5) == learns
        assert learns or not loss.isfinite()

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_from_logits(self, reduction: str) -> None:
        logits, target = torch.randn(5, 3) * 9, torch.tensor([0, 2, 1, 1, 0])
        loss = ELBO(10, reduction=reduction, from_logits=True)(logits, target, 2.0, 0.5)
        torch.testing.assert_close(
            loss, ELBO(10, reduction=reduction)(logits.log_softmax(1), target, 2.0, 0.5)
        )

    @pytest.mark.parametrize("shift", [4.0, -9.0])
    def test_logits_are_refused(self, shift: float) -> None:
        """All negative ones too, and in another dimension's rows."""
        target = torch.tensor([0, 2, 1, 1])
        with pytest.raises(ValueError, match="log-probabilities, .* instead of 1; .*from_logits=True"):
            ELBO(10)(torch.randn(4, 3) + shift, target, 0.0, 1.0)
        with pytest.raises(ValueError, match="must be log-probabilities"):
            ELBO(10)(torch.randn(4, 3, 2).log_softmax(2), target[:, None].expand(4, 2), 0.0, 1.0)
        with pytest.raises(ValueError, match="must be log-probabilities"):
            ELBO(10)(torch.tensor([[math.inf, 0.0]]), torch.tensor([0]), 0.0, 1.0)
        with pytest.raises(ValueError, match="must be log-probabilities"):
            ELBO(10)(torch.rand(4, 3).softmax(1), target, 0.0, 1.0)  # probabilities

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("classes", [1, 10, 3000, 50_000])
    def test_rounded_log_probabilities_are_not(self, dtype: torch.dtype, classes: int) -> None:
        for logits in (torch.zeros(2, classes), torch.randn(2, classes) * 5):
            log_p = logits.log_softmax(1).to(dtype)
            assert ELBO(1)(log_p, torch.tensor([0, 0]), 0.0, 1.0).isfinite()

    def test_impossible_and_missing_numbers(self) -> None:
        """A probability of 0 is one; NaN goes through."""
        loss, certain = ELBO(10), torch.tensor([[0.0, -math.inf]])
        assert loss(certain, torch.tensor([0]), 1.0, 1.0) == 1
        assert loss(certain, torch.tensor([1]), 1.0, 1.0) == math.inf
        log_p = torch.randn(2, 3).log_softmax(1)
        log_p[0, 1] = math.nan
        assert ELBO(10)(log_p, torch.tensor([1, 1]), 1.0, 1.0).isnan()
        assert loss(certain, torch.tensor([0]), torch.tensor(math.nan), 1.0).isnan()

    def test_the_values_are_looked_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: Any = []
        check = losses._check_log_probs
        monkeypatch.setattr(losses, "_check_log_probs", lambda x: calls.append(1) or check(x))
        log_p, target, loss = torch.randn(2, 3).log_softmax(1), torch.tensor([1, 1]), ELBO(10)
        for _ in range(3):
            loss(log_p, target, 1.0, 1.0)
        assert len(calls) == 1

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_where_values_cannot_be_looked_at(self, reduction: str, from_logits: bool) -> None:
        log_p, target = torch.randn(4, 5, 3).log_softmax(2), torch.randint(3, (4, 5))

        def loss(x: Tensor, y: Tensor, beta: float = 0.5) -> Tensor:
            kl = torch.tensor(2.0, device=x.device)
            return ELBO(10, reduction=reduction, from_logits=from_logits)(x, y, kl, beta)

        each = torch.stack([loss(x, y) for x, y in zip(log_p, target, strict=True)])
        torch.testing.assert_close(torch.func.vmap(loss)(log_p, target), each)
        torch.testing.assert_close(
            torch.func.grad(loss)(log_p[0], target[0]),
            torch.autograd.grad(loss(x := log_p[0].clone().requires_grad_(), target[0]), x)[0],
        )
        assert loss(log_p[0].to("meta"), target[0].to("meta")).shape == ()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for beta in (0.1, 0.2, 0.3):
            torch.testing.assert_close(compiled(log_p[0], target[0], beta), loss(log_p[0], target[0], beta))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"input": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "input must be floating point"),
            ({"target": torch.tensor([0.0, 1.0])}, TypeError, "target must be int64 class numbers"),
            ({"target": torch.tensor([1])}, ValueError, r"target must have shape \[2\] .*got \[1\]"),
            ({"target": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "target must have shape"),
            ({"input": torch.zeros(3)}, ValueError, r"input must have shape \[N, C\]"),
            ({"input": torch.zeros(0, 3), "target": torch.zeros(0).long()}, ValueError, "input is empty"),
            ({"kl": torch.zeros(3)}, ValueError, r"kl must be a scalar, got shape \[3\]"),
            ({"beta": torch.ones(2)}, ValueError, r"beta must be a scalar, got shape \[2\]"),
            ({"beta": -0.1}, ValueError, "beta must be >= 0, got -0.1"),
        ],
    )
    def test_wrong_arguments(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments = {
            "input": torch.zeros(2, 3).log_softmax(1), "target": torch.tensor([1, 0]), "kl": 1.0, "beta": 1.0,
            **changes,
        }  # fmt: skip
        for loss in (ELBO(10), ELBO(10, reduction="mean", from_logits=True)):
            with pytest.raises(error, match=f"ELBO: {message}"):
                loss(**arguments)

    def test_pickled_before_there_were_options(self) -> None:
        loss = ELBO(10)
        for name in ("reduction", "from_logits"):
            del loss.__dict__[name]
        log_p = torch.randn(2, 3).log_softmax(1)
        arguments = (log_p, torch.tensor([1, 0]), 2.0, 0.5)
        assert pickle.loads(pickle.dumps(loss))(*arguments) == ELBO(10)(*arguments)

    def test_wrong_reduction(self) -> None:
        with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'none'"):
            ELBO(10, reduction="none")

    def test_repr(self) -> None:
        assert repr(ELBO(10, reduction="mean")) == "ELBO(10, reduction='mean', from_logits=False)"

    @pytest.mark.parametrize("size", [0, -1, 2.5, "10", True, None, math.inf])
    def test_wrong_size(self, size: Any) -> None:
        with pytest.raises(ValueError, match="train_size must be an int >= 1"):
            ELBO(size)


class TestSchedules:
    @pytest.mark.parametrize(("batch", "beta"), [(0, 4 / 7), (1, 2 / 7), (2, 1 / 7)])
    def test_blundell(self, batch: int, beta: float) -> None:
        assert get_beta(batch, 3, "Blundell") == pytest.approx(beta, rel=1e-14)
        assert get_beta(0, 1, "Blundell") == 1

    def test_blundell_of_many_minibatches(self) -> None:
        assert get_beta(0, 10**6, "Blundell") == 0.5
        assert get_beta(10**6 - 1, 10**6, "Blundell") == 0

    def test_standard(self) -> None:
        assert [get_beta(i, 8, "Standard") for i in range(8)] == [0.125] * 8

    @pytest.mark.parametrize(
        ("epoch", "epochs", "beta"),
        [(0, 8, 0), (1, 8, 0.5), (2, 8, 1), (7, 8, 1), (3, 40, 0.3), (0, 3, 0), (1, 3, 1), (0, 1, 0)],
    )
    def test_soenderby(self, epoch: int, epochs: int, beta: float) -> None:
        assert get_beta(5, 10, "Soenderby", epoch, epochs) == pytest.approx(beta)
        assert kl_weight(5, 10, "Soenderby", epoch, epochs) == pytest.approx(beta)

    @pytest.mark.parametrize("number", [0, 1, 0.1, 2.5])
    def test_a_number_is_itself(self, number: float) -> None:
        beta = get_beta(3, 10, number)
        assert beta == number and isinstance(beta, float)
        assert kl_weight(3, 10, number, 0, 1) == number

    @pytest.mark.parametrize("beta_type", ["Blundell", "Standard"])
    @pytest.mark.parametrize("m", [1, 2, 3, 10, 1000, 3000])
    def test_shares_of_an_epoch(self, beta_type: str, m: int) -> None:
        """The betas share out one KL; the weights beside a mean NLL average to the exact bound's 1."""
        betas = [get_beta(i, m, beta_type) for i in range(m)]
        assert math.fsum(betas) == pytest.approx(1, rel=1e-12)
        assert betas == sorted(betas, reverse=True) and min(betas) >= 0
        weights = [kl_weight(i, m, beta_type, 0, 1) for i in range(m)]
        assert math.fsum(weights) / m == pytest.approx(1, rel=1e-12)

    @pytest.mark.parametrize("beta_type", ["blundell", "", None, True, [0.1], "0.1"])
    def test_unknown(self, beta_type: Any) -> None:
        with pytest.raises(ValueError, match="unknown beta") as caught:
            get_beta(0, 10, beta_type)
        for name in ("Blundell", "Soenderby", "Standard"):
            assert name in str(caught.value)

    @pytest.mark.parametrize("given", [(None, None), (1, None), (None, 10)])
    def test_soenderby_needs_epochs(self, given: tuple[int | None, int | None]) -> None:
        with pytest.raises(ValueError, match="needs epoch and num_epochs"):
            get_beta(0, 10, "Soenderby", *given)

    @pytest.mark.parametrize("beta_type", ["Blundell", "Standard"])
    @pytest.mark.parametrize("m", [0, -1])
    def test_no_minibatches(self, beta_type: str, m: int) -> None:
        with pytest.raises(ValueError, match="m must be >= 1"):
            get_beta(0, m, beta_type)
