"""convert over torch's own databases of modules: every module of torch.nn, with the arguments and the inputs
that torch itself is tested with.

The databases are in the wheel (torch.testing._internal): ``common_modules.module_db``, and the older lists of
``common_nn``, which have what it lacks: padding modes, strides, dilations and groups, EmbeddingBag.
"""

from __future__ import annotations

import copy
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bbb_fast import convert, fixed_noise, posterior_means, to_deterministic
from bbb_fast.conversion import rules
from bbb_fast.layers import WeightSpace
from bbb_fast.layers.base import BayesianLayer, BayesianModule

pytestmark = pytest.mark.cpu_only("about arguments and gradients of torch.nn's modules, not about kernels")

DTYPES = (torch.float32, torch.float64)
MODES = (True, False)
ESTIMATORS = ("bbb", "lrt", "flipout")


def _databases() -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """module_db by the names of its modules, and the cases of common_nn by theirs."""
    pytest.importorskip("expecttest", reason="torch's module database needs expecttest (the test extra)")
    # The import would forbid everyone in the process to set flags of torch.backends, and set a variable.
    with mock.patch.object(torch.backends, "disable_global_flags"), mock.patch.dict(os.environ):
        from torch.testing._internal import common_modules, common_nn
    infos = {info.name.removeprefix("nn."): info for info in common_modules.module_db}
    newer = getattr(common_nn, "get_new_module_tests", lambda: vars(common_nn)["new_module_tests"])
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in [*common_nn.module_tests, *newer(), *MORE]:
        name = case.get("module_name") or type(case["constructor"]()).__name__
        cases.setdefault(name, []).append(case)
    return infos, cases


# What has parameters, or arguments that the layers know, and is in neither database.
MORE: list[dict[str, Any]] = [
    {
        "module_name": "AdaptiveLogSoftmaxWithLoss",
        "constructor_args": (8, 20, [5, 10]),
        "input_fn": lambda: (torch.randn(4, 8), torch.tensor([1, 7, 15, 19])),
    },
    {
        "constructor": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, 0.0), 2),
        "input_fn": lambda: (torch.randn(2, 3, 4), torch.randn(5, 3, 4)),
    },
    {
        "module_name": "ConvTranspose2d",
        "constructor_args": (2, 3, 3, 2),
        "input_fn": lambda: (torch.randn(2, 2, 3, 4), [8, 9]),
        "desc": "output_size",
    },
    {
        "constructor": lambda: nn.Embedding(5, 3, padding_idx=-2, scale_grad_by_freq=True),
        "input_fn": lambda: torch.tensor([[0, 3, 3], [4, 3, 4]]),
    },
    {
        "constructor": lambda: nn.EmbeddingBag(5, 3, mode="sum", include_last_offset=True, padding_idx=2),
        "input_fn": lambda: (torch.tensor([0, 2, 2, 4]), torch.tensor([0, 1, 1, 4]), torch.randn(4)),
    },
    {
        "constructor": lambda: nn.EmbeddingBag(5, 3, scale_grad_by_freq=True),
        "input_fn": lambda: torch.tensor([[0, 1], [1, 1]]),
    },
    {
        "constructor": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        "input_fn": lambda: (torch.randn(3, 2, 4), torch.randn(6, 2, 3), torch.randn(6, 2, 5)),
    },
]
INFOS, CASES = _databases()
TWINS = {kind.__name__: kind for kind in (*rules.PRODUCTS, *rules.TABLES, *rules.WHOLE)}
LAZY = [name for name, info in INFOS.items() if info.is_lazy]
COMPLEX = [name for name, info in INFOS.items() if any(d.is_complex for d in info.supported_dtypes("cpu"))]
# What test_convert does not go through.
SKIPPED = {
    **dict.fromkeys(LAZY, "has no parameters before its first forward: test_lazy_modules"),
    "FunctionalModule": "common_nn's wrapper around a function of torch.nn.functional, which no model has",
}
# Samples that go through the module alone, by the module's name and the sample's desc.
ALONE = {("ReplicationPad3d", "complex"): "its outputs are complex, and the Linear beside it is real"}


# ---------------------------------------------------------------- samples


