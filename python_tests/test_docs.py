"""The site: every page has its place, every public name and command is shown, the built pages hold together.

What needs mkdocs is not here: `make docs` builds strictly. The slow tests open what it has built.
"""

from __future__ import annotations

import argparse
import ast
import pkgutil
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import browser
import pytest
import test_docstrings
from helpers import PACKAGE, repository_root
from torch.distributed.run import get_args_parser

from bbb_fast import cli, functional, layers, reference

pytestmark = pytest.mark.cpu_only("documents know no device")

ROOT = repository_root()
DOCS = ROOT / "docs"
SITE = ROOT / "build" / "site"
CONFIG = (ROOT / "mkdocs.yml").read_text()
# A desktop's width, and a phone's at night.
SCREENS = ((1280, False), (390, True))


def pages() -> list[str]:
    """Those that are written, as the navigation names them."""
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    tutorials = [f"tutorials/{path.stem}.md" for path in (DOCS / "tutorials").glob("*.py")]
    return sorted([*written, *tutorials, "results/README.md"])


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = CONFIG[CONFIG.index("\nnav:") :]
    assert sorted(re.findall(r"^ +- (?:.*: )?(\S+\.md)$", navigation, flags=re.M)) == pages()


def documented() -> Iterator[object]:
    """What the pages of the reference show: objects, and what modules export."""
    for page in (DOCS / "reference").glob("*.md"):
        for path, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", page.read_text(), flags=re.M):
            thing, members = pkgutil.resolve_name(path), re.search(r"members: \[(.*)\]", options)
            if not isinstance(thing, ModuleType):
                yield thing
                continue
            for name in re.findall(r"\w+", members[1]) if members else thing.__all__:
                yield getattr(thing, name)


def test_every_public_name_is_in_the_reference() -> None:
    pytest.importorskip("sklearn")
    shown = {id(thing) for thing in documented()}
    for module in test_docstrings.MODULES:
        public = {name: getattr(module, name) for name in module.__all__}
        missing = [k for k, v in public.items() if id(v) not in shown and not isinstance(v, ModuleType)]
        assert not missing, (module.__name__, missing)
    assert [name for name in functional.__all__ if not hasattr(reference, name)] == ["draw_rng"]


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices


def test_the_help_of_every_command_is_shown() -> None:
    page = (DOCS / "reference" / "commands.md").read_text()
    shown = re.findall(r"^## (\w+)\n\n<!-- bbb-fast (\w+) --help -->$", page, flags=re.M)
    assert shown == [(name, name) for name in parsers()]


WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def blocks() -> Iterator[tuple[str, str, str]]:
    """The page, the kind and the text of each block of code."""
    for path in WRITTEN:
        for _, kind, text in re.findall(
            r"^( *)```([^\n]*)\n(.*?)^\1```$", path.read_text(), flags=re.M | re.S
        ):
            yield path.relative_to(ROOT).as_posix(), kind, text


# What runs the blocks of each kind; commands (no kind) are read here.
RUN_BY = {"python": "test_readme.py", "python onnx": "test_readme.py", "python run": "test_migrate.py"}
RUN_BY["diff"] = "test_migrate.py"


def test_every_block_is_run_or_read() -> None:
    """What is neither says so by its kind: pictures, formulas, and code for libraries that are not here."""
    for page, kind, text in blocks():
        if kind in RUN_BY:
            here = "test_migrate.py" if page == "docs/migrate.md" else "test_readme.py"
            assert RUN_BY[kind] == here, (page, kind)
        elif kind == "text":
            theirs = "import" in text
            assert theirs == (page == "docs/migrate.md" and "KL(p‖q)" not in text), (page, text)
            if theirs:
                ast.parse(text)
        else:
            assert kind == "", (page, kind)


def commands() -> Iterator[tuple[str, str]]:
    """The page and the text of each command in a block."""
    for page, kind, text in blocks():
        for line in text.replace("\\\n", " ").splitlines() if not kind else ():
            if command := line.partition("#")[0].strip():
                yield page, command


