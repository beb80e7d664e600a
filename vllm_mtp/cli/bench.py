"""`vllm-mtp bench`: methods of speculation side by side on one build of vLLM, and a report."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_mtp import demo
from vllm_mtp.bench.config import PLAIN, BenchConfig
from vllm_mtp.cli.show import print_error, print_table

DEFAULT: dict[str, Any] = {
    "methods": {
        "vllm-mtp": {"speculative": {"method": "mtp", "model": str(demo.ADAPTER), "num_speculative_tokens": 4, "layout": "auto"}},
        "n-gram": {
            "speculative": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
            "search": {"num_speculative_tokens": [2, 4]},
        },
    }
}


def read_config(file: Path | None) -> BenchConfig:
    """The options in a YAML file, or the demo's.

    Raises:
        ValueError: the file is not YAML or has an option that there is not.
        OSError: it cannot be read.
    """
    if file is None:
        return BenchConfig.model_validate(DEFAULT)
    import yaml

    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} holds no options: write `name: value` in each line.")
    return BenchConfig.model_validate(options)


def run(file: Path | None, output: Path, report_only: bool) -> int:
    """Run the benchmark; the exit status."""
    from pydantic import ValidationError

    from vllm_mtp.bench.report import RESULT_COLUMNS, result_cells, write_report
    from vllm_mtp.bench.run import Benchmark
    from vllm_mtp.cli.engine import EngineError

    try:
        config = read_config(file)
        shown = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        )
        task = shown.add_task("", total=None)

        def progress(done: int, total: int, what: str) -> None:
            shown.update(task, completed=done, total=total, description=what)
            if not shown.console.is_terminal:
                shown.console.print(f"{done} of {total}  {what}", markup=False, highlight=False, soft_wrap=True)

        benchmark = Benchmark(config, output, progress)
        if not report_only:
            with shown:
                benchmark.run()
        report = write_report(benchmark)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        print_error(ValueError(f"{file}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"))
        return 1
    except (EngineError, ValueError, OSError, json.JSONDecodeError) as error:
        print_error(error)
        return 1
    for temperature in config.temperatures:
        for clients in config.clients:
            rows = [row for row in report["results"] if (row["temperature"], row["clients"]) == (temperature, clients)]
            print_table(
                Console(highlight=False), f"{clients} clients, temperature {temperature:g}", ["", *RESULT_COLUMNS[1:]],
                [result_cells(row) for row in rows if row["method"] != PLAIN],
            )  # fmt: skip
    print(f"report: {output / 'report.html'}, figures: {output / 'report.json'}")
    return 0
