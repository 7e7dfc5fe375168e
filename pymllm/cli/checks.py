"""The doctor's checks: functions of what was found, so that every outcome can be simulated."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OK = "ok"
MISSING = "missing"
FAILED = "failed"
WARNING = "warning"
SKIPPED = "skipped"
PROBLEMS = (MISSING, FAILED)

CACHE = "Triton cache"

MIN_PYTHON = (3, 10)
_TORCH_INDEX = "https://download.pytorch.org/whl/cu128"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``missing``, ``failed`` (there, but does not work), ``warning`` or
            ``skipped``.
        found: what is there.
        fix: one sentence with a command, or ``None`` when nothing is to be done.
    """

    name: str
    status: str
    found: str
    fix: str | None = None

    @property
    def is_problem(self) -> bool:
        """Whether the library cannot use the device at its best because of this."""
        return self.status in PROBLEMS


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch or the driver names it; ``capability`` is ``None`` on AMD or if unknown."""

    name: str
    capability: tuple[int, int] | None

    @property
    def uses_triton(self) -> bool:
        """Whether Triton kernels are meant to run on it."""
        return self.capability is None or self.capability >= (8, 0)

    def __str__(self) -> str:
        if self.capability is None:
            return self.name
        return "{} (capability {}.{})".format(self.name, *self.capability)


def check_python(version: Sequence[int], executable: str) -> Check:
    """The interpreter is new enough."""
    found = ".".join(map(str, version[:3])) + f" ({executable})"
    if tuple(version[:2]) >= MIN_PYTHON:
        return Check("Python", OK, found)
    return Check("Python", MISSING, found, "use Python 3.10 or newer: python3.12 -m venv .venv")


def check_torch(
    version: str | None, cuda: str | None, hip: str | None, error: str | None, gpu_here: bool
) -> Check:
    """torch imports, and is built for the GPU that is here."""
    if version is None:
        if error is None or error.startswith("ModuleNotFoundError"):
            return Check("torch", MISSING, error or "not installed", "pip install torch")
        return Check("torch", FAILED, error, "pip install --force-reinstall torch")
    if cuda is not None:
        return Check("torch", OK, f"{version}, built for CUDA {cuda}")
    if hip is not None:
        return Check("torch", OK, f"{version}, built for ROCm {hip}")
    if not gpu_here:
        return Check("torch", OK, f"{version}, CPU build")
    return Check(
        "torch",
        MISSING,
        f"{version}, a CPU build: it cannot use the GPU",
        f"pip install --force-reinstall torch --index-url {_TORCH_INDEX}",
    )


def check_gpu(
    driver_gpus: Sequence[Gpu],
    driver_version: str | None,
    torch_gpus: Sequence[Gpu],
    torch_error: str | None,
    hidden_by: str | None,
    torch_usable: bool = True,
) -> Check:
    """The GPUs that the driver lists are those that torch can use.

    Args:
        driver_gpus: GPUs listed without torch's help.
        driver_version: version of the NVIDIA driver, if known.
        torch_gpus: GPUs torch can use.
        torch_error: what torch said when it found none.
        hidden_by: assignment of an environment variable that hides the GPUs from torch.
        torch_usable: whether torch is there and built for a GPU; if not, that is its own check's
            finding, not this one's.
    """
    driver = f", driver {driver_version}" if driver_version else ""
    if torch_gpus:
        return Check("GPU", OK, ", ".join(map(str, torch_gpus)) + driver)
    if not driver_gpus:
        return Check(
            "GPU",
            SKIPPED,
            "none found: the CPU path counts",
            "if there is one, install its driver, or start the container with: docker run --gpus all",
        )
    listed = ", ".join(map(str, driver_gpus)) + driver
    if hidden_by is not None:
        return Check("GPU", SKIPPED, f"{listed}; hidden by {hidden_by}: the CPU path counts")
    if not torch_usable:
        return Check("GPU", OK, listed)
    return Check(
        "GPU",
        FAILED,
        f"{listed}, but torch cannot use it" + (f": {torch_error}" if torch_error else ""),
        "install a driver new enough for torch's CUDA (compare nvidia-smi with the torch line)",
    )


def check_triton(version: str | None, error: str | None, interpreting: bool, needed: bool) -> Check:
    """Triton imports, and compiles rather than interprets."""
    if version is None:
        status = MISSING if needed else WARNING
        found = error or "not installed"
        return Check("Triton", status, found, "pip install 'triton>=3.6,<4'")
    if interpreting:
        return Check(
            "Triton",
            WARNING,
            f"{version}, interpreting: kernels run in Python, slowly",
            "unset TRITON_INTERPRET",
        )
    return Check("Triton", OK, version)


def check_compiler(
    environ: Mapping[str, str], which: Callable[[str], str | None], needed: bool
) -> Check:
    """A C compiler where Triton looks: the variable ``CC``, else gcc, else clang."""
    name, status = "C compiler", MISSING if needed else WARNING
    named = environ.get("CC")
    if named is not None:
        # Triton runs the whole value as one program, so `ccache gcc` is not found.
        path = which(named)
        if path is not None:
            return Check(name, OK, f"{path} (from CC)")
        return Check(name, status, f"CC={named!r} is not a program", "unset CC, or export CC=gcc")
    for candidate in ("gcc", "clang"):
        if path := which(candidate):
            return Check(name, OK, path)
    if path := which("cc"):
        return Check(name, status, f"{path} only, Triton looks for gcc or clang", "export CC=cc")
    return Check(
        name,
        status,
        "no gcc or clang on PATH: Triton builds launchers with one; ours on NVIDIA need none",
        "apt-get install gcc libc6-dev (Fedora: dnf install gcc)",
    )


def check_headers(include_dir: str, version: Sequence[int], needed: bool) -> Check:
    """``Python.h`` where Triton's launcher is compiled against it."""
    if Path(include_dir, "Python.h").is_file():
        return Check("Python headers", OK, include_dir)
    dotted = f"{version[0]}.{version[1]}"
    return Check(
        "Python headers",
        MISSING if needed else WARNING,
        f"no Python.h in {include_dir}: Triton builds launchers with it; ours on NVIDIA need none",
        f"apt-get install python{dotted}-dev (Fedora: dnf install python{dotted}-devel)",
    )


