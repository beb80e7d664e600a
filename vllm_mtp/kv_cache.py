"""Scratch blocks in the KV cache, behind the blocks that the scheduler hands out (v1/kv_cache_interface.py, KVCacheConfig)."""

import copy
from typing import Any


def with_scratch_blocks(kv_cache_config: Any, num_scratch: int) -> Any:
    """A copy of a worker's cache configuration that has `num_scratch` blocks more.

    Raises:
        ValueError: the cache is laid out in a way that has no room behind its blocks.
    """
    config = copy.deepcopy(kv_cache_config)
    if len(config.kv_cache_groups) != 1:
        raise ValueError(
            "mask-token prediction needs one KV cache group for all layers, and this model has "
            f"{len(config.kv_cache_groups)}: leave --no-disable-hybrid-kv-cache-manager out; models with other layers than those "
            "of full and sliding-window attention are not supported"
        )
    if num_scratch == 0:
        return config
    for tensor in config.kv_cache_tensors:
        if not (_grow_layers if hasattr(tensor, "layer_stride") else _grow_layer)(tensor, config.num_blocks, num_scratch):
            raise ValueError(
                "mask-token prediction needs a KV cache whose layers lie one after the other; this layout is not supported yet"
            )
    config.num_blocks += num_scratch
    return config


def _grow_layers(tensor: Any, num_blocks: int, num_scratch: int) -> bool:
    """Layers that lie one after the other in an allocation."""
    if tensor.offset != 0 or tensor.layer_stride != tensor.block_stride * num_blocks:
        return False
    # Both, or layer l's scratch blocks would be the first blocks of layer l + 1.
    tensor.size += num_scratch * tensor.block_stride * len(tensor.layers)
    tensor.layer_stride += num_scratch * tensor.block_stride
    return True


def _grow_layer(tensor: Any, num_blocks: int, num_scratch: int) -> bool:
    """An allocation for each layer, as in vLLM 0.26 to 0.28."""
    if tensor.offset != 0 or tensor.block_stride != 0 or len(tensor.shared_by) != 1 or tensor.size % num_blocks:
        return False
    tensor.size += num_scratch * (tensor.size // num_blocks)
    return True
