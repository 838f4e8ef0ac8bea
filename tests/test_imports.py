"""Who may import whom, and what `import fusetune` costs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusetune
from fusetune import _native

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pylib"
# Layers, lowest first: a module may import its own layer and those below.
LAYERS = (
    {"quantized_weight", "reference", "_native", "_triton"},
    {"ops"},
    {"nn"},
    {"methods"},
    {"integrations", "report"},
    {"fuse"},
    {"env"},
    {"bench", "sim"},
    {"demo", "verify"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Dotted names of fusetune that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "fusetune")
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # one dot: the file's own folder, which is its own layer
                assert node.level == 1, f"{path}: import from {'.' * node.level}"
            elif node.module == "fusetune":
                yield from (f"fusetune.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("fusetune."):
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} is in no layer: say which in LAYERS"
    for name in imported(path):
        part = name.split(".")[1] if "." in name else None
        if part in LEVEL:
            assert LEVEL[part] <= LEVEL[own], f"{path} imports {name}"
        else:  # something the package's own __init__ exports: only the top may go through it
            assert LEVEL[own] >= LEVEL["env"], f"{path} imports {name} through the package"


def test_reference_uses_torch_only():
    for path in (PACKAGE / "reference").glob("*.py"):
        names = set(imported(path))
        allowed = ("fusetune.reference", "fusetune.quantized_weight")
        assert all(name.startswith(allowed) for name in names), path


def run(code):
    # Bytecode is kept, as it is for users: compiling the sources takes most of the time.
    env = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=env,
    ).stdout


def test_import_is_light_and_imports_nothing_heavy():
    code = """
import sys, time, torch
start = time.process_time()
import fusetune
took = time.process_time() - start
heavy = ("transformers", "peft", "bitsandbytes", "accelerate", "triton", "typer", "matplotlib")
print(took, *[name for name in heavy if name in sys.modules])
"""
    # The process's own time, the best of three: others may hold the machine up.
    outputs = [run(code).split() for _ in range(3)]
    assert all(len(output) == 1 for output in outputs), outputs
    assert min(float(output[0]) for output in outputs) < 0.3


def test_the_native_module_is_there():
    """Otherwise every test of the cpu backend would fail for a reason that is hard to see."""
    assert _native.C is not None, _native.reason


def test_kernels_is_not_a_package():
    """It would hide Hugging Face's package of that name from everything run in this folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_the_one_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.MULTILINE)[1] == fusetune.__version__


def test_public_names_exist():
    for module in (fusetune, fusetune.ops, fusetune.nn):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.{name}"
    assert callable(fusetune.fuse)  # and not the module of that name
