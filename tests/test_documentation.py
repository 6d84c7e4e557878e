"""The documents tell the truth: their commands parse, their links and code paths exist, and the site builds offline."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from clipship.core.cli.main import VERBS, root

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("training/clipship/models/*/README.md"),
    ]
)
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The changelog names what was."""

FENCES = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
STARTS = re.compile(r"(?:^|\s)(?:\S*/)?(?:-m )?clipship ")
FOLDERS = "core|training|export|serving|triton_models|tests|benchmarks|deploy|examples|docs"
CODE_PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> Iterator[tuple[str, str]]:
    """Language and content of the fenced blocks."""
    for _, language, content in FENCES.findall(text_of(page)):
        yield language, content


def inline_of(page: Path) -> list[str]:
    """The inline code outside the fenced blocks."""
    return INLINE.findall(FENCES.sub("", text_of(page)))


def words_of(line: str) -> list[str]:
    """The words after ``clipship`` in a line of a shell; empty: it runs another program."""
    found = STARTS.search(line)
    if found is None or re.match(r"(clipship: |\$ ?pip|pip|#)", line.strip()):
        return []
    lexer = shlex.shlex(line[found.end() :], posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if re.fullmatch(r"[|&;]+", word):
            break
        words.append(word)
    return words


def commands_of(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of each command of the page, and whether it is complete."""
    for language, content in blocks_of(page):
        if language in ("", "sh", "text"):
            for line in content.replace("\\\n", " ").splitlines():
                if words_of(line):
                    yield words_of(line), True
    for code in inline_of(page):
        if code.startswith("clipship ") and words_of(code)[0].isalpha() and not words_of(code)[0].isupper():
            yield words_of(code), False


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The verb's command, or its subcommand's, and the words behind it."""
    command: click.Command = root
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            break
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"{words[0]} is no command of {command.name}"
        command, words = found, words[1:]
    return command, words


ALL = [
    pytest.param(words, whole, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for page in TODAY
    for words, whole in commands_of(page)
]


def test_many_commands_are_found() -> None:
    assert len(ALL) > 100


@pytest.mark.parametrize(("words", "whole"), ALL)
def test_a_command_parses(words: list[str], whole: bool) -> None:
    command, arguments = command_of([*words])
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert option in known | {"--help", "--version"}, f"clipship {' '.join(words)}"
    if whole and arguments not in (["--help"], ["--version"]):
        command.make_context(command.name, [*arguments])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCES.sub("", text_of(page))
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if target.startswith(("http://", "https://")):
            continue
        linked = (page.parent / target) if target else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            content = re.sub(r'--8<-- "([\w/.]+)(?::\w+)?"', lambda found: text_of(ROOT / found[1]), text_of(linked))
            assert anchor in {slug_of(title) for title in re.findall(r"^#+ (.+)$", content, re.MULTILINE)}, anchor


def slug_of(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


@pytest.mark.parametrize("page", TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_paths_exist(page: Path) -> None:
    shell = [word for language, content in blocks_of(page) if language in ("", "sh") for word in content.split()]
    code = [word for each in inline_of(page) for word in each.split()]
    for path in filter(CODE_PATH.fullmatch, [*code, *shell]):
        if path.partition("/")[0] in ("docs", "tests", "benchmarks", "deploy") or "/clipship/" in path:
            assert (ROOT / path).exists(), f"{path} does not exist"
    for module in re.findall(r"python3? -m (benchmarks\.\w+|clipship\.[\w.]+)", text_of(page)):
        assert_importable(module)


@pytest.mark.parametrize("page", TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_code_exist(page: Path) -> None:
    for name in inline_of(page):
        if re.fullmatch(r"clipship(\.\w+){2,}", name) and not name.startswith("clipship.client."):
            assert_importable(name)
    for identifier in re.findall(r"^::: (clipship\.[\w.]+)$", text_of(page), re.MULTILINE):
        assert_importable(identifier)


@pytest.mark.parametrize("page", TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_imports_of_programs_work(page: Path) -> None:
    programs = [ast.parse(content) for language, content in blocks_of(page) if language == "python"]
    for node in (node for program in programs for node in ast.walk(program)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("clipship"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def assert_importable(name: str) -> None:
    """``name`` is a module of this checkout, or a name that its module defines or imports."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for stage in ("core", "training", "export", "serving", "."):
            place = ROOT.joinpath(stage, *parts[:end])
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.exists():
                    missing = [part for part in parts[end:] if not re.search(rf"\b{part}\b", file.read_text())]
                    assert not missing, f"{name}: {file.relative_to(ROOT)} has no {missing[0]}"
                    return
    raise AssertionError(f"{name} is nowhere")


def test_the_readme_is_a_page() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 120


def test_every_page_of_docs_is_in_the_navigation() -> None:
    navigation = text_of(ROOT / "mkdocs.yml")
    for page in ROOT.glob("docs/**/*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation


def test_one_version_everywhere() -> None:
    version = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["version"]
    released = re.findall(r"^## \[([\d.]+)\] - ([\d-]+)$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert released[0][0] == version
    citation = text_of(ROOT / "CITATION.cff")
    assert f"\nversion: {version}\ndate-released: {released[0][1]}\n" in citation


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make docs`` builds."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_make_docs_is_what_is_tested() -> None:
    assert "-m mkdocs build --strict" in text_of(ROOT / "Makefile")


def test_the_reference_has_every_verb(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "reference/cli.html").read_text(encoding="utf-8"))
    for verb in VERBS:
        command, _ = command_of([verb])
        subcommands = command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []
        for name in [verb, *(f"{verb} {each}" for each in subcommands)]:
            assert f"clipship {name} [OPTIONS]" in page, name


def test_the_site_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8")) == []
    assert (site / "search/search_index.json").stat().st_size > 100_000
