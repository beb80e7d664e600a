"""Attention of groups' rows in parts against one dense mask."""

from typing import Any

import pytest
import torch
from torch import nn

from vllm_mtp.train import group_attention
from vllm_mtp.train.group_attention import Groups

B, H, HKV, T, G, K, D = 2, 6, 2, 20, 5, 4, 8
PREFIXES = torch.tensor([[1, 7, 16, 3, 12], [2, 9, 10, 19, 1]])


def rows(T: int = T) -> list[torch.Tensor]:
    """Queries, keys and values."""
    torch.manual_seed(0)
    shapes = (B, H, G * K, D), (B, HKV, T + G * K, D), (B, HKV, T + G * K, D)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def in_parts(tensors: list[torch.Tensor], prefixes: torch.Tensor, *, real_learn: bool = True, **options: Any) -> torch.Tensor:
    query, key, value = tensors
    groups = Groups.of(prefixes, real_learn=real_learn)
    unread = torch.zeros(())
    return group_attention.group_attention(nn.Module(), query, key, value, unread, 0.3, groups, **options)[0]


def dense(tensors: list[torch.Tensor], prefixes: torch.Tensor, window: int | None, softcap: float | None) -> torch.Tensor:
    """By positions and one mask of [G K, T + G K]."""
    query, key, value = tensors
    group, within = torch.arange(G).repeat_interleave(K), torch.arange(K).repeat(G)
    own = prefixes[:, group] + within  # [B, G K]
    positions = torch.cat([torch.arange(T).expand(B, -1), own], 1)
    distance = own[:, :, None] - positions[:, None]
    real = torch.arange(T) < prefixes[:, group, None]
    same = (group[:, None] == group).expand(B, -1, -1)
    sees = torch.cat([real, same], 2) & (distance >= 0) & (distance < (window or T + K))
    scores = 0.3 * query @ key.repeat_interleave(H // HKV, 1).transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(H // HKV, 1)).transpose(1, 2)


@pytest.mark.parametrize("prefixes", [PREFIXES, PREFIXES.sort().values], ids=["any order", "sorted"])
@pytest.mark.parametrize("at_a_time", [1, 8, 12, 128])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 0.5), (6, 0.5)])
def test_outputs_and_gradients_are_those_of_a_dense_mask(
    at_a_time: int, window: int | None, softcap: float | None, prefixes: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_attention, "ROWS_OF_A_CPU", at_a_time)
    tensors = rows()
    found, expected = in_parts(tensors, prefixes, sliding_window=window, softcap=softcap), dense(tensors, prefixes, window, softcap)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(found)
    for of_found, of_expected in zip(
        torch.autograd.grad((weight * found).sum(), tensors), torch.autograd.grad((weight * expected).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(of_found, of_expected, atol=1e-6, rtol=1e-5)


def test_real_rows_that_do_not_learn_have_no_gradient_and_others_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_attention, "ROWS_OF_A_CPU", 8)
    tensors = rows()
    whole, own = (torch.autograd.grad(in_parts(tensors, PREFIXES, real_learn=learn).sum(), tensors) for learn in (True, False))
    for of_whole, of_own, first in zip(whole, own, (0, T, T), strict=True):
        assert not of_own[:, :, :first].any()
        torch.testing.assert_close(of_own[:, :, first:], of_whole[:, :, first:])
    assert whole[1][:, :, :T].any()


def test_other_prefixes_compile_nothing_anew() -> None:
    """A step was compiled for its own prefixes, and for those of every other: six seconds a step in place of a tenth."""
    compiled = torch.compile(in_parts, fullgraph=True, backend="aot_eager")
    tensors = rows()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prefixes in (PREFIXES, PREFIXES.flip(1), (PREFIXES + 2).clamp(max=T)):
            found = compiled(tensors, prefixes)
            torch.testing.assert_close(found, in_parts(tensors, prefixes))
            torch.testing.assert_close(
                torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(in_parts(tensors, prefixes).sum(), tensors)
            )


def test_operators_are_what_they_say() -> None:
    query, key, value = rows()
    given = query.unflatten(1, (HKV, -1)).detach().requires_grad_(), key, value, PREFIXES, PREFIXES.amax(0), True, None, None
    torch.library.opcheck(group_attention._attention, given)
