"""Training data: tokens of texts and chats, sequences of them or continued by the base, and the rows that get mask tokens."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.documents import BadLines, DataError, Document, Messages


@dataclass(frozen=True)
class Corpus:
    """Tokens to learn from.

    Attributes:
        stream: texts in a shuffled order, each closed by the end-of-text token, shape [tokens].
        chats: chats one after the other, shape [N].
        answers: which of these an assistant wrote, each turn's end token included, shape [N].
        starts: where in `chats` each chat begins, and the end of the last, shape [C + 1].
    """

    stream: torch.Tensor
    chats: torch.Tensor
    answers: torch.Tensor
    starts: torch.Tensor

    @cached_property
    def rows(self) -> torch.Tensor:
        """Tokens of answers that another one follows: where a group of mask tokens has a label for its first, at least."""
        return (self.answers[:-1] & self.answers[1:]).nonzero().flatten()

    def chat_of(self, token: int) -> tuple[int, int]:
        """Where the chat that holds a token of `chats` begins and ends."""
        chat = int(torch.searchsorted(self.starts, token, right=True)) - 1
        return int(self.starts[chat]), int(self.starts[chat + 1])

    def digest(self) -> str:
        """SHA-256 of all that there is."""
        parts = (self.stream, self.chats, self.answers, self.starts)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    def prompts(self) -> Iterator[torch.Tensor]:
        """What stands before each answer, in its chat."""
        begins = self.answers.clone()
        begins[1:] &= ~self.answers[:-1]
        for begin in begins.nonzero().flatten().tolist():
            yield self.chats[self.chat_of(begin)[0] : begin]


def read_corpus(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], ends: Sequence[int], seed: int, bad: BadLines
) -> Corpus:
    """Tokens of all documents.

    Args:
        tokenizer: with a chat template where there are chats.
        documents: texts and chats.
        ends: tokens that end an answer; what the template writes after one is not learned.
        seed: of the texts' order.
        bad: takes the chats that the template refuses.
    """
    texts = [document.content for document in documents if isinstance(document.content, str)]
    chats, answers = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.bool)]
    for document in documents:
        if isinstance(document.content, list):
            for ids, by_assistant in chat_tokens(tokenizer, document.content, document.where, ends, bad):
                chats.append(torch.tensor(ids))
                answers.append(torch.tensor(by_assistant))
    starts = torch.tensor([len(chat) for chat in chats]).cumsum(0)
    return Corpus(token_stream(tokenizer, texts, seed), torch.cat(chats), torch.cat(answers), starts)


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str], seed: int) -> torch.Tensor:
    """All texts in a shuffled order, each closed by the end-of-text token, shape [tokens]."""
    texts = random.Random(seed).sample(texts, len(texts))
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return torch.tensor([token for ids in encoded for token in [*ids, *end]], dtype=torch.long)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, ends: Sequence[int], bad: BadLines
) -> list[tuple[list[int], list[bool]]]:
    """Sequences of a chat: tokens, and which of them an assistant wrote. None where the chat is bad.

    One sequence, unless the template writes an earlier turn otherwise once a later one is there, as those do that drop the thoughts
    of earlier turns: then each answer ends a sequence of its own, behind what the model is given when it writes it.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{where} is a chat, and the base's tokenizer has no chat template: take a base that was tuned for chats.")
    try:
        rendered = _rendered(tokenizer, messages)
    except (TemplateError, TypeError) as error:  # a TypeError where the template adds text to what is none
        bad.add(where, f"the chat template refuses it: {error}")
        return []
    sequences = []
    for text, spans in rendered:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, answers = encoded["input_ids"], [False] * len(encoded["input_ids"])
        for begin, end in spans:
            for i, (start, _) in enumerate(encoded["offset_mapping"]):
                if begin <= start < end:
                    answers[i] = True
                    if ids[i] in ends:
                        break
        answers[:1] = [False]  # no row predicts it
        if not any(a and b for a, b in pairwise(answers)):
            bad.add(where, "no answer has two tokens")
            return []
        sequences.append((ids, answers))
    return sequences


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts of a chat, with begin and end of each answer in them."""

    def render(count: int, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    texts: list[tuple[str, list[tuple[int, int]]]] = []
    for i, message in enumerate(messages):
        if i == 0 or message["role"] != "assistant":
            continue
        prompt, text = render(i, prompt=True), render(i + 1)
        # A prompt may go on where a finished turn does not, for example with the mark that opens the thoughts.
        begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))
        if begin < len(prompt) and not text.startswith(render(i)):
            raise TemplateError(f"message {i + 1} changes how those before it are written")
        earlier, spans = texts[-1] if texts else ("", [])
        if texts and text.startswith(earlier):
            texts[-1] = (text, [*spans, (begin, len(text))])
        else:
            texts.append((text, [(begin, len(text))]))
    return texts


def first_prompts(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], num_tokens: int, ends: Sequence[int], bad: BadLines
) -> list[torch.Tensor]:
    """What the base is asked to continue: of each text the first tokens, of each chat what stands before its first answer."""
    prompts = []
    for document in documents:
        if isinstance(document.content, str):
            ids = tokenizer(document.content, add_special_tokens=False, truncation=True, max_length=num_tokens)["input_ids"]
        else:
            sequences = chat_tokens(tokenizer, document.content, document.where, ends, bad)
            ids = sequences[0][0][: sequences[0][1].index(True)] if sequences else []
        if ids:
            prompts.append(torch.tensor(ids))
    return prompts


class Sequences(Dataset):
    """`config.steps * config.batch_size` sequences and the lengths of their groups' prefixes; item i depends on seed and i alone.

    Texts are learned in windows of their stream. A chat is a sequence of its own, padded on the right; of a longer one, a window.
    Texts and chats are drawn in proportion to the tokens that can be learned from.

    Groups stand behind random rows. With self-distill they end regions: as many real rows lie between two groups as their mask
    tokens leave of a region, and the sequences of a step have one number of mask tokens and one offset.

    Args:
        corpus: tokens of the documents.
        on_policy: sequences that the base continued: `input_ids` [N, T] padded on the right, `lengths` [N], `prompt_lengths` [N].
        config: lengths, number of groups and share of on-policy sequences.

    Raises:
        DataError: there is no chat, and too little text for one sequence.
    """

    def __init__(self, corpus: Corpus, on_policy: dict[str, torch.Tensor] | None, config: TrainConfig) -> None:
        self.num_text = len(corpus.stream) if len(corpus.stream) > config.length else 0
        if not self.num_text and not len(corpus.rows):
            raise DataError(
                f"The data has {len(corpus.stream)} tokens, not one sequence of {config.length}: give more, or a smaller length."
            )
        self.corpus, self.on_policy, self.config = corpus, on_policy, config
        self.region = config.length // config.groups  # rows of one, with self-distill

    def __len__(self) -> int:
        return self.config.steps * self.config.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` [T], `lengths` [], `answers` [T] (what may be a label), `prefix_lengths` [G]; self-distill: `slots` [k]."""
        config, corpus, generator = self.config, self.corpus, torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)
        T = config.length
        num_masks, offset = self._step(index // config.batch_size) if config.recipe == "self-distill" else (0, 0)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        answers = torch.ones(T, dtype=torch.bool)
        if self.on_policy is not None and torch.rand(1, generator=generator).item() < config.on_policy:
            i = draw(0, len(self.on_policy["lengths"]))
            ids, length = self.on_policy["input_ids"][i], int(self.on_policy["lengths"][i])
            # The prompt's last row is followed by the first group; the last group still has one label before the end.
            rows = torch.arange(int(self.on_policy["prompt_lengths"][i]), length - 1)
        elif len(corpus.rows) and draw(0, self.num_text + len(corpus.rows)) >= self.num_text:
            ids, answers, length = self._chat(draw)
            rows = (answers[1:-1] & answers[2:]).nonzero().flatten() + 1
        else:
            start, length = draw(0, self.num_text - T), T
            ids = corpus.stream[start : start + T]
            rows = torch.arange(1, T - (num_masks or config.mask_tokens))
        if num_masks:
            chosen = rows[offset % len(rows) :: self.region - num_masks][: config.groups]
        else:
            chosen = rows[torch.randperm(len(rows), generator=generator)[: config.groups]]
        prefix_lengths = chosen.repeat(-(-config.groups // len(chosen)))[: config.groups].sort().values  # see `group_attention`
        item = {"input_ids": ids, "lengths": torch.tensor(length), "answers": answers, "prefix_lengths": prefix_lengths}
        return {**item, "slots": torch.arange(num_masks + 1)} if num_masks else item

    def _step(self, step: int) -> tuple[int, int]:
        """What self-distill draws for each step: the number of mask tokens, and the offset of the regions' ends."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 - 1 - step)
        num_masks = int(torch.randint(1, self.config.mask_tokens + 1, (1,), generator=generator))
        return num_masks, int(torch.randint(self.region - num_masks, (1,), generator=generator))

    def _chat(self, draw: Callable[[int, int], int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """A chat, or a window of one: tokens [T], which of them are answers [T], and the number that are not padding."""
        corpus, T = self.corpus, self.config.length
        row = int(corpus.rows[draw(0, len(corpus.rows))])
        start, end = corpus.chat_of(row)
        if end - start > T:
            start = draw(max(start, row + 2 - T), min(row - 1, end - T) + 1)  # the row has one before it and its label behind it
            end = start + T
        padding = (0, T - (end - start))
        ids, answers = (torch.nn.functional.pad(tokens[start:end], padding) for tokens in (corpus.chats, corpus.answers))
        return ids, answers, end - start
