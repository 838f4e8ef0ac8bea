"""The cases of the oracle: model, active composition, adapters and fusion.

An adapter is (id of a config of adapters, its changes). A composition is JSON:
``{"stack": ["a", "b"]}``, ``{"split": ["a", "b"], "splits": [3, 4]}``.
"""

REDUCTION = 4  # 4 bottleneck features of 16


def case(model, composition, fusion=None, fusion_name=None, **adapters):
    """One case. ``fusion``: (id, changes) of the config of the fusion of every adapter in order."""
    return {
        "model": model,
        "composition": composition,
        "adapters": {
            name: {"config": config, "changes": {"reduction_factor": REDUCTION, **changes}}
            for name, (config, changes) in adapters.items()
        },
        "fusion": None if fusion is None else {"config": fusion[0], "changes": fusion[1]},
        "fusion_name": fusion_name,
    }


def one(config, model="bert", **changes):
    return case(model, {"stack": ["a"]}, a=(config, changes))


def several(config, composition, model="bert", names="ab", **changes):
    return case(model, composition, **dict.fromkeys(names, (config, changes)))


def fused(fusion, config="seq_bn", names="ab", composition=None, **fusion_changes):
    adapters = {name: (config, {}) for name in names}
    return case("bert", composition or {"fuse": list(names)}, (fusion, fusion_changes), **adapters)


