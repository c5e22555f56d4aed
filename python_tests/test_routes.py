"""Which way products take: every way gives the same numbers, and the same machine and shape the same way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NATIVE
from torch import nn

from bbb_fast import _backend, functional, routes, tuning
from bbb_fast.layers import BBB, BBB_LRT, Flipout
from bbb_fast.models import BBBLeNet
from bbb_fast.routes import Routes

needs_native = pytest.mark.skipif(not NATIVE, reason="the reference path has one way")

# in, out, kernel, stride, padding, size, batch: over few pixels and many, even and odd.
SHAPES = [
    (3, 5, (3, 3), 1, 1, (6, 7), 4),
    (33, 34, (3, 3), 1, 1, (2, 2), 17),
    (6, 5, (3, 2), 2, 1, (3, 4), 16),
    (4, 4, (2, 3), (1, 2), (0, 2), (2, 3), 1),
    (2, 3, (1, 1), 1, 0, (2, 2), 3),
    (2, 3, (2, 2), 2, (1, 1), (1, 1), 3),
    (5, 4, (4, 4), 3, 2, (4, 3), 2),
    (32, 40, (3, 3), 1, 1, (8, 7), 2),
    # Every output pixel sees every input pixel, by another tap: height and width apart, and by strides.
    (9, 7, (4, 3), 1, (2, 1), (2, 1), 5),
    (5, 6, (3, 4), (1, 2), (1, 2), (2, 2), 3),
    (4, 3, (2, 5), 1, (0, 2), (2, 2), 2),
    # One pixel wide, with a stride of 2: the library errs over channels_last images.
    (3, 3, (3, 1), (1, 2), 0, (8, 1), 2),
    (1, 16, (3, 3), (1, 2), 0, (8, 3), 2),
]
BY_PIXELS = {SHAPES[1], SHAPES[5], *SHAPES[8:11]}


@pytest.fixture(autouse=True)
def routes_put_back() -> Iterator[None]:
    before = routes.current()
    yield
    routes.use(before)


def layer_of(shape: tuple, estimator: str, **options: object) -> nn.Module:
    i, o, kernel, stride, padding, _, _ = shape
    layers = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}[estimator]
    return layers.BBBConv2d(i, o, kernel, stride, padding, **options)


def key_of(shape: tuple, layer: Any) -> routes.Key:
    i, _, _, _, _, size, batch = shape
    return routes.conv_key(
        (batch, i, *size), layer.W_mu.shape, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


@needs_native
@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_gives_the_same_numbers(shape: tuple, estimator: str) -> None:
    layer: Any = layer_of(shape, estimator)
    i, _, _, _, _, size, batch = shape
    x = torch.randn(batch, i, *size)
    grad = torch.randn(layer(x).shape)
    key = key_of(shape, layer)
    problem = ((batch, i, *size), tuple(layer.W_mu.shape), layer.stride, layer.padding, (1, 1), 1)
    ways, _ = _backend._C.conv_ways(*problem)
    assert "library" in ways and ("channels_last" in ways) == (1 not in (*size, *grad.shape[2:]))
    assert ("by_pixels" in ways) == (shape in BY_PIXELS)
    results = {}
    for way in ways:
        routes.use(Routes("other", {key: way}))
        assert _backend._C.conv_ways(*problem)[1] == way
        results[way] = step(layer, x, grad)
    for way in ways[1:]:
        for a, b in zip(results[way], results["library"], strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.detach().abs().max() + 1e-3))


# Rows, in, out; and the input as it lies: rows apart, rows behind each other, one row for all.
VIEWS = {
    "plain": lambda *shape: torch.randn(shape),
    "slice": lambda n, i: torch.randn(n, 2 * i)[:, i:],
    "every other": lambda n, i: torch.randn(n, 2 * i)[:, ::2],
    "transposed": lambda n, i: torch.randn(i, n).t(),
    "expanded": lambda n, i: torch.randn(i).expand(n, i),
    "more dimensions": lambda n, i: torch.randn(2, n, 1, i),
    "one row": lambda n, i: torch.randn(i),
}


@needs_native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("estimator", ["bbb", "lrt", "flipout"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("rows", "i", "o"), [(5, 3, 4), (1, 1, 1), (33, 17, 40), (7, 64, 1), (0, 3, 2)])
def test_onednn_gives_the_same_numbers(
    rows: int, i: int, o: int, view: str, estimator: str, bias: bool
) -> None:
    layer = {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}[estimator].BBBLinear(i, o, bias=bias)
    x = VIEWS[view](rows, i)
    grad = torch.randn(*x.shape[:-1], o)
    if "onednn" not in _backend._C.linear_ways((3, 4), (5, 4))[0]:
        pytest.skip("this build of torch has no oneDNN")
    ways, _ = _backend._C.linear_ways(x.shape, layer.W_mu.shape)
    assert ("onednn" in ways) == (x.numel() > 0)
    results = {}
    for way in ways:
        routes.use(Routes("other", {routes.linear_key(x.shape, layer.W_mu.shape): way}))
        assert _backend._C.linear_ways(x.shape, layer.W_mu.shape)[1] == way
        torch.manual_seed(5)
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        results[way] = [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)]
    for a, b in zip(results[ways[-1]], results["library"], strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@needs_native
@pytest.mark.parametrize("op", ["bbb_linear", "lrt_linear"])
def test_onednn_takes_parameters_as_they_lie(op: str) -> None:
    """Strided and expanded weights and biases."""
    if "onednn" not in _backend._C.linear_ways((3, 4), (5, 4))[0]:
        pytest.skip("this build of torch has no oneDNN")
    x = torch.randn(6, 7)
    weights = [torch.randn(9, 14)[:, ::2], torch.randn(7, 9).t(), torch.randn(9, 1).expand(9, 7)]
    biases = [torch.randn(18)[::2], torch.randn(1).expand(9), torch.randn(9, 4)[:, 2]]
    for W, b in product(weights, biases):
        results = []
        for way in ("library", "onednn"):
            routes.use(Routes("other", {routes.linear_key(x.shape, W.shape): way}))
            results.append(getattr(functional, op)(x, W, W - 2, b, b - 2, torch.tensor([3, 4])))
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@needs_native
def test_a_narrow_variance_goes_by_pixels_too() -> None:
    """The variance's product in bfloat16 takes the way as well; in float32, on a CPU without instructions."""
    shape = (33, 34, (3, 3), 1, 1, (2, 2), 17)
    layer = layer_of(shape, "lrt", variance_dtype=torch.bfloat16)
    x, grad = torch.randn(17, 33, 2, 2), torch.randn(17, 34, 2, 2)
    results = {}
    for way in ("library", "by_pixels"):
        routes.use(Routes("other", {key_of(shape, layer): way}))
        results[way] = step(layer, x, grad)
    for a, b in zip(results["by_pixels"], results["library"], strict=True):
        # The sums over pixels are rounded to bfloat16 one by one.
        torch.testing.assert_close(a, b, rtol=3e-2, atol=2e-2 * float(b.detach().abs().max()))


