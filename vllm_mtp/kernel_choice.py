"""Which kernels compute the mask rows of a served model: by device, by model, and by what the operator lets run. Chosen and logged
once, before vLLM compiles the model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_mtp import cpu_attention, cpu_linear, gated_lora, gpu_attention, gpu_linear, kernel_trial, selection
from vllm_mtp.config import ServingOptions
from vllm_mtp.cpu_attention import CpuCombAttention
from vllm_mtp.gpu_attention import GpuCombAttention
from vllm_mtp.kernels.cpu import DTYPES
from vllm_mtp.kernels.dispatch import runs_triton
from vllm_mtp.kernels.gated_lora import MAX_RANK
from vllm_mtp.mask_attention import ForkedSequences, MaskAttention, StepSequences

logger = init_logger("vllm.mtp")


def expected_attention(vllm_config: Any, options: ServingOptions) -> type[MaskAttention]:
    """The attention of mask rows that an engine will most likely have, before there is one whose layers can be asked."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if options.kernels == "torch":
        return ForkedSequences
    if current_platform.is_cuda() and HAS_TRITON:
        return GpuCombAttention
    kind = model.dtype, cache.block_size, model.get_head_size(), cache.cache_dtype
    if not current_platform.is_cpu() or selection.runs_on_v2() or not cpu_attention.reads_cache(*kind):
        return ForkedSequences
    return CpuCombAttention if cpu_attention.kernels_load() else ForkedSequences


class KernelChoice:
    """The choice for one served model.

    Args:
        model: loaded.
        rows: where real rows end.
        options: the operator's, of which `kernels` and `mask_window` count.

    Attributes:
        layers: vLLM's attention layers of the model.
        triton: whether Triton kernels run; they did in `try_out`, once that was called.
        native: whether our C++ kernels for CPUs run.

    Raises:
        ValueError: the attention backend does not support mask rows.
    """

    def __init__(self, model: torch.nn.Module, rows: gated_lora.RowSplit, options: ServingOptions) -> None:
        from vllm.model_executor.layers.attention import Attention

        self.model, self.rows, self.mask_window = model, rows, options.mask_window
        wanted = options.kernels != "torch"
        self.layers: list[Any] = [module for module in model.modules() if isinstance(module, Attention)]
        backends = {layer.get_attn_backend() for layer in self.layers}
        for backend in backends:
            if backend.forward_includes_kv_cache_update:
                raise ValueError(
                    f"mask-token prediction does not support the attention backend {backend.get_name()}, "
                    "which writes the KV cache inside its attention call: choose another with --attention-backend"
                )
        # Triton's interpreter makes a CPU another GPU, if a slow one, unless attention runs on what only CPUs have.
        on_cpu = "CPU_ATTN" in {backend.get_name() for backend in backends}
        self.dtype: torch.dtype = rows.gate.dtype
        self.triton = wanted and not on_cpu and runs_triton(rows.gate) and not current_platform.is_rocm()
        self.native = wanted and on_cpu and self.dtype in DTYPES and cpu_attention.kernels_load()

    @property
    def with_lora(self) -> gated_lora.WithLora:
        """What linear layers with a LoRA compute."""
        if self.triton:
            return gpu_linear.with_kernel
        if self.native:
            return cpu_linear.with_kernels
        return cpu_linear.with_packed_products if current_platform.is_cpu() else gated_lora.with_two_products

    def try_out(self, lora: Mapping[str, Any], longest_group: int, max_model_len: int, block_size: int) -> None:
        """Tries Triton kernels on the model's shapes; those that fail do not run, and a warning says why.

        Args:
            lora: of the adapter by module, as `gated_lora.LowRank`.
            longest_group: most mask rows of a group.
            max_model_len, block_size: of the server, in tokens.

        Raises:
            RuntimeError: the GPU itself has failed, after which nothing can run on it in this process.
        """
        if not self.triton:
            return
        from vllm.model_executor.layers.linear import LinearBase

        logger.info("Trying the Triton kernels on this model's shapes; a first start compiles them, for half a minute or so")
        device, max_rows = self.rows.gate.device, self.rows.gate.shape[0]
        linears: list[Any] = [module for module in self.model.modules() if isinstance(module, LinearBase)]
        products = [self._product(each) for each in linears]
        served = [layer for layer in self.layers if gpu_attention.why_not(layer, self.dtype) is None]
        kinds = {kernel_trial.Heads.of(layer, self.mask_window) for layer in served}
        rank = min(MAX_RANK, max((each.a.shape[0] for each in lora.values()), default=1))
        try:
            kernel_trial.try_linears(products if lora else (), rank, max_rows, self.dtype, device)
            kernel_trial.try_attention(kinds, longest_group, max_model_len, block_size, self.dtype, device)
        except Exception as error:
            if "CUDA error" in str(error):
                raise RuntimeError(
                    f'a kernel for mask rows failed on this GPU ({error}): start with "kernels": "torch" in --speculative-config'
                ) from error
            logger.warning(
                'Mask rows run on torch\'s operations, and slower: %s. "kernels": "torch" asks for that without a warning',
                str(error).partition("\n")[0] or type(error).__name__,
            )
            self.triton = False

    def _product(self, layer: Any) -> kernel_trial.Product:
        out = sum(layer.output_partition_sizes)
        weight = layer.weight if gpu_linear.weight_is_read(layer, out, self.dtype) else None
        return kernel_trial.Product(out, getattr(layer, "input_size_per_partition", layer.input_size), weight)

    def attention(
        self,
        build_metadata: Callable[[StepSequences], Any],
        in_our_graph: Callable[[], bool],
        block_size: int,
        *,
        replayed: bool,
    ) -> MaskAttention:
        """The attention of mask rows, put into the layers; says in the log what was chosen.

        Args:
            build_metadata: as `ForkedSequences` takes it.
            in_our_graph: as `CpuCombAttention` takes it.
            block_size: of the cache.
            replayed: whether steps may be replayed as graphs, which read the plan where their capture stood; the kernel for CPUs
                does not keep it there.
        """
        attention: MaskAttention = ForkedSequences(build_metadata)
        why_forked = "there is no kernel of ours for this server"
        if self.triton:
            obstacles = [why for layer in self.layers if (why := gpu_attention.why_not(layer, self.dtype)) is not None]
            if obstacles:
                why_forked = obstacles[0]
            else:
                attention = GpuCombAttention(self.mask_window)
        elif self.native and not replayed and all(cpu_attention.supports(each, self.dtype, block_size) for each in self.layers):
            attention = CpuCombAttention(in_our_graph, self.mask_window)
        for layer in self.layers:
            attention.wrap(layer)
        language = "Triton" if self.triton else "C++" if self.native else "torch"
        if not isinstance(attention, ForkedSequences):
            logger.info("Mask rows: gated LoRA and attention in %s kernels", language)
            return attention
        logger.info("Mask rows: gated LoRA in %s, attention as forked sequences of the server's backend: %s", language, why_forked)
        if self.mask_window is not None:
            logger.warning("mask_window is left out, and mask rows see all of their request: %s", why_forked)
        return attention
