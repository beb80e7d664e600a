"""What a decode step costs with mask rows and without, CUDA graphs on, by number of drafts and requests. For a GPU.

    python -m benchmarks.graphs --output graphs.json                       # the demo model
    python -m benchmarks.graphs --base CONFIG_FOLDER --dummy --output graphs.json

`--dummy` gives the base and the adapter random weights of the base's shape, for the cost of a model that is not at hand; acceptance
is then nil, and a step with k drafts gives one token. Rounds go plain, k, plain, k, ..; medians with the spread.
Has not run on a GPU yet.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def dummy_adapter(base: Path, folder: Path, k: int, rank: int) -> Path:
    """An adapter of random weights for `base`, of which only config.json is read."""
    import torch

    from vllm_mtp.adapter import LoRAWeights, base_facts, linear_shapes, write_adapter
    from vllm_mtp.config import AdapterConfig
    from vllm_mtp.sampler_head import SamplerHead

    shapes, facts = linear_shapes(base), base_facts(base)
    if shapes is None:
        raise SystemExit(f"the linear layers of {base} are not known from its config.json: give a Llama, Qwen or Mistral")
    lora = {name: LoRAWeights(torch.randn(rank, i) / rank, torch.randn(o, rank) / rank, 1.0) for name, (o, i) in shapes.items()}
    config = AdapterConfig(num_mask_tokens=k, base=facts)
    write_adapter(folder, config, lora, torch.randn(k, facts.hidden_size), SamplerHead(facts.hidden_size))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the base model; default: the demo model")
    parser.add_argument("--dummy", action="store_true", help="random weights for base and adapter")
    parser.add_argument("--rank", type=int, default=128, help="rank of a dummy adapter")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams

    from vllm_mtp import demo
    from vllm_mtp.selection import vllm_version

    if not torch.cuda.is_available():
        raise SystemExit("this measures CUDA graphs and finds no GPU; `python -m benchmarks.overhead` measures on CPUs")
    base = options.base or demo.BASE
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(5, 69))}
    samples: dict[tuple[int, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        adapter = dummy_adapter(base, Path(temporary) / "adapter", max(options.k), options.rank) if options.dummy else demo.ADAPTER
        for round_ in range(options.rounds):
            for k in (0, *options.k):
                speculative = {"method": "mtp", "model": str(adapter), "num_speculative_tokens": k, "layout": "quadratic"}
                speculative["max_mask_rows"] = 16384
                llm: Any = LLM(
                    str(base),
                    dtype="bfloat16",
                    max_num_seqs=max(options.requests),
                    max_num_batched_tokens=16384,
                    max_model_len=2048,
                    load_format="dummy" if options.dummy else "auto",
                    disable_log_stats=False,
                    speculative_config=speculative if k else None,
                )
                for count in options.requests:
                    llm.generate([prompt] * count, params, use_tqdm=False)  # warm
                    before = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
                    begin = time.perf_counter()
                    llm.generate([prompt] * count, params, use_tqdm=False)
                    seconds = time.perf_counter() - begin
                    after = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
                    drafts = "vllm:spec_decode_num_drafts"
                    steps = (after[drafts] - before[drafts]) / count if k else options.max_tokens
                    sample = {"ms_a_step": 1e3 * seconds / max(1, steps), "tokens_a_second": count * options.max_tokens / seconds}
                    samples.setdefault((k, count), []).append(sample)
                    print(f"round {round_}: k = {k}, {count} requests: {sample}", flush=True)
                llm.llm_engine.engine_core.shutdown()  # vLLM before 0.31 frees an engine's memory only when told to
                del llm
    rows = [
        {
            "k": k,
            "requests": count,
            **{name: [statistics.median(s[name] for s in runs), *sorted(s[name] for s in runs)] for name in runs[0]},
        }
        for (k, count), runs in samples.items()
    ]
    facts = {"vllm": vllm_version(), "torch": torch.__version__, "device": torch.cuda.get_device_name(), "dummy": options.dummy}
    options.output.write_text(json.dumps({**facts, "rank": options.rank, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
