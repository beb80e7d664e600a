"""`vllm-mtp train`: turn a Hugging Face causal LM into one with mask tokens. Every option of `TrainConfig` is a flag."""

import inspect
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from vllm_mtp.cli.options_file import read_options
from vllm_mtp.train.config import LossWeights, TrainConfig

EPILOG = """Examples:

    vllm-mtp train --base Qwen/Qwen3-8B --data chats.jsonl --output runs/qwen --steps 20000

    vllm-mtp train --base model/ --data src/ --prompts held_out.jsonl --output runs/code --mask-tokens 4 --rank 64

    vllm-mtp train --config run.yaml --steps 40000

    vllm-mtp train --recipe self-distill --base model/ --data problems.jsonl --output runs/distilled --mask-tokens 15

    vllm-mtp train --recipe self-distill --tuning full --base model/ --data problems.jsonl --output runs/full --mask-tokens 15

The adapter is written to OUTPUT/adapter, with --tuning full the model to OUTPUT/model. A killed run goes on from its last
checkpoint when the same command is given again. Then

    vllm-mtp inspect OUTPUT/adapter --base BASE

    vllm-mtp eval OUTPUT/adapter --base BASE --data held_out.jsonl

    vllm serve OUTPUT/adapter

say what it is and how good, and serve it.
"""
FLAGS = {"eval_data": "--prompts"}
"""Of fields that are not named as their flag."""


def train(context: typer.Context, config: Path | None, **_: Any) -> None:
    """Train mask tokens, gated LoRA and the sampler head on a frozen base model, and write the adapter; or the model whole."""
    from pydantic import ValidationError

    given = {name: context.params[name] for name in context.params if _is_given(context, name)}
    given.pop("config", None)
    loss = {name: given.pop(name) for name in LossWeights.model_fields if name in given}
    options = _read(config) if config is not None else {}
    if loss and isinstance(options.get("loss", {}), dict):
        options["loss"] = {**options.get("loss", {}), **loss}
    try:
        checked = TrainConfig.model_validate({**options, **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            _fail(f"--config {config} has an option that there is not: {'.'.join(map(str, first['loc']))}.")
        _fail(f"{_flag(first['loc'])}{first['msg']}".replace("Value error, ", ""))
    checked = _local(checked)
    if not (checked.base / "config.json").is_file():
        _fail(f"--base {checked.base} is not a model folder: it has no config.json.")
    try:
        from vllm_mtp.train.run import train
    except ImportError as error:
        _fail(f'training needs {error.name}: pip install "vllm-mtp[train]".')
    try:
        folder = train(checked)
    except (ValueError, OSError) as error:
        _fail(str(error).splitlines()[0])
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{'model' if checked.tuning == 'full' else 'adapter'} written to {folder}")


def _local(config: TrainConfig) -> TrainConfig:
    """The options with folders where they have names on the hub; the adapter goes on naming the base by its own."""
    from vllm_mtp import hub
    from vllm_mtp.safe_files import AdapterError

    try:
        folders = {"base": hub.local(config.base)}
        if config.init_adapter is not None:
            folders["init_adapter"] = hub.local(config.init_adapter)
    except AdapterError as error:
        _fail(str(error))
    name = config.base_name or (str(config.base).partition("@")[0] if folders["base"] != config.base else None)
    return config.model_copy(update={**folders, "base_name": name})


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _read(file: Path) -> dict[str, Any]:
    """The options in the file of --config."""
    try:
        return read_options(file)
    except OSError as error:
        _fail(f"--config {file}: {error.strerror}.")
    except ValueError as error:
        _fail(f"--config {error}")


def _flag(location: tuple[int | str, ...]) -> str:
    """The option that an error is about."""
    names = [str(part) for part in location if part != "loss"]
    return f"{_flag_of(names[0])} " if names else ""


def _flag_of(name: str) -> str:
    """The flag of a field."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _flags() -> Iterator[inspect.Parameter]:
    """A parameter for each option; `None` or the configuration's default stands for what is not given."""
    for model in (TrainConfig, LossWeights):
        for name, field in model.model_fields.items():
            if name == "loss":
                continue
            flag, kind = _flag_of(name), _kind(field.annotation)
            names = (flag, "--no-" + flag.removeprefix("--")) if kind is bool else (flag,)
            option = typer.Option(*names, help=_help(field), show_default=not field.is_required())
            yield inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=Annotated[_or_none(kind), option]
            )


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    return f"{text} Required here or in --config." if field.is_required() else text


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() or field.default == () else field.default


def _kind(annotation: Any) -> Any:
    """A field's type as typer takes it: without limits and None, a tuple as a list."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _kind(next(kind for kind in get_args(annotation) if kind is not type(None)))
    if get_origin(annotation) is tuple:
        return list[_kind(get_args(annotation)[0])]  # type: ignore[misc]
    return annotation


def _or_none(kind: Any) -> Any:
    return Union[kind, None]  # noqa: UP007  a type made at run time


def _signature() -> inspect.Signature:
    """What typer reads: the file, then every option."""
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    file = typer.Option(help="YAML file of options by their names, with `loss:` above the weights of the losses; flags win.")
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Union[Path, None], file],  # noqa: UP007
    )
    return inspect.Signature([context, config, *_flags()])


train.__signature__ = _signature()  # type: ignore[attr-defined]


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
