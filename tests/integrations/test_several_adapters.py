"""Several LoRA adapters at once: active together, or one for each row of a batch."""

import copy
import pickle

import pytest
import tiny_models
import torch
from backends import simulated
from model_equality import assert_near, float64_copy, step
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from tolerance import assert_same

import fusetune
from fusetune import ops

NAMES = ["default", "second", "third"]
ROWS = ["second", "__base__", "default", "second", "third"]
GATE = "base_model.model.model.layers.0.mlp.gate_proj"


def pair(*, four_bit=False, layers=1, dropout=0.0, dtype=torch.float32, fuse=True, **options):
    """(stock, fused, inputs of five rows): a LLaMA with three adapters of different ranks and
    scalings, the third not on all layers, each layer's parameters trained."""
    options = {"lora_dropout": dropout, **options}
    stock, _ = tiny_models.lora_llama(four_bit=four_bit, layers=layers, dtype=dtype, **options)
    targets = "all-linear" if four_bit else ["q_proj", "gate_proj", "down_proj"]
    more = {"init_lora_weights": False, **options}
    second = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=targets, **more)
    stock.add_adapter("second", second)
    stock.add_adapter("third", LoraConfig(r=9, target_modules=["v_proj", "down_proj"], **more))
    stock.set_requires_grad(NAMES)
    fused = copy.deepcopy(stock)
    if fuse:
        fusetune.fuse(fused)
    return stock, fused, tiny_models.token_inputs(batch=5)


def activate_all(*models):
    for model in models:
        model.base_model.set_adapter(NAMES)


def layers_with(model, count):
    """How many layers have at least so many of the adapters."""
    return sum(len(getattr(m, "lora_A", ())) >= count for m in model.modules())


# --- active together ------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
def test_active_together(four_bit, options, calls):
    stock, fused, inputs = pair(four_bit=four_bit, **options)
    activate_all(stock, fused)
    report = fusetune.fuse(fused)
    linears = [row for row in report.rows if row.method.startswith("LoRA")]
    assert len(linears) == 7
    assert all(row.fused for row in linears)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert calls.count("multi_lora_linear") == layers_with(stock, 2)
    assert calls.count("lora_linear") == 7 - layers_with(stock, 2)


@pytest.mark.parametrize("four_bit", [False, True])
def test_active_together_in_bf16(four_bit, calls):
    stock, fused, inputs = pair(four_bit=four_bit, dtype=torch.bfloat16)
    activate_all(stock, fused)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert "multi_lora_linear" in calls


def test_scaling_as_a_tensor(calls):
    """What PEFT makes of it for hotswapping without compiling again."""
    stock, fused, inputs = pair()
    for model in (stock, fused):
        for module in model.modules():
            if "second" in getattr(module, "lora_A", ()):
                module.scaling["second"] = torch.tensor(module.scaling["second"])
    activate_all(stock, fused)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert "multi_lora_linear" in calls


def test_only_trained_adapters_get_gradients():
    stock, fused, inputs = pair()
    activate_all(stock, fused)
    for model in (stock, fused):
        model.set_requires_grad("second", False)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))


def test_each_active_adapter_drops_by_itself(calls):
    """x of ones, A of ones and B picking one output each: how many inputs an adapter has kept."""
    _, fused, _ = pair(dropout=0.5)
    layer = fused.get_submodule(GATE)
    fused.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for i, name in enumerate(("default", "second")):
            layer.lora_A[name].weight.fill_(1)
            layer.lora_B[name].weight.zero_()
            layer.lora_B[name].weight[i, 0] = 1 / layer.scaling[name]
        kept = layer(torch.ones(20, 64))[:, :2] / 2
    assert calls == ["multi_lora_linear"]
    torch.testing.assert_close(kept, kept.round())
    # Five standard deviations of a mean of 20 * 64 draws.
    assert ((kept.mean(0) - 32).abs() < 5 * (64 * 0.25 / 20) ** 0.5).all()
    assert not torch.equal(kept[:, 0], kept[:, 1])
    with torch.no_grad():
        undropped = layer.eval()(torch.ones(1, 64))[0, :2]
    torch.testing.assert_close(undropped, torch.tensor([64.0, 64.0]))


# --- one for each row -----------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
def test_an_adapter_for_each_row(four_bit, options, calls):
    """Against PEFT in evaluation, where it allows it, with gradients."""
    stock, fused, inputs = pair(four_bit=four_bit, **options)
    inputs["adapter_names"] = ROWS
    stock.eval(), fused.eval()
    exact = float64_copy(stock)
    assert_near(step(fused, inputs), step(stock, inputs), step(exact, inputs))
    assert calls.count("multi_lora_linear") == 7


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_for_each_row_in_bf16(four_bit, calls):
    stock, fused, inputs = pair(four_bit=four_bit, dtype=torch.bfloat16)
    inputs["adapter_names"] = ROWS
    stock.eval(), fused.eval()
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert "multi_lora_linear" in calls


