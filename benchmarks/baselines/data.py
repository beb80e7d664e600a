"""What the baselines learn from: the sequences of an adapter's run, in its order, or any texts and continuations."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.data import Corpus, Sequences, read_corpus
from vllm_mtp.train.documents import BadLines, DataError, read_documents

OF_THE_DATA = ("length", "batch_size", "groups", "on_policy", "seed")
"""Options of an adapter's run that choose its sequences."""


def sequences(
    data: Sequence[Path],
    base: Path,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    options: dict[str, object],
) -> Sequences:
    """Sequences without end.

    Args:
        data: the output folder of an adapter's run, whose texts, continuations and options are taken; or texts as `vllm-mtp train`
            takes them, and `on_policy.safetensors` files of such runs.
        base, output: folders, as of `TrainConfig`.
        tokenizer: the base's.
        ends: tokens that end an answer.
        options: of `TrainConfig`, in front of the run's.

    Raises:
        DataError: the data cannot be used.
    """
    run = data[0] if len(data) == 1 and (data[0] / "options.json").is_file() else None
    texts = [path for path in data if path.suffix != ".safetensors"]
    continued = [path for path in data if path.suffix == ".safetensors"]
    if run is not None:
        of_run = json.loads((run / "options.json").read_text())
        options = {**{name: of_run[name] for name in OF_THE_DATA}, **options}
        texts = [path if path.exists() else run / path.name for path in map(Path, of_run["data"])]
        continued = [run / "on_policy.safetensors"] if of_run["on_policy"] else []
    on_policy = _together([load_file(path) for path in continued]) if continued else None
    if on_policy is not None:
        options = {"length": on_policy["input_ids"].shape[1], **options}
    elif options.get("on_policy"):
        raise DataError("There are no continuations in the data, and on_policy asks for some.")
    bad = BadLines()
    if texts:
        corpus = read_corpus(tokenizer, read_documents(texts, bad), ends, int(str(options.get("seed", 0))), bad)
        bad.report("data")
    elif on_policy is not None:
        options["on_policy"] = 1.0
        rows = zip(on_policy["input_ids"], on_policy["lengths"].tolist(), strict=True)
        empty = torch.empty(0, dtype=torch.long)
        corpus = Corpus(torch.cat([ids[:length] for ids, length in rows]), empty, empty.bool(), torch.zeros(1, dtype=torch.long))
    if on_policy is None:
        options["on_policy"] = 0.0
    fixed = {"base": base, "data": data, "output": output, "mask_tokens": 8, "steps": 10**7}
    return Sequences(corpus, on_policy, TrainConfig.model_validate({**options, **fixed}))


def _together(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    if len({part["input_ids"].shape[1] for part in parts}) > 1:
        raise DataError("The files of continuations have different lengths: take those of one run.")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def unused_token(data: Sequences, vocab_size: int) -> int:
    """The first token that occurs nowhere in the data.

    Raises:
        DataError: all occur.
    """
    used = torch.zeros(vocab_size, dtype=torch.bool)
    used[data.corpus.stream] = used[data.corpus.chats] = True
    if data.on_policy is not None:
        ids, lengths = data.on_policy["input_ids"], data.on_policy["lengths"]
        used[ids[torch.arange(ids.shape[1]) < lengths[:, None]]] = True
    if used.all():
        raise DataError("Every token of the vocabulary occurs in the data, and a mask token must not.")
    return int((~used).nonzero()[0])
