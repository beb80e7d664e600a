"""Whether two runs of one benchmark agree: the 95 % intervals overlap that they state for the ratio of each method to plain vLLM.

    python -m benchmarks.agree build/first/report.json build/second/report.json

The exit status is 1 where a method's lie apart at some number of clients: the machine was another, or the code.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_mtp.bench.config import PLAIN

Key = tuple[float, int, str]
"""Temperature, clients, method."""


def cells(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The comparisons of a report with plain vLLM, of two rounds or more."""
    rows = (row for row in report["results"] if row["method"] != PLAIN and row["ratio_interval"] is not None)
    return {(row["temperature"], row["clients"], row["method"]): row for row in rows}


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows' intervals have a number in common."""
    (low, high), (other_low, other_high) = one["ratio_interval"], other["ratio_interval"]
    return bool(low <= other_high and other_low <= high)


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[Key, bool]:
    """Of every cell that both reports have, whether they agree.

    Raises:
        ValueError: they have none in common.
    """
    first, second = cells(one), cells(other)
    found = {key: overlap(first[key], second[key]) for key in first if key in second}
    if not found:
        raise ValueError("the two reports have no method at a number of clients in common")
    return found


def table(one: dict[str, Any], other: dict[str, Any], found: dict[Key, bool]) -> str:
    """In Markdown: both ratios with their intervals."""
    lines = ["| clients | method | first | second | agree |", "|---|---|---|---|---|"]
    for key, same in found.items():
        shown = []
        for row in (cells(one)[key], cells(other)[key]):
            low, high = row["ratio_interval"]
            shown.append(f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {key[1]} | {key[2]} | {shown[0]} | {shown[1]} | {'yes' if same else 'NO'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs=2, help="report.json of two runs of `vllm-mtp bench`")
    options = parser.parse_args()
    try:
        one, other = (json.loads(path.read_text(encoding="utf-8")) for path in options.reports)
        found = compared(one, other)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"error: {error}")
    print(table(one, other, found))
    print(f"{sum(found.values())} of {len(found)} agree")
    sys.exit(not all(found.values()))


if __name__ == "__main__":
    main()
