"""The matrix product that both kernels use, on GPUs and under the interpreter."""

import triton
import triton.language as tl

from .dispatch import interpreting

# Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands (runtime/interpreter.py, create_dot): float32 there.
UPCAST = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in float32; a [M, K], b [K, N], acc [M, N]."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:  # noqa: RET505 - Triton compiles the branches apart only as if and else
        return tl.dot(a, b, acc, input_precision=PRECISION)
