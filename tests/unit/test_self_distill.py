"""The recipe self-distill: packed forwards against one for every prefix, the layout against the paper's, and the two students."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.unit.test_train_model import naive_states
from tests.unit.tiny_models import tiny_base, tiny_config, tiny_masked_model
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.data import Corpus, Sequences
from vllm_mtp.train.self_distill import FullStudent, GatedStudent, Student, add_mask_token

TOKENS = 61
SHAPE = {"recipe": "self-distill", "mask_tokens": 4, "length": 24, "groups": 3}


def config_of(tuning: str = "lora", **options: object) -> TrainConfig:
    """Options for `tiny_base`."""
    full = {"tuning": "full", "learning_rate": 0.01}
    return tiny_config(**SHAPE, **(full if tuning == "full" else {}), **options)


def student_of(config: TrainConfig) -> Student:
    """A student whose mask rows already differ from the base's; of a full one the vocabulary grew by a mask token."""
    base = tiny_base()
    if config.tuning == "lora":
        model = tiny_masked_model(config, base, GatedStudent)
        assert isinstance(model, GatedStudent)
        return model
    token = add_mask_token(base, TOKENS, None)
    student = FullStudent(base, config, token, TOKENS)
    with torch.no_grad():  # as if it had been trained: else student and teacher are one
        for parameter in student.base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return student


def batch(k: int, lengths: tuple[int, int] = (24, 24)) -> dict[str, torch.Tensor]:
    """Two sequences, with groups of k-1 mask tokens behind rows of one distance."""
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(2, TOKENS, (2, 24)),
        "lengths": torch.tensor(lengths),
        "prefix_lengths": torch.arange(3, 24, 9 - k).clamp(max=20)[:3].expand(2, -1),
        "slots": torch.arange(k).expand(2, -1),
    }


def naive_slots(model: Student, ids: torch.Tensor, k: int) -> torch.Tensor:
    """The student's states in k slots behind a prefix [k, d], in one plain forward of prefix and masks."""
    if isinstance(model, GatedStudent):
        prefix, masks = naive_states(model, ids)
        return torch.cat([prefix[-1:], masks[: k - 1]])
    assert isinstance(model, FullStudent)
    rows = torch.cat([ids, ids.new_full((k - 1,), model.mask_token_id)])[None]
    return model.base.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state[0, len(ids) - 1 :]


