"""What is learned from: documents, chats, bad lines, sequences with their groups, and what the base continues."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.unit.tiny_models import save_tiny_base, tiny_base, tiny_config, tiny_tokenizer
from vllm_mtp.train.data import Corpus, Sequences, first_prompts, read_corpus
from vllm_mtp.train.documents import BadLines, DataError, Document, read_documents
from vllm_mtp.train.on_policy import end_tokens, on_policy_sequences

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}
AGAIN, LONGER = {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "Yes, I am sure of it."}
CHAT = [USER, ASSISTANT, AGAIN, LONGER]
CHAT_TEXT = "user: 2+2?\nassistant: It is 4.</s>\nuser: sure?\nassistant: Yes, I am sure of it.</s>\n"
THINKING = (  # writes thoughts of the last answer only, and ends a prompt with the mark that opens them
    "{% for m in messages %}{{ m.role }}: {{ m.thoughts if loop.last and m.thoughts }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>{% endif %}"
)


def of_texts(stream: torch.Tensor) -> Corpus:
    """A corpus without chats."""
    none = torch.empty(0, dtype=torch.long)
    return Corpus(stream, none, none.bool(), torch.zeros(1, dtype=torch.long))


def of_chats(*chats: list[dict[str, str]], texts: tuple[str, ...] = ()) -> Corpus:
    """A corpus of chats and texts."""
    documents = [Document(content, f"line {i}") for i, content in enumerate([*chats, *texts])]
    return read_corpus(tiny_tokenizer(), documents, (1,), 0, BadLines(strict=True))


def answers_of(corpus: Corpus) -> list[str]:
    """Each chat with what is no answer left out."""
    tokenizer, found = tiny_tokenizer(), []
    for begin, end in zip(corpus.starts, corpus.starts[1:], strict=False):
        found.append(tokenizer.decode(corpus.chats[begin:end][corpus.answers[begin:end]]))
    return found


def lines(path: Path, *rows: object) -> Path:
    """A .jsonl file."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# -- reading -----------------------------------------------------------------------------------------------------------


def test_documents_are_read_from_lines_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a = 1\n")
    (tmp_path / "code" / "picture.png").write_bytes(b"\xff\xfe\x00")
    file = lines(tmp_path / "lines.jsonl", {"text": "one"}, "", {"messages": CHAT, "id": 7}, '{"text": "a\u2028b"}')
    bad = BadLines(strict=True)
    documents = read_documents((tmp_path / "code", file), bad)
    assert [document.content for document in documents] == ["a = 1\n", "one", CHAT, "a\u2028b"]
    assert documents[2].where == f"{file}, line 3"
    with pytest.raises(DataError, match="not UTF-8"):
        read_documents((tmp_path / "code" / "picture.png",), bad)
    with pytest.raises(DataError, match="does not exist"):
        read_documents((tmp_path / "missing",), bad)


