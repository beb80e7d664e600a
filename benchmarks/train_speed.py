"""What a training step costs: mask rows a second, and memory, against the computation as the paper draws it.

    python -m benchmarks.train_speed --json train_speed.json

The demo's base, random tokens and prefixes, others in each step, forward and backward of one sequence. *Dense* is masked input
as a single sequence: real rows and all mask rows in one forward with gradients, LoRA behind a gate, one mask of [rows, rows],
logits of all rows. Each computation runs in processes of its own, in turns; memory is the most that its process held, less what it
held before the first step. Freed memory is kept for the next step in all of them, as the trainer does it.
"""

import argparse
import cProfile
import json
import pstats
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from rich.progress import track
from torch import nn
from transformers import AutoModelForCausalLM

from vllm_mtp import demo
from vllm_mtp.cpu_memory import FreedMemory
from vllm_mtp.machine import machine
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.losses import masked_losses, supervised
from vllm_mtp.train.model import MaskedModel
from vllm_mtp.train.run import KEPT_MEMORY
from vllm_mtp.whole_files import write_figures

OURS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, compiled": {"compile": True},
    "packed, little memory": {"gradient_checkpointing": True, "logit_rows": 1024},
}
DENSE = "dense"
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From tokens [1, T] and prefix lengths [1, G] to a loss."""


def dense_mask(prefix_lengths: torch.Tensor, num_real: int, k: int) -> torch.Tensor:
    """Which rows see which, [N, N] for T real rows and then k rows of each of G groups, N = T + G k.

    Args:
        prefix_lengths: [G].
        num_real: T.
        k: mask rows of a group.
    """
    real = torch.arange(num_real)
    group = torch.arange(len(prefix_lengths)).repeat_interleave(k)
    within = torch.arange(k).repeat(len(prefix_lengths))
    on_real = torch.cat([real <= real[:, None], real < prefix_lengths[group][:, None]])
    on_own = (group == group[:, None]) & (within <= within[:, None])
    return torch.cat([on_real, torch.cat([torch.zeros(num_real, len(group), dtype=torch.bool), on_own])], 1)


def dense(model: MaskedModel, input_ids: torch.Tensor, prefix_lengths: torch.Tensor) -> torch.Tensor:
    """The loss of `MaskedModel.forward`, computed in one sequence of all rows."""
    T, k = input_ids.shape[1], model.options.mask_tokens
    G = prefix_lengths.shape[1]
    rows = torch.cat([model.embed(input_ids), model.mask_embeddings.expand(1, G, k, -1).flatten(1, 2)], 1)
    at = prefix_lengths[..., None] + torch.arange(k)
    positions = torch.cat([torch.arange(T)[None], at.flatten(1)], 1)
    mask = dense_mask(prefix_lengths[0], T, k)
    student: Any = model.student.get_base_model()
    gates = [(layer, partial(_gate, T)) for layer in student.modules() if isinstance(layer, LoraLayer)]
    handles = [nn.Module.register_forward_hook(cast("nn.Module", layer), gate) for layer, gate in gates]
    decoder = student.get_decoder()
    states = decoder(inputs_embeds=rows, position_ids=positions, attention_mask=mask[None, None], use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    real, z = states[:, :T], states[:, T:].view(1, G, k, -1)
    counts = supervised(at + 1, torch.tensor([T]), None)
    at = at.clamp(max=T - 2).flatten(1)
    teacher = real.detach().gather(1, at[..., None].expand(-1, -1, real.shape[-1])).view_as(z)
    previous, labels = input_ids.gather(1, at).view(counts.shape), input_ids.gather(1, at + 1).view(counts.shape)
    sampled = None if model.sampler is None else model.sampler(model.embed(previous), z)
    return masked_losses(model.unembed, model.unembed, teacher, z, sampled, labels, counts, model.options)["loss"]


def _gate(num_real: int, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """y of a LoRA layer, as the base has it in real rows."""
    assert isinstance(layer, LoraLayer)
    gate = (torch.arange(output.shape[1]) >= num_real)[None, :, None]
    return torch.where(gate, output, layer.base_layer(inputs[0]))


def step_of(name: str, options: argparse.Namespace) -> tuple[MaskedModel, Step]:
    """The model, and what computes its loss."""
    given = {"length": options.length, "groups": options.groups, "rank": options.rank, **OURS.get(name, {"logit_rows": 1 << 30})}
    common = {"base": options.base, "data": ["-"], "output": "-", "mask_tokens": options.k, "bf16": options.bf16}
    config = TrainConfig.model_validate({**given, **common})
    model = MaskedModel(AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32), config)
    if name == DENSE:
        student: Any = model.student.get_base_model()
        student.set_attn_implementation("sdpa")
        return model, partial(dense, model)
    if config.compile:  # as `vllm_mtp.train.run` does it
        model.base.set_attn_implementation("eager")
        model.compile()
    lengths = torch.tensor([options.length])
    return model, lambda ids, prefixes: model(ids, lengths, prefixes)["loss"]


def memory() -> int:
    """The most bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profile(run: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Where the time of a step goes: shares of it by operator, and by Python function without what that calls; the largest ones."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as operators:
        run()
    by_operator = {event.key: event.self_cpu_time_total for event in operators.key_averages()}
    python = cProfile.Profile()
    python.runcall(run)
    calls = pstats.Stats(python).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in calls.values())
    # What is built in has no file: torch's own functions, which are the operators and the whole backward pass.
    by_function = {f"{Path(file).name}:{name}": own for (file, _, name), (_, _, own, _, _) in calls.items() if file != "~"}
    return {
        "operators": _largest(by_operator, sum(by_operator.values())),
        "python": {"all": sum(by_function.values()) / total, **_largest(by_function, total)},
    }


