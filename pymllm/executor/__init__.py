"""Running models."""

from pymllm.executor.model_runner import ModelRunner

__all__ = ["ModelRunner"]
