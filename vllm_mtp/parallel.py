"""What a model that is split over tensor-parallel ranks asks of us: the unembedding's rows, and one clock for all ranks.

Every rank runs the whole step and drafts for itself: vLLM gathers the logits on all ranks
(model_executor/layers/logits_processor.py), so all sample and draft the same tokens. The scheduler takes the drafts of the first
rank (v1/executor/multiproc_executor.py, take_draft_token_ids). What decides how many rows or collective operations a step has must
be equal on all ranks, or they hang.
"""

from typing import Any

import torch

from vllm_mtp.drafter import Unembedding


def unembedding(target: Any, vocab_size: int) -> Unembedding | None:
    """This rank's rows of the target's unembedding; None if it cannot be read row by row.

    Args:
        target: a loaded vLLM model; its `lm_head` may be split by tokens (model_executor/layers/vocab_parallel_embedding.py).
        vocab_size: V.
    """
    lm_head = getattr(target, "lm_head", None)
    weight, bias = getattr(lm_head, "weight", None), getattr(lm_head, "bias", None)
    if weight is None or weight.ndim != 2 or bias is not None:
        return None
    shard = getattr(lm_head, "shard_indices", None)
    if shard is None or lm_head.tp_size == 1:  # type: ignore[union-attr]
        return Unembedding(weight, 0, vocab_size) if weight.shape[0] >= vocab_size else None
    from vllm.distributed import tensor_model_parallel_all_reduce

    first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    return Unembedding(weight, first, end, tensor_model_parallel_all_reduce) if weight.shape[0] >= end - first else None


def num_ranks() -> int:
    """Tensor-parallel ranks of the engine."""
    from vllm.distributed import get_tp_group

    return int(get_tp_group().world_size)


def is_first_rank() -> bool:
    """Whether this is the tensor-parallel rank whose drafts are taken."""
    from vllm.distributed import get_tp_group

    return bool(get_tp_group().rank_in_group == 0)


def of_first_rank(numbers: torch.Tensor) -> list[Any]:
    """A tensor of the first tensor-parallel rank as nested lists, on all ranks: what a step's rows depend on must not differ by a
    rounding. All ranks must call it."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size > 1:
        numbers = numbers.cpu().contiguous()
        torch.distributed.broadcast(numbers, group.ranks[0], group=group.cpu_group)
    return list(numbers.tolist())


def longest(seconds: list[float]) -> list[float]:
    """The longest of each of the times that the tensor-parallel ranks bring; all ranks must call it, and get the same.

    Over the processes' own group and not the devices': times are numbers of the host.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return seconds
    times = torch.tensor(seconds, dtype=torch.float64)
    torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return list(times.tolist())
