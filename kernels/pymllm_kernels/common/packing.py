"""Bit packing of compressed-tensors: 32-bit words, first element in the least significant bits.

Element ``i`` of a line occupies bits ``[bits * (i % f), bits * (i % f) + bits)`` of word ``i // f``
with ``f = 32 // bits``. A signed value ``v`` is stored as the raw code ``v + 2**(bits - 1)``; the
elements missing from the last word have raw code 0.
"""

from __future__ import annotations

import torch

PACKED_BITS = (4, 8)


def words_per_line(count: int, bits: int) -> int:
    """Number of int32 words that hold ``count`` elements of ``bits`` bits."""
    return -(-count * bits // 32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Raw codes (unsigned) of packed lines.

    Args:
        words: int32 ``[..., W]``, packed along the last dimension, ``W = ceil(count * bits / 32)``.
        bits: 4 or 8.
        count: elements a line; the padding of the last word is dropped.

    Returns:
        uint8 ``[..., count]``, values ``0 .. 2**bits - 1``.

    Raises:
        ValueError: ``bits`` is not 4 or 8, the dtype is not int32, or ``W`` does not fit ``count``.
    """
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"words: found dtype {words.dtype}, accepted torch.int32")
    expected = words_per_line(count, bits)
    if words.shape[-1] != expected:
        raise ValueError(
            f"words: found {words.shape[-1]} words a line, expected {expected} "
            f"for {count} elements of {bits} bits"
        )
    # Little-endian: the bytes of a word are its elements from the least significant bits upwards.
    if not words.is_contiguous() or words.stride(-1) != 1:
        # Not contiguous(): torch counts a transposed [N, 1], which view(dtype) refuses, as such.
        words = words.clone(memory_format=torch.contiguous_format)
    octets = words.view(torch.uint8)
    if bits == 8:
        return octets[..., :count]
    codes = torch.stack((octets & 15, octets >> 4), dim=-1)
    return codes.flatten(-2)[..., :count]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`unpack_words`: uint8 ``[..., count]`` to int32 ``[..., W]``.

    Raises:
        ValueError: ``bits`` is not 4 or 8, or the codes are not uint8.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes: found dtype {codes.dtype}, accepted torch.uint8")
    per_word = 32 // bits
    words = words_per_line(codes.shape[-1], bits)
    padded = codes.new_zeros(*codes.shape[:-1], words * per_word)
    padded[..., : codes.shape[-1]] = codes
    if bits == 4:
        padded = padded[..., 0::2] | (padded[..., 1::2] << 4)
    return padded.contiguous().view(torch.int32)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits: found {bits}, accepted {PACKED_BITS}")
