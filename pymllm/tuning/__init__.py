"""The search for configurations: a command and a call, never a surprise on a user's request."""

from pymllm.tuning.layers import checkpoint_problems, shape_problems
from pymllm.tuning.tune import Report, Result, tune

__all__ = ["Report", "Result", "checkpoint_problems", "shape_problems", "tune"]
