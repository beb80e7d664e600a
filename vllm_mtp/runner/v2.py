"""vLLM's V2 model runner: the speculator that stands in its place, and the plan that is made where it prepares attention
(v1/worker/gpu/model_runner.py).

The host never waits for the device here. What it knows when it prepares a step (rows, drafts and prompt progress of each request)
fixes every shape; lengths and block tables, which it may not know yet under asynchronous scheduling, are read where they lie.
A decode step that vLLM replays as a CUDA graph is planned into the tensors that the capture read.
"""

from functools import cache
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_mtp import compat, load, verifier
from vllm_mtp.confidence import NONE, DraftedRequests
from vllm_mtp.config import RequestOptions
from vllm_mtp.device_counters import CountersOnDevice
from vllm_mtp.layout import Groups, shapes_of
from vllm_mtp.plan import EngineStep, PlannedStep
from vllm_mtp.roofline import Roofline
from vllm_mtp.target import MaskTokenTarget


class MaskTokenSpeculator(MaskTokenTarget, BaseSpeculator):
    """Drafts from the mask rows of the target's own forward.

    Args:
        vllm_config: vLLM's configuration.
        device: of the runner.

    Raises:
        ValueError: the server is set up in a way that mask rows do not support.
    """

    supports_mm_inputs = False
    draft_logits: torch.Tensor | None = None
    """What the drafts of each request state were drawn from, before temperature, [max_num_seqs, k, V] in float32, if drafts are
    probabilistic: 330 MB for 64 requests, k = 8 and 160,000 tokens. The rejection sampler reads it
    (v1/worker/gpu/spec_decode/rejection_sampler.py, 0.32; releases before held logits that were divided by the temperature)."""

    drafted: DraftedRequests | None = None
    """What is known of the drafts that are verified next, in acceptance by confidence."""
    counters: CountersOnDevice

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config)
        if getattr(vllm_config, "watermark_config", None) is not None:  # vLLM 0.26 has none
            raise ValueError("mask-token prediction does not support watermarking: leave the watermark configuration out")
        if vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
            raise ValueError(
                "mask-token prediction runs prompt steps outside of CUDA graphs: set cudagraph_mode to FULL_AND_PIECEWISE or "
                "FULL_DECODE_ONLY in --compilation-config"
            )
        self.model = (
            torch.nn.Module()
        )  # a draft model's modules are prepared for communication, in vLLM 0.26 whether there is one or not
        roofline = Roofline.of(vllm_config.model_config.hf_text_config)

        @cache
        def layout_of(num_requests: int) -> tuple[int, ...]:
            return load.best_comb(self.layouts, num_requests, self.max_rows, self.max_mask_rows, roofline)

        self.layout_of = layout_of
        self.drafts = torch.zeros(self.max_requests, self.k, dtype=torch.int64, device=device)
        self.planned: PlannedStep | None = None

    def load_model(self, runner: Any) -> None:
        """Installs mask rows in the loaded model, and the plan of a step behind vLLM's own preparation of its attention.

        Args:
            runner: vLLM's model runner, with its model, model state and request states (v1/worker/gpu/states.py).
        """
        self.install(runner.model, lambda: self.planned, keep_states=True)
        self.req_states = runner.req_states
        self.counters = self.planner.counters = CountersOnDevice(self.k, self.drafts.device)
        if self.probabilistic:
            vocab_size = self.config.model_config.get_vocab_size()
            self.draft_logits = torch.full(
                (self.max_requests, self.k, vocab_size), -torch.inf, dtype=torch.float32, device=self.drafts.device
            )
            self.candidates = self.drafts.new_zeros(self.max_requests, self.k, self.drafter.candidates or vocab_size)
        state: ModelState = runner.model_state
        prepare_attn = state.prepare_attn

        def prepare_and_plan(
            input_batch: InputBatch,
            cudagraph_mode: CUDAGraphMode,
            block_tables: tuple[torch.Tensor, ...],
            slot_mappings: torch.Tensor,
            attn_groups: Any,
            kv_cache_config: Any,
            for_capture: bool = False,
            **kwargs: Any,
        ) -> dict[str, Any]:
            metadata = prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture, **kwargs
            )
            replayed = cudagraph_mode == CUDAGraphMode.FULL or for_capture
            self.planned = self._plan(input_batch, block_tables[0], replayed, for_capture)
            return metadata

        state.prepare_attn = prepare_and_plan  # type: ignore[method-assign, assignment]
        if self.by_confidence:
            self._take_by_confidence(runner)

    def _take_by_confidence(self, runner: Any) -> None:
        """Lets drafts be taken without a match: thresholds are kept as requests come, and verification is told of the drafts."""
        compat.hook_v2_rejection_sample()
        drafted = self.drafted = DraftedRequests.of(self.max_requests, self.k, self.drafts.device)
        state: ModelState = runner.model_state
        add_to_model_state = state.add_request

        def add_request(req_index: int, new_req_data: NewRequestData) -> None:
            add_to_model_state(req_index, new_req_data)
            try:
                parameters = new_req_data.sampling_params
                asked = None if parameters is None else RequestOptions.checked(parameters.extra_args).mtp_tau
                drafted.add(req_index, self.options.default_tau if asked is None else asked)
            except Exception as error:
                self.breaker.trip("taking drafts by confidence", error)

        state.add_request = add_request  # type: ignore[method-assign]
        runner.sample = verifier.with_confidence(runner.sample, lambda *_, **__: drafted, self.breaker)

    def bind(self, runner: Any) -> None:
        """Takes the runner once its KV cache stands."""
        super().bind(runner)
        self.sampling_states = runner.sampler.sampling_states

    def _lengths(self, num_requests: int) -> tuple[int, ...]:
        if len(self.layouts) == 1:
            return self.layouts[0]
        return self.layout_of(num_requests)

    def _plan(self, batch: InputBatch, block_table: torch.Tensor, replayed: bool, capture: bool) -> PlannedStep | None:
        """The plan of the step that vLLM is about to run, None where it has no mask rows.

        A graph has mask rows whatever happened, and its attention goes by the plan: it is given one after the breaker has opened
        too, and without one the engine must end.
        """
        if self.breaker.is_open and not replayed:
            return None
        try:
            step = self._step(batch, block_table, replayed, capture)
            return None if step is None else self.planner.plan(step)
        except Exception as error:
            if replayed:
                raise
            self.breaker.trip("planning a step", error)
            return None

    def _step(self, batch: InputBatch, block_table: torch.Tensor, replayed: bool, capture: bool) -> EngineStep | None:
        """The step that vLLM is about to run, None where it has no mask rows."""
        if replayed:  # uniform, and padded to the requests of its graph
            num_requests = batch.num_reqs_after_padding
            rows = batch.num_tokens_after_padding // num_requests
            num_rows, num_drafts = (rows,) * num_requests, (rows - 1,) * num_requests
            # Padding has no tokens and its rows are read by no one, but its forks need a length.
            request_len = batch.seq_lens[:num_requests].long().clamp(min=rows)
        elif batch.req_ids[0] not in self.req_states.req_id_to_index:
            return None  # a dummy batch, as for the capture of piecewise graphs, which run without mask rows
        else:
            num_requests = batch.num_reqs
            scheduled = batch.num_draft_tokens_per_req
            drafts = [0] * num_requests if scheduled is None else scheduled.tolist()
            states, index = self.req_states, batch.idx_mapping_np[:num_requests]
            ends = states.num_computed_prefill_tokens[index] + batch.num_scheduled_tokens[:num_requests]
            inside_prompt = batch.is_prefilling_np[:num_requests] & (ends < states.prefill_len.np[index])
            num_rows = tuple(batch.num_scheduled_tokens[:num_requests].tolist())
            num_drafts = tuple(-1 if inside else d for inside, d in zip(inside_prompt.tolist(), drafts, strict=True))
            request_len = batch.seq_lens[:num_requests].long()
        lengths = self._lengths(num_requests)
        if not capture:
            self.planner.counters.stepped(lengths)
        if not any(lengths):
            return None
        longest = self.max_model_len if capture else int(batch.seq_lens_cpu_upper_bound[: batch.num_reqs].max())
        shapes = shapes_of(lengths, num_drafts)
        return EngineStep(num_rows, shapes, request_len, longest, block_table[:num_requests], replayed)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Nothing: mask rows are part of the target's own graphs."""

    def capture(self) -> None:
        """Nothing to capture beside the target's graphs."""

    def propose(  # type: ignore[override]
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Drafts of each request for the next step, [R, k]; nothing is read back.

        A request that has no group to draft from is given tokens all the same: vLLM has already scheduled their rows.
        """
        num_requests, requests = input_batch.num_reqs, input_batch.idx_mapping
        drafts = self.drafts[:num_requests]
        if dummy_run:
            return drafts.zero_()
        if input_batch.num_draft_tokens and not self.breaker.is_open:
            try:
                self.counters.count(input_batch.cu_num_logits.diff() - 1, num_sampled, requests, self.drafted)
            except Exception as error:
                self.breaker.trip("counting drafts", error)
        # A greedy request's drafts need no distribution, so a step without any other costs what greedy drafts cost.
        sampling = self.probabilistic and bool((self.sampling_states.temperature.np[input_batch.idx_mapping_np] > 0).any())
        if self.planned is not None and not self.breaker.is_open:
            try:
                return self._draft(
                    drafts, self.planned.groups, input_batch, num_sampled, num_rejected, last_sampled, temperature, seeds, sampling
                )
            except Exception as error:
                self.breaker.trip("drafting", error)
        if sampling:  # the distribution of a certain draft
            self._publish(requests, torch.zeros_like(self.candidates[requests]))
        if self.drafted is not None:
            self.drafted.keep(requests, NONE)
        return drafts.zero_()

    def _draft(
        self,
        drafts: torch.Tensor,
        groups: Groups,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        sampling: bool,
    ) -> torch.Tensor:
        num_requests, requests = input_batch.num_reqs, input_batch.idx_mapping
        states = self.expansion.states
        assert states is not None
        rows = groups.draft_rows(num_sampled - 1, self.k)
        sampled = last_sampled.view(-1)[requests].long()
        hidden = states[: groups.num_rows]
        if sampling:
            last_positions = (input_batch.seq_lens[:num_requests] - num_rejected).long()
            found = self.sample_drafts(hidden, rows, sampled, temperature[requests], seeds[requests], last_positions)
            self._publish(requests, found.candidates, found.scores)
            tokens, probabilities = found.drafts, found.confidence() if self.drafted is not None else None
        elif self.drafted is not None:
            tokens, probabilities = self.draft_with_confidence(hidden, rows, sampled)
        else:
            tokens, probabilities = self.draft(hidden, rows, sampled), None
        if self.drafted is not None and probabilities is not None:
            own = groups.of_own_group(num_sampled - 1, self.k)
            self.drafted.keep(requests, torch.where(own, probabilities, NONE))
        return drafts.copy_(tokens)

    def _publish(self, requests: torch.Tensor, candidates: torch.Tensor, scores: torch.Tensor | float = 0.0) -> None:
        """Tells the rejection sampler what the drafts of `requests` were drawn from.

        Args:
            requests: their states' indices, [R].
            candidates, scores: as `SampledDrafts` has them, [R, k, C].
        """
        assert self.draft_logits is not None
        at = requests[:, None, None], torch.arange(self.k, device=requests.device)[:, None]
        self.draft_logits[(*at, self.candidates[requests])] = -torch.inf
        self.draft_logits[(*at, candidates)] = scores
        self.candidates[requests] = candidates
