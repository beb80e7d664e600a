"""Train the demo's adapter on the training split of the standard library, for the base that `train_base` made.

    python -m benchmarks.demo_model.train_adapter --base runs/base/model --output runs/adapter --steps 4000

Writes the split's training side to OUTPUT/train.jsonl and calls the trainer; further options are those of `vllm-mtp train`.
"""

import argparse
import json
from pathlib import Path

from benchmarks.demo_model.corpus import is_test, split
from vllm_mtp.train.config import LossWeights, TrainConfig
from vllm_mtp.train.run import train

PROMPTS = Path(__file__).parents[2] / "vllm_mtp" / "demo" / "prompts.jsonl"


def write_split(path: Path) -> None:
    """One line a file of the training split, modules twice as in the base's training, tests once."""
    files, _ = split()
    with path.open("w") as out:
        for name, text in files.items():
            for _ in range(1 if is_test(name) else 2):
                out.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further options of TrainConfig")
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = arguments.output / "train.jsonl"
    write_split(data)
    options = {"steps": arguments.steps, "loss": LossWeights(), **arguments.options}
    train(TrainConfig(base=arguments.base, data=(data,), output=arguments.output, eval_data=(PROMPTS,), **options))


if __name__ == "__main__":
    main()