@pytest.mark.parametrize("four_bit", [False, True])
def test_in_training_too(four_bit, calls):
    stock, fused, inputs = pair(four_bit=four_bit)
    inputs["adapter_names"] = ROWS
    with pytest.raises(ValueError, match="training mode"):
        stock(**inputs)
    got = step(fused.train(), inputs)
    assert calls.count("multi_lora_linear") == 7
    assert fused.base_model.training
    stock.eval()
    assert_near(got, step(stock, inputs), step(float64_copy(stock), inputs))


def test_training_with_what_peft_mixes_itself(calls):
    """A LoRA of an embedding, and a head of each adapter's own, in the same batch."""
    options = {"target_modules": ["embed_tokens", "gate_proj"], "modules_to_save": ["lm_head"]}
    stock, _ = tiny_models.lora_llama(layers=1, **options)
    stock.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, **options))
    stock.set_requires_grad(["default", "second"])
    fused, inputs = copy.deepcopy(stock), tiny_models.token_inputs(batch=3)
    inputs["adapter_names"] = ["second", "__base__", "default"]
    fusetune.fuse(fused)
    got = step(fused.train(), inputs)
    assert "multi_lora_linear" in calls
    assert_near(got, step(stock.eval(), inputs), step(float64_copy(stock), inputs))