@needs_native
def test_dilated_images_are_not_rearranged() -> None:
    """The library may crash: Conv2d(8, 16, (3, 1), (1, 2), (1, 1), (1, 2)) over [2, 8, 6, 1] does."""
    ways, _ = _backend._C.conv_ways((2, 8, 6, 1), (16, 8, 3, 1), (1, 2), (1, 1), (1, 2), 1)
    assert "channels_last" not in ways
    ways, _ = _backend._C.conv_ways((2, 8, 6, 6), (16, 8, 3, 3), (1, 1), (1, 1), (1, 2), 1)
    assert "channels_last" not in ways


@needs_native
def test_rearranged_images_and_a_transposed_weight() -> None:
    """Of one image and on one thread torch multiplies without oneDNN, which takes no such weight so."""
    layer = BBB_LRT.BBBConv2d(32, 1, (1, 3), bias=False)
    layer.W_mu.data = layer.W_mu.detach().squeeze().t().contiguous().t()[None, :, None]
    x, threads = torch.randn(1, 32, 12, 12), torch.get_num_threads()
    grad = torch.randn(1, 1, 12, 10)
    torch.set_num_threads(1)
    try:
        results = []
        for way in ("library", "channels_last"):
            routes.use(
                Routes("other", {routes.conv_key(x.shape, (1, 32, 1, 3), (1, 1), (0, 0), (1, 1), 1): way})
            )
            results.append(step(layer, x, grad))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@needs_native
