"""Reading, splitting, tokenising and packing the demo's text."""

import json

import pytest
import torch

from fusetune.demo import data


def chat(*texts):
    return data.alternate(list(texts))


def test_corpus_is_split_by_question():
    documents = data.load_documents(None)
    train, held_out = data.split(documents, 0.1, seed=0)
    questions = [{d[0]["content"].lower() for d in part} for part in (train, held_out)]
    assert not questions[0] & questions[1]
    assert 0.05 < len(questions[1]) / (len(questions[0]) + len(questions[1])) < 0.15
    assert all(d in documents for d in train + held_out)
    assert data.split(documents, 0.1, seed=0) == (train, held_out)
    assert data.split(documents, 0.1, seed=1) != (train, held_out)


def test_only_the_assistant_is_learnt(tokenizer):
    tokenizer.chat_template = data.CHAT_TEMPLATE
    ids, labels = data.encode(chat("Hi", "Hello", "Bye", "So long"), tokenizer)
    learnt = [i for i, label in zip(ids, labels, strict=True) if label != data.IGNORED]
    assert tokenizer.decode(learnt) == "Hello\nSo long\n"
    assert all(label in (i, data.IGNORED) for i, label in zip(ids, labels, strict=True))


def test_plain_text_is_learnt_whole(tokenizer):
    ids, labels = data.encode("some text", tokenizer)
    assert labels == ids
    assert tokenizer.decode(ids) == "some text<end>"


def test_rows_keep_documents_whole_and_apart(tokenizer):
    texts = ["a" * 9, "b" * 9, "c" * 30, "d"]
    packed = data.PackedText(texts, tokenizer, seq_len=24)
    assert packed.input_ids.shape[1] == 24
    decoded = "|".join(tokenizer.decode(row) for row in packed.input_ids)
    assert decoded.startswith("aaaaaaaaa<end>bbbbbbbbb<end>")
    assert decoded.count("c") == 30
    starts = packed.position_ids == 0
    assert (packed.labels[starts] == data.IGNORED).all()  # nothing predicts a first token
    learnt = packed.labels != data.IGNORED
    assert (packed.labels[learnt] == packed.input_ids[learnt]).all()
    assert packed.n_tokens == sum(len(t) + 1 for t in texts) - 5  # four documents, one cut in two


def test_documents_of_a_row_do_not_see_each_other(tokenizer, model_folder):
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(model_folder).eval()
    packed = data.PackedText(["first document", "second"], tokenizer, seq_len=32)
    assert len(packed) == 1
    alone = data.PackedText(["second"], tokenizer, seq_len=8)
    with torch.no_grad():
        both = model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
        ).logits
        single = model(input_ids=alone.input_ids[:, :7]).logits
    start = len("first document") + 1
    torch.testing.assert_close(both[:, start : start + 7], single)


def test_batches_depend_on_seed_and_step_only(tokenizer):
    packed = data.PackedText([f"text {n}" for n in range(10)], tokenizer, seq_len=8)
    cpu = torch.device("cpu")

    def batch(step, seed=0):
        return packed.batch(step, 2, seed, cpu)["input_ids"]

    assert (batch(7) == batch(7)).all()
    assert (batch(7) != batch(7, seed=1)).any()
    epoch = torch.cat([batch(step) for step in range(5)])
    assert sorted(epoch.tolist()) == sorted(packed.input_ids.tolist())


LINES = {
    "text": {"text": "some text"},
    "pair": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("kind", LINES)
def test_jsonl(tmp_path, kind):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(LINES[kind]) + "\n\n")
    (document,) = data.load_documents(path)
    assert document in ("some text", chat("a", "b"), chat("a"))


BAD = {
    "missing.txt": (None, "cannot read"),
    "empty.txt": ("  \n\n ", "holds no text"),
    "latin.txt": (b"\xff\xfe\x00x", "UTF-8"),
    "broken.jsonl": ('{"text": "a"}\n{"text', "line 2 is not JSON"),
    "list.jsonl": ("[1]", "not a JSON object"),
    "other.jsonl": ('{"texts": "a"}', "line 1 has none of"),
    "roles.jsonl": ('{"messages": [{"role": "user"}]}', "line 1 has none of"),
    "other.yml": ("a: 1", "conversations"),
    "broken.yml": ("a: [", "conversations"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        data.load_documents(path)
    assert name in str(error.value)


def test_nothing_to_hold_out_or_to_learn(tokenizer):
    with pytest.raises(ValueError, match="2 or more"):
        data.split(["one"], 0.1, 0)
    tokenizer.chat_template = data.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="no token to learn"):
        data.PackedText([chat("a question only")], tokenizer, 64)