def test_rows_do_not_hear_of_other_rows():
    """Each row of a mixed batch is what it is in a batch of its adapter alone."""
    stock, fused, inputs = pair()
    got = fused(input_ids=inputs["input_ids"], adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        ids = inputs["input_ids"][row : row + 1]
        if name == "__base__":
            with stock.disable_adapter():
                expected = stock(input_ids=ids).logits
        else:
            stock.set_adapter(name)
            expected = stock(input_ids=ids).logits
        torch.testing.assert_close(got[row : row + 1], expected)


def test_rows_drop_by_their_adapters(calls):
    stock, fused, _ = pair(dropout=0.5)
    layer, alone = fused.get_submodule(GATE), stock.get_submodule(GATE).eval()
    layer.lora_dropout["second"].p = 0.0
    x, names = torch.randn(4, 3, 64), ["second", "__base__", "default", "default"]
    torch.manual_seed(1)
    first, other = layer(x, adapter_names=names), layer(x, adapter_names=names)
    torch.manual_seed(1)
    assert torch.equal(layer(x, adapter_names=names), first)
    assert calls == ["multi_lora_linear"] * 3
    undropped = alone(x, adapter_names=names)
    torch.testing.assert_close(first[:2], undropped[:2])
    torch.testing.assert_close(other[:2], undropped[:2])
    for row in (2, 3):
        assert (first[row] - undropped[row]).norm() > 0.1 * undropped[row].norm()
        assert (first[row] - other[row]).norm() > 0.1 * undropped[row].norm()


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_batch_of_one_adapter_is_a_lora_layer(four_bit, calls):
    stock, fused, _ = pair(four_bit=four_bit)
    x, names = torch.randn(2, 3, 64, requires_grad=True), {"adapter_names": ["second"] * 2}
    expected = stock.get_submodule(GATE)(x, **names)
    torch.testing.assert_close(fused.get_submodule(GATE)(x, **names), expected)
    assert calls == ["lora_linear"]


@pytest.mark.parametrize("names", [["__base__"] * 2, ["third", "__base__"]], ids=str)
def test_a_batch_without_an_adapter_is_the_base_layer(names, calls):
    stock, fused, _ = pair()
    x = torch.randn(2, 3, 64)
    got = fused.get_submodule(GATE)(x, adapter_names=names)
    assert torch.equal(got, stock.get_submodule(GATE).base_layer(x))
    assert calls == []


def test_disabled_adapters_ignore_the_rows(calls):
    stock, fused, inputs = pair()
    with fused.disable_adapter(), stock.disable_adapter():
        got = fused(input_ids=inputs["input_ids"], adapter_names=ROWS).logits
        expected = stock(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(got, expected)
    assert not {"multi_lora_linear", "lora_linear"} & set(calls)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_equals_stock(beams, calls):
    stock, fused, inputs = pair()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    options |= {"input_ids": inputs["input_ids"], "adapter_names": ROWS}
    expected = stock.eval().generate(**options)
    assert torch.equal(fused.eval().generate(**options), expected)
    assert calls.count("multi_lora_linear") == 7 * 4


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("four_bit", [False, True])
def test_rows_on_a_gpu_take_its_kernels(four_bit, dropout, calls):
    """Simulated. With dropout: against the reference, whose masks are the same."""
    _, fused, _ = pair(four_bit=four_bit, dropout=dropout)
    layer = fused.get_submodule(GATE).train()
    x = torch.randn(5, 2, 64)

    def run():
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(given, adapter_names=ROWS)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "x": given.grad, **grads}

    with simulated("triton-sim") as simulation:
        got = run()
    assert {"_shrink", "_ds_db", "_da", "_linear"} <= {one.kernel for one in simulation.launches}
    with ops.use_backend("reference"):
        expected = run()
    assert calls == ["multi_lora_linear"] * 2
    assert {"lora_A.default.weight", "lora_B.second.weight"} <= expected.keys() == got.keys()
    for name, value in expected.items():
        assert_same(got[name], value, name)


# --- what PEFT refuses ----------------------------------------------------------------------------


def merged(model):
    model.base_model.merge_adapter()


def dora(model):
    config = LoraConfig(r=2, target_modules=["gate_proj"], use_dora=True, init_lora_weights=False)
    model.add_adapter("fourth", config)


@pytest.mark.parametrize(
    ("tamper", "names", "why"),
    [
        (None, ROWS[:4], "should be the same as the number of inputs"),
        (None, ["nobody", *ROWS[1:]], "non-existing adapter.*nobody"),
        (merged, ROWS, "merged adapters"),
        (dora, ["fourth", *ROWS[1:]], "DoRA"),
    ],
)
def test_what_peft_refuses_is_refused(tamper, names, why):
    stock, fused, inputs = pair()
    for model in (stock.eval(), fused):
        if tamper is not None:
            tamper(model)
        with pytest.raises(ValueError, match=why):
            model(input_ids=inputs["input_ids"], adapter_names=names)


@pytest.mark.parametrize("training", [False, True])
def test_an_error_leaves_no_hook_behind(training):
    """In PEFT the names of a call that raised go to all later ones."""
    stock, fused, inputs = pair()
    expected = fused(input_ids=inputs["input_ids"]).logits
    for model in (stock.eval(), fused.train(training)):
        with pytest.raises(ValueError, match="number of inputs"):
            model(input_ids=inputs["input_ids"], adapter_names=ROWS[:4])
    with pytest.raises(ValueError, match="number of inputs"):
        stock(input_ids=inputs["input_ids"])
    assert torch.equal(fused(input_ids=inputs["input_ids"]).logits, expected)


# --- around them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, calls):
    """The layers are computed again when PEFT's hooks, which bring the names, are gone."""
    _, fused, inputs = pair(layers=2, dropout=0.3)
    fused.train()

    def grads():
        torch.manual_seed(3)
        fused.zero_grad()
        first = fused(**inputs, adapter_names=ROWS).loss
        second = fused(**inputs, adapter_names=ROWS[::-1]).loss  # before the first one's backward
        (first + 2 * second).backward()
        return {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}

    expected = grads()
    fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fused.enable_input_require_grads()
    calls.clear()
    got = grads()
    assert calls.count("multi_lora_linear") == 4 * 14
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    function = fused.get_submodule("base_model.model.model.layers.0")._gradient_checkpointing_func
    assert "use_reentrant" in function.keywords  # transformers' own is back


@pytest.mark.parametrize("names", [None, ROWS], ids=["together", "by row"])
def test_compiles_in_one_graph(names, fresh_compiler, calls):
    stock, fused, _ = pair()
    activate_all(stock, fused)
    x = torch.randn(5, 3, 64)
    options = {} if names is None else {"adapter_names": names}
    for model in (stock, fused):
        layer = model.get_submodule(GATE)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        given = [x.clone().requires_grad_() for _ in range(2)]
        expected, got = layer(given[0], **options), compiled(given[1], **options)
        torch.testing.assert_close(got, expected)
        got.sum().backward(), expected.sum().backward()
        torch.testing.assert_close(given[1].grad, given[0].grad)
        for name, parameter in layer.named_parameters():  # had the gradient twice
            assert (parameter.grad is not None) == ("lora_" in name and "third" not in name), name
    assert "multi_lora_linear" in calls


def test_copies_and_pickles_work_alike():
    _, fused, inputs = pair()
    fused.base_model.set_adapter(NAMES)
    expected = fused(**inputs).logits, fused(**inputs, adapter_names=ROWS).logits
    layer = fused.get_submodule(GATE)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 64)
    assert torch.equal(again(x), layer(x))
    twin = copy.deepcopy(fused)
    assert torch.equal(twin(**inputs).logits, expected[0])
    assert torch.equal(twin(**inputs, adapter_names=ROWS).logits, expected[1])


def test_fusing_and_unfusing_the_lora_model():
    _, fused, inputs = pair(fuse=False)
    before = fused.state_dict().keys()
    report = fusetune.fuse(fused)
    assert "base_model" not in [row.module for row in report.rows]
    assert isinstance(fused.base_model, LoraModel)
    assert fused.state_dict().keys() == before
    fusetune.unfuse(fused)
    assert type(fused.base_model) is LoraModel
    with pytest.raises(ValueError, match="training mode"):
        fused.train()(**inputs, adapter_names=ROWS)
    with fusetune.fused(fused):
        fused(**inputs, adapter_names=ROWS)
    assert type(fused.base_model) is LoraModel
