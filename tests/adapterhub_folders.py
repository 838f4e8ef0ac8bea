"""AdapterHub's folders, for tests: how they are read, and spoiled."""

import json
import shutil
from pathlib import Path

import torch
from oracle_cases import FOLDER
from safetensors.torch import load_file


def weights(folder):
    (path,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def copied(case, tmp_path, adapter="a"):
    return Path(shutil.copytree(FOLDER / case / adapter, tmp_path / "copy"))


def edit(folder, change, name="adapter_config.json"):
    header = json.loads((folder / name).read_text())
    change(header)
    (folder / name).write_text(json.dumps(header))


def edit_weights(folder, change, name="pytorch_adapter.bin"):
    state = torch.load(folder / name, weights_only=True)
    torch.save(change(state) or state, folder / name)


def inputs_of(stored):
    names = (key.removeprefix("input.") for key in stored if key.startswith("input."))
    return {name: stored[f"input.{name}"] for name in names if name != "projection"}


def randomize(model):
    """Moves all adapters' parameters away from where they are; attention stays soft."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bn_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.4 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2
                parameter.add_(noise * scale)
