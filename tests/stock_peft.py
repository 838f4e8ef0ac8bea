"""PEFT as the oracle with a transformers that it does not know yet.

transformers 5.24 calls a model's cache `cache`. PEFT 0.21 still hands it over, and looks for it, as
`past_key_values`: `generate` then ignores prefixes, classifiers are refused, and transformers' own
`add_adapter` asks for a PEFT that is not out. Here stock PEFT sees the old name and passes, as with
transformers 5.23. Fused models are left as they are on a user's machine.
"""

import inspect
from types import SimpleNamespace

import peft
import peft.peft_model
import transformers.integrations.peft
from packaging.version import Version
from transformers import LlamaModel

OLD, NEW = "past_key_values", "cache"


def needed():
    """Whether this PEFT does not know this transformers' name."""
    renamed = NEW in inspect.signature(LlamaModel.forward).parameters
    return renamed and Version(peft.__version__) < Version("0.22")


def rename(arguments, old, new):
    return {new if name == old else name: value for name, value in arguments.items()}


def signature(function):
    """inspect.signature with the old name."""
    own = inspect.signature(function)
    if NEW not in own.parameters or OLD in own.parameters:
        return own
    parameters = [
        value.replace(name=OLD) if name == NEW else value for name, value in own.parameters.items()
    ]
    return own.replace(parameters=parameters)


def with_old_name(prepare):
    """A PeftModel's prepare_inputs_for_generation, between a base model's and a forward's."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
        if type(self).__module__.startswith("fusetune"):
            return prepare(self, *args, **kwargs)
        base = self.base_model_prepare_inputs_for_generation
        self.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: rename(
            base(*args, **kwargs), NEW, OLD
        )
        try:
            return rename(prepare(self, *args, **kwargs), OLD, NEW)
        finally:
            self.base_model_prepare_inputs_for_generation = base

    return prepare_inputs_for_generation


def patch():
    """Once is enough; without effect where PEFT knows the name."""
    if not needed() or isinstance(peft.peft_model.inspect, SimpleNamespace):
        return
    transformers.integrations.peft.check_peft_version = lambda min_version: None
    peft.peft_model.inspect = SimpleNamespace(signature=signature)
    for kind in (peft.PeftModelForCausalLM, peft.PeftModelForSeq2SeqLM):
        kind.prepare_inputs_for_generation = with_old_name(kind.prepare_inputs_for_generation)
