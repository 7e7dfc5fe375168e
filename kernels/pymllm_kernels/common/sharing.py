"""How many programs share the tiles of a GEMM: the host's side of ``common.stream_k``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

STREAM_K = 0
# Of more tiles than programs: who begins a tile that ends in the next program's run hands it on.
HAND_ON = -1
C = TypeVar("C")


def compiled_config(config: C) -> C:
    """The part of a configuration that is compiled in: whether tiles are shared, not by how many."""
    dataclass: Any = config
    shared: C = replace(dataclass, share=dataclass.share if dataclass.share <= 1 else STREAM_K)
    return shared


def even_runs(share: int) -> tuple[int, ...]:
    """For a configuration of even runs, the ways to try in turn for another number of tiles."""
    others = {STREAM_K: HAND_ON, HAND_ON: STREAM_K}
    return (share, others[share], 1) if share in others else ()


def share_tiles(
    share: int, tiles: int, steps: int, multiprocessors: int, *, least_steps: int = 1
) -> tuple[int, int] | None:
    """(size of the grid, leading tiles that programs take whole), or ``None`` if it cannot be.

    Args:
        share: programs that share each tile, 1 for none, ``STREAM_K`` and ``HAND_ON`` for even runs of
            steps that may begin and end inside a tile, of fewer tiles than multiprocessors and of more.
        tiles: of the output.
        steps: of a tile along K.
        multiprocessors: the largest grid.
        least_steps: the fewest steps worth a program.
    """
    if share == 1:
        return min(multiprocessors, tiles), tiles
    if share == HAND_ON:
        if tiles <= multiprocessors or tiles % multiprocessors == 0:
            return None
        # One to two rounds of tiles are dealt out, those before go to programs whole.
        return multiprocessors, (tiles // multiprocessors - 1) * multiprocessors
    if share == STREAM_K:
        if tiles >= multiprocessors:
            return None
        return min(multiprocessors, max(tiles * steps // least_steps, 1)), 0
    programs = tiles * share
    if programs > multiprocessors or steps % share or steps < least_steps * share:
        return None
    return programs, 0