@dataclass
class Sample:
    """A module of a database and an input of it; tensors of ``args`` say whether they want a gradient."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    desc: str = ""

    def module(self, dtype: torch.dtype, training: bool) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nested tensors that a Transformer goes without
            return self.make().to(dtype).train(training)


def each(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``function`` of each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return PackedSequence(function(value.data), *value[1:])
    if isinstance(value, dict):
        return {key: each(part, function) for key, part in value.items()}
    return type(value)(each(part, function) for part in value) if type(value) in (tuple, list) else value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []


def samples(name: str, dtype: torch.dtype, training: bool) -> Iterator[Sample]:
    """Of both databases."""
    if name in INFOS:
        info = INFOS[name]
        options = {"dtype": dtype, "requires_grad": True, "training": training, "with_packed_sequence": True}
        for given in info.module_inputs_func(info, device="cpu", **options):
            made, called = given.constructor_input, given.forward_input
            make = partial(info.module_cls, *made.args, **made.kwargs)
            yield Sample(make, called.args, called.kwargs, given.desc)
    if dtype.is_complex:
        return

    def wanted(t: Tensor) -> Tensor:
        return t.to(dtype).requires_grad_() if t.is_floating_point() else t

    for case in CASES.get(name, ()):
        make = partial(case.get("constructor") or getattr(nn, name), *case.get("constructor_args", ()))
        given = case["input_fn"]() if "input_fn" in case else torch.randn(case["input_size"])
        args = given if isinstance(given, tuple) else (given,)
        yield Sample(make, each(args, wanted), {}, case.get("desc") or "")


# ---------------------------------------------------------------- running and comparing


def means(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, or the means in their place, by their names in the model of torch.nn."""
    found: dict[str, nn.Parameter] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if module in inside:
            continue
        if isinstance(module, WeightSpace):
            inside.update(module.modules())
            own = dict(module.module.named_parameters())
        elif isinstance(module, BayesianLayer):
            own = dict(zip(("weight", "bias"), (mu for mu, _ in module.posterior()), strict=False))
        else:
            own = dict(module.named_parameters(recurse=False))
        found.update({prefix + key: p for key, p in own.items()})
    return found


class Run(NamedTuple):
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    generator: Tensor  # the state that it leaves


def run(module: nn.Module, sample: Sample, /, **options: Any) -> Run:
    """The outputs, and the gradients of inputs and parameters for random ones of the outputs."""
    leaves: list[Tensor] = []

    def fresh(t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        leaves.append(t.detach().requires_grad_())
        return leaves[-1].clone()  # some modules work in place

    # Of dropout and random pools, which draw alike if the layers draw nothing.
    torch.default_generator.manual_seed(7)
    outputs = tensors(module(*each(sample.args, fresh), **each(sample.kwargs, fresh), **options))
    sources = {f"input {k}": t for k, t in enumerate(leaves)} | means(module)
    ends = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(11)
    weights = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in ends]
    found = torch.autograd.grad(ends, list(sources.values()), weights, allow_unused=True) if ends else ()
    gradients: dict[str, Tensor | None] = dict(zip(sources, found, strict=False))
    return Run([t.detach() for t in outputs], gradients, torch.get_rng_state())


def assert_close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    assert a.layout == b.layout, what
    a, b = (t.to_dense() if t.is_sparse else t for t in (a, b))
    finite = b[b.isfinite()].abs()
    atol = tolerance * max(1.0, float(finite.max()) if finite.numel() else 0.0)
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def compare(found: Run, expected: Run, tolerance: float, drawn: bool = False) -> None:
    """Outputs and gradients, and at the means that no number was drawn.

    ``drawn``: of a draw, whose unused weights have a gradient of zeros, where torch.nn's have none.
    """
    assert len(found.outputs) == len(expected.outputs)
    for k, pair in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        assert_close(*pair, tolerance, f"output {k}")
    assert found.gradients.keys() == expected.gradients.keys()
    for name, b in expected.gradients.items():
        a = found.gradients[name]
        if drawn and (a is None) != (b is None):
            assert not any(t is not None and t.any() for t in (a, b)), name
        elif a is None or b is None:
            assert a is b, f"the gradient of {name} is there in one of the two only"
        else:
            assert_close(a, b, tolerance, f"gradient of {name}")
    assert drawn or torch.equal(found.generator, expected.generator)


def tolerance(dtype: torch.dtype, drawn: bool = False) -> float:
    """Relative to the greatest element; a draw's products are other kernels than torch.nn's."""
    if dtype == torch.float32:
        return 2e-5 if drawn else 2e-6
    return 1e-12 if drawn else 1e-14


def bayesian(model: nn.Module) -> list[BayesianModule]:
    return [m for m in model.modules() if isinstance(m, BayesianModule)]


