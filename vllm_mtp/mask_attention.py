"""Attention of mask rows by forked sequences, on whatever attention backend the server has chosen.

A group is a fork of its request: the request's full blocks, then scratch blocks that hold the rest of the prefix and the group's
own K/V. A causal kernel over the fork lets a mask row see its prefix and its own group up to itself, nothing else. The
scratch blocks
lie behind the blocks that the scheduler knows of and are written anew every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from vllm_mtp.layout import Groups


@dataclass(frozen=True)
class Fork:
    """The forked sequences of a step, shared by all layers.

    Attributes:
        block_table: blocks of each fork, [G, W].
        query_start: first mask row of each fork and M at the end, [G + 1], int32.
        seq_lens: prefix and group, [G], int32.
        copy_from: the block of each prefix's end, whose tokens of earlier steps the fork shares, [G].
        copy_to: the scratch block that takes a copy of it, [G].
        source_rows: rows of the step (real rows, then mask rows) whose K/V enter the scratch blocks, [S].
        slots: where they go, [S]; -1 for rows that lie in a full block, which the fork reads where it is.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    copy_from: torch.Tensor
    copy_to: torch.Tensor
    source_rows: torch.Tensor
    slots: torch.Tensor


def blocks_per_fork(k: int, block_size: int) -> int:
    """Scratch blocks that the rest of a block and k mask tokens can take."""
    return -(-(block_size - 1 + k) // block_size)


def plan_forks(groups: Groups, prefix_len: torch.Tensor, block_table: torch.Tensor, block_size: int, scratch: int, k: int) -> Fork:
    """Block tables, copies and slots of a step's forks; every shape follows from the step's shape, nothing is read back.

    Args:
        groups: the mask rows.
        prefix_len: L of each group, [G].
        block_table: blocks of each request, [R, W].
        block_size: tokens a block.
        scratch: id of the first scratch block.
        k: most mask tokens a group has.
    """
    per_fork, device, dtype = blocks_per_fork(k, block_size), block_table.device, block_table.dtype
    own = torch.arange(groups.num_groups * per_fork, device=device, dtype=dtype).view(-1, per_fork) + scratch
    full = prefix_len // block_size
    rows = block_table[groups.request]
    column = full[:, None]
    table = torch.cat([rows, own], 1)  # any values in the new columns: what a fork does not reach is not read
    table.scatter_(1, column + torch.arange(per_fork, device=device), own)
    first = own[:, 0].long()
    offset = groups.written_ahead + (prefix_len - full * block_size)[groups.written_group]
    slots = torch.where(offset < 0, -1, offset + (first * block_size)[groups.written_group])
    return Fork(
        block_table=table,
        query_start=groups.start.to(torch.int32),
        seq_lens=(prefix_len + groups.length).to(torch.int32),
        # A prefix that ends with its block has no shared rest; whatever is copied then is written over or not read.
        copy_from=rows.gather(1, column.clamp(max=rows.shape[1] - 1))[:, 0].long(),
        copy_to=first,
        source_rows=groups.source_rows,
        slots=slots,
    )


class ForkedSequences:
    """Runs the mask rows of every attention layer as forked sequences.

    Args:
        build_metadata: makes the backend's own attention metadata for a `Fork` (vLLM: v1/attention/backend.py,
            AttentionMetadataBuilder.build).
    """

    def __init__(self, build_metadata: Callable[[Fork], Any]) -> None:
        self.build_metadata = build_metadata
        self.kv_caches: torch.Tensor | None = None
        self.fork: Fork | None = None
        self.metadata: Any = None
        self.num_real = 0

    def bind(self, kv_caches: list[torch.Tensor]) -> None:
        """Takes the layers' caches, each [blocks, ...] with the scratch blocks included.

        Raises:
            ValueError: if the caches are not equal steps apart in one allocation.
        """
        first = kv_caches[0]
        steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(kv_caches)} or {0}
        same = all(
            c.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and c.stride() == first.stride() for c in kv_caches
        )
        if not same or len(steps) != 1:
            raise ValueError(
                "the KV caches of the layers do not lie equally spaced in one allocation; this cache layout is not supported"
            )
        shape, stride = (len(kv_caches), *first.shape), (steps.pop(), *first.stride())
        self.kv_caches = first.as_strided(shape, stride, first.storage_offset())

    def begin(self, fork: Fork, num_real: int) -> None:
        """Prepares a step: copies the partly filled blocks of all layers and builds the forks' attention metadata."""
        assert self.kv_caches is not None
        self.kv_caches.index_copy_(1, fork.copy_to, self.kv_caches.index_select(1, fork.copy_from))
        self.fork, self.num_real, self.metadata = fork, num_real, self.build_metadata(fork)

    def end(self) -> None:
        """Forgets the step."""
        self.fork = self.metadata = None

    def wrap(self, impl: Any) -> None:
        """Makes one layer's attention implementation serve mask rows too (vLLM: v1/attention/backend.py, AttentionImpl).

        The two methods are replaced on the instance, so that vLLM's isinstance checks on it still hold.
        """
        attend, write = impl.forward, impl.do_kv_cache_update

        def do_kv_cache_update(
            layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
        ) -> None:
            # The CPU operation trusts key's row count: with the mask rows it would write past the end of `slots`.
            num_rows = slots.shape[0]
            write(layer, key[:num_rows], value[:num_rows], kv_cache, slots)

        def forward(
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            metadata: Any,
            output: torch.Tensor,
            **kwargs: Any,
        ) -> torch.Tensor:
            fork, n = self.fork, self.num_real
            if fork is None or metadata is None:
                return attend(layer, query, key, value, kv_cache, metadata, output=output, **kwargs)
            attend(layer, query[:n], key[:n], value[:n], kv_cache, metadata, output=output[:n], **kwargs)
            write(layer, key[fork.source_rows], value[fork.source_rows], kv_cache, fork.slots)
            attend(layer, query[n:], key[n:], value[n:], kv_cache, self.metadata, output=output[n:], **kwargs)
            return output

        impl.forward, impl.do_kv_cache_update = forward, do_kv_cache_update
