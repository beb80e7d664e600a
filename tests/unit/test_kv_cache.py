"""Scratch blocks in caches of both kinds: layers in one allocation, and an allocation for each layer."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from vllm_mtp.kv_cache import with_scratch_blocks
from vllm_mtp.mask_attention import ForkedSequences

BLOCKS, SCRATCH, PAGE = 10, 3, 64


@dataclass
class Layers:
    """KVCacheTensor of vLLM 0.29 to 0.33."""

    size: int
    layers: list[str]
    layer_stride: int
    block_stride: int
    offset: int = 0


@dataclass
class Layer:
    """KVCacheTensor of vLLM 0.26 to 0.28."""

    size: int
    shared_by: list[str]
    offset: int = 0
    block_stride: int = 0


@dataclass
class Config:
    """KVCacheConfig."""

    kv_cache_tensors: list[Any]
    num_blocks: int = BLOCKS
    kv_cache_groups: list[str] = field(default_factory=lambda: ["all"])


def test_layers_in_one_allocation_grow_together() -> None:
    before = Config([Layers(2 * BLOCKS * PAGE, ["a", "b"], BLOCKS * PAGE, PAGE)])
    after = with_scratch_blocks(before, SCRATCH)
    (tensor,) = after.kv_cache_tensors
    assert (after.num_blocks, tensor.layer_stride, tensor.size) == (13, 13 * PAGE, 2 * 13 * PAGE)
    assert before.num_blocks == BLOCKS
    assert before.kv_cache_tensors[0].size == 2 * BLOCKS * PAGE


def test_each_layers_own_allocation_grows() -> None:
    after = with_scratch_blocks(Config([Layer(BLOCKS * PAGE, ["a"]), Layer(BLOCKS * 2 * PAGE, ["b"])]), SCRATCH)
    assert (after.num_blocks, [tensor.size for tensor in after.kv_cache_tensors]) == (13, [13 * PAGE, 13 * 2 * PAGE])


def test_a_cache_without_scratch_blocks_may_be_laid_out_as_it_likes() -> None:
    before = Config([Layers(2 * BLOCKS * PAGE, ["a", "b"], PAGE, 2 * PAGE)])
    assert with_scratch_blocks(before, 0) == before


@pytest.mark.parametrize(
    "tensor",
    [
        Layers(2 * BLOCKS * PAGE, ["a", "b"], PAGE, 2 * PAGE),  # blocks outermost
        Layers(3 * BLOCKS * PAGE, ["a", "b"], BLOCKS * PAGE, PAGE, offset=BLOCKS * PAGE),
        Layer(BLOCKS * PAGE, ["a", "b"]),
        Layer(BLOCKS * PAGE, ["a"], block_stride=2 * PAGE),
    ],
)
def test_layouts_without_room_behind_their_blocks_are_refused(tensor: Any) -> None:
    with pytest.raises(ValueError, match="this layout is not supported yet"):
        with_scratch_blocks(Config([tensor]), SCRATCH)


def test_shared_blocks_are_copied_in_every_layer_however_they_lie() -> None:
    together = torch.arange(3 * 13 * 4.0).view(3, 13, 4)
    apart = [layer.clone() for layer in together]
    expected = together.clone()
    expected[:, [10, 12]] = together[:, [5, 0]]
    step: Any = type("Step", (), {"copy_from": torch.tensor([5, 0]), "copy_to": torch.tensor([10, 12])})
    for caches in (list(together), apart):
        attention = ForkedSequences(lambda step: None)
        attention.bind(caches)
        attention.prepare(step)
        assert torch.equal(torch.stack(caches), expected)
    assert not torch.equal(expected[0], expected[1])
