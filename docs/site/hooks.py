"""What the site needs that mkdocs does not do: formulas without a script, tutorials with their output, the
command line's help, and links that hold in the repository and on the site.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from contextlib import redirect_stdout, suppress
from html import unescape
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert.exporters import MarkdownExporter

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOKS = ROOT / "build" / "tutorials"  # executed by make docs
# nbconvert's template, but for text that a cell has printed: a block that site.css can tell from code.
OUTPUT = """
{%- extends "markdown/index.md.j2" -%}
{%- macro text(lines) %}
``` { .text .output }
{{ lines | strip_ansi | trim }}
```
{% endmacro -%}
{%- block stream %}{{ text(output.text) }}{% endblock -%}
{%- block data_text %}{{ text(output.data["text/plain"]) }}{% endblock -%}
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the results of the benchmarks, which are not in docs/, and a page for each tutorial."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for script in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        text, figures = _tutorial(script)
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=text))
        for name, data in figures.items():
            files.append(File.generated(config, f"tutorials/{script.stem}/{name}", content=data))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = re.sub(r"^( *```\w+) \w+$", r"\1", markdown, flags=re.M)  # marks are for the tests
    markdown = re.sub(r"<!-- bbb-fast (.*?)-->", lambda m: _help(m[1].split()), markdown)
    source = page.file.src_uri
    if source.startswith("reference/"):
        page.meta["search"] = {"boost": 0.5}  # names have many matches; what explains them comes first
    here = Path(page.file.abs_src_path).parent if page.file.abs_src_path else ROOT / "docs" / "tutorials"
    return re.sub(r"(\[[^][]*\])\(([^)#\s]+)((?:#[^)]*)?)\)", lambda m: _link(m, here, source), markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, which pymdownx.arithmatex has marked, become MathML; the search leaves out signatures."""
    html = html.replace('<div class="doc-signature', '<div data-search-exclude class="doc-signature')
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), html)
    block = r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>'
    return re.sub(block, lambda m: f'<div class="formula">{_mathml(m[1], "block")}</div>', html, flags=re.S)


def _mathml(latex: str, display: str) -> str:
    return convert(unescape(latex).strip(), display=display)


def _tutorial(script: Path) -> tuple[str, dict[str, bytes]]:
    """Its page in Markdown, and the figures by name."""
    notebook = NOTEBOOKS / f"{script.stem}.ipynb"
    if not notebook.exists():
        name = notebook.relative_to(ROOT)
        raise PluginError(f"{name} is missing: run `make docs`, which executes the tutorials")
    exporter = MarkdownExporter(raw_template=OUTPUT)
    text, resources = exporter.from_notebook_node(nbformat.read(notebook, as_version=4))
    text = text.replace("![png](", f"![Figure]({script.stem}/")
    title, _, rest = text.lstrip().partition("\n")
    note = f"*This page is a script, [{script.name}]({script.name}), with what it printed and drew.*"
    return f"{title}\n\n{note}\n{rest}", resources["outputs"]


def _help(arguments: list[str]) -> str:
    """What the command line says with these arguments, as a block of text."""
    from bbb_fast.cli import main

    os.environ["COLUMNS"] = "90"
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        main(arguments)
    return f"```text\n{text.getvalue().rstrip()}\n```"


def _link(match: re.Match[str], here: Path, source: str) -> str:
    """A link out of docs/: to the results' pages, to the start page for the README, else its text alone."""
    label, target, anchor = match.groups()
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    path = (here / target).resolve()
    if path.is_relative_to(RESULTS):
        name = path.relative_to(RESULTS)
        uri = f"results/{'README.md' if path == RESULTS else name}"
    elif path == ROOT / "README.md":
        uri, anchor = "index.md", ""
    elif path.is_relative_to(ROOT / "docs"):
        uri = path.relative_to(ROOT / "docs").as_posix()
        if uri.startswith("tutorials/") and path.suffix == ".py" and not source.startswith("tutorials/"):
            uri = uri.removesuffix(".py") + ".md"
    else:
        return label[1:-1]
    return f"{label}({posixpath.relpath(uri, posixpath.dirname(source) or '.')}{anchor})"
