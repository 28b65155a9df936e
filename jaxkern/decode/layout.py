"""The formats of docs/decode.md: matrices in blocks of rows, and rows by 32 values."""

import jax
import jax.numpy as jnp

ROW = 32  # values of a row that lie together


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
    """w [..., N, K] in this many blocks of rows, [..., N K]; K is a multiple of 32.

    With rows_of_unit, w is that many matrices of N / rows_of_unit rows, one below the other, and a
    unit is a row of each. A block has the rows of the first matrix, then those of the next.
    """
    *lead, n, k = w.shape
    units = n // rows_of_unit
    w = w.reshape(*lead, rows_of_unit, units, k // ROW, ROW)
    size, larger = divmod(units, blocks)

    def pack(w, count):
        w = w.reshape(*lead, rows_of_unit, count, -1, k // ROW, ROW)
        w = jnp.moveaxis(w, (-4, -2), (-5, -4))
        return w.reshape(*lead, -1)

    parts = w[..., : larger * (size + 1), :, :], w[..., larger * (size + 1) :, :, :]
    counts = larger, blocks - larger
    return jnp.concatenate([pack(*x) for x in zip(parts, counts, strict=True) if x[0].size], -1)


def unpack_rows(
    flat: jax.Array, rows: int, columns: int, blocks: int, rows_of_unit: int = 1
) -> jax.Array:
    """The inverse of pack_rows, [..., N, K]."""
    lead = flat.shape[:-1]
    size, larger = divmod(rows // rows_of_unit, blocks)
    split = larger * (size + 1) * rows_of_unit * columns

    def unpack(flat, count):
        w = flat.reshape(*lead, count, columns // ROW, rows_of_unit, -1, ROW)
        w = jnp.moveaxis(w, (-5, -4), (-4, -2))
        return w.reshape(*lead, rows_of_unit, -1, columns)

    parts = zip((flat[..., :split], flat[..., split:]), (larger, blocks - larger), strict=True)
    w = jnp.concatenate([unpack(*x) for x in parts if x[0].size], -2)
    return w.reshape(*lead, rows, columns)
