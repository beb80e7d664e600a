"""LoRA on layers that are split over tensor-parallel ranks: what the ranks compute, put together, is what one rank alone computes.

vLLM's own layers of every rank, one rank after the other in this process; vLLM's own loaders split the base's weights.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers import linear, utils
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm_mtp.kernels.cpu import has_linear

from vllm_mtp.adapter import LoRAWeights
from vllm_mtp.compat import _dispatch_cpu_unquantized_gemm
from vllm_mtp.cpu_linear import PanelLinear, with_kernels, with_packed_products
from vllm_mtp.gated_lora import RowSplit, WithLora, install, with_two_products

D, M, HEAD, HEADS, ROWS, REAL = 32, 48, 8, 8, 7, 3
COLUMN_PARALLEL = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROW_PARALLEL = ("attn.o_proj", "mlp.down_proj")


def module_sizes(kv_heads: int) -> dict[str, tuple[int, int]]:
    """Weight shape (out, in) of every module."""
    return {
        "attn.q_proj": (HEADS * HEAD, D),
        "attn.k_proj": (kv_heads * HEAD, D),
        "attn.v_proj": (kv_heads * HEAD, D),
        "attn.o_proj": (D, HEADS * HEAD),
        "mlp.gate_proj": (M, D),
        "mlp.up_proj": (M, D),
        "mlp.down_proj": (D, M),
        "mlp.router": (6, D),
    }


class Layers(nn.Module):
    """One rank's layers, of every kind that a model splits or does not split."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, kv_heads: int, base: dict[str, torch.Tensor], bias: torch.Tensor) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv_proj = QKVParallelLinear(D, HEAD, HEADS, kv_heads, bias=False)
        self.attn.o_proj = RowParallelLinear(HEADS * HEAD, D, bias=True)
        self.mlp.gate_up_proj = MergedColumnParallelLinear(D, [M, M], bias=False)
        self.mlp.down_proj = RowParallelLinear(M, D, bias=False)
        self.mlp.router = ReplicatedLinear(D, 6, bias=False)
        for part in "qkv":
            load(self.attn.qkv_proj, base[f"attn.{part}_proj"], part)
        for i, part in enumerate(("gate", "up")):
            load(self.mlp.gate_up_proj, base[f"mlp.{part}_proj"], i)
        load(self.attn.o_proj, base["attn.o_proj"])
        load(self.mlp.down_proj, base["mlp.down_proj"])
        load(self.mlp.router, base["mlp.router"])
        self.attn.o_proj.bias.data.copy_(bias)
        for layer in self.modules():
            if isinstance(layer, linear.LinearBase):
                layer.quant_method.process_weights_after_loading(layer)


def load(layer: nn.Module, weight: torch.Tensor, *part: str | int) -> None:
    layer.weight.weight_loader(layer.weight, weight, *part)


def become(rank: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's layers ask of their group when they are made."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=rank, world_size=num_ranks))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) / 4


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    """vLLM's layers read it when they are made."""
    with set_current_vllm_config(VllmConfig()):
        yield


RANKS = pytest.mark.parametrize(("num_ranks", "kv_heads"), [(1, 2), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1)])