def ptxas_targets(help_text: str) -> frozenset[str]:
    """Targets such as ``sm_90a`` that ``ptxas --help`` lists; old ones lack ``--list-arch``."""
    return frozenset(re.findall(r"\bsm_\d+[af]?\b", help_text))


def ptxas_target(capability: tuple[int, int]) -> str:
    """The target Triton names to ptxas: with the ``a`` suffix from 9.0 on."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability >= (9, 0) else "")


def check_ptxas(
    gpu: Gpu | None, path: str | None, version: str | None, help_text: str, needed: bool
) -> Check:
    """Triton's assembler knows the GPU."""
    name, status = "ptxas", MISSING if needed else WARNING
    if path is None:
        return Check(name, status, help_text or "none", "pip install --force-reinstall triton")
    found = f"{version or 'unknown version'} ({path})"
    if gpu is None or gpu.capability is None:
        return Check(name, OK, found)
    target = ptxas_target(gpu.capability)
    if target in ptxas_targets(help_text):
        return Check(name, OK, f"{found}, knows {target}")
    variable = "TRITON_" + Path(path).name.removesuffix(".exe").upper().replace("-", "_") + "_PATH"
    if not variable.startswith("TRITON_PTXAS"):
        variable = "TRITON_PTXAS_PATH"
    return Check(
        name,
        status,
        f"{found} does not know {target} of {gpu}",
        f"pip install --upgrade torch triton, or export {variable}=/usr/local/cuda/bin/ptxas"
        " from a newer CUDA toolkit",
    )


def check_cache(directory: str | None, needed: bool) -> Check:
    """Triton can write its cache; creates the directory, as Triton would."""
    if directory is None:
        return Check(CACHE, SKIPPED, "without Triton there is none")
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        return Check(
            CACHE,
            MISSING if needed else WARNING,
            f"cannot write {directory}: {error.strerror or error}",
            "export TRITON_CACHE_DIR=/tmp/triton-cache, or another directory you can write",
        )
    free = shutil.disk_usage(directory).free >> 20
    return Check(CACHE, OK, f"{directory}, {free} MiB free")
