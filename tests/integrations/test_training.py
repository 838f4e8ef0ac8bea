"""Training with a fused model: checkpointing, dropout, torch.compile."""

import copy

import pytest
import tiny_models
import torch

import fusetune
from fusetune.reference.dropout import dropout as reference_dropout

LAYER = "base_model.model.model.layers.0.mlp.gate_proj"


def fused_copy(stock, **options):
    fused = copy.deepcopy(stock)
    fusetune.fuse(fused, **options)
    return fused


def assert_equal_steps(one, other, inputs, seed=3, **tolerance):
    results = []
    for model in (one, other):
        torch.manual_seed(seed)
        results.append(tiny_models.loss_and_grads(model, inputs))
    torch.testing.assert_close(results[0][0], results[1][0], **tolerance)
    torch.testing.assert_close(results[0][2], results[1][2], **tolerance)


# --- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout_equals_none(four_bit, reentrant, calls):
    """The mask is drawn again from the generator that checkpointing restores."""
    plain, inputs = tiny_models.lora_llama(four_bit=four_bit, lora_dropout=0.3)
    fusetune.fuse(plain)
    checkpointed = copy.deepcopy(plain)
    options = {"use_reentrant": reentrant, "preserve_rng_state": True}
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    checkpointed.enable_input_require_grads()
    plain.train(), checkpointed.train()
    assert_equal_steps(plain, checkpointed, inputs, rtol=0, atol=0)
    assert calls.count("lora_linear") == 14 + 2 * 14


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_equals_stock(reentrant):
    stock, inputs = tiny_models.lora_llama()
    fused = fused_copy(stock)
    for model in (stock, fused):
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
        model.train()
    assert_equal_steps(stock, fused, inputs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lazy_logits", [False, True])
def test_transformers_trainer(tmp_path, calls, lazy_logits):
    """Gradient accumulation passes num_items_in_batch to the loss."""
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(1, tiny_models.VOCABULARY, (8, 12))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
    )
    stock, _ = tiny_models.lora_llama(layers=1)
    logs = []
    for model in (stock, fused_copy(stock, lazy_logits=lazy_logits)):
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        logs.append([*losses, trainer.evaluate()["eval_loss"]])
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-5, atol=0)
    loss = "linear_cross_entropy" if lazy_logits else "cross_entropy"
    assert calls.count(loss) >= 3 * 2


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_dropout_is_reproduced_from_the_seed(four_bit):
    """Forward and gradients equal PEFT's formula with the mask that the definition gives."""
    p = 0.4
    model, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit, lora_dropout=p)
    layer = model.get_submodule(LAYER)
    fusetune.fuse(model)
    x = torch.randn(6, 64, requires_grad=True)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**63 - 1, (1,))
    torch.manual_seed(11)
    y = layer(x)
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropped = x * reference_dropout(torch.ones_like(x), p, seed)
    expected = layer.base_layer(x) + dropped @ lora_A.T @ lora_B.T * layer.scaling["default"]
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    inputs = (x, lora_A, lora_B)
    for got, true in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(got, true)


def test_dropout_has_the_expected_value_of_peft():
    p, repeats = 0.5, 400
    stock, _ = tiny_models.lora_llama(layers=1, lora_dropout=p)
    layers = [model.get_submodule(LAYER) for model in (stock, fused_copy(stock))]
    x = torch.randn(1, 64).expand(repeats, 64)
    with torch.no_grad():
        no_dropout = layers[0].eval()(x[:1])
        sums = [layer.train()(x).double() for layer in layers]
    for values in sums:  # means within 5 standard errors, spreads within a quarter of each other
        standard_error = values.std(0) / repeats**0.5
        assert ((values.mean(0) - no_dropout).abs() < 5 * standard_error).all()
    ratio = sums[0].std(0) / sums[1].std(0)
    assert ratio.min() > 0.75
    assert ratio.max() < 1.33


def test_layers_and_calls_draw_masks_of_their_own():
    model, _ = tiny_models.lora_llama(layers=1, lora_dropout=0.5)
    fusetune.fuse(model)
    attention = model.get_submodule(LAYER).base_layer  # any module will do for the shape
    assert attention.in_features == 64
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    for name in ("gate_proj", "up_proj"):  # the same weights: only the masks can differ
        layer = getattr(mlp, name)
        layer.load_state_dict(mlp.gate_proj.state_dict())
    x = torch.randn(4, 64)
    first, second, other = mlp.gate_proj(x), mlp.gate_proj(x), mlp.up_proj(x)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    again = mlp.gate_proj(x)
    torch.manual_seed(5)
    assert torch.equal(mlp.gate_proj(x), again)


def test_dropout_follows_its_own_module():
    model, _ = tiny_models.lora_llama(layers=1, lora_dropout=0.5)
    fusetune.fuse(model)
    layer = model.get_submodule(LAYER)
    x = torch.randn(4, 64)
    exact = layer.eval()(x)
    layer.train()
    assert not torch.allclose(layer(x), exact)
    layer.lora_dropout.eval()
    torch.testing.assert_close(layer(x), exact)
    layer.lora_dropout.train()
    layer.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(layer(x), exact)


# --- gradients that are not asked for -------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_frozen_adapter_passes_the_gradient_on(four_bit):
    stock, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit)
    fused = fused_copy(stock)
    x = torch.randn(5, 64, requires_grad=True)
    grads = []
    for model in (stock, fused):
        layer = model.get_submodule(LAYER).requires_grad_(False)
        grads.append(torch.autograd.grad(layer(x).square().sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_second_derivative_is_refused():
    model, _ = tiny_models.lora_llama(layers=1)
    fusetune.fuse(model)
    x = torch.randn(5, 64, requires_grad=True)
    y = model.get_submodule(LAYER)(x).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("four_bit", [False, True])
def test_compile_without_a_graph_break(four_bit):
    torch._dynamo.reset()
    stock, inputs = tiny_models.lora_llama(layers=1, four_bit=four_bit)
    fused = fused_copy(stock)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    loss = compiled(**inputs).loss
    loss.backward()
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("fusetune.lora_linear" in target for target in targets) == 7
    assert sum("fusetune.cross_entropy" in target for target in targets) == 1
    expected, _, grads = tiny_models.loss_and_grads(stock, inputs)
    torch.testing.assert_close(loss, expected)
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("four_bit", [False, True])
def test_compile_of_a_layer_with_aot_autograd(four_bit):
    torch._dynamo.reset()
    stock, _ = tiny_models.lora_llama(layers=1, four_bit=four_bit, lora_dropout=0.2)
    fused = fused_copy(stock)
    layer = fused.get_submodule(LAYER)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, requires_grad=True)
    results = []
    for call in (layer, compiled):
        torch.manual_seed(2)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.sum(), [x, layer.lora_A["default"].weight])))
    torch.testing.assert_close(results[0], results[1])


def test_compiled_model_follows_the_adapter():
    torch._dynamo.reset()
    stock, _ = tiny_models.lora_llama(layers=1)
    fused = fused_copy(stock)
    x = torch.randn(5, 64)
    layers = [model.get_submodule(LAYER) for model in (stock, fused)]
    compiled = torch.compile(layers[1], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layers[0](x))
    for layer in layers:
        layer.enable_adapters(False)
    torch.testing.assert_close(compiled(x), layers[0](x))
    for layer in layers:
        layer.enable_adapters(True)
        layer.scaling["default"] = 0.3
    torch.testing.assert_close(compiled(x), layers[0](x))
