"""Attention of mask rows in training: every group sees the real rows before it and its own earlier rows.

Real keys and a group's own keys are scored apart, so no mask of [mask rows, mask rows] is ever built: for G groups of K rows
that is K instead of G K columns a row.
"""

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "mtp_groups"


def group_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention output [B, G K, H, D], for transformers' attention interface.

    Args:
        query: queries of the mask rows, group after group, shape [B, H, G K, D].
        key, value: those of T real rows, then of the mask rows, shape [B, Hkv, T + G K, D].
        attention_mask: 0 where group g may see real row t and a large negative number elsewhere, shape [B, 1, G, T].
        scaling: factor on the scores.
        sliding_window: a row sees keys of fewer than this many positions before its own, itself included; None: all.
        softcap: c of scores that are c tanh(score / c).
    """
    B, H, N, D = query.shape
    Hkv, (G, T) = key.shape[1], attention_mask.shape[2:]
    K, R = N // G, H // Hkv
    query = query.reshape(B, Hkv, R * G * K, D) * scaling
    real_key, own_key = key.split([T, N], 2)
    real_value, own_value = value.split([T, N], 2)

    real = (query @ real_key.transpose(2, 3)).view(B, Hkv, R, G, K, T)
    own = query.view(B, Hkv, R, G, K, D) @ own_key.view(B, Hkv, 1, G, K, D).transpose(-1, -2)
    if softcap is not None:
        real, own = softcap * torch.tanh(real / softcap), softcap * torch.tanh(own / softcap)
    i = torch.arange(K, device=query.device)
    distance = i[:, None] - i
    hidden = distance < 0
    real = real + attention_mask[:, :, None, :, None]
    if sliding_window is not None:
        hidden = hidden | (distance >= sliding_window)
        prefix = (attention_mask == 0).sum(-1, keepdim=True)  # L: a group sees real rows 0 .. L-1; its mask rows stand at L + i
        t = torch.arange(T, device=query.device)
        too_old = prefix[..., None] + i[:, None] - t >= sliding_window  # [B, 1, G, K, T]
        real = real.masked_fill(too_old[:, :, None], torch.finfo(real.dtype).min)
    own = own.masked_fill(hidden, torch.finfo(own.dtype).min)

    weights = torch.cat([real, own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    on_real, on_own = weights.split([T, K], -1)
    output = (on_real.reshape(B, Hkv, R * G * K, T) @ real_value).view(B, Hkv, R, G, K, D)
    output = output + on_own @ own_value.view(B, Hkv, 1, G, K, D)
    return output.reshape(B, H, N, D).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, group_attention)
