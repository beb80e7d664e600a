"""vLLM's V1 model runner: the proposer that it loads as `custom_class`, and what it needs of the runner
(v1/worker/gpu_model_runner.py)."""

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_mtp import compat, compiled, gated_lora, load
from vllm_mtp.adapter import Adapter, AdapterError, check_base, fingerprint_tensors, read_adapter
from vllm_mtp.config import ServingOptions
from vllm_mtp.cpu_linear import PackedLinear, PackedSampler
from vllm_mtp.cpu_memory import keep_freed_memory
from vllm_mtp.drafter import Drafter, Sampler
from vllm_mtp.expansion import EngineStep, Expansion
from vllm_mtp.layout import group_lengths
from vllm_mtp.mask_attention import ForkedSequences, StepSequences, blocks_per_fork

logger = init_logger("vllm.mtp")


class MaskTokenProposer:
    """Drafts from the mask rows of the target's own forward.

    vLLM constructs it with its configuration, calls `load_model` with the loaded target and `propose` after every step's sampling.

    Raises:
        ValueError: the server is set up in a way that mask rows do not support.
    """

    is_mask_token_proposer = True
    expansion: Expansion
    drafter: Drafter

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = vllm_config
        self.options = ServingOptions.model_validate(cast(dict[str, Any], vllm_config.additional_config)["mtp"])
        self.k = self.options.num_speculative_tokens
        if current_platform.is_cpu():
            keep_freed_memory()
        self.max_model_len = vllm_config.model_config.max_model_len
        if not current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
            raise ValueError("mask-token prediction does not run under CUDA graphs yet: add --enforce-eager")
        compat.hook_runner()

    # -- start-up ------------------------------------------------------------------------------------------------

    def load_model(self, target: torch.nn.Module) -> None:
        """Reads the adapter and installs mask rows in `target`; vLLM compiles and profiles it afterwards."""
        from vllm.model_executor.layers.attention import Attention

        adapter = read_adapter(self.options.adapter)
        check_base(adapter.config, self.config.model_config.hf_text_config, fingerprint_tensors(target.named_parameters()))
        dtype, device = cast(torch.dtype, self.config.model_config.dtype), next(target.parameters()).device
        max_rows = self.config.scheduler_config.max_num_batched_tokens
        rows = gated_lora.RowSplit(max_rows, device, dtype)
        linear = PackedLinear if current_platform.is_cpu() else gated_lora.plain_product
        try:
            gated_lora.install(target, dict(adapter.lora), rows, linear)
        except ValueError as error:
            raise AdapterError(f"{self.options.adapter}: {error}") from None
        self.attention = ForkedSequences(self._attention_metadata)
        for module in target.modules():
            if isinstance(module, Attention):
                self.attention.wrap(module.impl)
        self.expansion = Expansion(
            target=target,
            mask_embeddings=adapter.mask_embeddings[: self.k].to(device, dtype),
            rows=rows,
            max_rows=max_rows,
            max_model_len=self.max_model_len,
            next_step=self._next_step,
            warming_up=self._warming_up,
            compile=compiled.compiler(self.config),
        )
        self.drafter = self._drafter(target, adapter, dtype, device)
        layout = self.options.layout
        self.fixed_lengths = None if layout == "auto" else group_lengths(layout, self.k)
        self.chooser = load.LayoutChooser(self.k, max_rows)
        self.last_step: tuple[float, tuple[str, ...]] = (0.0, ())
        self.runner: Any = None

    def _drafter(self, target: Any, adapter: Adapter, dtype: torch.dtype, device: torch.device) -> Drafter:
        vocab_size = self.config.model_config.get_vocab_size()
        lm_head = getattr(target, "lm_head", None)
        weight = getattr(lm_head, "weight", None)
        readable = (
            weight is not None and weight.ndim == 2 and weight.shape[0] >= vocab_size and getattr(lm_head, "bias", None) is None
        )
        sampler: Sampler | None = adapter.sampler
        if adapter.sampler is not None:
            head = adapter.sampler.to(device, dtype)
            sampler = PackedSampler(head) if current_platform.is_cpu() else head
        return Drafter(
            target.compute_logits,
            target.embed_input_ids,
            weight if readable else None,
            sampler,
            self.options.candidates,
            vocab_size,
        )

    def _compiled_drafter(self) -> Callable[..., torch.Tensor]:
        """The drafter, compiled where the engine compiles."""
        compile = compiled.compiler(self.config)
        if compile is None:
            return self.drafter
        draft = compile(self.drafter.__call__)
        embeddings = self.expansion.mask_embeddings
        hidden, rows = (
            embeddings.new_zeros(7, embeddings.shape[1]),
            torch.zeros(3, self.k, dtype=torch.long, device=embeddings.device),
        )
        sampled = rows[:, 0].clone()
        for tensor in (hidden, rows, sampled):
            torch._dynamo.mark_dynamic(tensor, 0)
        draft(hidden, rows, sampled)
        return draft

    @property
    def num_scratch_blocks(self) -> int:
        """Scratch blocks for the forks of the largest step: a group behind every row of every request."""
        groups = min(self.config.scheduler_config.max_num_seqs * (self.k + 1), self.config.scheduler_config.max_num_batched_tokens)
        return groups * blocks_per_fork(self.k, self.config.cache_config.block_size)

    def without_scratch_memory(self, available: int, runner: Any) -> int:
        """What is left of `available` bytes for the scheduler's blocks once the scratch blocks have theirs."""
        scratch = self.num_scratch_blocks * sum(spec.page_size_bytes for spec in runner.get_kv_cache_spec().values())
        if scratch >= available:
            raise ValueError(
                f"the mask rows of {self.config.scheduler_config.max_num_seqs} requests need {scratch / 2**30:.2f} GiB of "
                f"scratch KV blocks, but only {available / 2**30:.2f} GiB are there: lower --max-num-seqs or --block-size, or "
                "raise the memory for the KV cache"
            )
        return available - scratch

    def with_scratch_blocks(self, kv_cache_config: Any) -> Any:
        """A copy of the worker's cache configuration that has our blocks behind those which the scheduler hands out."""
        config, num_scratch = copy.deepcopy(kv_cache_config), self.num_scratch_blocks
        if len(config.kv_cache_groups) != 1:
            raise ValueError("mask-token prediction does not support models with several KV cache groups (hybrid attention) yet")
        for tensor in config.kv_cache_tensors:
            if tensor.offset != 0 or tensor.layer_stride != tensor.block_stride * config.num_blocks:
                raise ValueError(
                    "mask-token prediction needs a KV cache whose layers lie one after the other; this layout is not supported yet"
                )
            # Both, or layer l's scratch blocks would be the first blocks of layer l + 1.
            tensor.size += num_scratch * tensor.block_stride * len(tensor.layers)
            tensor.layer_stride += num_scratch * tensor.block_stride
        self.first_scratch_block = config.num_blocks
        config.num_blocks += num_scratch
        return config

    def bind(self, runner: Any) -> None:
        """Takes the runner once its KV cache stands."""
        self.runner = runner
        group = runner.attn_groups[0][0]
        if len(runner.attn_groups) != 1 or len(runner.attn_groups[0]) != 1:
            raise ValueError("mask-token prediction does not support models with several attention backends yet")
        self.builder = group.get_metadata_builder()
        self.attention.bind([runner.compilation_config.static_forward_context[name].kv_cache for name in group.layer_names])
        self.expansion.block_size = runner.cache_config.block_size
        self.expansion.scratch = self.first_scratch_block
        self.expansion.attention = self.attention
        self.draft = self._compiled_drafter()
        # We cut drafts at the model's end request by request; without this the runner drafts for no one once one request is
        # near it.
        runner.effective_drafter_max_model_len = self.max_model_len + self.k
        scratch_bytes = self.num_scratch_blocks * sum(spec.page_size_bytes for spec in runner.get_kv_cache_spec().values())
        logger.info(
            "Mask-token prediction is on: adapter %s, k = %d, layout %s, acceptance lossless, "
            "up to %d mask rows a decoding request, %d scratch blocks (%.0f MiB)",
            self.options.adapter,
            self.k,
            self.options.layout,
            self.k * (self.k + 1) if self.options.layout in ("quadratic", "auto") else sum(self._lengths(1)),
            self.num_scratch_blocks,
            scratch_bytes / 2**20,
        )

    # -- a step --------------------------------------------------------------------------------------------------

    def _lengths(self, num_requests: int) -> tuple[int, ...]:
        return self.fixed_lengths or self.chooser.choose(num_requests)

    def _warming_up(self) -> bool:
        from vllm.forward_context import get_forward_context

        return self.runner is None or not get_forward_context().attn_metadata

    def _next_step(self, num_rows: int) -> EngineStep | None:
        """The step whose forward is about to run, from the runner's batch (v1/worker/gpu_input_batch.py)."""
        batch = self.runner.input_batch
        num_requests = batch.num_reqs
        lengths = self._lengths(num_requests)
        if not any(lengths):
            return None
        rows = np.diff(self.runner.query_start_loc.np[: num_requests + 1])
        request_len = batch.num_computed_tokens_cpu[:num_requests] + rows
        known = batch.num_tokens_no_spec[:num_requests]
        # A row past the known tokens is a draft; a chunk that stops short of them ends nothing, however many rows it has.
        drafts = np.maximum(request_len - known, -1)
        self.max_lens = [self._max_len(request) for request in batch.req_ids]
        drafts[known + 1 >= self.max_lens] = -1  # the token sampled next is the last one
        table = batch.block_table[0].get_device_tensor(num_requests)
        lens = torch.from_numpy(request_len.astype(np.int64)).to(table.device)
        return EngineStep(tuple(rows.tolist()), tuple(drafts.tolist()), lens, table, lengths)

    def _max_len(self, request: str) -> int:
        """Tokens at which `request` stops at the latest."""
        state = self.runner.requests[request]
        limit = state.sampling_params.max_tokens if state.sampling_params is not None else None
        return self.max_model_len if limit is None else min(self.max_model_len, state.num_prompt_tokens + limit)

    def _attention_metadata(self, step: StepSequences) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        rows = step.query_start
        return self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=rows,
                query_start_loc_cpu=rows.cpu(),
                seq_lens=step.seq_lens,
                num_reqs=step.seq_lens.shape[0],
                num_actual_tokens=int(rows[-1]),
                max_query_len=step.longest_query,
                max_seq_len=int(step.seq_lens.max()),
                block_table_tensor=step.block_table,
                slot_mapping=step.slots,
                causal=True,
            ),
        )

    def _observe(self, now: float, sampled_token_ids: list[list[int]]) -> None:
        """Tells the chooser of layouts what the step gave, if it and the step before it decoded for the same requests."""
        before, requests = self.last_step
        running = tuple(self.runner.input_batch.req_ids)
        self.last_step = now, running if all(sampled_token_ids) else ()
        if running == requests:
            self.chooser.observe(sum(map(len, sampled_token_ids)), now - before)

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Drafts of each request for the next step, none where there is no group to draft from.

        Args:
            sampled_token_ids: what each request's rows gave this step, accepted drafts and one token more; empty for prompt chunks.
        """
        begin = time.perf_counter()
        if self.fixed_lengths is None:
            self._observe(begin, sampled_token_ids)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        states = self.expansion.last
        if states is None:
            return drafts
        groups, hidden = states.groups, states.hidden
        chosen = []  # (request, group, drafts it can use)
        for i, tokens in enumerate(sampled_token_ids):
            group = groups.after[i][len(tokens) - 1] if tokens else -1
            usable = min(groups.lengths[group], self.max_lens[i] - int(num_tokens_no_spec[i])) if group >= 0 else 0
            if usable > 0:
                chosen.append((i, group, usable))
        if not chosen:
            return drafts
        last = groups.num_rows - 1
        rows = torch.tensor(
            [[min(groups.starts[group] + m, last) for m in range(self.k)] for _, group, _ in chosen], device=hidden.device
        )
        sampled = torch.tensor([sampled_token_ids[i][-1] for i, _, _ in chosen], device=hidden.device)
        drafting = time.perf_counter()
        ids = self.draft(hidden, rows, sampled).tolist()
        drafted = time.perf_counter()
        for (i, _, usable), row in zip(chosen, ids, strict=True):
            drafts[i] = row[:usable]
        counters = self.expansion.counters
        counters.drafter_time += drafted - drafting
        counters.draft_time += drafting - begin + time.perf_counter() - drafted
        return drafts
