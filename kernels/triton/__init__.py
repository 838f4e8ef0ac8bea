"""Triton kernels, imported as ``fusetune._triton``: one file for each op or each of its
passes, `launch_*` in each.

They import torch and triton only, and are imported when an op first runs on them.
"""
