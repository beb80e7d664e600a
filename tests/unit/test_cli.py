"""The command line: quick help, what `inspect` says, figures and their layout, and errors that end it before an engine starts."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_mtp.cli.engine import EngineError, EngineProcess, Generation
from vllm_mtp.cli.main import app
from vllm_mtp.cli.measure import Comparison, compare
from vllm_mtp.cli.show import coloured, print_completion
from vllm_mtp.machine import VECTORS, machine
from vllm_mtp.outputs import Output, tokens_per_forward

from .turns import TimedEngine

runner = CliRunner()


def output(*steps: int) -> Output:
    """A completion whose forwards gave this many tokens each."""
    tokens = list(range(sum(steps)))
    return Output(tokens, list(steps), [f"<{n}>" for n in steps])


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from vllm_mtp.cli.main import app; app(['--help'], standalone_mode=False);"
    code += "print(sorted({'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert all(name in result.stdout for name in ("demo", "inspect", "train"))


def test_inspect_says_what_an_adapter_is(adapter_folder: Path, base_folder: Path) -> None:
    result = runner.invoke(app, ["inspect", str(adapter_folder), "--base", str(base_folder)])
    assert result.exit_code == 0, result.output
    for words in ("some/base", "3 layers of width 16", "rank 2, scale 0.5", "q_proj x 3", "64 mask embeddings", "training: steps"):
        assert words in result.output


def test_inspect_shows_what_a_terminal_would_obey(adapter_folder: Path) -> None:
    config = json.loads((adapter_folder / "config.json").read_text())
    training = {"command": "a\x1b[2Jb\nc", "\u202estep": 1}
    (adapter_folder / "config.json").write_text(json.dumps({**config, "training": training}))
    result = runner.invoke(app, ["inspect", str(adapter_folder)])
    assert result.exit_code == 0, result.output
    assert r"a\x1b[2Jb" in result.output
    assert r"training: \u202estep" in result.output
    assert not {"\x1b", "\u202e"} & set(result.output)


def test_inspect_ends_with_the_reason(adapter_folder: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "config.json is missing" in result.output
    (adapter_folder / "x.pkl").touch()
    result = runner.invoke(app, ["inspect", str(adapter_folder)])
    assert result.exit_code == 1
    assert "x.pkl may be a pickle file" in result.output


def test_demo_refuses_an_adapter_for_another_base_before_it_starts_an_engine(
    adapter_folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_mtp.cli.demo.EngineProcess", None)
    config = json.loads((base_folder / "config.json").read_text())
    (base_folder / "config.json").write_text(json.dumps({**config, "vocab_size": 41}))
    result = runner.invoke(app, ["demo", "--model", str(base_folder), "--adapter", str(adapter_folder)])
    assert result.exit_code == 1
    assert "vocab_size is 41 here and 40 in the adapter's" in result.output


def test_an_engine_that_dies_is_an_error_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with EngineProcess({}, tmp_path / "log") as engine, pytest.raises(EngineError, match=r"exit status 3; its log is .*log"):
        engine.wait_until_ready()
    assert (tmp_path / "log").read_text() == "no such model\n"


def test_an_engines_own_error_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"error": "ValueError: k is too large"}\'\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with EngineProcess({}, tmp_path / "log") as engine, pytest.raises(EngineError, match="k is too large"):
        engine.wait_until_ready()


def test_tokens_per_forward_counts_the_forward_that_ends_the_prompt() -> None:
    assert tokens_per_forward([output(1, 1, 1)]) == 1
    assert tokens_per_forward([output(1, 5, 3), output(1, 2)]) == 12 / 5


def test_runs_are_made_in_turns_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []
    plain, ours = TimedEngine("plain", [9, 2, 4, 2], order, output(1, 3)), TimedEngine("ours", [9, 1, 1, 2], order, output(1, 3))
    comparison = compare(plain, ours, ["a", "b"], concurrency=1, max_tokens=4, rounds=3, progress=lambda _: None)  # type: ignore[arg-type]
    assert order == ["plain", "ours"] * 4
    figures = comparison.figures()
    assert figures["runs"]["ratios"] == [2, 4, 1]
    assert (figures["ratio"], figures["ratio_range"]) == (2, [1, 4])
    assert figures["tokens_per_second"] == {"plain": 4, "ours": 8}
    assert figures["tokens_per_forward"] == {"plain": 2, "ours": 2}
    assert figures["identical"] == 2


@pytest.mark.parametrize(("limit", "pairs"), [(0.0, 2), (100.0, 2), (130.0, 3), (1000.0, 5)])
def test_on_a_slow_machine_fewer_pairs_are_run(limit: float, pairs: int) -> None:
    """Rounds take 40 seconds, the one that is not counted too."""
    plain, ours = (TimedEngine(name, [20] * 6, [], output(1, 3)) for name in ("plain", "ours"))
    comparison = compare(plain, ours, ["a"], concurrency=1, max_tokens=4, rounds=5, progress=lambda _: None, limit=limit)  # type: ignore[arg-type]
    assert len(comparison.plain) == len(comparison.ours) == pairs


def test_outputs_that_differ_are_counted() -> None:
    runs = [Generation(1, 1, [output(1), output(2)]), Generation(1, 1, [output(1), output(3)])]
    assert Comparison(1, runs[:1], runs[1:]).figures()["identical"] == 1


def test_one_at_a_time_each_domain_has_its_own_seconds() -> None:
    plain = [replace(output(*[1] * 4), seconds=seconds) for seconds in (1.0, 2.0, 4.0, 1.0)]  # code, prose, arithmetic, code
    ours = [replace(output(2, 2), seconds=1.0) for _ in plain]
    comparison = Comparison(1, [Generation(8, 16, plain)], [Generation(4, 8, ours)])
    parts = comparison.by_domain()
    assert {name: part.ratios for name, part in parts.items()} == {"code": [1.0], "prose": [2.0], "arithmetic": [4.0]}
    assert parts["code"].figures()["num_prompts"] == 2
    with pytest.raises(AssertionError, match="share their seconds"):
        Comparison(2, comparison.plain, comparison.ours).by_domain()


def test_forwards_alternate_in_colour_or_stand_between_bars() -> None:
    text = coloured(output(1, 3, 2))
    assert text.plain == "<1><3><2>"
    assert [span.style for span in text.spans] == ["cyan", "yellow", "cyan"]
    console = Console(file=io.StringIO(), width=20)
    print_completion(console, "first\nlast [bold]line", output(1, 3), prompt_lines=1)
    assert console.file.getvalue() == "last [bold]line|<1>|<3>\n"  # type: ignore[attr-defined]


def test_figures_carry_the_machine_and_the_versions() -> None:
    facts = machine()
    assert facts["cores"] >= 1
    assert facts["vectors"] in {"", *VECTORS.values()}
    assert {"torch", "vllm-mtp"} <= set(facts["versions"])
    json.dumps(facts)