BAD = [
    ("{", "not JSON: .*, column 2"),
    ("[1]", "expected"),
    ({"content": "two"}, "expected"),
    ({"text": None}, "expected"),
    ({"messages": []}, "expected"),
    ({"messages": [{"role": "user"}]}, "expected"),
    ({"messages": [USER]}, "no assistant answers anything"),
    ({"messages": [ASSISTANT, USER]}, "no assistant answers anything"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_line_is_left_out_with_its_number_and_ends_a_strict_run(tmp_path: Path, row: object, reason: str) -> None:
    file, bad = lines(tmp_path / "lines.jsonl", {"text": "one"}, row, {"text": "three"}), BadLines()
    assert [document.content for document in read_documents((file,), bad)] == ["one", "three"]
    assert bad.count == 1
    with pytest.raises(DataError, match=f"line 2: {reason}"):
        read_documents((file,), BadLines(strict=True))


def test_the_first_bad_lines_are_reported_and_all_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = BadLines()
    file = lines(tmp_path / "lines.jsonl", {"text": "one"}, *["{"] * 7)
    file.write_bytes(file.read_bytes() + b'{"text": "\xff"}\n')
    read_documents((file,), bad)
    bad.report("data")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "data: left out 8 bad lines"
    assert [line.partition(": not")[0] for line in said[1:6]] == [f"  {file}, line {n}" for n in range(2, 7)]
    assert said[6:] == ["  and 3 more"]
    BadLines().report("nothing")
    assert not capsys.readouterr().err


def test_data_without_one_good_line_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no text and no chat; .*line 1: expected"):
        read_documents((lines(tmp_path / "lines.jsonl", {"prompt": "x"}),), BadLines())


def test_a_saved_dataset_is_read_by_row_and_its_split_train_by_default(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": []}, {"messages": [USER, ASSISTANT]}])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"test": train}).save_to_disk(tmp_path / "test-only")
    for folder in ("one", "splits"):
        bad = BadLines()
        documents = read_documents((tmp_path / folder,), bad)
        assert [document.content for document in documents] == [CHAT, [USER, ASSISTANT]]
        assert bad.first[0].startswith(f"{tmp_path / folder}, row 2: expected")
    assert len(read_documents((tmp_path / "splits" / "test",), BadLines())) == 1
    with pytest.raises(DataError, match="has the splits test and no train"):
        read_documents((tmp_path / "test-only",), BadLines())


# -- chats -------------------------------------------------------------------------------------------------------------


def test_answers_and_their_end_are_what_is_learned_of_a_chat() -> None:
    corpus = of_chats(CHAT, [USER, ASSISTANT])
    assert answers_of(corpus) == ["It is 4.</s>Yes, I am sure of it.</s>", "It is 4.</s>"]
    assert tiny_tokenizer().decode(corpus.chats[: corpus.starts[1]]) == CHAT_TEXT
    assert [tiny_tokenizer().decode(prompt) for prompt in corpus.prompts()] == [
        "user: 2+2?\nassistant: ",
        CHAT_TEXT.partition("Yes")[0],
        "user: 2+2?\nassistant: ",
    ]


def test_answers_that_the_template_writes_otherwise_later_stand_in_sequences_of_their_own() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    chat = [USER, {**ASSISTANT, "thoughts": "<think>sum</think>"}, AGAIN, {**LONGER, "thoughts": "<think>check</think>"}]
    corpus = read_corpus(tokenizer, [Document(chat, "")], (1,), 0, BadLines(strict=True))
    assert answers_of(corpus) == ["sum</think>It is 4.</s>", "check</think>Yes, I am sure of it.</s>"]
    assert "sum" not in tokenizer.decode(corpus.chats[corpus.starts[1] :])


def test_a_chat_that_the_template_refuses_is_a_bad_line() -> None:
    tokenizer, bad = tiny_tokenizer(), BadLines()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    system = {"role": "system", "content": "be brief"}
    assert not len(read_corpus(tokenizer, [Document([system, *CHAT], "a, line 3")], (1,), 0, bad).chats)
    assert bad.first == ["a, line 3: the chat template refuses it: no system here"]
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    read_corpus(tokenizer, [Document(CHAT, "a, line 4")], (1,), 0, bad)
    assert "changes how those before it are written" in bad.first[1]


def test_chats_need_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="line 1 is a chat, and the base's tokenizer has no chat template"):
        read_corpus(tokenizer, [Document(CHAT, "line 1")], (1,), 0, BadLines())


def test_prompts_of_an_evaluation_are_beginnings_of_texts_and_first_questions() -> None:
    documents = [Document("some text", "a"), Document(CHAT, "b"), Document("", "c")]
    prompts = first_prompts(tiny_tokenizer(), documents, 6, (1,), BadLines(strict=True))
    assert [tiny_tokenizer().decode(prompt) for prompt in prompts] == ["some t", "user: 2+2?\nassistant: "]


def test_end_tokens_are_the_tokenizers_and_those_of_the_bases_settings() -> None:
    base = tiny_base()
    base.generation_config.eos_token_id = [7, 1]
    assert end_tokens(tiny_tokenizer(), base.generation_config) == (1, 7)
    base.generation_config.eos_token_id = None
    assert end_tokens(tiny_tokenizer(), base.generation_config) == (1,)


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_sequences_depend_on_seed_and_index_alone_and_groups_have_labels() -> None:
    corpus = of_texts(torch.arange(200))
    on_policy = {
        "input_ids": torch.arange(1000, 1040).view(2, 20),
        "lengths": torch.tensor([20, 11]),
        "prompt_lengths": torch.tensor([6, 8]),
    }
    data = Sequences(corpus, on_policy, tiny_config(on_policy=0.5))
    kinds = set()
    for index in range(40):
        item = data[index]
        assert all(torch.equal(value, data[index][name]) for name, value in item.items())
        continued = bool(item["input_ids"][0] >= 1000)
        kinds.add(continued)
        first = {20: 6, 11: 8}[int(item["lengths"])] if continued else 1
        assert item["prefix_lengths"].shape == (5,)
        assert int(item["prefix_lengths"].min()) >= first
        assert int(item["prefix_lengths"].max()) <= int(item["lengths"]) - 2
    assert kinds == {True, False}
    other = Sequences(corpus, on_policy, tiny_config(on_policy=0.5, seed=1))
    assert not torch.equal(data[0]["prefix_lengths"], other[0]["prefix_lengths"])


@pytest.mark.parametrize("length", [20, 100])
def test_groups_of_a_chat_stand_in_answers_alone(length: int) -> None:
    corpus, tokenizer = of_chats(CHAT, [USER, ASSISTANT]), tiny_tokenizer()
    data = Sequences(corpus, None, tiny_config(length=length, steps=100))
    found = set()
    for index in range(60):
        item = data[index]
        ids, answers, prefixes = item["input_ids"], item["answers"], item["prefix_lengths"]
        assert len(ids) == len(answers) == length
        assert answers[prefixes].all()
        assert answers[prefixes + 1].all()
        assert int(prefixes.min()) >= 1
        assert not answers[int(item["lengths"]) :].any()
        assert tokenizer.decode(ids[: int(item["lengths"])]) in CHAT_TEXT
        found |= {tokenizer.decode(ids[p : p + 2]) for p in prefixes}
    assert {"It", "4.", ".</s>", "Ye", "re"} <= found
    assert not {"us", "as", "2+", ": "} & found


def test_texts_and_chats_are_drawn_by_their_tokens() -> None:
    corpus = of_chats(CHAT, texts=("x" * 60,))
    data = Sequences(corpus, None, tiny_config(length=20, steps=200))
    texts = sum(data[i]["answers"].all().item() and "x" in tiny_tokenizer().decode(data[i]["input_ids"]) for i in range(300))
    assert texts / 300 == pytest.approx(61 / (61 + len(corpus.rows)), abs=0.1)
    assert Sequences(of_chats(CHAT, texts=("short",)), None, tiny_config(length=90)).num_text == 0
    with pytest.raises(DataError, match="has 6 tokens, not one sequence of 20"):
        Sequences(of_chats(texts=("short",)), None, tiny_config(length=20))


# -- what the base continues -------------------------------------------------------------------------------------------


def test_the_base_answers_what_stands_before_each_answer_and_again_by_sampling(tmp_path: Path) -> None:
    save_tiny_base(tmp_path)
    base, corpus = tiny_base(258), of_chats(CHAT, [USER, LONGER])
    config = tiny_config(length=50, on_policy=1.0, on_policy_sequences=24, on_policy_greedy=1.0)
    *_, made = on_policy_sequences(base, corpus, (), config)
    assert isinstance(made, dict)
    prompts = {tuple(ids[:n].tolist()) for ids, n in zip(made["input_ids"], made["prompt_lengths"].tolist(), strict=True)}
    assert {tiny_tokenizer().decode(prompt) for prompt in prompts} == {"user: 2+2?\nassistant: "}  # the other is too long
    assert made["lengths"].tolist() == [50] * 24
    greedy = base.generate(made["input_ids"][:1, :22], max_new_tokens=28, do_sample=False, eos_token_id=None)[0]
    same = [torch.equal(ids, greedy) for ids in made["input_ids"]]
    assert same[:2] == [True, True]
    assert sum(same) < 5


def test_texts_and_questions_are_continued_in_proportion() -> None:
    corpus = of_chats(CHAT, texts=("x" * 150,))
    config = tiny_config(length=40, on_policy=1.0, on_policy_sequences=20)
    *_, made = on_policy_sequences(tiny_base(258), corpus, (), config)
    assert isinstance(made, dict)
    texts = [bool((ids[:5] == ids[0]).all()) for ids in made["input_ids"]]
    assert sum(texts) == 20 - round(20 * len(corpus.rows) / (151 + len(corpus.rows)))


def test_a_base_that_answers_nothing_is_an_error() -> None:
    config = tiny_config(length=40, on_policy=1.0, on_policy_sequences=20)
    with pytest.raises(DataError, match="answers in a row at once"):
        list(islice(on_policy_sequences(tiny_base(258), of_chats([USER, ASSISTANT]), tuple(range(258)), config), 100))
    with pytest.raises(DataError, match="No prompt of the chats fits"):
        list(on_policy_sequences(tiny_base(258), of_chats([USER, ASSISTANT]), (), tiny_config(length=20, on_policy=1.0)))
