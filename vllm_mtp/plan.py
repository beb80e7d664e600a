"""The plan of a step: its groups, their positions, and the sequences that attention runs over; made once, shared by all layers.

Every shape follows from what the host knows of the step (`EngineStep`), and what depends on lengths is a handful of tensor
operations: nothing is read back from the device. So a plan can be made while the device still runs the step before.
"""

import operator
import time
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch

from vllm_mtp.config import MAX_MASK_TOKENS
from vllm_mtp.layout import Groups, plan_groups
from vllm_mtp.mask_attention import MaskAttention


def _by_position() -> list[Any]:
    return [0] * MAX_MASK_TOKENS


@dataclass
class Counters:
    """What the plugin did so far; times in seconds. Lists are by position of the draft."""

    layouts: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Steps by layout."""
    steps: int = 0
    """Those with mask rows, as are the rows."""
    real_rows: int = 0
    mask_rows: int = 0
    plan_time: float = 0.0
    draft_time: float = 0.0
    """Choosing groups and turning tensors into lists; the drafter's own forward is `drafter_time`."""
    drafter_time: float = 0.0
    drafts: int = 0
    """Verifications of a request's drafts."""
    drafted: list[int] = field(default_factory=_by_position)
    accepted: list[int] = field(default_factory=_by_position)
    confident: list[int] = field(default_factory=_by_position)
    """Those of the accepted ones that were taken without a match."""
    unmatched: int = 0
    """Those of them where the target's best token was another."""
    lookups: int = 0
    """Those of the verifications whose drafts were looked up in the request's own text."""
    lookup_drafted: int = 0
    lookup_accepted: int = 0
    expected: list[float] = field(default_factory=_by_position)
    """Sums of the probability that a draft and all before it are right, as the drafter sees it."""

    def stepped(self, lengths: tuple[int, ...]) -> None:
        """A step runs with this layout."""
        self.layouts[lengths] = self.layouts.get(lengths, 0) + 1

    def verified(self, drafted: int, accepted: int) -> None:
        """A request had so many drafts, and the first `accepted` were."""
        self.drafts += 1
        for position in range(drafted):
            self.drafted[position] += 1
        for position in range(accepted):
            self.accepted[position] += 1

    def looked_up(self, drafted: int, accepted: int) -> None:
        """Drafts that were verified were from the request's own text."""
        self.lookups += 1
        self.lookup_drafted += drafted
        self.lookup_accepted += accepted

    def expect(self, probabilities: Iterable[float]) -> None:
        """A request verified drafts that the drafter thought so likely."""
        for position, expected in enumerate(accumulate(probabilities, operator.mul)):
            self.expected[position] += expected

    def snapshot(self) -> "Counters":
        """A copy, which may be made while another thread counts."""
        return Counters(**{each.name: copy(getattr(self, each.name)) for each in fields(Counters)})


@dataclass
class EngineStep:
    """What the engine's glue knows of the step that is about to run; R requests.

    Attributes:
        num_rows, shapes: real rows and shape of each request, as `layout.plan_groups` takes them.
        request_len: tokens of each request once all its rows count, [R].
        longest: none of them is longer than this.
        block_table: blocks of each request, [R, W].
        replayed: the step runs as a replay of a CUDA graph, which reads the plan where the plan of the capture stood.
    """

    num_rows: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    request_len: torch.Tensor
    longest: int
    block_table: torch.Tensor
    replayed: bool = False


@dataclass
class PlannedStep:
    """A step that is ready to run.

    Attributes:
        groups: its mask rows.
        positions: of the mask rows, [M].
        sequences, metadata: what the attention of mask rows has planned and prepared (`MaskAttention`).
        replayed: as `EngineStep` has it.
    """

    groups: Groups
    positions: torch.Tensor
    sequences: Any
    metadata: object
    replayed: bool = False


def most_groups(layouts: Iterable[tuple[int, ...]], max_requests: int, max_mask_rows: int) -> int:
    """Most groups that a step can have under any of `layouts`."""
    longest = 1
    for lengths in layouts:
        present = [length for length in lengths if length]
        if present:
            # One more: a request that verifies fewer drafts than k has a group behind its last row in any case.
            most = min(len(lengths), len(present) + 1)
            longest = max(longest, min(max_requests * most, max_mask_rows // min(present)))
    return longest


@dataclass
class Planner:
    """Plans steps.

    Attributes:
        attention: of the mask rows.
        k: most drafts of a request.
        max_rows: most rows of a step, real and mask rows together (max_num_batched_tokens).
        max_mask_rows, max_groups: most mask rows and groups of a step.
        max_model_len: positions that the model has.
        block_size: tokens a block.
        scratch: id of the first scratch block.
    """

    attention: MaskAttention
    k: int
    max_rows: int
    max_mask_rows: int
    max_groups: int
    max_model_len: int
    block_size: int = 0
    scratch: int = 0
    counters: Counters = field(default_factory=Counters)
    _kept: dict[tuple[object, ...], PlannedStep] = field(default_factory=dict)

    def bind(self, block_size: int, scratch: int) -> None:
        """Takes the KV cache's facts once it stands; plans that graphs were captured on are forgotten with them."""
        self.block_size, self.scratch = block_size, scratch
        self._kept.clear()

    def plan(self, step: EngineStep) -> PlannedStep | None:
        """The plan of a step, or None when it has no mask rows."""
        begin = time.perf_counter()
        groups = plan_groups(
            step.num_rows,
            step.shapes,
            self.k,
            self.room(sum(step.num_rows)),
            self.max_groups,
            self.block_size,
            step.request_len.device,
        )
        if groups is None:
            return None
        prefix_len = groups.prefix_len(step.request_len)
        sequences = self.attention.plan(groups, prefix_len, step, self.block_size, self.scratch)
        planned = PlannedStep(groups, groups.positions(prefix_len, self.max_model_len), sequences, None)
        if step.replayed:
            planned = self._where_it_stood((step.num_rows, step.shapes), planned)
        planned.metadata, planned.replayed = self.attention.prepare(planned.sequences), step.replayed
        self.counters.steps += 1
        self.counters.real_rows += groups.num_real
        self.counters.mask_rows += groups.num_rows
        self.counters.plan_time += time.perf_counter() - begin
        return planned

    def room(self, num_real: int) -> int:
        """Most mask rows of a step with `num_real` real ones."""
        return min(self.max_rows - num_real, self.max_mask_rows)

    def _where_it_stood(self, shape: tuple[object, ...], planned: PlannedStep) -> PlannedStep:
        """The plan in the tensors of the first one of its shape."""
        kept = self._kept.setdefault(shape, planned)
        if kept is planned:
            return planned
        kept.positions.copy_(planned.positions)
        tensors = {}
        for each in fields(kept.sequences):
            stood, new = getattr(kept.sequences, each.name), getattr(planned.sequences, each.name)
            if isinstance(stood, torch.Tensor):
                tensors[each.name] = stood
                if not stood.is_set_to(new):  # the engine's own tables stand where they stood
                    stood.copy_(new)
        return PlannedStep(kept.groups, kept.positions, replace(planned.sequences, **tensors), None)
