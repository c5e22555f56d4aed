"""The documents' examples run as they stand, and their links lead somewhere."""

from __future__ import annotations

import gc
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from helpers import repository_root

ROOT = repository_root()
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]


# How many Python blocks each document has that are run.
EXAMPLES = {
    "docs/develop.md": 1,
    "docs/export.md": 3,
    "docs/faq.md": 4,
    "docs/guides/bayesian.md": 6,
    "docs/guides/priors.md": 4,
    "docs/guides/processes.md": 1,
    "docs/guides/speed.md": 4,
    "docs/guides/train.md": 5,
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


@pytest.mark.cpu_only("a DataLoader shuffles on the CPU")
def test_example(backend: str) -> None:
    pytest.importorskip("sklearn")
    names = run_examples(README)
    assert names["blocks"] == 1
    answer, truth = names["answer"], names["y"][1500:]
    assert answer.probs.shape == (297, 10) and (answer.mutual_information > 0).all()
    assert (answer.prediction == truth).double().mean() > 0.7  # after one epoch
    assert names["loss"] < 10  # a loss of one example


def test_the_example_is_a_whole_loop_in_ten_lines() -> None:
    (block,) = re.findall(r"^```python\n(.*?)```", README.read_text(), flags=re.M | re.S)
    lines = block[block.index("net = ") : block.index("print(")].splitlines()
    assert len(lines) <= 10
    for part in ("DataLoader(", "optim.", "kl_loss(net) / len(data)", "backward()", "step()", "predictive("):
        assert sum(part in line for line in lines) == 1, part


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) < 150


@pytest.mark.parametrize("document", DOCUMENTS[1:], ids=NAMES[1:])
def test_examples_of_the_other_documents(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They assert themselves what they claim."""
    monkeypatch.chdir(tmp_path)
    names = run_examples(document)
    assert names["blocks"] == EXAMPLES.get(document.relative_to(ROOT).as_posix(), 0)
    # DistributedDataParallel, if it is the last to hold its group, frees it under the GIL and waits there for
    # gloo's threads, one of which may be waiting for the GIL. A group that is freed by itself lets go of it.
    group = getattr(names.get("run"), "process_group", None)
    names.clear()
    gc.collect()
    del group


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
