"""The packed forward of training against one naive forward for every prefix."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from tests.unit.tiny_models import as_adapter, tiny_base, tiny_config, tiny_masked_model
from vllm_mtp.adapter import read_adapter, write_adapter
from vllm_mtp.train.export import load_adapter
from vllm_mtp.train.model import MaskedModel


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Two sequences of 20 tokens; prefixes reach from one token to where a group runs past the end."""
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(2, 61, (2, 20)),
        "lengths": torch.tensor(lengths),
        "prefix_lengths": torch.tensor([[1, 7, 16, 3, 12], [2, 9, 10, 17, 1]]),
    }


def naive_states(model: MaskedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States of a prefix's rows [L, d] and of the mask tokens behind it [K, d]: one forward, y = W x + I(mask) B A x throughout."""
    masks, L = model.mask_embeddings, len(ids)
    loras = {name: layer for name, layer in model.student.get_base_model().named_modules() if isinstance(layer, LoraLayer)}

    def gate(layer: LoraLayer) -> Callable[..., torch.Tensor]:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return lambda _, x, y: torch.cat([y[:, :L], y[:, L:] + layer.scaling["default"] * x[0][:, L:] @ a.T @ b.T], 1)

    handles = [model.base.get_submodule(name).register_forward_hook(gate(layer)) for name, layer in loras.items()]
    rows = torch.cat([model.embed(ids), masks])[None]
    states = model.base.get_decoder()(inputs_embeds=rows, use_cache=False).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return states[:L].detach(), states[L:]


def naive_loss(model: MaskedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over all labels, each prefix with a forward of its own, by the formulas of the paper; with gradients."""
    config, total, weights = model.options, torch.zeros(()), 0.0
    answers = inputs.get("answers", torch.ones_like(inputs["input_ids"], dtype=torch.bool))
    for b, length in enumerate(inputs["lengths"].tolist()):
        ids = inputs["input_ids"][b]
        for L in inputs["prefix_lengths"][b].tolist():
            _, z = naive_states(model, ids[:L])
            for i, state in enumerate(z):
                if L + i + 1 >= length or not answers[b, L + 1 : L + i + 2].all():
                    break
                teacher = naive_states(model, ids[: L + i + 1])[0][-1]
                logits = {"plain_head": model.unembed(state)}
                if model.sampler is not None:
                    logits["sampler_head"] = model.unembed(model.sampler(model.embed(ids[L + i]), state))
                target = model.unembed(teacher)
                label = ids[L + i + 1] if config.targets == "text" else target.argmax()
                wanted = target.softmax(-1) if config.targets == "distribution" else F.one_hot(label, len(target)).float()
                loss = config.loss.consistency * (teacher - state).pow(2).mean()
                for head, found in logits.items():
                    loss = loss - getattr(config.loss, head) * (wanted * found.log_softmax(-1)).sum()
                weight = config.loss.position_decay**i
                total, weights = total + weight * loss, weights + weight
    return total / weights


CASES = {
    "distribution": {},
    "argmax": {"targets": "argmax"},
    "text": {"targets": "text"},
    "without a sampler head": {"sampler": False},
    "the paper's sampler head": {"sampler_residual": False},
    "little memory": {"gradient_checkpointing": True, "logit_rows": 7},
    "little memory, text": {"targets": "text", "gradient_checkpointing": True, "logit_rows": 7},
    "unequal weights": {"loss": {"plain_head": 0.5, "sampler_head": 2.0, "consistency": 3.0, "position_decay": 0.7}},
}
PACKED = {
    "whole": ([20, 20], None),
    "padded": ([18, 13], None),
    "answers of chats": ([20, 17], [[(1, 4), (6, 12), (15, 20)], [(2, 11), (12, 17)]]),
}


@pytest.mark.parametrize(
    ("case", "packed"), [*((case, "padded") for case in CASES), ("distribution", "whole"), ("unequal weights", "answers of chats")]
)
def test_packed_loss_and_gradients_are_those_of_separate_forwards(case: str, packed: str) -> None:
    model = tiny_masked_model(tiny_config(**CASES[case]), tiny_base())
    lengths, spans = PACKED[packed]
    inputs = batch(lengths)
    if lengths[1] == 13:
        inputs["prefix_lengths"][1, 3] = 8  # prefixes end inside their sequence
    if spans is not None:
        inputs["answers"] = torch.zeros(2, 20, dtype=torch.bool)
        for row, some in zip(inputs["answers"], spans, strict=True):
            for begin, end in some:
                row[begin:end] = True
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradients = [], []
    for loss in (model(**inputs)["loss"], naive_loss(model, inputs)):
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(trained.values())))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for name, packed_gradient, naive_gradient in zip(trained, *gradients, strict=True):
        assert naive_gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(
            packed_gradient, naive_gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_what_would_take_memory_is_computed_again() -> None:
    """No more rows' logits at a time than asked for, and layers run a second time in the backward pass."""
    config = tiny_config(gradient_checkpointing=True, logit_rows=7)
    model, rows, runs = tiny_masked_model(config, tiny_base()), [], 0

    def ran(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.unembed.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.student.get_base_model().get_decoder().layers[0].mlp.register_forward_pre_hook(ran)
    loss = model(**batch([20, 20]))["loss"]
    forward = runs, len(rows)
    loss.backward()
    assert max(rows) == 7
    assert (runs, len(rows)) == (2 * forward[0], 2 * forward[1]) == (2, 2 * forward[1])


def test_real_rows_are_bit_identical_to_the_base_and_mask_rows_are_not() -> None:
    plain = tiny_base()
    inputs = batch([20, 20])
    with torch.no_grad():
        wanted = plain.model(inputs["input_ids"]).last_hidden_state
    model = tiny_masked_model(tiny_config(), tiny_base())
    real, z = model.states(inputs["input_ids"], inputs["prefix_lengths"])
    assert torch.equal(real, wanted)
    with torch.no_grad():
        for name, parameter in model.student.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    real, without = model.states(inputs["input_ids"], inputs["prefix_lengths"])
    assert torch.equal(real, wanted)
    assert (z - without).abs().max() > 0.01


def test_dropout_of_the_base_is_off_in_training() -> None:
    base = tiny_base()
    base.config.attention_dropout = 0.5
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = tiny_masked_model(tiny_config(), base).train()
    inputs = batch([20, 20])
    assert model(**inputs)["loss"].item() == model(**inputs)["loss"].item()
    wanted, _ = tiny_masked_model(tiny_config(), tiny_base()).states(inputs["input_ids"], inputs["prefix_lengths"])
    assert torch.equal(model.states(inputs["input_ids"], inputs["prefix_lengths"])[0], wanted)


def test_a_group_does_not_see_tokens_behind_its_prefix_or_other_groups() -> None:
    model = tiny_masked_model(tiny_config(), tiny_base())
    inputs = batch([20, 20])
    _, z = model.states(inputs["input_ids"], inputs["prefix_lengths"])
    changed = inputs["input_ids"].clone()
    changed[0, 7:] = 5
    others = inputs["prefix_lengths"].clone()
    others[0, 0] = 5
    _, other = model.states(changed, others)
    torch.testing.assert_close(other[0, 1], z[0, 1])  # its prefix is 7 tokens
    assert (other[0, 2] - z[0, 2]).abs().max() > 0.01  # its prefix is 16


def test_training_moves_everything_but_the_base() -> None:
    base = tiny_base()
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = MaskedModel(base, tiny_config())
    own = {name: t.clone() for name, t in model.trainable().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        model(**batch([20, 20]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert not [name for name, t in model.trainable().items() if torch.equal(t, own[name])]


def test_a_start_from_an_adapter_computes_what_the_adapter_does_also_at_a_larger_rank() -> None:
    inputs = batch([20, 14])
    model = tiny_masked_model(tiny_config(), tiny_base())
    expected = model.states(inputs["input_ids"], inputs["prefix_lengths"])[1]
    for rank in (4, 6):
        started = MaskedModel(tiny_base(), tiny_config(rank=rank, alpha=rank))
        load_adapter(started, as_adapter(model))
        found = started.states(inputs["input_ids"], inputs["prefix_lengths"])[1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_layers_may_have_ranks_of_their_own_and_an_adapter_keeps_them(tmp_path: Path) -> None:
    config = tiny_config(rank=4, rank_of=("mlp=2", "down_proj=6"))
    model, inputs = tiny_masked_model(config, tiny_base()), batch([20, 14])
    parts = as_adapter(model)
    write_adapter(tmp_path / "adapter", parts.config, parts.lora, parts.mask_embeddings, parts.sampler)
    adapter = read_adapter(tmp_path / "adapter")
    for name, weights in adapter.lora.items():
        assert len(weights.a) == (6 if "down_proj" in name else 2 if "mlp" in name else 4), name
        assert weights.scale == 2
    started = MaskedModel(tiny_base(), config)
    load_adapter(started, adapter)
    for states in zip(*(one.states(inputs["input_ids"], inputs["prefix_lengths"]) for one in (model, started)), strict=True):
        torch.testing.assert_close(*states)


def test_a_rank_of_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank_of moe=2: no linear layer has that in its name; they are down_proj, .*v_proj"):
        MaskedModel(tiny_base(), tiny_config(rank_of=("mlp=8", "moe=2")))


@pytest.mark.parametrize("options", [{"rank": 2}, {"mask_tokens": 2}, {"sampler": False}])
def test_a_start_from_an_adapter_that_does_not_fit_is_refused(options: dict[str, object]) -> None:
    adapter = as_adapter(tiny_masked_model(tiny_config(), tiny_base()))
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(MaskedModel(tiny_base(), tiny_config(**options)), adapter)


def test_position_decay_weighs_the_first_mask_tokens_more() -> None:
    inputs = batch([20, 20])
    base = tiny_base()
    even = tiny_masked_model(tiny_config(), base)
    torch.manual_seed(2)
    first = tiny_masked_model(tiny_config(loss={"position_decay": 1e-6}), tiny_base())
    first.load_trainable(even.trainable())
    single = tiny_masked_model(tiny_config(mask_tokens=1), tiny_base())
    single.load_trainable({**even.trainable(), "mask_embeddings": even.mask_embeddings[:1].detach()})
    with torch.no_grad():
        assert first(**inputs)["loss"].item() == pytest.approx(single(**inputs)["loss"].item(), abs=1e-4)
        assert abs(first(**inputs)["loss"].item() - even(**inputs)["loss"].item()) > 1e-3