def _largest(times: dict[str, float], total: float) -> dict[str, float]:
    """Shares of the ten largest ones."""
    return {name: times[name] / total for name in sorted(times, key=times.__getitem__, reverse=True)[:10]}


def worker(name: str, options: argparse.Namespace) -> None:
    """Prints one JSON: mask rows with a label, and seconds, of each step; bytes; the loss of the first step."""
    FreedMemory().keep(KEPT_MEMORY)
    torch.manual_seed(0)
    model, step = step_of(name, options)
    losses: list[float] = []

    def run() -> None:
        ids = torch.randint(2, model.base.config.vocab_size, (1, options.length))
        prefixes = torch.randperm(options.length - options.k - 1)[: options.groups].sort().values[None] + 1
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            found = step(ids, prefixes)
        found.backward()
        losses.append(found.item())
        model.zero_grad()

    before, seconds = memory(), []
    for _ in range(2 + options.steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    counted = options.groups * options.k  # every group ends inside the sequence
    found = {"rows": counted, "seconds": seconds[2:], "bytes": memory() - before, "loss": losses[0]}
    print(json.dumps({**found, "profile": profile(run)} if options.profile else found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=demo.BASE)
    parser.add_argument("--length", type=int, default=1024, help="real tokens")
    parser.add_argument("--k", type=int, default=8, help="mask rows of a group")
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="autocast, as the trainer does it")
    parser.add_argument("--steps", type=int, default=5, help="of a process, after two that are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each computation")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=[*OURS, DENSE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options)

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, DENSE)}
    turns = [name for _ in range(options.rounds) for name in runs]
    for name in track(turns, description="processes"):
        command = [sys.executable, "-m", "benchmarks.train_speed", *sys.argv[1:], "--worker", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    found = {}
    speeds = {name: [run["rows"] / statistics.median(run["seconds"]) for run in some] for name, some in runs.items()}
    print("| | mask rows a second | over dense | memory, MiB | loss |\n|---|---|---|---|---|")
    for name, some in runs.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[DENSE], strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        rows, mebibytes = statistics.median(speeds[name]), max(run["bytes"] for run in some) / 2**20
        found[name] = {"rows_per_second": rows, "over_dense": [middle, low, high], "mebibytes": mebibytes, "runs": some}
        print(f"| {name} | {rows:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {mebibytes:.0f} | {some[0]['loss']:.4f} |")
    if options.profile:
        for kind, shares in runs[next(iter(OURS))][-1]["profile"].items():
            print(f"{kind}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    if options.json:
        shape = {name: getattr(options, name) for name in ("length", "k", "groups", "rank", "bf16")}
        report = {"command": sys.argv, "machine": machine(), "shape": shape, "found": found}
        write_figures(options.json, report)
    return None


if __name__ == "__main__":
    main()
