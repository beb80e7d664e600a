"""`vllm-mtp eval`: how good an adapter is, by domain and number of drafts, in the reference decoder or in vLLM."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vllm_mtp.cli.engine import EngineError, EngineProcess
from vllm_mtp.cli.show import print_error, print_table
from vllm_mtp.machine import machine
from vllm_mtp.outputs import Output, agreement, figures
from vllm_mtp.whole_files import whole, write_whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EPILOG = """Examples:

    vllm-mtp eval runs/mine/adapter --base BASE_FOLDER --data held_out.jsonl

    vllm-mtp eval runs/mine/adapter --base BASE_FOLDER --data code/ --data maths.jsonl --json eval.json --plot eval.png

    vllm-mtp eval runs/mine/adapter --base BASE_FOLDER --data held_out.jsonl --engine vllm -k 2 -k 4

    vllm-mtp eval runs/mine/adapter --base BASE_FOLDER --data held_out.jsonl --engine vllm -k 8 --tau 0.7 --tau 0.9

The reference decoder runs in float32 and needs the packages that training needs. In vLLM an engine starts for each layout and k.
"""
MAX_DRAFTS = 8
CONCURRENCY = 16
AVERAGE = "average"
LOSSLESS = 2.0
"""A threshold that no probability reaches."""


@dataclass(frozen=True)
class EvalOptions:
    """What the command line asked for; `vllm-mtp eval --help` says what each is."""

    adapter: Path
    base: Path
    data: tuple[Path, ...]
    budgets: tuple[int, ...]
    layouts: tuple[str, ...]
    prompts: int
    prompt_tokens: int
    max_tokens: int
    taus: tuple[float, ...]
    engine: str
    dtype: str
    json_file: Path | None
    plot: Path | None


@dataclass(frozen=True)
class Domain:
    """Prompts of one file or folder."""

    name: str
    prompts: "list[Tensor]"


def run(options: EvalOptions) -> int:
    """Evaluate; the exit status: 1 when something cannot be read or an engine failed."""
    from vllm_mtp.adapter import validate_folder

    out, say = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        config = validate_folder(options.adapter, options.base)
        most = config.num_mask_tokens
        budgets = options.budgets or tuple(range(1, min(most, MAX_DRAFTS) + 1))
        if not 1 <= min(budgets) <= max(budgets) <= most:
            raise ValueError(f"-k is to be from 1 to {most}, the adapter's number of mask tokens.")

        def tell(line: str) -> None:
            say.print(line, markup=False, soft_wrap=True)

        measure = _in_vllm if options.engine == "vllm" else _in_reference
        report = _report(options, *measure(options, budgets, tell))
        if options.json_file is not None:
            write_whole(options.json_file, json.dumps(report, indent=2) + "\n")
        if options.plot is not None:
            _plot(report, options.plot)
    except ImportError as error:
        print_error(ValueError(f'eval needs {error.name}: pip install "vllm-mtp[train]".'))
        return 1
    except (ValueError, OSError, EngineError) as error:
        print_error(error)
        return 1
    print_report(out, report)
    return 0


# -- measuring ---------------------------------------------------------------------------------------------------------

Rows = dict[str, list[dict[str, Any]]]
"""Of each domain the rows `layout`, `head`, `k` and `figures`, or those of `_thresholds`."""


def _domains(options: EvalOptions, tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int]) -> list[Domain]:
    """A domain for each file or folder given, named as it is; by its whole path where two have one name."""
    from vllm_mtp.train.data import first_prompts
    from vllm_mtp.train.documents import BadLines, DataError, read_documents

    short = [path.stem if path.is_file() else path.resolve().name for path in options.data]
    domains = []
    for path, name in zip(options.data, short, strict=True):
        bad = BadLines()
        documents = read_documents((path,), bad)[: options.prompts]
        prompts = first_prompts(tokenizer, documents, options.prompt_tokens, ends, bad)
        bad.report(str(path))
        if not prompts:
            raise DataError(f"{path} has no prompt.")
        domains.append(Domain(name if short.count(name) == 1 else str(path), prompts))
    return domains


def _in_reference(options: EvalOptions, budgets: Sequence[int], say: Callable[[str], None]) -> tuple[Rows, Rows]:
    from transformers import AutoTokenizer

    from vllm_mtp.train.evaluate import decoded
    from vllm_mtp.train.export import from_adapter
    from vllm_mtp.train.on_policy import continue_prompts, end_tokens

    tokenizer, model = AutoTokenizer.from_pretrained(options.base), from_adapter(options.base, options.adapter)
    ends = end_tokens(tokenizer, model.base.generation_config)
    rows: Rows = {}
    for domain in _domains(options, tokenizer, ends):
        say(f"{domain.name}: {len(domain.prompts)} prompts")
        texts = continue_prompts(model.base, domain.prompts, options.max_tokens, ends)
        outputs = decoded(model, texts, [len(prompt) for prompt in domain.prompts], budgets, options.layouts)
        rows[domain.name] = [{**how._asdict(), "figures": figures(some)} for how, some in outputs.items()]
    return rows, {}


def _served_domains(options: EvalOptions) -> list[Domain]:
    from transformers import AutoTokenizer, GenerationConfig

    from vllm_mtp.train.on_policy import end_tokens

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    try:
        settings = GenerationConfig.from_pretrained(options.base)
    except OSError:  # a base without
        settings = None
    return _domains(options, tokenizer, end_tokens(tokenizer, settings))


def _in_vllm(options: EvalOptions, budgets: Sequence[int], say: Callable[[str], None]) -> tuple[Rows, Rows]:
    from vllm_mtp.adapter import read_config

    domains = _served_domains(options)
    head = "sampler" if read_config(options.adapter).sampler else "plain"
    rows: Rows = {domain.name: [] for domain in domains}
    folder = Path(tempfile.mkdtemp(prefix="vllm-mtp-eval-"))
    for layout in options.layouts:
        for k in budgets:
            say(f"vLLM, {layout}, k = {k}")
            with EngineProcess(_engine_args(options, layout, k), folder / f"{layout}-{k}.log") as engine:
                engine.wait_until_ready()
                for domain in domains:
                    found = _complete(engine, domain, options.max_tokens)
                    rows[domain.name].append({"layout": layout, "head": head, "k": k, "figures": figures(found)})
    return rows, _thresholds(options, domains, max(budgets), say) if options.taus else {}


def _thresholds(options: EvalOptions, domains: Sequence[Domain], k: int, say: Callable[[str], None]) -> Rows:
    """Of each domain the rows `tau`, `k`, `figures` and `agreement`, the lossless one first, whose `tau` is None.

    Drafts are accepted by confidence, quadratic; requests say from where on.
    """
    args = _engine_args(options, "quadratic", k)
    args["speculative_config"] |= {"acceptance": "confidence", "tau": LOSSLESS}
    log, rows = Path(tempfile.mkdtemp(prefix="vllm-mtp-eval-")) / "confidence.log", {}
    say(f"vLLM, acceptance by confidence, k = {k}")
    with EngineProcess(args, log) as engine:
        engine.wait_until_ready()
        for domain in domains:
            runs = {tau: _complete(engine, domain, options.max_tokens, tau) for tau in (None, *options.taus)}
            rows[domain.name] = [
                {"tau": tau, "k": k, "figures": figures(some), "agreement": agreement(some, runs[None])}
                for tau, some in runs.items()
            ]
    return rows


def _engine_args(options: EvalOptions, layout: str, k: int) -> dict[str, Any]:
    return {
        "model": str(options.base),
        "dtype": options.dtype,
        "enforce_eager": True,
        "max_num_seqs": CONCURRENCY,
        "disable_log_stats": True,
        "speculative_config": {"method": "mtp", "model": str(options.adapter), "num_speculative_tokens": k, "layout": layout},
    }


def _complete(engine: EngineProcess, domain: Domain, max_tokens: int, tau: float | None = None) -> list[Output]:
    prompts, asked = [prompt.tolist() for prompt in domain.prompts], None if tau is None else {"mtp_tau": tau}
    return engine.generate(prompts, max_tokens=max_tokens, concurrency=CONCURRENCY, extra_args=asked).outputs


# -- reporting ---------------------------------------------------------------------------------------------------------


def _report(options: EvalOptions, rows: Rows, thresholds: Rows) -> dict[str, Any]:
    return {
        "command": shlex.join(["vllm-mtp", *sys.argv[1:]]),
        "machine": machine(),
        "adapter": str(options.adapter),
        "base": str(options.base),
        "engine": options.engine,
        "dtype": options.dtype if options.engine == "vllm" else "float32",
        "max_tokens": options.max_tokens,
        "domains": rows,
        **({"thresholds": thresholds} if thresholds else {}),
    }


def tokens_per_forward(report: dict[str, Any], domain: str, layout: str, head: str, k: int, part: str = "all") -> float | None:
    """Tokens of each forward after the prompt's; None where no output has one, or where it was not measured.

    `domain` may be `average`: the mean of the domains that have it.
    """
    found = []
    for name in report["domains"] if domain == AVERAGE else [domain]:
        for row in report["domains"][name]:
            value = row["figures"][part]["acceptance_length"]
            if (row["layout"], row["head"], row["k"]) == (layout, head, k) and value is not None:
                found.append(value)
    return sum(found) / len(found) if found else None


def _ways(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Layouts and heads that were measured."""
    first = next(iter(report["domains"].values()))
    return list(dict.fromkeys((row["layout"], row["head"]) for row in first))


