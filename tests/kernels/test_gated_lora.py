"""The gated LoRA kernel against the formula in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_mtp.kernels.dispatch import counters
from vllm_mtp.kernels.gated_lora import LowRankSlices, gated_lora, gated_lora_, gated_lora_reference
from vllm_mtp.kernels.gated_lora.triton import Config, choose_config, launch

from .conftest import DEVICE, examples

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
SMALL = Config(bm=16, bn=16, bk=16, warps=4, stages=2)


@dataclass
class Case:
    """Inputs of one product and its value in float64."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora: LowRankSlices
    num_real: torch.Tensor

    def expected(self) -> torch.Tensor:
        lora = LowRankSlices(self.lora.a.double(), self.lora.b.double(), self.lora.spans, self.lora.scale)
        bias = None if self.bias is None else self.bias.double()
        return gated_lora_reference(self.x.double(), self.weight.double(), lora, self.num_real, bias)


@st.composite
def cases(draw: st.DrawFn, rows: st.SearchStrategy[int] | None = None) -> Case:
    """Odd sizes, up to three slices with gaps between them, N anywhere from 0 to beyond M."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, m, k = draw(DTYPES), draw(st.integers(0, 40) if rows is None else rows), draw(st.integers(1, 150))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    slices, out = [], 0
    for _ in range(draw(st.integers(1, 3))):
        out += draw(st.sampled_from([0, 0, 7]))  # an output span without a LoRA
        size, rank = draw(st.integers(1, 60)), draw(st.sampled_from([1, 3, 8, 16, 40, 256]))
        slices.append((out, normal(rank, k) / k**0.5, normal(size, rank)))
        out += size
    out += draw(st.sampled_from([0, 5]))
    bias = normal(out) if draw(st.booleans()) else None
    num_real = torch.tensor([draw(st.integers(0, m + 2))], device=DEVICE, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    return Case(normal(m, k), normal(out, k), bias, LowRankSlices.pack(slices, out, draw(st.sampled_from([1.0, 0.25]))), num_real)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    if found.numel():
        error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error.item() <= TOLERANCE[dtype]  # NaN fails


@settings(deadline=None, max_examples=examples(60))
@given(cases(), st.sampled_from(["fused", "add", "auto"]))
def test_equals_the_formula(case: Case, form: str) -> None:
    found = gated_lora(case.x, case.weight, case.lora, case.num_real, case.bias, form)
    assert_close(found, case.expected(), case.x.dtype)
    assert not counters(DEVICE).any()


@settings(deadline=None, max_examples=examples(40))
@given(cases(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([16, 32]), st.sampled_from([16, 64]))
def test_every_split_and_tile_writes_its_part_of_a_poisoned_output(case: Case, base: int, shrink: int, bn: int, bk: int) -> None:
    y = torch.full((case.x.shape[0], case.weight.shape[0]), float("nan"), dtype=case.x.dtype, device=DEVICE)
    config = Config(bm=16, bn=bn, bk=bk, warps=4, stages=2, split_base=base, split_shrink=shrink)
    lora = case.lora
    launch(y, case.x, case.weight, case.bias, lora.a, lora.b, lora.spans, lora.scale, case.num_real, config)
    assert_close(y, case.expected(), case.x.dtype)
    assert not counters(DEVICE).any()


@settings(deadline=None, max_examples=examples(30))
@given(cases())
def test_add_leaves_real_rows_and_other_columns_alone(case: Case) -> None:
    (m, out), n = (case.x.shape[0], case.weight.shape[0]), int(case.num_real)
    buffer = torch.randn(m, out + 9).to(DEVICE, case.x.dtype)
    before, y = buffer.clone(), buffer[:, 3 : 3 + out]
    assert gated_lora_(y, case.x, case.lora, case.num_real) is y
    identity = torch.eye(out, dtype=torch.float64, device=DEVICE)
    update = Case(case.x, case.weight * 0, None, case.lora, case.num_real).expected()
    assert_close(y, before[:, 3 : 3 + out].double() @ identity + update, case.x.dtype)
    assert torch.equal(buffer[:n], before[:n])
    assert torch.equal(buffer[:, :3], before[:, :3])
    assert torch.equal(buffer[:, 3 + out :], before[:, 3 + out :])


@settings(deadline=None, max_examples=examples(10))
@given(cases(rows=st.integers(1, 30)))
def test_real_rows_do_not_depend_on_mask_rows(case: Case) -> None:
    if int(case.num_real) >= case.x.shape[0]:
        case.num_real.zero_().add_(case.x.shape[0] - 1)
    n = int(case.num_real)
    first = gated_lora(case.x, case.weight, case.lora, case.num_real, case.bias, "fused")
    case.x[n:] = torch.randn_like(case.x[n:].float()).to(case.x.dtype)
    second = gated_lora(case.x, case.weight, case.lora, case.num_real, case.bias, "fused")
    assert torch.equal(first[:n], second[:n])
    assert not torch.equal(first[n:], second[n:])


def test_more_rows_than_a_row_tile() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    x, weight = torch.randn(300, 40, device=DEVICE), torch.randn(50, 40, device=DEVICE)
    lora = LowRankSlices.pack([(0, torch.randn(6, 40, device=DEVICE), torch.randn(50, 6, device=DEVICE))], 50)
    for n in (0, 129, 299, 300):
        case = Case(x, weight, None, lora, torch.tensor([n], device=DEVICE))
        for form in ("fused", "add"):
            assert_close(gated_lora(x, weight, lora, case.num_real, form=form), case.expected(), x.dtype)


def test_rows_of_a_larger_buffer() -> None:
    wide = torch.randn(9, 64, device=DEVICE)
    x, weight = wide[:, 5:45], torch.randn(20, 80, device=DEVICE)[:, :40]
    lora = LowRankSlices.pack([(0, torch.randn(3, 40, device=DEVICE), torch.randn(20, 3, device=DEVICE))], 20)
    case = Case(x, weight, None, lora, torch.tensor([4], device=DEVICE))
    assert_close(gated_lora(x, weight, lora, case.num_real, form="fused"), case.expected(), x.dtype)


def small_case() -> Case:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    lora = LowRankSlices.pack([(0, normal(4, 20), normal(12, 4)), (12, normal(4, 20), normal(6, 4))], 18, 0.5)
    return Case(normal(7, 20), normal(18, 20), normal(18), lora, torch.tensor([3], device=DEVICE))


def test_operations_keep_torchs_contract() -> None:
    case = small_case()
    lora, checks = case.lora, ("test_schema", "test_faketensor")
    arguments = (lora.a, lora.b, lora.spans, lora.scale, case.num_real)
    for form in ("fused", "add"):
        torch.library.opcheck(
            torch.ops.vllm_mtp.gated_lora.default, (case.x, case.weight, case.bias, *arguments, form), test_utils=checks
        )
    torch.library.opcheck(
        torch.ops.vllm_mtp.gated_lora_.default, (torch.randn(7, 18, device=DEVICE), case.x, *arguments), test_utils=checks
    )


def test_compiles_into_one_graph_that_serves_every_n() -> None:
    case = small_case()
    compiled = torch.compile(gated_lora, fullgraph=True, backend="aot_eager")
    for n in (0, 3, 7):
        case.num_real.fill_(n)
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            found = compiled(case.x, case.weight, case.lora, case.num_real, case.bias)
        assert_close(found, case.expected(), torch.float32)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_graph_reads_n_anew() -> None:
    case = small_case()
    gated_lora(case.x, case.weight, case.lora, case.num_real, case.bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated_lora(case.x, case.weight, case.lora, case.num_real, case.bias)
    for n in (0, 5, 7):
        case.num_real.fill_(n)
        y.fill_(float("nan"))
        graph.replay()
        assert_close(y, case.expected(), torch.float32)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU's scheduling")
def test_many_launches_of_many_programs_agree_to_the_bit() -> None:
    x, weight = (torch.randn(*shape, device=DEVICE).bfloat16() for shape in ((81, 4096), (28672, 4096)))
    slices = [(at, torch.randn(128, 4096).to(x), torch.randn(14336, 128).to(x)) for at in (0, 14336)]
    lora, n = LowRankSlices.pack(slices, 28672), torch.tensor([9], device=DEVICE)
    first = gated_lora(x, weight, lora, n, form="fused")
    for _ in range(200):
        assert torch.equal(gated_lora(x, weight, lora, n, form="fused"), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(7, 21)}, "does not fit A"),
        ({"weight": torch.randn(17, 20)}, "17 output features"),
        ({"weight": torch.randn(18, 20).half()}, "does not fit x"),
        ({"num_real": torch.tensor([1, 2])}, "num_real"),
        ({"num_real": torch.tensor([1.0])}, "num_real"),
        ({"form": "both"}, "form"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    case = small_case()
    arguments = {"x": case.x, "weight": case.weight, "lora": case.lora, "num_real": case.num_real, **change}
    with pytest.raises(ValueError, match=message):
        gated_lora(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "no slices"),
        ([(0, torch.ones(257, 4), torch.ones(8, 257))], "rank 257"),
        ([(0, torch.ones(2, 4), torch.ones(8, 3))], "do not fit"),
        ([(0, torch.ones(2, 4), torch.ones(8, 2)), (7, torch.ones(2, 4), torch.ones(2, 2))], "overlaps"),
        ([(5, torch.ones(2, 4), torch.ones(8, 2))], "leaves"),
    ],
)
def test_slices_that_do_not_fit_are_refused(slices: list[tuple[int, torch.Tensor, torch.Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankSlices.pack(slices, 12)


def test_decode_shapes_of_an_8b_model_fill_the_gpu_once() -> None:
    shapes = {"qkv": (6144, 4096, 384), "o": (4096, 4096, 128), "gate_up": (28672, 4096, 256), "down": (4096, 14336, 128)}
    for out, k, ranks in shapes.values():
        for rows in (9, 25, 81):
            config = choose_config(rows, out, k, ranks, 132, base=True)
            programs = -(-out // config.bn) * config.split_base
            assert config.bm >= rows
            assert programs >= 0.7 * 132
            assert config.split_base <= 4
