"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_example(backend: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert blocks
    names = {"x": torch.randn(8, 784), "y": torch.randint(10, (8,)), "x_test": torch.randn(5, 784)}
    for block in blocks:
        exec(block, names)
    names["loss"].backward()
    assert all(p.grad is not None for p in names["net"].parameters())
    assert names["probs"].shape == (5, 10)
    torch.testing.assert_close(names["probs"].sum(-1), torch.ones(5))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in target:
            assert (README.parent / target).exists(), target
