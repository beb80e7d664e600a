"""Tokens per forward on held-out prompts, from the base's plain greedy text: no engine and no decoding loop."""

from collections import Counter

import torch

from vllm_mtp.train.model import MaskedModel


def emitted(drafts: list[list[int]], text: list[int], prompt_length: int, k: int, layout: str) -> list[int]:
    """Tokens that each forward emits when `text` is decoded with k drafts a group, the prompt's forward first.

    Verification is exact, so the output is the plain text and only the number of forwards depends on the drafts.

    Args:
        drafts: the drafts of the group behind row `prompt_length - 1 + i`, for tokens `prompt_length + 1 + i` and on.
        text: prompt and plain continuation.
        prompt_length: tokens of the prompt.
        k: drafts a group, at most as many as there are.
        layout: `quadratic`, a group behind every row; or `linear`, one behind the last row only.
    """
    forwards, done, fresh = [1], prompt_length + 1, True  # the prompt's forward emits one token and leaves a group behind it
    while done < len(text):
        accepted, proposed = 0, drafts[done - 1 - prompt_length][:k] if fresh else []
        while accepted < len(proposed) and done + accepted < len(text) and proposed[accepted] == text[done + accepted]:
            accepted += 1
        forwards.append(min(accepted + 1, len(text) - done))
        done += accepted + 1
        fresh = layout == "quadratic" or accepted == len(proposed)
    return forwards


def loops(text: list[int], n: int = 8, times: int = 3) -> bool:
    """Whether some n-gram occurs at least so often: text that repeats itself is easy to draft and flatters a mean."""
    return max(Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)).values(), default=0) >= times


def novel_length(text: list[int], n: int = 8) -> int:
    """Tokens before the one that completes an n-gram for the second time: where text begins to repeat itself."""
    seen = set()
    for i in range(len(text) - n + 1):
        gram = tuple(text[i : i + n])
        if gram in seen:
            return i + n - 1
        seen.add(gram)
    return len(text)


@torch.no_grad()
def draft_table(model: MaskedModel, text: torch.Tensor, prompt_length: int, with_sampler: bool) -> list[list[int]]:
    """Drafts [rows, K] of the groups behind every row from the prompt's last to the text's last but one, as `emitted` takes them.

    The token that the row itself predicts is the text's: the sampler head starts from it and goes on with its own drafts.
    """
    lengths = torch.arange(prompt_length, len(text), device=text.device)
    z = model.states(text[None], lengths[None])[1][0]
    if not with_sampler or model.sampler is None:
        return model.unembed(z).argmax(-1).tolist()
    previous, drafts = text[lengths], []
    for state in z.unbind(1):
        previous = model.unembed(model.sampler(model.embed(previous), state)).argmax(-1)
        drafts.append(previous)
    return torch.stack(drafts, 1).tolist()


def tokens_per_forward(model: MaskedModel, texts: list[torch.Tensor], prompt_lengths: list[int]) -> dict[str, float]:
    """Mean tokens per forward after the prompt's, by layout, head and k.

    `.novel` counts each text only up to where it begins to repeat itself, `.free` only texts that do not loop.

    Args:
        model: the model in training.
        texts: prompts with the base's greedy continuations, each of shape [tokens].
        prompt_lengths: tokens of each prompt.
    """
    K = len(model.mask_embeddings)
    budgets = [k for k in (1, 2, 4, 8, 16, 32) if k < K] + [K]
    tokens: Counter[str] = Counter()
    forwards: Counter[str] = Counter()
    looping = 0
    for ids, prompt_length in zip(texts, prompt_lengths, strict=True):
        text = ids.tolist()
        repeats, cut = loops(text[prompt_length:]), prompt_length + novel_length(text[prompt_length:])
        looping += repeats
        for head in ("sampler", "plain") if model.sampler is not None else ("plain",):
            drafts = draft_table(model, ids.to(model.mask_embeddings.device), prompt_length, head == "sampler")
            for layout in ("quadratic", "linear"):
                for k in budgets:
                    counts = emitted(drafts, text, prompt_length, k, layout)[1:]
                    novel = emitted(drafts, text[:cut], prompt_length, k, layout)[1:]
                    for kind, some in (("", counts), (".novel", novel), (".free", [] if repeats else counts)):
                        tokens[f"{layout}.{head}{kind}.{k}"] += sum(some)
                        forwards[f"{layout}.{head}{kind}.{k}"] += len(some)
    means = {name: round(tokens[name] / forwards[name], 3) for name in tokens if forwards[name]}
    return means | {"looping": looping, "texts": len(texts)}