# What stands in commands for something of the reader's; None: a folder.
WORDS = {
    "DIR": None,
    "FOLDER": None,
    "FILE": None,
    "UCI": None,
    "N": "2",
    "TYPE": "lrt",
    "BETA": "0.1",
    "SEED": "0",
}
COMMANDS = [pytest.param(text, id=f"{page}: {text[:60]}") for page, text in commands()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_pages_show_are_understood(command: str, tmp_path: Path) -> None:
    """Their options are; what they name need not be there."""
    for word, value in WORDS.items():
        command = re.sub(rf"\b{word}\b", value or str(tmp_path), command.replace("...", ""))
    before, _, ours = f" {command} ".replace(" bbb-fast ", " python -m bbb_fast ").partition(" -m bbb_fast ")
    program, *arguments = shlex.split(before)
    if ours:
        cli._parser().parse_args(shlex.split(ours))
        if program == "torchrun":
            launcher = get_args_parser()
            assert launcher.parse_args([*arguments, "script"]).training_script == "script"
        else:
            assert (program, arguments) == ("python", [])
    elif program == "--set":  # lines of options alone
        cli._parser().parse_args(["compare", program, *arguments])
    elif program == "python":
        script, *options = arguments
        text = (ROOT / script).read_text()
        assert [o for o in options if o.startswith("--") and f'add_argument("{o}"' not in text] == []
    elif program == "pip":
        assert arguments[0] == "install"
    else:
        assert program == "make" and set(arguments) <= targets()


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_commands_and_files_that_sentences_name_exist() -> None:
    ours, extras = parsers(), re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    for path in WRITTEN:
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.S)):
            if found := re.fullmatch(r"make ([\w-]+).*", code):
                assert found[1] in targets(), (path, code)
            elif found := re.fullmatch(r".*(?:\bbbb-fast|-m bbb_fast) ([a-z]+)( .*)?", code):
                known = ours[found[1]]._option_string_actions
                assert set(re.findall(r"--[\w-]+", found[2] or "")) <= set(known), (path, code)
            elif found := re.search(r"(?:bbb_fast|\.)\[(\w+)\]", code):
                assert found[1] in extras, (path, code)
            elif found := re.fullmatch(
                r"(?:python )?((?:bbb_fast|csrc|python_tests|benchmarks|docs)/\S+).*", code
            ):
                assert list(ROOT.glob(re.sub(r"<\w+>", "*", found[1]))), (path, code)


def test_the_tools_are_pinned() -> None:
    lines = (DOCS / "site" / "tools.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w-]+==[\d.]+", line) for line in lines)


class Anchors(HTMLParser):
    """Where a page's links lead, and the places in it that links may lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids.add(values.get("id") or "")
        for name in ("href", "src"):
            if values.get(name):
                self.links.append(values[name] or "")


@pytest.fixture(scope="module")
def built() -> dict[Path, Anchors]:
    found = {page.resolve(): Anchors(page) for page in SITE.rglob("*.html") if page.name != "404.html"}
    if not found:
        pytest.skip("the site is not built: make docs")
    sources = [
        ROOT / "mkdocs.yml",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("docs/**/*.py"),
        *PACKAGE.rglob("*.py"),
    ]
    if max(path.stat().st_mtime for path in sources) > (SITE / "index.html").stat().st_mtime:
        pytest.fail("the site is older than what it is made of: make docs")
    return found


@pytest.mark.slow
def test_links_of_the_built_site_lead_somewhere(built: dict[Path, Anchors]) -> None:
    assert {page.relative_to(SITE).as_posix() for page in built} >= {
        re.sub(r"README\.md$", "index.md", name).removesuffix("md") + "html" for name in pages()
    }
    for page, anchors in built.items():
        for link in anchors.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "data") and "src=" not in link, (page, link)
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), (page, link)
            if parts.fragment and target in built:
                assert unquote(parts.fragment) in built[target].ids, (page, link)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_pages_of_the_built_site_in_a_browser(
    built: dict[Path, Anchors], opened: browser.Browser, width: int, dark: bool
) -> None:
    """From their folder, with the network off: nothing goes wrong or is asked for, nothing is too wide."""
    opened.messages.clear()
    opened.requests.clear()
    formulas = 0
    for page in built:
        opened.open(page, width=width, dark=dark)
        assert opened.run("getComputedStyle(document.body).colorScheme") == ("dark" if dark else "light")
        assert opened.messages == [], page
        assert opened.run("document.documentElement.scrollWidth <= innerWidth"), page
        assert opened.run("[...document.images].every(i => i.loading == 'lazy' || i.naturalWidth > 0)"), page
        assert not opened.run("document.querySelector('article').innerText.includes('$$')"), page
        formulas += opened.run("document.querySelectorAll('math').length")
    assert formulas > 50
    assert all(urlsplit(address).scheme in ("file", "data") for address in opened.requests)


@pytest.mark.slow
def test_layers_of_the_built_site_have_their_whole_text(built: dict[Path, Anchors]) -> None:
    """It is put together when a class is made (docs/site/docstrings.py)."""
    page = (SITE / "reference" / "layers.html").read_text()
    for module in (layers.BBB, layers.BBB_LRT, layers.Flipout):
        for name in module.__all__:
            _, _, text = page.partition(f'id="{module.__name__}.{name}"')
            text = text.partition("<h3")[0]
            assert "Parameters:" in text and "Error" in text and "201" in text, (module.__name__, name)


SEARCH = """
(async () => {
  document.querySelector("#__search").click();
  const field = document.querySelector(".md-search__input");
  field.focus();
  field.value = "flipout";
  field.dispatchEvent(new Event("input", { bubbles: true }));
  const found = () => [...document.querySelectorAll(".md-search-result__link")].map((link) => link.href);
  for (let k = 0; k < 100 && !found().length; k++) await new Promise((done) => setTimeout(done, 100));
  return found();
})()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), SCREENS)
def test_the_search_of_the_built_site(
    built: dict[Path, Anchors], opened: browser.Browser, width: int, dark: bool
) -> None:
    """In a folder too, where a browser starts no worker."""
    opened.messages.clear()
    opened.open(SITE / "guides" / "train.html", width=width, dark=dark)
    found = {urlsplit(link).path for link in opened.run(SEARCH)}
    assert {str(SITE / name) for name in ("methods/posteriors.html", "reference/functional.html")} <= found
    assert opened.messages == []
