"""docs/layers.md: what works with which layer. A "yes" of its table is a test here, a dash an expected error.

`python python_tests/test_layer_table.py` writes the table anew.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import repository_root
from torch import Tensor, nn

import bbb_fast
from bbb_fast import fixed_noise, kl_loss, multi_sample, posterior_means
from bbb_fast.layers import (
    BBB,
    BBB_LRT,
    ConcreteDropout,
    Flipout,
    MCDropout,
    MCDropout1d,
    MCDropout2d,
    MCDropout3d,
    WeightSpace,
    dropout,
)

BEGIN, END = "<!-- table: written by python_tests/test_layer_table.py -->\n", "<!-- end of the table -->\n"


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    image: bool = False  # has a channels_last format


def rows(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(4, *shape),)


def indices() -> tuple[Tensor]:
    return (torch.randint(0, 9, (4, 5)),)


SIZES = {1: (7,), 2: (6, 5), 3: (4, 5, 3)}
CASES: dict[tuple[str, str], Case] = {}
for _estimator, _family in {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}.items():
    CASES["BBBLinear", _estimator] = Case(lambda f=_family: f.BBBLinear(5, 3), rows(5))
    CASES["BBBBilinear", _estimator] = Case(
        lambda f=_family: f.BBBBilinear(5, 4, 3), lambda: (*rows(5)(), *rows(4)())
    )
    for _kind in ("Conv", "ConvTranspose"):
        for _d, _size in SIZES.items():
            _name = f"BBB{_kind}{_d}d"
            CASES[_name, _estimator] = Case(
                lambda f=_family, n=_name: getattr(f, n)(3, 4, 2), rows(3, *_size), _d > 1
            )
CASES |= {
    ("BBBEmbedding", "bbb"): Case(lambda: BBB.BBBEmbedding(9, 4), indices),
    ("BBBEmbeddingBag", "bbb"): Case(lambda: BBB.BBBEmbeddingBag(9, 4), indices),
    ("BBBRNN", "bbb"): Case(lambda: BBB.BBBRNN(5, 3, batch_first=True), rows(6, 5)),
    ("BBBLSTM", "bbb"): Case(lambda: BBB.BBBLSTM(5, 3, batch_first=True), rows(6, 5)),
    ("BBBGRU", "bbb"): Case(lambda: BBB.BBBGRU(5, 3, batch_first=True), rows(6, 5)),
    ("BBBRNNCell", "bbb"): Case(lambda: BBB.BBBRNNCell(5, 3), rows(5)),
    ("BBBLSTMCell", "bbb"): Case(lambda: BBB.BBBLSTMCell(5, 3), rows(5)),
    ("BBBGRUCell", "bbb"): Case(lambda: BBB.BBBGRUCell(5, 3), rows(5)),
    ("BBBMultiheadAttention", "bbb"): Case(
        lambda: BBB.BBBMultiheadAttention(8, 2, batch_first=True), lambda: (torch.randn(4, 6, 8),) * 3
    ),
    ("WeightSpace", "bbb"): Case(
        lambda: WeightSpace(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3))), rows(5)
    ),
    ("MCDropout", "dropout"): Case(MCDropout, rows(3, 6, 5), True),
    ("MCDropout1d", "dropout"): Case(MCDropout1d, rows(9, 7)),
    ("MCDropout2d", "dropout"): Case(MCDropout2d, rows(9, 6, 5), True),
    ("MCDropout3d", "dropout"): Case(MCDropout3d, rows(9, 4, 5, 3), True),
    ("ConcreteDropout", "dropout"): Case(
        lambda: ConcreteDropout(nn.Conv2d(3, 4, 2), 0.3), rows(3, 6, 5), True
    ),
}
RECURRENT = ("BBBRNN", "BBBLSTM", "BBBGRU")

# Why a cell is a dash, by column and layer; the test expects an error there, or nothing to test.
DASHES: dict[tuple[str, str], str] = {
    **{("compile", name): "torch.compile takes no recurrent modules of torch.nn" for name in RECURRENT},
    **{("vmap", name): "torch.func.vmap takes no recurrent modules of torch.nn" for name in RECURRENT},
    ("vmap", "BBBLSTMCell"): "torch.func.vmap does not take torch's LSTM cell",
}


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


def pinned(layer: nn.Module, inputs: tuple[Any, ...], function: Callable[..., Any] | None = None) -> Tensor:
    with fixed_noise(5, 1, model=layer):
        return first((layer if function is None else function)(*inputs))


def gradients(layer: nn.Module, y: Tensor) -> list[Tensor]:
    """Of the parameters, if there are any."""
    parameters = list(layer.parameters())
    return list(torch.autograd.grad(y.float().square().sum(), parameters)) if parameters else []


# ---------------------------------------------------------------- the columns


def compiles(case: Case) -> None:
    """torch.compile(fullgraph=True): output and gradients as eager's, and fresh noise at each call."""
    torch._dynamo.reset()
    layer, inputs = case.make(), case.inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = pinned(layer, inputs, compiled), pinned(layer, inputs)
    torch.testing.assert_close(y, expected)
    for a, b in zip(gradients(layer, y), gradients(layer, expected), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(first(compiled(*inputs)), first(compiled(*inputs)))


def autocasts(case: Case) -> None:
    """Under autocast: near the float32 output, finite, and gradients of the parameters' own type."""
    layer, inputs = case.make(), case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = pinned(layer, inputs)
    torch.testing.assert_close(y.float(), pinned(layer, inputs), rtol=0.1, atol=0.1)
    for p, g in zip(layer.parameters(), gradients(layer, y), strict=True):
        assert g.dtype == p.dtype == torch.float32 and g.isfinite().all()


def vmaps(case: Case) -> None:
    """torch.func.vmap over a further dimension, as a loop."""
    layer, inputs = case.make(), case.inputs()
    stacked = tuple(torch.stack([t, t.flip(0)]) for t in inputs)
    with fixed_noise(5, 1, model=layer):
        y = torch.func.vmap(lambda *x: first(layer(*x)), randomness="different")(*stacked)
        loop = [first(layer(*(t[k] for t in stacked))) for k in range(2)]
    torch.testing.assert_close(y, torch.stack(loop), rtol=1e-5, atol=1e-5)


def samples_at_once(case: Case) -> None:
    """multi_sample: as many forwards."""
    layer, inputs = case.make(), case.inputs()

    class Of(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs: tuple[Any, ...]) -> Tensor:
            return first(self.layer(*inputs))

    model = Of()
    y = multi_sample(model, inputs, 3, seed=4)
    for k in range(3):
        with fixed_noise(4, k, model=model, draw="activations"):
            torch.testing.assert_close(y[k], model(inputs), rtol=1e-5, atol=1e-5)


def keeps_channels_last(case: Case) -> None:
    """Images in channels_last give such, and at the means the same numbers."""
    layer, (x,) = case.make(), case.inputs()
    last = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    with posterior_means():
        torch.testing.assert_close(layer(last), layer(x))
    y = layer(last)
    assert y.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    assert all(g.isfinite().all() for g in gradients(layer, y))


def copies(case: Case) -> None:
    """copy.deepcopy, pickle, and state_dict into a fresh layer."""
    layer, inputs = case.make(), case.inputs()
    layer(*inputs)
    fresh = case.make()
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(pinned(other, inputs), pinned(layer, inputs))
        assert torch.equal(kl_loss(other), kl_loss(layer))


def exports(case: Case) -> None:
    """torch.export.export (strict): a program that draws when it runs."""
    torch._dynamo.reset()
    layer, inputs = case.make(), case.inputs()
    program = torch.export.export(layer, inputs, strict=True).module()
    torch.manual_seed(1)
    y, again = first(program(*inputs)), first(program(*inputs))
    torch.manual_seed(1)
    torch.testing.assert_close(y, first(layer(*inputs)), rtol=1e-5, atol=1e-5)
    assert not torch.equal(y, again)


def is_the_reference(case: Case) -> None:
    """The kernels against the reference path: output, KL and all gradients."""
    layer, inputs = case.make(), case.inputs()
    results = []
    for backend in ("native", "reference"):
        bbb_fast.set_backend(backend)
        try:
            with fixed_noise(5, 1, model=layer, draw="activations"):
                y = first(layer(*inputs))
            kl = kl_loss(layer)
            # The factor: where the KL is 0, so would be the gradient of its square.
            results.append([y, kl, *gradients(layer, y), *gradients(layer, kl + 1)])
        finally:
            bbb_fast.set_backend("auto")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


COLUMNS: dict[str, Callable[[Case], None]] = {
    "compile": compiles,
    "autocast": autocasts,
    "vmap": vmaps,
    "multi_sample": samples_at_once,
    "channels_last": keeps_channels_last,
    "deepcopy": copies,
    "export": exports,
    "CPU = reference": is_the_reference,
}
# Run by `make test-blocks`, where the op's CUDA source takes the place of the CPU kernels.
BLOCKS = "CUDA source"


def dash(column: str, key: tuple[str, str]) -> str | None:
    """Why this cell is no "yes"."""
    if column == "channels_last" and not CASES[key].image:
        return "no images"
    return DASHES.get((column, key[0]))


CELLS = [(column, key) for column in COLUMNS for key in CASES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("column", "key"), CELLS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_cell(native: None, column: str, key: tuple[str, str]) -> None:
    why = dash(column, key)
    if why is None:
        COLUMNS[column](CASES[key])
    elif why != "no images":
        with pytest.raises(Exception):  # noqa: B017 - torch's own, of many kinds
            COLUMNS[column](CASES[key])


# ---------------------------------------------------------------- the page


def table() -> str:
    columns = [*COLUMNS, BLOCKS]
    notes: list[str] = []
    lines = [f"| layer | estimator | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for key in CASES:
        cells = []
        for column in columns:
            why = None if column == BLOCKS else dash(column, key)
            if why is None:
                cells.append("yes")
                continue
            if why not in notes:
                notes.append(why)
            cells.append(f"- ({notes.index(why) + 1})")
        lines.append(f"| `{key[0]}` | {key[1]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{k}. {note}" for k, note in enumerate(notes, 1)), ""])


def page() -> Path:
    return repository_root() / "docs" / "layers.md"


def with_the_table(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def test_the_page_has_this_table() -> None:
    text = page().read_text()
    assert text == with_the_table(text), f"run python {Path(__file__).name}"


def test_every_public_layer_is_in_the_table() -> None:
    for estimator, family in {"bbb": BBB, "lrt": BBB_LRT, "flipout": Flipout}.items():
        # Lazy ones become these.
        names = {name.replace("Lazy", "") for name in family.__all__}
        assert {(name, estimator) for name in names} <= set(CASES)
    assert {(name, "dropout") for name in dropout.__all__} <= set(CASES)


if __name__ == "__main__":
    with warnings.catch_warnings():
        page().write_text(with_the_table(page().read_text()))
    sys.exit(0)
