"""Attention of mask rows: what a way of doing it must offer, and the one that works on whatever attention backend the server has
chosen, forked sequences.

A group is a fork of its request: the request's full blocks, then scratch blocks that hold the rest of the prefix and the group's
own K/V. A causal kernel over the fork lets a mask row see its prefix and its own group up to itself, nothing else. Requests and
forks are the sequences of one call of the backend's kernel. The scratch blocks lie behind the blocks that the scheduler knows of
and are written anew every step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from vllm_mtp.layout import Groups

if TYPE_CHECKING:
    from vllm_mtp.plan import EngineStep


KEPT = 4
"""First tokens of a request that mask rows see whatever their window, for large models put there what they attend to when there is
nothing to attend to (Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks*, section 3.1)."""


def view(window: int, mask_window: int | None) -> tuple[int, int]:
    """What mask rows see in a layer: the last so many tokens, 0 for all, and so many first ones.

    Args:
        window: of the layer, 0 for all.
        mask_window: `ServingOptions.mask_window`.
    """
    if mask_window is None or 0 < window <= mask_window:
        return window, 0
    return mask_window, KEPT


class MaskAttention(Protocol):
    """A way to run the attention of mask rows in every layer."""

    @staticmethod
    def blocks_per_group(length: int, block_size: int) -> int:
        """Scratch blocks that a group of up to `length` mask rows needs."""
        ...

    def bind(self, kv_caches: list[torch.Tensor]) -> None:
        """Takes the layers' caches, each [blocks, ...] with the scratch blocks included."""
        ...

    def plan(self, groups: Groups, prefix_len: torch.Tensor, step: "EngineStep", block_size: int, scratch: int) -> Any:
        """What all layers share in a step; every shape follows from the step's shape, nothing is read back.

        Args:
            groups: the mask rows.
            prefix_len: L of each group, [G].
            step: the engine's step.
            block_size: tokens a block.
            scratch: id of the first scratch block.
        """
        ...

    def prepare(self, planned: Any) -> object:
        """Makes the cache ready for a planned step. Returns what `begin` wants beside the plan."""
        ...

    def begin(self, planned: Any, prepared: object) -> None:
        """Starts a step: until `end`, attention serves its mask rows."""
        ...

    def end(self) -> None:
        """Forgets the step."""
        ...

    def wrap(self, layer: Any) -> None:
        """Makes one of vLLM's attention layers serve mask rows too.

        Methods of its implementation (vLLM: v1/attention/backend.py, AttentionImpl) are replaced on the instance, so that vLLM's
        isinstance checks on it still hold.
        """
        ...


