"""The wrapped forward: mask rows join the rows that the engine scheduled, go through the layers with them, and stay behind.

The engine calls the target with N rows and gets N hidden states back. In between the target runs N + M rows: one forward verifies
the last drafts and holds the states from which the next ones are drafted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_mtp.gated_lora import RowSplit
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


Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(positions [N + M], embeddings [N + M, d]) -> hidden states [N + M, d]."""


@dataclass
class Expansion:
    """Expands the forward of a target model.

    Steps without mask rows go through the target as it is, compiled or not. Steps with mask rows go through the same modules, but
    through a graph of their own where the engine compiles: a graph that serves both would make every plain step pay for the LoRA.

    Attributes:
        target: the loaded vLLM model.
        mask_embeddings: [k, d], in the model's dtype.
        rows: where real rows end, shared with the gated linears.
        max_rows: most rows a step may have, real and mask rows together (max_num_batched_tokens).
        max_model_len: positions that the model has.
        next_step: says what the running step holds; None for a step without requests or without mask rows.
        warming_up: whether the running step is a profiling or warm-up run.
        compile: makes the compiled form of a forward; None: the engine runs eagerly.
    """

    target: torch.nn.Module
    mask_embeddings: torch.Tensor
    rows: RowSplit
    max_rows: int
    max_model_len: int
    next_step: Callable[[int], EngineStep | None]
    warming_up: Callable[[], bool]
    compile: Callable[[Forward], Forward] | None = None
    attention: ForkedSequences | None = None
    block_size: int = 0
    scratch: int = 0
    last: MaskStates | None = None
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.inner: Callable[..., Any] = self.target.forward
        self.embed: Callable[[torch.Tensor], torch.Tensor] = self.target.embed_input_ids  # type: ignore[assignment]
        self.target.forward = self.forward
        self.expanded: Forward = self._expanded if self.compile is None else self.compile(self._expanded)
        self.compiled = self.compile is None

    def _expanded(self, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return self.inner(None, positions, None, embeds)

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
        begin = time.perf_counter()
        num_real = positions.shape[-1]
        if self.warming_up():
            if not self.compiled:
                self._compile(positions, self._embeds(input_ids, inputs_embeds))
            step = None
        else:
            step = self.next_step(num_real)
        groups, mask_positions = (None, positions) if step is None else self._begin(step, num_real)
        if groups is None:
            return self.inner(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        embeds = torch.cat([self._embeds(input_ids, inputs_embeds), self.mask_embeddings[groups.mask_index]])
        positions = torch.cat([positions, mask_positions.to(positions.dtype)])
        self.counters.mask_rows += groups.num_rows
        self.counters.steps += 1
        self.counters.real_rows += num_real
        self.counters.plan_time += time.perf_counter() - begin
        try:
            hidden = self.expanded(positions, embeds)
        finally:
            self.rows.end()
            assert self.attention is not None
            self.attention.end()
        self.last = MaskStates(groups, hidden[num_real:])
        return hidden[:num_real]

    def _embeds(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        return self.embed(input_ids)

    def _compile(self, positions: torch.Tensor, embeds: torch.Tensor) -> None:
        """Traces the expanded forward at the rows of a warm-up run, which are the most that a step can have."""
        torch._dynamo.mark_dynamic(positions, 0)
        torch._dynamo.mark_dynamic(embeds, 0)
        self.rows.tracing_expanded = True
        try:
            self.expanded(positions, embeds)
        finally:
            self.rows.tracing_expanded = False
        self.compiled = True

    def _begin(self, step: EngineStep, num_real: int) -> tuple[Groups | None, torch.Tensor]:
        """Plans the running step, once for all layers: its groups, and the positions of their rows."""
        room = self.max_rows - num_real
        device = step.request_len.device
        groups = plan_groups(step.num_rows, step.num_drafts, step.lengths, room, self.block_size, device)
        if groups is None:
            return None, step.request_len
        assert self.attention is not None
        k, prefix_len = len(step.lengths) - 1, groups.prefix_len(step.request_len)
        self.attention.begin(plan_forks(groups, step.request_len, prefix_len, step.block_table, self.block_size, self.scratch, k))
        self.rows.begin(num_real, num_real + groups.num_rows)
        return groups, groups.positions(prefix_len, self.max_model_len)
