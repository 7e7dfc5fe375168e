"""What of an int8 layer its compiled kernels for Hopper and their launches depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pymllm_kernels.tuning import TuningKey
from pymllm_kernels.w8a8_int8.tunable import hopper_key


class HopperLayer(NamedTuple):
    """What of a layer its compiled kernels and its launches depend on.

    Attributes:
        n: output features.
        k: input features.
        act: dtype of the activations and outputs.
        channel: whether there is a weight scale for each output feature, or one.
        static: whether the scale of the activations is given.
        zero: whether activations have a zero point.
        bias: dtype of the bias, ``None`` for none.
    """

    n: int
    k: int
    act: torch.dtype
    channel: bool = True
    static: bool = False
    zero: bool = False
    bias: torch.dtype | None = None

    @property
    def compiled(self) -> HopperLayer:
        """The part that is compiled in: layers with equal ones share their kernels."""
        return self._replace(n=self.n % 16, k=0)

    @property
    def tuning_key(self) -> TuningKey:
        """Under which its configurations are stored."""
        return hopper_key(self.n, self.k, self.act, symmetric=not self.zero, static=self.static)
