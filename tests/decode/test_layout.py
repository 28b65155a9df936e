"""The formats of docs/decode.md, written once more with loops."""

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
    flat = []
    for rows in blocks:
        for first in range(0, w.shape[1], 32):
            for row in rows:
                flat.append(w[row, first : first + 32])
    return np.concatenate(flat)


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


@pytest.mark.parametrize("columns", [32, 96])
@pytest.mark.parametrize(
    ("rows", "blocks"), [(1, 1), (12, 4), (13, 4), (15, 4), (3, 8), (40, 1), (75, 8)]
)
def test_rows(rows, blocks, columns):
    w = np.arange(rows * columns).reshape(rows, columns)
    flat = layout.pack_rows(jnp.asarray(w), blocks)
    np.testing.assert_array_equal(flat, packed(w, rows_of_blocks(rows, blocks)))
    np.testing.assert_array_equal(layout.unpack_rows(flat, rows, columns, blocks), w)


@pytest.mark.parametrize(("units", "blocks"), [(1, 1), (12, 4), (13, 4), (3, 8), (96, 5)])
def test_units_of_two_rows(units, blocks):
    """A block has the gate's rows of all its units, then those of up."""
    w = np.arange(2 * units * 64).reshape(2 * units, 64)
    flat = layout.pack_rows(jnp.asarray(w), blocks, rows_of_unit=2)
    rows = ([*block, *(units + i for i in block)] for block in rows_of_blocks(units, blocks))
    np.testing.assert_array_equal(flat, packed(w, rows))
    np.testing.assert_array_equal(layout.unpack_rows(flat, 2 * units, 64, blocks, 2), w)


def test_axes_in_front():
    w = np.arange(3 * 2 * 10 * 32).reshape(3, 2, 10, 32)
    flat = layout.pack_rows(jnp.asarray(w), 4)
    assert flat.shape == (3, 2, 320)
    np.testing.assert_array_equal(flat[2, 1], packed(w[2, 1], rows_of_blocks(10, 4)))
    np.testing.assert_array_equal(layout.unpack_rows(flat, 10, 32, 4), w)
