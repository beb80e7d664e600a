"""Every name of vLLM (relative to its package) that this package relies on, and what it expects of it.

The same list is checked against the vLLM that is installed, at start-up and without importing anything of it, and against the
source of any release (`python -m tests.compat contract`). What is replaced, and why, says `vllm_mtp.compat`.
"""

from collections.abc import Iterable, Iterator

from vllm_mtp.requirements import Called, CallsUs, EitherOf, Has, Imported, Mentions, Replaced, Requirement, Subclassed, Takes
from vllm_mtp.vllm_source import SourceTree

ARG_UTILS, V1, V2 = "engine.arg_utils", "v1.worker.gpu_model_runner", "v1.worker.gpu.model_runner"

REGISTRATION: tuple[Requirement, ...] = (
    Replaced(ARG_UTILS, "EngineArgs.create_speculative_config", "self, target_model_config, target_parallel_config"),
    Has(ARG_UTILS, "EngineArgs", "speculative_config spec_method spec_model spec_tokens additional_config enable_lora"),
    Has(ARG_UTILS, "EngineArgs", "max_num_scheduled_tokens max_num_seqs max_num_batched_tokens enable_chunked_prefill"),
    Has(ARG_UTILS, "EngineArgs", "disable_hybrid_kv_cache_manager"),
    Has("config", "ModelConfig", "model is_moe runner_type is_multimodal_model is_hybrid is_attention_free"),
    Has("config", "ParallelConfig", "pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size"),
    Has("config", "ParallelConfig", "data_parallel_size use_ubatching"),
    Has("config", "SpeculativeConfig", "method model num_speculative_tokens draft_sample_method"),
    Mentions("config.speculative", "custom_class"),
    Imported("", "envs __version__"),
    Imported("envs", "VLLM_USE_V2_MODEL_RUNNER"),
    Imported("triton_utils", "HAS_TRITON"),
    Imported("platforms", "current_platform"),
    Called("platforms.interface", "Platform.is_cpu", "self"),
    # Options of requests.
    Imported("sampling_params", "SamplingParams"),
    Has("sampling_params", "SamplingParams", "extra_args logprob_token_ids"),
    Replaced("sampling_params", "SamplingParams._validate_spec_decode", "self, *args, **kwargs"),
    Imported("exceptions", "VLLMValidationError"),
)
"""What turns an operator's options into ours."""