def without_noise(model: nn.Module) -> None:
    """sigma = softplus(-200): 0 in float32, 1e-87 in float64."""
    with torch.no_grad():
        for module in bayesian(model):
            for _, rho in module.posterior():
                rho.fill_(-200.0)


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    return any(t.numel() and not torch.equal(t, u) for t, u in zip(a, b, strict=True))


# ---------------------------------------------------------------- the modules that there are layers for

TWIN_CASES = [
    (name, estimator)
    for name, kind in TWINS.items()
    for estimator in (ESTIMATORS if kind in rules.PRODUCTS else ("lrt",))
]


def check_twin(name: str, estimator: str, dtype: torch.dtype, training: bool, sample: Sample) -> None:
    module = sample.module(dtype, training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = convert(module, estimator)
    assert type(layer).__name__ == f"BBB{name}" and layer.training == training
    expected = run(module, sample)
    with posterior_means():
        compare(run(layer, sample), expected, tolerance(dtype))
    compare(run(layer, sample, sample=False), expected, tolerance(dtype))
    drawn = run(layer, sample)
    assert differ(drawn.outputs, expected.outputs) or not any(t.numel() for t in expected.outputs)
    without_noise(layer)
    compare(run(layer, sample), expected, tolerance(dtype, drawn=True), drawn=True)
    with fixed_noise(3):
        compare(run(layer, sample), expected, tolerance(dtype, drawn=True), drawn=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "estimator"), TWIN_CASES)
def test_twins(name: str, estimator: str, dtype: torch.dtype) -> None:
    """At the means, and where sigma is 0, output and gradients are those of torch.nn; else it draws."""
    count = 0
    for training in MODES:
        for sample in samples(name, dtype, training):
            check_twin(name, estimator, dtype, training, sample)
            count += 1
    assert count >= 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimator"), TWIN_CASES)
def test_twins_on_each_implementation(name: str, estimator: str, backend: str) -> None:
    test_twins(name, estimator, torch.float64)


# ---------------------------------------------------------------- all modules


class Beside(nn.Module):
    """A module with a linear layer behind each of its outputs."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.linear = nn.Linear(1, 2, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        outputs = tensors(self.module(*args, **kwargs))
        return [self.linear(t.unsqueeze(-1)) if t.is_floating_point() else t for t in outputs]


def beside(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    module = make()
    return Beside(module, dtype).train(module.training)


def converted(model: nn.Module, **options: Any) -> tuple[Any, set[str]]:
    """convert's result, and the kinds that its warning says it has left."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = convert(model, **options)
    kinds: set[str] = set()
    for warning in caught:
        text = str(warning.message)
        found = re.match("convert: left as they are, with parameters of their own: (.*?);", text)
        assert found, text
        kinds.update(found[1].split(", "))
    return net, kinds


def left(model: nn.Module, norms: bool) -> set[str]:
    """The kinds of modules that have parameters of their own and no posterior over them."""
    posteriors = {id(t) for module in bayesian(model) for pair in module.posterior() for t in pair}
    return {
        type(module).__name__
        for module in model.modules()
        if (norms or not isinstance(module, rules.NORMS))
        and any(id(p) not in posteriors for p in module.parameters(recurse=False))
    }


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    for key, value in x.items():
        assert value.dtype == y[key].dtype and torch.equal(value, y[key]), key


@contextmanager
def without_fast_path(model: nn.Module, sample: Sample) -> Iterator[None]:
    """Where torch.nn's own output depends on it: test_padding_in_transformers."""
    encoders = any(isinstance(module, nn.TransformerEncoder) for module in model.modules())
    masked = sample.kwargs.get("src_key_padding_mask") is not None
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and not (encoders and masked))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def check_conversion(make: Callable[[], nn.Module], sample: Sample, dtype: torch.dtype, others: str) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    net, kinds = converted(model, others=others)
    assert kinds == left(net, norms=others == "weights")
    assert others == "keep" or not kinds
    assert means(net).keys() == dict(model.named_parameters()).keys()
    assert all(module.training == model.training for module in net.modules())
    # Back, and through a file: exact.
    back = to_deterministic(net)
    assert_same_state(back, model)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert repr(back) == repr(model)
    stored = io.BytesIO()
    torch.save(net.state_dict(), stored)
    stored.seek(0)
    torch.manual_seed(1)
    loaded, _ = converted(make(), others=others)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    copied = copy.deepcopy(net)
    for other in (loaded, copied):
        assert_same_state(other, net)
    # At the means it is the model, also in what it leaves in buffers.
    expected = run(model, sample)
    with posterior_means():
        for other in (net, loaded, copied):
            compare(run(other, sample), expected, tolerance(dtype))
            assert_same_state(to_deterministic(other), model)
    compare(run(back, sample), expected, 0.0)
    with torch.no_grad(), posterior_means():
        quick = run(net, sample)
        with without_fast_path(model, sample):
            compare(quick, run(model, sample), tolerance(dtype))
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    # Else it draws.
    drawn = run(net, sample)
    assert [(t.shape, t.dtype) for t in drawn.outputs] == [(t.shape, t.dtype) for t in expected.outputs]
    if isinstance(net, Beside):
        assert differ(drawn.outputs, expected.outputs) or not any(t.numel() for t in expected.outputs)
    if all(t.isfinite().all() for t in expected.outputs):
        without_noise(net)
        compare(run(net, sample), expected, tolerance(dtype, drawn=True), drawn=True)


