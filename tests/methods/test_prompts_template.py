"""P-tuning's templates: what stands where, position by position."""

import prompt_models
import pytest
import torch
from prompt_models import assert_equal, base, encoder, logits, prompted

from fusetune.methods import PTuningConfig
from fusetune.methods.prompts.template import Template, extended, fill_rows

P = -7  # a pseudo-token


def filled(template, *pieces):
    return Template.parse(template).fill(pieces, P)


def test_counts_go_around_the_slots():
    assert filled([3, 3, 3], [1, 2], [8]) == [P, P, P, 1, 2, P, P, P, 8, P, P, P]
    assert filled([2, 1], [1, 2]) == [P, P, 1, 2, P]
    assert filled([0, 2], [1, 2]) == [1, 2, P, P]
    assert filled([2], [1, 2]) == [P, P, 1, 2]


def test_parts_written_out():
    template = [2, "{1}", [40, 41], 1, "{0}", 1]
    assert filled(template, [1, 2], [8]) == [P, P, 8, 40, 41, P, 1, 2, P]
    parsed = Template.parse(template)
    assert (parsed.count, parsed.slots, parsed.in_front) == (4, 2, False)
    assert parsed.to_list() == template
    assert Template.parse([4, "{0}"]).in_front
    assert Template.parse([4]).in_front
    assert not Template.parse([4, [9], "{0}"]).in_front
    assert not Template.parse([4, "{0}", 1]).in_front


def test_texts_of_anchors_become_ids():
    template = Template.parse([1, "capital", "{0}", 1]).with_ids(lambda text: [len(text), 0])
    assert template.fill([[5]], P) == [P, 7, 0, 5, P]
    with pytest.raises(ValueError, match="anchor 'capital' has no token ids"):
        filled([1, "capital", "{0}"], [5])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{0}", "must be a list"),
        ([], "each of the slots"),
        ([1, "word"], "each of the slots"),
        ([1, "{1}"], "each of the slots"),
        ([1, "{0}", "{0}"], "each of the slots"),
        (["{0}"], "must have a pseudo-token"),
        ([0, "{0}", [3]], "must have a pseudo-token"),
        ([-1, "{0}"], "cannot be -1"),
        ([1, "{0}", " "], "cannot be empty"),
        ([1, "{0}", []], "a number, a text or token ids"),
        ([1, "{0}", [-3]], "a number, a text or token ids"),
        ([1.5, "{0}"], "a number, a text or token ids"),
        ([True, "{0}"], "a number, a text or token ids"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=message):
        PTuningConfig(template=template)


def test_a_number_of_pieces_that_does_not_fit():
    with pytest.raises(ValueError, match="slots: the template has 2, got 1"):
        filled([1, 1, 1], [2])


def test_the_config_counts():
    assert PTuningConfig(template=[3, 0, 2]).num_virtual_tokens == 5
    assert PTuningConfig(num_virtual_tokens=4).template == [4, "{0}"]
    with pytest.raises(ValueError, match="num_virtual_tokens is 4, but the template has 5"):
        PTuningConfig(num_virtual_tokens=4, template=[3, 2])
    with pytest.raises(ValueError, match="num_virtual_tokens must be a positive integer"):
        PTuningConfig()
    with pytest.raises(ValueError, match="anchor 'is' needs tokenizer_name_or_path"):
        PTuningConfig(template=[1, "is", "{0}"])


# --- rows of a batch -----------------------------------------------------------------------------

IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
LEFT = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])


def test_rows_without_padding():
    got = fill_rows(IDS, None, [P, 50], [P])
    assert got.ids.tolist() == [[P, 50, 1, 2, 3, 0, P], [P, 50, 4, 5, 6, 7, P]]
    assert got.source.tolist() == [[-1, -1, 0, 1, 2, 3, -1]] * 2
    assert got.positions(torch.arange(4)[None]).tolist() == [list(range(7))] * 2


def test_rows_padded_at_the_right():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    got = fill_rows(IDS, mask, [P, 50], [P])
    assert got.ids.tolist() == [[P, 50, 1, 2, 3, P, 0], [P, 50, 4, 5, 6, 7, P]]
    assert got.take(mask, 1).tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
    assert got.take(IDS, -100).tolist() == [
        [-100, -100, 1, 2, 3, -100, 0],
        [-100, -100, 4, 5, 6, 7, -100],
    ]
    assert got.moved(torch.tensor([0, 3])).tolist() == [2, 5]
    assert got.moved(torch.tensor([2, 9])).tolist() == [4, 7]
    assert extended(mask, 3).tolist() == got.take(mask, 1).tolist()


def test_rows_padded_at_the_left():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    got = fill_rows(LEFT, mask, [P, 50], [P])
    assert got.ids.tolist() == [[0, P, 50, 1, 2, 3, P], [P, 50, 4, 5, 6, 7, P]]
    assert got.take(mask, 1).tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert extended(mask, 3).tolist() == got.take(mask, 1).tolist()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert got.positions(positions)[0, 1:].tolist() == [0, 1, 2, 3, 4, 5]
    assert got.positions(positions)[1].tolist() == list(range(7))


# --- in a model ----------------------------------------------------------------------------------


def by_hand(family, model, row, position_ids=None, stock=None):
    """Logits of the stock model for a row of token ids in which None is the next pseudo-token."""
    stock = base(family)[0] if stock is None else stock
    prompt = iter(encoder(model)())
    table = stock.get_input_embeddings().weight
    embedded = torch.stack([next(prompt) if token is None else table[token] for token in row])
    with torch.no_grad():
        return stock(inputs_embeds=embedded[None], position_ids=position_ids).logits[0]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["LSTM", "MLP"])
