"""The demo's text: held-out files are never trained on, and the prompts come from them by the rule that is written down."""

import configparser
import itertools
import json
import operator
import re
import sys
from pathlib import Path

import pytest

from benchmarks.demo_model import arithmetic, corpus
from benchmarks.demo_model.make_prompts import MAX_CHARACTERS, MIN_CHARACTERS, NUM_PROMPTS, all_prompts, passages
from vllm_mtp import demo

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
ROOT = Path(__file__).parents[2]
PROMPTS = {
    domain: [json.loads(line) for line in (demo.PROMPTS / f"{domain}.jsonl").read_text().splitlines()] for domain in demo.DOMAINS
}


def test_the_split_is_a_fixed_rule_on_paths() -> None:
    held_out = ["asyncio/transports.py", "posixpath.py", "lib2to3/pytree.py"]
    assert all(corpus.is_held_out(name) for name in held_out)
    assert not corpus.is_held_out("json/decoder.py")
    files = dict.fromkeys([*held_out, "json/decoder.py", "test/test_json.py", "idlelib/idle_test/test_run.py"], "x")
    train, test = corpus.split(files)
    assert sorted(test) == sorted(held_out)
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(files)


def test_tests_are_never_held_out() -> None:
    assert not any(corpus.is_held_out(f"test/test_{i}.py") for i in range(200))


def test_generated_tables_and_other_peoples_packages_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "site-packages/b.py", "encodings/c.py", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert corpus.library_files(tmp_path) == {"a.py": "x = 1\n"}


@pytest.mark.parametrize("domain", ["code", "prose"])
def test_prompts_are_of_held_out_files_alone(domain: str) -> None:
    found = PROMPTS[domain]
    assert [prompt["text"] for prompt in found] == demo.prompts(domain)
    assert len({(prompt["file"], prompt["line"]) for prompt in found}) == len(found) == NUM_PROMPTS[domain]
    assert all(MIN_CHARACTERS <= len(prompt["text"]) <= MAX_CHARACTERS for prompt in found)
    if domain == "code":
        assert all(corpus.is_held_out(prompt["file"]) for prompt in found)
        assert len({prompt["file"] for prompt in found}) >= 25
    else:
        train, held_out = corpus.prose_split()
        assert {prompt["file"] for prompt in found} <= set(held_out)
        assert not set(train) & set(held_out)


def test_problems_are_held_out_and_right() -> None:
    learned = {problem.prompt for problem in itertools.islice(arithmetic.problems(held_out=False), 3000)}
    assert len(PROMPTS["arithmetic"]) == NUM_PROMPTS["arithmetic"]
    assert not learned & set(demo.prompts("arithmetic"))
    for problem in itertools.islice(arithmetic.problems(held_out=True), 200):
        assert arithmetic.answer(problem.solution) == problem.answer
        for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.solution):
            assert OPERATIONS[sign](int(left), int(right)) == int(result)
    assert arithmetic.answer("nothing") is None


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the prompts were chosen from the library of Python 3.11.7")
def test_the_prompts_are_those_that_the_rule_chooses() -> None:
    assert all_prompts() == PROMPTS


def test_a_passage_starts_at_a_line_and_ends_inside_a_block() -> None:
    from random import Random

    text = "".join(f"def function_{i}(argument):\n    first = {i}\n    return first + argument\n\n" for i in range(60))
    found = passages(text, Random(0))
    assert len(found) >= 5
    lines = text.splitlines()
    for line, passage in found:
        rows = passage.splitlines()
        assert lines[line - 1 : line - 1 + len(rows)] == rows
        assert lines[line - 1 + len(rows)].startswith("    ")


def test_every_package_is_installed() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = set(settings["options"]["packages"].split())
    found = {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for name, folder in (("vllm_mtp", "vllm_mtp"), ("vllm_mtp.kernels", "kernels"))
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == listed
