"""The kernels compile for Hopper, which needs no GPU: matrix instructions are used, shared memory suffices, and their inner loops
load 16 bytes at a time and spill nothing.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_mtp.kernels.comb_attention import CombInputs, CombLayout
from vllm_mtp.kernels.comb_attention import triton as comb
from vllm_mtp.kernels.gated_lora import triton as lora

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

SHARED_BYTES = 227 * 1024  # a program's limit on an H100 and H200
SMS = 132
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiler:
    """Stands in for a kernel: compiles for sm_90 what a launch would run, with Triton's specialization of arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *values: Any, **named: Any) -> None:
        """One compilation; the result stays in `compiled`."""
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        arguments = {**dict(zip(self.kernel.arg_names, values, strict=False)), **named}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            fixed = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and fixed):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name], attributes[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0 and fixed:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def check(compiled: Any, folder: Path, instruction: str | None) -> None:
    assert compiled.metadata.shared <= SHARED_BYTES
    assert instruction is None or instruction in compiled.asm["ptx"]
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    code = subprocess.run([TOOLS / "cuobjdump", "-sass", binary], capture_output=True, text=True, check=True).stdout
    loops = [loop for loop in inner_loops(code) if any("MMA" in line for line in loop)]
    assert bool(loops) == (instruction is not None)
    for loop in loops:
        assert not [line for line in loop if re.search(r"\b(STL|LDL)\b", line)]
        loads = [line for line in loop if "LDGSTS" in line]
        # One table entry a key, where keys are found by their blocks, is 4 bytes.
        assert loads
        assert sum(".128" in line for line in loads) > len(loads) / 2
        assert not [line for line in loop if re.search(r"\bLDG\b", line)]


def inner_loops(code: str) -> list[list[str]]:
    """Instructions of the loops that hold no other loop, of cuobjdump's listing."""
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = [(int(found[1], 16), at) for at, line in lines if (found := re.search(r"\bBRA 0x([0-9a-f]+)", line))]
    back = [(first, last) for first, last in jumps if first < last]
    inner = [(a, b) for a, b in back if not any((a, b) != (c, d) and a <= c and d <= b for c, d in back)]
    return [[line for at, line in lines if first <= at <= last] for first, last in inner]


@pytest.mark.parametrize(
    ("rows", "out", "k", "slices", "base", "instruction"),
    [
        (9, 4096, 4096, 1, True, "mma.sync"),
        (25, 6144, 4096, 3, True, "mma.sync"),
        (81, 4096, 14336, 1, True, "wgmma"),
        (81, 28672, 4096, 2, True, "wgmma"),
        (25, 6144, 4096, 3, False, "mma.sync"),
        (2048, 4096, 4096, 1, False, "wgmma"),
    ],
)
def test_gated_lora_of_an_8b_model(
    rows: int, out: int, k: int, slices: int, base: bool, instruction: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(lora.gated_lora_kernel)
    monkeypatch.setattr(lora, "gated_lora_kernel", compiler)
    config = lora.choose_config(rows, out, k, slices * 128, SMS, base)
    spans, n = meta(slices, 2, dtype=torch.int32), meta(1, dtype=torch.int64)
    weight = meta(out, k) if base else None
    lora.launch(meta(rows, out), meta(rows, k), weight, None, meta(slices, 128, k), meta(out, 128), spans, 1.0, n, config)
    check(compiler.compiled, tmp_path, instruction)


@pytest.mark.parametrize(
    ("groups", "k", "heads", "kv_heads", "head_size", "cache", "instruction"),
    [
        (5, 4, 32, 8, 128, torch.bfloat16, "wgmma"),
        (9, 8, 32, 8, 128, torch.float8_e4m3fn, "wgmma"),
        (1, 2, 32, 8, 64, torch.bfloat16, "mma.sync"),
        (9, 8, 16, 2, 256, torch.bfloat16, "wgmma"),
    ],
)
def test_comb_attention(
    groups: int,
    k: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    cache: torch.dtype,
    instruction: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    attend, combine = Compiler(comb.comb_attention_kernel), Compiler(comb.combine_kernel)
    monkeypatch.setattr(comb, "comb_attention_kernel", attend)
    monkeypatch.setattr(comb, "combine_kernel", combine)
    rows = groups * k
    config = comb.choose_config(rows, heads, kv_heads, head_size, 1, 32768, SMS, 2)
    layout = CombLayout(*(meta(size, dtype=torch.int32) for size in (groups, groups + 1, rows, 2)), max_rows=rows)
    q, own = meta(rows, heads, head_size), meta(rows, kv_heads, head_size)
    paged, table = meta(4096, 16, kv_heads, head_size, dtype=cache), meta(1, 2048, dtype=torch.int32)
    scale = meta(1, dtype=torch.float32)
    inputs = CombInputs(q, own, own, paged, paged, table, layout, 0.1, k_scale=scale, v_scale=scale)
    comb.launch(torch.empty_like(q), inputs, config)
    check(attend.compiled, tmp_path, instruction)
    check(combine.compiled, tmp_path, None)