def test_a_way_that_a_problem_does_not_allow_is_not_taken() -> None:
    """Measured for contiguous images; a grouped or narrow one under the same key falls back to the rule."""
    layer = BBB.BBBConv2d(4, 4, 3, padding=1, groups=2)
    x = torch.randn(2, 4, 5, 5)
    expected = layer(x, sample=False)
    key = routes.conv_key((2, 4, 5, 5), layer.W_mu.shape, (1, 1), (1, 1), (1, 1), 2)
    for way in routes.WAYS:
        routes.use(Routes("other", {key: way}))
        torch.manual_seed(1)
        first = layer(x)
        routes.use(Routes("other"))
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
    assert expected.shape == first.shape


@needs_native
@pytest.mark.parametrize("rules", ["intel-avx512", "amd-zen5", "other"])
def test_the_rules(rules: str) -> None:
    """channels_last and oneDNN are for the CPUs they were measured faster on; the other two for all."""
    routes.use(Routes(rules))

    def way(i: int, o: int, k: int, size: int, batch: int) -> str:
        pad = k // 2
        problem = ((batch, i, size, size), (o, i, k, k), (1, 1), (pad, pad), (1, 1), 1)
        return _backend._C.conv_ways(*problem)[1]

    assert way(1, 6, 5, 32, 128) == "direct"
    assert way(192, 384, 3, 2, 128) == "by_pixels"
    assert way(192, 384, 3, 2, 8) == "library"
    assert way(64, 64, 3, 32, 128) == ("channels_last" if rules == "intel-avx512" else "library")
    for input, weight, large in (
        ((2, 64, 1000), (400, 1000), True),
        ((64, 100), (10, 100), False),
        ((2, 2000), (2000, 2000), False),
    ):
        ways, taken = _backend._C.linear_ways(input, weight)
        assert taken == ("onednn" if large and rules == "amd-zen5" and "onednn" in ways else "library")


def test_keys() -> None:
    """A batch counts by its power of two, so that a tuned size is found for its neighbours."""
    key = lambda n: routes.conv_key((n, 3, 8, 8), (4, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1)  # noqa: E731
    assert key(65) == key(128) != key(64)
    assert key(1)[1] == 0
    assert key(0)[1] == 0
    assert routes.linear_key((4, 17, 3), (5, 3)) == (0, 7, 3, 5)
    assert routes.linear_key((3,), (5, 3)) == routes.linear_key((0, 3), (5, 3)) == (0, 0, 3, 5)


@pytest.mark.parametrize(
    "bad", [None, [], {"rules": "other"}, {"rules": "other", "ways": [[[1], "x"]], "narrow": []}]
)
def test_a_wrong_table_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="not a table of routes|unknown ways"):
        Routes.from_dict(bad)


@needs_native
def test_unknown_rules_are_refused_and_change_nothing() -> None:
    before = routes.current()
    with pytest.raises(ValueError, match="unknown rules 'zen'; allowed: intel-avx512, amd-zen5, other"):
        routes.use(Routes("zen"))
    assert routes.current() is before


def test_a_table_survives_json() -> None:
    table = Routes("other", {(2, 7, 3): "direct"}, {(4, 3): True})
    assert Routes.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@needs_native
