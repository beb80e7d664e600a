"""Planning a step and drafting from it read nothing back from the device: with fake tensors, every read raises."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from vllm_mtp.confidence import NONE, DraftedRequests
from vllm_mtp.device_counters import CountersOnDevice
from vllm_mtp.drafter import Drafter, Unembedding
from vllm_mtp.layout import group_lengths, plan_groups, shapes_of
from vllm_mtp.load import best_comb
from vllm_mtp.mask_attention import ForkedSequences, StepSequences, _scratch_blocks
from vllm_mtp.plan import EngineStep, Planner
from vllm_mtp.roofline import Roofline
from vllm_mtp.sampler_head import SamplerHead

K, WIDTH, VOCABULARY, BLOCK = 4, 16, 40, 16


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """A mode in which tensors have shapes and no values. What is cached by shape must not outlive it."""
    for cached in (plan_groups, _scratch_blocks):
        cached.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    for cached in (plan_groups, _scratch_blocks):
        cached.cache_clear()


def planner() -> Planner:
    attention = ForkedSequences(lambda step: step)
    attention.kv_caches = [torch.zeros(2, 64, BLOCK, 2, 4)]
    planner = Planner(attention, K, max_rows=512, max_mask_rows=256, max_groups=64, max_model_len=128)
    planner.bind(BLOCK, scratch=32)
    return planner


def step(num_rows: tuple[int, ...], num_drafts: tuple[int, ...], layout: str, replayed: bool = False) -> EngineStep:
    count = len(num_rows)
    table = torch.zeros(count, 8, dtype=torch.int32)
    shapes = shapes_of(group_lengths(layout, K), num_drafts)
    return EngineStep(num_rows, shapes, torch.full((count,), 40), 40, table, replayed and layout == "quadratic")


def test_the_mode_sees_reads(fake: FakeTensorMode) -> None:
    tensor = torch.ones(3)
    assert isinstance(tensor, FakeTensor)
    for read in (lambda: tensor.sum().item(), lambda: bool(tensor[0] > 0), lambda: tensor.nonzero().tolist()):
        with pytest.raises((DataDependentOutputException, NotImplementedError, RuntimeError)):
            read()


@pytest.mark.parametrize("layout", ["quadratic", "linear"])
def test_a_step_of_decodes_and_prompts(fake: FakeTensorMode, layout: str) -> None:
    planned = planner().plan(step((5, 1, 7, 9, 3), (4, 0, 0, -1, 2), layout))
    assert planned is not None
    assert isinstance(planned.positions, FakeTensor)
    assert isinstance(planned.sequences.slots, FakeTensor)


def test_a_replayed_step_is_planned_where_its_capture_was(fake: FakeTensorMode) -> None:
    made = planner()
    capture = made.plan(step((5, 5, 5), (4, 4, 4), "quadratic", replayed=True))
    replay = made.plan(step((5, 5, 5), (4, 4, 4), "quadratic", replayed=True))
    assert capture is not None
    assert replay is not None
    assert isinstance(replay.sequences, StepSequences)
    assert replay.positions is capture.positions
    for name in ("block_table", "query_start", "seq_lens", "written_rows", "slots"):
        assert getattr(replay.sequences, name) is getattr(capture.sequences, name)


@pytest.mark.parametrize("candidates", [8, VOCABULARY])
def test_drafting(fake: FakeTensorMode, candidates: int) -> None:
    planned = planner().plan(step((5, 5), (4, 4), "quadratic"))
    assert planned is not None
    unembedding = torch.zeros(VOCABULARY, WIDTH)
    drafter = Drafter(
        lambda states: states @ unembedding.T,
        lambda tokens: unembedding[tokens],
        Unembedding(unembedding, 0, VOCABULARY),
        SamplerHead(WIDTH),
        candidates,
        VOCABULARY,
    )
    num_sampled = torch.ones(2, dtype=torch.int32)
    rows = planned.groups.draft_rows(num_sampled - 1, K)
    drafts = drafter(torch.zeros(planned.groups.num_rows, WIDTH), rows, torch.zeros(2, dtype=torch.long))
    assert isinstance(drafts, FakeTensor)
    assert drafts.shape == (2, K)


def test_acceptance_by_confidence(fake: FakeTensorMode) -> None:
    planned = planner().plan(step((5, 5), (4, 4), "quadratic"))
    assert planned is not None
    drafted = DraftedRequests.of(8, K, torch.device("cpu"))
    states, num_sampled = torch.tensor([3, 1]), torch.ones(2, dtype=torch.int32)
    drafted.add(3, 0.9)
    own = planned.groups.of_own_group(num_sampled - 1, K)
    drafted.keep(states, torch.where(own, torch.ones(2, K), NONE))
    counters = CountersOnDevice(K, torch.device("cpu"))
    counters.count(torch.full((2,), K), num_sampled, states, drafted)
    assert isinstance(counters.on_host, FakeTensor)
    drafted.keep(states, NONE)
    rows = torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    certain = drafted.certain(torch.zeros(10, VOCABULARY), *rows)
    assert isinstance(certain, FakeTensor)
    assert certain.shape == (10, VOCABULARY)


def test_the_layout_of_a_batch_follows_from_its_size() -> None:
    layouts = [group_lengths(layout, K) for layout in ((0,) * 5, (1, 1, 0, 0, 0), "quadratic")]
    free = Roofline(free_rows=1e9)
    assert best_comb(layouts, 1, 100, 100, free) == layouts[2]
    assert best_comb(layouts, 5, 100, 100, free) == layouts[1]  # 5 requests of 5 + 20 rows are too many
    assert best_comb(layouts, 5, 1000, 50, free) == layouts[1]
    assert best_comb(layouts, 100, 100, 100, free) == layouts[0]
