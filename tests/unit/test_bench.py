"""A benchmark: which setting is best, what is run again after a kill, and a report that shows in a browser what its JSON holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.browser import show
from vllm_mtp.bench import run as bench_run
from vllm_mtp.bench.config import PLAIN, BenchConfig, Method
from vllm_mtp.bench.report import RESULT_COLUMNS, interval, result_cells, write_report
from vllm_mtp.bench.run import COMPARE, SEARCH, BenchError, Benchmark, Setting
from vllm_mtp.cli.engine import Generation
from vllm_mtp.cli.main import app
from vllm_mtp.outputs import Output

METHODS = {
    "ours": Method(speculative={"method": "mtp", "model": "adapter"}),
    "heads": Method(speculative={"method": "medusa"}, search={"num_speculative_tokens": (1, 2, 3)}),
}
CONFIG = BenchConfig(methods=METHODS, clients=(1, 2), rounds=2, max_tokens=4, prompts_per_run=2, search_prompts_per_run=2)
SECONDS = {PLAIN: 1.0, "ours": 0.5, "heads 1": 1.2, "heads 2": 0.8, "heads 3": 2.0}
RUNS = 2 * (1 + 3) + 2 * 2 * 3  # at 2 numbers of clients: plain and 3 settings of one method, then plain and 2 methods in 2 rounds


class Killed(BaseException):
    """What ends a benchmark in the middle."""


class Engine:
    """Stands for an `EngineProcess` that takes the time which the test says; `made` counts all runs, warm-ups too."""

    made = 0
    most: int | None = None

    def __init__(self, arguments: dict[str, Any], log: Path) -> None:
        speculative = arguments.get("speculative_config", {})
        names = {"mtp": "ours", "medusa": f"heads {speculative.get('num_speculative_tokens')}"}
        self.name = names.get(speculative.get("method"), PLAIN)

    def wait_until_ready(self) -> None:
        pass

    def generate(self, prompts: Sequence[str], **_: object) -> Generation:
        if Engine.made == Engine.most:
            raise Killed
        Engine.made += 1
        steps = [1, 1, 1, 1] if self.name == PLAIN else [1, 3]
        return Generation(SECONDS[self.name], len(steps), [Output([1, 2, 3, 4], steps, ["x"] * len(steps)) for _ in prompts])

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "EngineProcess", Engine)
    monkeypatch.setattr(Engine, "made", 0)
    monkeypatch.setattr(Engine, "most", None)


def benchmark(folder: Path, config: BenchConfig = CONFIG) -> Benchmark:
    return Benchmark(config, folder, lambda *_: None)


def test_every_combination_is_a_setting() -> None:
    method = Method(speculative={"method": "x", "k": 9}, search={"k": (1, 2), "layout": ("a", "b")})
    assert [(one["k"], one["layout"]) for one in method.settings()] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert Method(speculative={"method": "x"}).settings() == [{"method": "x"}]


def test_the_fastest_setting_is_compared(tmp_path: Path) -> None:
    found = benchmark(tmp_path)
    found.run()
    assert len(found.book.done) == found.num_runs() == RUNS
    for clients in CONFIG.clients:
        best = found.best("heads", clients)
        assert best.speculative == {"method": "medusa", "num_speculative_tokens": 2}
        assert set(found.book.group(COMPARE, clients, 0.0)) == {
            Setting(PLAIN).key,
            best.key,
            Setting("ours", METHODS["ours"].speculative).key,
        }
        assert len(found.book.group(SEARCH, clients, 0.0)) == 4


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    Engine.most = 15
    with pytest.raises(Killed):
        benchmark(tmp_path).run()
    finished = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert 4 < len(finished) < RUNS
    Engine.made, Engine.most = 0, None
    again = benchmark(tmp_path)
    assert len(again.book.done) == len(finished)
    again.run()
    assert len(again.book.done) == RUNS
    assert {path: path.read_bytes() for path in finished} == finished
    Engine.made = 0
    benchmark(tmp_path).run()
    assert Engine.made == 0


def test_an_interval_is_students_around_the_geometric_mean() -> None:
    assert interval([1.5]) is None
    assert interval([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0])
    low, high = interval([1.0, 1.1, 1.21]) or [0, 0]
    assert low * high == pytest.approx(1.1**2)
    assert high / 1.1 == pytest.approx(1.1 ** (4.30 / 3**0.5), rel=1e-3)


def test_other_options_need_another_folder(tmp_path: Path) -> None:
    benchmark(tmp_path)
    with pytest.raises(BenchError, match="other options"):
        benchmark(tmp_path, CONFIG.model_copy(update={"rounds": 9}))


def test_a_browser_shows_the_figures_of_the_json(tmp_path: Path) -> None:
    training = tmp_path / "training.json"
    training.write_text(json.dumps({"tokens": 1_500_000, "steps": 300, "minutes": 7.25, "parameters": 1234}))
    config = CONFIG.model_copy(
        update={"methods": {**METHODS, "<b>heads</b>": METHODS["heads"].model_copy(update={"training": training})}}
    )
    found = benchmark(tmp_path / "bench", config)
    found.run()
    write_report(found)
    report = json.loads((tmp_path / "bench" / "report.json").read_text())
    page = show(tmp_path / "bench" / "report.html", 390)
    for clients in config.clients:
        head, *rows = page.tables[f"results-0-{clients}"]
        assert tuple(head) == RESULT_COLUMNS
        assert rows == [result_cells(row) for row in report["results"] if row["clients"] == clients]
        assert [row[:2] for row in rows] == [[PLAIN, "1.00"], ["ours", "2.00"], ["heads", "1.25"], ["<b>heads</b>", "1.25"]]
    assert page.tables["training"][1] == ["<b>heads</b>", "1,500,000", "300", "7", "1,234", "nothing"]
    chosen = [row for row in page.tables["search"] if row[-1] == "chosen"]
    assert [row[3] for row in chosen] == ["num_speculative_tokens 2"] * 4
    assert page.pictures == len(page.captions) == 4
    assert page.width <= page.window == 390  # wide tables scroll by themselves
    assert page.requests == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("methods: {}", "methods: Dictionary should have at least 1 item"),
        ("methods: {a: {speculative: {}, serch: {}}}", "methods.a.serch: Extra inputs are not permitted"),
        ("methods: {a: {speculative: {}, search: {k: []}}}", "methods.a.search: an option without values"),
        ("methods: {plain vLLM: {speculative: {}}}", "leave it out"),
        ("- a", "holds no options"),
        ("a: [", "is not YAML"),
    ],
)
def test_options_that_cannot_be_end_it_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["bench", str(file), "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert reason in " ".join(result.output.split())
    assert not (tmp_path / "out" / "runs").exists()
