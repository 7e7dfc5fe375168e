"""What launch parameters of the kernels in ``row_blocks`` have in common."""

from __future__ import annotations

ROW_BLOCK = 16


class RowBlockConfig:
    """Sizes that follow from the parameters.

    Attributes:
        block_m: most tokens.
        rows: row blocks of 16 output features worked on at once.
        warps: of a program.
    """

    block_m: int
    rows: int
    warps: int

    @property
    def tiles(self) -> int:
        """Tiles of 8 tokens."""
        return -(-self.block_m // 8)

    @property
    def places(self) -> int:
        """Accumulators a thread adds up at once: a power of two."""
        return 1 << (self.rows * self.tiles - 1).bit_length()

    @property
    def shared_memory(self) -> int:
        """Bytes of a program, for adding up its warps."""
        return self.warps * self.places * ROW_BLOCK * 8 * 4
