"""Gluon's names for Hopper under one spelling, and the pieces its warp-specialized kernels share.

Gluon is experimental and part of the triton package: Triton 3.9 renamed the bulk copies of 3.6.
Kernels written with it are for compute capability 9.0; import this module only to launch or compile
one of them.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = [
    "GLUON_DTYPE",
    "load_early",
    "next_slot",
    "reinterpreted",
    "slot_after",
    "split_columns",
    "sync_threads",
    "tile_layout",
    "tma_load",
    "tma_store",
]

GLUON_DTYPE = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int16: gl.int16,
    torch.int8: gl.int8,
}

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# Of the warps that run the same partition of a warp-specialized kernel.
sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier


_REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@functools.cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared-memory layout of a tile: swizzled over its row, up to 128 bytes."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], GLUON_DTYPE[dtype])


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot after ``slot`` of a ring, and its parity, which turns over with every round."""
    slot += 1
    phase = gl.where(slot == SLOTS, phase ^ 1, phase)
    slot = gl.where(slot == SLOTS, 0, slot)
    return slot, phase


@gluon.jit
def load_early(desc, row, slots, full, steps, EARLY: gl.constexpr):
    """Asks for the first EARLY steps of the rows from ``row`` on, before the warps part.

    Parting takes most of a microsecond, and so do the first copies. Unrolled: a loop, with a barrier
    and address arithmetic a step, is half as good.
    """
    ROWS: gl.constexpr = desc.block_shape[0]
    BLOCK_K: gl.constexpr = desc.block_shape[1]
    for i in gl.static_range(EARLY):
        there = i < steps
        mbarrier.expect(full.index(i), ROWS * BLOCK_K, pred=there)
        # A box of fewer rows than its slot has fills the first of them.
        place = slots.index(i).slice(0, ROWS)
        tma_load(desc, [row, i * BLOCK_K], full.index(i), place, pred=there)


@gluon.jit
def slot_after(loaded, SLOTS: gl.constexpr):
    """Where a producer goes on in a ring with ``loaded`` of its SLOTS filled, and the parity it waits for.

    Of an empty ring: a wait for the phase before the first passes.
    """
    return gl.where(loaded == SLOTS, 0, loaded), gl.where(loaded == SLOTS, 0, 1)


@gluon.jit
def reinterpreted(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The bytes of shared memory as another type, shape and layout."""
    if _REINTERPRET_IS_PUBLIC:
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def split_columns(tile, PARTS: gl.constexpr):
    """A ``[R, C]`` register tile as ``PARTS`` (a power of two) tiles ``[R, C / PARTS]``, in order.

    Splitting in registers moves no data, so that a store buffer may be smaller than the tile.
    """
    tiles = (tile,)
    for _ in gl.static_range(PARTS.bit_length() - 1):
        halves = ()
        for i in gl.static_range(len(tiles)):
            one = tiles[i]
            halves += one.reshape(one.shape[0], 2, one.shape[1] // 2).permute(0, 2, 1).split()
        tiles = halves
    return tiles
