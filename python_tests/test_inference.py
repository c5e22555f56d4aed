"""predict and fixed_noise: draws that are functions, the same on every batch and in every context."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DEVICE, rng_state, unrelated
from torch import Tensor, nn

import bbb_fast
from bbb_fast import fixed_noise, functional, predict
from bbb_fast._noise import posterior_means
from bbb_fast.layers import BBB, BBB_LRT, FlattenLayer, Flipout, ModuleWrapper


@pytest.fixture(params=[BBB, BBB_LRT, Flipout], ids=["bbb", "lrt", "flipout"])
def estimator(request: pytest.FixtureRequest) -> ModuleType:
    """The module that holds the layers of one estimator."""
    return request.param


class Net(ModuleWrapper):
    """A small convolution net on [N, 2, 5, 5]; returns (output, kl)."""

    def __init__(self, estimator: ModuleType, **options: Any) -> None:
        super().__init__()
        priors = {"posterior_mu_initial": (0, 0.5), "posterior_rho_initial": (-1.5, 0.2)}
        self.conv = estimator.BBBConv2d(2, 3, 3, priors=priors, **options)
        self.act = nn.Softplus()
        self.flatten = FlattenLayer(27)
        self.fc = estimator.BBBLinear(27, 4, priors=priors)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 2, 5, 5)


def in_thread(function: Callable[[], Any]) -> Any:
    """Runs a function in a thread of its own and gives its result or its exception."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


