"""Triton kernels, imported as ``fusetune._triton``: none yet."""
