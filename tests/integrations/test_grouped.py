"""q, k and v, and gate and up, in one op: the same numbers, and only where it is the same thing."""

import copy
import gc
import importlib
import pickle
import threading
import weakref

import pytest
import tiny_models
import torch
from model_equality import assert_near, float64_copy, step
from torch import nn

import fusetune
from fusetune import ops
from fusetune.integrations import _groups


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch):
    monkeypatch.setattr(_groups, "_ENOUGH", 0)


@pytest.fixture
def sizes(monkeypatch):
    """How many projections each group had."""
    found, group = [], ops.lora_linear_group

    def count(x, projections, **options):
        found.append(len(projections))
        return group(x, projections, **options)

    monkeypatch.setattr(ops, "lora_linear_group", count)
    return found


def separately(model, inputs, monkeypatch):
    """A step of a fused model without groups."""
    with monkeypatch.context() as patch:
        patch.setattr(_groups, "_pays", lambda x: False)
        return step(model, inputs)


def attention(**options):
    """The fused attention of a model's second layer, and an x as it is called with."""
    model, _ = tiny_models.lora_llama(**options)
    fusetune.fuse(model)
    x = (torch.randn(2, 5, 64, requires_grad=True) * 1).requires_grad_()
    return model.base_model.model.model.layers[1].self_attn, x


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_model_s_loss_and_gradients(four_bit, sizes):
    stock, inputs = tiny_models.lora_llama(four_bit=four_bit)
    fused = copy.deepcopy(stock)
    assert fusetune.fuse(fused).stock == []
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    # Nothing asks for the gradient of the first attention's x.
    assert sizes == [2, 3, 2]


def test_bert_s_query_key_and_value(sizes):
    model, inputs = tiny_models.bert()
    stock = tiny_models.with_lora(model)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert sizes == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("four_bit", [False, True])
def test_mixed_ranks_and_biases(dtype, four_bit, sizes):
    options = {"rank_pattern": {"q_proj": 8, "up_proj": 1}, "lora_bias": True}
    stock, inputs = tiny_models.lora_llama(four_bit=four_bit, dtype=dtype, layers=2, **options)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert sizes == [2, 3, 2]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], [2]),
        (["k_proj", "v_proj", "up_proj"], [2]),
        (["q_proj", "o_proj", "down_proj"], []),
        (["gate_proj", "up_proj"], [2]),
    ],
    ids=str,
)
def test_what_has_no_adapter_is_left_out(targets, expected, sizes):
    stock, inputs = tiny_models.lora_llama(target_modules=targets)
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused)
    assert_near(step(fused, inputs), step(stock, inputs), step(float64_copy(stock), inputs))
    assert sizes == expected


@pytest.mark.parametrize("four_bit", [False, True])
def test_every_projection_has_its_own_mask(four_bit, sizes, monkeypatch):
    """The same masks as without groups, and another for each projection."""
    model, inputs = tiny_models.lora_llama(four_bit=four_bit, lora_dropout=0.4)
    fusetune.fuse(model.train())
    torch.manual_seed(1)
    grouped = step(model, inputs)
    assert sizes == [2, 3, 2]
    torch.manual_seed(1)
    torch.testing.assert_close(
        grouped, separately(model, inputs, monkeypatch), rtol=1e-4, atol=1e-6
    )
    seeds = [p.seed for p in _last_group(model, inputs, monkeypatch)]
    assert len(set(map(int, seeds))) == 3


