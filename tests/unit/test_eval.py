"""`vllm-mtp eval`: by domain and k, the figures of the reference decoder, on the screen, in JSON and as a picture."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from tests.unit.tiny_models import save_tiny_base, tiny_config, tiny_masked_model
from vllm_mtp.cli.eval import positions, print_report, tokens_per_forward
from vllm_mtp.cli.main import app
from vllm_mtp.outputs import Output, figures
from vllm_mtp.reference import ReferenceModel
from vllm_mtp.train.export import export

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "why?"}]
TEXTS = ["some text to go on with", "x = [1, 2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter for it, and two domains."""
    folder = tmp_path_factory.mktemp("eval")
    save_tiny_base(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = tiny_masked_model(tiny_config(base=folder / "base", loss={"plain_head": 0}), base)
    export(model, folder / "adapter", {})
    (folder / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\nbad\n")
    (folder / "code").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "code" / f"{i}.txt").write_text(text)
    return folder


def evaluate(folder: Path, *words: object) -> Result:
    """The command's end, over the domains `code` and `chats`."""
    domains = ("--data", folder / "code", "--data", folder / "chats.jsonl")
    arguments = ("eval", folder / "adapter", "--base", folder / "base", *domains, *words)
    return CliRunner().invoke(app, [str(word) for word in arguments])


def test_figures_are_those_of_the_reference_decoder(folder: Path, tmp_path: Path) -> None:
    report_file, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    result = evaluate(folder, "--max-tokens", 24, "--prompt-tokens", 9, "--json", report_file, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "left out 1 bad lines" in result.stderr
    report = json.loads(report_file.read_text())
    assert report["domains"].keys() == {"code", "chats"}

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    reference = ReferenceModel.from_folder(folder / "base", folder / "adapter")
    prompts = {"code": [text[:9] for text in TEXTS], "chats": ["user: 2+2?\nassistant: "]}
    for domain, texts in prompts.items():
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert len(report["domains"][domain]) == 2 * 2 * 3
        for row in report["domains"][domain]:
            if row["head"] == "sampler":
                wanted = [Output(*reference.decode(some, 24, row["k"], row["layout"], 1)) for some in ids]
                assert row["figures"] == json.loads(json.dumps(figures(wanted)))
    first = [tokens_per_forward(report, domain, "quadratic", "sampler", 3) for domain in prompts]
    assert tokens_per_forward(report, "average", "quadratic", "sampler", 3) == pytest.approx(sum(first) / 2)  # type: ignore[arg-type]
    assert sum(positions(report, "code")) + 1 == pytest.approx(first[0])
    for words in ("quadratic, sampler head", "linear, plain head", "average", f"{first[1]:.2f}", "loop"):
        assert words in " ".join(result.stdout.split())  # titles are broken at their table's width
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_outputs_that_end_at_once_are_explained() -> None:
    """As with documents that are shorter than a prompt may be."""
    for tokens, said in ([7], True), ([7, 8, 9], False):
        row = {"layout": "linear", "head": "plain", "k": 1, "figures": figures([Output(tokens, [1] if said else [1, 2])])}
        text = io.StringIO()
        print_report(Console(file=text), {"domains": {"short": [row]}})
        assert ("Every output of short ends with its first token" in text.getvalue()) is said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-k", 4], "-k is to be from 1 to 3, the adapter's number of mask tokens."),
        (["--data", "missing"], "missing does not exist"),
        (["--json", "/nowhere/eval.json", "--max-tokens", 4, "-k", 1], "/nowhere/eval.json could not be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, words: list[object], message: str) -> None:
    result = evaluate(folder, *words)
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert message in line


@pytest.mark.parametrize("words", [["--layout", "diagonal"], ["--tau", "0.9"], ["--engine", "vllm", "--tau", "-1"]])
def test_wrong_usage_is_told_from_failure(folder: Path, words: list[str]) -> None:
    assert evaluate(folder, *words).exit_code == 2