class TestAuto:
    @pytest.fixture(autouse=True)
    def with_instructions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes, "_multiplies_bfloat16", True)

    @pytest.mark.parametrize(("features", "narrow"), [(16, False), (512, True)])
    def test_large_weights_are_multiplied_in_bfloat16(self, features: int, narrow: bool) -> None:
        x = torch.randn(4, features)
        dtype = torch.bfloat16 if narrow else None
        auto = BBB_LRT.BBBLinear(features, features, variance_dtype="auto")
        fixed = BBB_LRT.BBBLinear(features, features, variance_dtype=dtype)
        fixed.load_state_dict(auto.state_dict())
        outputs = []
        for layer in (auto, fixed):
            torch.manual_seed(3)
            outputs.append(layer(x))
        assert torch.equal(*outputs)

    def test_measurements_go_before_the_rule(self) -> None:
        weight, x = torch.empty(512, 512), torch.empty(1, 512)
        assert routes.variance_dtype("auto", weight, x) is torch.bfloat16
        routes.use(Routes("other", {}, {(512, 512): False}))
        assert routes.variance_dtype("auto", weight, x) is None

    def test_only_float32_on_the_cpu(self) -> None:
        weight = torch.empty(512, 512)
        for x in (
            torch.empty(1, 512).double(),
            torch.empty(1, 512).half(),
            torch.empty(1, 512, device="meta"),
        ):
            assert routes.variance_dtype("auto", weight, x) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert routes.variance_dtype("auto", weight, torch.empty(1, 512)) is None

    def test_what_is_asked_for_is_taken(self) -> None:
        weight, x = torch.empty(2, 2), torch.empty(1, 2)
        assert routes.variance_dtype(torch.bfloat16, weight, x) is torch.bfloat16
        assert routes.variance_dtype(None, weight, x) is None

    def test_compiles(self) -> None:
        layer = BBB_LRT.BBBLinear(512, 512, variance_dtype="auto")
        x = torch.randn(3, 512)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), expected)


class TestTune:
    @needs_native
    def test_measures_each_choice_once_and_puts_the_routes_back(self) -> None:
        before = routes.current()
        model = BBBLeNet(10, 1, layer_type="lrt")
        places = tuning.places(model, torch.randn(3, 1, 32, 32))
        assert [place.name for place in places] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
        assert [place.input_gradient for place in places] == [False, True, True, True, True]
        table, measured = tuning.tune([*places, *places], seconds=0.0)
        assert routes.current() is before
        # Of the three linear layers where torch has oneDNN.
        linear = 3 if "onednn" in _backend._C.linear_ways((3, 4), (5, 4))[0] else 0
        assert len(table.ways) == 2 + linear
        narrow = 5 if _backend._C.multiplies_bfloat16() else 0
        assert len(table.narrow) == narrow
        assert len(measured) == 2 + linear + narrow
        for m in measured:
            assert m.choice in m.seconds
            # No choice but the rule's without a clear gain.
            assert m.choice == m.rule or m.seconds[m.choice] < 0.97 * m.seconds[m.rule]
        assert all(
            layer.variance_dtype is None for layer in model.modules() if hasattr(layer, "variance_dtype")
        )

    @needs_native
    def test_the_choice_is_what_the_layer_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = BBB.BBBConv2d(3, 4, 3, padding="same", padding_mode="reflect")
        (place,) = tuning.places(layer, torch.randn(5, 3, 8, 8))
        monkeypatch.setattr(
            tuning,
            "measure",
            lambda place, names, take, seconds: {n: float(n != "channels_last") + 1 for n in names},
        )
        table, _ = tuning.tune([place])
        # Padded by the layer itself: the convolution sees 10 x 10 and no padding.
        problem = ((5, 3, 10, 10), (4, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1)
        routes.use(table)
        assert _backend._C.conv_ways(*problem)[1] == "channels_last"

    def test_says_so_on_the_reference_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_backend, "_C", None)
        with pytest.raises(RuntimeError, match="nothing to choose on the reference path"):
            tuning.tune([])


class TestCache:
    def run(self, folder: Path, code: str, **environment: str) -> str:
        import os

        env = {**os.environ, "BBB_FAST_CACHE": str(folder), **environment}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env, check=True
        )
        return done.stdout.strip()

    def test_what_was_kept_is_taken_at_import(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BBB_FAST_CACHE", str(tmp_path))
        table = Routes(routes.rules_of_this_cpu(), {(2, 0, 1, 1, 1): "library"}, {(4, 3): True})
        assert tuning.save(table, []) == routes.cache_file()
        code = "from bbb_fast import routes; print(routes.current().narrow, routes.problem)"
        assert self.run(tmp_path, code) == "{(4, 3): True} None"
        assert self.run(tmp_path, code, BBB_FAST_ROUTES="rules") == "{} None"
        routes.cache_file().write_text("{")
        assert "holds no routes" in self.run(tmp_path, code)
