"""Attention of mask rows in training: every group sees the real rows before it and its own earlier rows.

Groups are taken some at a time, which need no more real keys than the longest of their prefixes has, and whose scores are small
enough to stay in a cache. Scores are computed again in the backward pass, so what is kept for it is a few numbers a row, and no
mask of all rows is ever built. In order of their prefixes groups read half of what a dense mask reads, or less.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "mtp_groups"
ROWS, ROWS_OF_A_CPU = 1024, 128
"""Mask rows that are taken at a time."""


@dataclass(frozen=True)
class Groups:
    """Which real rows each group sees.

    Attributes:
        prefix_lengths: L of each group, which sees real rows 0 .. L-1; its rows stand at positions L, L+1, .., shape [B, G].
        longest: of each group the longest of its prefixes in the sequences, on the host, shape [G].
        real_learn: whether keys and values of real rows have gradients.
    """

    prefix_lengths: torch.Tensor
    longest: torch.Tensor
    real_learn: bool

    @classmethod
    def of(cls, prefix_lengths: torch.Tensor, *, real_learn: bool) -> "Groups":
        """Groups as in the attributes."""
        return cls(prefix_lengths, prefix_lengths.amax(0).cpu(), real_learn)


@dataclass(frozen=True)
class _Part:
    """Some groups' rows, n of each sequence, and the S keys that they see: real ones and their own.

    Attributes:
        rows: of the queries, [begin, end).
        own: of the keys, [begin, end).
        num_real: keys of real rows, the first ones.
        bias: 0 where a row sees a key and minus infinity where not, [B, 1, 1, n, S].
    """

    rows: slice
    own: slice
    num_real: int
    bias: torch.Tensor

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its keys or values [B, Hkv, S, D] of all [B, Hkv, T + N, D]."""
        return torch.cat([tensor[:, :, : self.num_real], tensor[:, :, self.own]], 2)

    def add(self, gradient: torch.Tensor, found: torch.Tensor) -> None:
        """Takes in the gradient of its keys or values, of real ones too or of its own alone."""
        size = self.own.stop - self.own.start
        gradient[:, :, self.own] = found[:, :, -size:]
        if found.shape[2] > size:
            gradient[:, :, : self.num_real] += found[:, :, :-size]


