"""Verification of drafts, in front of vLLM's rejection sampler (v1/sample/rejection_sampler.py): greedy steps on a CPU are decided
here in a few host operations, and drafts that are taken by confidence are made known; all else is handed through."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor

from vllm_mtp import confidence
from vllm_mtp.breaker import Breaker
from vllm_mtp.confidence import Drafts

REJECTED = -1
"""What stands behind the tokens of a request in the sampler's output (rejection_sampler.py, PLACEHOLDER_TOKEN_ID)."""


def greedy_tokens(best: np.ndarray, drafts: np.ndarray, num_drafts: np.ndarray) -> np.ndarray:
    """Tokens that each request gets under greedy verification: its drafts as far as they match, and the target's own token behind.

    Args:
        best: the target's token behind every verified row, request by request, [D + R].
        drafts: request by request, [D].
        num_drafts: drafts of each request, [R].

    Returns:
        [R, 1 + most drafts], filled up with `REJECTED`, int32.
    """
    column = np.arange(1 + num_drafts.max(initial=0))
    tokens = np.full((len(num_drafts), len(column)), REJECTED, np.int32)
    tokens[column <= num_drafts[:, None]] = best
    matches = np.zeros((len(num_drafts), len(column) - 1), bool)
    drafted = column[:-1] < num_drafts[:, None]
    matches[drafted] = tokens[:, :-1][drafted] == drafts
    accepted = matches.cumprod(1).sum(1)
    tokens[column > accepted[:, None]] = REJECTED
    return tokens


def _takes_the_best(sampling: Any) -> bool:
    """Whether every request of a step takes its best token by raw logits, and nobody asks for probabilities.

    Args:
        sampling: vLLM's SamplingMetadata (v1/sample/metadata.py).
    """

    def idle(processor: Any) -> bool:
        if isinstance(processor, MinTokensLogitsProcessor):
            return not processor.min_toks
        return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases

    budget = sampling.thinking_budget_state_holder
    return (
        sampling.all_greedy
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.no_penalties
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and all(map(idle, sampling.logitsprocs.non_argmax_invariant))
        and not (budget is not None and budget.has_tracked_requests())
    )


def before(sampler: Any, breaker: Breaker) -> Callable[..., Any]:
    """The forward of a rejection sampler with greedy steps taken out of it.

    vLLM's own is made for an accelerator, where its three dozen operations are launched and forgotten; on a CPU they are a fifth of
    a small model's step.

    Args:
        sampler: vLLM's RejectionSampler.
        breaker: opens when ours fails; vLLM's then verifies this step and all others.
    """
    original = sampler.forward
    if sampler.synthetic_mode:
        return original

    def forward(metadata: Any, draft_probs: torch.Tensor | None, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        if breaker.is_open or not _takes_the_best(sampling_metadata):
            return original(metadata, draft_probs, logits, sampling_metadata)
        try:
            scores, drafts = logits.float().numpy(), metadata.draft_token_ids.numpy()
            best = scores.argmax(-1)
            if (confident := confidence.running()) is not None:
                best = confident.certain_best(best, scores, metadata.target_logits_indices.numpy(), drafts)
            tokens = greedy_tokens(best, drafts, np.array(metadata.num_draft_tokens))
        except Exception as error:
            breaker.trip("verifying drafts", error)
            return original(metadata, draft_probs, logits, sampling_metadata)
        return SamplerOutput(sampled_token_ids=torch.from_numpy(tokens), logprobs_tensors=None)

    return forward


def with_confidence(verify: Callable[..., Any], confident: Callable[..., Drafts | None], breaker: Breaker) -> Callable[..., Any]:
    """A runner's verification, while whose steps it is known which drafts are to be taken without a match.

    Args:
        verify: ends in a `rejection_sample` that asks for them (`compat`).
        confident: of what `verify` is called with, the confident drafts; None: there are none.
        breaker: once it is open, all drafts are verified.
    """

    def failed(error: Exception) -> None:
        breaker.trip("taking drafts by confidence", error)

    def verify_and_take(*args: Any, **kwargs: Any) -> Any:
        drafts = None
        if not breaker.is_open:
            try:
                drafts = confident(*args, **kwargs)
            except Exception as error:
                failed(error)
        if drafts is None:
            return verify(*args, **kwargs)
        with confidence.taking(drafts, failed):
            return verify(*args, **kwargs)

    return verify_and_take
