"""What an adapter's drafts give on the base's plain greedy text: no engine and no decoding loop."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from vllm_mtp.outputs import Output, acceptance_length, loops, novel
from vllm_mtp.train.model import TrainedModel

LAYOUTS = ("quadratic", "linear")


class Decoding(NamedTuple):
    """How drafts are made: layout of the groups, `sampler` or `plain` head, and k, drafts a group."""

    layout: str
    head: str
    k: int


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


@torch.no_grad()
def draft_table(model: TrainedModel, text: torch.Tensor, prompt_length: int, with_sampler: bool) -> list[list[int]]:
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


def decoded(
    model: TrainedModel,
    texts: Sequence[torch.Tensor],
    prompt_lengths: Sequence[int],
    budgets: Collection[int],
    layouts: Collection[str] = LAYOUTS,
) -> dict[Decoding, list[Output]]:
    """What the reference decoder would give for each text, by layout, head and k; both heads where there is a sampler head.

    Args:
        model: the model in training.
        texts: prompts with the base's greedy continuations, each of shape [tokens].
        prompt_lengths: tokens of each prompt.
        budgets: values of k, each at most the number of mask tokens.
        layouts: some of `LAYOUTS`.
    """
    outputs: dict[Decoding, list[Output]] = defaultdict(list)
    for ids, prompt_length in zip(texts, prompt_lengths, strict=True):
        text = ids.tolist()
        for head in ("sampler", "plain") if model.sampler is not None else ("plain",):
            drafts = draft_table(model, ids.to(model.base.device), prompt_length, head == "sampler")
            for layout in layouts:
                for k in budgets:
                    steps = emitted(drafts, text, prompt_length, k, layout)
                    outputs[Decoding(layout, head, k)].append(Output(text[prompt_length:], steps))
    return dict(outputs)


def tokens_per_forward(model: TrainedModel, texts: Sequence[torch.Tensor], prompt_lengths: Sequence[int]) -> dict[str, float]:
    """Mean tokens per forward after the prompt's, by layout, head and k: 1 to 8, 16, 32 and the number of mask tokens.

    `.novel` counts each text only up to where it begins to repeat itself, `.free` only texts that do not loop.
    """
    K = model.options.mask_tokens
    means: dict[str, float] = {}
    looping = 0
    for (layout, head, k), outputs in decoded(
        model, texts, prompt_lengths, sorted({*range(1, 9), 16, 32, K} & {*range(K + 1)})
    ).items():
        free = [output for output in outputs if not loops(output.tokens)]
        looping = len(outputs) - len(free)
        for kind, some in (("", outputs), (".novel", [novel(output) for output in outputs]), (".free", free)):
            mean = acceptance_length(some)
            if mean is not None:
                means[f"{layout}.{head}{kind}.{k}"] = round(mean, 3)
    return means | {"looping": looping, "texts": len(texts)}
