"""A random quantized layer made on the device it is timed on, and what its output should be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pymllm.bench.roof import W4A16, W8A8, weight_bytes
from pymllm_kernels.common.packing import unpack_words

SCHEMES = (W4A16, W8A8)
GROUP = 128
CHANNEL = -1
# W8A8 rounds the activations to int8: that dominates its error.
ERROR_LIMITS = {W4A16: 0.02, W8A8: 0.03}
REFERENCE_COLUMNS = 512
_ROWS_AT_A_TIME = 2048


@dataclass
class Workload:
    """One layer in checkpoint form, its inputs, and the exact outputs of some of its columns.

    Attributes:
        scheme: ``"w4a16"`` or ``"w8a8_int8"``.
        n: outputs.
        k: inputs.
        group: inputs a scale; -1 for one scale a row.
        dtype: dtype of activations.
        words: W4A16: int32 ``[N, K / 8]``, codes packed along K; W8A8: int8 ``[N, K]``.
        scale: ``[N, G]`` in ``dtype`` (W8A8: ``[N, 1]``).
        inputs: ``[max M, K]``; M tokens are its first M rows.
        columns: int64, the outputs that are checked, spread over all tiles.
        expected: fp64 ``[max M, columns]``.
    """

    scheme: str
    n: int
    k: int
    group: int
    dtype: torch.dtype
    words: torch.Tensor
    scale: torch.Tensor
    inputs: torch.Tensor
    columns: torch.Tensor
    expected: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.words.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the quantized weight with its scales."""
        return weight_bytes(self.scheme, self.n, self.k, self.group)

    def x(self, m: int) -> torch.Tensor:
        """``[m, K]`` activations."""
        return self.inputs[:m]

    def codes(self) -> torch.Tensor:
        """``[N, K]``: uint8 raw codes (W4A16) or int8 values (W8A8)."""
        return self.words if self.scheme == W8A8 else unpack_words(self.words, 4, self.k)

    def floating(self) -> torch.Tensor:
        """The weight ``[N, K]`` in ``dtype``, as it is without quantization."""
        rows = torch.empty(self.n, self.k, dtype=self.dtype, device=self.device)
        for start in range(0, self.n, _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            rows[part] = _dequantized(self.words[part], self.scale[part], self, torch.float32)
        return rows

    def error(self, y: torch.Tensor, m: int) -> float:
        """Relative Frobenius error of ``y [m, N]`` over the checked columns; NaN if any is not finite."""
        if y.shape != (m, self.n):
            raise ValueError(f"result: found shape {tuple(y.shape)}, expected {(m, self.n)}")
        # Sampled columns do not show a tile that was never written; NaN and infinity anywhere do.
        if not bool(torch.isfinite(y).all()):
            return float("nan")
        exact = self.expected[:m]
        found = y[:, self.columns].to(torch.float64)
        return float((found - exact).norm() / exact.norm())


def make_workload(
    scheme: str,
    n: int,
    k: int,
    tokens: int,
    device: torch.device,
    *,
    group: int = GROUP,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Workload:
    """Random codes over the full range, random scales, normal activations; the same every time.

    Args:
        scheme: ``"w4a16"`` or ``"w8a8_int8"``.
        n: outputs.
        k: inputs.
        tokens: the most tokens that will be asked for.
        device: where to make it.
        group: inputs a scale, for W4A16; must divide K.
        dtype: dtype of activations and scales.
        seed: of the generator.

    Raises:
        ValueError: the scheme is not known or the group does not divide K.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: found {scheme!r}, accepted {SCHEMES}")
    group = CHANNEL if scheme == W8A8 else group
    if k % 8 or (group != CHANNEL and k % group):
        raise ValueError(f"k: found {k}, accepted multiples of 8 and of the group size {group}")
    generator = torch.Generator(device).manual_seed(seed)
    groups = 1 if group == CHANNEL else k // group
    if scheme == W4A16:
        limits, shape, kind = (-(2**31), 2**31), (n, k // 8), torch.int32
    else:
        limits, shape, kind = (-128, 128), (n, k), torch.int8
    words = torch.randint(*limits, shape, dtype=kind, device=device, generator=generator)
    spread = torch.rand(n, groups, device=device, generator=generator) + 0.5
    # Outputs near 1 whatever the size.
    scale = (spread / (k**0.5 * (4 if scheme == W4A16 else 64))).to(dtype)
    inputs = torch.randn(tokens, k, device=device, generator=generator).to(dtype)
    count = min(n, REFERENCE_COLUMNS)
    stride = n / count
    columns = torch.arange(count, device=device, dtype=torch.float64) * stride
    columns += torch.rand(count, device=device, generator=generator) * (stride - 1)
    columns = columns.to(torch.int64).clamp(0, n - 1)
    made = Workload(scheme, n, k, group, dtype, words, scale, inputs, columns, inputs)
    made.expected = _expected(made)
    return made


def _expected(work: Workload) -> torch.Tensor:
    weight = _dequantized(work.words[work.columns], work.scale[work.columns], work, torch.float64)
    chunks = torch.split(work.inputs, _ROWS_AT_A_TIME)
    return torch.cat([rows.to(torch.float64) @ weight.T for rows in chunks])


def _dequantized(
    words: torch.Tensor, scale: torch.Tensor, work: Workload, dtype: torch.dtype
) -> torch.Tensor:
    if work.scheme == W8A8:
        return words.to(dtype) * scale.to(dtype)
    codes = unpack_words(words, 4, work.k).to(dtype) - 8
    groups = scale.shape[1]
    grouped = codes.view(codes.shape[0], groups, -1) * scale.to(dtype)[:, :, None]
    return grouped.view(codes.shape[0], work.k)
