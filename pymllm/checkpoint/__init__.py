"""Checkpoint folders: reading headers and tensors, loading linear layers, writing them."""

from pymllm.checkpoint.loading import load_linears
from pymllm.checkpoint.reader import Checkpoint, TensorInfo
from pymllm.checkpoint.writing import save_linears

__all__ = ["Checkpoint", "TensorInfo", "load_linears", "save_linears"]