@pytest.mark.parametrize("with_lora", [with_two_products, with_packed_products, with_kernels])
@RANKS
def test_ranks_together_compute_what_one_alone_does(
    num_ranks: int, kv_heads: int, with_lora: WithLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(num_ranks, kv_heads, with_lora, torch.float32, monkeypatch)


@pytest.mark.skipif(not has_linear(), reason="the processor has neither AVX-512 nor AVX2")
@RANKS
def test_ranks_with_weights_in_panels(num_ranks: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VllmConfig(additional_config={"mtp": {"adapter": ""}})
    config.speculative_config = object()
    dispatch = _dispatch_cpu_unquantized_gemm(utils.dispatch_cpu_unquantized_gemm)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            layers = compare(num_ranks, kv_heads, with_kernels, torch.bfloat16, monkeypatch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(isinstance(layer.cpu_linear, PanelLinear) for layer in layers.modules() if isinstance(layer, linear.LinearBase))


@RANKS
def test_ranks_split_what_the_base_itself_has_fused(num_ranks: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layers, "packed_modules_mapping", {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]})
    compare(num_ranks, kv_heads, with_two_products, torch.float32, monkeypatch, fused=True)


def fuse(lora: dict[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """The LoRA of a base whose own modules are fused; parts of one module get one A."""
    fused = dict(lora)
    for name, parts in (("attn.qkv_proj", COLUMN_PARALLEL[:3]), ("mlp.gate_up_proj", COLUMN_PARALLEL[3:])):
        a = lora[parts[0]].a
        for part in parts:
            lora[part] = LoRAWeights(a, fused.pop(part).b, 0.5)
        fused[name] = LoRAWeights(a, torch.cat([lora[part].b for part in parts]), 0.5)
    return fused


def compare(
    num_ranks: int,
    kv_heads: int,
    with_lora: WithLora,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    *,
    fused: bool = False,
) -> Layers:
    """Holds what the ranks compute against the product of the whole; the last rank's layers."""
    torch.manual_seed(0)
    sizes = module_sizes(kv_heads)
    base = {name: normal(*shape) for name, shape in sizes.items()}
    lora = {name: LoRAWeights(normal(4, d_in), normal(d_out, 4), 0.5) for name, (d_out, d_in) in sizes.items()}
    installed = fuse(lora) if fused else lora
    bias, inputs = normal(D), {width: normal(ROWS, width) for width in (D, M, HEADS * HEAD)}
    reduced: list[torch.Tensor] = []
    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda y: (reduced.append(y), y)[1])

    found: dict[str, list[torch.Tensor]] = {name: [] for name in sizes}
    for rank in range(num_ranks):
        become(rank, num_ranks, monkeypatch)
        layers = Layers(kv_heads, base, bias)
        rows = RowSplit(ROWS, torch.device("cpu"), dtype)
        install(layers, installed, rows, with_lora)
        rows.begin(REAL, ROWS)
        qkv = layers.attn.qkv_proj(inputs[D])[0].split(layers.attn.qkv_proj.output_partition_sizes, 1)
        gate_up = layers.mlp.gate_up_proj(inputs[D])[0].chunk(2, 1)
        for name, y in zip(COLUMN_PARALLEL, (*qkv, *gate_up), strict=True):
            found[name].append(y)
        for name, layer in zip(ROW_PARALLEL, (layers.attn.o_proj, layers.mlp.down_proj), strict=True):
            found[name].append(layer(inputs[layer.input_size].chunk(num_ranks, 1)[rank].contiguous())[0])
        found["mlp.router"].append(layers.mlp.router(inputs[D])[0])
    assert len(reduced) == (2 * num_ranks if num_ranks > 1 else 0)  # one all-reduce a row-parallel layer, LoRA or not

    copies = max(1, num_ranks // kv_heads)
    for name, (_, d_in) in sizes.items():
        expected = inputs[d_in].float() @ base[name].T.float()
        expected[REAL:] += 0.5 * inputs[d_in][REAL:].float() @ lora[name].a.T.float() @ lora[name].b.T.float()
        if name == "attn.o_proj":
            expected += bias
        parts, same = found[name], {"mlp.router": num_ranks, "attn.k_proj": copies, "attn.v_proj": copies}.get(name, 1)
        assert all(torch.equal(part, parts[i // same * same]) for i, part in enumerate(parts))
        y = torch.stack(parts).float().sum(0) if name in ROW_PARALLEL else torch.cat(parts[::same], 1).float()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y, expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return layers


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_lora_of_the_size_of_half_a_layer_is_refused(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    become(0, num_ranks, monkeypatch)
    layers = Layers(2, {name: normal(*shape) for name, shape in module_sizes(2).items()}, normal(D))
    rows = RowSplit(ROWS, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"k_proj maps 32 to 8 features; the base has 32 and 16"):
        install(layers, {"attn.k_proj": LoRAWeights(normal(4, D), normal(HEAD, 4), 1.0)}, rows)
    with pytest.raises(ValueError, match=r"down_proj maps 24 to 32 features; the base has 48 and 32"):
        install(layers, {"mlp.down_proj": LoRAWeights(normal(4, M // 2), normal(D, 4), 1.0)}, rows)
