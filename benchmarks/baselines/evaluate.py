"""What trained baselines' drafts, and an adapter's, give on the base's greedy text at equal numbers of drafts, without an engine.

    python -m benchmarks.baselines.evaluate runs/eagle/eagle runs/medusa/medusa runs/adapter/adapter --base runs/mixed/model \\
        --data prompts.jsonl --output equal_drafts.json

An adapter drafts from the full comb, so all methods have k fresh drafts at every step.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.baselines.drafter import Drafter
from benchmarks.baselines.train import METHODS
from vllm_mtp.outputs import Output, acceptance_by_position, acceptance_length, novel
from vllm_mtp.train import evaluate
from vllm_mtp.train.documents import BadLines, read_documents
from vllm_mtp.train.export import from_adapter
from vllm_mtp.train.model import TrainedModel
from vllm_mtp.train.on_policy import continue_prompts, end_tokens
from vllm_mtp.whole_files import write_whole


def load(folder: Path, base_folder: Path) -> Drafter:
    """A trained baseline with its base, in float32."""
    training = json.loads((folder / "training.json").read_text())
    kind = METHODS[training["method"]]
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    return kind(base, **training["method_options"]).load(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of this package, and not a baseline."""
    return not (folder / "training.json").exists()


def decoded(model: Drafter, texts: Sequence[torch.Tensor], prompt_lengths: Sequence[int], k: int) -> list[Output]:
    """What greedy decoding with k drafts a step gives for each text: a prompt with the base's own continuation."""
    outputs = []
    for ids, length in zip(texts, prompt_lengths, strict=True):
        drafts = model.drafts(ids, length - 1, k).tolist()
        text = ids.tolist()
        outputs.append(Output(text[length:], evaluate.emitted(drafts, text, length, k, "quadratic")))
    return outputs


def figures(
    model: Drafter | TrainedModel, texts: Sequence[torch.Tensor], prompt_lengths: Sequence[int], budgets: Collection[int]
) -> dict[str, object]:
    """Tokens a forward after the prompt's, by k, of whole texts and of their novel beginnings; and acceptance by position."""
    if isinstance(model, TrainedModel):
        every = evaluate.decoded(model, texts, prompt_lengths, budgets, ["quadratic"])
        by_budget = {k: every[evaluate.Decoding("quadratic", "sampler", k)] for k in budgets}
    else:
        by_budget = {k: decoded(model, texts, prompt_lengths, k) for k in budgets}
    found: dict[str, object] = {}
    for k, outputs in by_budget.items():
        found[str(k)] = {
            "tokens_per_forward": acceptance_length(outputs),
            "novel": acceptance_length([novel(output) for output in outputs]),
            "acceptance_by_position": acceptance_by_position(outputs),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path, nargs="+", help="folders that training wrote, of baselines and of adapters")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, action="append", required=True, help="held-out texts; their beginnings are prompts")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("-k", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    documents = read_documents(options.data, BadLines(strict=True))
    step = max(1, len(documents) // options.prompts)
    prompts = [
        torch.tensor(tokenizer(str(document.content), add_special_tokens=False)["input_ids"][: options.prompt_tokens])
        for document in documents[::step][: options.prompts]
    ]
    texts = continue_prompts(base, prompts, options.new_tokens, end_tokens(tokenizer, base.generation_config))
    found = []
    for folder in options.drafter:
        model = from_adapter(options.base, folder) if is_adapter(folder) else load(folder, options.base)
        most = model.options.mask_tokens if isinstance(model, TrainedModel) else model.max_drafts
        budgets = [k for k in options.k if k <= (most or k)]
        found.append({"drafter": str(folder), **figures(model, texts, [len(p) for p in prompts], budgets)})
        print(json.dumps(found[-1]), flush=True)
    if options.output is not None:
        command = ["python", "-m", "benchmarks.baselines.evaluate", *sys.argv[1:]]
        write_whole(options.output, json.dumps({"command": command, "prompts": len(prompts), "drafters": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
