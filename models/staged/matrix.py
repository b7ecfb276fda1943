"""The token state as a matrix: 8x8 numbers, sixteen semantic blocks of 2x2, named row by row."""

from __future__ import annotations

from torch import Tensor

SIDE, CELL = 8, 2  # the matrix and a block are square
BLOCK_NAMES = ("I", "S", "C1", "C2", "R1", "R2", "T", "K", "G", "M", "D", "F", "P", "E", "A", "X")
ROW = SIDE // CELL  # blocks side by side
BLOCKS, FEATURES, SIZE = ROW * ROW, CELL * CELL, SIDE * SIDE


def to_blocks(state: Tensor) -> Tensor:
    """[..., 64], the matrix row by row, -> [..., 16, 4]: block n (of BLOCK_NAMES) holds its 2x2 numbers row by row.

    Block n covers rows 2 (n // 4) and the next, columns 2 (n % 4) and the next.
    """
    matrix = state.unflatten(-1, (ROW, CELL, ROW, CELL)).transpose(-2, -3)
    return matrix.flatten(-2).flatten(-3, -2)


def from_blocks(blocks: Tensor) -> Tensor:
    """The way back: [..., 16, 4] -> [..., 64]."""
    matrix = blocks.unflatten(-1, (CELL, CELL)).unflatten(-3, (ROW, ROW)).transpose(-2, -3)
    return matrix.flatten(-4)
