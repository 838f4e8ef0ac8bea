"""Bottleneck adapters, their compositions, fusions and invertible blocks."""
