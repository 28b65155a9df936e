"""The formats of docs/decode.md: matrices in blocks of rows, rows in slices, and FP8 in words."""

import jax
import jax.numpy as jnp

ROW = 32  # bfloat16 values of a row that lie together
SLICE_BYTES = 64  # of a row of weights that lie together
FP8_COLUMNS = 64  # in so many


def fp8_words(w: jax.Array) -> jax.Array:
    """float8_e4m3fn [..., K], K a multiple of 64, as uint32 [..., K / 4]."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint8).astype(jnp.uint32)
    bits = bits.reshape(*w.shape[:-1], -1, 2, 4, 2, 4)  # h, c, j, i of a slice
    x = jnp.moveaxis(bits, -4, -3)
    one, two = x[..., :2], x[..., 2:]
    halves = (one >> 7 << 15) | (two >> 3 & 15) << 11 | (one & 127) << 4 | (two & 7)
    halves |= two[..., ::-1] >> 7 << 3
    words = halves[..., 0] | halves[..., 1] << 16
    return words.reshape(*w.shape[:-1], -1)


def fp8_of_words(words: jax.Array) -> jax.Array:
    """The inverse of fp8_words, float8_e4m3fn [..., K]."""
    halves = jnp.stack([words & 0xFFFF, words >> 16], -1)
    one = (halves >> 15 << 7) | (halves >> 4 & 127)
    two = (halves[..., ::-1] >> 3 & 1) << 7 | (halves >> 11 & 15) << 3 | (halves & 7)
    x = jnp.concatenate([one, two], -1).reshape(*words.shape[:-1], -1, 4, 2, 2, 4)
    bits = jnp.moveaxis(x, -3, -4).reshape(*words.shape[:-1], -1).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


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
    """w [..., N, K] in this many blocks of rows, [..., N K]; rows are of whole slices.

    With rows_of_unit, w is that many matrices of N / rows_of_unit rows, one below the other, and a
    unit is a row of each. A block has the rows of the first matrix, then those of the next.
    """
    *lead, n, k = w.shape
    units, columns = n // rows_of_unit, SLICE_BYTES // w.itemsize
    w = w.reshape(*lead, rows_of_unit, units, k // columns, columns)
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
    lead, slice_columns = flat.shape[:-1], SLICE_BYTES // flat.itemsize
    size, larger = divmod(rows // rows_of_unit, blocks)
    split = larger * (size + 1) * rows_of_unit * columns

    def unpack(flat, count):
        w = flat.reshape(*lead, count, columns // slice_columns, rows_of_unit, -1, slice_columns)
        w = jnp.moveaxis(w, (-5, -4), (-4, -2))
        return w.reshape(*lead, rows_of_unit, -1, columns)

    parts = zip((flat[..., :split], flat[..., split:]), (larger, blocks - larger), strict=True)
    w = jnp.concatenate([unpack(*x) for x in parts if x[0].size], -2)
    return w.reshape(*lead, rows, columns)
