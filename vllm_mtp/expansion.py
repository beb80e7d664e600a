"""The wrapped forward: mask rows join the rows that the engine scheduled, go through the layers with them, and stay behind.

The engine calls the target with N rows and gets N hidden states back. In between the target runs N + M rows: one forward verifies
the last drafts and holds the states from which the next ones are drafted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_mtp.gated_lora import GatedLinears, RowSplit
from vllm_mtp.layout import Groups, plan_groups
from vllm_mtp.mask_attention import ForkedSequences, plan_forks


@dataclass
class Counters:
    """What the expansion did so far; times in seconds."""

    steps: int = 0
    real_rows: int = 0
    mask_rows: int = 0
    plan_time: float = 0.0
    draft_time: float = 0.0
    """Choosing groups and turning tensors into lists; the drafter's own forward is `drafter_time`."""
    drafter_time: float = 0.0


@dataclass
class EngineStep:
    """What the engine's glue knows of the step that is about to run; R requests.

    Attributes:
        num_rows, num_drafts: real rows and drafts of each request, as `layout.plan_groups` takes them.
        request_len: tokens of each request once all its rows count, [R].
        block_table: blocks of each request, [R, W].
        lengths: group lengths of the step's layout.
    """

    num_rows: tuple[int, ...]
    num_drafts: tuple[int, ...]
    request_len: torch.Tensor
    block_table: torch.Tensor
    lengths: tuple[int, ...]


@dataclass
class MaskStates:
    """Mask rows of the last step: their groups and their hidden states after the final norm, [M, d]."""

    groups: Groups
    hidden: torch.Tensor


@dataclass
class Expansion:
    """Expands the forward of a target model.

    Attributes:
        target: the loaded vLLM model.
        mask_embeddings: [k, d], in the model's dtype.
        rows: where real rows end, shared with the gated linears.
        linears: the gated linears.
        max_rows: most rows a step may have, real and mask rows together (max_num_batched_tokens).
        max_model_len: positions that the model has.
        next_step: says what the running step holds; None in warm-up, profiling and steps without requests.
    """

    target: torch.nn.Module
    mask_embeddings: torch.Tensor
    rows: RowSplit
    linears: GatedLinears
    max_rows: int
    max_model_len: int
    next_step: Callable[[int], EngineStep | None]
    attention: ForkedSequences | None = None
    block_size: int = 0
    scratch: int = 0
    last: MaskStates | None = None
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.inner: Callable[..., Any] = self.target.forward
        self.embed: Callable[[torch.Tensor], torch.Tensor] = self.target.embed_input_ids  # type: ignore[assignment]
        self.target.forward = self.forward

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states of the N real rows, [N, d]; those of the mask rows are kept in `last`."""
        self.last = None
        # Always through embeddings, with masks and without: a compiled graph is traced for one of the two inputs only.
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)
        embeds = inputs_embeds
        num_real = embeds.shape[0]
        begin = time.perf_counter()
        groups, mask_positions = self._begin(num_real, positions)
        if groups is not None:
            embeds = torch.cat([embeds, self.mask_embeddings[groups.mask_index]])
            positions = torch.cat([positions, mask_positions])
            self.counters.mask_rows += groups.num_rows
            self.counters.steps += 1
            self.counters.real_rows += num_real
            self.counters.plan_time += time.perf_counter() - begin
        try:
            with self.linears:
                hidden = self.inner(None, positions, intermediate_tensors, embeds, **kwargs)
        finally:
            self.rows.num_real = None
            if self.attention is not None:
                self.attention.end()
        if groups is None:
            return hidden
        self.last = MaskStates(groups, hidden[num_real:])
        return hidden[:num_real]

    def _begin(self, num_real: int, positions: torch.Tensor) -> tuple[Groups | None, torch.Tensor]:
        """Plans the running step, once for all layers: its groups, and the positions of their rows."""
        step = self.next_step(num_real) if self.attention is not None else None
        if step is None:
            return None, positions
        k = len(step.lengths) - 1
        room = self.max_rows - num_real
        groups = plan_groups(step.num_rows, step.num_drafts, step.lengths, room, self.block_size, step.request_len.device)
        if groups is None or self.attention is None:
            return None, positions
        prefix_len = groups.prefix_len(step.request_len)
        self.attention.begin(plan_forks(groups, prefix_len, step.block_table, self.block_size, self.scratch, k), num_real)
        self.rows.num_real = num_real
        return groups, groups.positions(prefix_len, self.max_model_len).to(positions.dtype)
