"""Runs a function in a process of its own: what earlier measurements left behind does not count."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


def in_own_process(function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
    """Its result. It and its arguments are pickled; the process is a new one, not a fork."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
