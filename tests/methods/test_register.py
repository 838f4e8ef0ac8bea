"""When PEFT knows the methods, in processes of their own."""

import subprocess
import sys

import pytest


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout.split()


def test_importing_fusetune_after_peft_registers():
    code = """
import peft, fusetune
print("BOTTLENECK" in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
"""
    assert run(code) == ["True"]


def test_a_lazy_name_imports_peft_and_registers():
    code = """
import sys, fusetune
print("peft" in sys.modules, "BottleneckConfig" in dir(fusetune))
fusetune.BottleneckConfig
import peft
print("BOTTLENECK" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
"""
    assert run(code) == ["False", "True", "True"]


def test_an_old_peft_leaves_the_rest_of_fusetune_alone():
    code = """
import peft.tuners.tuners_utils as utils
del utils.BaseTuner._remove_adapter_name_from_key
import fusetune
print(callable(fusetune.fuse))
try:
    fusetune.Stack
except ImportError as error:
    print("0.21" in str(error))
"""
    assert run(code) == ["True", "True"]


def test_unknown_names_are_attribute_errors():
    import fusetune

    with pytest.raises(AttributeError, match="no attribute 'BottleneckConfiguration'"):
        _ = fusetune.BottleneckConfiguration
