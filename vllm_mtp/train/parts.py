"""A frozen base of which each process holds a part (FSDP2), and which yet runs in two ways: real rows, and rows of groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from vllm_mtp.train import group_attention
from vllm_mtp.train.documents import DataError


def in_parts(processes: PartialState) -> dict[str, object]:
    """What `from_pretrained` needs to give every process a part of the base.

    Raises:
        DataError: there is but one process, or transformers cannot.
    """
    if processes.num_processes == 1:
        raise DataError("--fsdp shares the base out over processes, and there is one: start with torchrun, or leave it out.")
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(fsdp_size=processes.num_processes)}
    except (ImportError, TypeError):
        raise DataError(f"--fsdp needs transformers 5.19 or later, and {transformers.__version__} is installed.") from None


def is_in_parts(model: nn.Module) -> bool:
    """Whether processes hold a part of the model's weights each (FSDP2)."""
    return isinstance(model, FSDPModule)


def _decode(model: PreTrainedModel, **inputs: Any) -> Any:
    return model.get_decoder()(**inputs)


def decode(model: nn.Module, **inputs: Any) -> Any:
    """The forward of a causal LM without its head. Of a model in parts it must begin at the root, as FSDP2 wants it."""
    return model.decode_rows(**inputs) if is_in_parts(model) else _decode(model, **inputs)  # type: ignore[arg-type, operator]


class Switched:
    """A base in parts and its LoRA in one tree of modules, for two trees cannot share such weights. It computes as the base does,
    but for rows of groups while `groups` lasts.

    Args:
        base: in parts; LoRA is put into it in place.
        lora: of PEFT.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraConfig) -> None:
        self.base, self.attention = base, base.config._attn_implementation
        base.decode_rows = partial(_decode, base)  # type: ignore[assignment]
        register_fsdp_forward_method(base, "decode_rows")
        with torch.no_grad():  # FSDP2 learns where the root is, before the embedding is asked for by itself
            decode(base, input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)
        self.student: PeftModel = get_peft_model(base, lora)  # type: ignore[assignment]
        self.layers = [layer for layer in self.student.modules() if isinstance(layer, LoraLayer)]
        self._open(False)

    def _open(self, lora: bool) -> None:
        for layer in self.layers:
            # PEFT's own switch takes requires_grad away, and a backward pass that comes later would leave the gradients out.
            layer._disable_adapters = not lora

    @contextmanager
    def groups(self, lora: bool) -> Iterator[None]:
        """Within it the tree computes rows of groups, with LoRA or without."""
        self.base.set_attn_implementation(group_attention.NAME)
        self._open(lora)
        try:
            yield
        finally:
            self.base.set_attn_implementation(self.attention)
            self._open(False)


def leave_to_fsdp(model: nn.Module) -> None:
    """Keeps DDP to what is trained, all of which every process has."""
    frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
