"""The table of vLLM's features in docs/features.md, read from the tests' marks; `python -m docs.generate` writes it.

A test that serves a feature, or sees it refused, is marked `feature(row, verdict, remark)`. The marks are read, not run.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent
VERDICTS = ("works", "refused", "refused by vLLM")


@dataclass
class Row:
    """A feature, what becomes of it, and the tests that show it."""

    feature: str
    verdict: str
    remark: str
    tests: list[str] = field(default_factory=list)


def marks(source: str) -> Iterator[tuple[str, list[str]]]:
    """(test function, arguments of the mark) of every mark in a module, from top to bottom."""
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        calls = [node for decorator in function.decorator_list for node in ast.walk(decorator) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda call: call.lineno):
            if getattr(call.func, "id", getattr(call.func, "attr", None)) == "feature":
                yield function.name, [ast.literal_eval(argument) for argument in call.args]


def rows(tests: Path = TESTS) -> list[Row]:
    """The table's rows, refusals last.

    Raises:
        ValueError: a verdict is none of `VERDICTS`, or two tests do not agree on one.
    """
    found: dict[str, Row] = {}
    for path in sorted(tests.rglob("test_*.py"), key=lambda path: (path.name != "test_features.py", path)):
        for function, (feature, verdict, *remark) in marks(path.read_text(encoding="utf-8")):
            row = found.setdefault(feature, Row(feature, verdict, ""))
            if verdict not in VERDICTS or verdict != row.verdict:
                raise ValueError(f"{path.name}, {function}: {feature} is said to be {verdict!r} ({row.verdict!r} elsewhere)")
            row.remark = row.remark or "".join(remark)
            row.tests.append(f"{path.relative_to(tests)}::{function}")
    return sorted(found.values(), key=lambda row: VERDICTS.index(row.verdict))


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| feature | beside mask tokens | remark | test |", "|---|---|---|---|"]
    lines += [
        f"| {row.feature} | {row.verdict} | {row.remark} | {', '.join(f'`{test}`' for test in dict.fromkeys(row.tests))} |"
        for row in found
    ]
    return "\n".join(lines)
