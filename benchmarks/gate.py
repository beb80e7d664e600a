"""What the gate is worth: an adapter trained with it, and plain LoRA, which works on real rows too, trained the same way.

    python -m benchmarks.gate --output runs/gate --results benchmarks/results

The demo's base and its three domains, the same sequences, steps and rank for all. While they train, held-out text is read and
held-out arithmetic is solved with them: the share of tokens that the model predicts first, and of right answers. With the gate
both are the base's own, and at the end its logits are compared bit by bit. Plain LoRA learns twice: from mask rows alone, as the
gated one does, and from real rows too, as in *Your LLM Knows the Future*.

Writes gate.json and gate.png after every run. Killed, the same command goes on with the run that it was in.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.demo_model import arithmetic
from benchmarks.demo_model.corpus import documents
from benchmarks.demo_model.train_adapter import MIXTURE
from vllm_mtp import demo
from vllm_mtp.causal_lm import unembedding
from vllm_mtp.machine import machine
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.data import Sequences, read_corpus
from vllm_mtp.train.documents import BadLines, Document
from vllm_mtp.train.model import MaskedModel, read, shared_copy
from vllm_mtp.train.on_policy import continue_prompts, end_tokens
from vllm_mtp.whole_files import whole, write_whole

RUNS = {"gated LoRA": None, "plain LoRA": 0.0, "plain LoRA, real rows too": 1.0}
"""What the loss of real rows counts; None: the gate keeps them as they are."""
SAME = "logits are the base's"
CHARACTERS, WINDOW = 6_000_000, 256
SHAPE: dict[str, Any] = {"length": 160, "groups": 16, "batch_size": 4, "rank": 16, "targets": "text", "on_policy": 0.0}


class UngatedModel(MaskedModel):
    """The same with LoRA in all rows.

    Args:
        base, config: as of `MaskedModel`.
        real_rows: what the cross-entropy of real rows counts.
    """

    def __init__(self, base: PreTrainedModel, config: TrainConfig, real_rows: float) -> None:
        super().__init__(base, config)
        self.opened = shared_copy(self.student.get_base_model())  # type: ignore[arg-type]
        self.opened.set_attn_implementation("sdpa")
        self.real_rows = real_rows

    def read_real(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return read(self.opened, input_ids)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        losses = super().forward(input_ids, *args, **kwargs)
        if self.real_rows:
            real = self.read_real(input_ids)[0][:, :-1]
            losses["loss"] = losses["loss"] + self.real_rows * F.cross_entropy(
                self.unembed(real).flatten(0, 1), input_ids[:, 1:].flatten()
            )
        return losses


def held_out_windows(tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """Windows of held-out text, as many of each domain, [3 count, 256]."""
    windows = []
    for domain in demo.DOMAINS:
        ids = tokenizer("".join(documents(domain, True, 12 * count * WINDOW)), add_special_tokens=False)["input_ids"]
        starts = random.Random(0).sample(range(len(ids) - WINDOW), count)
        windows += [ids[start : start + WINDOW] for start in starts]
    return torch.tensor(windows)


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Next-token logits of all rows but the last, [n, 255, V]."""
    return torch.cat([unembedding(model)(read(model, some)[0][:, :-1]) for some in windows.split(8)])


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor, problems: int) -> dict[str, float]:
    """Shares of tokens predicted first and of right answers."""
    first = logits_of(model, windows).argmax(-1) == windows[:, 1:]
    asked = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0] for text in demo.prompts("arithmetic")]
    asked, right = asked[:problems], demo.answers()[:problems]
    solved = continue_prompts(model, asked, 128, end_tokens(tokenizer, model.generation_config))
    given = [arithmetic.answer(str(tokenizer.decode(text[len(prompt) :]))) for prompt, text in zip(asked, solved, strict=True)]
    return {
        "tokens": first.float().mean().item(),
        "answers": sum(a == b for a, b in zip(given, right, strict=True)) / problems,
    }


def run(name: str, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor) -> dict[str, Any]:
    """Trains one of `RUNS`: shares by step, and whether real rows still have the base's logits, bit by bit."""
    given = {"base": options.base, "data": ["-"], "output": options.output, "steps": options.steps, "seed": options.seed}
    config = TrainConfig.model_validate({**SHAPE, **given, "loss": {"consistency": 0.0}})
    torch.manual_seed(options.seed)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    real_rows = RUNS[name]
    model = MaskedModel(base, config) if real_rows is None else UngatedModel(base, config, real_rows)
    served: PreTrainedModel = model.opened if isinstance(model, UngatedModel) else base
    texts = [
        Document(text, f"{domain} {i}")
        for domain, share in MIXTURE.items()
        for i, text in enumerate(documents(domain, False, round(share * CHARACTERS)))
    ]
    corpus = read_corpus(tokenizer, texts, [], options.seed, BadLines(strict=False))
    data = Sequences(corpus, None, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    kept = options.output / f"{name}.pt"
    state: dict[str, Any] = {"step": 0, "shares": {"0": measured(served, tokenizer, windows, options.problems)}, "losses": []}
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        state = saved["state"]
        model.load_trainable(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in track(range(state["step"], options.steps), description=name):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
        items = [data[step * config.batch_size + i] for i in range(config.batch_size)]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        loss = model(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        state["losses"].append(loss.item())
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            state["step"] = step + 1
            state["shares"][str(step + 1)] = measured(served, tokenizer, windows, options.problems)
            with whole(kept) as part:
                torch.save({"state": state, "model": model.trainable(), "optimizer": optimizer.state_dict()}, part)
    untouched = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    identical = torch.equal(logits_of(served, windows), logits_of(untouched, windows))
    return {"shares": state["shares"], SAME: identical, "loss": sum(state["losses"][-20:]) / 20}


def plot(runs: dict[str, Any], file: Path) -> None:
    """Both shares over the steps."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    titles = {"tokens": "held-out tokens predicted first", "answers": "right answers, held-out arithmetic"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, found in runs.items():
            steps = sorted(map(int, found["shares"]))
            axes.plot(steps, [100 * found["shares"][str(step)][kind] for step in steps], marker="o", markersize=3, label=name)
        axes.set(title=title, xlabel="optimizer steps", ylabel="%", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    with whole(file) as part:
        figure.savefig(part, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder for gate.json and gate.png; that of the runs by default")
    parser.add_argument("--base", type=Path, default=demo.BASE)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50, help="steps between measurements, and between checkpoints")
    parser.add_argument("--windows", type=int, default=16, help="held-out texts of each domain")
    parser.add_argument("--problems", type=int, default=60, help="held-out arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.results or options.output
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    windows, runs = held_out_windows(tokenizer, options.windows), {}
    for name in RUNS:
        runs[name] = run(name, options, tokenizer, windows)
        shape = {**SHAPE, "steps": options.steps, "seed": options.seed}
        report = {"command": sys.argv, "machine": machine(), "shape": shape, "runs": runs}
        write_whole(results / "gate.json", json.dumps(report, indent=1) + "\n")
        plot(runs, results / "gate.png")
    print("| | tokens predicted first | right answers | logits are the base's |\n|---|---|---|---|")
    for name, found in runs.items():
        begin, end = found["shares"]["0"], found["shares"][str(options.steps)]
        shares = [f"{100 * begin[kind]:.1f} % to {100 * end[kind]:.1f} %" for kind in ("tokens", "answers")]
        print(f"| {name} | {shares[0]} | {shares[1]} | {'bit by bit' if found[SAME] else 'no'} |")


if __name__ == "__main__":
    main()
