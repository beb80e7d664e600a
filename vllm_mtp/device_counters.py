"""What became of drafts, where the host does not wait for the device: counted there."""

import torch

from vllm_mtp.confidence import DraftedRequests
from vllm_mtp.plan import Counters


class CountersOnDevice(Counters):
    """Counters, those of drafts being the device's; times of drafting, which the host does not see, stay 0.

    The device copies them into the host's memory in its own time. Whoever reads them there, in whatever thread, waits for nothing
    and is a step or two behind; a thread that went to the device for them could disturb the capture of a CUDA graph.

    Args:
        k: most drafts of a request.
        device: of the drafts.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        super().__init__()
        self.positions = torch.arange(k, device=device)
        # drafted, accepted, confident, unmatched and expected, by position; whole numbers are exact up to 2^53.
        self.on_device = torch.zeros(5, k, dtype=torch.float64, device=device)
        self.on_host = torch.zeros(5, k, dtype=torch.float64, pin_memory=device.type == "cuda")

    def count(
        self, num_drafts: torch.Tensor, num_sampled: torch.Tensor, states: torch.Tensor, requests: DraftedRequests | None
    ) -> None:
        """Takes in a step; nothing is read back.

        Args:
            num_drafts: that each request verified, [R].
            num_sampled: tokens that it got, [R].
            states: of the requests, [R].
            requests: what was drafted and taken, before other drafts are kept; None: nothing is taken without a match.
        """
        drafted, accepted = (self.positions < count[:, None] for count in (num_drafts, num_sampled - 1))
        found = [drafted, accepted]
        if requests is not None:
            probabilities, taken, unmatched = requests.verified(states)
            found += [accepted & taken, accepted & unmatched]
            self.on_device[4] += (drafted * probabilities.cumprod(1)).sum(0)
        self.on_device[: len(found)] += torch.stack(found).sum(1)
        self.on_host.copy_(self.on_device, non_blocking=True)

    def snapshot(self) -> Counters:
        found, by_position = super().snapshot(), self.on_host.tolist()
        for name, counts in zip(("drafted", "accepted", "confident"), by_position, strict=False):
            getattr(found, name)[: len(counts)] = map(int, counts)
        found.drafts, found.unmatched = found.drafted[0], int(sum(by_position[3]))
        found.expected[: len(by_position[4])] = by_position[4]
        return found
