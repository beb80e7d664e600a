"""What the plugin's own Python costs a step: planning the mask rows and the glue around drafting, by concurrency.

    python -m benchmarks.overhead --k 4 --concurrency 1 16 --json overhead.json

Times are the plugin's own counters in a real engine on the demo model, compiled, bf16; the median over rounds, with the spread.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--layout", default="quadratic")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=None)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    from vllm_mtp import demo
    from vllm_mtp.selection import vllm_version

    llm = LLM(
        str(demo.BASE),
        dtype="bfloat16",
        max_num_seqs=max(options.concurrency),
        max_model_len=512,
        block_size=options.block_size,
        enforce_eager=options.eager,
        speculative_config={
            "method": "mtp",
            "model": str(demo.ADAPTER),
            "num_speculative_tokens": options.k,
            "layout": options.layout,
        },
    )
    executor: Any = llm.llm_engine.model_executor
    planner = executor.driver_worker.worker.model_runner.drafter.planner
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
    rows = []
    for concurrency in options.concurrency:
        prompts = demo.prompts()[:concurrency]
        llm.generate(prompts, params, use_tqdm=False)
        samples: dict[str, list[float]] = {"plan_ms": [], "glue_ms": [], "drafter_ms": [], "rows": []}
        for _ in range(options.rounds):
            counters = planner.counters = type(planner.counters)()
            llm.generate(prompts, params, use_tqdm=False)
            for name, total in (
                ("plan_ms", 1e3 * counters.plan_time),
                ("glue_ms", 1e3 * counters.draft_time),
                ("drafter_ms", 1e3 * counters.drafter_time),
                ("rows", counters.real_rows + counters.mask_rows),
            ):
                samples[name].append(total / max(1, counters.steps))
        row: dict[str, Any] = {"concurrency": concurrency, "steps": counters.steps}
        for name, values in samples.items():
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append(row)
        print(concurrency, {name: f"{row[name]['median']:.3f} ({row[name]['min']:.3f}-{row[name]['max']:.3f})" for name in samples})
    if options.json:
        facts = {"vllm": vllm_version(), "machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({**facts, "k": options.k, "layout": options.layout, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
