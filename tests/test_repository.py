"""Rules of the repository that a reviewer would otherwise have to repeat."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "pymllm").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
TORCH_ONLY = [
    "pymllm_kernels",
    "pymllm_kernels.selection",
    "pymllm_kernels.w4a16.reference",
    "pymllm_kernels.w8a8_int8.reference",
    "pymllm_kernels.per_token_quant_int8.reference",
    "pymllm.quantization.methods.compressed_tensors",
    "pymllm.executor.model_runner",
    "pymllm.checkpoint",
]


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_kernels_is_never_answered_here() -> None:
    spec = importlib.util.find_spec("kernels")
    # A bare folder is a namespace package (no origin): any real install outranks it.
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


@pytest.mark.parametrize("module", TORCH_ONLY)
def test_imports_without_triton_and_without_touching_a_gpu(module: str) -> None:
    """In a process of its own: Triton cannot be imported, and CUDA is not initialized."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {module}\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_never_import_pymllm() -> None:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [n for n in names if n == "pymllm" or n.startswith("pymllm.")], path


def test_kernel_side_does_not_import_references() -> None:
    """A kernel that shares code with its reference shares its mistakes; constants are the exception."""
    for path in sorted((ROOT / "kernels").rglob("kernel.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("reference"):
                assert all(alias.name.isupper() for alias in node.names), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size_budget(path: Path) -> None:
    """Files of at most 420 lines, functions of at most 70, kernels of at most 120."""
    text = path.read_text()
    assert text.count("\n") <= 420, f"{text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= (120 if jit else 70), f"{node.name}: {size} lines"