SERVED_MODEL: tuple[Requirement, ...] = (
    Has("config", "VllmConfig", "additional_config speculative_config model_config scheduler_config cache_config"),
    Has("config", "VllmConfig", "compilation_config"),
    Called("config", "ModelConfig.get_vocab_size", "self"),
    Has("config", "ModelConfig", "max_model_len hf_text_config dtype enforce_eager served_model_name"),
    Has("config", "VllmConfig", "parallel_config"),
    Has("config", "ParallelConfig", "data_parallel_index"),
    Has("config", "SchedulerConfig", "max_num_seqs max_num_batched_tokens"),
    Has("config", "CacheConfig", "block_size"),
    Has("config", "CompilationConfig", "mode inductor_compile_config static_forward_context max_cudagraph_capture_size"),
    Has("config", "CompilationMode", "NONE"),
    Called("logger", "init_logger", "name"),
    Called("forward_context", "get_forward_context", ""),
    Has("forward_context", "ForwardContext", "attn_metadata"),
    Has("config", "VllmConfig", "device_config kv_transfer_config"),
    Has("config", "DeviceConfig", "device_type"),
    Called("config", "VllmConfig.compute_hash", "self"),
    Imported("envs", "VLLM_CACHE_ROOT"),
    # The target's layers.
    Imported("model_executor.layers.attention", "Attention"),
    Called("model_executor.layers.attention", "Attention.get_attn_backend", "self"),
    Has("model_executor.layers.attention", "Attention", "impl kv_cache"),
    Has("v1.attention.backend", "AttentionBackend", "forward_includes_kv_cache_update get_name"),
    CallsUs(
        "model_executor.layers.attention.attention",
        "unified_attention_with_output",
        "forward",
        "self query key value kv_cache attn_metadata",
        "output",
    ),
    CallsUs(
        "model_executor.layers.attention.attention",
        "unified_kv_cache_update",
        "do_kv_cache_update",
        "attn_layer key value kv_cache layer_slot_mapping",
    ),
    Imported("model_executor.layers.linear", "LinearBase"),
    Has("model_executor.layers.linear", "LinearBase", "quant_method input_size output_size params_dtype"),
    Has("model_executor.layers.linear", "ReplicatedLinear", "output_partition_sizes"),
    Has("model_executor.layers.linear", "ColumnParallelLinear", "output_partition_sizes input_size_per_partition tp_rank"),
    Has("model_executor.layers.linear", "RowParallelLinear", "input_size_per_partition output_partition_sizes tp_rank"),
    Has("model_executor.layers.linear", "MergedColumnParallelLinear", "output_sizes"),
    Has("model_executor.layers.linear", "QKVParallelLinear", "output_sizes num_kv_head_replicas"),
    Replaced("model_executor.layers.linear", "LinearMethodBase.apply", "self, layer, x, bias"),
    Has("model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding", "shard_indices tp_size"),
    Has("model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices", "org_vocab_start_index"),
    Has("model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices", "org_vocab_end_index"),
    # The target, of which Llama is one.
    Replaced(
        "model_executor.models.llama",
        "LlamaForCausalLM.forward",
        "self, input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs",
    ),
    Called("model_executor.models.llama", "LlamaForCausalLM.embed_input_ids", "self, input_ids"),
    Called("model_executor.models.llama", "LlamaForCausalLM.compute_logits", "self, hidden_states"),
    Has("model_executor.models.llama", "LlamaForCausalLM", "packed_modules_mapping lm_head"),
    # Ranks.
    Called("distributed", "tensor_model_parallel_all_reduce", "input_"),
    Called("distributed", "get_tp_group", ""),
    Has("distributed.parallel_state", "GroupCoordinator", "world_size cpu_group rank_in_group"),
    # The KV cache.
    Has("v1.kv_cache_interface", "KVCacheConfig", "num_blocks kv_cache_tensors kv_cache_groups"),
    EitherOf(
        (
            Has("v1.kv_cache_interface", "KVCacheTensor", "size layers layer_stride block_stride offset"),
            Has("v1.kv_cache_interface", "KVCacheTensor", "size shared_by block_stride offset"),
        )
    ),
    Has("v1.kv_cache_interface", "KVCacheSpec", "page_size_bytes"),
    Has("v1.worker.utils", "AttentionGroup", "layer_names"),
    Called("v1.worker.utils", "AttentionGroup.create_metadata_builders", "self, vllm_config, device"),
    Called("v1.worker.utils", "AttentionGroup.get_metadata_builder", "self"),
    Called("v1.attention.backend", "AttentionMetadataBuilder.build", "self, common_prefix_len, common_attn_metadata"),
    Called(
        "v1.attention.backend",
        "CommonAttentionMetadata",
        "*, query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_actual_tokens, max_query_len, max_seq_len, "
        "block_table_tensor, slot_mapping, causal",
    ),
)
"""What mask rows need of a served model, on both runners."""

