"""The ceilings of the machine, measured with the same clock, and the least time they allow."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from pymllm.bench.timing import cpu_time, graph_time

GIB = 2**30
W4A16, W8A8 = "w4a16", "w8a8_int8"
ACT_BYTES = 2


@dataclass(frozen=True)
class Roof:
    """Measured ceilings.

    Attributes:
        read_tbps: reading memory, 1e12 bytes/s.
        bf16_tops: bf16 matmul, 1e12 operations/s.
        int_mm_tops: ``torch._int_mm``, 1e12 operations/s; ``None`` where it does not run.
    """

    read_tbps: float
    bf16_tops: float
    int_mm_tops: float | None = None

    @property
    def int8_tops(self) -> float:
        """Twice the bf16 rate, or what ``torch._int_mm`` reached if that is more."""
        return max(2 * self.bf16_tops, self.int_mm_tops or 0.0)

    def as_json(self) -> dict[str, float | None]:
        """The four numbers of the document."""
        return {**asdict(self), "int8_tops": self.int8_tops}


def weight_bytes(scheme: str, n: int, k: int, group: int) -> int:
    """Bytes of a quantized weight with its scales (16-bit for W4A16, fp32 for W8A8)."""
    if scheme == W8A8:
        return n * k + 4 * n
    groups = 1 if group == -1 else k // group
    return n * k // 2 + 2 * n * groups


def moved_bytes(scheme: str, m: int, n: int, k: int, group: int) -> int:
    """Weights, scales, and 16-bit activations in and out."""
    return weight_bytes(scheme, n, k, group) + ACT_BYTES * m * (n + k)


def roof_us(roof: Roof, scheme: str, m: int, n: int, k: int, group: int) -> float:
    """Least microseconds of a layer: moving its bytes or doing its operations.

    W4A16 multiplies in 16 bits, so its peak is the bf16 one; W8A8 has the int8 peak.
    """
    peak = roof.int8_tops if scheme == W8A8 else roof.bf16_tops
    moving = moved_bytes(scheme, m, n, k, group) / roof.read_tbps
    computing = 2 * m * n * k / peak
    return max(moving, computing) / 1e6


def measure_roof(device: torch.device) -> Roof:
    """Measures all three ceilings: about 0.3 s on a GPU, 2 s on a CPU."""
    gpu = device.type == "cuda"
    size, side = (GIB, 8192) if gpu else (GIB // 8, 1024)
    clock = graph_time if gpu else cpu_time
    data = torch.rand(size // 4, device=device)
    read_us = clock([data.sum]).median_us
    del data
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    b = torch.randn(side, side, device=device).to(torch.bfloat16)
    operations = 2 * side**3
    bf16_us = clock([lambda: a @ b]).median_us
    int_us = _int_mm_us(side, device)
    return Roof(
        size / read_us / 1e6,
        operations / bf16_us / 1e6,
        None if int_us is None else operations / int_us / 1e6,
    )


def _int_mm_us(side: int, device: torch.device) -> float | None:
    a = torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device)
    clock = graph_time if device.type == "cuda" else cpu_time
    try:
        return clock([lambda: torch._int_mm(a, b.T)]).median_us
    except RuntimeError:
        return None
