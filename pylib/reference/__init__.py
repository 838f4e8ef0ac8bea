"""Every operation in plain PyTorch: its definition, the tests' ground truth, the fallback."""
