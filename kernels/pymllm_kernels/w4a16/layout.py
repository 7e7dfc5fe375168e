"""Weight layouts of the W4A16 kernel.

Checkpoint:  ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``, see ``common.packing``.
Kernel:      K is cut into blocks of ``block_k`` and a block into 4 slices of ``block_k / 4``
             neighbouring inputs; a tile of rows of one block is contiguous in memory.

``SlicedInt4`` int16 ``[K / block_k, N, block_k / 4]``: bits ``4 j .. 4 j + 3`` of word ``c`` hold the
code of input ``block * block_k + j * (block_k / 4) + c``. Shifting a whole tile of words by ``4 j``
therefore gives the weights of slice ``j``, and the activations of a slice are neighbours, so neither
operand needs a shuffle after unpacking.
``SlicedInt8`` int16 ``[K / block_k, N, block_k / 2]``: word ``h * (block_k / 4) + c`` holds the codes of
input ``c`` of slices ``2 h`` (low byte) and ``2 h + 1`` (high byte).

A last block that K does not fill holds code 0 there; the kernel multiplies it by zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pymllm_kernels.common.packing import unpack_words

SLICES = 4


@dataclass(frozen=True)
class WeightLayout:
    """How the codes of a ``[N, K]`` weight lie in memory; ``pack`` and ``unpack`` are inverses."""

    block_k: int

    bits = 0
    dtype = torch.int16

    @property
    def slice_k(self) -> int:
        """Inputs of one slice."""
        return self.block_k // SLICES

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the packed tensor of a ``[n, k]`` weight."""
        raise NotImplementedError

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 raw codes ``[N, K]`` to the packed tensor."""
        n, k = codes.shape
        packed = torch.empty(self.shape(n, k), dtype=self.dtype, device=codes.device)
        self._pack_rows(codes, packed)
        return packed

    def pack_words(self, words: torch.Tensor, k: int, perm: torch.Tensor | None) -> torch.Tensor:
        """Checkpoint words ``[N, W]`` to the packed tensor, a few rows at a time.

        Args:
            words: int32, packed along K.
            k: number of inputs.
            perm: int64 ``[K]``; column ``i`` of the result is input ``perm[i]`` of the checkpoint.

        The working memory beside the result is about 3 % of it, so that a large layer can be
        converted where little more than the layer fits.
        """
        n = words.shape[0]
        packed = torch.empty(self.shape(n, k), dtype=self.dtype, device=words.device)
        for rows in _row_chunks(n):
            codes = unpack_words(words[rows], self.bits, k)
            if perm is not None:
                codes = codes[:, perm]
            self._pack_rows(codes, packed[:, rows])
        return packed

    def unpack(self, packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """The packed tensor back to uint8 raw codes ``[N, K]``."""
        raise NotImplementedError

    def _pack_rows(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        raise NotImplementedError

    def _padded(self, k: int) -> int:
        return -(-k // self.block_k) * self.block_k

    def _blocks(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes ``[N, K]`` as ``[blocks, N, SLICES, slice_k]``, padded with code 0."""
        n, k = codes.shape
        if self._padded(k) != k:
            codes = torch.nn.functional.pad(codes, (0, self._padded(k) - k))
        blocks = self._padded(k) // self.block_k
        return codes.reshape(n, blocks, SLICES, self.slice_k).permute(1, 0, 2, 3)


@dataclass(frozen=True)
class SlicedInt4(WeightLayout):
    """Four slices of int4 codes interleaved in 16-bit words."""

    bits = 4
    dtype = torch.int16

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        return (-(-k // self.block_k), n, self.slice_k)

    def _pack_rows(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        blocks = self._blocks(codes)
        octets = torch.empty(*out.shape, 2, dtype=torch.uint8, device=codes.device)
        octets[..., 0] = blocks[:, :, 0] | (blocks[:, :, 1] << 4)
        octets[..., 1] = blocks[:, :, 2] | (blocks[:, :, 3] << 4)
        out.copy_(octets.view(torch.int16).squeeze(-1))

    def unpack(self, packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
        slices = [(packed >> (4 * j)) & 15 for j in range(SLICES)]
        codes = torch.stack(slices, dim=2).to(torch.uint8)
        return codes.permute(1, 0, 2, 3).reshape(n, self._padded(k))[:, :k].contiguous()


@dataclass(frozen=True)
class SlicedInt8(WeightLayout):
    """Two times two slices of 8-bit codes interleaved in 16-bit words."""

    bits = 8
    dtype = torch.int16

    def shape(self, n: int, k: int) -> tuple[int, int, int]:
        return (-(-k // self.block_k), n, 2 * self.slice_k)

    def _pack_rows(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        blocks = self._blocks(codes)
        octets = torch.empty(*out.shape, 2, dtype=torch.uint8, device=codes.device)
        halves = octets.view(*out.shape[:2], 2, self.slice_k, 2)
        halves[..., 0] = blocks[:, :, 0::2]
        halves[..., 1] = blocks[:, :, 1::2]
        out.copy_(octets.view(torch.int16).squeeze(-1))

    def unpack(self, packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
        octets = packed.contiguous().view(torch.uint8)
        halves = octets.reshape(packed.shape[0], n, 2, self.slice_k, 2)
        codes = halves.permute(1, 0, 2, 4, 3).reshape(n, self._padded(k))
        return codes[:, :k].contiguous()


def choose_layout(bits: int, k: int, group_size: int) -> WeightLayout:
    """The layout of a layer: blocks of 128 inputs, or of 64 where that is what fits.

    Blocks of 64 are for groups that are a multiple of 16 but not of 32 (a slice then still lies in
    one group) and for K whose padding to 128 would add more than 2 % to the weight.
    """
    cls = {4: SlicedInt4, 8: SlicedInt8}[bits]
    if group_size > 0 and group_size % 16 == 0 and group_size % 32 != 0:
        return cls(64)
    padded_128, padded_64 = -(-k // 128) * 128, -(-k // 64) * 64
    return cls(128 if padded_128 <= 1.02 * padded_64 else 64)


def _row_chunks(n: int) -> Iterator[slice]:
    # 256 chunks keep the transient codes (3 bytes a weight of the chunk) near 2.5 % of the weight.
    rows = max(1, -(-n // 256))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))
