"""Quantized linear layers (W4A16, W8A8 int8) read from ``compressed-tensors`` checkpoints.

Importing this package loads neither torch nor a GPU library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymllm.checkpoint.loading import load_linears
    from pymllm.checkpoint.writing import save_linears

__version__ = "0.1.0"
__all__ = ["__version__", "load_linears", "save_linears"]


def __getattr__(name: str) -> Any:
    # PEP 562: these bring torch along, so they are imported on first use.
    if name == "load_linears":
        from pymllm.checkpoint.loading import load_linears

        return load_linears
    if name == "save_linears":
        from pymllm.checkpoint.writing import save_linears

        return save_linears
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load_linears", "save_linears"])
