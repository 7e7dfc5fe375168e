"""What a measurement was made on: board, clocks, versions, sources."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pymllm.bench.nvml import Board

PEERS = ("gemlite", "humming-kernels", "vllm", "torchao")
_LOAD_SIDE, _LOAD_CALLS = 4096, 100


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
        "clocks_unreadable": None,
        "versions": versions(),
        "commit": commit(),
        "clocks_before": None,
        "clocks_after": None,
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        watched, reason = board(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": int(getattr(properties, "L2_cache_size", 0)) or None,
            "memory_bytes": int(properties.total_memory),
            "driver": watched.driver() if watched else None,
            "clocks_unreadable": reason,
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


@functools.cache
def board(device: torch.device) -> tuple[Board | None, str | None]:
    """What tells a device's clocks and power, or why nothing does."""
    if device.type != "cuda":
        return None, "not a GPU"
    try:
        return Board(device), None
    except (OSError, AttributeError) as error:
        return None, str(error)


def clocks(device: torch.device) -> dict[str, Any] | None:
    """Clocks, temperature and power while the GPU is busy; ``None`` where they cannot be read."""
    watched, _ = board(device)
    if watched is None:
        return None
    a = torch.randn(_LOAD_SIDE, _LOAD_SIDE, device=device).to(torch.bfloat16)
    # Idle clocks say nothing.
    for _ in range(_LOAD_CALLS):
        a @ a
    facts = watched.facts()
    torch.cuda.synchronize(device)
    return facts


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


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
