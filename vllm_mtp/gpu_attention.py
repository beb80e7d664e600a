"""Attention of mask rows on a GPU: our Triton kernel reads the cache of their request in place (kernels/comb_attention).

Real rows stay with the server's own backend and metadata, as if there were no others. Those backends of vLLM are served whose cache
has K and V of a head side by side.
"""

from dataclasses import dataclass
from typing import Any

import torch

from vllm_mtp.kernels.comb_attention import MAX_HEAD_SIZE, CombLayout, comb_attention_
from vllm_mtp.layout import Groups
from vllm_mtp.mask_attention import InPlace, view
from vllm_mtp.plan import EngineStep

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Whose caches are [blocks, H_kv, block, 2 D], with any strides but the last (vLLM: v1/attention/backends)."""
FP8 = ("fp8", "fp8_e4m3")


def why_not(layer: Any, dtype: torch.dtype) -> str | None:
    """Why mask rows of one of vLLM's attention layers cannot run on the kernel; None if they can.

    Args:
        layer: `Attention`, with its weights.
        dtype: of the model.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    impl, backend = layer.impl, layer.get_attn_backend().get_name()
    plain = type(layer) is Attention and getattr(impl, "attn_type", None) == AttentionType.DECODER
    obstacles = (
        (backend not in BACKENDS, f"the cache of {backend} is not read by it"),
        (not plain, f"{type(layer).__name__} is not plain causal attention"),
        (layer.kv_sharing_target_layer_name is not None, "layers share their caches"),
        (layer.head_size_v != layer.head_size, f"keys are {layer.head_size} wide and values {layer.head_size_v}"),
        (layer.head_size > MAX_HEAD_SIZE, f"heads are {layer.head_size} wide"),
        (getattr(impl, "alibi_slopes", None) is not None, "attention is by ALiBi"),
        (getattr(impl, "chunk_lookback", -1) > -1, "attention is in chunks"),
        (layer.kv_cache_torch_dtype != dtype and layer.kv_cache_dtype not in FP8, f"the cache is of {layer.kv_cache_dtype}"),
        (max(scale.numel() for scale in (layer._k_scale, layer._v_scale)) > 1, "heads of the cache have scales of their own"),
    )
    return next((reason for found, reason in obstacles if found), None)


@dataclass(frozen=True)
class CombRows:
    """The mask rows of a step as the kernel takes them: `CombLayout`'s fields, and

    Attributes:
        block_table: blocks of each request, [R, W].
        num_real: rows of the step in front of the mask rows.
    """

    prefix_len: torch.Tensor
    group_start: torch.Tensor
    group_of_row: torch.Tensor
    row_start: torch.Tensor
    block_table: torch.Tensor
    max_rows: int
    num_real: int

    @property
    def layout(self) -> CombLayout:
        """The groups."""
        return CombLayout(self.prefix_len, self.group_start, self.group_of_row, self.row_start, self.max_rows)


class GpuCombAttention(InPlace):
    """Runs the mask rows of every attention layer in `comb_attention_`: all groups of a request read its cache together, their own
    K/V never enter it, and so there are no scratch blocks and no copies. A `MaskAttention`.

    Args:
        mask_window: as `ServingOptions` has it.
    """

    def __init__(self, mask_window: int | None = None) -> None:
        self.mask_window = mask_window
        self.step: CombRows | None = None

    def plan(self, groups: Groups, prefix_len: torch.Tensor, step: EngineStep, block_size: int, scratch: int) -> CombRows:
        return CombRows(
            prefix_len=prefix_len,
            group_start=groups.start,
            group_of_row=groups.group_of_row,
            row_start=groups.request_start,
            block_table=step.block_table,
            max_rows=groups.most_masks,
            num_real=groups.num_real,
        )

    def begin(self, planned: CombRows, prepared: object) -> None:
        self.step = planned

    def end(self) -> None:
        self.step = None

    def wrap(self, layer: Any) -> None:
        impl = layer.impl
        attend, write, size = impl.forward, impl.do_kv_cache_update, layer.head_size
        scale, softcap = impl.scale, float(impl.logits_soft_cap or 0)
        window, kept = view(layer.sliding_window or 0, self.mask_window)
        sinks = getattr(impl, "sinks", None)
        fp8 = layer.kv_cache_dtype in FP8

        def do_kv_cache_update(
            layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
        ) -> None:
            if self.step is not None:
                n = self.step.num_real
                key, value, slots = key[:n], value[:n], slots[:n]
            write(layer, key, value, kv_cache, slots)

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
            rows = self.step
            if rows is None or metadata is None:  # without mask rows, or a warm-up run
                return output
            n = rows.num_real
            masks = query[n:]
            if masks.dtype != key.dtype:  # quantized for a kernel that reads the 8-bit cache as it is
                masks = masks.to(key.dtype) * layer._q_scale.to(key.dtype)
            keys, values = kv_cache.transpose(1, 2).split(size, dim=-1)
            comb_attention_(
                output[n:], masks, key[n:], value[n:], keys, values, rows.block_table, rows.layout, scale, window, softcap, sinks,
                k_scale=layer._k_scale if fp8 else None, v_scale=layer._v_scale if fp8 else None, kept=kept,
            )  # fmt: skip
            return output

        impl.forward, impl.do_kv_cache_update = forward, do_kv_cache_update
