"""Searches block sizes on a GPU, shape by shape; what it finds is for the tables in kernels/*/triton.py.

    python -m benchmarks.kernels.tune --output tune.json
    python -m benchmarks.kernels.tune --output tune.json --minutes 5 --only gated_lora    # goes on where it stopped
    python -m benchmarks.kernels.tune --output /tmp/tune.json --smoke                     # tiny shapes, any machine: does it run?

Launches are compiled on all cores first. Each one's result is compared with the launch that the tables choose now; one that gives
something else, or does not fit the GPU, is no candidate.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from .command import Command

SHARED_BYTES, MOST_REGISTERS = 227 * 1024, 160
TOLERANCE = 2e-2
Launches = list[tuple[Callable[[Any], object], Any]]


@dataclass(frozen=True)
class Problem:
    """A shape, and how it is launched.

    Attributes:
        key: its name in the output file.
        chosen: what the tables choose.
        candidates: what else may be.
        make: allocates inputs; returns for each set of inputs a call that takes a `Config`, and the tensor that it writes.
    """

    key: str
    chosen: Any
    candidates: list[Any]
    make: Callable[[], Launches]


def gated_lora_candidates(rows: int, out: int, inputs: int, sms: int, itemsize: int = 2) -> Iterator[Any]:
    """Launches whose tiles fit a multiprocessor, with enough bytes in flight and work for most of the GPU."""
    from vllm_mtp.kernels.gated_lora.triton import Config

    bm = next(size for size in (16, 32, 64, 128) if size >= min(rows, 128))
    for bn, bk, warps, stages, split in itertools.product((32, 64, 128, 256), (64, 128), (4, 8), (3, 4, 5, 6), (1, 2, 3, 4, 8)):
        in_flight = (stages - 1) * bn * bk * itemsize
        programs = -(-rows // bm) * -(-out // bn) * split
        if (
            stages * (bm + bn) * bk * itemsize <= SHARED_BYTES
            and bm * bn <= MOST_REGISTERS * 32 * warps
            and in_flight >= 16 << 10
            and inputs // (bk * split) >= stages
            and (split == 1 or programs <= 2 * sms)
            and programs >= sms // 2
        ):
            yield Config(bm, bn, bk, warps, stages, split, 2 * split)


def gated_lora_problems(device: Any, smoke: bool) -> Iterator[Problem]:
    """Every layer at the rows of one request and of eight."""
    import torch
    from vllm_mtp.kernels.dispatch import num_sms
    from vllm_mtp.kernels.gated_lora.triton import choose_config, launch

    from .gated_lora import LAYERS_8B, SMOKE, Layer, make_slices
    from .timing import copies

    sms, rank = num_sms(device), 8 if smoke else 128

    def make(layer: Layer, rows: int, n: int) -> Launches:
        made: Launches = []
        out = sum(layer.parts)
        for _ in range(copies(2 * out * layer.inputs)):
            x, y = torch.randn(rows, layer.inputs, device=device).bfloat16(), torch.empty(rows, out, device=device).bfloat16()
            weight = (torch.randn(out, layer.inputs, device=device) / layer.inputs**0.5).bfloat16()
            lora, num_real = make_slices(layer, rank, device), torch.tensor([n], device=device)
            made.append((partial(launch, y, x, weight, None, lora.a, lora.b, lora.spans, lora.scale, num_real), y))
        return made

    for layer, rows in itertools.product(SMOKE if smoke else LAYERS_8B, (9,) if smoke else (9, 25, 81)):
        out = sum(layer.parts)
        chosen = choose_config(rows, out, layer.inputs, len(layer.parts) * rank, sms, True)
        candidates = list(gated_lora_candidates(rows, out, layer.inputs, sms))
        if smoke:
            candidates = [replace(chosen, bn=16, bk=32), replace(chosen, split_base=2)]
        yield Problem(
            f"gated_lora/{layer.name}/rows={rows}",
            chosen,
            candidates,
            partial(make, layer, rows, round(rows**0.5)),
        )


def comb_candidates(queries: int, head_size: int, heads: int, sms: int) -> Iterator[Any]:
    """Launches whose tiles fit a multiprocessor, with splits that fill the GPU once to four times; `heads` of all requests."""
    from vllm_mtp.kernels.comb_attention.triton import Config

    for bq, bn, warps, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if bq > max(16, 2 * queries) or bq * head_size > MOST_REGISTERS * 32 * warps:
            continue
        if stages * 2 * bn * head_size * 2 + bq * head_size * 2 > SHARED_BYTES:
            continue
        for waves in (1, 2, 4):
            splits = max(1, min(64, waves * sms // (-(-queries // bq) * heads)))
            if waves == 1 or splits > 1:
                yield Config(bq, bn, warps, stages, splits)


def comb_attention_problems(device: Any, smoke: bool) -> Iterator[Problem]:
    """Combs of four and eight, and the rows that verify alone, over contexts and batches."""
    from vllm_mtp.kernels.comb_attention import CombInputs
    from vllm_mtp.kernels.comb_attention.triton import choose_config, launch
    from vllm_mtp.kernels.dispatch import num_sms

    from .comb_attention import HEADS_8B, SMOKE, paged_call
    from .timing import copies

    h, sms = SMOKE if smoke else HEADS_8B, num_sms(device)

    def make(lengths: list[int], batch: int, context: int) -> Launches:
        made: Launches = []
        for _ in range(copies(4 * batch * context * h.kv_heads * h.head_size)):
            out, *given = paged_call(h, lengths, batch, context, device).args
            inputs = CombInputs(*given)
            made.append((partial(launch, out, inputs), out))
        return made

    shapes = ((2, 40, 2),) if smoke else tuple(itertools.product((4, 8), (1024, 8192, 32768), (1, 8, 32)))
    for (k, context, batch), variant in itertools.product(shapes, ("comb", "decode")):
        lengths = [k] * (k + 1) if variant == "comb" else [k + 1]
        rows, repeat = sum(lengths), h.heads // h.kv_heads
        chosen = choose_config(rows, h.heads, h.kv_heads, h.head_size, batch, context, sms, 2)

        candidates = list(dict.fromkeys(comb_candidates(rows * repeat, h.head_size, h.kv_heads * batch, sms)))
        yield Problem(
            f"comb_attention/{variant}/k={k}/context={context}/batch={batch}",
            chosen,
            [replace(chosen, splits=2)] if smoke else candidates,
            partial(make, lengths, batch, context),
        )


PROBLEMS = (gated_lora_problems, comb_attention_problems)


def compile_all(problems: list[Problem], device: Any, smoke: bool) -> None:
    """Compiles every launch, on all cores, into Triton's cache on disk."""
    work = [(problem.key, config) for problem in problems for config in [problem.chosen, *problem.candidates]]
    workers = max(1, min(16, (os.cpu_count() or 2) - 2, len(work) // 8))
    parts = [work[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_compile_part, str(device), smoke), parts))


def _compile_part(device: str, smoke: bool, part: list[tuple[str, Any]]) -> None:
    import torch

    wanted = dict.fromkeys(key for key, _ in part)
    for problem in (problem for problems in PROBLEMS for problem in problems(torch.device(device), smoke)):
        if problem.key in wanted:
            launch, _ = problem.make()[0]
            for config in [config for key, config in part if key == problem.key]:
                try:
                    launch(config)
                except Exception as error:  # no candidate; the parent finds out again and says so
                    print(f"{problem.key} {config}: {type(error).__name__}", flush=True)


def tune(problem: Problem) -> dict[str, Any]:
    """Times of the chosen launch and of every candidate, the fastest first."""
    import torch

    from .timing import time_us

    calls = problem.make()
    found: list[dict[str, Any]] = []
    launch, out = calls[0]
    launch(problem.chosen)
    expected = out.float()
    for config in [problem.chosen, *(each for each in problem.candidates if each != problem.chosen)]:
        entry = {"config": asdict(config), "chosen": config == problem.chosen}
        try:
            out.fill_(float("nan"))
            launch(config)
            error = ((out.float() - expected).abs().max() / expected.abs().max()).item()
            if error <= TOLERANCE:  # NaN is not
                entry |= time_us([partial(each, config) for each, _ in calls], repeats=10)
            else:
                entry["error"] = f"off by {error:.2g}"
        except Exception as error:
            if "CUDA error" in str(error):  # nothing runs after it in this process; a new run continues from here
                raise
            entry["error"] = f"{type(error).__name__}: {error}"[:200]
        found.append(entry)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found.sort(key=lambda entry: entry.get("median_us", float("inf")))
    return {"tried": found}


def main() -> None:
    command = Command.begin(__doc__, "block sizes are found on a GPU only")
    began, device = time.monotonic(), command.device
    made = [problem for problems in PROBLEMS for problem in problems(device, command.smoke)]
    left = [problem for problem in made if command.wants(problem.key) and problem.key not in command.run["cells"]]
    if left:
        compile_all(left, device, command.smoke)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    for problem in left:
        if not command.in_time(problem.key):
            break
        result = tune(problem)
        command.keep(problem.key, result)
        best = result["tried"][0]
        chosen = next(entry for entry in result["tried"] if entry["chosen"])
        took, least = (entry.get("median_us", float("nan")) for entry in (chosen, best))
        print(f"{problem.key}: chosen {took:.1f} us, best {least:.1f} us {best['config']}", flush=True)


if __name__ == "__main__":
    main()
