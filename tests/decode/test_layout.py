"""The formats of docs/decode.md, written once more with loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.decode import layout

PLACE = {
    16 * s + 8 * h + 2 * c + e: 8 * c + 4 * s + 2 * h + e
    for s in range(2)
    for h in range(2)
    for c in range(4)
    for e in range(2)
}


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
                stored = np.zeros(32, w.dtype)
                for k in range(32):
                    stored[PLACE[k]] = w[row, first + k]
                flat.append(stored)
    return np.concatenate(flat)


def test_interleave():
    x = np.arange(3 * 96).reshape(3, 96)
    got = layout.interleave(jnp.asarray(x))
    for place in range(96):
        k = 32 * (place // 32) + next(k for k, p in PLACE.items() if p == place % 32)
        assert (got[:, place] == x[:, k]).all()
    assert (layout.deinterleave(got) == x).all()
    # What a lane of a group of four reads at once, of two products of 16.
    assert got[0, 8:16].tolist() == [2, 3, 10, 11, 18, 19, 26, 27]


@pytest.mark.parametrize("rows_of_unit", [1, 2])
@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
@pytest.mark.parametrize("units", [1, 5, 64, 128, 129, 1024, 1025, 8448, 8449, 128256])
def test_number_of_blocks(units, multiprocessors, rows_of_unit):
    rows = units * rows_of_unit
    got = layout.number_of_blocks(rows, multiprocessors, rows_of_unit)
    wanted = multiprocessors
    while -(-units // wanted) * rows_of_unit > 128:
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
