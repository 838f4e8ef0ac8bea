"""The file of results: what was done, with which sources. Needs Python only."""

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def source_hash() -> str:
    """Of everything that results depend on."""
    digest = hashlib.sha256()
    for folder in ("pylib", "kernels", "csrc", "benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"steps": {}, "cases": {}}


def store(path: Path, key: str, entry: dict[str, Any], section: str = "cases") -> None:
    """Adds an entry to the file at once: what was done survives whatever comes."""
    content = load(path)
    content[section][key] = entry
    save(path, content)


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)
