"""Measurements behind the README's tables; see `python -m benchmarks.run --help`."""