def _parts(
    query: torch.Tensor, key: torch.Tensor, prefix_lengths: torch.Tensor, longest: torch.Tensor, window: int | None
) -> list[_Part]:
    """All groups; the arguments are those of `_attention`."""
    device, dtype, (G,) = query.device, query.dtype, longest.shape
    K, T = query.shape[3] // G, key.shape[2] - query.shape[3]
    at_a_time = min(max(1, (ROWS_OF_A_CPU if device.type == "cpu" else ROWS) // K), G)
    row, t = torch.arange(at_a_time * K, device=device), torch.arange(T, device=device)
    group, within = row // K, row % K
    distance = within[:, None] - within
    hidden = (group[:, None] != group) | (distance < 0) | (distance >= (window or K))
    on_own = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf).expand(len(prefix_lengths), -1, -1)
    prefixes, most, parts = prefix_lengths.repeat_interleave(K, 1)[:, :, None], longest.tolist(), []  # [B, N, 1]
    for begin in range(0, G, at_a_time):
        end = min(begin + at_a_time, G)
        rows, own = (slice(first + begin * K, first + end * K) for first in (0, T))
        n, num_real, prefix = (end - begin) * K, max(most[begin:end]), prefixes[:, rows]
        hidden = t[:num_real] >= prefix
        if window is not None:
            hidden |= prefix + within[:n, None] - t[:num_real] >= window
        on_real = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
        bias = torch.cat([on_real, on_own[:, :n, :n]], 2)[:, None, None]
        parts.append(_Part(rows, own, num_real, bias))
    return parts


def _weights(
    query: torch.Tensor, key: torch.Tensor, part: _Part, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights [B, Hkv, R, n, S] in float32, and of capped scores what tanh gave.

    Args:
        query: scaled, [B, Hkv, R, n, D].
        key: [B, Hkv, S, D].
        part: whose they are.
        softcap: of the scores.
    """
    scores, capped = (query.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, query.shape[2:4]), None
    if softcap is not None:
        capped = (scores.float() / softcap).tanh_()
        scores = capped * softcap
    return scores.add_(part.bias).softmax(-1, dtype=torch.float32), capped


# Operators of their own, which torch.compile calls as they are: it would compile what they do anew for parts of other sizes.


@torch.library.custom_op("vllm_mtp::group_attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lengths: torch.Tensor,
    longest: torch.Tensor,
    real_learn: bool,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention output [B, Hkv, R, N, D] of scaled queries [B, Hkv, R, N, D] over keys and values [B, Hkv, T + N, D]; for the
    others see `Groups` and `group_attention`."""
    output = query.new_empty(query.shape)
    for part in _parts(query, key, prefix_lengths, longest, window):
        weights, _ = _weights(query[:, :, :, part.rows], part.of(key), part, softcap)
        found = weights.to(value.dtype).flatten(2, 3) @ part.of(value)
        output[:, :, :, part.rows] = found.unflatten(2, weights.shape[2:4])
    return output


@torch.library.custom_op("vllm_mtp::group_attention_backward", mutates_args=())
def _attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    prefix_lengths: torch.Tensor,
    longest: torch.Tensor,
    real_learn: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values; those of real rows stay 0 if they do not learn."""
    of_query, of_key, of_value = query.new_empty(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    for part in _parts(query, key, prefix_lengths, longest, window):
        rows, keys = part.rows, part.of(key)
        its, behind = query[:, :, :, rows], gradient[:, :, :, rows]
        weights, capped = _weights(its, keys, part, softcap)
        mean = (behind.float() * output[:, :, :, rows].float()).sum(-1, keepdim=True)
        flat = behind.flatten(2, 3)
        of_scores = (flat @ part.of(value).transpose(2, 3)).float().view_as(weights).sub_(mean).mul_(weights)
        if capped is not None:
            of_scores.mul_(1 - capped * capped)
        of_scores = of_scores.to(query.dtype).flatten(2, 3)
        of_query[:, :, :, rows] = (of_scores @ keys).unflatten(2, behind.shape[2:4])
        first = 0 if real_learn else part.num_real
        part.add(of_key, of_scores[..., first:].transpose(2, 3) @ its.flatten(2, 3))
        part.add(of_value, weights.to(value.dtype).flatten(2, 3)[..., first:].transpose(2, 3) @ flat)
    return of_query, of_key, of_value


@_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


@_attention_backward.register_fake
def _(gradient: torch.Tensor, *tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple([tensor.new_empty(tensor.shape) for tensor in tensors[:3]])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.real_learn, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors[:3], output, *tensors[3:])


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = _attention_backward(gradient, *ctx.saved_tensors, ctx.real_learn, ctx.window, ctx.softcap)
    return (*found, None, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_keep)


def group_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    groups: Groups,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention output [B, G K, H, D], for transformers' attention interface.

    Args:
        query: queries of the mask rows, group after group, shape [B, H, G K, D].
        key, value: those of T real rows, then of the mask rows, shape [B, Hkv, T + G K, D].
        attention_mask: not read.
        scaling: factor on the scores.
        groups: which real rows they see.
        sliding_window: a row sees keys of fewer than this many positions before its own, itself included; None: all.
        softcap: c of scores that are c tanh(score / c).
    """
    dtype = value.dtype  # with autocast that of a linear's output, while rotated queries and keys are not
    by_key = (query * scaling).to(dtype).unflatten(1, (key.shape[1], -1))
    whom = groups.prefix_lengths, groups.longest, groups.real_learn
    output: torch.Tensor = _attention(by_key, key.to(dtype), value, *whom, sliding_window, softcap)
    return output.flatten(1, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, group_attention)
