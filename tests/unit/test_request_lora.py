"""Mask rows carry the LoRA adapter of their request, and only while they run."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from vllm_mtp.layout import Groups, plan_groups
from vllm_mtp.request_lora import RequestLoRAs


@dataclass
class Mapping:
    """vLLM's LoRAMapping, as far as it is read."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...] = (3, 0)


@dataclass
class Manager:
    """vLLM's LoRA manager, as far as it is called."""

    _last_mapping: Mapping
    seen: list[Mapping] = field(default_factory=list)

    def set_adapter_mapping(self, mapping: Mapping) -> None:
        self._last_mapping = mapping
        self.seen.append(mapping)


def served(manager: Any) -> RequestLoRAs:
    loras = RequestLoRAs(torch.nn.Linear(1, 1))
    loras.manager = manager
    return loras


def two_requests() -> Groups:
    """A request with one draft, two groups of two; and one without drafts, one group."""
    groups = plan_groups((2, 1), ((2, 2), (2,)), 1, 64, 8, 16, torch.device("cpu"))
    assert groups is not None
    assert groups.request.tolist() == [0, 0, 1]
    return groups


def test_mask_rows_are_mapped_to_their_requests_adapter() -> None:
    runners = Mapping((3, 3, 0))
    manager = Manager(runners)
    with served(manager).mapped(two_requests()):
        assert manager._last_mapping == Mapping((3, 3, 0, *[3] * 4, *[0] * 2))
    assert manager._last_mapping is runners


def test_the_runners_mapping_comes_back_after_an_error() -> None:
    manager = Manager(Mapping((3, 3, 0)))
    with pytest.raises(RuntimeError), served(manager).mapped(two_requests()):
        raise RuntimeError
    assert manager._last_mapping == Mapping((3, 3, 0))


def test_a_server_without_request_adapters_has_nothing_to_map() -> None:
    loras = RequestLoRAs(torch.nn.Linear(1, 1))
    with loras.mapped(two_requests()):
        pass
    assert loras.without(two_requests) is two_requests
