"""Write the README's figures from the files that the two measuring commands wrote, so that none is copied by hand.

vllm-mtp demo --json demo.json
python -m benchmarks.acceptance --output acceptance.json
python -m benchmarks.readme_figures --demo demo.json --acceptance acceptance.json README.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.acceptance import table

BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def demo_section(report: dict[str, Any]) -> str:
    """What `vllm-mtp demo` measured."""
    speculative, machine = report["speculative_config"], report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    layout = f", layout {speculative['layout']}" if "layout" in speculative else ""
    rounds = len(report["comparisons"][0]["runs"]["ratios"])
    mode = "eager" if report["options"]["enforce_eager"] else "compiled"
    lines = [
        f"Measured by `vllm-mtp demo` with k = {speculative['num_speculative_tokens']}{layout}, greedy, at most "
        f"{report['options']['max_tokens']} tokens a prompt, bfloat16, {mode}; medians of {rounds} pairs of runs in turns. "
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s) an engine, no GPU; "
        f"Python {machine['python']}, {versions}.",
        "",
        "| | plain vLLM | vllm-mtp | ratio (lowest to highest pair) |",
        "|---|---|---|---|",
    ]
    for figures in report["comparisons"]:
        clients = "1 client" if figures["concurrency"] == 1 else f"{figures['concurrency']} clients"
        forward, second = figures["tokens_per_forward"], figures["tokens_per_second"]
        low, high = figures["ratio_range"]
        lines.append(f"| tokens a forward, {clients} | {forward['plain']:.2f} | {forward['ours']:.2f} | |")
        lines.append(
            f"| output tokens a second, {clients} | {second['plain']:.0f} | {second['ours']:.0f} |"
            f" {figures['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
        )
        lines.append(f"| same tokens as plain in bfloat16, {clients} | | {figures['identical']} of {figures['num_prompts']} | |")
    exact = report["float32"]
    lines.append(f"| same tokens as plain in float32 | | {exact['identical']} of {exact['num_prompts']} | |")
    return "\n".join(lines)


def acceptance_section(report: dict[str, Any]) -> str:
    """What `benchmarks.acceptance` counted."""
    return (
        f"Tokens a forward, counted by `python -m benchmarks.acceptance` over {report['num_prompts']} held-out prompts, at most "
        f"{report['max_tokens']} tokens each (in brackets: outputs). An output loops when some 8 tokens in a row occur three times "
        "in it, and is novel up to where 8 tokens in a row occur for the second time; small models loop when greedy, and loops are "
        "easy to draft.\n\n" + table(report["rows"])
    )


def replaced(readme: str, figures: str) -> str:
    """The README with `figures` between its two marks; ValueError when it does not have both."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + begin + figures + "\n" + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--acceptance", type=Path, required=True)
    parser.add_argument("readme", type=Path)
    options = parser.parse_args()
    sections = (demo_section(json.loads(options.demo.read_text())), acceptance_section(json.loads(options.acceptance.read_text())))
    options.readme.write_text(replaced(options.readme.read_text(), "\n\n".join(sections)))


if __name__ == "__main__":
    main()
