"""Train the demo's adapter on the training split of the standard library, for the base that `train_base` made.

    python -m benchmarks.demo_model.train_adapter --base runs/base/model --output runs/adapter --steps 4600
    python -m benchmarks.demo_model.train_adapter --base runs/mixed/model --output runs/mixed-adapter --steps 2000 \\
        --mixture '{"code": 0.5, "prose": 0.22, "arithmetic": 0.28}' --options '{"init_adapter": "runs/adapter/adapter"}'

Writes the split's training side to OUTPUT/train.jsonl and calls the trainer. The options default to those of the first adapter.
"""

import argparse
import json
from pathlib import Path

from benchmarks.demo_model.corpus import documents, repeated, split
from vllm_mtp import demo
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.run import train

MIXED_CHARACTERS = 12_000_000
MIXTURE = {"code": 0.5, "prose": 0.22, "arithmetic": 0.28}
"""Share of the characters that each domain has in what an adapter for all three learns from."""
OPTIONS: dict[str, object] = {
    "base_name": "vllm_mtp/demo/base",
    "length": 288,
    "groups": 32,
    "batch_size": 8,
    "learning_rate": 1.5e-3,
    "on_policy": 0.6,
    "on_policy_sequences": 3072,
    "on_policy_greedy": 0.7,
    "loss": {"plain_head": 0.5, "position_decay": 0.85},
    "compile": True,
    "save_steps": 250,
}


def write_split(path: Path) -> None:
    """One line a file of the training split, modules twice as in the base's training, tests once."""
    files, _ = split()
    with path.open("w") as out:
        for name in repeated(files):
            out.write(json.dumps({"text": files[name]}) + "\n")


def write_mixture(path: Path, shares: dict[str, float]) -> None:
    """One line a document of the domains in `shares`, each with its share of the characters."""
    with path.open("w") as out:
        for domain, share in shares.items():
            for text in documents(domain, False, round(share * MIXED_CHARACTERS)):
                out.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options of TrainConfig that replace the defaults")
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--mixture", type=json.loads, help="JSON of each domain's share of the characters; code alone by default")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = arguments.output / "train.jsonl"
    if arguments.mixture is None:
        write_split(data)
    else:
        write_mixture(data, arguments.mixture)
    held_out = arguments.output / "eval.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in demo.mixed_prompts()))
    options = {**OPTIONS, "steps": arguments.steps, **arguments.options}
    fixed = {"base": arguments.base, "data": [data], "output": arguments.output, "eval_data": [held_out]}
    train(TrainConfig.model_validate({**options, **fixed}))


if __name__ == "__main__":
    main()
