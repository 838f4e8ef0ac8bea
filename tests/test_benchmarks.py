"""Benchmarks that have no test of their own run, and their tables can be drawn."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

pytest.importorskip("tabulate")

from benchmarks import method_tables, prefix_part  # noqa: E402


def test_prefix_part(tmp_path, monkeypatch, capsys):
    path = tmp_path / "part.json"
    command = ["prefix_part", "--rounds", "1", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(prefix_part, "BATCH", 1)
    monkeypatch.setattr(prefix_part, "TOKENS", 40)
    monkeypatch.setattr(sys, "argv", command)
    prefix_part.main()
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 4
    for row in found["rows"].values():
        assert min(row[kind] for kind in ("torch", "ours", "with prefix")) > 0
    assert method_tables.prefix_part(found) in capsys.readouterr().out


def test_table_of_memory():
    row = {"op": "bottleneck", "m": 4, "h": 8, "width": 2, "x_and_y": 2.0, "parameters": 0.5}
    figures = {"cpu": "a CPU", "threads": 1, "rows": [{**row, "added": 2.25}]}
    text = method_tables.memory(figures)
    assert "| bottleneck, 4 × 8, 2" in text
    assert "1.125" in text
    assert "0.900" in text