def _last_group(model, inputs, monkeypatch):
    module = importlib.import_module("fusetune.ops.lora_linear_group")
    found, run = [], module._forward
    monkeypatch.setattr(module, "_forward", lambda x, group: found.append(group) or run(x, group))
    model(**inputs)
    return next(group for group in found if len(group) == 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, sizes, monkeypatch):
    model, inputs = tiny_models.lora_llama(lora_dropout=0.4)
    model.train().enable_input_require_grads()
    fusetune.fuse(model)
    torch.manual_seed(1)
    expected = separately(model, inputs, monkeypatch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    got = step(model, inputs)
    assert sizes == ([3, 2, 3, 2] if reentrant else [3, 2] * 4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert getattr(_groups._local, "pending", None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, sizes, monkeypatch):
    model, inputs = tiny_models.lora_llama()
    fusetune.fuse(model)
    with torch.autocast("cpu", dtype):
        got = step(model, inputs)
        assert sizes == [2, 3, 2]
        expected = separately(model, inputs, monkeypatch)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=8 * eps, atol=8 * eps)


def test_inference_is_not_grouped(sizes):
    model, inputs = tiny_models.lora_llama()
    fusetune.fuse(model)
    with torch.no_grad():
        model(**inputs)
    with torch.inference_mode():
        model(**inputs)
    assert sizes == []


def test_small_inputs_are_not_grouped(sizes, monkeypatch):
    monkeypatch.undo()
    group, found = ops.lora_linear_group, []
    monkeypatch.setattr(ops, "lora_linear_group", lambda x, p: found.append(x) or group(x, p))
    layer, _ = attention()
    for rows, expected in ((2047, 0), (2048, 1)):
        layer.q_proj(torch.randn(rows, 64, requires_grad=True))
        assert len(found) == expected


# --- results that were computed ahead -------------------------------------------------------------


def test_the_others_pick_theirs_up(sizes, calls):
    layer, x = attention()
    q, k, v = (getattr(layer, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    assert q.grad_fn is k.grad_fn is v.grad_fn
    assert sizes == [3]
    assert getattr(_groups._local, "pending", None) is None
    again = layer.k_proj(x)  # it was handed out once
    assert again.grad_fn is not k.grad_fn
    torch.testing.assert_close(again, k)


def other_x(layer, x):
    return (x * 1).requires_grad_()


def changed_x(layer, x):
    x.mul_(2)
    return x


def changed_weight(layer, x):
    with torch.no_grad():
        layer.k_proj.lora_A["default"].weight.mul_(2)
    return x


def another_weight(layer, x):
    weight = layer.k_proj.lora_B["default"].weight
    layer.k_proj.lora_B["default"].weight = nn.Parameter(2 * weight.detach())
    return x


def other_scaling(layer, x):
    layer.k_proj.set_scale("default", 3.0)
    return x


def disabled(layer, x):
    layer.k_proj.enable_adapters(False)
    return x


def hooked(layer, x):
    layer.k_proj.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)
    return x


def dropping(layer, x):
    layer.k_proj.lora_dropout["default"] = nn.Dropout(1.0)
    return x


@pytest.mark.parametrize(
    "change",
    [
        other_x,
        changed_x,
        changed_weight,
        another_weight,
        other_scaling,
        disabled,
        hooked,
        dropping,
    ],
)
def test_whatever_changes_between_the_calls_is_respected(change, sizes):
    layer, x = attention()
    layer.q_proj(x)
    assert sizes == [3]
    x = change(layer, x)
    got = layer.k_proj(x)
    fusetune.unfuse(layer)
    torch.testing.assert_close(got, layer.k_proj(x))


def test_no_gradient_where_none_is_asked_for(sizes):
    layer, x = attention()
    layer.q_proj(x)
    with torch.no_grad():
        assert layer.k_proj(x).grad_fn is None
    assert sizes == [3]


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
@pytest.mark.parametrize(
    "hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_layers_with_hooks_are_called_alone(name, hook, sizes):
    layer, x = attention()
    seen = []
    getattr(getattr(layer, name), f"register_{hook}")(lambda *given: seen.append(given[0]))
    ys = [getattr(layer, each)(x) for each in ("q_proj", "k_proj", "v_proj")]
    torch.autograd.backward([y.sum() for y in ys])
    assert seen == [getattr(layer, name)]
    assert sizes == [2]


def test_what_no_longer_belongs_to_the_attention_is_left_out(sizes):
    layer, x = attention()
    layer.k_proj = nn.Linear(64, 32)
    layer.q_proj(x), layer.v_proj(x)
    assert sizes == [2]
    layer.forward = lambda *args: None  # who knows what that calls
    layer.q_proj(x)
    assert sizes == [2]


def test_dora_is_left_out(sizes):
    model, inputs = tiny_models.lora_llama(use_dora=True)
    fusetune.fuse(model)
    step(model, inputs)
    assert sizes == []


def test_nothing_is_held_longer_than_x():
    """k and v are never called: their results go with x, also while the graph is alive."""
    layer, x = attention()
    y = layer.q_proj(x)
    made = [weakref.ref(entry[2]) for entry in _groups._local.pending.results.values()]
    assert all(one() is not None for one in made)
    del x
    gc.collect()
    assert not any(one() is not None for one in made)
    y.sum().backward()


def test_another_layer_s_call_drops_what_was_kept():
    layer, x = attention()
    layer.q_proj(x)
    made = [weakref.ref(entry[2]) for entry in _groups._local.pending.results.values()]
    layer.o_proj(torch.randn(2, 5, 64))
    assert not any(one() is not None for one in made)
    assert _groups._local.pending is None


def test_an_error_between_the_calls_leaves_nothing_wrong(sizes):
    layer, x = attention()

    def failing(x):
        layer.q_proj(x)
        raise RuntimeError("between the calls")

    with pytest.raises(RuntimeError, match="between"):
        failing(x)
    q, k = layer.q_proj(x), layer.k_proj(x)
    assert q.grad_fn is k.grad_fn
    assert sizes == [3, 3]


def test_threads_have_their_own(sizes):
    """One begins with q, the other goes on with k for the same x."""
    layer, x = attention()
    q, other = layer.q_proj(x), []
    thread = threading.Thread(target=lambda: other.append(layer.k_proj(x)))
    thread.start(), thread.join()
    assert other[0].grad_fn is not q.grad_fn
    assert layer.k_proj(x).grad_fn is q.grad_fn
    torch.testing.assert_close(other[0], layer.k_proj(x))


def test_only_some_results_are_used(sizes, monkeypatch):
    layer, x = attention()
    leaf = torch.randn(2, 5, 64, requires_grad=True)
    x = leaf * 1
    layer.q_proj(x)
    [got] = torch.autograd.grad(layer.k_proj(x).sum(), leaf)
    monkeypatch.setattr(_groups, "_pays", lambda x: False)
    [expected] = torch.autograd.grad(layer.k_proj(leaf).sum(), leaf)
    torch.testing.assert_close(got, expected)


# --- around it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copied, sizes):
    layer, x = attention()
    clone = copied(layer)
    expected = [getattr(layer, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    sizes.clear()
    got = [getattr(clone, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(got, expected)
    assert sizes == []  # until fuse() has seen them
    fusetune.fuse(clone)
    clone.q_proj(x)
    assert sizes == [3]


def test_layers_have_no_new_attributes():
    model, _ = tiny_models.lora_llama()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    fusetune.fuse(model, loss=False)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


def test_unfused_layers_are_called_one_by_one(sizes):
    model, inputs = tiny_models.lora_llama()
    fusetune.fuse(model)
    fusetune.unfuse(model)
    step(model, inputs)
    assert sizes == []


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "smollm3")


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_that_are_known(family):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = next(k for n, k in vars(modeling).items() if n.lower() == f"{family}attention")
    assert _groups.later(kind)["q_proj"] == ("k_proj", "v_proj")


class Conditional(nn.Module):
    def forward(self, x, cache=None):
        q = self.q_proj(x)
        if cache is None:
            k = self.k_proj(x)
            v = self.v_proj(x)
        return q, k, v


class TwoInputs(nn.Module):
    def forward(self, x, y):
        q = self.q_proj(x).view(-1)
        k = self.k_proj(y).view(-1)
        v = self.v_proj(y).view(-1)
        return q, k, v


class Random(nn.Module):
    def forward(self, x):
        q = self.dropout(self.q_proj(x))
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v


class Reassigned(nn.Module):
    def forward(self, x):
        q = self.q_proj(x)
        x = self.k_proj(x)
        v = self.v_proj(x)
        return q, x, v


class Between(nn.Module):
    def forward(self, x):
        q = self.q_proj(x)
        x += 1
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v


class Chosen(nn.Module):
    def forward(self, x, cross):
        q = self.q_proj(x)
        k = self.k_proj(x) if cross else x
        v = self.v_proj(x)
        return q, k, v


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Conditional, {}),
        (TwoInputs, {"k_proj": ("v_proj",)}),
        (Random, {"k_proj": ("v_proj",)}),
        (Reassigned, {}),
        (Between, {}),
        (Chosen, {}),
        (nn.Linear, {}),
        (type("Made", (nn.Module,), {"forward": eval("lambda self, x: x")}), {}),
    ],
)
def test_attentions_that_are_not(kind, expected):
    assert {name: others for name, others in _groups.later(kind).items() if others} == expected
