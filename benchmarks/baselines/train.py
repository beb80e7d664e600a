"""Train a baseline for a base model, on what an adapter for it was trained on.

    python -m benchmarks.baselines.train eagle --base runs/mixed/model --data runs/mixed-adapter --output runs/eagle --minutes 30

The checkpoint goes to OUTPUT/METHOD with `training.json` beside the weights: tokens, steps, minutes, parameters, losses, options
and the speculative configuration that serves it. Training ends with the first of `--steps`, `--tokens` and `--minutes`, and the
learning rate falls towards it; a killed run goes on from its last checkpoint when the same command is given again.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from benchmarks.baselines.data import sequences, unused_token
from benchmarks.baselines.draft import Draft, ParallelDraft
from benchmarks.baselines.drafter import Drafter
from benchmarks.baselines.eagle import Eagle, Eagle3
from benchmarks.baselines.medusa import Medusa
from vllm_mtp.train.documents import DataError
from vllm_mtp.train.on_policy import end_tokens
from vllm_mtp.train.run import computes_in_bf16
from vllm_mtp.train.trainer import MaskTrainer, last_checkpoint
from vllm_mtp.whole_files import write_whole

METHODS: dict[str, type[Drafter]] = {"eagle": Eagle, "eagle3": Eagle3, "medusa": Medusa, "draft": Draft, "pard": ParallelDraft}
LEARNING_RATES = {"eagle": 1e-3, "eagle3": 1e-3, "medusa": 1e-3, "draft": 3e-3, "pard": 3e-3}
WARMUP_STEPS, FINAL_LEARNING_RATE = 50, 0.05  # as the adapter's
BUDGET = "budget.json"


@dataclass
class Limits:
    """Where training ends: at the first that is reached. At least one is set."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None


