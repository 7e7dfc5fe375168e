"""Runs the kernel tests through Triton's interpreter where there is no GPU.

The interpreter is chosen when Triton is imported, hence a process of its own a module.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these modules itself")
@pytest.mark.parametrize(
    "module", ["test_w4a16", "test_per_token_quant_int8", "test_w8a8_int8", "test_ops"]
)
def test_module_passes_interpreted(module: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{module}.py"]
    # -P-like safety: the tree must not shadow the installed package.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 10, done.stdout[-2000:]
