"""Adapters by row and checkpoints that are not transformers' own: refused where the names are gone
when layers are computed again, exact where they are a part of what is checkpointed.

The truth is the step without checkpointing.
"""

import functools

import pytest
import tiny_models
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

import fusetune

ROWS = ["other", "__base__", "default"]
LORA = {"r": 4, "init_lora_weights": False}
CONFIGS = {
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], **LORA),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "bitfit": fusetune.BitFitConfig(),
}
REFUSED = "adapter_names was given around a checkpoint of .*Checkpoint the whole call"


def pair(method, **options):
    """(a model in training with two adapters that differ, three rows of inputs)."""
    torch.manual_seed(0)
    model = tiny_models.gpt2()[0] if method == "bitfit" else tiny_models.llama()[0]
    config = CONFIGS[method]
    model = get_peft_model(model, config)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        own = name.endswith((".default", ".other", "default.weight", "other.weight"))
        parameter.requires_grad_(own)
        if own and method in ("ia3", "bitfit"):
            parameter.data += torch.randn_like(parameter) / 2
    fusetune.fuse(model)
    model.enable_input_require_grads()
    model.config.use_cache = False  # which a layer would write once more when computed again
    return model.train(), tiny_models.token_inputs(batch=3)


def blocks(model):
    """The decoder's."""
    inside = model.base_model.model
    return list(inside.transformer.h if hasattr(inside, "transformer") else inside.model.layers)


def checkpoint_inside(modules, run):
    """The modules' forward by `run`, which takes a function of the first argument, and it."""

    def wrapped(forward):
        def within(x, *args, **kwargs):
            return run(lambda x: forward(x, *args, **kwargs), x)

        return within

    for module in modules:
        module.forward = wrapped(module.forward)


def torchs(reentrant, **options):
    return functools.partial(checkpoint, use_reentrant=reentrant, **options)


class _Another(torch.autograd.Function):
    """A checkpoint as other libraries have it."""

    @staticmethod
    def forward(context, function, x):
        context.function = function
        context.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(context, grad):
        x = context.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = context.function(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


KINDS = {"reentrant": torchs(True), "not reentrant": torchs(False), "another": _Another.apply}


def grads(model, *passes):
    """{name: gradient} of the sum of the passes' losses."""
    model.zero_grad()
    sum(model(**given).loss for given in passes).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    """To a few roundings of sums of some hundred terms, made in another order."""
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (got[name] - grad).norm() <= 1e-5 * grad.norm(), name


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [ROWS, ["other"] * 3], ids=["mixed", "one"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_checkpoint_within_the_call_is_refused(method, kind, names):
    model, inputs = pair(method)
    expected = grads(model, inputs)
    checkpoint_inside(blocks(model), KINDS[kind])
    with pytest.raises(RuntimeError, match=REFUSED):
        model(**inputs, adapter_names=names)
    # Nothing is left of it: the same layers, without names, are computed again as ever.
    assert_same(grads(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_transformers_checkpoint_too(reentrant):
    model, inputs = pair("lora")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mlps = [layer.mlp for layer in blocks(model)]
    checkpoint_inside(mlps, torchs(reentrant))
    with pytest.raises(RuntimeError, match=r"a checkpoint of .*layers\.0\.mlp\.down_proj"):
        model(**inputs, adapter_names=ROWS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_block_too(reentrant, fresh_compiler):
    model, inputs = pair("ia3")
    mlps = [layer.mlp for layer in blocks(model)]
    for mlp in mlps:
        mlp.forward = torch.compile(mlp.forward, backend="eager")
    checkpoint_inside(mlps, torchs(reentrant))
    with pytest.raises(RuntimeError, match=REFUSED):
        model(**inputs, adapter_names=ROWS)


class Checkpointed(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoraConfig(target_modules=["embed_tokens"], **LORA), "model.embed_tokens"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA), "lm_head"),
        (IA3Config(modules_to_save=["lm_head"]), "lm_head"),
    ],
    ids=["embedding", "head", "ia3-head"],
)
def test_layers_of_other_kinds(config, name):
    """Those that PEFT itself carries out, and a head, which is no adapter's layer."""
    model = get_peft_model(tiny_models.llama()[0], config)
    model.add_adapter("other", config)
    fusetune.fuse(model)
    inputs = tiny_models.token_inputs(batch=3)
    model.train()(**inputs, adapter_names=ROWS)
    inside = model.base_model.model
    inside.set_submodule(name, Checkpointed(inside.get_submodule(name)))
    with pytest.raises(RuntimeError, match=rf"a checkpoint of model\.{name}\.inner: "):
        model(**inputs, adapter_names=ROWS)


# --- not refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit"])
def test_a_checkpoint_around_the_call_is_exact(method, kind):
    """Two of them, which are computed again one after the other, each with its rows."""
    model, inputs = pair(method)
    with torch.no_grad():
        given = model.get_input_embeddings()(inputs["input_ids"])
    given.requires_grad_()

    def loss(names, x):
        return model(inputs_embeds=x, labels=inputs["labels"], adapter_names=names).loss

    def step(run):
        model.zero_grad()
        given.grad = None
        losses = [run(functools.partial(loss, names), given) for names in (ROWS, ROWS[::-1])]
        (losses[0] + 2 * losses[1]).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    assert_same(step(KINDS[kind]), step(lambda function, x: function(x)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit"])
def test_transformers_checkpoints_of_passes_with_and_without_names(method, reentrant):
    model, inputs = pair(method)
    passes = [{**inputs, "adapter_names": ROWS}, inputs, {**inputs, "adapter_names": ROWS[::-1]}]
    for given in (passes, passes[1:], passes[:2]):
        model.base_model.activation_checkpointing_disable()
        expected = grads(model, *given)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_same(grads(model, *given), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_not_computed_again_is_not_refused(method, kind):
    """In evaluation, and in training without gradients."""
    model, inputs = pair(method)
    inputs["adapter_names"] = ROWS
    expected = model(**inputs).logits
    checkpoint_inside(blocks(model), KINDS[kind])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected)
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_blocks_in_transformers_checkpoints(reentrant, fresh_compiler):
    """Each in one graph, the check included."""
    model, inputs = pair("ia3")
    inputs["adapter_names"] = ROWS
    expected = grads(model, inputs)
    for layer in blocks(model):
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager", fullgraph=True)
    assert_same(grads(model, inputs), expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(3):
        assert_same(grads(model, inputs), expected)


def test_another_model_within_the_call_is_not_refused():
    """A checkpoint of layers that have no rows is nothing to refuse."""
    model, inputs = pair("lora")
    other, _ = pair("lora")
    expected = grads(other, inputs)
    checkpoint_inside(blocks(other), torchs(True))
    got = []
    blocks(model)[0].register_forward_hook(lambda *_: got.append(grads(other, inputs)))
    model(**inputs, adapter_names=ROWS)
    assert_same(got[0], expected)
