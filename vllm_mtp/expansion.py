"""The wrapped forward: mask rows join the rows that the engine scheduled, go through the layers with them, and stay behind.

The engine calls the target with N rows and gets N hidden states back. In between the target runs N + M rows: one forward verifies
the last drafts and holds the states from which the next ones are drafted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_mtp.breaker import Breaker
from vllm_mtp.gated_lora import RowSplit
from vllm_mtp.layout import Groups
from vllm_mtp.mask_attention import MaskAttention
from vllm_mtp.plan import PlannedStep
from vllm_mtp.request_lora import RequestLoRAs


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
        attention: shared with the attention layers.
        request_loras: what requests bring of their own.
        next_step: the plan of the running step, None if it has no mask rows.
        warming_up: whether the running step is a profiling or warm-up run.
        breaker: opens when planning, or a forward with mask rows, fails; the step then runs as it would without us.
        rewind: makes the running step ready for a second forward; raises where it cannot have one.
        compile: makes the compiled form of a forward; None: the engine runs eagerly.
        states: where the states of mask rows are kept, [most mask rows, d], when they must outlive the replay of a CUDA graph.
    """

    target: torch.nn.Module
    mask_embeddings: torch.Tensor
    rows: RowSplit
    attention: MaskAttention
    request_loras: RequestLoRAs
    next_step: Callable[[], PlannedStep | None]
    warming_up: Callable[[], bool]
    breaker: Breaker
    rewind: Callable[[], None]
    compile: Callable[[Forward], Forward] | None = None
    states: torch.Tensor | None = None
    last: MaskStates | None = None

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
        if self.warming_up():
            if not self.compiled:
                self._compile(positions, self._embeds(input_ids, inputs_embeds))
            step = None
        else:
            step = self._planned()
        if step is not None:
            try:
                return self._with_mask_rows(step, positions, self._embeds(input_ids, inputs_embeds))
            except Exception as error:
                if step.replayed:  # this is its capture
                    raise
                # Real rows write the same K/V to the same slots again. If the base is what failed, it fails again, in vLLM's hands.
                self.rewind()
                self.breaker.trip("running a forward with mask rows", error)
        return self.inner(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _planned(self) -> PlannedStep | None:
        if self.breaker.is_open:
            return None
        try:
            return self.next_step()
        except Exception as error:
            self.breaker.trip("planning a step", error)
            return None

    def _with_mask_rows(self, step: PlannedStep, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        groups, num_real = step.groups, step.groups.num_real  # rows behind num_real are padding
        embeds = torch.cat([embeds[:num_real], self.mask_embeddings[groups.mask_index]])
        positions = torch.cat([positions[:num_real], step.positions.to(positions.dtype)])
        try:
            self.attention.begin(step.sequences, step.metadata)
            self.rows.begin(num_real, num_real + groups.num_rows)
            with self.request_loras.mapped(groups):
                hidden = self.expanded(positions, embeds)
        finally:
            self.rows.end()
            self.attention.end()
        states = hidden[num_real:]
        if self.states is not None:
            states = self.states[: groups.num_rows].copy_(states)
        self.last = MaskStates(groups, states)
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
