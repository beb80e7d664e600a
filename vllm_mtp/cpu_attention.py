"""Attention of steps with mask rows on a CPU.

Our kernel serves the mask rows. In bfloat16 it serves the real rows of decoding steps in the same pass, with and without mask rows:
vLLM's is made for prompts and takes ten times as long for a few rows a request. In float32 real rows stay with vLLM's kernel, so
that they are what plain vLLM computes, to the bit.
"""

import itertools
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_mtp.config import MAX_MASK_TOKENS
from vllm_mtp.kernels import cpu
from vllm_mtp.layout import Groups
from vllm_mtp.mask_attention import InPlace, view
from vllm_mtp.plan import EngineStep

logger = init_logger("vllm.mtp")

MOST_ROWS = 1 + MAX_MASK_TOKENS  # of a request that decodes


@cache
def kernels_load() -> bool:
    """Whether our kernels for CPUs are there; without them the same is done by more and slower operations."""
    try:
        cpu.load()
    except cpu.NotBuilt as error:
        logger.warning("Mask rows run without our CPU kernels, and slower: %s", error)
        return False
    return True


def reads_cache(dtype: torch.dtype, block_size: int, head_size: int, cache_dtype: str) -> bool:
    """Whether the kernel reads a cache of this kind (v1/attention/backends/cpu_attn.py)."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    if dtype not in cpu.DTYPES or head_size % 16 or cache_dtype.startswith("fp8"):
        return False
    # As these two write it; those for matrix units have a layout of their own.
    return _get_attn_isa(dtype, block_size, head_size, cache_dtype) in ("vec", "vec16")


def supports(layer: Any, dtype: torch.dtype, block_size: int) -> bool:
    """Whether `CpuCombAttention` can serve one of vLLM's attention layers."""
    from vllm.v1.attention.backend import AttentionType

    impl = layer.impl
    return (
        getattr(impl, "attn_type", None) == AttentionType.DECODER
        and layer.kv_sharing_target_layer_name is None
        and layer.head_size_v == layer.head_size
        and impl.alibi_slopes is None
        and impl.sinks is None
        and reads_cache(dtype, block_size, impl.head_size, impl.kv_cache_dtype)
    )


_Plan = tuple[tuple[torch.Tensor, ...], torch.Tensor, int]
"""Prefix lengths and starts of groups as the kernel takes them, the block table, and the number of real rows."""
_RealRows = tuple[torch.Tensor, torch.Tensor]
"""First row and tokens of each request, [R + 1] and [R]."""

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, "_Layer"] = weakref.WeakValueDictionary()
"""The layers of all engines of this process, by the number that the operation knows them by."""


class _Layer:
    """One attention layer of the target. `forward` and `do_kv_cache_update` stand in the place of its implementation's."""

    def __init__(self, attention: "CpuCombAttention", layer: Any) -> None:
        impl = layer.impl
        self.attention, self.layer, self.write, self.attend = attention, layer, impl.do_kv_cache_update, impl.forward
        window = max(impl.sliding_window, 0)
        self.options = impl.scale, window, float(impl.logits_soft_cap)
        self.view = view(window, attention.mask_window)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        # The CPU operation trusts key's row count, and would write past the end of `slots`.
        self.write(layer, key[: slots.shape[0]], value[: slots.shape[0]], kv_cache, slots)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of all rows, into `output`; the K/V of the real rows are in the cache."""
        if metadata is None:  # a warm-up run
            return output
        groups, table, num_real = self.attention.step or (_NO_GROUPS, metadata.block_table, query.shape[0])
        real = self.attention.real_rows(metadata, query.dtype, key.shape[1])
        if real is None:
            self.attend(layer, query, key, value, kv_cache, metadata, output=output)
        if real is not None or self.attention.step is not None:
            self.attention.kernel(
                output, query, key, value, kv_cache, table, *groups, num_real, *self.options, *(real or (None, None)), *self.view
            )
        return output


_NO_GROUPS = (torch.empty(0, dtype=torch.long),) * 4


def _expanded_attention_(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, number: int) -> None:
    served = _layers[number]
    context, layer = served.attention.context, served.layer
    if context is None:  # a warm-up run
        return
    served.do_kv_cache_update(layer, key, value, layer.kv_cache, context.slot_mapping[layer.layer_name])
    served.forward(layer, query, key, value, layer.kv_cache, context.attn_metadata[layer.layer_name], output)


_library = torch.library.Library("vllm_mtp", "FRAGMENT")
_library.define("expanded_attention_(Tensor query, Tensor key, Tensor value, Tensor(a!) output, int number) -> ()")
_library.impl("expanded_attention_", _expanded_attention_, "CPU")
_library._register_fake("expanded_attention_", lambda *_: None)


class CpuCombAttention(InPlace):
    """Runs the mask rows of every attention layer in `comb_attention_cpu_`: they read their request's cache in place, and their own
    K/V never enter it, so it needs no scratch blocks and copies nothing.

    A graph of ours has one operation a layer, `expanded_attention_`, in the place of vLLM's two.

    Args:
        in_our_graph: whether the graph that is being traced is ours.
        mask_window: as `ServingOptions` has it.

    Raises:
        NotBuilt: the kernels cannot be built here.
    """

    def __init__(self, in_our_graph: Callable[[], bool], mask_window: int | None = None) -> None:
        cpu.load()
        self.mask_window = mask_window
        self.kernel = torch.ops.vllm_mtp.comb_attention_cpu_.default
        self.in_our_graph = in_our_graph
        self.step: _Plan | None = None
        self.context: Any = None
        self.metadata: Any = None
        self.real: _RealRows | None = None

    def plan(self, groups: Groups, prefix_len: torch.Tensor, step: EngineStep, block_size: int, scratch: int) -> _Plan:
        starts = prefix_len, groups.start, groups.group_of_row, groups.request_start
        return starts, step.block_table, groups.num_real

    def real_rows(self, metadata: Any, dtype: torch.dtype, num_kv_heads: int) -> _RealRows | None:
        """Which real rows our kernel serves; None where vLLM's is to serve them. The same in every layer of a step.

        Ours shares the work out by request and KV head, vLLM's can split the tokens of one request too.

        Args:
            metadata: vLLM's, of the step.
            dtype, num_kv_heads: of a layer.
        """
        if metadata is not self.metadata:
            ours = (
                dtype == torch.bfloat16
                and metadata.causal
                and metadata.max_query_len <= MOST_ROWS
                and metadata.seq_lens.shape[0] * num_kv_heads >= torch.get_num_threads()
            )
            self.metadata, self.real = metadata, (metadata.query_start_loc, metadata.seq_lens) if ours else None
        return self.real

    def begin(self, planned: _Plan, prepared: object) -> None:
        from vllm.forward_context import get_forward_context

        self.step, self.context = planned, get_forward_context()

    def end(self) -> None:
        self.step = self.context = None

    def wrap(self, layer: Any) -> None:
        served, traced, number = _Layer(self, layer), layer.forward, next(_numbers)
        _layers[number] = served

        def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not (torch.compiler.is_compiling() and self.in_our_graph()):
                return traced(query, key, value, *args, **kwargs)
            size, heads, kv_heads = layer.head_size, layer.num_heads, layer.num_kv_heads
            output = query.new_empty(query.shape[0], heads, size)
            torch.ops.vllm_mtp.expanded_attention_(
                query.view(-1, heads, size), key.view(-1, kv_heads, size), value.view(-1, kv_heads, size), output, number
            )
            return output.view(-1, heads * size)

        layer.impl.forward, layer.impl.do_kv_cache_update, layer.forward = served.forward, served.do_kv_cache_update, forward
