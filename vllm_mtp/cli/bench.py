"""`vllm-mtp bench`: methods of speculation side by side on one build of vLLM, and a report."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_mtp import demo
from vllm_mtp.bench.config import PLAIN, BenchConfig
from vllm_mtp.cli.options_file import read_options
from vllm_mtp.cli.show import print_error, print_table


def default_methods(adapter: str) -> dict[str, Any]:
    """What is compared where no file says it: this package, and vLLM's n-gram lookup, which needs no training."""
    return {
        "vllm-mtp": {"speculative": {"method": "mtp", "model": adapter}},
        "n-gram": {
            "speculative": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
            "search": {"num_speculative_tokens": [2, 4]},
        },
    }


def run(file: Path | None, output: Path, report_only: bool, adapter: str | None, given: dict[str, Any]) -> int:
    """Run the benchmark of a file, or of the demo's methods; the exit status.

    Args:
        file: YAML of `BenchConfig`.
        output: folder for finished runs and the report.
        report_only: run nothing.
        adapter: instead of the demo's, where there is no file.
        given: options that count instead of the file's.
    """
    from pydantic import ValidationError

    from vllm_mtp.bench.report import RESULT_COLUMNS, result_cells, write_report
    from vllm_mtp.bench.run import Benchmark
    from vllm_mtp.cli.engine import EngineError

    try:
        options = read_options(file) if file is not None else {"methods": default_methods(adapter or str(demo.ADAPTER))}
        config = BenchConfig.model_validate({**options, **given})
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
        print_error(ValueError(f"{file or 'options'}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"))
        return 1
    except (EngineError, ValueError, OSError) as error:
        print_error(error)
        return 1
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file has no width, and names would be broken at 80
    for temperature in config.temperatures:
        for clients in config.clients:
            rows = [row for row in report["results"] if (row["temperature"], row["clients"]) == (temperature, clients)]
            title = f"{clients} client{'s' if clients > 1 else ''}, temperature {temperature:g}"
            cells = [result_cells(row) for row in rows if row["method"] != PLAIN]
            print_table(console, title, ["", *RESULT_COLUMNS[1:]], cells)
    print(f"report: {output / 'report.html'}, figures: {output / 'report.json'}")
    return 0
