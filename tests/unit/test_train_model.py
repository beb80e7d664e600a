"""The packed forward of training against one naive forward for every prefix."""

import pytest
import torch
import torch.nn.functional as F

from tests.unit.tiny_models import as_adapter, tiny_base, tiny_config, tiny_masked_model
from vllm_mtp.reference import ReferenceModel
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


def naive_loss(model: MaskedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of one group after the other, each with its own forward; weights 1 and no position decay."""
    reference, targets = ReferenceModel(model.base, as_adapter(model)), model.options.targets
    rows = []
    columns = (inputs[name].tolist() for name in ("input_ids", "lengths", "prefix_lengths"))
    for ids, length, prefixes in zip(*columns, strict=True):
        real = reference.real_states(ids)
        for L in prefixes:
            z = reference.mask_states(ids[:L], len(model.mask_embeddings))
            for i, state in enumerate(z):
                if L + i + 1 >= length:
                    continue
                teacher, previous = real[L + i], torch.tensor(ids[L + i])
                logits = [model.unembed(state), model.unembed(model.sampler(model.embed(previous), state))]
                target = model.unembed(teacher)
                label = torch.tensor(ids[L + i + 1]) if targets == "text" else target.argmax()
                wanted = target.softmax(-1) if targets == "distribution" else F.one_hot(label, 61).float()
                rows.append(sum(F.cross_entropy(one, wanted) for one in logits) + (teacher - state).pow(2).mean())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("targets", ["distribution", "argmax", "text"])
@pytest.mark.parametrize("lengths", [[20, 20], [18, 13]])
def test_packed_loss_is_the_mean_of_separate_forwards(targets: str, lengths: list[int]) -> None:
    model = tiny_masked_model(tiny_config(targets=targets), tiny_base())
    inputs = batch(lengths)
    if lengths[1] == 13:
        inputs["prefix_lengths"][1, 3] = 8  # prefixes end inside their sequence
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)["loss"], naive_loss(model, inputs), atol=1e-5, rtol=0)


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


def test_gradient_of_the_packed_loss_is_its_slope() -> None:
    model = tiny_masked_model(tiny_config(), tiny_base()).double()
    inputs = batch([20, 20])
    model(**inputs)["loss"].backward()
    for name in ("mask_embeddings", "sampler.linear_1.weight"):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(model(**inputs)["loss"].item())
                parameter.add_(direction, alpha=-step)
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(parameter.grad.norm().item(), rel=1e-2)


def test_a_start_from_an_adapter_computes_what_the_adapter_does_also_at_a_larger_rank() -> None:
    inputs = batch([20, 14])
    model = tiny_masked_model(tiny_config(), tiny_base())
    expected = model.states(inputs["input_ids"], inputs["prefix_lengths"])[1]
    for rank in (4, 6):
        started = MaskedModel(tiny_base(), tiny_config(rank=rank, alpha=rank))
        load_adapter(started, as_adapter(model))
        found = started.states(inputs["input_ids"], inputs["prefix_lengths"])[1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
