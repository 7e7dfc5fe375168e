"""Quantized linear layers (W4A16, W8A8 int8) read from ``compressed-tensors`` checkpoints.

Importing this package loads neither torch nor a GPU library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymllm.checkpoint.loading import load_linears
    from pymllm.checkpoint.writing import save_linears
    from pymllm.warming import warmup

__version__ = "0.1.0"
__all__ = ["__version__", "load_linears", "save_linears", "warmup"]


# PEP 562: these bring torch along, so they are imported on first use.
_ON_FIRST_USE = {
    "load_linears": "pymllm.checkpoint.loading",
    "save_linears": "pymllm.checkpoint.writing",
    "warmup": "pymllm.warming",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_FIRST_USE])
