"""What a measurement was made on: board, clocks, versions, sources."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch

PEERS = ("gemlite", "humming-kernels", "vllm", "torchao")
_QUERY = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_NAMES = ("sm_mhz", "memory_mhz", "temperature_c", "power_w")
_LOAD_SIDE = 4096


def environment(device: torch.device) -> dict[str, Any]:
    """The ``environment`` of the document, without clocks."""
    facts: dict[str, Any] = {
        "device": device.type,
        "gpu": _cpu_name(),
        "capability": None,
        "multiprocessors": None,
        "l2_bytes": None,
        "memory_bytes": None,
        "driver": None,
        "versions": versions(),
        "commit": commit(),
        "clocks_before": None,
        "clocks_after": None,
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        driver = _nvidia_smi(device, ("driver_version",))
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": int(getattr(properties, "L2_cache_size", 0)) or None,
            "memory_bytes": int(properties.total_memory),
            "driver": driver[0] if driver else None,
        }
    return facts


def versions() -> dict[str, str]:
    """Versions of what was there; absent packages are left out."""
    import pymllm

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "pymllm": pymllm.__version__,
        **{name: _version(name) for name in PEERS},
    }
    return {name: version for name, version in found.items() if version}


def commit() -> str | None:
    """Git commit of the sources, ``+`` appended if they were changed; ``None`` outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if head is None:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return head.strip() + ("+" if changed and changed.strip() else "")


def clocks(device: torch.device) -> dict[str, float | None] | None:
    """Clocks, temperature and power while the GPU is busy; ``None`` where they cannot be read."""
    if device.type != "cuda":
        return None
    a = torch.randn(_LOAD_SIDE, _LOAD_SIDE, device=device).to(torch.bfloat16)
    answers: list[list[str] | None] = []
    asking = threading.Thread(target=lambda: answers.append(_nvidia_smi(device, _QUERY)))
    asking.start()
    # Idle clocks say nothing.
    while asking.is_alive():
        for _ in range(10):
            a @ a
        torch.cuda.synchronize(device)
    values = answers[0] if answers else None
    if values is None or len(values) != len(_NAMES):
        return None
    return {name: _number(value) for name, value in zip(_NAMES, values, strict=True)}


def _nvidia_smi(device: torch.device, fields: tuple[str, ...]) -> list[str] | None:
    properties: Any = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    # Its numbering ignores CUDA_VISIBLE_DEVICES; the uuid does not.
    text = _output([*command, f"--id=GPU-{uuid}"]) if uuid is not None else None
    if text is None and torch.cuda.device_count() == 1:
        text = _output(command)
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return [part.strip() for part in lines[0].split(",")] if lines else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