ON_CPUS: tuple[Requirement, ...] = (
    Replaced("v1.worker.cpu_worker", "CPUWorker.determine_available_memory", "self"),
    Has("v1.worker.cpu_worker", "CPUWorker", "model_runner"),
    Imported("model_executor.layers", "utils"),
    Replaced("model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "layer, remove_weight"),
    Called("config", "get_current_vllm_config_or_none", ""),
    Mentions("model_executor.layers.utils", "cpu_linear"),
    # Attention of mask rows beside that of real rows, and in our graph in the place of both of vLLM's operations.
    Imported("v1.attention.backend", "AttentionType"),
    Has("v1.attention.backend", "AttentionType", "DECODER"),
    Called("v1.attention.backends.cpu_attn", "_get_attn_isa", "dtype, block_size, head_size, kv_cache_dtype"),
    Imported("v1.attention.backends.cpu_attn", "_get_attn_isa"),
    Has("v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl", "attn_type alibi_slopes sinks head_size kv_cache_dtype scale"),
    Has("v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl", "sliding_window logits_soft_cap"),
    Has("v1.attention.backends.cpu_attn", "CPUAttentionMetadata", "query_start_loc seq_lens max_query_len causal block_table"),
    Called(
        "v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.forward",
        "self, layer, query, key, value, kv_cache, attn_metadata, output",
    ),
    Called(
        "v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        "self, layer, key, value, kv_cache, slot_mapping",
    ),
    Replaced("model_executor.layers.attention", "Attention.forward", "self, query, key, value, *args, **kwargs"),
    Has("model_executor.layers.attention", "Attention", "layer_name head_size head_size_v num_heads num_kv_heads"),
    Has("model_executor.layers.attention", "Attention", "kv_sharing_target_layer_name"),
    Has("forward_context", "ForwardContext", "slot_mapping"),
)

ON_GPUS: tuple[Requirement, ...] = (
    Replaced("v1.worker.gpu_worker", "Worker.determine_available_memory", "self"),
    Has("v1.worker.gpu_worker", "Worker", "model_runner"),
    Called("platforms.interface", "Platform.is_cuda", "self"),
    Called("platforms.interface", "Platform.is_rocm", "self"),
    # Attention of mask rows beside that of real rows.
    Imported("v1.attention.backend", "AttentionType"),
    Has("v1.attention.backend", "AttentionType", "DECODER"),
    Has("model_executor.layers.attention", "Attention", "num_heads num_kv_heads head_size head_size_v sliding_window"),
    Has("model_executor.layers.attention", "Attention", "kv_sharing_target_layer_name kv_cache_dtype kv_cache_torch_dtype"),
    Has("v1.attention.backends.flash_attn", "FlashAttentionImpl", "attn_type alibi_slopes scale logits_soft_cap sinks"),
    Has("v1.attention.backends.triton_attn", "TritonAttentionImpl", "attn_type alibi_slopes scale logits_soft_cap sinks"),
    # Linear layers in one launch with their LoRA.
    Imported("model_executor.layers.linear", "UnquantizedLinearMethod"),
    Imported("envs", "VLLM_BATCH_INVARIANT"),
)

V1_RUNNER: tuple[Requirement, ...] = (
    Imported("v1.spec_decode.custom_class_proposer", "create_custom_proposer"),
    Imported(V1, "GPUModelRunner"),
    Replaced(V1, "GPUModelRunner.initialize_kv_cache", "self, kv_cache_config, *args, **kwargs"),
    Replaced(V1, "GPUModelRunner._prepare_inputs", "self, scheduler_output, *args, **kwargs"),
    CallsUs(V1, "GPUModelRunner.load_model", "load_model", "model"),
    CallsUs(
        V1,
        "GPUModelRunner.propose_draft_token_ids",
        "propose",
        "sampled_token_ids num_tokens_no_spec token_ids_cpu",
        "slot_mappings",
    ),
    Has(V1, "GPUModelRunner", "drafter speculative_config input_batch query_start_loc requests attn_groups get_kv_cache_spec"),
    Has(V1, "GPUModelRunner", "effective_drafter_max_model_len"),
    Has("v1.core.sched.output", "SchedulerOutput", "scheduled_spec_decode_tokens"),
    Has("v1.worker.gpu_input_batch", "InputBatch", "num_reqs req_ids num_computed_tokens_cpu num_tokens_no_spec block_table"),
    Has("v1.worker.gpu_input_batch", "InputBatch", "sampling_metadata"),
    Has("v1.worker.gpu_input_batch", "CachedRequestState", "sampling_params num_prompt_tokens"),
    Has("v1.worker.block_table", "MultiGroupBlockTable", "__getitem__"),
    Called("v1.worker.block_table", "BlockTable.get_device_tensor", "self, num_reqs"),
    Has("v1.sample.metadata", "SamplingMetadata", "all_greedy"),
    Has("v1.utils", "CpuGpuBuffer", "np"),
    Has("v1.worker.gpu_input_batch", "InputBatch", "spec_token_ids"),
    Has("sampling_params", "SamplingParams", "max_tokens"),
)

VERIFICATION: tuple[Requirement, ...] = (
    Imported("v1.sample", "rejection_sampler"),
    Has(V1, "GPUModelRunner", "rejection_sampler"),
    Replaced("v1.sample.rejection_sampler", "RejectionSampler.forward", "self, metadata, draft_probs, logits, sampling_metadata"),
)

V1_RUNNER_ON_CPUS: tuple[Requirement, ...] = (
    CallsUs("v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "load_model", "model"),
    *VERIFICATION,
    Replaced("v1.sample.rejection_sampler", "expand_batch_to_tokens", "x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0"),
    # Verification of greedy steps.
    Has("v1.sample.rejection_sampler", "RejectionSampler", "synthetic_mode"),
    Has("v1.spec_decode.metadata", "SpecDecodeMetadata", "draft_token_ids num_draft_tokens"),
    Has("v1.sample.metadata", "SamplingMetadata", "max_num_logprobs no_penalties allowed_token_ids_mask bad_words_token_ids"),
    Has("v1.sample.metadata", "SamplingMetadata", "logitsprocs logprob_token_ids thinking_budget_state_holder"),
    Has("v1.sample.thinking_budget_state", "ThinkingBudgetStateHolder", "has_tracked_requests"),
    Has("v1.sample.logits_processor", "LogitsProcessors", "non_argmax_invariant"),
    Imported("v1.sample.logits_processor", "LogitBiasLogitsProcessor MinTokensLogitsProcessor"),
    Has("v1.sample.logits_processor", "LogitBiasLogitsProcessor", "biases"),
    Has("v1.sample.logits_processor", "MinTokensLogitsProcessor", "min_toks"),
    Imported("v1.outputs", "SamplerOutput"),
    Called("v1.outputs", "SamplerOutput", "*, sampled_token_ids, logprobs_tensors"),
)

V1_CONFIDENCE: tuple[Requirement, ...] = (
    *VERIFICATION,
    Replaced(
        "v1.sample.rejection_sampler",
        "rejection_sample",
        "draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits, *args, **kwargs",
    ),
    Has("v1.spec_decode.metadata", "SpecDecodeMetadata", "draft_token_ids num_draft_tokens target_logits_indices"),
)

V1_PROBABILISTIC_DRAFTS: tuple[Requirement, ...] = (
    Has(V1, "GPUModelRunner", "_draft_probs _draft_prob_req_ids"),
    Has("v1.sample.metadata", "SamplingMetadata", "temperature"),
    Has("sampling_params", "SamplingParams", "seed"),
)

V2_RUNNER: tuple[Requirement, ...] = (
    Imported("config", "SpeculativeConfig CUDAGraphMode"),
    Imported("v1.worker.gpu", "model_runner"),
    Mentions("config.speculative", "mtp"),
    Replaced("config", "SpeculativeConfig.use_eagle", "self"),
    Has("config", "SpeculativeConfig", "num_speculative_tokens_per_batch_size"),
    Has("config", "CompilationConfig", "cudagraph_mode"),
    Called("config", "CUDAGraphMode.mixed_mode", "self"),
    Has("config", "CUDAGraphMode", "FULL"),
    Replaced(V2, "init_speculator", "vllm_config, device, *args"),
    Replaced(V2, "GPUModelRunner.load_model", "self, *args, **kwargs"),
    Replaced(V2, "GPUModelRunner.initialize_kv_cache", "self, kv_cache_config, *args, **kwargs"),
    Has(V2, "GPUModelRunner", "speculator model req_states model_state sampler attn_groups get_kv_cache_spec"),
    Imported("v1.worker.gpu.spec_decode.speculator", "BaseSpeculator"),
    Subclassed(
        "v1.worker.gpu.spec_decode.speculator",
        "BaseSpeculator",
        "init_cudagraph_manager capture propose",
        reader=(V2, "GPUModelRunner"),
        as_="speculator",
        # What follows load_model is read of speculators of other kinds: with a draft model, or where the feature is asked for.
        read="supports_mm_inputs draft_logits load_model model set_attn draft_attn_layer_names draft_token_confidence_probs "
        "observe_verification pcp_manager prepare_watermarking dcp_size",
    ),
    Replaced(
        "v1.worker.gpu.spec_decode.speculator",
        "BaseSpeculator.propose",
        "self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, num_rejected, "
        "last_sampled, next_prefill_tokens, temperature, seeds, *args, dummy_run=False, **kwargs",
    ),
    Imported("v1.worker.gpu.model_states.interface", "ModelState"),
    Replaced(
        "v1.worker.gpu.model_states.interface",
        "ModelState.prepare_attn",
        "self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture=False, **kwargs",
    ),
    Imported("v1.core.sched.output", "NewRequestData"),
    Has("v1.core.sched.output", "NewRequestData", "sampling_params"),
    Imported("v1.worker.gpu.input_batch", "InputBatch"),
    Has("v1.worker.gpu.input_batch", "InputBatch", "req_ids num_reqs num_reqs_after_padding num_tokens_after_padding"),
    Has("v1.worker.gpu.input_batch", "InputBatch", "idx_mapping idx_mapping_np num_scheduled_tokens num_draft_tokens_per_req"),
    Has("v1.worker.gpu.input_batch", "InputBatch", "num_draft_tokens cu_num_logits"),
    Has("v1.worker.gpu.input_batch", "InputBatch", "seq_lens seq_lens_cpu_upper_bound is_prefilling_np"),
    Has("v1.worker.gpu.states", "RequestState", "req_id_to_index num_computed_prefill_tokens prefill_len"),
    Has("v1.worker.gpu.sample.sampler", "Sampler", "sampling_states"),
    Has("v1.worker.gpu.sample.states", "SamplingStates", "temperature"),
    Has("v1.worker.gpu.buffer_utils", "UvaBackedTensor", "np"),
)

V2_PROBABILISTIC_DRAFTS: tuple[Requirement, ...] = (
    # A sign that the logits of drafts are taken as they were before temperature; earlier they were divided by it.
    Takes("v1.worker.gpu.spec_decode.rejection_sampler_utils", "_compute_global_logprobs_and_logsumexp", "temp"),
)

V2_CONFIDENCE: tuple[Requirement, ...] = (
    Imported("v1.worker.gpu.spec_decode", "rejection_sampler"),
    Replaced(
        "v1.worker.gpu.spec_decode.rejection_sampler",
        "rejection_sample",
        "target_logits, draft_logits, draft_sampled, cu_num_logits, pos, idx_mapping, expanded_idx_mapping, expanded_local_pos, "
        "*args, **kwargs",
    ),
    Replaced(V2, "GPUModelRunner.sample", "self, *args, **kwargs"),
    Replaced("v1.worker.gpu.model_states.interface", "ModelState.add_request", "self, req_index, new_req_data"),
)

REQUEST_LORAS: tuple[Requirement, ...] = (
    Mentions("lora.model_manager", "lora_manager"),
    Imported("lora.layers", "LogitsProcessorWithLoRA VocabParallelEmbeddingWithLoRA"),
    Has("lora.layers", "LogitsProcessorWithLoRA", "base_layer forward"),
    Has("lora.layers", "VocabParallelEmbeddingWithLoRA", "base_layer forward"),
    Has("lora.model_manager", "LoRAModelManager", "_last_mapping"),
    Called("lora.model_manager", "LoRAModelManager.set_adapter_mapping", "self, mapping"),
    Has("lora.layers", "LoRAMapping", "index_mapping"),
)

WINDOWS_BESIDE_FULL_ATTENTION: tuple[Requirement, ...] = (
    # One KV cache group then holds both kinds of layers, and the metadata that they share must not assume a window.
    Has("v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder", "_group_sliding_window"),
)

COMMANDS: tuple[Requirement, ...] = (
    Imported("", "LLM SamplingParams"),
    Imported("sampling_params", "RequestOutputKind"),
    Imported("utils.torch_utils", "kv_cache_dtype_str_to_dtype"),
    Imported("v1.kv_cache_interface", "FullAttentionSpec"),
)
"""What `vllm-mtp` and training on a served model call; not needed to serve."""

GROUPS: dict[str, tuple[Requirement, ...]] = {
    "registration": REGISTRATION,
    "served model": SERVED_MODEL,
    "served model on CPUs": ON_CPUS,
    "served model on GPUs": ON_GPUS,
    "V1 runner": V1_RUNNER,
    "V1 runner on CPUs": V1_RUNNER_ON_CPUS,
    "probabilistic drafts on the V1 runner": V1_PROBABILISTIC_DRAFTS,
    "acceptance by confidence on the V1 runner": V1_CONFIDENCE,
    "V2 runner": V2_RUNNER,
    "probabilistic drafts on the V2 runner": V2_PROBABILISTIC_DRAFTS,
    "acceptance by confidence on the V2 runner": V2_CONFIDENCE,
    "request LoRA adapters": REQUEST_LORAS,
    "sliding windows beside full attention on CPUs": WINDOWS_BESIDE_FULL_ATTENTION,
    "commands": COMMANDS,
}

OPTIONS = {
    "probabilistic drafts on the V1 runner": '"draft_sample_method": "probabilistic"',
    "acceptance by confidence on the V1 runner": '"acceptance": "confidence"',
    "probabilistic drafts on the V2 runner": '"draft_sample_method": "probabilistic"',
    "acceptance by confidence on the V2 runner": '"acceptance": "confidence"',
    "request LoRA adapters": "--enable-lora",
    "sliding windows beside full attention on CPUs": "--speculative-config for a model with sliding-window and full attention",
}
"""Groups that only an option needs, and the option, which is refused where they are not met."""


def violations(vllm: SourceTree, requirements: Iterable[Requirement]) -> list[str]:
    """What of `requirements` a vLLM does not meet, a sentence each."""
    return [sentence for requirement in requirements for sentence in requirement.violations(vllm)]


def needed(*, on_v2: bool, on_cpu: bool) -> Iterator[Requirement]:
    """What a server relies on, whatever its options.

    Args:
        on_v2: whether vLLM will take its V2 model runner.
        on_cpu: whether it runs on a CPU.
    """
    yield from REGISTRATION
    yield from SERVED_MODEL
    yield from ON_CPUS if on_cpu else ON_GPUS
    yield from V2_RUNNER if on_v2 else V1_RUNNER
    if on_cpu and not on_v2:
        yield from V1_RUNNER_ON_CPUS


def options(*, on_v2: bool, probabilistic: bool, by_confidence: bool, request_loras: bool, windows: bool = False) -> Iterator[str]:
    """Which of `OPTIONS` a server relies on.

    Args:
        on_v2: whether vLLM will take its V2 model runner.
        probabilistic: whether drafts are drawn.
        by_confidence: whether drafts may be accepted by confidence.
        request_loras: whether requests may name LoRA adapters.
        windows: whether it runs on a CPU, and some layers of the model have a sliding window and others full attention.
    """
    runner = "V2" if on_v2 else "V1"
    if probabilistic:
        yield f"probabilistic drafts on the {runner} runner"
    if by_confidence:
        yield f"acceptance by confidence on the {runner} runner"
    if request_loras:
        yield "request LoRA adapters"
    if windows:
        yield "sliding windows beside full attention on CPUs"


def of_hook(module: str, name: str) -> Replaced:
    """What is expected of a name that is to be replaced; `name` is that in its `module`.

    Raises:
        LookupError: it is not listed here.
    """
    for requirement in (requirement for group in GROUPS.values() for requirement in group):
        if isinstance(requirement, Replaced) and (requirement.module, requirement.name) == (module, name):
            return requirement
    raise LookupError(f"{module}.{name} is replaced, but vllm_mtp.contract does not say what is expected of it")