CASES = {
    # Placements and options of one adapter
    "double_seq_bn": one("double_seq_bn"),
    "seq_bn": one("seq_bn"),
    "par_bn": one("par_bn"),
    "par_bn_both": one("par_bn", mh_adapter=True, ln_before=True, ln_after=True, use_gating=True),
    "scaling_learned": one("scaled_par_bn"),
    "scaling_channel": one("double_seq_bn", scaling="channel"),
    "scaling_constant": one("seq_bn", scaling=0.5),
    "gating": one("double_seq_bn", use_gating=True),
    "ln_before": one("double_seq_bn", ln_before=True, use_gating=True),
    "ln_after": one("seq_bn", ln_after=True),
    "ln_after_residual_before": one("seq_bn", ln_after=True, adapter_residual_before_ln=True),
    "residual_after_ln": one("seq_bn", residual_before_ln=False),
    "residual_post_add": one("seq_bn", residual_before_ln="post_add"),
    "original_ln_before_only": one(  # AdapterPlus without its stochastic depth
        "seq_bn",
        original_ln_after=False,
        residual_before_ln=False,
        scaling="channel",
        non_linearity="gelu",
        init_weights="houlsby",
    ),
    "no_original_ln": one("double_seq_bn", original_ln_after=False),
    "both_original_ln": one("double_seq_bn", original_ln_before=True),
    "gelu": one("double_seq_bn", non_linearity="gelu"),
    "gelu_new": one("double_seq_bn", non_linearity="gelu_new"),
    "tanh": one("seq_bn", non_linearity="tanh"),
    "leakyrelu": one("seq_bn", non_linearity="leakyrelu"),
    "reduction_by_layer": one("double_seq_bn", reduction_factor={"0": 16, "default": 8}),
    "leave_out": one("double_seq_bn", leave_out=[0]),
    # Compositions
    "stack": several("seq_bn", {"stack": ["a", "b"]}),
    "stack_double": several("double_seq_bn", {"stack": ["a", "b"]}),
    "stack_leave_out": case(
        "bert", {"stack": ["a", "b"]}, a=("seq_bn", {"leave_out": [1]}), b=("double_seq_bn", {})
    ),
    "stack_par_bn": several("par_bn", {"stack": ["a", "b"]}),
    "parallel": several("double_seq_bn", {"parallel": ["a", "b"]}),
    "parallel_seq_bn": several("seq_bn", {"parallel": ["a", "b", "c"]}, names="abc"),
    "parallel_of_stack": several("seq_bn", {"parallel": [{"stack": ["a", "b"]}, "c"]}, names="abc"),
    "stack_of_parallel": several("seq_bn", {"stack": ["a", {"parallel": ["b", "c"]}]}, names="abc"),
    "batch_split": several("double_seq_bn", {"batch_split": ["a", "b"], "batch_sizes": [1, 2]}),
    "batch_split_par_bn": several("par_bn", {"batch_split": ["a", "b"], "batch_sizes": [2, 1]}),
    "split": several("seq_bn", {"split": ["a", "b"], "splits": [3, 4]}),
    "average": several("double_seq_bn", {"average": ["a", "b"], "weights": [1.0, 3.0]}),
    "average_default": several("seq_bn", {"average": ["a", "b", "c"]}, names="abc"),
    # Fusion
    "fusion_dynamic": fused("dynamic"),
    "fusion_dynamic_three": fused("dynamic", names="abc"),
    "fusion_static": fused("static"),
    "fusion_double": fused("dynamic", "double_seq_bn", names="abc"),
    "fusion_query_before_ln": fused("dynamic", query_before_ln=True),
    "fusion_residual_before": fused("dynamic", residual_before=True),
    "fusion_value_after_softmax": fused("dynamic", value_before_softmax=False),
    "fusion_temperature": fused("dynamic", temperature=True),
    "fusion_par_bn": fused("dynamic", "par_bn"),
    "fusion_no_query_key": fused("dynamic", query=False, key=False),
    "fusion_without_projections": fused("static", query=False, key=False),
    "fusion_leave_out": case(  # the checkpoint has a fusion in the layer left out too
        "bert",
        {"fuse": ["a", "b"]},
        ("dynamic", {}),
        a=("seq_bn", {"leave_out": [0]}),
        b=("seq_bn", {"leave_out": [0]}),
    ),
    "fusion_in_stack": case(
        "bert",
        {"stack": ["lang", {"fuse": ["a", "b"]}]},
        ("dynamic", {}),
        "a,b",
        a=("seq_bn", {}),
        b=("seq_bn", {}),
        lang=("seq_bn", {}),
    ),
    "fusion_of_stacks": case(
        "bert",
        {"fuse": [{"stack": ["lang", "a"]}, "b"]},
        ("dynamic", {}),
        "a,b",
        a=("double_seq_bn", {}),
        b=("double_seq_bn", {}),
        lang=("double_seq_bn", {}),
    ),
    # MAD-X
    "seq_bn_inv": one("seq_bn_inv", "bert_mlm"),
    "double_seq_bn_inv": one("double_seq_bn_inv", "bert_mlm"),
    "mad_x": case(
        "bert_mlm", {"stack": ["lang", "task"]}, lang=("seq_bn_inv", {}), task=("seq_bn", {})
    ),
    "mad_x_task_first": case(
        "bert_mlm", {"stack": ["task", "lang"]}, lang=("seq_bn_inv", {}), task=("seq_bn", {})
    ),
    # Other architectures
    **{
        f"{model}_{config}": one(config, model, **changes)
        for model in ("roberta", "distilbert", "vit", "gpt2", "llama", "mistral", "qwen3", "t5")
        for config, changes in (
            ("double_seq_bn", {}),
            ("seq_bn", {"mh_adapter": True}),
            ("par_bn", {"mh_adapter": True}),
        )
    },
    # Not with original_ln_before: adapters then takes the last layer's norm in every layer
    "gemma2_double_seq_bn": one("double_seq_bn", "gemma2"),
    "gemma2_par_bn": one("par_bn", "gemma2", mh_adapter=True),
    "bare_bert_seq_bn_inv": one("seq_bn_inv", "bare_bert", mh_adapter=True),
    "bare_bert_safetensors": one("double_seq_bn", "bare_bert"),
    "t5_cross": one("double_seq_bn", "t5", cross_adapter=True, leave_out=[0, 3]),
    "distilbert_inv": one("seq_bn_inv", "distilbert"),
    "gpt2_inv": one("seq_bn_inv", "gpt2"),
    "llama_inv": one("seq_bn_inv", "llama"),
    "t5_inv": one("seq_bn_inv", "t5"),
    "qwen3_inv": one("seq_bn_inv", "qwen3"),
    "gpt2_parallel": several("double_seq_bn", {"parallel": ["a", "b"]}, "gpt2"),
    "t5_batch_split": several(
        "double_seq_bn", {"batch_split": ["a", "b"], "batch_sizes": [1, 2]}, "t5"
    ),
}
