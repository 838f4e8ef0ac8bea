"""Equal to the library adapters 1.3.0 on its own checkpoints: outputs and gradients.

The oracle holds what it computed in fp32. Ours in float64 is the exact result, and ours in fp32
tells how large rounding errors are here: the oracle's, of the same formulas in another order, may
be four times as large, plus four roundings of the case's largest result of the kind (a gradient of
one element may be near its exact value by chance, or by cancellation).
"""

import oracle_cases as oracle
import pytest
import torch

EPS = torch.finfo(torch.float32).eps
# Fusions and invertible blocks have their own tests.
CASES = [
    name
    for name, case in oracle.CASES.items()
    if not case["fusion"]
    and not any(a["config"].endswith("_inv") for a in case["adapters"].values())
]


def run(case, dtype):
    """(output, {name in the oracle: gradient}) of our model in a dtype."""
    model, found = oracle.adapted(case, dtype), oracle.tensors(case)
    wanted = [key.removeprefix("grad.") for key in found if key.startswith("grad.")]
    inputs = {
        key.removeprefix("input."): value.to(dtype) if value.is_floating_point() else value
        for key, value in found.items()
        if key.startswith("input.")
    }
    projection = inputs.pop("projection", None)
    if not wanted:
        with torch.no_grad():
            return oracle.result(model(**inputs)), {}
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    output = oracle.result(model(inputs_embeds=embeddings, **inputs))
    (output * projection).sum().backward()
    parameters = dict(model.base_model.model.named_parameters())
    grads = {
        key: parameters[oracle.our_key(oracle.CASES[case]["model"], key)].grad
        for key in wanted
        if key != "inputs_embeds"
    }
    return output.detach(), {**grads, "inputs_embeds": embeddings.grad}


def assert_is_rounding(name, got, exact, ours, largest):
    assert got.shape == exact.shape, name
    allowed = 4 * (ours.double() - exact).abs().max() + 4 * EPS * largest
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"{name}: differs by {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize("case", CASES)
def test_equals_adapters(case):
    exact, exact_grads = run(case, torch.float64)
    ours, our_grads = run(case, torch.float32)
    found = oracle.tensors(case)
    got = found.get("output.logits", found.get("output.last_hidden_state"))
    assert_is_rounding("output", got, exact, ours, exact.abs().max())
    largest = max((grad.abs().max() for grad in exact_grads.values()), default=0)
    for key, grad in exact_grads.items():
        assert_is_rounding(key, found[f"grad.{key}"], grad, our_grads[key], largest)


def test_no_case_equals_the_plain_model():
    """Else the test above would say little."""
    for case in CASES:
        found = oracle.tensors(case)
        got = found.get("output.logits", found.get("output.last_hidden_state"))
        inputs = {k[6:]: v for k, v in found.items() if k.startswith("input.")}
        inputs.pop("projection", None)
        model = oracle.base_model(oracle.CASES[case]["model"])
        with torch.no_grad():
            plain = oracle.result(model(**inputs))
        if got.shape[0] != plain.shape[0]:
            continue  # Parallel
        assert (got - plain).abs().max() > 0.01, case


def test_average_is_a_mean():
    """adapters divides by the number of adapters once more, so that even the mean of one adapter
    with itself shrinks, and its residual with it. Ours is the adapter."""
    model, found = oracle.adapted("average"), oracle.tensors("average")
    inputs = {"input_ids": found["input.input_ids"]}
    inputs["attention_mask"] = found["input.attention_mask"]
    with torch.no_grad():
        oracle.methods.compose(model, oracle.methods.Average("a", "a"))
        mean = model(**inputs).last_hidden_state
        oracle.methods.compose(model, "a")
        assert torch.allclose(mean, model(**inputs).last_hidden_state, atol=32 * EPS)


def test_gemma_normalises_by_the_layer_s_own_norm():
    """adapters' hooks take the last layer's LayerNorm in every layer. Ours takes the layer's."""
    model = oracle.base_model("gemma2", torch.float64)
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    for number, norm in enumerate(norms):
        norm.weight.data.uniform_(-0.5, 0.5 + number)
    config = oracle.methods.BottleneckConfig(
        original_ln_before=True, output_adapter=False, leave_out=[1]
    )
    adapted = oracle.get_peft_model(model, config)
    layer = adapted.base_model.model.model.layers[0].self_attn.o_proj
    adapter = layer.bn_adapters["default"]
    seen = {}
    norms[0].register_forward_hook(lambda module, args, output: seen.setdefault("x", output))
    adapter.register_forward_pre_hook(lambda module, args: seen.update(input=args[0]))
    with torch.no_grad():
        adapted(input_ids=torch.arange(6).view(1, 6))
    # The first call of the layer's own norm is the adapter's: LN(h + r).
    assert torch.equal(seen["x"], seen["input"])
