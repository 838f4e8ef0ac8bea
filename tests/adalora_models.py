"""Tiny models with AdaLoRA whose triplets all count."""

import tiny_models
import torch
from peft import AdaLoraConfig, get_peft_model

SCHEDULE = {"init_r": 6, "target_r": 3, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 1}


def with_adalora(model, *, autocast_adapter_dtype=True, **options):
    """The model wrapped by PEFT; E, A and B are of a size that shows."""
    options = {"target_modules": "all-linear", "lora_alpha": 8, **SCHEDULE, **options}
    peft = get_peft_model(
        model, AdaLoraConfig(**options), autocast_adapter_dtype=autocast_adapter_dtype
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_E" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return peft


def adalora(kind="llama", *, four_bit=False, dtype=torch.float32, layers=1, seed=0, **options):
    """(model, inputs); the same for the same arguments."""
    torch.manual_seed(seed)
    model, inputs = tiny_models.llama(layers) if kind == "llama" else getattr(tiny_models, kind)()
    model = model.to(dtype)
    if kind == "llama":  # without a task PEFT's model does not add the regulariser
        options = {"task_type": "CAUSAL_LM", **options}
    if four_bit:
        tiny_models.quantize(model)
    return with_adalora(model, **options), inputs


def ranknums(model):
    return {n: p for n, p in model.named_parameters() if "ranknum" in n}
