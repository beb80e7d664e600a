"""The hand-over between programs of `gated_lora` holds in whatever order they run, with what a GPU's memory guarantees.

First the machine that tries orders is tried itself: on a hand-over that is right, and on the same with one thing left out.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_mtp.kernels.dispatch import counters
from vllm_mtp.kernels.gated_lora.triton import Config, launch

from .interleaved import NoProgressError, interleaved
from .test_gated_lora import Case, assert_close, cases


@triton.jit
def hand_over(x_ptr, out_ptr, ready_ptr, BARRIER: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr, WAIT: tl.constexpr):
    """out = 2 x: program 0 writes x + x, program 1 copies it once it is ready."""
    at = tl.arange(0, 16)
    if tl.program_id(0) == 0:
        tl.store(x_ptr + 16 + at, 2 * tl.load(x_ptr + at))
        if BARRIER:
            tl.debug_barrier()
        tl.atomic_add(ready_ptr, 1, sem=RELEASE)
    else:
        before = tl.load(x_ptr + 16 + at)  # so that old values may be at hand
        if WAIT:
            while tl.atomic_add(ready_ptr, 0, sem=ACQUIRE) < 1:
                pass
        tl.store(out_ptr + at, tl.load(x_ptr + 16 + at) + 0 * before)


def handed_over(seed: int, resident: int = 2, **how: object) -> bool:
    x, out, ready = torch.arange(32.0), torch.zeros(16), torch.zeros(1, dtype=torch.int32)
    given = {"BARRIER": True, "RELEASE": "release", "ACQUIRE": "acquire", "WAIT": True, **how}
    with interleaved(seed, resident):
        hand_over[(2,)](x, out, ready, **given)
    return torch.equal(out, 2 * torch.arange(16.0))


def test_a_right_hand_over_holds() -> None:
    assert all(handed_over(seed) for seed in range(60))


@pytest.mark.parametrize("fault", [{"BARRIER": False}, {"RELEASE": "relaxed"}, {"ACQUIRE": "relaxed"}, {"WAIT": False}])
def test_a_fault_shows(fault: dict[str, object]) -> None:
    assert not all(handed_over(seed, **fault) for seed in range(60))


def test_waiting_for_what_has_not_begun_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.interleaved.MOST_STEPS", 500)
    with pytest.raises(NoProgressError):  # one at a time, and the one that waits comes first for some seed
        assert all(handed_over(seed, resident=1) for seed in range(20))


CONFIGS = st.builds(
    Config,
    bm=st.just(16),
    bn=st.just(16),
    bk=st.just(32),
    warps=st.just(4),
    stages=st.just(2),
    split_base=st.integers(1, 3),
    split_shrink=st.integers(1, 3),
)


@settings(deadline=None, max_examples=40)
@given(cases(rows=st.integers(1, 40)), CONFIGS, st.booleans(), st.integers(0, 2**31))
def test_gated_lora_in_any_order(case: Case, config: Config, base: bool, seed: int) -> None:
    """As many programs at a time as the launch counts on (`num_sms`), beginning in any order."""
    lora, y = case.lora, torch.full((case.x.shape[0], case.weight.shape[0]), float("nan"), dtype=case.x.dtype)
    if not base:
        y = case.x @ case.weight.T + (0 if case.bias is None else case.bias)
    with interleaved(seed, resident=4):
        weights = (case.weight, case.bias) if base else (None, None)
        launch(y, case.x, *weights, lora.a, lora.b, lora.spans, lora.scale, case.num_real, config)
    assert_close(y, case.expected(), case.x.dtype)
    assert not counters(torch.device("cpu")).any()