def _budgets(report: dict[str, Any]) -> list[int]:
    return sorted({row["k"] for row in next(iter(report["domains"].values()))})


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_report(out: Console, report: dict[str, Any]) -> None:
    """Tables of tokens per forward, of loops, and of acceptance by position."""
    budgets, domains, ways = _budgets(report), list(report["domains"]), _ways(report)
    means = [*domains, *([AVERAGE] if len(domains) > 1 else [])]
    for layout, head in ways:
        rows = []
        for domain in means:
            for part in ("all", "novel"):
                values = [tokens_per_forward(report, domain, layout, head, k, part) for k in budgets]
                rows.append([domain if part == "all" else "", part, *map(_cell, values)])
        print_table(out, f"Tokens per forward by k, {layout}, {head} head", ["", "", *map(str, budgets)], rows)
    rows = []
    for domain in domains:
        first = report["domains"][domain][0]["figures"]
        share = first["looping"]["outputs"] / first["all"]["outputs"]
        mean = first["all"]["output_tokens"] / first["all"]["outputs"]
        rows.append([domain, str(first["all"]["outputs"]), f"{mean:.0f}", f"{share:.0%}"])
    print_table(out, "Outputs", ["", "outputs", "mean tokens", "loop"], rows)
    ended = [domain for domain in domains if report["domains"][domain][0]["figures"]["all"]["acceptance_length"] is None]
    if ended:
        out.print(
            f"Every output of {', '.join(ended)} ends with its first token, so that no forward is counted. Texts are prompts up to "
            "--prompt-tokens: where they end before that, ask for fewer.",
            soft_wrap=True,
        )
    if any(layout == "quadratic" for layout, _ in ways):
        print_table(
            out,
            f"Share of forwards that accept draft i and those before it, {', '.join(_best(report))} head, k = {budgets[-1]}",
            ["", *(f"{i + 1}" for i in range(budgets[-1]))],
            [[domain, *(f"{share:.0%}" for share in positions(report, domain))] for domain in domains],
        )
    if "thresholds" in report:
        _print_thresholds(out, report["thresholds"])
    out.print(
        "The prompt's own forward is not counted. An output loops when some 8 tokens in a row occur three times in it, and is novel"
        " up to where 8 in a row occur for the second time.",
        soft_wrap=True,
    )


