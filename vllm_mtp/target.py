"""A served model with mask rows: what vLLM's two model runners have in common, `runner/` being what they do not.

The runner's glue constructs it with vLLM's configuration, lets it `install` the adapter in the loaded model, hands it the KV cache
with `bind`, and from then on plans steps with `planner` and drafts with `draft`.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_mtp import compiled, gated_lora, load, metrics, parallel
from vllm_mtp.adapter import Adapter, AdapterError, check_base, fingerprint_tensors
from vllm_mtp.breaker import Breaker
from vllm_mtp.config import ServingOptions
from vllm_mtp.cpu_drafter import PanelDrafter
from vllm_mtp.cpu_linear import PackedSampler
from vllm_mtp.cpu_memory import FreedMemory
from vllm_mtp.drafter import Drafter, SampledDrafts, Sampler
from vllm_mtp.expansion import Expansion
from vllm_mtp.foreign import longest_group, read_served
from vllm_mtp.kernel_choice import KernelChoice
from vllm_mtp.kv_cache import with_scratch_blocks
from vllm_mtp.layout import group_lengths
from vllm_mtp.mask_attention import ForkedSequences, StepSequences
from vllm_mtp.plan import PlannedStep, Planner, most_groups
from vllm_mtp.request_lora import RequestLoRAs

logger = init_logger("vllm.mtp")


def _warming_up() -> bool:
    """Whether the running step is a profiling or warm-up run: those have no attention metadata."""
    from vllm.forward_context import get_forward_context

    return not get_forward_context().attn_metadata


class MaskTokenTarget:
    """One served model, its adapter and its scratch blocks.

    Attributes:
        options: the operator's options.
        k: most drafts a request.
        longest_group: most mask tokens of a group; fewer than k where more drafts may be looked up.
        layouts: the layouts that steps may have; one, unless the operator leaves the choice to us.
        planner, expansion, drafter: the parts, once installed.
        breaker: opens when one of them fails.
        drafts_any_number: whether `draft` and `draft_with_confidence` take fewer than k rows a request.
        draft, sample_drafts, draft_with_confidence: the drafter's `__call__` and, if drafts are probabilistic, its `sample`, and in
            acceptance by confidence its `with_confidence`, once bound.
    """

    planner: Planner
    expansion: Expansion
    drafter: Drafter
    drafts_any_number: bool
    draft: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    sample_drafts: Callable[..., SampledDrafts]
    draft_with_confidence: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    exporter: metrics.Exporter | None = None

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = vllm_config
        self.breaker = Breaker(parallel.num_ranks)
        self.options = ServingOptions.model_validate(cast(dict[str, Any], vllm_config.additional_config)["mtp"])
        self.k = self.options.num_speculative_tokens
        self.longest_group = longest_group(self.options)
        self.max_model_len = vllm_config.model_config.max_model_len
        self.max_requests = vllm_config.scheduler_config.max_num_seqs
        self.max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.max_mask_rows = load.mask_row_budget(self.options.max_mask_rows, self.max_rows, on_cpu=current_platform.is_cpu())
        layout = self.options.layout
        if layout == "auto":
            self.layouts = load.fitting_layouts(self.longest_group, self.max_rows, self.max_mask_rows)
        else:
            self.layouts = [group_lengths(layout, self.k)]
        self.freed_memory = FreedMemory() if current_platform.is_cpu() else None
        if self.freed_memory is not None:
            self.freed_memory.keep()

    def install(
        self,
        model: torch.nn.Module,
        next_step: Callable[[], PlannedStep | None],
        *,
        keep_states: bool = False,
    ) -> None:
        """Reads the adapter and installs mask rows in `model`; vLLM compiles and profiles it afterwards.

        Args:
            model: the loaded model.
            next_step: as `Expansion` takes it.
            keep_states: whether the states of mask rows must outlive the replay of a CUDA graph.

        Raises:
            AdapterError: the adapter does not fit the model.
            ValueError: the model or its attention backend does not support mask rows.
        """
        adapter = read_served(self.options, self.config.model_config.hf_text_config)
        check_base(adapter.config, self.config.model_config.hf_text_config, fingerprint_tensors(model.named_parameters()))
        dtype, device = cast(torch.dtype, self.config.model_config.dtype), next(model.parameters()).device
        rows = gated_lora.RowSplit(self.max_rows, device, dtype)
        block_size = self.config.cache_config.block_size
        kernels = KernelChoice(model, rows, self.options)
        kernels.try_out(adapter.lora, self.longest_group, self.max_model_len, block_size)
        try:
            gated_lora.install(model, dict(adapter.lora), rows, kernels.with_lora)
        except ValueError as error:
            raise AdapterError(f"{self.options.adapter}: {error}") from None
        # A KV connector sees each layer pass by in vLLM's own operations.
        alone = self.config.kv_transfer_config is None

        def in_our_graph() -> bool:
            return alone and rows.tracing_expanded

        self.attention = kernels.attention(self._metadata, in_our_graph, block_size, replayed=keep_states)
        request_loras = RequestLoRAs(model)
        embed = request_loras.without(cast(Callable[[torch.Tensor], torch.Tensor], model.embed_input_ids))
        with torch.no_grad():
            embeddings = adapter.embeddings(embed, self.longest_group, device).to(dtype)
        self.planner = Planner(
            self.attention,
            self.k,
            max_rows=self.max_rows,
            max_mask_rows=self.max_mask_rows,
            max_groups=most_groups(self.layouts, self.max_requests, self.max_mask_rows),
            max_model_len=self.max_model_len,
        )
        self.expansion = Expansion(
            target=model,
            mask_embeddings=embeddings,
            rows=rows,
            attention=self.attention,
            request_loras=request_loras,
            next_step=next_step,
            warming_up=_warming_up,
            breaker=self.breaker,
            rewind=self._rewind,
            compile=compiled.compiler(self.config),
            states=embeddings.new_zeros(self.max_mask_rows, embeddings.shape[1]) if keep_states else None,
        )
        self.drafter = self._drafter(model, adapter, request_loras, dtype, device)

    def _rewind(self) -> None:
        """Makes the running step ready for a second forward.

        Raises:
            RuntimeError: a KV connector has seen some of its layers already, and would take those that follow for others.
        """
        from vllm.forward_context import get_forward_context

        if self.config.kv_transfer_config is not None:
            raise RuntimeError("a step of a server with a KV connector cannot run again")
        context = get_forward_context()
        if hasattr(context, "moe_layer_index"):  # layers of experts count themselves, in later releases
            context.moe_layer_index = 0

    def _drafter(
        self, model: Any, adapter: Adapter, request_loras: RequestLoRAs, dtype: torch.dtype, device: torch.device
    ) -> Drafter:
        vocab_size = self.config.model_config.get_vocab_size()
        sampler: Sampler | None = adapter.sampler
        if adapter.sampler is not None:
            head = adapter.sampler.to(device, dtype)
            sampler = PackedSampler(head) if current_platform.is_cpu() else head
        return Drafter(
            request_loras.without(model.compute_logits),
            request_loras.without(model.embed_input_ids),
            parallel.unembedding(model, vocab_size),
            sampler,
            self.options.candidates,
            vocab_size,
        )

    @property
    def probabilistic(self) -> bool:
        """Whether drafts of requests above temperature 0 are drawn from a distribution that verification is told of."""
        return self.options.draft_sample_method == "probabilistic"

    @property
    def by_confidence(self) -> bool:
        """Whether drafts may be taken without a match."""
        return self.options.acceptance == "confidence"

    @property
    def wants_confidence(self) -> bool:
        """Whether drafts are asked for with their probabilities."""
        return self.by_confidence

    def _compiled_drafter(self, function: Callable[..., Any], *more: torch.dtype) -> Callable[..., Any]:
        """A method of the drafter, compiled where the engine compiles.

        Args:
            function: of hidden, rows and sampled (`Drafter.__call__`) and of a tensor [R] for each of `more`.
            more: their dtypes.
        """
        compile = compiled.compiler(self.config)
        if compile is None:
            return function
        draft = compile(function)
        embeddings = self.expansion.mask_embeddings
        with torch.inference_mode():  # as in the runner's steps
            hidden, rows = (
                embeddings.new_zeros(7, embeddings.shape[1]),
                torch.zeros(3, self.longest_group, dtype=torch.long, device=embeddings.device),
            )
            per_request = [rows.new_zeros(3, dtype=dtype) for dtype in (rows.dtype, *more)]
            for tensor in (hidden, rows, *per_request):
                torch._dynamo.mark_dynamic(tensor, 0)
            draft(hidden, rows, *per_request)
        return draft

    # -- the KV cache --------------------------------------------------------------------------------------------

    @property
    def num_scratch_blocks(self) -> int:
        """Scratch blocks for the forks of the largest step."""
        return self.planner.max_groups * self.attention.blocks_per_group(self.longest_group, self.config.cache_config.block_size)

    def without_scratch_memory(self, available: int, runner: Any) -> int:
        """What is left of `available` bytes for the scheduler's blocks once the scratch blocks have theirs.

        Raises:
            ValueError: nothing is left.
        """
        scratch = self._scratch_bytes(runner)
        if scratch >= available:
            raise ValueError(
                f"the mask rows of {self.max_requests} requests need {scratch / 2**30:.2f} GiB of scratch KV blocks, but only "
                f"{available / 2**30:.2f} GiB are there: lower max_mask_rows, --max-num-seqs or --block-size, or raise the memory "
                "for the KV cache"
            )
        return available - scratch

    def _scratch_bytes(self, runner: Any) -> int:
        return self.num_scratch_blocks * sum(spec.page_size_bytes for spec in runner.get_kv_cache_spec().values())

    def with_scratch_blocks(self, kv_cache_config: Any) -> Any:
        """A copy of the worker's cache configuration that has our blocks behind those which the scheduler hands out.

        Raises:
            ValueError: the cache is laid out in a way that has no room behind its blocks.
        """
        self.first_scratch_block = kv_cache_config.num_blocks
        return with_scratch_blocks(kv_cache_config, self.num_scratch_blocks)

    def bind(self, runner: Any) -> None:
        """Takes the KV cache once it stands; may be called again for another one.

        Args:
            runner: vLLM's model runner, of either version.

        Raises:
            ValueError: the model has attention layers of several backends.
        """
        group = runner.attn_groups[0][0]
        if len(runner.attn_groups) != 1 or len(runner.attn_groups[0]) != 1:
            raise ValueError("mask-token prediction does not support models with several attention backends yet")
        if getattr(group, "kernel_block_size", None) is not None:
            raise ValueError(
                "mask-token prediction needs an attention kernel whose blocks are the cache's: "
                f"set --block-size {group.kernel_block_size}"
            )
        if isinstance(self.attention, ForkedSequences):
            self.builder = self._metadata_builder(group)
        context = self.config.compilation_config.static_forward_context
        self.attention.bind([context[name].kv_cache for name in group.layer_names])
        self.planner.bind(self.config.cache_config.block_size, self.first_scratch_block)
        in_one_call = PanelDrafter.of(self.drafter, self.expansion.target)
        self.draft = in_one_call or self._compiled_drafter(self.drafter.__call__)
        self.drafts_any_number = in_one_call is not None
        if self.wants_confidence:
            self.draft_with_confidence = (
                in_one_call.with_confidence if in_one_call else self._compiled_drafter(self.drafter.with_confidence)
            )
        if self.probabilistic:
            self.sample_drafts = self._compiled_drafter(self.drafter.sample, torch.float32, torch.long, torch.long)
        logger.info(
            "Mask-token prediction is on: adapter %s, k = %d, layout %s, %s drafts, acceptance %s, "
            "up to %d mask rows a decoding request and %d a step, %d scratch blocks (%.0f MiB)",
            self.options.adapter,
            self.k,
            f"{self.options.layout} with lookup" if self.options.lookup else self.options.layout,
            self.options.draft_sample_method,
            f"by confidence from {self.options.default_tau:g}" if self.by_confidence else "lossless",
            max(sum(lengths) for lengths in self.layouts),
            self.max_mask_rows,
            self.num_scratch_blocks,
            self._scratch_bytes(runner) / 2**20,
        )
        if self.exporter is None and parallel.is_first_rank():
            breaker = self.breaker  # not us: the exporter lives as long as we do
            self.exporter = metrics.export(
                self, self.planner.counters, self.options, self.config, logger, lambda: not breaker.is_open
            )

    def _metadata_builder(self, group: Any) -> Any:
        """A metadata builder like the group's own, but for as many sequences and rows as a step of ours has.

        Builders keep buffers for the largest batch (v1/attention/backends/flash_attn.py: scheduler_metadata), which a CUDA graph
        reads; sharing the runner's would overwrite them.
        """
        config = copy.copy(self.config)
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.max_num_seqs = self.max_requests + self.planner.max_groups
        config.compilation_config = copy.copy(config.compilation_config)
        if config.compilation_config.max_cudagraph_capture_size:
            config.compilation_config.max_cudagraph_capture_size = self.max_rows
        own = copy.copy(group)
        own.create_metadata_builders(config, self.expansion.mask_embeddings.device)
        return own.get_metadata_builder()

    def _metadata(self, step: StepSequences) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        return self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=step.query_start,
                query_start_loc_cpu=step.query_start_cpu,
                seq_lens=step.seq_lens,
                num_reqs=step.seq_lens.shape[0],
                num_actual_tokens=int(step.query_start_cpu[-1]),
                max_query_len=step.longest_query,
                max_seq_len=step.longest,
                block_table_tensor=step.block_table,
                slot_mapping=step.slots,
                causal=True,
            ),
        )
