"""The documents' examples run as they stand, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def run_examples(document: Path, **names: object) -> dict[str, object]:
    """Runs a document's Python blocks one after the other; a later one may use an earlier one's names."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.S)
    for block in blocks:
        exec(compile(block, str(document), "exec"), names)
    return {"blocks": len(blocks), **names}


def test_example(backend: str) -> None:
    names = run_examples(README, x=torch.randn(8, 784), y=torch.randint(10, (8,)), x_test=torch.randn(5, 784))
    names["loss"].backward()
    assert names["loss"] < 10  # a loss of one example
    assert torch.equal(names["point"][0].weight, names["model"][0].weight)
    assert all(p.grad is not None for p in names["net"].parameters())
    assert names["probs"].shape == (5, 10)
    torch.testing.assert_close(names["probs"].sum(-1), torch.ones(5))


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=lambda path: path.name)
def test_examples_of_the_other_documents(document: Path) -> None:
    """They assert themselves what they claim."""
    names = run_examples(document)
    assert names["blocks"] == (3 if document.name == "faq.md" else 0)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, anchor
