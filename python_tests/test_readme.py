"""The documents' examples run as they stand, and their links lead somewhere."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


# How many Python blocks each document has that are run.
EXAMPLES = {
    "docs/develop.md": 1,
    "docs/export.md": 3,
    "docs/faq.md": 3,
    "docs/guides/bayesian.md": 6,
    "docs/guides/priors.md": 4,
    "docs/guides/processes.md": 1,
    "docs/guides/speed.md": 4,
    "docs/guides/train.md": 4,
    "docs/index.md": 1,
    "docs/layers.md": 1,
    "docs/methods/decomposition.md": 1,
    "docs/methods/posteriors.md": 1,
    "docs/uncertainty.md": 9,
    "docs/vae.md": 1,
}


def run_examples(document: Path, mark: str = "", **names: Any) -> dict[str, Any]:
    """Runs a document's Python blocks of a mark one after the other, each with the names of those before."""
    blocks = re.findall(rf"^ *```python{mark}\n(.*?)```", document.read_text(), flags=re.M | re.S)
    for block in blocks:
        exec(compile(textwrap.dedent(block), str(document), "exec"), names)
    return {**names, "blocks": len(blocks)}


def test_example(backend: str) -> None:
    names = run_examples(README, x=torch.randn(8, 784), y=torch.randint(10, (8,)), x_test=torch.randn(5, 784))
    assert names["loss"] < 10  # a loss of one example
    assert torch.equal(names["point"][0].weight, names["model"][0].weight)
    assert all(p.grad is not None for p in names["net"].parameters())
    assert names["probs"].shape == (5, 10)
    torch.testing.assert_close(names["probs"].sum(-1), torch.ones(5))
    assert names["answer"].probs.shape == (5, 10) and (names["answer"].mutual_information > 0).all()


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=NAMES[1:])
def test_examples_of_the_other_documents(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They assert themselves what they claim."""
    monkeypatch.chdir(tmp_path)
    names = run_examples(document)
    assert names["blocks"] == EXAMPLES.get(document.relative_to(ROOT).as_posix(), 0)


@pytest.mark.cpu_only("the page's models are on the CPU")
@pytest.mark.filterwarnings("ignore")
def test_examples_of_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "export.md"
    assert run_examples(page, " onnx", **run_examples(page))["blocks"] == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
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