class Budget(TrainerCallback):
    """Counts tokens and seconds, and ends training at a limit."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_tokens, self.seconds, self.since = 0, 0.0, 0.0

    def done(self, steps: int) -> float:
        """Share of the budget that is used up after so many steps."""
        limits = self.limits
        parts = ((steps, limits.steps), (self.num_tokens, limits.tokens), (self.seconds / 60, limits.minutes))
        return min(1.0, max(used / limit for used, limit in parts if limit))

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.since = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        if self.done(state.global_step) >= 1:
            control.should_training_stop = control.should_save = control.should_log = True


class BaselineTrainer(MaskTrainer):
    """Counts the tokens of each step's sequences; a checkpoint keeps the counts."""

    def __init__(self, *args: Any, budget: Budget, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[budget], **kwargs)
        self.budget = budget

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.num_tokens += int(inputs["lengths"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        counts = {"num_tokens": self.budget.num_tokens, "seconds": self.budget.seconds}
        (Path(output_dir or str(self.args.output_dir)) / BUDGET).write_text(json.dumps(counts))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        vars(self.budget).update(json.loads((Path(resume_from_checkpoint) / BUDGET).read_text()))


def train(
    method: str,
    base_folder: Path,
    data: list[Path],
    output: Path,
    limits: Limits,
    *,
    init: Path | None = None,
    learning_rate: float | None = None,
    options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    bf16: bool | None = None,
    compiled: bool = False,
    log_steps: int = 50,
    save_steps: int = 500,
) -> Path:
    """Train a baseline and write it to `output / method`.

    Args:
        method: one of `METHODS`.
        base_folder: the base with its tokenizer.
        data: as `benchmarks.baselines.data.sequences` takes it.
        output: folder for checkpoints; one that holds some is gone on with.
        limits: where to end.
        init: start from this drafter of the same method and shape, as an adapter's run may from an adapter.
        learning_rate: AdamW's highest.
        options: of the method's class.
        data_options: of the sequences: length, batch_size, on_policy, seed.
        bf16: as of `TrainConfig`.
        compiled: torch.compile.
        log_steps, save_steps: as of `TrainConfig`.

    Raises:
        DataError: the data or the limits cannot be used.
        ValueError: the method is not for this base.
    """
    if not any(vars(limits).values()):
        raise DataError("Training needs an end: give steps, tokens or minutes.")
    options, cuda, bf16 = dict(options or {}), torch.cuda.is_available(), computes_in_bf16(bf16)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    if not cuda:
        base.set_attn_implementation("eager")  # the faster one on a CPU at these lengths
    dataset = sequences(data, base_folder, output, tokenizer, end_tokens(tokenizer, base.generation_config), data_options or {})
    torch.manual_seed(dataset.config.seed)
    if METHODS[method] is ParallelDraft:
        options.setdefault("mask_token", unused_token(dataset, base.config.vocab_size))
    model = METHODS[method](base, **options)
    if init is not None:
        model.load(init)
    rate = learning_rate or LEARNING_RATES[method]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)

    budget = Budget(limits)

    def factor(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 1 - (1 - FINAL_LEARNING_RATE) * budget.done(step))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batch = dataset.config.batch_size
    trainer = BaselineTrainer(
        model,
        TrainingArguments(
            output_dir=str(output),
            max_steps=limits.steps or dataset.config.steps,
            per_device_train_batch_size=batch,
            bf16=bf16,
            use_cpu=not cuda,
            torch_compile=compiled,
            max_grad_norm=1.0,
            logging_steps=log_steps,
            save_steps=save_steps,
            save_total_limit=1,
            seed=dataset.config.seed,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=dataset,
        optimizers=(optimizer, schedule),
        budget=budget,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output) if output.exists() else None)

    folder, last = output / method, next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    model.save(folder)
    figures = {
        "method": method,
        "base": str(base_folder),
        "tokens": budget.num_tokens,
        "steps": trainer.state.global_step,
        "minutes": round(budget.seconds / 60, 4),
        "before": json.loads((init / "training.json").read_text()) if init else None,
        "parameters": {
            "trained": sum(tensor.numel() for tensor in model.trainable().values()),
            "stored": sum(tensor.numel() for tensor in model.tensors().values()),
            "base": sum(parameter.numel() for parameter in base.parameters()),
        },
        "final_losses": {name: last[name] for name in last if name in ("loss", "feature") or name.startswith("ce_")},
        "method_options": {**_defaults(METHODS[method]), **options},
        "options": {
            **{name: getattr(dataset.config, name) for name in ("length", "batch_size", "on_policy", "seed")},
            **{"learning_rate": rate, "bf16": bf16, "compiled": compiled, "limits": vars(limits)},
            "data": [str(path) for path in data],
        },
        "max_drafts": model.max_drafts,
        "speculative_config": model.speculative_config(folder, min(4, model.max_drafts or 4)),
        "versions": {package.__name__: package.__version__ for package in (torch, transformers)},
    }
    write_whole(folder / "training.json", json.dumps(figures, indent=2) + "\n")
    return folder


def _defaults(kind: type[Drafter]) -> dict[str, Any]:
    """Options of a method and of what it is built on."""
    parameters = [
        parameter for base in kind.__mro__ if "__init__" in vars(base) for parameter in signature(base).parameters.values()
    ]
    return {p.name: p.default for p in reversed(parameters) if p.default is not p.empty}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model, with its tokenizer")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        action="append",
        help="output folder of an adapter's run, or texts and on_policy.safetensors files; repeatable",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints; the drafter goes to OUTPUT/METHOD")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tokens", type=int, help="tokens of the sequences seen, padding left out")
    parser.add_argument("--minutes", type=float, help="wall-clock of the training's steps")
    parser.add_argument("--init", type=Path, help="start from this drafter of the same method and shape")
    parser.add_argument("--learning-rate", type=float, help=f"AdamW's highest; {LEARNING_RATES}")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options of the method's class")
    parser.add_argument("--data-options", type=json.loads, default={}, help="JSON: length, batch_size, on_policy, seed")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--save-steps", type=int, default=500)
    options = parser.parse_args()
    folder = train(
        options.method,
        options.base,
        options.data,
        options.output,
        Limits(options.steps, options.tokens, options.minutes),
        init=options.init,
        learning_rate=options.learning_rate,
        options=options.options,
        data_options=options.data_options,
        compiled=options.compile,
        save_steps=options.save_steps,
    )
    print((folder / "training.json").read_text())


if __name__ == "__main__":
    main()
