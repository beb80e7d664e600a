"""The `vllm-mtp` command line. torch, vLLM and the rest are imported when a command runs, so that `--help` is quick."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_mtp.cli import eval as eval_command
from vllm_mtp.cli import train

LAYOUTS = ("quadratic", "linear")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mask-token prediction for vLLM: one forward verifies the last drafts and produces the next ones.",
)


def _folder(name: str | Path) -> str:
    """The folder of an adapter or a model, by its path or its name on the hub; ends the command where it cannot be had."""
    from vllm_mtp import hub
    from vllm_mtp.cli.show import print_error
    from vllm_mtp.safe_files import AdapterError

    try:
        return str(hub.local(name))
    except AdapterError as error:
        print_error(error)
        raise typer.Exit(1) from None


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Base model; the demo's own when left out.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter for that base: a folder or its name on the hub.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=120, help="Held-out prompts to show.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens a prompt.")] = 128,
    num_speculative_tokens: Annotated[int | None, typer.Option("--num-speculative-tokens", "-k", min=1, help="Drafts.")] = None,
    layout: Annotated[str | None, typer.Option(help="quadratic, linear or auto; the plugin's default when left out.")] = None,
    lookup: Annotated[
        bool | None, typer.Option("--lookup/--no-lookup", help="Draft from the text too, or from mask tokens alone.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pairs of runs to measure at each concurrency. Left out: 5, on a slow machine as many as two minutes hold."
        ),
    ] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Do not compile: starts sooner, runs slower.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
) -> None:
    """Complete held-out prompts with plain vLLM and with the plugin: the text, forward by forward, and the figures."""
    from vllm_mtp import demo as files
    from vllm_mtp.cli.demo import DemoOptions, run

    options = DemoOptions(
        model=model or str(files.BASE),
        adapter=_folder(adapter or files.ADAPTER),
        num_prompts=prompts,
        max_tokens=max_tokens,
        num_speculative_tokens=num_speculative_tokens,
        layout=layout,
        lookup=lookup,
        rounds=rounds,
        enforce_eager=enforce_eager,
        json_file=json_file,
    )
    raise typer.Exit(run(options))


BENCH_EPILOG = """Examples:

    vllm-mtp bench --output runs/bench

    vllm-mtp bench methods.yaml --output runs/bench

    vllm-mtp bench --model model/ --adapter runs/code/adapter --clients 1 --clients 16 --output runs/bench

    vllm-mtp bench methods.yaml --output runs/bench --report-only

A run that was killed goes on where it was when the same command is given again. The options of the file are in docs/options.md.
"""


@app.command(epilog=BENCH_EPILOG)
def bench(
    config: Annotated[Path | None, typer.Argument(help="YAML file of methods and options; left out: the demo's.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for finished runs and the report.")] = Path("runs/bench"),
    model: Annotated[str | None, typer.Option(help="Base model, instead of the file's or the demo's.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter for it, in the place of the demo's where there is no file.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Requests in flight; repeatable. Instead of the file's.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of each method, instead of the file's.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report of what is finished; run nothing.")] = False,
) -> None:
    """Compare methods of speculation on one build of vLLM: the best setting of each, in turns on the same prompts, and a report."""
    from vllm_mtp.cli.bench import run

    if config is not None and adapter is not None:
        raise typer.BadParameter("name the adapter in the file, or leave the file out", param_hint="--adapter")
    given = {"model": model, "clients": clients or None, "rounds": rounds}
    adapter = None if adapter is None else _folder(adapter)
    raise typer.Exit(run(config, output, report_only, adapter, {name: value for name, value in given.items() if value is not None}))


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter: a folder or its name on the hub.")],
    base: Annotated[Path | None, typer.Option(help="Base model to check the adapter against, likewise.")] = None,
) -> None:
    """Say what an adapter is: for which base model, how many mask tokens, its size, and how it was trained."""
    from vllm_mtp.cli.inspect import run

    raise typer.Exit(run(Path(_folder(adapter)), None if base is None else Path(_folder(base))))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Base model; the demo's own when left out.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter: a folder or its name on the hub; the demo's when left out.")] = None,
    num_speculative_tokens: Annotated[
        int | None, typer.Option("--num-speculative-tokens", "-k", min=1, help="Drafts; the adapter's when left out.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="quadratic, linear, auto, or k + 1 group lengths as in 4,4,2,0,0.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file; - is standard output.")] = None,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Compare ten decoded tokens with plain vLLM's.")] = True,
) -> None:
    """Check that this machine can serve a base with an adapter. Exit status: 0, 1 when a check failed, 2 for wrong usage."""
    from vllm_mtp import demo as files
    from vllm_mtp.cli.doctor import DoctorOptions, run

    if (model is None) != (adapter is None):
        raise typer.BadParameter("give both a base model and --adapter, or neither for the demo's")
    raise typer.Exit(
        run(
            DoctorOptions(
                model=model or str(files.BASE),
                adapter=_folder(adapter or files.ADAPTER),
                num_speculative_tokens=num_speculative_tokens,
                layout=layout,
                json_file=json_file,
                decode=decode,
            )
        )
    )


app.command(epilog=train.EPILOG)(train.train)


@app.command("eval", epilog=eval_command.EPILOG)
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter: a folder or its name on the hub.")],
    base: Annotated[Path, typer.Option(help="Base model, with its tokenizer, likewise.", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Held-out prompts, read like training data: a domain for each file or folder; repeatable.", show_default=False
        ),
    ],
    num_speculative_tokens: Annotated[
        list[int] | None, typer.Option("--num-speculative-tokens", "-k", min=1, help="Drafts; repeatable. 1 to 8 when left out.")
    ] = None,
    layout: Annotated[list[str] | None, typer.Option(help="quadratic or linear; repeatable. Both when left out.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Most prompts of a domain.")] = 48,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a text that are its prompt; a chat has its first question.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Output tokens a prompt.")] = 128,
    tau: Annotated[
        list[float] | None,
        typer.Option(min=0, help="In vLLM: accept by confidence from here on, too; repeatable. Beside the lossless outputs."),
    ] = None,
    engine: Annotated[Literal["reference", "vllm"], typer.Option(help="What decodes: plain torch, or vLLM.")] = "reference",
    dtype: Annotated[str, typer.Option(help="Of vLLM's engine; the reference has float32.")] = "bfloat16",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the figures to this file.")] = None,
) -> None:
    """Count an adapter's tokens per forward on held-out prompts, by domain and k, with acceptance by position and loops."""
    from vllm_mtp.cli.eval import EvalOptions, run

    layouts = tuple(dict.fromkeys(layout or LAYOUTS))
    if not set(layouts) <= set(LAYOUTS):
        raise typer.BadParameter(f"--layout is {' or '.join(LAYOUTS)}")
    if tau and engine != "vllm":
        raise typer.BadParameter("--tau needs --engine vllm: the reference decoder verifies every draft")
    raise typer.Exit(
        run(
            EvalOptions(
                adapter=Path(_folder(adapter)),
                base=Path(_folder(base)),
                data=tuple(data),
                budgets=tuple(sorted({*(num_speculative_tokens or ())})),
                layouts=layouts,
                prompts=prompts,
                prompt_tokens=prompt_tokens,
                max_tokens=max_tokens,
                taus=tuple(sorted({*(tau or ())})),
                engine=engine,
                dtype=dtype,
                json_file=json_file,
                plot=plot,
            )
        )
    )
