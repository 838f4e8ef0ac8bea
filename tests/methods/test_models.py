"""Bottleneck adapters in whole models: caches, checkpointing, compilation, processes, 4 bits."""

import os
import traceback
from dataclasses import asdict

import adapter_models
import pytest
import tiny_models
import torch
import torch.distributed as dist
from adapter_models import adapted, houlsby, parallel, pfeiffer
from peft import get_peft_model
from tolerance import assert_same
from torch import nn

import fusetune
from fusetune import methods
from fusetune.methods import BottleneckConfig
from fusetune.methods.bottleneck.layer import BottleneckLayer
from fusetune.methods.bottleneck.report import carrier

KINDS = {"houlsby": houlsby, "pfeiffer": pfeiffer, "parallel": parallel}


def no_post_norm(**changes):
    """The sub-layer ends with the adapter's result: the model's norm or addition is bypassed."""
    changes = {"residual_before_ln": False, "original_ln_after": False, **changes}
    return pfeiffer(**changes)


def step(model, inputs):
    """(loss, {name: gradient}) of a step."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_step(got, expected):
    assert_same(got[0], expected[0], "loss")
    assert got[1].keys() == expected[1].keys()
    assert expected[1]
    for name, grad in expected[1].items():
        assert_same(got[1][name], grad, name)


# --- generation -----------------------------------------------------------------------------------


def generate(model, inputs, **options):
    # T5 and GPT-2 give pad and end tokens; all runs have the same length this way.
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=torch.ones_like(inputs["input_ids"]),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", None), ("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")],
)
def test_generate_with_a_cache(family, task):
    torch.manual_seed(0)
    base, _ = getattr(tiny_models, family)()
    model, inputs = adapted(family, lambda: pfeiffer(task_type=task))
    # Frozen as PEFT freezes it: torch multiplies otherwise where a weight requires a gradient.
    expected = generate(base.eval().requires_grad_(False), inputs)
    cached = generate(model, inputs)
    assert not torch.equal(cached.logits[0], expected.logits[0])
    fresh = generate(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, fresh.sequences)
    assert_same(torch.stack(cached.logits), torch.stack(fresh.logits))
    with model.disable_adapter():
        disabled = generate(model, inputs)
    model.base_model.set_adapter([])
    for inactive in (disabled, generate(model, inputs)):
        assert torch.equal(inactive.sequences, expected.sequences)
        assert torch.equal(torch.stack(inactive.logits), torch.stack(expected.logits))


def test_generate_with_an_adapter_for_each_sequence():
    model, inputs = adapted("llama", pfeiffer, names=("first", "second"))
    alone = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = torch.stack(generate(model, inputs).logits)
    fusetune.compose(model, methods.BatchSplit("second", "first", batch_sizes=1))
    got = torch.stack(generate(model, inputs).logits)
    assert_same(got[:, 0], alone["second"][:, 0])
    assert_same(got[:, 1], alone["first"][:, 1])


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [pfeiffer, houlsby, parallel, no_post_norm])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradient_checkpointing(family, config, reentrant):
    model, inputs = adapted(family, config)
    model.train()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer))
    linear = next(m for m in layer._layer[0].modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda *_: calls.append(1))
    assert_same_step(step(model, inputs), expected)
    assert len(calls) == 2  # else nothing was computed again


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("family", "config"), [("llama", parallel), ("bert", pfeiffer), ("bert", no_post_norm)]
)
def test_compiles_as_one_graph(family, config):
    model, inputs = adapted(family, config)
    model.train()
    expected = step(model, inputs)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = step(compiled, inputs)
    got = got[0], {n.removeprefix("_orig_mod."): g for n, g in got[1].items()}
    assert_same_step(got, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_compositions():
    model, inputs = adapted("bert", pfeiffer, names=("first", "second"))
    for tree in (
        methods.Stack("first", methods.BatchSplit("first", "second", batch_sizes=1)),
        methods.Parallel("first", "second"),
    ):
        fusetune.compose(model, tree)
        expected = step(model, inputs)
        got = step(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
        got = got[0], {n.removeprefix("_orig_mod."): g for n, g in got[1].items()}
        assert_same_step(got, expected)


@pytest.mark.parametrize("config", [pfeiffer, houlsby, parallel])
def test_nf4_base(config):
    """As over the dense weights that the 4-bit ones stand for."""
    bnb = pytest.importorskip("bitsandbytes")
    model, inputs = adapted("llama", config, four_bit=True)
    dense, _ = adapted("llama", config, four_bit=True)
    for name, module in list(dense.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            dense.set_submodule(name, linear)
    model.train()
    expected = step(dense.train(), inputs)
    assert_same_step(step(model, inputs), expected)
    fusetune.fuse(model)  # the 4-bit layers below, too
    assert_same_step(step(model, inputs), expected)


def test_fuse_reports_the_layers():
    model, _ = adapted("llama", pfeiffer)
    model.add_adapter("other", pfeiffer(leave_out=[0]))
    report = fusetune.fuse(model)
    rows = [row for row in report.rows if row.method == "bottleneck"]
    backend = fusetune.ops.OPS["bottleneck"].carrier("cpu", torch.float32, torch.float32)
    assert len(rows) == 4
    assert all(row.fused == (backend != "reference") for row in rows)
    model.set_adapter("other")
    rows = [row for row in report.refresh().rows if row.method == "bottleneck"]
    assert sum(row.reason == "none of the active adapters is here" for row in rows) == 2
    with model.disable_adapter():
        rows = [row for row in report.refresh().rows if row.method == "bottleneck"]
    assert all("disabled" in row.reason for row in rows)


@pytest.mark.parametrize("config", [pfeiffer, houlsby, parallel, no_post_norm])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_autocast(family, config):
    """As near to fp32 as the model itself is."""
    model, inputs = adapted(family, config)

    def logits(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**inputs).logits.double()

    error = (logits(True) - logits(False)).abs().max() / logits(False).abs().max()
    with model.disable_adapter():
        plain = (logits(True) - logits(False)).abs().max() / logits(False).abs().max()
    assert error <= 4 * plain
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_no_activation_is_kept():
    """What hooks put down is taken up in the same forward, also where another adapter wants it."""
    model, inputs = adapted("bert", no_post_norm, names=("first", "second"))
    model.add_adapter("third", pfeiffer(original_ln_before=False, leave_out=[0]))
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    for name in ("first", "third"):
        model.set_adapter(name)
        model(**inputs)
        assert all(layer._stream is None and layer._final is None for layer in layers)
    with model.disable_adapter():
        model(**inputs)
    assert all(layer._stream is None and layer._final is None for layer in layers)


# --- two processes --------------------------------------------------------------------------------


def worker(rank, path):
    try:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
        model, inputs = distributed_case()
        wrapped = nn.parallel.DistributedDataParallel(model)
        half = {key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}
        wrapped(**half).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save(grads, f"{path}.grads{rank}")
        dist.destroy_process_group()
    except BaseException:
        with open(f"{path}.error{rank}", "w") as file:
            traceback.print_exc(file=file)
        raise


def distributed_case():
    model, _ = adapted("llama", houlsby)
    ids = torch.randint(
        1, tiny_models.VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(3)
    )
    return model.train(), {"input_ids": ids, "labels": ids}


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ddp_of_two_processes(tmp_path):
    path = tmp_path / "store"
    context = torch.multiprocessing.start_processes(
        worker, args=(str(path),), nprocs=2, join=False, start_method="fork"
    )
    try:
        context.join(timeout=120)
    except Exception as error:
        errors = [file.read_text() for file in tmp_path.glob("*.error*")]
        raise AssertionError("\n".join(errors)) from error
    expected = step(*distributed_case())[1]
    for rank in range(2):
        got = torch.load(f"{path}.grads{rank}", weights_only=True)
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            assert_same(got[name], grad, name)


# --- models that are not in the table -------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mix = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.out = nn.Linear(size, size)

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        return x + self.out(torch.relu(self.norm2(x)))


class Model(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.blocks = nn.ModuleList([Block(size) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


ARCHITECTURE = methods.Architecture(
    (methods.Layers("blocks", methods.Location("mix", "norm"), methods.Location("out", "norm2")),),
    tokens=False,
)


def test_an_unknown_model_is_an_error_that_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"not in the table .*register_architecture.*architecture="
    ):
        get_peft_model(Model(), BottleneckConfig())


def test_a_model_that_the_config_describes():
    model = get_peft_model(Model(), pfeiffer(architecture=asdict(ARCHITECTURE)))
    adapter_models.randomise(model)
    x = torch.randn(2, 5, 16)
    expected = x
    for block in model.base_model.model.blocks:
        for norm, layer in ((block.norm, block.mix), (block.norm2, block.out)):
            h = norm(expected) if layer is block.mix else torch.relu(norm(expected))
            h = layer.base_layer(h)
            adapter = layer.bn_adapters["default"]
            a = adapter.up(torch.relu(adapter.down(h + expected)))
            expected = a + h + expected
    assert_same(model(x), expected)


def test_a_model_that_is_registered(monkeypatch):
    architectures = methods.bottleneck.architectures
    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(architectures.ARCHITECTURES))
    base = Model()
    base.config = type("Config", (), {"model_type": "mine", "hidden_size": 16})()
    methods.register_architecture("mine", ARCHITECTURE)
    model = get_peft_model(base, pfeiffer())
    assert len([n for n, _ in model.named_modules() if n.endswith("bn_adapters.default")]) == 4
    with pytest.raises(TypeError, match="must be an Architecture"):
        methods.register_architecture("mine", {"layers": ()})


def test_architectures_that_do_not_fit():
    wrong = asdict(ARCHITECTURE)
    wrong["layers"][0]["ffn"]["output"] = "nowhere"
    with pytest.raises(ValueError, match=r"has no module 'blocks.0.nowhere'"):
        get_peft_model(Model(), BottleneckConfig(architecture=wrong))
    with pytest.raises(ValueError, match="must be a dict with the keys"):
        get_peft_model(Model(), BottleneckConfig(architecture={"paths": []}))
    with pytest.raises(ValueError, match="leave_out: no layer is left"):
        get_peft_model(tiny_models.llama()[0], BottleneckConfig(leave_out=[0, 1]))
    with pytest.raises(ValueError, match="leave_out must be numbers of the 2 layers"):
        get_peft_model(tiny_models.llama()[0], BottleneckConfig(leave_out=[2]))
    with pytest.raises(ValueError, match="cross_adapter"):
        get_peft_model(tiny_models.llama()[0], BottleneckConfig(cross_adapter=True))
    with pytest.raises(ValueError, match="post_add"):
        get_peft_model(tiny_models.llama()[0], pfeiffer(residual_before_ln="post_add"))


def test_the_report_names_bottlenecks_too_wide_for_a_gpu_kernel():
    """They run by torch inside the backend's implementation: they are not to look fused."""
    pytest.importorskip("triton")
    from fusetune.sim import triton_sim

    for factor, reason in ((0.05, "features that a Triton kernel holds"), (8, None)):
        model, _ = adapted("llama", lambda factor=factor: pfeiffer(reduction_factor=factor))
        layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer))
        with triton_sim(80):
            backend, why = carrier(layer)
        assert backend == ("reference" if reason else "triton")
        assert why is None if reason is None else why.endswith(reason)
