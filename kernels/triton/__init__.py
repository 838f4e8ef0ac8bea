"""Triton kernels, imported as ``fusetune._triton``. Empty: the GPU backend comes with its own issue."""
