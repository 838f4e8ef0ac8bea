"""The file of results: what was done, with which sources. Needs Python only."""

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_MEASURING = ("cases", "measured", "schemes", "timing")
_ENDINGS = (".py", ".cu", ".cuh", ".h", ".cpp")


def source_hash() -> str:
    """Of everything that results depend on."""
    folders = [ROOT / name for name in ("pylib", "kernels", "csrc")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in _ENDINGS]
    files += [p for name in _MEASURING for p in Path(__file__).parent.glob(f"{name}*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
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
