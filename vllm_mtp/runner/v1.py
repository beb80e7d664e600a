"""vLLM's V1 model runner: the proposer that it loads as `custom_class`, and what it needs of the runner
(v1/worker/gpu_model_runner.py)."""

import math
import time
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_mtp import compat, load, parallel, verifier
from vllm_mtp.confidence import ConfidentDrafts, Drafted
from vllm_mtp.config import NO_OPTIONS, RequestOptions
from vllm_mtp.cost_cache import NUM_TERMS, CostCache, facts
from vllm_mtp.drafter import SampledDrafts
from vllm_mtp.forecast import StepCost
from vllm_mtp.layout import capped, shapes_of
from vllm_mtp.plan import EngineStep, PlannedStep
from vllm_mtp.shaping import SHAPED, Shaper
from vllm_mtp.target import MaskTokenTarget


class MaskTokenProposer(MaskTokenTarget):
    """Drafts from the mask rows of the target's own forward.

    vLLM constructs it with its configuration, calls `load_model` with the loaded target and `propose` after every step's sampling.

    Raises:
        ValueError: the server is set up in a way that mask rows do not support.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        if not current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
            raise ValueError(
                "mask-token prediction does not run under CUDA graphs on vLLM's V1 model runner: "
                "leave VLLM_USE_V2_MODEL_RUNNER unset, or add --enforce-eager"
            )
        compat.hook_v1_runner()
        self.runner: Any = None
        self.control = load.LoadControl(self.k, parallel.longest)
        self.shaper = Shaper(self.k)
        self.shapes_groups = self.options.layout == "auto"
        self.cost_cache: CostCache | None = None
        self.last_step: tuple[float, tuple[str, ...]] = (0.0, ())
        self.verified: list[int] = []
        """Drafts that each request of the running step verifies."""
        self.without_drafts = 0
        """Requests of the running step that asked for none."""
        self.drafted: dict[str, Drafted] = {}
        self.confident: ConfidentDrafts | None = None

    def load_model(self, target: torch.nn.Module) -> None:
        """Installs mask rows in the loaded target; vLLM compiles and profiles it afterwards."""
        self.install(target, self._next_step)

    @property
    def wants_confidence(self) -> bool:
        return self.by_confidence or self.shapes_groups

    def bind(self, runner: Any) -> None:
        """Takes the runner once its KV cache stands."""
        super().bind(runner)
        again, self.runner = self.runner is not None, runner
        # We cut drafts at the model's end request by request; without this the runner drafts for no one once one request is
        # near it.
        runner.effective_drafter_max_model_len = self.max_model_len + self.k
        if again:
            return
        if self.shapes_groups:
            self._know_costs()
        if current_platform.is_cpu():
            runner.rejection_sampler.forward = verifier.before(runner.rejection_sampler, self.breaker)
        if self.by_confidence:
            compat.hook_rejection_sample()
            sampler = runner.rejection_sampler
            sampler.forward = verifier.with_confidence(sampler.forward, self._confident, self.breaker)

    def _know_costs(self) -> None:
        """Takes over what steps cost an earlier server of this kind; the first rank reads and writes it for all."""
        cache = CostCache(facts(self.config)) if parallel.is_first_rank() else None
        kept = None if cache is None else cache.read()
        terms = parallel.of_first_rank(torch.tensor(kept or [math.nan] * NUM_TERMS, dtype=torch.float64))
        self.cost_cache = cache
        if not math.isnan(terms[0]):
            self.control.cost = StepCost(terms)

    def _lengths(self, num_requests: int) -> tuple[int, ...]:
        if not self.shapes_groups:
            return self.layouts[0]
        return self.control.choose(num_requests, float(self.runner.input_batch.num_computed_tokens_cpu[:num_requests].mean()))

    def _next_step(self) -> PlannedStep | None:
        """The plan of the step whose forward is about to run, from the runner's batch (v1/worker/gpu_input_batch.py)."""
        batch = self.runner.input_batch
        num_requests = batch.num_reqs
        lengths = self._lengths(num_requests)
        self.planner.counters.stepped(lengths)
        rows = np.diff(self.runner.query_start_loc.np[: num_requests + 1])
        self.verified, self.num_rows, self.without_drafts = (rows - 1).tolist(), int(rows.sum()), 0
        if lengths == self.control.plain:
            return None
        request_len = batch.num_computed_tokens_cpu[:num_requests] + rows
        known = batch.num_tokens_no_spec[:num_requests]
        # A row past the known tokens is a draft; a chunk that stops short of them ends nothing, however many rows it has.
        drafts = np.maximum(request_len - known, -1)
        self.max_lens = [self._max_len(request) for request in batch.req_ids]
        drafts[known + 1 >= self.max_lens] = -1  # the token sampled next is the last one
        most_drafts = [self._most_drafts(request) for request in batch.req_ids]
        self.without_drafts = most_drafts.count(0)
        if self.without_drafts:
            drafts[np.equal(most_drafts, 0)] = -1
        of_drafts = tuple(drafts.tolist())
        shapes = self._shapes(batch.req_ids, of_drafts) if lengths == SHAPED else shapes_of(lengths, of_drafts)
        if min(most_drafts) < self.k:
            shapes = capped(shapes, most_drafts)
        table = batch.block_table[0].get_device_tensor(num_requests)
        lens = torch.from_numpy(request_len.astype(np.int64)).to(table.device)
        return self.planner.plan(EngineStep(tuple(rows.tolist()), shapes, lens, int(request_len.max()), table))

    def _shapes(self, requests: list[str], drafts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The requests' own shapes, by how sure their drafts are.

        Args:
            requests: of the step.
            drafts: that each verifies; -1 for one that can use no draft.
        """
        self.shaper.price = self.control.price
        known = [
            (request, self._probabilities(request, count)) if count >= 0 else None
            for request, count in zip(requests, drafts, strict=True)
        ]
        return self.shaper.shapes(known, self.planner.room(self.num_rows))

    def _probabilities(self, request: str, count: int) -> list[float]:
        """Of the first drafts of `request`, as the drafter sees them; 1 for one that is taken without a match."""
        drafted = self.drafted.get(request)
        known = [] if drafted is None else drafted.chances[:count]
        return known + [0.0] * (count - len(known))

    def _max_len(self, request: str) -> int:
        """Tokens at which `request` stops at the latest."""
        state = self.runner.requests[request]
        limit = state.sampling_params.max_tokens if state.sampling_params is not None else None
        return self.max_model_len if limit is None else min(self.max_model_len, state.num_prompt_tokens + limit)

    def _most_drafts(self, request: str) -> int:
        """Drafts that `request` may have in a step."""
        asked = self._asked(request)
        return self.k if asked is NO_OPTIONS or asked.mtp_drafts is None else min(self.k, asked.mtp_drafts)

    def _asked(self, request: str) -> RequestOptions:
        """What a request asks of us; it was checked where it came in (`compat`, `SamplingParams._validate_spec_decode`)."""
        parameters = self.runner.requests[request].sampling_params
        return NO_OPTIONS if parameters is None else RequestOptions.checked(parameters.extra_args)

    def _confident(self, metadata: Any, *_: Any) -> ConfidentDrafts | None:
        """The drafts of the running step that are taken without a match, unless the request forbids them.

        Args:
            metadata: vLLM's SpecDecodeMetadata (v1/spec_decode/metadata.py).
        """
        batch, flags = self.runner.input_batch, []
        for request, scheduled, count in zip(batch.req_ids, batch.spec_token_ids, metadata.num_draft_tokens, strict=False):
            if count:
                drafted = self.drafted.get(request)
                flags += drafted.confident(scheduled) if drafted is not None else [False] * count
        device = metadata.draft_token_ids.device
        self.confident = ConfidentDrafts(torch.tensor(flags, device=device)) if any(flags) else None
        return self.confident

    def _remember(self, requests: list[str], drafts: list[list[int]], probabilities: list[list[float]]) -> None:
        """Keeps the drafts of `requests` until they are verified, which may be some steps later."""
        if len(self.drafted) > len(self.runner.requests):
            self.drafted = {request: drafted for request, drafted in self.drafted.items() if request in self.runner.requests}
        for request, tokens, chances in zip(requests, drafts, probabilities, strict=True):
            asked = self._asked(request).mtp_tau
            tau = self.options.default_tau if asked is None else asked
            self.drafted[request] = Drafted(tokens, chances, tau if self.by_confidence else math.inf)

    def _observe(self, now: float, sampled_token_ids: list[list[int]]) -> None:
        """Tells the control of layouts what the step gave, if it and the step before it decoded for the same requests."""
        before, requests = self.last_step
        running = tuple(self.runner.input_batch.req_ids)
        self.last_step = now, running if all(sampled_token_ids) else ()
        if running == requests:
            states = self.expansion.last
            rows = self.num_rows + (0 if states is None else states.groups.num_rows)
            self.control.observe([len(tokens) for tokens in sampled_token_ids], rows, now - before, self.without_drafts)
            if self.cost_cache is not None and self.control.cost.is_fitted:
                self.cost_cache.keep(self.control.cost.terms)

    def _count(self, sampled_token_ids: list[list[int]]) -> None:
        """Counts what became of the step's drafts."""
        batch, counters = self.runner.input_batch, self.planner.counters
        drafted = list(map(len, batch.spec_token_ids))
        if not any(drafted):
            return
        for request, count, tokens in zip(batch.req_ids, drafted, sampled_token_ids, strict=False):
            if count and tokens:
                counters.verified(count, len(tokens) - 1)
                if request in self.drafted:
                    counters.expect(self.drafted[request].probabilities[:count])
                if self.shapes_groups:
                    self.shaper.observe(request, self._probabilities(request, count), len(tokens) - 1)
        if self.shapes_groups:
            self.shaper.keep(batch.req_ids)
        if self.by_confidence:
            self._count_confident(drafted, sampled_token_ids)

    def _count_confident(self, drafted: list[int], sampled_token_ids: list[list[int]]) -> None:
        counters, confident, first = self.planner.counters, self.confident, 0
        taken = unmatched = [False] * sum(drafted)
        if confident is not None and confident.taken is not None and confident.unmatched is not None:
            taken, unmatched = confident.taken.tolist(), confident.unmatched.tolist()
        self.confident = None
        for count, tokens in zip(drafted, sampled_token_ids, strict=False):
            for position in range(min(count, len(tokens) - 1)):
                if taken[first + position]:
                    counters.confident[position] += 1
                    counters.unmatched += unmatched[first + position]
            first += count

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Drafts of each request for the next step, none where there is no group to draft from.

        The runner hands a custom proposer lists and takes lists from it, so here, and only here, drafts are read back.

        Args:
            sampled_token_ids: what each request's rows gave this step, accepted drafts and one token more; empty for prompt chunks.
        """
        if self.freed_memory is not None:
            self.freed_memory.trim()
        if not self.breaker.is_open:
            try:
                return self._drafts(sampled_token_ids, num_tokens_no_spec)
            except Exception as error:
                self.breaker.trip("drafting", error)
        return [[] for _ in sampled_token_ids]

    def _drafts(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any) -> list[list[int]]:
        begin = time.perf_counter()
        if self.shapes_groups:
            self._observe(begin, sampled_token_ids)
        self._count(sampled_token_ids)
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
        drawn = self.probabilistic and not self.runner.input_batch.sampling_metadata.all_greedy
        wanted = max(usable for _, _, usable in chosen) if self.drafts_any_number and not drawn else self.k
        rows = torch.tensor(
            [[min(groups.starts[group] + m, last) for m in range(wanted)] for _, group, _ in chosen], device=hidden.device
        )
        sampled = torch.tensor([sampled_token_ids[i][-1] for i, _, _ in chosen], device=hidden.device)
        drafting = time.perf_counter()
        probabilities = None
        if drawn:
            last_positions = [int(num_tokens_no_spec[i]) - 1 for i, _, _ in chosen]
            found = self._sampled_drafts(hidden, rows, sampled, [i for i, _, _ in chosen], last_positions)
            ids = found.drafts.tolist()
            if self.wants_confidence:
                probabilities = found.confidence()
        elif self.wants_confidence:
            best, probabilities = self.draft_with_confidence(hidden, rows, sampled)
            ids = best.tolist()
        else:
            ids = self.draft(hidden, rows, sampled).tolist()
        if probabilities is not None:
            self._remember([self.runner.input_batch.req_ids[i] for i, _, _ in chosen], ids, parallel.of_first_rank(probabilities))
        drafted = time.perf_counter()
        for (i, _, usable), row in zip(chosen, ids, strict=True):
            drafts[i] = row[: self._worth_verifying(self.runner.input_batch.req_ids[i], usable)]
        counters = self.planner.counters
        counters.drafter_time += drafted - drafting
        counters.draft_time += drafting - begin + time.perf_counter() - drafted
        return drafts

    def _worth_verifying(self, request: str, usable: int) -> int:
        """How many of a request's first `usable` drafts to hand out."""
        if not self.shapes_groups:
            return usable
        return self.shaper.worth_verifying(request, self._probabilities(request, usable))

    def _sampled_drafts(
        self, hidden: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor, requests: list[int], last_positions: list[int]
    ) -> SampledDrafts:
        """Drafts [R, k] with their candidates' scores; the distributions that they were drawn from are left where the runner's
        verification looks for them.

        It wants them over the whole vocabulary, [R, k, V] in float32: 20 MB for 16 requests, k = 8 and 40,000 tokens. Where it
        misses the row of a request that sat out a step, it verifies the batch as if all drafts were certain, which is lossless too
        (v1/worker/gpu_model_runner.py, `_get_spec_decode_draft_probs`).

        Args:
            hidden, rows, sampled: as `Drafter` takes them.
            requests: the batch's indices of those to draft for.
            last_positions: of their last sampled tokens.
        """
        batch, device = self.runner.input_batch, hidden.device
        ids = [batch.req_ids[i] for i in requests]
        temperature = batch.sampling_metadata.temperature[torch.tensor(requests, device=device)]
        # From the global generator, as vLLM's sampler does it: seeded alike in all ranks of a tensor-parallel group.
        seeds = torch.randint(-(2**63), 2**63 - 1, (len(ids),), device=device)
        for row, request in enumerate(ids):
            parameters = self.runner.requests[request].sampling_params
            if parameters is not None and parameters.seed is not None:
                seeds[row] = parameters.seed
        found = self.sample_drafts(hidden, rows, sampled, temperature, seeds, torch.tensor(last_positions, device=device))
        drafts, candidates, scores = found
        probabilities = (scores / torch.where(temperature > 0, temperature, 1.0)[:, None, None]).softmax(-1)
        vocab_size = self.config.model_config.get_vocab_size()
        self.runner._draft_probs = probabilities.new_zeros(*drafts.shape, vocab_size).scatter_(2, candidates, probabilities)
        self.runner._draft_prob_req_ids = ids
        return found
