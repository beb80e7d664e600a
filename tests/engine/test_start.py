"""Every command of docs/start.md and docs/upgrade.md, in their order and as printed, in a fresh clone of the last commit.

A block of commands to run is a fence marked `sh run`; one marked `sh server` is started, waited for, and stopped after the block
that follows it. Installs several gigabytes, twice.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.server import StartedServer

ROOT = Path(__file__).parents[2]
PAGES = ("start.md", "upgrade.md")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(`run` or `server`, commands) of every marked block of a page."""
    for token in MarkdownIt("commonmark").parse(page):
        if token.type == "fence" and (words := token.info.split())[:1] == ["sh"] and len(words) == 2:
            yield words[1], token.content


def environment() -> dict[str, str]:
    """That of a newcomer's shell: nothing of this checkout is found in it."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(commands: str, folder: Path) -> str:
    """What commands print; fails at the first that does not end with status 0."""
    bash = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(
        bash, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(f"$ {commands}{done.stdout}", flush=True)
    assert done.returncode == 0, f"{commands}\n{done.stdout[-4000:]}"
    return done.stdout


@contextmanager
def serving(command: str, folder: Path, log: Path) -> Iterator[None]:
    """Runs a server until the context ends, as Ctrl-C does it."""
    port = re.search(r"--port (\d+)", command)
    assert port is not None
    server = StartedServer(["bash", "-c", f"exec env {command}"], int(port[1]), log, environment(), folder)
    try:
        server.wait_until_ready()
        assert "Mask-token prediction is on" in log.read_text()
        yield
    finally:
        server.stop(interrupt=True)


def counters(text: str) -> dict[str, float]:
    """Prometheus' counters in a text, their labels left out."""
    return {name: float(value) for name, value in re.findall(r"^(vllm:\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone with its environment, with which both pages begin."""
    folder = tmp_path_factory.mktemp("newcomer") / "vllm-mtp"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    run("make venv", folder)
    return folder


@pytest.mark.full
@pytest.mark.engine
@pytest.mark.parametrize("page", PAGES)
def test_every_command_as_printed_works(page: str, clone: Path, tmp_path: Path) -> None:
    printed = list(blocks((clone / "docs" / page).read_text(encoding="utf-8")))
    while printed:
        kind, commands = printed.pop(0)
        if kind == "run":
            run(commands, clone)
            continue
        assert kind == "server", kind
        with serving(commands, clone, tmp_path / "server.log"):
            said = run(printed.pop(0)[1], clone)
        assert '"finish_reason":"length"' in said
        assert counters(said)["vllm:spec_decode_num_drafts_total"] > 0


def test_blocks_are_those_that_are_marked() -> None:
    page = "```sh run\na \\\n  b\n```\n\n    indented\n\n```sh\nunmarked\n```\n\n```sh server\nc\n```\n"
    assert list(blocks(page)) == [("run", "a \\\n  b\n"), ("server", "c\n")]
    for name in PAGES:
        found = list(blocks((ROOT / "docs" / name).read_text(encoding="utf-8")))
        assert [kind for kind, _ in found].count("server") == 1
        assert all(after == "run" for (kind, _), (after, _) in pairwise(found) if kind == "server")
