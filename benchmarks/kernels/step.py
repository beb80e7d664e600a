"""A step of an 8 B-shaped model: all layers in one CUDA graph, with and without the head, plain decoding against combs.

A request is one row (`plain`) or (k + 1)^2 rows with LoRA (`comb`): k + 1 verified rows, then its mask rows. Rotary embedding,
cache writes and sampling are left out on both sides; norms and activations are torch's own launches on both sides, which a server
fuses, so they flatter the ratio by some per cent. The ratio of the two times divides tokens per step into a speed-up.
"""

import itertools
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from vllm_mtp.kernels.comb_attention import CombLayout, comb_attention_
from vllm_mtp.kernels.gated_lora import LowRankSlices, gated_lora

from .cells import Cell, Cells
from .gated_lora import Layer, make_slices
from .timing import Call


@dataclass(frozen=True)
class Model:
    """A Llama-like stack."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rank: int

    @property
    def linears(self) -> tuple[Layer, ...]:
        """qkv, o, gate_up, down."""
        kv = self.kv_heads * self.head_size
        return (
            Layer("qkv", self.hidden, (self.heads * self.head_size, kv, kv)),
            Layer("o", self.heads * self.head_size, (self.hidden,)),
            Layer("gate_up", self.hidden, (self.intermediate, self.intermediate)),
            Layer("down", self.intermediate, (self.hidden,)),
        )


LLAMA_8B = Model(32, 4096, 14336, 32, 8, 128, 128256, 128)
SMOKE = Model(2, 32, 48, 4, 2, 16, 50, 4)
BLOCK = 16


@cache
def weights(model: Model, device: torch.device) -> tuple[list[list[tuple[torch.Tensor, LowRankSlices]]], torch.Tensor]:
    """Weights and LoRA of every layer, and the head; made once, every layer its own."""
    layers = []
    for _ in range(model.layers):
        linears = []
        for layer in model.linears:
            weight = torch.randn(sum(layer.parts), layer.inputs, device=device, dtype=torch.bfloat16) / layer.inputs**0.5
            linears.append((weight, make_slices(layer, model.rank, device)))
        layers.append(linears)
    return layers, torch.randn(model.vocabulary, model.hidden, device=device, dtype=torch.bfloat16) / model.hidden**0.5


def step(
    model: Model,
    x: torch.Tensor,
    num_real: torch.Tensor,
    real: CombLayout,
    masks: CombLayout | None,
    kv: torch.Tensor,
    table: torch.Tensor,
    heads: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Logits of each of `heads`, rows of x; kv [layers, 2, blocks, block, kv_heads, head_size]."""
    layers, head = weights(model, x.device)
    n = real.group_of_row.shape[0]
    sizes = model.linears[0].parts
    for i, ((qkv, qkv_lora), (o, o_lora), (gate_up, gate_up_lora), (down, down_lora)) in enumerate(layers):

        def linear(y: torch.Tensor, weight: torch.Tensor, lora: LowRankSlices) -> torch.Tensor:
            return F.linear(y, weight) if masks is None else gated_lora(y, weight, lora, num_real)

        fused = linear(F.rms_norm(x, (model.hidden,)), qkv, qkv_lora)
        q, k, v = (part.unflatten(1, (-1, model.head_size)) for part in fused.split(list(sizes), 1))
        attended = torch.empty_like(q)
        scale = model.head_size**-0.5
        comb_attention_(attended[:n], q[:n], k[:n], v[:n], kv[i, 0], kv[i, 1], table, real, scale)
        if masks is not None:
            comb_attention_(attended[n:], q[n:], k[n:], v[n:], kv[i, 0], kv[i, 1], table, masks, scale)
        x = x + linear(attended.flatten(1), o, o_lora)
        gate, up = linear(F.rms_norm(x, (model.hidden,)), gate_up, gate_up_lora).chunk(2, 1)
        x = x + linear(F.silu(gate) * up, down, down_lora)
    x = F.rms_norm(x, (model.hidden,))
    return [x[rows] @ head.T for rows in heads] or [x]


def make(model: Model, k: int, batch: int, context: int, with_head: bool, device: torch.device) -> list[Call]:
    """One call; its weights alone are far beyond L2."""
    per_request = -(-(context + 1) // BLOCK)
    shape = (model.layers, 2, batch * per_request, BLOCK, model.kv_heads, model.head_size)
    kv = torch.randn(shape, device=device, dtype=torch.bfloat16)
    table = torch.randperm(batch * per_request, device=device).view(batch, per_request).int()
    requests = list(range(batch))
    real = CombLayout.of(requests, [k + 1] * batch, [context - k] * batch, batch, device)
    masks = None
    if k:
        groups = [(request, k, context - k + 1 + j) for request in requests for j in range(k + 1)]
        request, length, prefix = (list(column) for column in zip(*groups, strict=True))
        masks = CombLayout.of(request, length, prefix, batch, device)
    x = torch.randn(batch * (k + 1) ** 2, model.hidden, device=device, dtype=torch.bfloat16)
    # Logits of the real rows, and of the group behind the row accepted last, which is known only once those are there.
    heads = [torch.arange(batch * rows, device=device) for rows in (k + 1, k) if rows] if with_head else []
    num_real = torch.tensor([batch * (k + 1)], device=device)
    return [partial(step, model, x, num_real, real, masks, kv, table, heads)]


def cells(device: torch.device, smoke: bool) -> Cells:
    """Plain steps and combs of k = 4 and 8, of the layers alone and with the head."""
    model = SMOKE if smoke else LLAMA_8B
    size = sum(layer.inputs * sum(layer.parts) for layer in model.linears) * model.layers
    low_rank = sum(model.rank * (len(layer.parts) * layer.inputs + sum(layer.parts)) for layer in model.linears) * model.layers
    head = model.vocabulary * model.hidden
    contexts, batches, combs = ((24,), (1,), (0, 2)) if smoke else ((1024, 8192), (1, 2, 4, 8, 16, 32, 64), (0, 4, 8))
    for context, batch, k, with_head in itertools.product(contexts, batches, combs, (False, True)):
        rows, logits, heads = batch * (k + 1) ** 2, batch * (2 * k + 1), (2 if k else 1) if with_head else 0
        lora = low_rank if k else 0
        kv = 4 * model.layers * batch * context * model.kv_heads * model.head_size
        attention = 4 * model.layers * rows * context * model.heads * model.head_size
        yield Cell(
            "step",
            "comb" if k else "plain",
            {"context": context, "batch": batch, "k": k, "rows": rows, "head": with_head},
            2 * (size + heads * head + lora) + kv,
            2 * (rows * size + (logits * head if with_head else 0) + batch * k * (k + 1) * lora) + attention,
            partial(make, model, k, batch, context, with_head, device),
        )
