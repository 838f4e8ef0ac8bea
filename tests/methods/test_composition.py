"""Compositions: what is refused, what is equal to what; numbers are compared in test_oracle.py."""

import pytest
import torch
from adapter_models import adapted, houlsby, parallel, pfeiffer, randomise
from peft import get_peft_model
from tiny_models import bert

import fusetune
from fusetune import ops
from fusetune.methods import Average, BatchSplit, BottleneckConfig, Fuse, Parallel, Split, Stack

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name")
NAMES = ("first", "second", "third")


def run(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


def three(config=pfeiffer, **options):
    return adapted("bert", config, names=NAMES, **options)


BAD = [
    ("nobody", "there is no adapter 'nobody'"),
    (["first", "nobody"], "there is no adapter 'nobody'"),
    (Stack("first", BatchSplit("second", "nobody", batch_sizes=1)), "there is no adapter"),
    (Fuse("first", "second"), "no fusion of"),
    (Fuse("first", "second", name="third"), "is no fusion of"),
    (Parallel(Parallel("first"), "second"), "Parallel is not allowed in"),
    (BatchSplit(Parallel("first"), batch_sizes=2), "Parallel is not allowed in"),
    (Stack(Stack("first")), "Stack is not allowed in"),
    (Stack(Parallel("first"), Parallel("second")), "one Parallel only"),
    (Average("first", Fuse("second")), "Fuse is not allowed in"),
    (Fuse(Stack("first", Average("second")), "third"), "a Stack in a Fuse is of adapters only"),
]


@pytest.mark.parametrize(("tree", "message"), BAD, ids=[str(tree) for tree, _ in BAD])
def test_a_bad_composition_leaves_the_old_one(tree, message):
    model, inputs = three()
    fusetune.compose(model, Stack("second", "first"))
    expected, before = run(model, inputs), model.base_model.composition
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for activate in (
        lambda: fusetune.compose(model, tree),
        lambda: model.base_model.set_adapter(tree),
    ):
        with pytest.raises(ValueError, match=message):
            activate()
        assert model.base_model.composition is before
        assert torch.equal(run(model, inputs), expected)
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_bad_arguments():
    with pytest.raises(ValueError, match="splits must be a number or 2 numbers"):
        Split("a", "b", splits=[1])
    with pytest.raises(ValueError, match="batch_sizes must be"):
        BatchSplit("a", "b", batch_sizes=[1, -1])
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        Average("a", "b", weights=[1.0])
    with pytest.raises(ValueError, match="weights must not sum to zero"):
        Average("a", "b", weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="needs at least one"):
        Stack()
    with pytest.raises(TypeError, match="is no name and no composition"):
        Stack(3)
    with pytest.raises(TypeError, match="must have bottleneck adapters"):
        fusetune.compose(torch.nn.Linear(2, 2), "a")
    model, _ = three()
    with pytest.raises(ValueError, match="trainable"):
        fusetune.compose(model, "first", trainable=["second"])


def test_sizes_that_do_not_sum():
    model, inputs = three()
    fusetune.compose(model, BatchSplit("first", "second", batch_sizes=[1, 2]))
    with pytest.raises(ValueError, match="batch_sizes must sum to the batch, 2"):
        run(model, inputs)
    fusetune.compose(model, Split("first", "second", splits=[4, 4]))
    with pytest.raises(ValueError, match="splits must sum to the sequence's length, 12"):
        run(model, inputs)


def test_adapters_side_by_side_must_end_alike():
    model, _ = adapted("bert", pfeiffer, names=("first",))
    model.add_adapter("second", pfeiffer(original_ln_after=False))
    with pytest.raises(ValueError, match="original_ln_after"):
        fusetune.compose(model, Average("first", "second"))


@pytest.mark.parametrize("config", [pfeiffer, houlsby, parallel])
def test_parts_of_a_batch_equal_the_adapters_alone(config):
    """With train_layer_norm each adapter has norms of its own, which do not go side by side."""
    changes = {"train_layer_norm": False} if config is houlsby else {}
    model, inputs = three(lambda: config(**changes))
    alone = {}
    for name in NAMES:
        model.set_adapter(name)
        alone[name] = run(model, inputs)
    fusetune.compose(model, BatchSplit("second", "first", batch_sizes=1))
    expected = torch.stack((alone["second"][0], alone["first"][1]))
    assert torch.allclose(run(model, inputs), expected, atol=1e-5)
    fusetune.compose(model, Parallel(*NAMES))
    expected = torch.cat([alone[name] for name in NAMES])
    assert torch.allclose(run(model, inputs), expected, atol=1e-5)
    fusetune.compose(model, Average("first", "first", weights=[3, 5]))
    assert torch.allclose(run(model, inputs), alone["first"], atol=1e-5)


def test_one_call_serves_adapters_of_one_size(monkeypatch):
    model, inputs = three()
    rows = []
    original = ops.bottleneck

    def counting(*args, **kwargs):
        rows.append(kwargs.get("rows"))
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "bottleneck", counting)
    fusetune.compose(model, Parallel(*NAMES))
    run(model, inputs)
    assert rows == [[24, 24, 24]] * 4  # two layers, two locations
    rows.clear()
    model.add_adapter("wide", pfeiffer(reduction_factor=4))
    fusetune.compose(model, BatchSplit("first", "wide", batch_sizes=1))
    run(model, inputs)
    assert rows == [None] * 8


