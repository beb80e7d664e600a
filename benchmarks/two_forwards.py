"""What one forward for verification and drafting buys: the same adapter with mask rows in a forward of their own.

    python -m benchmarks.two_forwards --output two_forwards.json

Two forwards a cycle, as UNO has them: the first verifies the drafts, without mask rows; then one group of k mask rows behind the
token that was accepted last runs in a second one, over the cache that the first has filled, and gives the next drafts. They are the
drafts that the full comb gives, so outputs and tokens a cycle are the same, for 1 + 2k rows in two forwards against
1 + k + k(k + 1) in one. Layouts of one forward and plain decoding run beside it in turns, in one engine: demo model, greedy,
bfloat16, compiled. On x86 CPUs, whose cache our attention reads in place.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the second forward is put into the engine's worker, in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch

from vllm_mtp import demo
from vllm_mtp.breaker import failures
from vllm_mtp.cli.engine_worker import generate
from vllm_mtp.machine import machine
from vllm_mtp.outputs import Output, tokens_per_forward
from vllm_mtp.plan import EngineStep
from vllm_mtp.whole_files import write_whole


class OwnForward:
    """Mask rows in a forward behind the one that verifies.

    Args:
        proposer: of the engine (`runner.v1.MaskTokenProposer`).
        k: drafts of a request.
    """

    def __init__(self, proposer: Any, k: int) -> None:
        self.proposer, self.k, self.forwards = proposer, k, 0
        self.propose_drafts = proposer.propose
        names = proposer.runner.attn_groups[0][0].layer_names
        nothing = torch.empty(0, dtype=torch.int32)
        metadata = SimpleNamespace(causal=True, block_table=nothing)
        self.metadata, self.slots = dict.fromkeys(names, metadata), dict.fromkeys(names, nothing.long())

    def next_step(self) -> None:
        """Nothing in the forward that verifies; what the proposer wants to know of the step."""
        proposer, batch = self.proposer, self.proposer.runner.input_batch
        rows = proposer.runner.query_start_loc.np[: batch.num_reqs + 1]
        proposer.num_rows, proposer.max_lens = int(rows[-1]), [proposer._max_len(request) for request in batch.req_ids]

    def propose(self, sampled: list[list[int]], num_tokens: Any, *rest: Any, **more: Any) -> list[list[int]]:
        """The second forward, and the drafts that its states give."""
        self._run(sampled, [int(count) for count in num_tokens[: len(sampled)]])
        return list(self.propose_drafts(sampled, num_tokens, *rest, **more))

    def _run(self, sampled: list[list[int]], num_tokens: list[int]) -> None:
        from vllm.forward_context import set_forward_context

        proposer, expansion = self.proposer, self.proposer.expansion
        # The last sampled token is in no cache yet: its group stands behind the row that gave it.
        shapes = [
            (self.k,) if tokens and count < most else ()
            for tokens, count, most in zip(sampled, num_tokens, proposer.max_lens, strict=True)
        ]
        step = EngineStep(
            (1,) * len(sampled),
            tuple(shapes),
            torch.tensor(num_tokens) - 1,
            max(num_tokens),
            proposer.runner.input_batch.block_table[0].get_device_tensor(len(sampled)),
        )
        planned = proposer.planner.plan(step)
        expansion.last = None
        if planned is None:
            return
        after = [[of[0]] * len(of) for of in planned.groups.after]  # the one group, however many drafts were accepted
        groups = replace(planned.groups, num_real=0, after=after)
        starts, table, _ = planned.sequences
        attention = proposer.attention
        with set_forward_context(self.metadata, proposer.config, groups.num_rows, slot_mapping=self.slots):
            # Our kernel for real rows too, of which there are none: vLLM's has nothing to do.
            attention.metadata = next(iter(self.metadata.values()))
            attention.real = torch.zeros(len(sampled) + 1, dtype=torch.int32), step.request_len.int()
            nothing = expansion.mask_embeddings[:0]
            expansion._with_mask_rows(replace(planned, groups=groups, sequences=(starts, table, 0)), planned.positions[:0], nothing)
        self.forwards += 1


@contextmanager
def two_forwards(proposer: Any, k: int) -> Iterator[OwnForward]:
    """While it lasts, mask rows run in forwards of their own."""
    own = OwnForward(proposer, k)
    shared = proposer.expansion.next_step
    proposer.expansion.next_step, proposer.propose = own.next_step, own.propose
    try:
        yield own
    finally:
        proposer.expansion.next_step = shared
        del proposer.propose  # the method again


def run(llm: Any, prompts: list[str], clients: int, max_tokens: int) -> tuple[list[Output], float]:
    """Greedy outputs and the seconds of all."""
    found = generate(llm, {"prompts": prompts, "concurrency": clients, "sampling": {"temperature": 0.0, "max_tokens": max_tokens}})
    if failures:
        raise RuntimeError(f"speculation ended while {failures[0]}")
    return [Output(**output) for output in found["outputs"]], found["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--k", type=int, default=4, help="drafts of a request, under every layout but auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()

    from vllm import LLM

    llm = LLM(
        model=str(demo.BASE),
        dtype="bfloat16",
        max_num_seqs=max(options.clients),
        enable_prefix_caching=False,
        speculative_config={"method": "mtp", "model": str(demo.ADAPTER), "lookup": False},
    )
    proposer = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    k, most = options.k, proposer.k
    comb = (k,) * (k + 1) + (0,) * (most - k)
    fixed = {"plain": (0,) * (most + 1), f"one forward, comb of {k}": comb}
    modes = ["plain", f"one forward, comb of {k}", f"two forwards, k = {k}", "one forward, auto"]

    @contextmanager
    def mode(name: str) -> Iterator[None]:
        proposer.shapes_groups = name == "one forward, auto"
        proposer.layouts = [fixed.get(name, proposer.layouts[-1])]
        if not name.startswith("two"):
            yield
            return
        with two_forwards(proposer, k):
            yield

    report: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks.two_forwards", *sys.argv[1:]],
        "machine": machine(),
        "k": k,
        "rounds": options.rounds,
        "runs": [],
    }
    print("| clients | mode | tokens a cycle | tokens/s over plain | same outputs as the comb |\n|---|---|---|---|---|")
    for clients in options.clients:
        prompts = demo.mixed_prompts()[: max(24, 3 * clients)]
        found: dict[str, list[tuple[list[Output], float]]] = {name: [] for name in modes}
        for round_ in range(options.rounds + 1):
            for name in modes:
                with mode(name):
                    one = run(llm, prompts, clients, options.max_tokens)
                if round_:  # the first is a warm-up
                    found[name].append(one)
        expected = found[modes[1]][0][0]
        for name, runs in found.items():
            ratios = [a[1] / b[1] for a, b in zip(found["plain"], runs, strict=True)]
            outputs = runs[0][0]
            row = {
                "clients": clients,
                "mode": name,
                "tokens_per_cycle": tokens_per_forward(outputs),
                "seconds": [seconds for _, seconds in runs],
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "same_as_comb": sum(a.tokens == b.tokens for a, b in zip(outputs, expected, strict=True)) / len(outputs),
            }
            report["runs"].append(row)
            write_whole(options.output, json.dumps(report, indent=1) + "\n")
            low, high = row["ratio_range"]
            speed = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
            print(
                f"| {clients} | {name} | {row['tokens_per_cycle']:.2f} | {speed} | {100 * row['same_as_comb']:.0f} % |", flush=True
            )


if __name__ == "__main__":
    main()