class InPlace:
    """What those ways have in common that read the cache of a request where it lies: no scratch blocks, and nothing to copy."""

    @staticmethod
    def blocks_per_group(length: int, block_size: int) -> int:
        """None."""
        return 0

    def bind(self, kv_caches: list[torch.Tensor]) -> None:
        """Each layer's call brings its cache."""

    def prepare(self, planned: Any) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class StepSequences:
    """The sequences of a step, shared by all layers: its R requests, and behind them G forks, one a group.

    Attributes:
        block_table: blocks of each sequence, [R + G, W].
        query_start: first row of each sequence and N + M at the end, [R + G + 1], int32.
        query_start_cpu: the same on the host.
        seq_lens: tokens of each sequence, [R + G], int32.
        longest_query, longest: no sequence has more rows, or more tokens, than this.
        copy_from: the block of each prefix's end, whose tokens of earlier steps the fork shares, [G].
        copy_to: the scratch block that takes a copy of it, [G].
        written_rows: rows of the step whose K/V are written: the N real rows, and S rows that enter the scratch blocks, [N + S].
        slots: where those S go, [S]; -1 for rows that lie in a full block, which the fork reads where it is.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    query_start_cpu: torch.Tensor
    seq_lens: torch.Tensor
    longest_query: int
    longest: int
    copy_from: torch.Tensor
    copy_to: torch.Tensor
    written_rows: torch.Tensor
    slots: torch.Tensor


@lru_cache(maxsize=64)
def _scratch_blocks(first: int, num_groups: int, per_fork: int, like: tuple[torch.device, torch.dtype]) -> torch.Tensor:
    """Ids of the scratch blocks of each group, [G, per_fork]."""
    return torch.arange(first, first + num_groups * per_fork, device=like[0], dtype=like[1]).view(-1, per_fork)


class ForkedSequences:
    """Runs the mask rows of every attention layer as forked sequences.

    Args:
        build_metadata: makes the backend's own attention metadata for a `StepSequences` (vLLM: v1/attention/backend.py,
            AttentionMetadataBuilder.build).
    """

    def __init__(self, build_metadata: Callable[[StepSequences], Any]) -> None:
        self.build_metadata = build_metadata
        self.kv_caches: list[torch.Tensor] = []
        self.step: StepSequences | None = None
        self.metadata: object = None
        self.slots: torch.Tensor | None = None

    @staticmethod
    def blocks_per_group(length: int, block_size: int) -> int:
        """Blocks that the rest of a block and a group of `length` mask tokens can take."""
        return -(-(block_size - 1 + length) // block_size)

    def bind(self, kv_caches: list[torch.Tensor]) -> None:
        """Takes the layers' caches, each [blocks, ...] with the scratch blocks included."""
        first = kv_caches[0]
        steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(kv_caches)} or {0}
        same = all(
            c.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and c.stride() == first.stride() for c in kv_caches
        )
        if same and len(steps) == 1:  # equally spaced in one allocation: one tensor, and one copy for all layers
            shape, stride = (len(kv_caches), *first.shape), (steps.pop(), *first.stride())
            self.kv_caches = [first.as_strided(shape, stride, first.storage_offset())]
        else:
            self.kv_caches = [cache[None] for cache in kv_caches]

    def plan(self, groups: Groups, prefix_len: torch.Tensor, step: "EngineStep", block_size: int, scratch: int) -> StepSequences:
        longest_group, block_table = max(groups.lengths), step.block_table
        per_fork = self.blocks_per_group(longest_group, block_size)
        own = _scratch_blocks(scratch, groups.num_groups, per_fork, (block_table.device, block_table.dtype))
        full = prefix_len // block_size
        num_requests, width = block_table.shape
        table = block_table.new_zeros(num_requests + groups.num_groups, width + per_fork)
        table[:num_requests, :width] = block_table
        forked = table[num_requests:]
        forked[:, :width] = block_table[groups.request]
        # A prefix that ends with its block has no shared rest; whatever is copied then is written over or not read.
        copy_from = forked.gather(1, full[:, None])[:, 0]
        for column in range(per_fork):
            forked.scatter_(1, full[:, None] + column if column else full[:, None], own[:, column, None])
        # The tokens of a fork that are not in full blocks of its request lie one after the other from its first scratch block on.
        first = own[:, 0].long()
        offset = groups.written_ahead + (prefix_len - full * block_size)[groups.written_group]
        slots = torch.where(offset < 0, -1, offset + (first * block_size)[groups.written_group])
        return StepSequences(
            block_table=table,
            query_start=groups.query_start,
            query_start_cpu=groups.query_start_cpu,
            seq_lens=torch.cat([step.request_len, prefix_len + groups.length]).int(),
            longest_query=groups.longest_query,
            longest=step.longest + longest_group,
            copy_from=copy_from,
            copy_to=first,
            written_rows=groups.written_rows,
            slots=slots,
        )

    def prepare(self, step: StepSequences) -> object:
        """Copies the partly filled blocks of all layers to where the step's forks continue them; returns the metadata."""
        for caches in self.kv_caches:
            caches.index_copy_(1, step.copy_to, caches.index_select(1, step.copy_from))
        return self.build_metadata(step)

    def begin(self, step: StepSequences, metadata: object) -> None:
        self.step, self.metadata, self.slots = step, metadata, None

    def end(self) -> None:
        self.step = self.metadata = self.slots = None

    def wrap(self, layer: Any) -> None:
        impl = layer.impl
        attend, write = impl.forward, impl.do_kv_cache_update

        def do_kv_cache_update(
            layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
        ) -> None:
            if self.step is None:
                # The CPU operation trusts key's row count, and would write past the end of `slots`.
                write(layer, key[: slots.shape[0]], value[: slots.shape[0]], kv_cache, slots)
                return
            if self.slots is None:  # the same in every layer
                self.slots = torch.cat([slots, self.step.slots.to(slots.dtype)])
            rows = self.step.written_rows
            write(layer, key.index_select(0, rows), value.index_select(0, rows), kv_cache, self.slots)

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
            if self.step is not None and metadata is not None:
                metadata = self.metadata
            return attend(layer, query, key, value, kv_cache, metadata, output=output, **kwargs)

        impl.forward, impl.do_kv_cache_update = forward, do_kv_cache_update