class TestPredict:
    def test_shape(self, backend: str, estimator: ModuleType) -> None:
        y = predict(Net(estimator), images(), samples=3)
        assert y.shape == (3, 6, 4) and y.dtype == torch.float32 and not y.requires_grad
        assert predict(Net(estimator), images(), 1).shape == (1, 6, 4)
        assert predict(Net(estimator), images()).shape == (10, 6, 4)
        assert predict(Net(estimator), images(0), 2).shape == (2, 0, 4)
        layer = estimator.BBBLinear(3, 2)  # returns a tensor, not a pair
        assert predict(layer, torch.randn(5, 4, 3), 2).shape == (2, 5, 4, 2)

    def test_a_draw_is_one_function(self, backend: str, estimator: ModuleType) -> None:
        """Equal rows get equal outputs in one draw, and the draws differ: T draws of the weights, not T
        rows under one draw, and not a draw a row."""
        y = predict(Net(estimator), images(1).expand(7, -1, -1, -1), samples=5)
        torch.testing.assert_close(y, y[:, :1].expand_as(y))
        assert (y.std(0) > 1e-3).all()
        for i in range(5):
            assert all(unrelated(y[i], y[j]) for j in range(i))

    def test_draws_have_the_posterior_s_spread(self, backend: str, estimator: ModuleType) -> None:
        """Moments over the draws of one linear layer, as the weights' posterior gives them."""
        layer = estimator.BBBLinear(3, 40, priors={"posterior_rho_initial": (-1, 0.2)})
        x = torch.randn(2, 3)
        y = predict(layer, x, samples=300, seed=5).double()
        with torch.no_grad():
            mean = layer(x, sample=False).double()
            sigmas = [torch.nn.functional.softplus(rho) for rho in (layer.W_rho, layer.bias_rho)]
            v = (x.square() @ sigmas[0].square().T + sigmas[1].square()).double()
        standard = (y - mean) / v.sqrt()
        assert standard.mean().abs() < 4 / (300 * 40) ** 0.5
        assert (standard.square().mean() - 1).abs() < 4 * (2 / (300 * 40)) ** 0.5
        # The two rows share their weights, so they are correlated as x_1 . x_2 says.
        covariance = ((y - mean)[:, 0] * (y - mean)[:, 1]).mean(0)
        expected = (sigmas[0].square() @ (x[0] * x[1]) + sigmas[1].square()).double()
        spread = (v[0] * v[1] + expected.square()).sqrt() / 300**0.5
        assert ((covariance - expected) / spread).abs().max() < 4.5

    @pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 100])
    def test_batch_size_changes_nothing(self, backend: str, estimator: ModuleType, batch_size: int) -> None:
        model, x = Net(estimator), images()
        whole = predict(model, x, 3, seed=1)
        torch.testing.assert_close(predict(model, x, 3, seed=1, batch_size=batch_size), whole)
        torch.testing.assert_close(predict(model, x[:2], 3, seed=1), whole[:, :2])

    def test_seed(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        before = rng_state()
        first = predict(model, x, 3, seed=1)
        assert torch.equal(rng_state(), before)
        assert torch.equal(predict(model, x, 3, seed=1), first)
        assert torch.equal(predict(model, x, 5, seed=1)[:3], first)
        assert unrelated(predict(model, x, 3, seed=2), first)
        predict(model, x, 1, seed=-(2**63)), predict(model, x, 1, seed=2**63 - 1)

    def test_without_a_seed_the_generator_governs(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        torch.manual_seed(3)
        first, second = predict(model, x, 2), predict(model, x, 2)
        assert unrelated(first, second)
        torch.manual_seed(3)
        assert torch.equal(predict(model, x, 2), first)

    def test_equals_fixed_noise(self, backend: str, estimator: ModuleType) -> None:
        """Draw k is the function that fixed_noise(seed, sample=k) pins."""
        model, x = Net(estimator).eval(), images()
        y = predict(model, x, 3, seed=11)
        for k in range(3):
            with fixed_noise(11, sample=k), torch.no_grad():
                assert torch.equal(model(x)[0], y[k])

    def test_modes_come_back(self, estimator: ModuleType) -> None:
        model = Net(estimator)
        model.drop = nn.Dropout(0.5)
        model.norm = nn.BatchNorm1d(4)
        model.norm.eval()
        modes = [module.training for module in model.modules()]
        assert True in modes and False in modes
        seen = []
        model.drop.register_forward_hook(lambda module, *_: seen.append(module.training))
        predict(model, images(), 2)
        assert seen == [False, False]
        assert [module.training for module in model.modules()] == modes
        assert model.norm.num_batches_tracked == 0

    def test_modes_and_noise_come_back_after_an_error(self, estimator: ModuleType) -> None:
        model = Net(estimator)
        model.act.eval()
        modes = [module.training for module in model.modules()]
        with pytest.raises((RuntimeError, ValueError)):
            predict(model, torch.randn(4, 3, 5, 5), 2)
        assert [module.training for module in model.modules()] == modes
        x = images()
        assert unrelated(model(x)[0], model(x)[0])

    def test_restores_grad_mode_and_keeps_no_graph(self, estimator: ModuleType) -> None:
        model, x = Net(estimator), images().requires_grad_()
        y = predict(model, x, 2)
        assert y.grad_fn is None and torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())

    def test_point_models(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
        x = torch.randn(5, 3)
        y = predict(model, x, 3)
        torch.testing.assert_close(y, model.eval()(x).expand(3, 5, 2))

    def test_autocast(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        full = predict(model, x, 2, seed=1)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = predict(model, x, 2, seed=1)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), full, rtol=0.05, atol=0.1)

    @pytest.mark.parametrize("samples", [0, -1, 2.0, True, None, "3"])
    def test_wrong_samples(self, samples: Any) -> None:
        with pytest.raises(ValueError, match="samples must be an int >= 1"):
            predict(BBB.BBBLinear(2, 2), torch.randn(3, 2), samples)

    @pytest.mark.parametrize("batch_size", [0, -2])
    def test_wrong_batch_size(self, batch_size: int) -> None:
        with pytest.raises(ValueError, match="batch_size must be >= 1"):
            predict(BBB.BBBLinear(2, 2), torch.randn(3, 2), batch_size=batch_size)

    @pytest.mark.parametrize("value", [1.5, "1", True])
    def test_wrong_seed(self, value: Any) -> None:
        model = BBB.BBBLinear(2, 2)
        with pytest.raises(TypeError, match="seed must be an int"):
            predict(model, torch.randn(3, 2), seed=value)
        assert model.training


class TestFixedNoise:
    def test_pins_the_function(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        with fixed_noise(1):
            whole = model(x)[0]
            torch.testing.assert_close(model(x)[0], whole)
            torch.testing.assert_close(torch.cat([model(part)[0] for part in x.split(4)]), whole)
            torch.testing.assert_close(model(x[3:4])[0], whole[3:4])
            torch.testing.assert_close(model(x.flip(0))[0], whole.flip(0))
        with fixed_noise(1):
            assert torch.equal(model(x)[0], whole)
        assert unrelated(model(x)[0], whole)

    def test_seed_and_sample_name_the_function(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        outputs = []
        for numbers in [(1, 0), (1, 1), (2, 0), (2, 1), (1, 2**31 - 1), (-1, 0), (2**63 - 1, 0)]:
            with fixed_noise(*numbers):
                outputs.append(model(x)[0])
        for i, a in enumerate(outputs):
            assert all(unrelated(a, b) for b in outputs[:i])

    def test_estimators_agree(self, backend: str) -> None:
        """It is the same posterior, so the same function, whatever the estimator outside."""
        source, target = Net(BBB, padding=1, padding_mode="circular"), None
        source.flatten, source.fc = FlattenLayer(75), BBB.BBBLinear(75, 4)
        target = Net(BBB_LRT, padding=1, padding_mode="circular")
        target.flatten, target.fc = FlattenLayer(75), BBB_LRT.BBBLinear(75, 4)
        target.load_state_dict(source.state_dict())
        x = images()
        with fixed_noise(5):
            expected = source(x)[0]
        with fixed_noise(5):
            assert torch.equal(target(x)[0], expected)

    def test_is_the_documented_draw(self, backend: str, estimator: ModuleType) -> None:
        """Layer i takes seed and stream (sample << 32) + (i << 8), its bias the next stream."""
        layers = [estimator.BBBLinear(3, 2), estimator.BBBLinear(2, 2)]
        x = torch.randn(4, 3)
        with fixed_noise(77, sample=3):
            y = nn.Sequential(*layers)(x)
        expected = x
        for i, layer in enumerate(layers):
            mu, rho = zip(*layer.posterior(), strict=True)
            rng = torch.tensor([77, (3 << 32) + (i << 8)])
            (weight, bias), _ = functional.sample_weights(mu, rho, rng)
            expected = torch.nn.functional.linear(expected, weight, bias)
        assert torch.equal(y, expected)

    def test_layers_get_different_noise(self, backend: str, estimator: ModuleType) -> None:
        layer = estimator.BBBLinear(3, 3)
        other, x = copy.deepcopy(layer), torch.randn(4, 3)
        with fixed_noise(1):
            assert unrelated(layer(x), other(x))
            assert torch.equal(layer(x), layer(x))

    def test_a_new_layer_never_takes_a_used_number(self, estimator: ModuleType) -> None:
        """Also where a layer that ran in the context is gone."""
        start = {"posterior_mu_initial": (0, 0), "posterior_rho_initial": (0, 0)}
        x = torch.randn(4, 3)
        with fixed_noise(1):
            outputs = [estimator.BBBLinear(3, 3, priors=start)(x)]
            keep = estimator.BBBLinear(3, 3, priors=start)
            outputs.append(keep(x))
            outputs += [estimator.BBBLinear(3, 3, priors=start)(x) for _ in range(3)]
        for i, a in enumerate(outputs):
            assert all(unrelated(a, b) for b in outputs[:i])

    def test_generator_is_untouched(self, backend: str, estimator: ModuleType) -> None:
        before = rng_state()
        with fixed_noise(1):
            Net.forward(model := Net(estimator), images())
            state = rng_state()
            model(images(0))
            assert torch.equal(rng_state(), state)
        assert not torch.equal(state, before)  # the parameters and the images came from it

    def test_means_are_unaffected(self, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        expected = model(x, sample=False)[0]
        with fixed_noise(1):
            assert torch.equal(model(x, sample=False)[0], expected)

    def test_nested(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        with fixed_noise(1) as outer:
            first = model(x)[0]
            with fixed_noise(2):
                second = model(x)[0]
                with outer:
                    assert torch.equal(model(x)[0], first)
                assert torch.equal(model(x)[0], second)
            assert torch.equal(model(x)[0], first)
        assert unrelated(first, second)
        assert unrelated(model(x)[0], model(x)[0])

    def test_one_object_many_times(self, estimator: ModuleType) -> None:
        model, x, pin = Net(estimator), images(), fixed_noise(4)
        with pin:
            first = model(x)[0]
        with pin, pin:
            assert torch.equal(model(x)[0], first)
        assert unrelated(model(x)[0], first)

    def test_ends_with_an_exception(self, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        with pytest.raises(KeyError), fixed_noise(1):
            raise KeyError
        assert unrelated(model(x)[0], model(x)[0])

    def test_other_threads_are_unaffected(self, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        with fixed_noise(1) as pin:
            first = model(x)[0]
            there = in_thread(lambda: [model(x)[0], model(x)[0]])
            assert unrelated(*there) and unrelated(there[0], first)

            def own() -> Tensor:
                with fixed_noise(2):
                    return model(x)[0]

            assert unrelated(in_thread(own), first)
            assert torch.equal(model(x)[0], first)
        with fixed_noise(2):
            assert torch.equal(in_thread(own), model(x)[0])
        assert pin is not None

    def test_one_object_in_two_threads(self, estimator: ModuleType) -> None:
        """Leaving it in one thread restores that thread's draw, not the other's."""
        model, x, shared = Net(estimator), images(), fixed_noise(1)
        entered, leave = threading.Event(), threading.Event()

        def other() -> None:
            with fixed_noise(2), shared:
                entered.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        with shared:
            thread.start()
            entered.wait(10)
        free = model(x)[0], model(x)[0]
        leave.set()
        thread.join()
        assert unrelated(*free)
        assert unrelated(model(x)[0], model(x)[0])

    def test_copies_and_conversions_are_the_same_function(self, backend: str, estimator: ModuleType) -> None:
        model, x = Net(estimator), images()
        first = predict(model, x, 2, seed=9)
        assert torch.equal(predict(copy.deepcopy(model), x, 2, seed=9), first)
        loaded = Net(estimator)
        loaded.load_state_dict(model.state_dict())
        assert torch.equal(predict(loaded, x, 2, seed=9), first)
        wide = predict(copy.deepcopy(model).double(), x.double(), 2, seed=9)
        torch.testing.assert_close(wide.float(), first, rtol=1e-4, atol=1e-5)
        back = copy.deepcopy(model).double().float()
        assert torch.equal(predict(back, x, 2, seed=9), first)
        last: Any = copy.deepcopy(model)
        last = last.to(memory_format=torch.channels_last)
        moved = predict(last, x.contiguous(memory_format=torch.channels_last), 2, seed=9)
        torch.testing.assert_close(moved, first)

    def test_gradients(self, backend: str, estimator: ModuleType) -> None:
        """A pinned forward differentiates like any other."""
        layer = estimator.BBBLinear(3, 2)
        x = torch.randn(4, 3)
        with fixed_noise(6):
            layer(x).sum().backward()
        eps = functional.normal((2, 3), torch.tensor([6, 0]))
        torch.testing.assert_close(layer.W_mu.grad, x.sum(0).expand(2, 3))
        slope = torch.sigmoid(layer.W_rho) * eps * x.sum(0)
        torch.testing.assert_close(layer.W_rho.grad, slope, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("numbers", "error", "name"),
        [
            ((1.0,), TypeError, "seed"),
            (("1",), TypeError, "seed"),
            ((True,), TypeError, "seed"),
            ((2**63,), ValueError, "seed"),
            ((-(2**63) - 1,), ValueError, "seed"),
            ((1, 1.0), TypeError, "sample"),
            ((1, None), TypeError, "sample"),
            ((1, -1), ValueError, "sample"),
            ((1, 2**31), ValueError, "sample"),
        ],
    )
    def test_wrong_numbers(self, numbers: tuple[Any, ...], error: type[Exception], name: str) -> None:
        with pytest.raises(error, match=f"fixed_noise: {name} must"):
            fixed_noise(*numbers)


class Experts(nn.Module):
    """Each row runs the expert that its sum chooses, and then the last layer; some leave before that."""

    def __init__(self, estimator: ModuleType) -> None:
        super().__init__()
        priors = {"posterior_mu_initial": (0, 0.5), "posterior_rho_initial": (-1.5, 0.2)}
        self.experts = nn.ModuleList([estimator.BBBLinear(4, 4, priors=priors) for _ in range(4)])
        self.last = estimator.BBBLinear(4, 4, priors=priors)

    def forward(self, x: Tensor) -> Tensor:
        choice = (x.sum(1) * 3).long() % 4
        y = torch.zeros_like(x)
        for k in choice.unique():
            y[choice == k] = self.experts[int(k)](x[choice == k])
        stay = y[:, 0] > 0
        y[stay] = self.last(y[stay])
        return y


class TestPlaces:
    """A layer's draw goes by its place in the model, not by when or where it runs."""

    def test_routing(self, backend: str, estimator: ModuleType) -> None:
        model, x = Experts(estimator), torch.randn(12, 4)
        whole = predict(model, x, 3, seed=0)
        for size in (1, 5):
            torch.testing.assert_close(predict(model, x, 3, seed=0, batch_size=size), whole)
        torch.testing.assert_close(predict(model, x.flip(0), 3, seed=0).flip(1), whole)
        with fixed_noise(0, sample=2):
            torch.testing.assert_close(
                torch.cat([model(row) for row in x.flip(0).split(1)]).flip(0), whole[2]
            )
        for row in range(12):
            with fixed_noise(0, sample=2):
                torch.testing.assert_close(model(x[row : row + 1]), whole[2, row : row + 1])

    def test_the_model_is_what_is_called_within_the_context(self, estimator: ModuleType) -> None:
        class Averaged(nn.Module):
            def __init__(self, first: nn.Module, net: nn.Module) -> None:
                super().__init__()
                self.first, self.net = first, net

            def forward(self, x: Tensor) -> Tensor:
                with fixed_noise(5):
                    return self.net(x)

        first, net = estimator.BBBLinear(4, 4), Experts(estimator)
        x = torch.randn(6, 4)
        with fixed_noise(5):
            expected = net(x)
        assert torch.equal(Averaged(first, net)(x), expected)
        with fixed_noise(5, model=nn.Sequential(first, net)):
            there = net(x)
            assert unrelated(there, expected)
        with fixed_noise(5):
            torch.testing.assert_close(nn.Sequential(nn.Identity(), net)(x), expected)

    def test_layers_outside_the_model_are_counted_on(self, estimator: ModuleType) -> None:
        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.own = estimator.BBBLinear(4, 4)
                self.kept = [estimator.BBBLinear(4, 4) for _ in range(2)]

            def forward(self, x: Tensor) -> Tensor:
                return self.own(self.kept[1](self.kept[0](x)))

        hidden, other, x = Hidden(), Experts(estimator), torch.randn(6, 4)
        with fixed_noise(1) as pin:
            other(hidden(x))
            places = [pin.number(layer) for layer in (hidden.own, *hidden.kept, *other.experts, other.last)]
        assert places == list(range(8))

    def test_a_layer_used_twice_has_one_draw(self, backend: str, estimator: ModuleType) -> None:
        layer, x = estimator.BBBLinear(4, 4), torch.randn(6, 4)
        model: Any = nn.Sequential(layer, nn.Tanh(), layer, estimator.BBBLinear(4, 2))
        with fixed_noise(1) as pin:
            y = model(x)
            assert [pin.number(m) for m in (layer, model[3])] == [0, 1]
            assert torch.equal(y, model[3](layer(layer(x).tanh())))

    def test_copies(self, estimator: ModuleType) -> None:
        model, x = Experts(estimator), torch.randn(6, 4)
        expected = predict(model, x, 2, seed=0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(predict(other, x, 2, seed=0), expected)

    @pytest.mark.parametrize("means", [False, True])
    def test_replicas_in_threads(self, backend: str, estimator: ModuleType, means: bool) -> None:
        """As torch.nn.DataParallel makes them: in the caller's thread, and runs them in others."""
        model, x = Experts(estimator), torch.randn(12, 4)
        context = posterior_means() if means else fixed_noise(7, sample=1)

        class Parallel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = model

            def forward(self, x: Tensor) -> Tensor:
                outputs = [in_thread(partial(m, p)) for m, p in zip(self.copies(), x.split(6), strict=True)]
                return torch.cat(outputs)

            def copies(self) -> list[nn.Module]:
                made = []
                for _ in range(2):
                    replicas: dict[Any, Any] = {
                        m: m._replicate_for_data_parallel() for m in self.module.modules()
                    }
                    for module, replica in replicas.items():
                        for name, child in module._modules.items():
                            setattr(replica, name, replicas[child])
                        for name, parameter in module._parameters.items():
                            setattr(replica, name, None if parameter is None else parameter.clone())
                    made.append(replicas[self.module])
                return made

        with context:
            expected, actual = model(x), Parallel()(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(predict(Parallel(), x, 2, seed=3), predict(model, x, 2, seed=3))
        assert unrelated(Parallel()(x), expected)
        layer = model.last
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():
            setattr(replica, name, parameter)
        free = [in_thread(lambda: replica(x)) for _ in range(2)]
        assert unrelated(*free)

    def test_threads_that_enter_one_context(self, estimator: ModuleType) -> None:
        model, x, pin = Experts(estimator), torch.randn(12, 4), fixed_noise(3)
        with fixed_noise(3):
            expected = model(x)

        def run() -> Tensor:
            with pin:
                return torch.cat([model(row) for row in x.split(1)])

        outputs: list[Tensor] = []
        threads = [threading.Thread(target=lambda: outputs.append(run())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outputs) == 4
        for y in outputs:
            torch.testing.assert_close(y, expected)

    @pytest.mark.parametrize("value", ["model", Experts, 3])
    def test_wrong_model(self, value: Any) -> None:
        with pytest.raises(TypeError, match="fixed_noise: model must be a torch.nn.Module"):
            fixed_noise(1, model=value)


class ModelOutput(OrderedDict):
    """As Hugging Face has it."""


Pair = namedtuple("Pair", ["logits", "state"])


@dataclasses.dataclass
class Record:
    logits: Tensor
    state: None = None


class TestWhatGoesInAndOut:
    def test_numpy(self, backend: str, estimator: ModuleType) -> None:
        model, x = estimator.BBBLinear(4, 3), torch.randn(6, 4)
        expected = predict(model, x, np.int64(2), seed=np.int64(1))
        for array in (x.cpu().numpy(), x.double().cpu().numpy()):
            assert torch.equal(predict(model, array, 2, seed=1, batch_size=np.int32(4)), expected)
            call = lambda m, v: m(v["x"])  # noqa: E731
            assert torch.equal(predict(model, {"x": array}, 2, seed=1, call=call), expected)
        with pytest.raises(TypeError, match="x must hold numbers, got a NumPy array of <U1"):
            predict(model, np.array(["a", "b"]))
        embedding = nn.Sequential(nn.Embedding(5, 4), model)
        assert predict(embedding, np.array([0, 3, 1]), 2).shape == (2, 3, 3)

    @pytest.mark.parametrize("size", [None, 1, 4, 6])
    def test_several_tensors(self, size: int | None) -> None:
        layer = BBB.BBBLinear(4, 3)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, given: Any) -> Tensor:
                a, b = given.values() if isinstance(given, dict) else given
                return self.layer(a) + b

        a, b = torch.randn(6, 4), torch.randn(6, 3)
        expected = predict(layer, a, 2, seed=0) + b
        for given in ((a, b), [a, b], {"a": a, "b": b}, Pair(a, b), ModelOutput(a=a, b=b)):
            y = predict(Model(), given, 2, seed=0, batch_size=size)
            torch.testing.assert_close(y, expected)
        y = predict(layer, {"input": a}, 2, seed=0, batch_size=size, call=lambda m, given: m(**given))
        torch.testing.assert_close(y + b, expected)

    def test_wrong_parts(self) -> None:
        layer, a = BBB.BBBLinear(4, 3), torch.randn(6, 4)
        with pytest.raises(ValueError, match=r"must have the same number of rows, got \[5, 6\]"):
            predict(layer, (a, a[:5]), batch_size=2)
        with pytest.raises(ValueError, match="number of rows, got no tensor"):
            predict(layer, (1, None), batch_size=2)
        with pytest.raises(TypeError, match="x must hold tensors and numbers, got str"):
            predict(layer, (a, ["a"] * 6), batch_size=2)

    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda y: {"logits": y, "state": None}, "dict of logits, state"),
            (lambda y: ModelOutput(logits=y), "ModelOutput of logits"),
            (lambda y: Record(y), "Record of logits, state"),
            (lambda y: None, "NoneType"),
            (lambda y: [y], "list"),
            (lambda y: ({"logits": y},), "dict of logits"),
            (lambda y: (), "tuple"),
        ],
    )
    def test_other_outputs(self, make: Callable[[Tensor], Any], what: str) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = BBB.BBBLinear(4, 3)

            def forward(self, x: Tensor) -> Any:
                return make(self.layer(x))

        model, x = Model(), torch.randn(6, 4)
        with pytest.raises(TypeError, match=f"got {what}; say what to take of it with call=lambda"):
            predict(model, x)
        expected = predict(model.layer, x, 2, seed=0)
        assert torch.equal(
            predict(model, x, 2, seed=0, call=lambda m, x: m.get_submodule("layer")(x)), expected
        )

    def test_named_tuples_are_tuples(self) -> None:
        layer, x = BBB.BBBLinear(4, 3), torch.randn(6, 4)
        y = predict(layer, x, 2, seed=0, call=lambda m, x: Pair(m(x), None))
        assert torch.equal(y, predict(layer, x, 2, seed=0))

    def test_outputs_in_parts(self) -> None:
        layer, x = BBB.BBBLinear(4, 3), torch.randn(7, 4)
        whole = predict(layer, x, 2, seed=0)
        flat = predict(layer, x, 2, seed=0, batch_size=3, call=lambda m, x: m(x).flatten())
        torch.testing.assert_close(flat, whole.flatten(1))
        total = predict(layer, x, 2, seed=0, call=lambda m, x: m(x).sum())
        torch.testing.assert_close(total, whole.sum((1, 2)))
        first = "the first dimension of the output must be that of the rows"
        for call in (lambda m, x: m(x).sum(), lambda m, x: m(x)[:2]):
            with pytest.raises(ValueError, match=first):
                predict(layer, x, 2, batch_size=3, call=call)
        with pytest.raises(ValueError, match="must keep its shape and type"):
            predict(layer, x, 2, batch_size=3, call=lambda m, x: m(x)[:, : len(x)])
        calls: Any = []
        with pytest.raises(ValueError, match=r"got \[7, 2\] torch.float32 after \[7, 1\]"):
            predict(layer, x, 3, call=lambda m, x: calls.append(1) or m(x)[:, : len(calls)])
        types = iter((torch.float32, torch.float64))
        with pytest.raises(ValueError, match="float64 after .* torch.float32"):
            predict(layer, x, 2, call=lambda m, x: m(x).to(next(types)))
        with pytest.raises(TypeError, match="output must be a dense tensor"):
            predict(layer, x, call=lambda m, x: m(x).to_sparse())
        assert predict(layer, x[:0], 2, batch_size=3).shape == (2, 0, 3)

    @pytest.mark.cpu_only("the profiler's account of the CPU's allocator")
    @pytest.mark.parametrize("size", [None, 16])
    def test_memory(self, size: int | None) -> None:
        """All draws are one tensor, which is there once."""
        layer, x = BBB.BBBLinear(8, 256), torch.randn(64, 8)
        predict(layer, x, 1, batch_size=size)
        with torch.profiler.profile(profile_memory=True) as profiler:
            y = predict(layer, x, 50, seed=0, batch_size=size)
        alive = highest = 0
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            alive += event.nbytes()
            highest = max(highest, alive)
        assert y.nbytes <= highest <= 1.1 * y.nbytes

    @pytest.mark.parametrize("model", [None, "x", torch.sin])
    def test_wrong_model(self, model: Any) -> None:
        with pytest.raises(TypeError, match="predict: model must be a torch.nn.Module"):
            predict(model, torch.randn(2, 2))


class TestCompiled:
    """A compiled model keeps to the pinned draw, and one graph serves all draws."""

    def test_fixed_noise_after_compiling(self, estimator: ModuleType) -> None:
        """In a thread where nothing was pinned before, so that the first graph cannot know of it."""
        torch._dynamo.reset()
        layer, x = estimator.BBBLinear(3, 2), torch.randn(4, 3)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")

        def run() -> None:
            assert unrelated(compiled(x), compiled(x))
            with fixed_noise(1):
                assert torch.equal(compiled(x), layer(x))
            with fixed_noise(2, sample=1):
                assert torch.equal(compiled(x), layer(x))
            assert unrelated(compiled(x), compiled(x))

        in_thread(run)

    def test_predict_does_not_recompile_for_each_draw(self) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = nn.Sequential(BBB_LRT.BBBLinear(3, 4), nn.ReLU(), BBB_LRT.BBBLinear(4, 2))
        x = torch.randn(6, 3)
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        y = predict(compiled, x, 20, seed=1, batch_size=2)
        torch.testing.assert_close(y, predict(model, x, 20, seed=1))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_public_names() -> None:
    assert bbb_fast.predict is predict and bbb_fast.fixed_noise is fixed_noise
