"""Frozen linear layers that adapters of ours are around are fused, and stay exact in all states."""

import copy
import pickle

import adapter_models
import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from peft import LoraConfig, PeftModel, get_peft_model

import fusetune
from fusetune import AdapterFusionConfig, BitFitConfig, BottleneckConfig, MadXConfig
from fusetune.integrations.linear import FusedLinear

ROW = "frozen linear"
PREFIX = "base_model.model."
FAMILIES = ("bert", "llama")
# What is around linear layers of each, by last names: in BERT adapters are on dropouts.
AROUND = {"bert": set(), "llama": {"o_proj", "down_proj"}}
TWO = r".*(query|q_proj|intermediate\.dense|up_proj)"  # queries, and the middle of MLPs
INNER = {  # the linear layers of a family's layers
    "bert": {"query", "key", "value", "dense"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


def plain(family):
    """(a model with biases in all linear layers, which are not zero; inputs)."""
    torch.manual_seed(0)
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model, inputs = getattr(tiny_models, family)(**biases)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter) / 4
    return model.requires_grad_(False).eval(), inputs


def one(config):
    return lambda model: get_peft_model(model, config())


def fusion(model):
    pfeiffer = adapter_models.pfeiffer
    model = get_peft_model(model, pfeiffer(), "a")
    model.add_adapter("b", pfeiffer())
    model.add_adapter("fused", AdapterFusionConfig(adapters=["a", "b"]))
    fusetune.compose(model, "fused", trainable=["fused"])
    return model


def madx(model):
    model = get_peft_model(model, MadXConfig(), "language")
    model.add_adapter("task", MadXConfig.task(reduction_factor=8))
    fusetune.compose(model, fusetune.Stack("language", "task"), trainable=["task"])
    return model


METHODS = {
    "houlsby": one(adapter_models.houlsby),
    "pfeiffer": one(lambda: BottleneckConfig.pfeiffer(reduction_factor=8)),
    "parallel": one(adapter_models.parallel),
    "fusion": fusion,
    "madx": madx,
    "bitfit": one(BitFitConfig),
    "bitfit_of_two": one(lambda: BitFitConfig(subset=[TWO])),
}


def adapted(family, method):
    """(the model with a method, whose weights are not those it begins with; inputs)."""
    base, inputs = plain(family)
    model = adapter_models.randomise(METHODS[method](base))
    for name, parameter in model.named_parameters():
        if ".bitfit_bias." in name:
            parameter.data += torch.randn_like(parameter) / 4
    return model.eval(), inputs


def rows(report):
    return {row.module: row for row in report.rows if row.method == ROW}


def results(model, inputs):
    found = step(model, inputs)
    # Softmax makes the gradients of a fusion's and of BERT's key biases zero, but for roundings.
    zero = (".key.bitfit_bias.default", ".key.bitfit_bias.a", ".key.bitfit_bias.b", ".key.bias")
    return {name: value for name, value in found.items() if not name.endswith(zero)}


def assert_same_logits(fused, stock, inputs):
    with torch.no_grad():
        got, eager, exact = (
            {"logits": model(**inputs).logits} for model in (fused, stock, float64_copy(stock))
        )
    assert_near(got, eager, exact)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_step(family, method, calls):
    stock, inputs = adapted(family, method)
    fused = copy.deepcopy(stock)
    report = fusetune.fuse(fused)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    eager, exact = results(stock, inputs), results(float64_copy(stock), inputs)
    assert "linear" not in calls
    assert_near(results(fused, inputs), eager, exact)
    found = rows(report)
    assert all(row.fused for row in found.values())
    # Every linear layer of the base model, once: none of the adapters' own.
    base, _ = plain(family)
    linears = {name for name, m in base.named_modules() if type(m) is torch.nn.Linear}
    assert {name.removeprefix(PREFIX).removesuffix(".base_layer") for name in found} == linears
    assert calls.count("linear") == len(linears)
    assert INNER[family] <= {name.split(".")[-1] for name in linears}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_which_are_around(family, method):
    """The rows of layers inside of an adapter's; the adapter has a row of its own."""
    model, _ = adapted(family, method)
    report = fusetune.fuse(model)
    inside = {name for name in rows(report) if name.endswith(".base_layer")}
    kinds = {name.split(".")[-2] for name in inside}
    if method == "bitfit":
        assert kinds == INNER[family]
    elif method == "bitfit_of_two":
        assert kinds == {"bert": {"query", "dense"}, "llama": {"q_proj", "up_proj"}}[family]
    elif method in ("pfeiffer", "parallel"):
        assert kinds == AROUND[family] - {"o_proj"}
    else:
        assert kinds == AROUND[family]
    own = {row.module for row in report.rows if row.method in ("bottleneck", "BitFit")}
    assert {name.removesuffix(".base_layer") for name in inside} <= own


@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_sums_the_gradient_as_without_fuse(family):
    """Fused layers are known to add their bias last: the op of BitFit is there for each."""
    model, inputs = adapted(family, "bitfit")
    layers = sum(".bitfit_bias." in name for name, _ in model.named_parameters())
    for _ in range(2):
        names, todo, seen = [], [model(**inputs).loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            names.append(node.name())
            todo += [inner for inner, _ in node.next_functions if inner is not None]
        assert names.count("_TrainedBiasBackward") == layers
        report = fusetune.fuse(model)
    assert all(row.fused for row in report.rows)


def test_bitfit_of_a_layer_with_hooks(calls):
    """Then autograd has to find the gradient, through the op."""
    stock, inputs = adapted("bert", "bitfit")
    fused = copy.deepcopy(stock)
    path = f"{PREFIX}bert.encoder.layer.1.output.dense"
    for model in (stock, fused):
        layer = model.get_submodule(path).base_layer
        layer.register_forward_hook(lambda module, args, y: 2 * y)
    report = {row.module: row for row in fusetune.fuse(fused).rows}
    assert report[path].reason == "a Linear with hooks, or of an unknown kind"
    assert report[f"{path}.base_layer"].fused
    eager, exact = results(stock, inputs), results(float64_copy(stock), inputs)
    assert_near(results(fused, inputs), eager, exact)
    assert "linear" in calls


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "madx", "fusion", "bitfit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_unfused_and_unloaded(family, method):
    base, inputs = plain(family)
    stock, _ = adapted(family, method)
    model = copy.deepcopy(stock)
    fusetune.fuse(model)
    assert_same_logits(model, stock, inputs)
    with model.disable_adapter():
        assert_same_logits(model, base, inputs)
    assert_same_logits(model, stock, inputs)
    assert_same_logits(copy.deepcopy(model), stock, inputs)
    copied = copy.deepcopy(model)
    fusetune.unfuse(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in stock.modules()]
    with torch.no_grad():
        assert torch.equal(copied(**inputs).logits, stock(**inputs).logits)
    unloaded = model.unload()
    assert_same_logits(unloaded, base, inputs)
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    fusetune.unfuse(unloaded)
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_bitfit_merged(family):
    stock, inputs = adapted(family, "bitfit")
    model = copy.deepcopy(stock)
    fusetune.fuse(model)
    model.merge_adapter(safe_merge=True)
    assert_same_logits(model, stock, inputs)
    model.unmerge_adapter()
    assert_same_logits(model, stock, inputs)
    base, _ = plain(family)
    with model.disable_adapter():
        assert_same_logits(model, base, inputs)
    merged = model.merge_and_unload()
    assert_same_logits(merged, stock, inputs)
    assert merged.state_dict().keys() == base.state_dict().keys()
    fusetune.unfuse(merged)
    with torch.no_grad():
        assert torch.equal(merged(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["houlsby", "bitfit"])
def test_switched_and_added_later(family, method):
    """Fused before its adapters are there, and between: another call covers what was added."""
    configs = {
        "houlsby": lambda: adapter_models.houlsby(init_weights_seed=1),
        "bitfit": BitFitConfig,
    }
    stock, inputs = plain(family)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    pair = [get_peft_model(m, configs[method](), "a").eval() for m in (stock, fused)]
    for model in pair:
        model.add_adapter("b", configs[method]())
        for name, parameter in model.named_parameters():
            if ".a" in name and ("bn_" in name or "bitfit" in name):
                parameter.data += torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter)
    report = fusetune.fuse(pair[1])
    assert all(row.fused for row in rows(report).values())
    assert any(name.endswith("base_layer") for name in rows(report)) or family == "bert"
    for name in ("a", "b", "a"):
        for model in pair:
            model.set_adapter(name)
        got, eager = results(pair[1], inputs), results(pair[0], inputs)
        assert_near(got, eager, results(float64_copy(pair[0]), inputs))
    with torch.no_grad():
        logits = [pair[1](**inputs).logits]
        pair[1].set_adapter("b")
        logits.append(pair[1](**inputs).logits)
    assert not torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["houlsby", "bitfit"])
def test_saved_and_loaded(family, method, tmp_path):
    stock, inputs = adapted(family, method)
    model = copy.deepcopy(stock)
    fusetune.fuse(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(family)[0], tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, stock(**inputs).logits)
    again = pickle.loads(pickle.dumps(model))
    assert any(type(m) is FusedLinear for m in again.modules())
    assert_same_logits(again, stock, inputs)


def test_bitfit_by_rows():
    stock, inputs = adapted("bert", "bitfit")
    stock.add_adapter("other", BitFitConfig())
    model = copy.deepcopy(stock)
    fusetune.fuse(model)
    names = {"adapter_names": ["other", "default"], "input_ids": inputs["input_ids"]}
    assert_same_logits(model, stock, names)


def test_layers_of_loras_are_free_once_it_is_unloaded(calls):
    base, inputs = plain("llama")
    expected = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    report = fusetune.fuse(model)
    assert rows(report).keys() == {f"{PREFIX}lm_head"}
    unloaded = model.unload()
    report = fusetune.fuse(unloaded)
    linears = {name for name, m in expected.named_modules() if type(m) is torch.nn.Linear}
    assert rows(report).keys() == linears
    calls.clear()
    assert_same_logits(unloaded, expected, inputs)
    assert calls.count("linear") == len(linears)
