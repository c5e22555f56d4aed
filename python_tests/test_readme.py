"""The documents' examples run as they stand, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


# How many Python blocks each document has that are run.
EXAMPLES = {"faq.md": 3, "layers.md": 1, "export.md": 3, "uncertainty.md": 9, "vae.md": 1}


def run_examples(document: Path, mark: str = "", **names: object) -> dict[str, object]:
    """Runs a document's Python blocks of a mark one after the other, each with the names of those before."""
    blocks = re.findall(rf"```python{mark}\n(.*?)```", document.read_text(), flags=re.S)
    for block in blocks:
        exec(compile(block, str(document), "exec"), names)
    return {**names, "blocks": len(blocks)}


def test_example(backend: str) -> None:
    names = run_examples(README, x=torch.randn(8, 784), y=torch.randint(10, (8,)), x_test=torch.randn(5, 784))
    assert names["loss"] < 10  # a loss of one example
    assert torch.equal(names["point"][0].weight, names["model"][0].weight)
    assert all(p.grad is not None for p in names["net"].parameters())
    assert names["probs"].shape == (5, 10)
    torch.testing.assert_close(names["probs"].sum(-1), torch.ones(5))
    assert names["answer"].probs.shape == (5, 10) and (names["answer"].mutual_information > 0).all()


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=lambda path: path.name)
def test_examples_of_the_other_documents(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They assert themselves what they claim."""
    monkeypatch.chdir(tmp_path)
    names = run_examples(document)
    assert names["blocks"] == EXAMPLES.get(document.name, 0)


@pytest.mark.cpu_only("the page's models are on the CPU")
@pytest.mark.filterwarnings("ignore")
def test_examples_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "export.md"
    assert run_examples(page, " onnx", **run_examples(page))["blocks"] == 1


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