def test_a_template_around_the_input(family, kind):
    config = PTuningConfig(template=[2, "{0}", [50, 51], 1], encoder_reparameterization_type=kind)
    model, inputs = prompted(family, config)
    got = logits(model, {"input_ids": inputs["input_ids"]})
    for row, ids in zip(got, inputs["input_ids"].tolist(), strict=True):
        assert_equal(row, by_hand(family, model, [None, None, *ids, 50, 51, None]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_template_inside_of_padding(side):
    model, inputs = prompted("llama", PTuningConfig(template=[2, "{0}", [50], 1]))
    ids, mask = prompt_models.padded(inputs["input_ids"], side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert got.shape[1] == ids.shape[1] + 4
    for row, row_ids, row_mask in zip(got, ids, mask, strict=True):
        kept = row_ids[row_mask.bool()].tolist()
        expected = by_hand("llama", model, [None, None, *kept, 50, None])
        row = row[: len(expected)] if side == "right" else row[len(row) - len(expected) :]
        assert_equal(row, expected)


def test_slots_filled_beforehand():
    """Two slots: the input has the pseudo-tokens, as long as it is; -100 at their labels."""
    model, _ = prompted("llama", PTuningConfig(template=[1, 2, 1]))
    config = model.peft_config["default"]
    assert config.pseudo_token_id == 97
    ids = torch.tensor([config.fill([[5, 6], [7]]), config.fill([[8], [9, 10]])])
    assert ids.tolist() == [[97, 5, 6, 97, 97, 7, 97], [97, 8, 97, 97, 9, 10, 97]]
    got = model(input_ids=ids, labels=ids)
    rows = [[None, 5, 6, None, None, 7, None], [None, 8, None, None, 9, 10, None]]
    total, count = 0, 0
    for row, tokens in zip(got.logits, rows, strict=True):
        expected = by_hand("llama", model, tokens)
        assert_equal(row.detach(), expected)
        losses = -expected.log_softmax(-1)
        for place, token in enumerate(tokens[1:]):
            if token is not None:
                total, count = total + losses[place, token], count + 1
    # transformers' loss is in fp32.
    torch.testing.assert_close(got.loss.detach(), (total / count).float())


def test_anchors_by_a_tokenizer_are_saved_as_ids(tmp_path):
    words = prompt_models.tokenizer(tmp_path / "tokenizer")
    model, inputs = prompted(
        "llama", PTuningConfig(template=[1, "w5 w6", "{0}", 1], tokenizer_name_or_path=words)
    )
    assert model.peft_config["default"].template == [1, [5, 6], "{0}", 1]
    ids = inputs["input_ids"]
    got = logits(model, {"input_ids": ids})
    for row, tokens in zip(got, ids.tolist(), strict=True):
        assert_equal(row, by_hand("llama", model, [None, 5, 6, *tokens, None]))


def test_labels_and_loss():
    model, inputs = prompted("llama", PTuningConfig(template=[2, "{0}", 2]))
    got = model(**inputs)
    labels = torch.nn.functional.pad(inputs["labels"], (2, 2), value=-100)
    expected = torch.nn.functional.cross_entropy(
        got.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(got.loss.float(), expected)


def test_gradients_reach_prompt_and_encoder_and_nothing_else():
    model, inputs = prompted("llama", PTuningConfig(template=[2, "{0}", 1]))
    model.train()
    model(**inputs).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".prompt_encoders.default." in name for name in trained)


@pytest.mark.parametrize("template", [[2, 2], [2, "{0}", [50], 1], [2, "{0}"]])
def test_generate(template):
    """Each token as by a run of the whole sequence without a cache; rows padded at the left."""
    model, inputs = prompted("llama", PTuningConfig(template=template))
    ids, mask = prompt_models.padded(inputs["input_ids"], "left")
    with torch.no_grad():
        got = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    stock, _ = base("llama")
    for row, row_mask in zip(got.tolist(), mask, strict=True):
        sequence = Template.parse(template).fill(
            [row[int((row_mask == 0).sum()) : ids.shape[1]]], P
        )
        sequence = [None if token == P else token for token in sequence]
        for token in row[ids.shape[1] :]:
            assert int(by_hand("llama", model, sequence, stock=stock)[-1].argmax()) == token
            sequence.append(token)


def test_generate_from_filled_slots():
    model, _ = prompted("llama", PTuningConfig(template=[1, 2, 1]))
    ids = torch.tensor([model.peft_config["default"].fill([[5, 6], [7]])])
    with torch.no_grad():
        got = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0].tolist()
    sequence = [None, 5, 6, None, None, 7, None]
    for token in got[ids.shape[1] :]:
        assert int(by_hand("llama", model, sequence)[-1].argmax()) == token
        sequence.append(token)


def test_what_a_template_cannot_do():
    model, inputs = prompted("llama", PTuningConfig(template=[1, 1, 1]))
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match=r"the template has 2 slots.*PTuningConfig.fill"):
        model(input_ids=ids)
    marked = ids.clone()
    marked[0, :3], marked[1, :2] = 97, 97
    with pytest.raises(ValueError, match=r"must have 3 pseudo-tokens \(id 97\), got \[3, 2"):
        model(input_ids=marked)
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds: a template needs input_ids"):
        model(inputs_embeds=embedded)
    model, inputs = prompted("llama", PTuningConfig(template=[1, "{0}", 1]))
    ids, mask = prompt_models.padded(inputs["input_ids"], "right")
    with pytest.raises(ValueError, match="padding must be at the left to generate"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="template: 97 is no token of the model"):
        prompted("llama", PTuningConfig(template=[1, "{0}", [97]]))
    with pytest.raises(ValueError, match="pseudo_token_id: give it"):
        PTuningConfig(template=[1, 1]).fill([[3]])