def check_samples(name: str, others: str, dtypes: tuple[torch.dtype, ...], most: int | None = None) -> int:
    """The samples, or about ``most`` of them, alone and in a container; how many."""
    count = 0
    for dtype in dtypes:
        for training in MODES:
            found = list(samples(name, dtype, training))
            for sample in found[:: -(-len(found) // most) if most else 1]:
                make = partial(sample.module, dtype, training)
                check_conversion(make, sample, dtype, others)
                if (name, sample.desc) not in ALONE:
                    check_conversion(partial(beside, make, dtype), sample, dtype, others)
                count += 1
    return count


NAMES = sorted({*INFOS, *CASES} - set(SKIPPED))


@pytest.mark.parametrize("others", ["keep", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_convert(name: str, others: str) -> None:
    """Equal at the means, what is left is said, and back and through a file it is exact."""
    assert check_samples(name, others, (torch.float64,), 4) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("others", ["keep", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_convert_with_every_sample(name: str, others: str) -> None:
    check_samples(name, others, DTYPES)


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules(name: str) -> None:
    """Before their first forward they are left, which the warning says; after it they have a layer."""
    dtype = torch.float64
    for sample in samples(name, dtype, True):
        model = nn.ModuleDict({"lazy": sample.module(dtype, True), "linear": nn.Linear(2, 2)})
        for others in ("keep", "weights"):
            net, kinds = converted(model, others=others)
            assert kinds == {f"{name} (not initialised)"}
            assert type(net["lazy"]) is type(model["lazy"]) and isinstance(net["linear"], BayesianModule)
            back = to_deterministic(net)
            assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
            assert list(back.state_dict()) == list(model.state_dict())
            kept = copy.deepcopy(model["lazy"])
            compare(run(net["lazy"], sample), run(kept, sample), 0.0)
            assert_same_state(net["lazy"], kept)
        assert type(kept).__name__ == name.removeprefix("Lazy")
        check_conversion(partial(copy.deepcopy, kept), sample, dtype, "keep")
        assert type(convert(kept)).__name__ == f"BBB{type(kept).__name__}"


@pytest.mark.parametrize("others", ["keep", "weights"])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_modules(name: str, others: str) -> None:
    """They are left, which the warning says."""
    for sample in samples(name, torch.complex64, True):
        model = sample.module(torch.complex64, True)
        net, kinds = converted(nn.ModuleDict({"complex": model, "linear": nn.Linear(2, 2)}), others=others)
        assert kinds == {name} and isinstance(net["linear"], BayesianModule)
        compare(run(net["complex"], sample), run(model, sample), 0.0)


def test_the_mode_of_each_part() -> None:
    net = convert(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)).eval())
    assert not any(module.training for module in net.modules())


def test_padding_in_transformers() -> None:
    """torch.nn's fast path, in eval mode without gradients, writes zeros for padded tokens, its other path
    numbers; what convert makes is never in the fast path. (A Transformer's decoder looks at these tokens,
    unless it is given a memory_key_padding_mask.)"""
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    net = convert(model)
    x, padded = torch.randn(2, 3, 4).double(), torch.tensor([[False, False, True], [False, False, False]])
    expected = model(x, src_key_padding_mask=padded).detach()
    with torch.no_grad(), posterior_means():
        fast, found = (m(x, src_key_padding_mask=padded) for m in (model, net))
    assert not fast[padded].any() and expected[padded].all()
    assert_close(found, expected, tolerance(torch.float64), "all tokens")
    assert_close(found[~padded], fast[~padded], tolerance(torch.float64), "tokens")
