"""The formats of docs/decode.md, written once more with loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.decode import layout

# Of four values in a word, where the bits are, from the lowest.
FP8_BITS = (
    (4, 5, 6, 7, 8, 9, 10, 15),
    (20, 21, 22, 23, 24, 25, 26, 31),
    (0, 1, 2, 11, 12, 13, 14, 19),
    (16, 17, 18, 27, 28, 29, 30, 3),
)


def rows_of_blocks(rows, blocks):
    """The numbers of each block's rows."""
    first = 0
    for block in range(blocks):
        size = rows // blocks + (block < rows % blocks)
        yield range(first, first + size)
        first += size


def packed(w, blocks):
    """A matrix in blocks; blocks are lists of row numbers."""
    columns = 64 // w.itemsize
    flat = []
    for rows in blocks:
        for first in range(0, w.shape[1], columns):
            for row in rows:
                flat.append(w[row, first : first + columns])
    return np.concatenate(flat)


def random_matrix(*shape, dtype=np.uint16):
    return np.random.default_rng(0).integers(np.iinfo(dtype).max, size=shape, dtype=dtype)


@pytest.mark.parametrize("rows_of_unit", [1, 2])
@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
@pytest.mark.parametrize("units", [1, 5, 64, 128, 129, 136, 1025, 8448, 8449, 8960, 128256])
@pytest.mark.parametrize(("head_dim", "largest"), [(64, 128), (128, 136)])
def test_number_of_blocks(units, multiprocessors, rows_of_unit, head_dim, largest):
    rows = units * rows_of_unit
    got = layout.number_of_blocks(rows, multiprocessors, head_dim, rows_of_unit)
    wanted = multiprocessors
    while -(-units // wanted) * rows_of_unit > largest:
        wanted += multiprocessors
    assert got == wanted


@pytest.mark.parametrize(
    ("columns", "dtype"), [(32, np.uint16), (96, np.uint16), (16, np.uint32), (48, np.uint32)]
)
@pytest.mark.parametrize(
    ("rows", "blocks"), [(1, 1), (12, 4), (13, 4), (15, 4), (3, 8), (40, 1), (75, 8)]
)
def test_rows(rows, blocks, columns, dtype):
    w = random_matrix(rows, columns, dtype=dtype)
    flat = layout.pack_rows(jnp.asarray(w), blocks)
    np.testing.assert_array_equal(flat, packed(w, rows_of_blocks(rows, blocks)))
    np.testing.assert_array_equal(layout.unpack_rows(flat, rows, columns, blocks), w)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(("units", "blocks"), [(1, 1), (12, 4), (13, 4), (3, 8), (96, 5)])
def test_units_of_two_rows(units, blocks, dtype):
    """A block has the gate's rows of all its units, then those of up."""
    w = random_matrix(2 * units, 64, dtype=dtype)
    flat = layout.pack_rows(jnp.asarray(w), blocks, rows_of_unit=2)
    rows = ([*block, *(units + i for i in block)] for block in rows_of_blocks(units, blocks))
    np.testing.assert_array_equal(flat, packed(w, rows))
    np.testing.assert_array_equal(layout.unpack_rows(flat, 2 * units, 64, blocks, 2), w)


def test_axes_in_front():
    w = random_matrix(3, 2, 10, 32)
    flat = layout.pack_rows(jnp.asarray(w), 4)
    assert flat.shape == (3, 2, 320)
    np.testing.assert_array_equal(flat[2, 1], packed(w[2, 1], rows_of_blocks(10, 4)))
    np.testing.assert_array_equal(layout.unpack_rows(flat, 10, 32, 4), w)


def test_fp8_words():
    """All of a slice's bits are where docs/decode.md has them."""
    bits = random_matrix(3, 5, 192, dtype=np.uint8)
    wanted = np.zeros((3, 5, 48), np.uint32)
    for slice, h, c, j in itertools.product(*map(range, (3, 2, 4, 2))):
        place = 16 * slice + 4 * c + 2 * h + j
        four = np.moveaxis(bits, -1, 0)[64 * slice + 32 * h + 8 * c + 4 * j :][:4]
        for value, where in zip(four, FP8_BITS, strict=True):
            for i in range(8):
                wanted[..., place] |= (value.astype(np.uint32) >> i & 1) << where[i]
    values = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn)
    words = layout.fp8_words(values)
    np.testing.assert_array_equal(words, wanted)
    back = layout.fp8_of_words(words)
    assert back.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(back, jnp.uint8), bits)
