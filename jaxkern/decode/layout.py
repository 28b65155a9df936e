"""The formats of docs/decode.md: matrices in blocks of rows, and rows in slices of 64 bytes."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

ROW = 32  # bfloat16 values of a row that lie together


def columns_of_slice(dtype: DTypeLike) -> int:
    """How many values of a row lie together."""
    return 2 * ROW // jnp.dtype(dtype).itemsize


def largest_block(head_dim: int) -> int:
    """How many rows a block of a model with such heads has at most."""
    return 128 if head_dim == 64 else 136


def number_of_blocks(rows: int, multiprocessors: int, head_dim: int, rows_of_unit: int = 1) -> int:
    """How many blocks a matrix of so many rows has: as few as leave none more than `largest_block`.

    A multiple of multiprocessors. The rows_of_unit rows of a unit are in the same block.
    """
    needed = -(-(rows // rows_of_unit) // (largest_block(head_dim) // rows_of_unit))
    return -(-needed // multiprocessors) * multiprocessors


def pack_rows(w: jax.Array, blocks: int, rows_of_unit: int = 1) -> jax.Array:
    """w [..., N, K] in this many blocks of rows, [..., N K]; K is a multiple of a slice's columns.

    Values of one byte lie in a slice in the order of docs/decode.md.

    With rows_of_unit, w is that many matrices of N / rows_of_unit rows, one below the other, and a
    unit is a row of each. A block has the rows of the first matrix, then those of the next.
    """
    *lead, n, k = w.shape
    units, columns = n // rows_of_unit, columns_of_slice(w.dtype)
    w = w.reshape(*lead, rows_of_unit, units, k // columns, columns)
    if w.itemsize == 1:
        w = _reordered(w, (2, 4, 2, 2, 2), (1, 0, 2, 4, 3))
    size, larger = divmod(units, blocks)

    def pack(w, count):
        w = w.reshape(*lead, rows_of_unit, count, -1, k // columns, columns)
        w = jnp.moveaxis(w, (-4, -2), (-5, -4))
        return w.reshape(*lead, -1)

    parts = w[..., : larger * (size + 1), :, :], w[..., larger * (size + 1) :, :, :]
    counts = larger, blocks - larger
    return jnp.concatenate([pack(*x) for x in zip(parts, counts, strict=True) if x[0].size], -1)


def unpack_rows(
    flat: jax.Array, rows: int, columns: int, blocks: int, rows_of_unit: int = 1
) -> jax.Array:
    """The inverse of pack_rows, [..., N, K]."""
    lead, slice_columns = flat.shape[:-1], columns_of_slice(flat.dtype)
    size, larger = divmod(rows // rows_of_unit, blocks)
    split = larger * (size + 1) * rows_of_unit * columns

    def unpack(flat, count):
        w = flat.reshape(*lead, count, columns // slice_columns, rows_of_unit, -1, slice_columns)
        if w.itemsize == 1:
            w = _reordered(w, (4, 2, 2, 2, 2), (1, 0, 2, 4, 3))
        w = jnp.moveaxis(w, (-5, -4), (-4, -2))
        return w.reshape(*lead, rows_of_unit, -1, columns)

    parts = zip((flat[..., :split], flat[..., split:]), (larger, blocks - larger), strict=True)
    w = jnp.concatenate([unpack(*x) for x in parts if x[0].size], -2)
    return w.reshape(*lead, rows, columns)


def _reordered(w, digits, order):
    """With values of the last axis moved: `digits` are those of their places, in a new order."""
    lead = w.ndim - 1
    w = w.reshape(*w.shape[:-1], *digits)
    w = w.transpose(*range(lead), *(lead + i for i in order))
    return w.reshape(*w.shape[:lead], -1)
