"""The documentation is what the code says: generated parts, links, quoted messages, JSON, commands and figures."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from docs import draw, generate
from vllm_mtp.selection import OPTIONS
from vllm_mtp.train.config import LossWeights, TrainConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NOT_OURS = "## Messages that are not ours"
NOT_FOR_OPERATORS = ("reference.py", "contract.py")
"""Modules whose errors are those of a developer."""
WORDS = re.compile(r"[a-z]{2}.* .*[a-z]{2}.* .*[a-z]{2}")
"""A message that says something; others only frame what another one says."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def tokens(text: str) -> Iterator[Token]:
    """Markdown's tokens, those within lines and tables too."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page."""
    return {slug(after.content) for token, after in pairwise(tokens(text)) if token.type == "heading_open"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a page's code, without variables in front; blocks that are no shell's left out."""
    for token in tokens(text):
        is_block = token.type in ("fence", "code_block") and token.info.split()[:1] in ([], ["sh"])
        if not is_block and token.type != "code_inline":
            continue
        for printed in token.content.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\s*([A-Z_]+=\S+\s+)*", "", printed)
            if re.match(r"\S*(make|python3?|pytest|vllm|vllm-mtp)\s", line):
                yield shlex.split(line, comments=True)


@pytest.mark.parametrize("name", generate.PARTS)
def test_generated_parts_are_up_to_date(name: str) -> None:
    (expected,) = [text for path, text in generate.pages() if path == DOCS / name]
    assert (DOCS / name).read_text(encoding="utf-8") == expected, "run: python -m docs.generate"


@pytest.mark.parametrize("name", draw.FIGURES)
def test_figures_say_what_the_code_draws(name: str) -> None:
    # Lines depend on the version of what draws them, words do not.
    committed = (DOCS / "figures" / name).read_text(encoding="utf-8")
    assert draw.words(committed) == draw.words(draw.svg(draw.FIGURES[name]())), "run: python -m docs.generate"


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for token in tokens(page.read_text(encoding="utf-8")):
        link = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not link or "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_every_page_is_in_the_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {line for token in tokens(index) if token.type == "fence" for line in token.content.splitlines() if line[:1] != ":"}
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} == listed - {""}


@pages
def test_quoted_configurations_are_valid(page: Path) -> None:
    found = re.findall(r"speculative[-_]config[= ]'?(\{[^}]*\})", page.read_text(encoding="utf-8"))
    for text in found:
        assert set(json.loads(text)) <= {"method", "model", "num_speculative_tokens", *OPTIONS}, text


@pages
def test_quoted_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page.read_text(encoding="utf-8")):
        program = words[0].rpartition("/")[2]
        if program == "make":
            assert set(words[1:]) <= targets, words
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.endswith(".py")), words
        elif program == "vllm-mtp" and words[1] != "COMMAND":
            command = generate.commands()[words[1]]
            known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
            assert {word for word in words if word.startswith("-")} <= known, words
        elif "-m" in words and (module := words[words.index("-m") + 1]).partition(".")[0] in ("benchmarks", "docs", "tests"):
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), words


def test_every_option_of_training_is_a_flag_with_its_default() -> None:
    fields = {**LossWeights.model_fields, **TrainConfig.model_fields}
    options = {option.name: option for option in generate.commands()["train"].params}
    assert options.keys() ^ fields.keys() == {"loss", "config"}
    for name in options.keys() & fields.keys():
        assert options[name].default == (None if fields[name].is_required() else fields[name].default or options[name].default), (
            name
        )


# -- messages ------------------------------------------------------------------------------------------------------


def template(node: ast.expr) -> str:
    """A text with `...` for what is filled in; nothing else."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%(d|s|\.\d+f)", "...", text)
        case ast.JoinedStr(values=parts):
            return "".join(template(part) if isinstance(part, ast.Constant) else "..." for part in parts)
        case _:
            return "..."


@cache
def messages() -> dict[str, str]:
    """What errors and warnings of the package say, and where."""
    found = {}
    for path in sorted((ROOT / "vllm_mtp").rglob("*.py")):
        if path.name in NOT_FOR_OPERATORS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if isinstance(node, ast.Raise) or name in ("warning", "_fail"):
                found[template(call.args[0])] = f"{path.relative_to(ROOT)}:{call.lineno}"
    return {text: where for text, where in found.items() if WORDS.search(text)}


@cache
def quoted() -> dict[str, re.Pattern[str]]:
    """The messages on the page, each as a pattern of the text that it is an excerpt of."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition(NOT_OURS)[0]
    found = {}
    for row in re.findall(r"^\| (.*?) \| ", page, re.MULTILINE):
        if codes := [token.content for token in tokens(row) if token.type == "code_inline"]:
            found[codes[0]] = re.compile(".*".join(map(re.escape, codes[0].split("..."))))
    return {text: pattern for text, pattern in found.items() if WORDS.search(text)}


def test_quoted_messages_are_said() -> None:
    said = "\n".join(messages())
    assert [text for text, pattern in quoted().items() if not pattern.search(said)] == ["Mask-token prediction is on"]
    assert len(quoted()) > 80


def test_what_is_said_is_quoted() -> None:
    patterns = list(quoted().values())
    missing = {text: where for text, where in messages().items() if not any(pattern.search(text) for pattern in patterns)}
    assert not missing, "give cause and remedy in docs/troubleshooting.md"


# -- the page's own checks can fail ------------------------------------------------------------------------------------


def test_a_part_without_its_comments_is_an_error() -> None:
    assert generate.with_part("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb", "x", "new") == (
        "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb"
    )
    with pytest.raises(ValueError, match="no comments"):
        generate.with_part("a", "x", "new")


def test_anchors_are_those_of_the_site() -> None:
    assert anchors("# A `b`, c's\n\n## vllm-mtp train\n") == {"a-b-cs", "vllm-mtp-train"}


def test_anything_an_error_fills_in_is_left_open() -> None:
    (call,) = (node.value for node in ast.parse("f(f'{a}: b is {c!r}, ' f'd')").body if isinstance(node, ast.Expr))
    assert isinstance(call, ast.Call)
    assert template(call.args[0]) == "...: b is ..., d"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-b", "html", str(DOCS), str(tmp_path)]
    found = subprocess.run(build, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "index.html").exists()