@pytest.mark.parametrize(
    "tree",
    [
        BatchSplit("first", "second", batch_sizes=1),
        BatchSplit("second", "first", batch_sizes=1),
        Split("first", "second", splits=6),
        Average("first", "second"),
        Parallel("second", "first"),
    ],
    ids=str,
)
def test_an_adapter_that_is_not_everywhere(tree):
    """Where it is not, its part is the sub-layer's own output; adapters crashes."""
    base, inputs = bert()
    model = get_peft_model(base, houlsby(train_layer_norm=False, leave_out=[1]), "first")
    model.add_adapter("second", houlsby(train_layer_norm=False))
    randomise(model).eval()
    zeroed, _ = bert()
    zeroed.load_state_dict(
        {
            k.replace("base_layer.", ""): v
            for k, v in model.base_model.model.state_dict().items()
            if ".bn_" not in k
        }
    )
    zeroed = get_peft_model(zeroed, houlsby(train_layer_norm=False), "first")
    zeroed.add_adapter("second", houlsby(train_layer_norm=False))
    zeroed.eval()
    mine, theirs = dict(model.named_parameters()), dict(zeroed.named_parameters())
    for key, parameter in theirs.items():
        # An adapter of zeros adds nothing to h.
        parameter.data.copy_(mine[key]) if key in mine else parameter.data.zero_()
    fusetune.compose(model, tree)
    fusetune.compose(zeroed, tree)
    assert torch.allclose(run(model, inputs), run(zeroed, inputs), atol=1e-5)


def test_peft_s_list_is_a_stack():
    model, inputs = three()
    fusetune.compose(model, Stack("second", "first"))
    expected = run(model, inputs)
    assert model.active_adapters == ["second", "first"]
    model.set_adapter("third")
    assert not torch.equal(run(model, inputs), expected)
    model.base_model.set_adapter(["second", "first"])
    assert torch.equal(run(model, inputs), expected)


def test_trainable_stays_through_disabling():
    model, _ = three()
    fusetune.compose(model, Stack("first", "second"), trainable=["second"])
    for _ in range(2):
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(".second." in n for n in trained)
        with model.disable_adapter():
            assert not any(p.requires_grad for p in model.parameters())


def test_a_stack_uses_the_last_copy_of_a_saved_module():
    name = "cls.predictions.transform.dense"
    base, inputs = bert()
    model = get_peft_model(base, pfeiffer(modules_to_save=[name]), "first")
    model.add_adapter("second", pfeiffer(modules_to_save=[name]))
    randomise(model).eval()
    wrapper = model.base_model.model.get_submodule(name)
    fusetune.compose(model, Stack("first", "second"))
    assert wrapper.active_adapters == ["second"]
    expected = run(model, inputs)
    with pytest.raises(ValueError, match="modules_to_save"):
        fusetune.compose(model, Average("first", "second"))
    assert torch.equal(run(model, inputs), expected)


def test_an_adapter_in_use_is_not_deleted():
    model, inputs = three()
    fusetune.compose(model, Stack("first", "second"))
    expected = run(model, inputs)
    with pytest.raises(ValueError, match="is part of"):
        model.delete_adapter("first")
    assert torch.equal(run(model, inputs), expected)
    model.delete_adapter("third")
    assert torch.equal(run(model, inputs), expected)


def test_adding_an_adapter_keeps_the_composition():
    model, inputs = three()
    fusetune.compose(model, BatchSplit("first", "second", batch_sizes=1))
    expected = run(model, inputs)
    model.add_adapter("more", BottleneckConfig.houlsby())
    assert torch.equal(run(model, inputs), expected)


def test_parallel_repeats_labels_and_positional_inputs():
    model, inputs = three()
    model.set_adapter("first")
    first = model(**inputs).loss
    model.set_adapter("second")
    second = model(**inputs).loss
    fusetune.compose(model, Parallel("first", "second"))
    assert torch.allclose(model(**inputs).loss, (first + second) / 2, atol=1e-5)
    assert model(inputs["input_ids"]).logits.shape[0] == 4
    with model.disable_adapter():
        assert model(inputs["input_ids"]).logits.shape[0] == 2


def test_peft_s_mixed_batch_is_refused():
    """PEFT drops the argument in silence for other methods than LoRA."""
    model, inputs = three()
    with pytest.raises(ValueError, match="adapter_names is for LoRA"):
        model(input_ids=inputs["input_ids"], adapter_names=["first", "second"])


def test_parallel_with_a_cache_is_refused():
    model, inputs = adapted("llama", pfeiffer, names=("first", "second"))
    fusetune.compose(model, Parallel("first", "second"))
    with pytest.raises(ValueError, match="activate BatchSplit instead"):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
