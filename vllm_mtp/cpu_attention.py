"""Attention of mask rows on a CPU: vLLM's kernel serves the real rows as in plain decoding, ours the mask rows beside them."""

from typing import Any

import torch
from vllm.logger import init_logger

from vllm_mtp.kernels import cpu
from vllm_mtp.kernels.comb_attention import CombLayout
from vllm_mtp.layout import Groups

logger = init_logger("vllm.mtp")


def supports(impl: Any, dtype: torch.dtype, block_size: int) -> bool:
    """Whether `CpuCombAttention` can serve a layer with this attention implementation (v1/attention/backends/cpu_attn.py)."""
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    return (
        isinstance(impl, CPUAttentionBackendImpl)
        and impl.attn_type == AttentionType.DECODER
        and impl.alibi_slopes is None
        and impl.sinks is None
        and not impl.is_fp8_kv_cache
        and impl.head_size % 16 == 0
        and dtype in (torch.float32, torch.bfloat16)
        # The kernel reads the cache as these two write it; those for matrix units have a layout of their own.
        and _get_attn_isa(dtype, block_size, impl.head_size, impl.kv_cache_dtype) in ("vec", "vec16")
    )


class CpuCombAttention:
    """Runs the mask rows of every attention layer in `comb_attention_cpu_`: they read their request's cache in place, and their own
    K/V never enter it, so it needs no scratch blocks and copies nothing.

    Raises:
        NotBuilt: the kernels cannot be built here.
    """

    def __init__(self) -> None:
        cpu.load()
        self.attend = torch.ops.vllm_mtp.comb_attention_cpu_.default
        self.step: tuple[CombLayout, torch.Tensor, int] | None = None

    def blocks_per_group(self, k: int, block_size: int) -> int:
        """None."""
        return 0

    def bind(self, kv_caches: list[torch.Tensor]) -> None:
        """Each layer's call brings its cache."""

    def plan(
        self, groups: Groups, prefix_len: torch.Tensor, request_len: torch.Tensor, longest: int, block_table: torch.Tensor, *_: int
    ) -> tuple[CombLayout, torch.Tensor, int]:
        layout = CombLayout(prefix_len, groups.start, groups.group_of_row, groups.request_start, groups.num_rows)
        return layout, block_table, groups.num_real

    def prepare(self, planned: Any) -> None:
        """Nothing to do."""

    def begin(self, planned: tuple[CombLayout, torch.Tensor, int], prepared: object) -> None:
        self.step = planned

    def end(self) -> None:
        self.step = None

    def wrap(self, impl: Any) -> None:
        attend, write = impl.forward, impl.do_kv_cache_update
        options = impl.scale, max(impl.sliding_window, 0), float(impl.logits_soft_cap)

        def do_kv_cache_update(
            layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
        ) -> None:
            # The CPU operation trusts key's row count, and would write past the end of `slots`.
            write(layer, key[: slots.shape[0]], value[: slots.shape[0]], kv_cache, slots)

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
            attend(layer, query, key, value, kv_cache, metadata, output=output, **kwargs)
            if self.step is not None and metadata is not None:
                layout, table, num_real = self.step
                groups = layout.prefix_len, layout.group_start, layout.group_of_row, layout.row_start
                self.attend(output, query, key, value, kv_cache, table, *groups, num_real, *options)
            return output

        impl.forward, impl.do_kv_cache_update = forward, do_kv_cache_update
