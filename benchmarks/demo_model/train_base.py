"""Train the demo's base model on the standard library: a byte-level BPE tokenizer and a Llama of 7 M parameters, from nothing, and
then a wider one that starts as the same function; at last three domains instead of one.

    python -m benchmarks.demo_model.train_base --output runs/base --steps 1250
    python -m benchmarks.demo_model.train_base --output runs/wide --steps 600 --widen runs/base/model --intermediate-size 2176
    python -m benchmarks.demo_model.train_base --output runs/mixed --steps 450 --widen runs/wide/model --intermediate-size 2176 \\
        --mixture '{"code": 0.45, "prose": 0.2, "arithmetic": 0.35}'

Muon for the matrices and AdamW for the rest, bf16 autocast, torch.compile, transformers' Trainer; a killed run resumes
from its last checkpoint when the same command is given again.
"""

import argparse
import itertools
import json
import lzma
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.demo_model import arithmetic
from benchmarks.demo_model.corpus import documents, prose_split, repeated, split
from vllm_mtp.train.on_policy import continue_prompts

VOCABULARY = 2048
LENGTH = 512
MOST_CHARACTERS_A_TOKEN = 4  # on average over a domain's documents
HELD_OUT_PROBLEMS = 20_000  # characters of them, for bits per byte


