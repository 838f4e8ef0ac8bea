"""What fusetune finds on this machine: versions, CPU, backends and why, GPUs.

`python -m fusetune.env` and `fusetune env` print it; paste it into a bug report.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fusetune import _native, ops
from fusetune.ops import _cuda, _triton

_PACKAGES = ("fusetune", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton")
# Those of /proc/cpuinfo that kernels, ours or torch's, are chosen by.
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
)
_ISAS = {
    "amx": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "neon": "NEON",
}


def information() -> dict[str, Any]:
    """Everything, in plain types that JSON can hold."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "cpu": _cpu(),
        "native": _native_module(),
        "triton": _availability(_triton.reason()),
        "cuda": _availability(_cuda.reason()),
        "backend": ops.backend(),
        "backends": backends("cpu"),
        "gpus": _gpus(),
        "gpu_backends": backends("cuda") if _gpus() else {},
    }


def backends(device: str) -> dict[str, dict[str, Any]]:
    """For each op on fp32 tensors of a device: the backend chosen, and why others are not."""
    result: dict[str, dict[str, Any]] = {}
    for name, op in sorted(ops.OPS.items()):
        case = ops.Case(device, torch.float32)
        reasons = {impl: why for impl, why in op.explain(case) if why is not None}
        try:
            chosen: str | None = op.select(case).name
        except ValueError as error:  # a backend is forced that cannot do this
            chosen, reasons = None, {ops.backend(): str(error)}
        result[name] = {"chosen": chosen, "not": reasons}
    return result


def cpu_name() -> str:
    """The processor's marketing name, or its architecture where that is not to be had.

    Virtual machines may be told "AMD EPYC" or "Intel Xeon Processor" and no more: the generation is
    added to it.
    """
    info = _cpuinfo()
    name = info.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    generation = None if any(map(str.isdigit, name)) else _zen(info) or _lake_or_rapids(info)
    return f"{name} ({generation})" if generation else name


def _zen(info: dict[str, str]) -> str | None:
    if info.get("vendor_id") != "AuthenticAMD":
        return None
    if info.get("cpu family") == "25":
        return "Zen 4" if "avx512f" in info.get("flags", "").split() else "Zen 3"
    return {"23": "Zen 1 or 2", "26": "Zen 5"}.get(info.get("cpu family", ""))


def _lake_or_rapids(info: dict[str, str]) -> str | None:
    if info.get("vendor_id") != "GenuineIntel" or info.get("cpu family") != "6":
        return None
    server = {"85": "Skylake or Cascade Lake", "106": "Ice Lake", "143": "Sapphire Rapids"}
    server |= {"207": "Emerald Rapids", "173": "Granite Rapids"}
    return server.get(info.get("model", ""))


def cpu_label() -> str:
    """What a time on the CPU was measured on, with the kernels' instruction set: "AMD EPYC, AVX2".

    Processors of one name may have different sets. "forced": not the best this one has, which other
    libraries still use.
    """
    native = _native.C
    if native is None:
        return f"{cpu_name()}, no kernels"
    isa = native.isa()
    forced = "" if isa == native.available_isas()[0] else " forced"
    return f"{cpu_name()}, {_ISAS.get(isa, isa)}{forced}"


def describe() -> str:
    """`information()` as text for people."""
    info = information()
    cpu, native = info["cpu"], info["native"]
    lines = [f"{name:<16}{version}" for name, version in info["versions"].items()]
    lines += [
        "",
        f"{'CPU':<16}{cpu['name']} ({cpu['machine']}), {cpu['threads']} threads in torch's pool",
        f"{'features':<16}{' '.join(cpu['features']) or 'none known'}",
    ]
    if native["available"]:
        lines.append(
            f"{'CPU kernels':<16}{native['isa']} (available: {', '.join(native['isas'])}), "
            f"thread pool: {native['pool']}"
        )
    else:
        lines.append(f"{'CPU kernels':<16}none: {native['reason']}")
    for label, key in (("Triton", "triton"), ("CUDA", "cuda")):
        lines.append(f"{label + ' kernels':<16}{info[key]['reason'] or 'available'}")
    lines.append(f"{'GPUs':<16}{', '.join(info['gpus']) or 'none that torch can use'}")
    lines += ["", f"backend {info['backend']!r}; on CPU tensors:"]
    lines += _choices(info["backends"])
    if info["gpu_backends"]:
        lines += ["on a GPU's tensors:", *_choices(info["gpu_backends"])]
    return "\n".join(lines)


def _choices(table: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, entry in table.items():
        reasons = "; ".join(f"not {impl}: {why}" for impl, why in entry["not"].items())
        lines.append(f"  {name:<24}{entry['chosen'] or '-':<12}{reasons}".rstrip())
    return lines


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty elsewhere than on Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu() -> dict[str, Any]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "name": cpu_name(),
        "machine": platform.machine(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
    }


def _native_module() -> dict[str, Any]:
    native = _native.C
    if native is None:
        return {"available": False, "reason": _native.reason}
    return {
        "available": True,
        "isa": native.isa(),
        "isas": native.available_isas(),
        "pool": native.pool_name(),
    }


def _availability(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    names = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return names


if __name__ == "__main__":
    print(describe())
