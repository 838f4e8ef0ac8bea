"""Measures the kernels of this machine against what they replace.

`fusetune bench` runs a short selection; `python -m benchmarks.run` in the repository all of it.
"""

from .markdown import table
from .selection import OPS, cases_of
from .timing import Row, measure

__all__ = ["OPS", "Row", "cases_of", "measure", "table"]