def train_tokenizer(texts: list[str], output: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`, saved to `output` as transformers expects it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=LENGTH
    )
    tokenizer.save_pretrained(output)
    return tokenizer


def new_model(intermediate_size: int = 1024) -> LlamaForCausalLM:
    """A Llama of 4 layers, small enough for two cores and divisible by two tensor-parallel ranks."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=intermediate_size,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
            attn_implementation="eager",  # type: ignore[call-arg]  # compiled, it beats CPU flash attention at this length by a fifth
        )
    )


@torch.no_grad()
def widened(folder: Path, intermediate_size: int) -> LlamaForCausalLM:
    """The model of `folder` with more MLP neurons, whose outputs count nothing yet: the same function.

    Net2Net, arXiv 1511.05641.
    """
    small, wide = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), new_model(intermediate_size)
    own = wide.state_dict()
    for name, tensor in small.state_dict().items():
        if name.endswith("down_proj.weight"):
            own[name].zero_()
        own[name][tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


class Windows(Dataset):
    """`num_windows` windows of `LENGTH` tokens; every pass over the stream is shuffled and starts at another offset."""

    def __init__(self, stream: torch.Tensor, num_windows: int, first: int = 0) -> None:
        self.stream, self.num_windows, self.first = stream, num_windows, first
        self.per_pass = len(stream) // LENGTH - 1

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, index = divmod(self.first + index, self.per_pass)
        generator = torch.Generator().manual_seed(number)
        offset = int(torch.randint(LENGTH, (1,), generator=generator))
        start = offset + LENGTH * int(torch.randperm(self.per_pass, generator=generator)[index])
        ids = self.stream[start : start + LENGTH]
        return {"input_ids": ids, "labels": ids}


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the matrices inside the layers, AdamW on embeddings and norms, one learning-rate schedule over both."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        named = list(model.named_parameters())
        matrices = [p for name, p in named if ".layers." in name and p.ndim == 2]
        others = [p for name, p in named if not (".layers." in name and p.ndim == 2)]
        muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})
        self.parts = (muon, adamw)
        self.param_groups = [*muon.param_groups, *adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = list(itertools.chain.from_iterable(part.param_groups for part in self.parts))


def token_stream(tokenizer: PreTrainedTokenizerFast, files: dict[str, str]) -> torch.Tensor:
    """All files in a shuffled order, each closed by the end-of-text token; modules twice, tests once."""
    names = repeated(files)
    random.Random(0).shuffle(names)
    encoded = {name: tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for name, text in files.items()}
    return torch.tensor([token for name in names for token in encoded[name]])


def mixed_stream(tokenizer: PreTrainedTokenizerFast, num_tokens: int, shares: dict[str, float], seed: int) -> torch.Tensor:
    """About `num_tokens` of the domains in `shares`, their documents shuffled together, each closed by the end-of-text token."""
    mixed: list[list[int]] = []
    for domain, share in shares.items():
        wanted, size = share * num_tokens, 0
        for text in documents(domain, False, round(wanted * MOST_CHARACTERS_A_TOKEN), seed):
            if size >= wanted:
                break
            mixed.append(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
            size += len(mixed[-1])
    random.Random(seed).shuffle(mixed)
    return torch.tensor(list(itertools.chain.from_iterable(mixed)))


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int = 200) -> float:
    """Share of held-out arithmetic problems whose answer the model gives, decoding greedily."""
    problems = list(itertools.islice(arithmetic.problems(held_out=True), num_problems))
    prompts = [torch.tensor(tokenizer(made.prompt)["input_ids"]) for made in problems]
    texts = continue_prompts(model, prompts, 160, (tokenizer.eos_token_id,))
    written = [str(tokenizer.decode(text[len(prompt) :])) for prompt, text in zip(prompts, texts, strict=True)]
    return sum(arithmetic.answer(text) == made.answer for text, made in zip(written, problems, strict=True)) / num_problems


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, files: dict[str, str]) -> float:
    """Bits per byte of `files` together, file by file with half a window of context carried over; the end of text is paid
    for too."""
    nats, size = 0.0, 0
    for text in files.values():
        # In training a file follows the end of another one.
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        size += len(text.encode())
        done = 1
        for start in range(0, max(1, len(ids) - LENGTH // 2), LENGTH // 2):
            window = ids[start : start + LENGTH]
            logits = model(window[None]).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
            nats += losses[done - start - 1 :].sum().item()
            done = start + len(window)
    return nats / math.log(2) / size


def xz_bits_per_byte(files: dict[str, str]) -> float:
    """Bits per byte of `xz -9e` on the same files together."""
    data = "".join(files.values()).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints; the model goes to OUTPUT/model")
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 512 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--save-steps", type=int, default=300)
    parser.add_argument("--widen", type=Path, help="start from this trained model, with as many MLP neurons or more")
    parser.add_argument("--intermediate-size", type=int, default=1024, help="MLP neurons a layer")
    parser.add_argument("--first-window", type=int, default=0, help="windows of the data that an earlier run has used")
    parser.add_argument("--mixture", type=json.loads, help="JSON of each domain's share; the library's source alone by default")
    parser.add_argument("--seed", type=int, default=0, help="of the mixture")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, held_out = split()
    tokenizer = train_tokenizer(list(train.values()), options.output / "model")
    if options.mixture is None:
        stream = token_stream(tokenizer, train)
    else:
        stream = mixed_stream(tokenizer, (options.steps * options.batch_size + 2) * LENGTH, options.mixture, options.seed)
    model = widened(options.widen, options.intermediate_size) if options.widen else new_model(options.intermediate_size)
    optimizer = MuonAdamW(model, options.learning_rate)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (options.steps - step) / (options.steps - warmup)))
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            bf16=True,
            use_cpu=True,
            torch_compile=True,
            max_grad_norm=1.0,
            logging_steps=50,
            save_steps=options.save_steps,
            save_total_limit=2,
            report_to=[],
            dataloader_num_workers=0,
        ),
        train_dataset=Windows(stream, options.steps * options.batch_size, options.first_window),
        optimizers=(optimizer, schedule),
    )
    checkpoint = get_last_checkpoint(str(options.output)) if options.output.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    model.bfloat16()
    model.save_pretrained(options.output / "model")
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": options.steps,
        "tokens": options.steps * options.batch_size * LENGTH,
        "train_files": len(train),
        "held_out_files": len(held_out),
        "bits_per_byte": bits_per_byte(model.float(), tokenizer, held_out),
        "xz_bits_per_byte": xz_bits_per_byte(held_out),
    }
    if options.mixture is not None:
        problems = {str(i): text for i, text in enumerate(documents("arithmetic", True, HELD_OUT_PROBLEMS))}
        figures["prose_bits_per_byte"] = bits_per_byte(model, tokenizer, prose_split()[1])
        figures["prose_xz_bits_per_byte"] = xz_bits_per_byte(prose_split()[1])
        figures["arithmetic_bits_per_byte"] = bits_per_byte(model, tokenizer, problems)
        figures["arithmetic_accuracy"] = accuracy(model, tokenizer)
    (options.output / "model" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
