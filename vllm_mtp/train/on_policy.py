"""Sequences that the base itself continued: what it will be served on, and so what drafts are checked against."""

import gc
import importlib.util
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from vllm_mtp.train.config import TrainConfig

BATCH = 64
Continue = Callable[[list[torch.Tensor], int, bool], list[torch.Tensor]]
"""(prompts, most new tokens, sample) -> prompts with what the base wrote after them, end-of-text included."""


def continuer(base: PreTrainedModel, end: int | None, config: TrainConfig) -> Continue:
    """What continues prompts: vLLM, several times as fast, where it is installed and wanted, else transformers."""
    engine = config.on_policy_engine
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "transformers":
        return lambda prompts, num_tokens, sample: continue_prompts(base, prompts, num_tokens, end, sample)
    from vllm import LLM, SamplingParams

    # Its own process: neither the engine's threads nor its memory stay behind.
    llm = LLM(
        str(config.base),
        max_model_len=config.length,
        max_num_seqs=4 * BATCH,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
    )

    def continued(prompts: list[torch.Tensor], num_tokens: int, sample: bool) -> list[torch.Tensor]:
        temperature, top_k = (1.0, 0) if sample else (0.0, 0)
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=1.0, max_tokens=num_tokens, seed=None)
        outputs = llm.generate([prompt.tolist() for prompt in prompts], params, use_tqdm=False)
        return [
            torch.cat([prompt, prompt.new_tensor(list(output.outputs[0].token_ids))])
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    return continued


@torch.no_grad()
def continue_prompts(
    base: PreTrainedModel, prompts: list[torch.Tensor], num_tokens: int, end: int | None, sample: bool = False
) -> list[torch.Tensor]:
    """Prompts with up to `num_tokens` new tokens each, end-of-text included, greedy or sampled at temperature 1.

    Args:
        base: the causal LM.
        prompts: token ids, each of shape [tokens].
        num_tokens: the most new tokens.
        end: id of the end-of-text token; None: always `num_tokens` new tokens.
        sample: sample instead of argmax.
    """
    sequences = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width, pad = max(map(len, batch)), end if end is not None else 0
        ids = torch.stack([torch.cat([p.new_full((width - len(p),), pad), p]) for p in batch]).to(base.device)
        seen = torch.arange(width) >= width - torch.tensor([len(p) for p in batch])[:, None]
        sampling = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        out = base.generate(  # type: ignore[operator]
            ids,
            attention_mask=seen.long().to(base.device),
            max_new_tokens=num_tokens,
            **sampling,
            eos_token_id=end,
            pad_token_id=pad,
        ).cpu()
        for prompt, row in zip(batch, out, strict=True):
            new = row[width:]
            stops = (new == end).nonzero() if end is not None else new.new_empty(0)
            sequences.append(torch.cat([prompt, new[: int(stops[0]) + 1] if len(stops) else new]))
    return sequences


def on_policy_sequences(
    base: PreTrainedModel, stream: torch.Tensor, end: int | None, config: TrainConfig
) -> Iterator[int | dict[str, torch.Tensor]]:
    """Yields the number of sequences done so far, and at last the tensors that `Sequences` takes.

    Prompts are random windows of a quarter to a half of `config.length`; continuations fill the length or stop at end of text.
    """
    generator, random = torch.Generator().manual_seed(config.seed), torch.random.get_rng_state()
    torch.manual_seed(config.seed)
    T = config.length
    continued = continuer(base, end, config)
    sequences: list[torch.Tensor] = []
    prompt_lengths: list[int] = []
    while len(sequences) < config.on_policy_sequences:
        # One length a batch, so that every continuation can fill its sequence.
        length = int(torch.randint(T // 4, T // 2 + 1, (1,), generator=generator))
        starts = torch.randint(len(stream) - length, (4 * BATCH,), generator=generator)
        prompts = [stream[s : s + length] for s in starts]
        greedy = round(config.on_policy_greedy * len(prompts))
        parts = [(prompts[:greedy], False), (prompts[greedy:], True)]
        for sequence in (s for part, sample in parts for s in (continued(part, T - length, sample) if part else [])):
            if len(sequence) >= length + 2:
                sequences.append(sequence)
                prompt_lengths.append(length)
        yield min(len(sequences), config.on_policy_sequences)
    del continued
    gc.collect()  # ends an engine's processes before training wants the cores
    torch.random.set_rng_state(random)
    keep = config.on_policy_sequences
    padded = torch.stack([torch.cat([s, s.new_zeros(T - len(s))]) for s in sequences[:keep]])
    yield {
        "input_ids": padded,
        "lengths": torch.tensor([len(s) for s in sequences[:keep]]),
        "prompt_lengths": torch.tensor(prompt_lengths[:keep]),
    }
