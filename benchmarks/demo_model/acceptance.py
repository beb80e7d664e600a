"""Tokens per forward of an adapter on the demo's held-out prompts: greedy, at most 128 new tokens, stopping at end of text.

    python -m benchmarks.demo_model.acceptance --base vllm_mtp/demo/base --adapter vllm_mtp/demo/adapter

Counts forwards from the drafts behind every row of the plain greedy text, in float32; no engine. `novel` counts each output up
to where an 8-gram occurs for the second time, `free` only outputs in which none occurs three times.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from vllm_mtp import demo
from vllm_mtp.train.evaluate import tokens_per_forward
from vllm_mtp.train.export import from_adapter
from vllm_mtp.train.on_policy import continue_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=demo.BASE)
    parser.add_argument("--adapter", type=Path, default=demo.ADAPTER)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    tokenizer, model = AutoTokenizer.from_pretrained(arguments.base), from_adapter(arguments.base, arguments.adapter)
    texts = demo.prompts()[: arguments.prompts]
    prompts = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    continued = continue_prompts(model.base, prompts, 128, tokenizer.eos_token_id)
    figures = tokens_per_forward(model, continued, [len(prompt) for prompt in prompts])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    budgets = sorted({int(name.rsplit(".", 1)[1]) for name in figures if "." in name})
    print(f"{figures['looping']} of {figures['texts']} outputs loop")
    print("| | " + " | ".join(f"k = {k}" for k in budgets) + " |")
    print("|---" * (len(budgets) + 1) + "|")
    for row in dict.fromkeys(name.rsplit(".", 1)[0] for name in figures if "." in name):
        print(f"| {row.replace('.', ', ')} | " + " | ".join(f"{figures[f'{row}.{k}']:.2f}" for k in budgets) + " |")


if __name__ == "__main__":
    main()
