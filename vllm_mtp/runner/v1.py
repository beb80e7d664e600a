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
from vllm_mtp.given import GivenDrafts
from vllm_mtp.layout import capped, shapes_of
from vllm_mtp.lookup import Lookup
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
        self.control = load.LoadControl(self.longest_group, parallel.longest)
        self.shaper = Shaper(self.longest_group)
        self.shapes_groups = self.options.layout == "auto"
        self.speculates = False
        """Whether the running step is of the way that drafts."""
        self.cost_cache: CostCache | None = None
        self.last_step: tuple[float, frozenset[str]] = (0.0, frozenset())
        self.verified: list[int] = []
        """Drafts that each request of the running step verifies."""
        self.without_drafts = 0
        """Requests of the running step that asked for none."""
        self.confident: ConfidentDrafts | None = None

    def load_model(self, target: torch.nn.Module) -> None:
        """Installs mask rows in the loaded target; vLLM compiles and profiles it afterwards."""
        self.install(target, self._next_step)
        shaper, lookup = self.shaper if self.shapes_groups else None, Lookup() if self.options.lookup else None
        self.given = GivenDrafts(self.planner.counters, shaper, lookup)

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
        self.speculates = lengths != self.control.plain
        if not self.speculates:
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
        if min(most_drafts) < self.longest_group:
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
        known = [self.given.verifies(*each) if each[1] >= 0 else None for each in zip(requests, drafts, strict=True)]
        return self.shaper.shapes(known, self.planner.room(self.num_rows))

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
                drafted = self.given.drafted.get(request)
                flags += drafted.confident(scheduled) if drafted is not None else [False] * count
        device = metadata.draft_token_ids.device
        self.confident = ConfidentDrafts(torch.tensor(flags, device=device)) if any(flags) else None
        return self.confident

    def _observe(self, now: float, sampled_token_ids: list[list[int]]) -> None:
        """Tells the control of layouts what the step gave and took, unless the engine may have idled since the step before: it had
        no reason to while one of that step's requests was still there."""
        before, requests = self.last_step
        batch = self.runner.input_batch
        self.last_step = now, frozenset(batch.req_ids)
        if requests.isdisjoint(batch.req_ids) or not any(sampled_token_ids):
            self.control.skip(len(batch.req_ids))
            return
        sampled = [i for i, tokens in enumerate(sampled_token_ids) if tokens]
        decoded = sum(1 + len(batch.spec_token_ids[i]) for i in sampled)
        masks = 0 if self.expansion.last is None else self.expansion.last.groups.num_rows
        tokens = [len(sampled_token_ids[i]) for i in sampled]
        self.control.observe(tokens, decoded + masks, now - before, self.without_drafts, self.num_rows - decoded)
        if self.cost_cache is not None and self.control.cost.is_fitted:
            self.cost_cache.keep(self.control.cost.terms)

    def _count(self, sampled_token_ids: list[list[int]]) -> None:
        """Counts what became of the step's drafts."""
        batch = self.runner.input_batch
        drafted = list(map(len, batch.spec_token_ids))
        if not any(drafted):
            return
        for request, count, tokens in zip(batch.req_ids, drafted, sampled_token_ids, strict=False):
            if count and tokens:
                self.given.verified(request, count, len(tokens) - 1)
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
            num_tokens_no_spec, token_ids_cpu: each request's number of tokens with those, and its tokens.
        """
        if self.freed_memory is not None:
            self.freed_memory.trim()
        if not self.breaker.is_open:
            try:
                return self._drafts(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
            except Exception as error:
                self.breaker.trip("drafting", error)
        return [[] for _ in sampled_token_ids]

    def _drafts(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any) -> list[list[int]]:
        begin = time.perf_counter()
        if self.shapes_groups:
            self._observe(begin, sampled_token_ids)
        self._count(sampled_token_ids)
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if not self.speculates:
            return drafts
        requests = self.runner.input_batch.req_ids
        self.given.keep(requests, self.runner.requests)
        drawn = self.probabilistic and not self.runner.input_batch.sampling_metadata.all_greedy
        groups = None if self.expansion.last is None else self.expansion.last.groups
        chosen = []  # (request, group, drafts it can use)
        looked_up: dict[int, list[int]] = {}
        for i, tokens in enumerate(sampled_token_ids):
            if not tokens:
                continue
            num_tokens = int(num_tokens_no_spec[i])
            usable = self.max_lens[i] - num_tokens
            group = -1 if groups is None else groups.after[i][len(tokens) - 1]
            if groups is not None and group >= 0 and usable > 0:
                chosen.append((i, group, min(groups.lengths[group], usable)))
            if self.options.lookup and not drawn:
                wanted = min(self._most_drafts(requests[i]), usable - 1)
                if found := self.given.look_up(requests[i], token_ids_cpu[i, :num_tokens], tokens, wanted):
                    looked_up[i] = found
        drafter_time = 0.0
        if chosen:
            ids, probabilities, drafter_time = self._from_states(chosen, sampled_token_ids, num_tokens_no_spec, drawn=drawn)
            for row, (i, _, usable) in enumerate(chosen):
                if probabilities is None:
                    drafts[i] = ids[row][:usable]
                else:
                    own = Drafted(ids[row], probabilities[row], self._tau(requests[i]))
                    drafts[i] = self.given.give(requests[i], own, usable, looked_up.pop(i, ()))
        for i, found in looked_up.items():
            drafts[i] = self.given.give_found(requests[i], found)
        self.planner.counters.drafter_time += drafter_time
        self.planner.counters.draft_time += time.perf_counter() - begin - drafter_time
        return drafts

    def _tau(self, request: str) -> float:
        """The threshold from which on `request`'s drafts are taken without a match."""
        if not self.by_confidence:
            return math.inf
        asked = self._asked(request).mtp_tau
        return self.options.default_tau if asked is None else asked

    def _from_states(
        self, chosen: list[tuple[int, int, int]], sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, *, drawn: bool
    ) -> tuple[list[list[int]], list[list[float]] | None, float]:
        """Drafts of mask states, their probabilities if they are wanted, and the seconds that the drafter took.

        Args:
            chosen: (request, group, drafts it can use), R of them.
            sampled_token_ids, num_tokens_no_spec: as `propose` takes them.
            drawn: whether drafts are drawn.
        """
        assert self.expansion.last is not None
        groups, hidden = self.expansion.last.groups, self.expansion.last.hidden
        last = groups.num_rows - 1
        wanted = max(usable for _, _, usable in chosen) if self.drafts_any_number and not drawn else self.longest_group
        rows = torch.tensor(
            [[min(groups.starts[group] + m, last) for m in range(wanted)] for _, group, _ in chosen], device=hidden.device
        )
        sampled = torch.tensor([sampled_token_ids[i][-1] for i, _, _ in chosen], device=hidden.device)
        begin, probabilities = time.perf_counter(), None
        if drawn:
            last_positions = [int(num_tokens_no_spec[i]) - 1 for i, _, _ in chosen]
            found = self._sampled_drafts(hidden, rows, sampled, [i for i, _, _ in chosen], last_positions)
            best = found.drafts
            if self.wants_confidence:
                probabilities = found.confidence()
        elif self.wants_confidence:
            best, probabilities = self.draft_with_confidence(hidden, rows, sampled)
        else:
            best = self.draft(hidden, rows, sampled)
        ids = best.tolist()
        known = None if probabilities is None else parallel.of_first_rank(probabilities)
        return ids, known, time.perf_counter() - begin

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
