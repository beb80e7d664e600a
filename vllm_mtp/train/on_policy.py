"""Sequences that the base itself continued: what it will be served on, and so what drafts are checked against."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.data import Corpus
from vllm_mtp.train.documents import DataError

BATCH = 64
MEMORY, OF_WHAT_IS_LEFT = 0.5, 0.8
"""Share of a device's memory that vLLM gets; and of a machine's that others have not taken, where there is no device."""
Continue = Callable[[list[torch.Tensor], bool], list[torch.Tensor]]
"""(prompts, sample) -> prompts with what the base wrote after them, end token included, up to the length of a sequence."""


def end_tokens(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> tuple[int, ...]:
    """Tokens that end what the base writes: the tokenizer's, and those in the base's generation settings."""
    given = getattr(settings, "eos_token_id", None)
    ends = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id} - {None}
    return tuple(sorted(ends))


def _memory_share() -> float:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return MEMORY
    memory = psutil.virtual_memory()
    return float(min(MEMORY, OF_WHAT_IS_LEFT * memory.available / memory.total))


@contextmanager
def continuer(base: PreTrainedModel, ends: Sequence[int], config: TrainConfig) -> Iterator[Continue]:
    """What continues prompts: vLLM, several times as fast, where it is installed and wanted, else transformers."""
    engine, T = config.on_policy_engine, config.length
    if engine == "auto":
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine == "transformers":

        def by_transformers(prompts: list[torch.Tensor], sample: bool) -> list[torch.Tensor]:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            found: dict[int, torch.Tensor] = {}
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                sequences = continue_prompts(base, [prompts[i] for i in batch], T - len(prompts[batch[0]]), ends, sample)
                found |= dict(zip(batch, sequences, strict=True))
            return [found[i][:T] for i in range(len(prompts))]

        yield by_transformers
        return
    from vllm import LLM, SamplingParams

    # Its own process: neither the engine's threads nor its memory stay behind.
    llm = LLM(
        str(config.base),
        max_model_len=T,
        max_num_seqs=4 * BATCH,
        gpu_memory_utilization=_memory_share(),
        enable_prefix_caching=False,
    )

    def by_vllm(prompts: list[torch.Tensor], sample: bool) -> list[torch.Tensor]:
        temperature, top_k = (1.0, 0) if sample else (0.0, 0)
        params = [
            SamplingParams(
                temperature=temperature, top_k=top_k, top_p=1.0, max_tokens=T - len(prompt), seed=None, stop_token_ids=list(ends)
            )
            for prompt in prompts
        ]
        outputs = llm.generate([prompt.tolist() for prompt in prompts], params, use_tqdm=False)
        return [
            torch.cat([prompt, prompt.new_tensor(list(output.outputs[0].token_ids))])
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    try:
        yield by_vllm
    finally:
        llm.llm_engine.engine_core.shutdown()  # its processes ask for work all the time, and training wants the cores


@torch.no_grad()
def continue_prompts(
    base: PreTrainedModel, prompts: list[torch.Tensor], num_tokens: int, ends: Sequence[int], sample: bool = False
) -> list[torch.Tensor]:
    """Prompts with up to `num_tokens` new tokens each, the end token included, greedy or sampled at temperature 1.

    Args:
        base: the causal LM.
        prompts: token ids, each of shape [tokens].
        num_tokens: the most new tokens.
        ends: ids of the tokens that end a text; none: always `num_tokens` new tokens.
        sample: sample instead of argmax.
    """
    sequences = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width, pad = max(map(len, batch)), ends[0] if ends else 0
        ids = torch.stack([torch.cat([p.new_full((width - len(p),), pad), p]) for p in batch]).to(base.device)
        seen = torch.arange(width) >= width - torch.tensor([len(p) for p in batch])[:, None]
        sampling = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        out = base.generate(  # type: ignore[operator]
            ids,
            attention_mask=seen.long().to(base.device),
            max_new_tokens=num_tokens,
            **sampling,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
        ).cpu()
        for prompt, row in zip(batch, out, strict=True):
            new = row[width:]
            stops = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).nonzero()
            sequences.append(torch.cat([prompt, new[: int(stops[0]) + 1] if len(stops) else new]))
    return sequences


def _windows(stream: torch.Tensor, config: TrainConfig, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, bool]]:
    """Prompts from texts, without end, and whether to sample: random windows of a quarter to a half of a sequence."""
    T = config.length
    while True:
        length = int(torch.randint(T // 4, T // 2 + 1, (), generator=generator))
        start = int(torch.randint(len(stream) - length, (), generator=generator))
        yield stream[start : start + length], torch.rand((), generator=generator).item() >= config.on_policy_greedy


def _questions(corpus: Corpus, config: TrainConfig, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, bool]]:
    """What stands before answers, without end, in a random order, and whether to sample; what is asked again is sampled.

    Prompts that leave less than a quarter of a sequence are left out. Nothing is yielded where none is left.
    """
    prompts, again = [prompt for prompt in corpus.prompts() if len(prompt) <= 3 * config.length // 4], False
    while prompts:
        for i in torch.randperm(len(prompts), generator=generator).tolist():
            yield prompts[i], again or torch.rand((), generator=generator).item() >= config.on_policy_greedy
        again = True


def on_policy_sequences(
    base: PreTrainedModel, corpus: Corpus, ends: Sequence[int], config: TrainConfig
) -> Iterator[int | dict[str, torch.Tensor]]:
    """Yields the number of sequences done so far, and at last the tensors that `Sequences` takes.

    Texts are continued from random windows, chats from before each answer, in proportion to the tokens that can be learned from.
    Continuations fill the length or stop at an end token.

    Raises:
        DataError: no prompt leaves room for an answer, or the base answers nothing.
    """
    generator, random = torch.Generator().manual_seed(config.seed), torch.random.get_rng_state()
    torch.manual_seed(config.seed)
    T, keep = config.length, config.on_policy_sequences
    num_text = len(corpus.stream) if len(corpus.stream) > T else 0
    questions = _questions(corpus, config, generator)
    first = next(questions, None)
    if first is None and not num_text:
        raise DataError(f"No prompt of the chats fits in {3 * T // 4} of {T} tokens: ask for a larger length, or --on-policy 0.")
    from_chats = 0 if first is None else round(keep * len(corpus.rows) / (num_text + len(corpus.rows)))
    sources = [(keep - from_chats, _windows(corpus.stream, config, generator))] if num_text else []
    if first is not None:
        sources.append((from_chats, itertools.chain([first], questions)))
    sequences: list[torch.Tensor] = []
    prompt_lengths: list[int] = []
    with continuer(base, ends, config) as continued:
        for wanted, source in sources:
            goal, in_vain = len(sequences) + wanted, 0
            while len(sequences) < goal:
                batch, before = list(itertools.islice(source, min(4 * BATCH, goal - len(sequences)))), len(sequences)
                for sample in (False, True):
                    prompts = [prompt for prompt, sampled in batch if sampled == sample]
                    for prompt, sequence in zip(prompts, continued(prompts, sample) if prompts else [], strict=True):
                        if len(sequence) >= len(prompt) + 2:
                            sequences.append(sequence)
                            prompt_lengths.append(len(prompt))
                in_vain = in_vain + len(batch) if len(sequences) == before else 0
                if in_vain >= 4 * BATCH:
                    raise DataError(f"The base ended {in_vain} answers in a row at once: ask for --on-policy 0.")
                yield len(sequences)
    torch.random.set_rng_state(random)
    yield {
        "input_ids": torch.stack([torch.cat([s, s.new_zeros(T - len(s))]) for s in sequences]),
        "lengths": torch.tensor([len(s) for s in sequences]),
        "prompt_lengths": torch.tensor(prompt_lengths),
    }