def _print_thresholds(out: Console, thresholds: Rows) -> None:
    rows = []
    for domain, of_domain in thresholds.items():
        for row in of_domain:
            shares = [f"{share:.0%}" for share in row["agreement"].values()]
            begin = [domain if row["tau"] is None else "", "lossless" if row["tau"] is None else f"{row['tau']:g}"]
            rows.append([*begin, _cell(row["figures"]["all"]["acceptance_length"]), *shares])
    k = next(iter(thresholds.values()))[0]["k"]
    columns = ["", "tau", "tokens per forward", "same outputs", "tokens before the first difference"]
    print_table(out, f"Accepted by confidence, quadratic, k = {k}, beside the lossless outputs", columns, rows)


def _best(report: dict[str, Any]) -> tuple[str, str]:
    """The layout and head of the plot and of positions: quadratic and the sampler head, where they were measured."""
    return next(iter(sorted(_ways(report), key=lambda way: (way[0] != "quadratic", way[1] != "sampler"))))


def positions(report: dict[str, Any], domain: str) -> list[float]:
    """Share of forwards that accept draft i and those before, for i from 1 to the largest k."""
    layout, head = _best(report)
    k = _budgets(report)[-1]
    (row,) = (row for row in report["domains"][domain] if (row["layout"], row["head"], row["k"]) == (layout, head, k))
    found = row["figures"]["all"]["acceptance_by_position"]
    return found + [0.0] * (k - len(found))


def _plot(report: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    budgets, (_, head) = _budgets(report), _best(report)
    panels = 3 if "thresholds" in report else 2
    figure = Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    left, right, *last = figure.subplots(1, panels)
    for number, domain in enumerate(report["domains"]):
        for layout, style in (("quadratic", "-"), ("linear", "--")):
            if (layout, head) in _ways(report):
                values = [tokens_per_forward(report, domain, layout, head, k) or float("nan") for k in budgets]
                left.plot(budgets, values, style, color=f"C{number}", marker="o", markersize=3, label=f"{domain}, {layout}")
        right.plot(range(1, budgets[-1] + 1), positions(report, domain), color=f"C{number}", marker="o", markersize=3, label=domain)
    left.set(title=f"Tokens per forward, {head} head", xlabel="k, drafts a group")
    right.set(title=f"Acceptance by position, {_best(report)[0]}, k = {budgets[-1]}", xlabel="draft", ylim=(0, 1))
    for axes in last:
        for number, (domain, rows) in enumerate(report["thresholds"].items()):
            lengths = [row["figures"]["all"]["acceptance_length"] or float("nan") for row in rows]
            left_over = [row["agreement"]["tokens_before_the_first_difference"] for row in rows]
            axes.plot(lengths, left_over, color=f"C{number}", marker="o", markersize=3, label=domain)
            for row, x, y in zip(rows, lengths, left_over, strict=True):
                tau = "lossless" if row["tau"] is None else f"{row['tau']:g}"
                axes.annotate(tau, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set(title="Accepted by confidence, by tau", xlabel="tokens per forward", ylabel="tokens before the first difference")
    for axes in (left, right, *last):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    with whole(file) as part:
        figure.savefig(part, format="png", dpi=120)
