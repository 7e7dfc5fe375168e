"""Checks what the wheel and the source distribution hold: both packages, their data, nothing else."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = (
    "pymllm/__init__.py",
    "pymllm/py.typed",
    "pymllm/cli/main.py",
    "pymllm/quantization/methods/compressed_tensors.py",
    "pymllm_kernels/__init__.py",
    "pymllm_kernels/py.typed",
    "pymllm_kernels/w4a16/kernel.py",
    "pymllm_kernels/w8a8_int8/kernel.py",
    "pymllm_kernels/per_token_quant_int8/kernel.py",
)


def main(folder: Path) -> None:
    """Exits with a message naming the first thing missing or too much."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name}: found a platform wheel, expected py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    for name in NEEDED:
        if name not in names:
            sys.exit(f"{wheel.name}: {name} is missing")
    foreign = [
        name
        for name in names
        if not name.startswith(("pymllm/", "pymllm_kernels/", "pymllm-"))
        or name.endswith((".so", ".cu", ".pyc"))
    ]
    if foreign:
        sys.exit(f"{wheel.name}: does not belong there: {foreign}")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in ("pyproject.toml", "README.md", "kernels/pymllm_kernels/__init__.py"):
        if name not in inside:
            sys.exit(f"{sdist.name}: {name} is missing")
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(inside)} entries")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
