"""The scripts in examples/ run, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_trainer(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line number {n}" for n in range(30)))
    result = subprocess.run(
        [sys.executable, EXAMPLES / "trainer.py", model_folder, text, tmp_path / "out"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    # Seven linear layers, attention, MLP and two norms in each of two blocks; norm, head and loss.
    assert "27 of 27 fused" in result.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
