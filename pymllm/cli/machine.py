"""The GPUs of this machine, found without torch."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pymllm.cli.checks import Gpu


@dataclass(frozen=True)
class Driver:
    """The GPUs of this machine as found without torch."""

    gpus: tuple[Gpu, ...] = ()
    version: str | None = None


def find_gpus(
    which: Callable[[str], str | None],
    output: Callable[[Sequence[str]], str | None],
    root: Path = Path("/"),
) -> Driver:
    """GPUs that the driver lists.

    Args:
        which: finds a program.
        output: runs a command; its stdout, or ``None`` if it failed.
        root: where ``/proc`` and ``/dev`` are.
    """
    if smi := which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        rows = [line.split(", ") for line in (output(query) or "").splitlines()]
        gpus = tuple(Gpu(row[0], _capability(row[2])) for row in rows if len(row) == 3)
        if gpus:
            return Driver(gpus, rows[0][1])
    models = []
    for information in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        lines = information.read_text(errors="replace").splitlines()
        models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    if models:
        return Driver(tuple(Gpu(model, None) for model in models))
    if (root / "dev/kfd").exists():
        return Driver((Gpu("AMD GPU", None),))
    return Driver()


def hidden_by(environ: Mapping[str, str]) -> str | None:
    """The assignment that hides every GPU from torch, if there is one."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if environ.get(name) in ("", "-1"):
            return f"{name}={environ[name]!r}"
    return None


def stdout_of(command: Sequence[str]) -> str | None:
    """What a command prints, or ``None`` if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _capability(text: str) -> tuple[int, int] | None:
    major, _, minor = text.strip().partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
