"""`vllm-mtp train`: turn a Hugging Face causal LM into one with mask tokens; options become a `TrainConfig`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

EPILOG = """Examples:

    vllm-mtp train --base Qwen3-8B/ --data texts.jsonl --output runs/qwen --steps 20000

    vllm-mtp train --base model/ --data src/ --prompts held_out.jsonl --output runs/code --mask-tokens 4 --rank 64

The adapter is written to OUTPUT/adapter. A killed run goes on from its last checkpoint when the same command is given again.
"""


def train(
    base: Annotated[Path, typer.Option(help="Folder of the base model, with its tokenizer.", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(
            help='A text file, a .jsonl file with {"text": ..} in each line, or a folder of them; repeatable.', show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the adapter.", show_default=False)],
    base_name: Annotated[str | None, typer.Option(help="Hub name that the adapter gives for its base.")] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Held-out prompts, read like the data, to count tokens per forward on.")
    ] = None,
    mask_tokens: Annotated[int, typer.Option(help="k, the most drafts that the adapter can give.")] = 8,
    rank: Annotated[int, typer.Option(help="LoRA's rank.")] = 32,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    groups: Annotated[int, typer.Option(help="Groups of mask tokens a sequence, behind random rows.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="AdamW's peak rate; linear decay after the warm-up.")] = 1e-3,
    targets: Annotated[
        str, typer.Option(help="Mask rows learn the base's distribution, its argmax, or the text.")
    ] = "distribution",
    plain_head: Annotated[float, typer.Option(help="Weight of the plain head's loss.")] = 1.0,
    sampler_head: Annotated[float, typer.Option(help="Weight of the sampler head's loss.")] = 1.0,
    consistency: Annotated[float, typer.Option(help="Weight of (real - mask)^2 between states.")] = 1.0,
    position_decay: Annotated[float, typer.Option(help="Mask token i counts this to the power of i - 1.")] = 1.0,
    on_policy: Annotated[float, typer.Option(help="Share of sequences that the base continued itself.")] = 0.5,
    on_policy_sequences: Annotated[int, typer.Option(help="How many such sequences to generate first.")] = 4096,
    on_policy_engine: Annotated[str, typer.Option(help="What continues them: vllm, transformers, or auto.")] = "auto",
    init_adapter: Annotated[Path | None, typer.Option(help="Start from this adapter instead of from nothing.")] = None,
    sampler: Annotated[bool, typer.Option(help="Train a sampler head.")] = True,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: minutes to start, then a third faster.")] = False,
    eval_steps: Annotated[int | None, typer.Option(help="Evaluate every so many steps, not only at the end.")] = None,
    save_steps: Annotated[int, typer.Option(help="Write a checkpoint every so many steps.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = 0,
) -> None:
    """Train mask tokens, gated LoRA and the sampler head on a frozen base model, and write the adapter."""
    options = dict(locals())
    options["loss"] = {name: options.pop(name) for name in ("plain_head", "sampler_head", "consistency", "position_decay")}
    options |= {"data": tuple(data), "eval_data": tuple(options.pop("prompts") or ())}

    from pydantic import ValidationError

    from vllm_mtp.train.config import TrainConfig

    try:
        config = TrainConfig.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "--" + ".".join(map(str, first["loc"])).replace("_", "-") + " " if first["loc"] else ""
        _fail(f"{name}{first['msg']}".replace("Value error, ", ""))
    if not (config.base / "config.json").is_file():
        _fail(f"--base {config.base} is not a model folder: it has no config.json.")
    try:
        from vllm_mtp.train.run import train
    except ImportError as error:
        _fail(f'training needs {error.name}: pip install "vllm-mtp[train]".')
    try:
        typer.echo(f"adapter written to {train(config)}")
    except (ValueError, OSError) as error:
        _fail(str(error).splitlines()[0])


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