def naive_loss(model: Student, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over all slots, two forwards for each prefix, by the formulas of the paper; with gradients."""
    config, total, weights = model.options, torch.zeros(()), 0.0
    answers = inputs.get("answers", torch.ones_like(inputs["input_ids"], dtype=torch.bool))
    for b, length in enumerate(inputs["lengths"].tolist()):
        for L in inputs["prefix_lengths"][b].tolist():
            ids, k = inputs["input_ids"][b, :L], inputs["slots"].shape[1]
            heads = {"plain_head": naive_slots(model, ids, k)}
            z, own = heads["plain_head"], [model.best(heads["plain_head"][0])]
            if model.sampler is not None:
                drafted = [z[0]]
                for state in z[1:]:
                    drafted.append(model.sampler(model.embed(own[-1]), state))
                    own.append(model.best(drafted[-1]))
                heads["sampler_head"] = torch.stack(drafted)
            else:
                own = list(model.best(z))
            with torch.no_grad():
                read = torch.cat([ids, torch.stack(own[:-1])])[None]
                teacher = model.teacher.get_decoder()(input_ids=read, use_cache=False).last_hidden_state[0, L - 1 :]
                logits = model.predict(teacher)
            for i in range(k):
                if L + i >= length or not answers[b, L : L + i + 1].all():
                    break
                loss = config.loss.consistency * (teacher[i] - z[i]).pow(2).mean()
                for name, states in heads.items():
                    said = model.unembed(states[i]).log_softmax(-1)
                    wanted = logits[i].softmax(-1)
                    hard = -said[logits[i].argmax()]
                    term = hard if config.targets == "argmax" else F.kl_div(said, wanted, reduction="sum")
                    loss = loss + getattr(config.loss, name) * term
                total, weights = total + config.loss.position_decay**i * loss, weights + config.loss.position_decay**i
    return total / weights


CASES = {
    "gated, hard": ("lora", {}, 5),
    "gated, soft, without a sampler head": ("lora", {"targets": "distribution", "sampler": False}, 3),
    "gated, one mask token": ("lora", {"targets": "distribution"}, 2),
    "gated, unequal weights": (
        "lora",
        {"targets": "distribution", "loss": {"sampler_head": 2.0, "consistency": 3.0, "position_decay": 0.7}},
        4,
    ),
    "gated, little memory": ("lora", {"gradient_checkpointing": True, "logit_rows": 5}, 4),
    "full, little memory": ("full", {"gradient_checkpointing": True, "logit_rows": 5}, 4),
    "full, hard": ("full", {}, 5),
    "full, soft": ("full", {"targets": "distribution"}, 4),
    "full, with consistency": ("full", {"loss": {"consistency": 0.5}}, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_loss_and_gradients_are_those_of_separate_forwards(case: str) -> None:
    tuning, options, k = CASES[case]
    model = student_of(config_of(tuning, **options))
    inputs = batch(k, (24, 14))
    inputs["prefix_lengths"] = torch.stack([inputs["prefix_lengths"][0], torch.tensor([2, 6, 13])])
    inputs["answers"] = torch.ones(2, 24, dtype=torch.bool)
    inputs["answers"][0, int(inputs["prefix_lengths"][0, 1]) + 1] = False  # the second group may draft one token
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses, gradients = [], []
    for loss in (model(**inputs)["loss"], naive_loss(model, inputs)):
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for name, packed, naive in zip(trained, *gradients, strict=True):
        assert naive is not None, name
        assert naive.abs().max() > 1e-5, name
        torch.testing.assert_close(packed, naive, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_layout_is_the_papers_regions() -> None:
    """Regions of real tokens and masks in one sequence; masked tokens come again with their positions in the next region."""
    regions, region, k = 3, 8, 4
    model = student_of(config_of("full"))
    assert isinstance(model, FullStudent)
    ids, P = batch(k)["input_ids"][0], region - (k - 1)
    tokens, positions, number, is_mask = [], [], [], []
    for r in range(regions):
        tokens += [*ids[r * P : (r + 1) * P].tolist(), *[model.mask_token_id] * (k - 1)]
        positions += range(r * P, r * P + region)
        number += [r] * region
        is_mask += [False] * P + [True] * (k - 1)
    row, where, mask = torch.arange(regions * region), torch.tensor(number), torch.tensor(is_mask)
    seen = (row[:, None] >= row) & (~mask | (mask[:, None] & (where[:, None] == where)))
    bias = torch.zeros(1, 1, len(row), len(row)).masked_fill(~seen, torch.finfo(torch.float32).min)
    packed = model.base.get_decoder()(
        input_ids=torch.tensor([tokens]), position_ids=torch.tensor([positions]), attention_mask=bias, use_cache=False
    ).last_hidden_state[0]
    real, cache = model.read_real(ids[None, : regions * P])
    z = model.mask_states(torch.tensor([[P, 2 * P, 3 * P]]), k - 1, cache, real)
    torch.testing.assert_close(packed[~mask], real[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[mask], z[0].flatten(0, 1), atol=1e-5, rtol=1e-5)


def trained(config: TrainConfig, steps: int = 3) -> tuple[Student, list[float]]:
    """A student after some steps, and its losses."""
    model = student_of(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(steps):
        loss = model(**batch(4))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_training_a_gated_student_leaves_every_bit_of_the_base_and_moves_the_rest() -> None:
    before = {name: p.clone() for name, p in tiny_base().named_parameters()}
    start = student_of(config_of()).trainable()
    model, losses = trained(config_of())
    assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())
    assert not [name for name, tensor in model.trainable().items() if torch.equal(tensor, start[name])]
    assert losses[-1] < losses[0]
    ids = batch(4)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.base(ids).logits, tiny_base()(ids).logits)


def test_training_a_full_student_moves_all_of_it_and_nothing_of_its_teacher() -> None:
    start = student_of(config_of("full"))
    model, losses = trained(config_of("full"))
    assert losses[-1] < losses[0]
    assert not [name for name, tensor in model.trainable().items() if torch.equal(tensor, start.trainable()[name])]
    for name, parameter in model.teacher.named_parameters():
        assert torch.equal(parameter, start.teacher.get_parameter(name)), name


def test_neither_teacher_nor_student_says_what_is_no_token() -> None:
    model = student_of(config_of("full"))
    assert isinstance(model, FullStudent)
    with torch.no_grad():
        for weight in (model.base.get_input_embeddings().weight, model.teacher.get_input_embeddings().weight):
            weight[model.mask_token_id] = 100 * weight[5]  # tied: its logit is the largest or the smallest
            weight[-1] = -weight[model.mask_token_id]
    states = torch.randn(50, 32)
    assert model.unembed(states).argmax(-1).min() >= TOKENS  # so the test can fail
    assert model.best(states).max() < TOKENS
    assert model.predict(states).softmax(-1)[:, TOKENS:].sum() == 0


# -- rows ------------------------------------------------------------------------------------------------------------------


def no_chats(stream: torch.Tensor) -> Corpus:
    return Corpus(stream, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.bool), torch.tensor([0]))


def test_a_step_has_one_number_of_masks_and_one_offset_and_steps_have_all_of_them() -> None:
    config = tiny_config(recipe="self-distill", mask_tokens=4, length=24, groups=3, batch_size=3, steps=200)
    data = Sequences(no_chats(torch.arange(500)), None, config)
    drawn = set()
    for step in range(200):
        items = [data[3 * step + i] for i in range(3)]
        k, first = len(items[0]["slots"]), int(items[0]["prefix_lengths"][0])
        drawn.add((k, first))
        region = 8 - (k - 1)  # real tokens of a region of 24 / 3 rows
        for item in items:
            assert item["prefix_lengths"].tolist() == [first, first + region, first + 2 * region]
            assert len(item["slots"]) == k
        assert first + 2 * region + k - 1 <= 24
    assert drawn == {(k, first) for k in (2, 3, 4, 5) for first in range(1, 8 - (k - 1) + 1)}
    assert len({tuple(data[i]["input_ids"].tolist()) for i in range(3)}) > 1


def test_regions_of_chats_end_in_answers() -> None:
    answers = torch.zeros(40, dtype=torch.bool)
    answers[6:14] = answers[20:37] = True
    chats = Corpus(torch.empty(0, dtype=torch.long), torch.arange(40), answers, torch.tensor([0, 40]))
    config = tiny_config(recipe="self-distill", mask_tokens=4, length=40, groups=5, batch_size=1, steps=50)
    data = Sequences(chats, None, config)
    for i in range(50):
        item = data[i]
        assert item["answers"][item["prefix_lengths"]].all()
        assert item["answers"][item["prefix_lengths"] + 1].all()


# -- the mask token --------------------------------------------------------------------------------------------------------


def test_a_mask_token_takes_an_unused_slot_or_makes_one() -> None:
    base = tiny_base()
    before = base.get_input_embeddings().weight.detach().clone()
    assert add_mask_token(base, 50, None) == 50
    assert base.config.vocab_size == TOKENS
    changed = (base.get_input_embeddings().weight != before).any(-1).nonzero().flatten()
    assert changed.tolist() == [50]
    assert add_mask_token(base, 50, 57) == 57
    grown = copy.deepcopy(base)
    assert add_mask_token(grown, TOKENS, None) == TOKENS
    assert grown.config.vocab_size == grown.get_input_embeddings().num_embeddings == 64
    assert torch.equal(grown.get_input_embeddings().weight[:TOKENS], base.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="mask_token_id=62 is no slot of the base's vocabulary of 61"):
        add_mask_token(base, TOKENS, 62)


def test_a_mask_token_is_drawn_with_mean_and_covariance_of_the_embeddings() -> None:
    base = tiny_base(vocab_size=4000)
    weight = base.get_input_embeddings().weight
    with torch.no_grad():
        weight[:, 1] = 3 * weight[:, 0] + 5
    drawn = []
    for _ in range(400):
        add_mask_token(base, 3999, None)
        drawn.append(weight[3999].detach().clone())
    found = torch.stack(drawn)
    torch.testing.assert_close(found.mean(0), weight[:3999].mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(found.T.cov(), weight[:3999].T.cov(), atol=0.08, rtol=0.15)


# -- options ---------------------------------------------------------------------------------------------------------------


def test_each_recipe_has_its_defaults_and_what_is_given_wins() -> None:
    given = {"base": "b", "data": "d", "output": "o"}
    gated = TrainConfig.model_validate(given)
    distilled = TrainConfig.model_validate({**given, "recipe": "self-distill"})
    full = TrainConfig.model_validate({**given, "recipe": "self-distill", "tuning": "full"})
    own = {**given, "recipe": "self-distill", "targets": "distribution", "groups": 8, "loss": {"consistency": 2, "plain_head": 3}}
    chosen = TrainConfig.model_validate(own)
    assert (gated.targets, gated.groups, gated.loss.consistency, gated.sampler) == ("distribution", 32, 1, True)
    assert (distilled.targets, distilled.groups, distilled.loss.consistency, distilled.sampler) == ("argmax", 16, 0, True)
    assert (full.targets, full.learning_rate, full.sampler) == ("argmax", 1e-5, False)
    assert (chosen.targets, chosen.groups, chosen.loss.consistency, chosen.loss.plain_head) == ("distribution", 8, 2, 3)
    assert TrainConfig.model_validate(distilled.model_dump()) == distilled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning": "full"}, "tuning=full is for recipe=self-distill"),
        ({"recipe": "self-distill", "tuning": "full", "rank": 4}, "rank is for an adapter"),
        ({"recipe": "self-distill", "tuning": "full", "sampler": True}, "has no sampler head"),
        ({"recipe": "self-distill", "mask_token_id": 4}, "mask_token_id is for tuning=full"),
        ({"recipe": "self-distill", "targets": "text"}, "learns nothing of the text"),
        ({"recipe": "self-distill", "groups": 32}, "a region of length=256 / groups=32 rows has no place for a token and 8 mask"),
    ],
)
def test_options_that_do_not_fit_the_recipe_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"base": "b", "data": "d", "output": "o", **options})
