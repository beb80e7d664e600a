"""Baselines of the benchmarks: what their trainers write, where they end, and what their chains see."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from benchmarks.baselines.data import sequences
from benchmarks.baselines.draft import ParallelDraft
from benchmarks.baselines.eagle import Eagle
from benchmarks.baselines.evaluate import load
from benchmarks.baselines.train import METHODS, Limits, train
from tests.unit.tiny_models import tiny_tokenizer
from vllm_mtp.train.data import Sequences

OPTIONS = {"draft": {"share": 0.5}, "pard": {"share": 0.5, "masks": 2}, "medusa": {"heads": 3}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers over bytes, with its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    more = {"num_hidden_layers": 4, "initializer_range": 0.2, "tie_word_embeddings": True, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter's run, as far as baselines read it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"line {i}: {i * i}\n" * 4}) + "\n" for i in range(20)))
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(2, 200, (6, 20), generator=generator), torch.tensor([20, 20, 18, 15, 20, 20])
    save_file({"input_ids": ids, "lengths": lengths, "prompt_lengths": torch.full((6,), 8)}, folder / "on_policy.safetensors")
    options = {"data": ["runs/elsewhere/texts.jsonl"], "length": 20, "batch_size": 2, "groups": 5, "on_policy": 0.5, "seed": 3}
    (folder / "options.json").write_text(json.dumps(options))
    return folder


def trained(method: str, base: Path, run: Path, output: Path, limits: Limits, **options: object) -> Path:
    """A run in float32 with the options that fit the base."""
    return train(method, base, [run], output, limits, options=OPTIONS.get(method), bf16=False, log_steps=1, **options)


def tensors_of(method: str) -> set[str]:
    """What vLLM's loader of each method looks for, where it cannot be said of transformers."""
    matrices = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    if method == "medusa":
        return {f"{part}.weight" for i in range(3) for part in (f"blocks.{i}.layers.0", f"lm_heads.{i}")}
    if method == "eagle":
        return {"fc.weight", *(f"layers.0.{name}.weight" for name in (*matrices, "post_attention_layernorm"))}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {f"{part}.weight" for part in ("fc", "norm", "lm_head", *(f"midlayer.{name}" for name in (*matrices, *norms)))}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_writes_the_folder_that_vllm_loads_and_what_it_took(method: str, base: Path, run: Path, tmp_path: Path) -> None:
    folder = trained(method, base, run, tmp_path, Limits(steps=3))
    stored, figures = load_file(folder / "model.safetensors"), json.loads((folder / "training.json").read_text())
    if method in ("draft", "pard"):
        assert LlamaForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    else:
        assert stored.keys() == tensors_of(method)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert figures["steps"] == 3
    assert 3 * 2 * 15 <= figures["tokens"] <= 3 * 2 * 20
    assert figures["minutes"] > 0
    assert figures["parameters"]["trained"] == figures["parameters"]["stored"] == sum(tensor.numel() for tensor in stored.values())
    model = load(folder, base)
    for name, tensor in model.tensors().items():
        torch.testing.assert_close(tensor.detach(), stored[name].float(), atol=0, rtol=0)
    assert model.drafts(torch.arange(2, 14), 4, 2).shape == (7, 2)


def test_a_killed_run_goes_on_and_counts_on(base: Path, run: Path, tmp_path: Path) -> None:
    whole = trained("medusa", base, run, tmp_path / "whole", Limits(tokens=150))
    assert json.loads((whole / "training.json").read_text())["steps"] == 4  # of at most 40 tokens each
    trained("medusa", base, run, tmp_path / "killed", Limits(steps=2))
    resumed = trained("medusa", base, run, tmp_path / "killed", Limits(tokens=150))
    counts = [json.loads((folder / "training.json").read_text()) for folder in (whole, resumed)]
    assert [(count["steps"], count["tokens"]) for count in counts] == 2 * [(4, counts[0]["tokens"])]


def test_a_run_may_start_from_another_drafter(base: Path, run: Path, tmp_path: Path) -> None:
    first = trained("medusa", base, run, tmp_path / "first", Limits(steps=2))
    second = trained("medusa", base, run, tmp_path / "second", Limits(steps=1), init=first, learning_rate=1e-9)
    for name, tensor in load_file(second / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(first / "model.safetensors")[name], atol=1e-6, rtol=0)
    assert json.loads((second / "training.json").read_text())["before"]["steps"] == 2


def test_minutes_end_a_run(base: Path, run: Path, tmp_path: Path) -> None:
    folder = trained("draft", base, run, tmp_path, Limits(steps=10**6, minutes=0.01))
    assert 0.01 <= json.loads((folder / "training.json").read_text())["minutes"] < 0.1


def test_the_sequences_are_those_of_the_adapters_run(base: Path, run: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ours = sequences([run], base, tmp_path, tokenizer, (1,), {})
    files = [run / "texts.jsonl", run / "on_policy.safetensors"]
    same = sequences(files, base, tmp_path, tokenizer, (1,), {"batch_size": 2, "groups": 5, "on_policy": 0.5, "seed": 3})
    adapters = Sequences(ours.corpus, load_file(files[1]), ours.config.model_copy(update={"mask_tokens": 3, "steps": 7}))
    for i in range(14):
        for other in (same, adapters):
            assert torch.equal(ours[i]["input_ids"], other[i]["input_ids"])
    assert any(any(torch.equal(ours[i]["input_ids"], row) for row in load_file(files[1])["input_ids"]) for i in range(14))


def test_a_chain_of_eagle_sees_the_rows_before_it_and_itself(base: Path) -> None:
    torch.manual_seed(1)
    model = Eagle(LlamaForCausalLM.from_pretrained(base, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in model.layer.parameters():
            parameter.normal_(std=0.3)
    ids, first, k = torch.randint(2, 200, (12,)), 5, 3
    drafts = model.drafts(ids, first, k)
    with torch.no_grad():
        for row in range(first, len(ids) - 1):
            # The definition: a decoder layer over all features so far, the last ones its own, from scratch for each draft.
            features, tokens = model.features(ids[None])[0][:, : row + 1], ids[None, 1 : row + 2]
            for i in range(k):
                x, _ = model.mixed(model.embed(tokens), features)
                positions = torch.arange(x.shape[1])[None]
                mask = create_causal_mask(
                    config=model.base.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
                )
                out = model.layer(x, attention_mask=mask, position_embeddings=model.rotary(x, positions))[:, -1:]
                draft = model.logits(out).argmax(-1)
                assert draft.item() == drafts[row - first, i]
                features, tokens = torch.cat([features, out], 1), torch.cat([tokens, draft], 1)


def test_mask_tokens_of_a_parallel_draft_model_are_those_behind_the_last_token(base: Path) -> None:
    torch.manual_seed(1)
    model = ParallelDraft(LlamaForCausalLM.from_pretrained(base, attn_implementation="eager"), mask_token=0, masks=2, share=0.5)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.normal_(std=0.3)
    ids = torch.randint(2, 200, (12,))
    drafts = model.drafts(ids, 5, 3)
    for row in range(5, len(ids) - 1):
        with torch.no_grad():
            logits = model.model(torch.cat([ids[: row + 2], torch.zeros(2, dtype=torch.long)])[None]).logits[0, -3:]
        assert logits.argmax(-1).tolist() == drafts[row - 5].tolist()
