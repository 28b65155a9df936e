"""The formats of docs/decode.md, written once more with loops."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.decode import layout


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
    order = np.arange(columns)
    if w.itemsize == 1:
        for h, c, j, a, b in itertools.product(*map(range, (2, 4, 2, 2, 2))):
            order[16 * c + 8 * h + 4 * j + 2 * b + a] = 32 * h + 8 * c + 4 * j + 2 * a + b
    flat = []
    for rows in blocks:
        for first in range(0, w.shape[1], columns):
            for row in rows:
                flat.append(w[row, first : first + columns][order])
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
    ("columns", "dtype"), [(32, np.uint16), (96, np.uint16), (64, np.uint8), (192, np.uint8)]
)
@pytest.mark.parametrize(
    ("rows", "blocks"), [(1, 1), (12, 4), (13, 4), (15, 4), (3, 8), (40, 1), (75, 8)]
)
def test_rows(rows, blocks, columns, dtype):
    w = random_matrix(rows, columns, dtype=dtype)
    flat = layout.pack_rows(jnp.asarray(w), blocks)
    np.testing.assert_array_equal(flat, packed(w, rows_of_blocks(rows, blocks)))
    np.testing.assert_array_equal(layout.unpack_rows(flat, rows, columns, blocks), w)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint8])
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
