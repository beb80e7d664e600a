"""Training data: documents, windows of their tokens, sequences that the base continued, and the rows that get mask tokens."""

import json
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from vllm_mtp.train.config import TrainConfig


class DataError(ValueError):
    """Training data that cannot be used; the message says which and why."""


def read_documents(paths: tuple[Path, ...]) -> list[str]:
    """Texts of all documents: a .jsonl file has one in the `text` of each line, any other file is one, a folder is its files."""
    documents: list[str] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist: give a text file, a .jsonl file of texts, or a folder of them.")
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                if path.is_dir():
                    continue  # a folder of sources has pictures and archives in it
                raise DataError(f"{file} is not UTF-8 text: convert it, or leave it out.") from None
            if file.suffix == ".jsonl":
                documents += _read_lines(file, text)
            else:
                documents.append(text)
    return documents


def _read_lines(file: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            documents.append(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(f'{file}, line {number}: expected {{"text": "..."}}.') from None
    return documents


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: list[str], seed: int) -> torch.Tensor:
    """All documents in a shuffled order, each closed by the end-of-text token, shape [tokens]."""
    documents = random.Random(seed).sample(documents, len(documents))
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"] if documents else []
    return torch.tensor([token for ids in encoded for token in [*ids, *end]], dtype=torch.long)


class Sequences(Dataset):
    """`config.steps * config.batch_size` sequences and the lengths of their groups' prefixes; item i depends on seed and i alone.

    Args:
        stream: tokens of the documents, shape [tokens].
        on_policy: sequences that the base continued: `input_ids` [N, T] padded on the right, `lengths` [N], `prompt_lengths` [N].
        config: lengths, number of groups and share of on-policy sequences.
    """

    def __init__(self, stream: torch.Tensor, on_policy: dict[str, torch.Tensor] | None, config: TrainConfig) -> None:
        if len(stream) <= config.length:
            raise DataError(
                f"The data has {len(stream)} tokens, not one sequence of {config.length}: give more, or a smaller length."
            )
        self.stream, self.on_policy, self.config = stream, on_policy, config

    def __len__(self) -> int:
        return self.config.steps * self.config.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        if self.on_policy is not None and torch.rand(1, generator=generator).item() < config.on_policy:
            i = draw(0, len(self.on_policy["lengths"]))
            ids, length = self.on_policy["input_ids"][i], self.on_policy["lengths"][i]
            # The prompt's last row is followed by the first group; the last group still has one label before the end.
            first, last = int(self.on_policy["prompt_lengths"][i]), int(length) - 2
        else:
            start = draw(0, len(self.stream) - config.length)
            ids, length = self.stream[start : start + config.length], torch.tensor(config.length)
            first, last = 1, config.length - config.mask_tokens - 1
        rows = torch.randperm(last - first + 1, generator=generator)[: config.groups] + first
        prefix_lengths = rows.repeat(-(-config.groups // len(rows)))[: config.groups]
        return {"input_ids": ids, "lengths": length, "prefix_lengths": prefix_lengths}
