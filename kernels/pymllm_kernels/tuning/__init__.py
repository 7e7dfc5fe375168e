"""Tuned configurations: what was measured where, and which one a call runs with.

Reading only: nothing is measured or written on a user's call. ``pymllm tune`` measures.
"""

from pymllm_kernels.tuning import state
from pymllm_kernels.tuning.document import Entry, Place, Table
from pymllm_kernels.tuning.keys import BUCKETS, Conditions, TuningKey, bucket, conditions
from pymllm_kernels.tuning.resolving import Resolved, config_for, resolve
from pymllm_kernels.tuning.state import load_lock, pin, unlock, unpin, use_directory
from pymllm_kernels.tuning.tunable import Tunable

__all__ = [
    "BUCKETS",
    "Conditions",
    "Entry",
    "Place",
    "Resolved",
    "Table",
    "Tunable",
    "TuningKey",
    "bucket",
    "conditions",
    "config_for",
    "generation",
    "load_lock",
    "pin",
    "resolve",
    "unlock",
    "unpin",
    "use_directory",
]


def generation() -> int:
    """A number that changes with the pins, the lock file and the store of this process."""
    return state.generation
