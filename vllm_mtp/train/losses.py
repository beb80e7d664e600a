"""The loss of mask rows: plain head and sampler head against the base's own prediction (or the text), and consistency of states."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vllm_mtp.train.config import TrainConfig


def _mean_over_processes(total: torch.Tensor) -> torch.Tensor:
    """So that the mean of the processes' losses is the loss of their rows together, however these are shared out."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total


def supervised(tokens: torch.Tensor, lengths: torch.Tensor, answers: torch.Tensor | None) -> torch.Tensor:
    """Which rows of groups have a label: up to a group's first token that is padding or may not be one, shape [B, G, K].

    Args:
        tokens: where the token stands that each row predicts, consecutive in a group, shape [B, G, K].
        lengths: tokens of each sequence that are not padding, shape [B].
        answers: tokens that may be labels, shape [B, T]; None: all.
    """
    counts = tokens < lengths[:, None, None]
    if answers is not None:
        at = tokens.clamp(max=answers.shape[1] - 1).flatten(1)
        counts &= answers.gather(1, at).view(counts.shape).cumprod(-1).bool()
    return counts


def masked_losses(
    unembed: Callable[[torch.Tensor], torch.Tensor],
    predict: Callable[[torch.Tensor], torch.Tensor],
    teacher: torch.Tensor,
    z: torch.Tensor,
    sampled: torch.Tensor | None,
    labels: torch.Tensor | None,
    counts: torch.Tensor,
    config: TrainConfig,
) -> dict[str, torch.Tensor]:
    """`loss` and its terms `plain`, `sampler`, `consistency`, each a mean over the mask rows that count.

    Args:
        unembed: states to logits.
        predict: the teacher's states to its logits.
        teacher: states of the teacher's rows that predict the same labels, shape [B, G, K, d].
        z: states of the mask rows, shape [B, G, K, d].
        sampled: output states of the sampler head, shape [B, G, K, d]; None without one.
        labels: the text's tokens, shape [B, G, K]; None where these are not the targets.
        counts: which mask rows have a label, shape [B, G, K].
        config: weights and kind of targets.
    """
    K = z.shape[2]
    weight = config.loss.position_decay ** torch.arange(K, device=z.device) * counts
    weight = weight / _mean_over_processes(weight.sum())

    def cross_entropies(
        labels: torch.Tensor | None, weight: torch.Tensor, teacher: torch.Tensor, *heads: torch.Tensor
    ) -> list[torch.Tensor]:
        """Of some rows [n], for each head."""
        target, entropy = labels, 0
        if config.targets == "distribution":
            target = predict(teacher).float().softmax(-1)
            if config.recipe == "self-distill":
                # What makes a KL divergence of the cross-entropy; gradients are the same.
                entropy = torch.special.entr(target).sum(-1)
        elif config.targets == "argmax":
            target = predict(teacher).argmax(-1)
        assert target is not None
        sums = []
        for states in heads:
            rows = F.cross_entropy(unembed(states).float(), target, reduction="none") - entropy
            sums.append((weight * rows).sum())
        return sums

    heads = {"plain": z} if sampled is None else {"plain": z, "sampler": sampled}
    pieces = list(zip(*(part.flatten(0, 2).split(config.logit_rows) for part in (weight, teacher, *heads.values())), strict=True))
    some_labels = [None] * len(pieces) if labels is None else labels.flatten().split(config.logit_rows)
    sums_of = cross_entropies if len(pieces) == 1 else partial(checkpoint, cross_entropies, use_reentrant=False)
    sums = [sums_of(of_piece, *piece) for of_piece, piece in zip(some_labels, pieces, strict=True)]
    terms = {name: torch.stack(of_head).sum() for name, of_head in zip(heads, zip(*sums, strict=True), strict=True)}
    terms["consistency"] = (weight * (teacher.float() - z.float()).pow(2).mean(-1)).sum()
    loss = config.loss.plain_head * terms["plain"] + config.loss.consistency * terms["consistency"]
    if sampled is not None:
        loss = loss + config.loss.sampler_head * terms["sampler"]
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}
