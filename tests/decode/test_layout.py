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


# Of four values in half a word of four bits each: from a value's highest bit on.
E2M1_BITS = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (13, 11, 10, 14))
INT4_BITS = ((3, 2, 1, 0), (7, 6, 5, 4), (11, 10, 9, 8), (15, 14, 13, 12))


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


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4"])
def test_four_bit_words(format):
    bits = random_matrix(3, 2, 256, dtype=np.uint8) % 16
    wanted = np.zeros((3, 2, 32), np.uint32)
    places = INT4_BITS if format == "int4" else E2M1_BITS
    for slice, part, c, i, odd in itertools.product(*map(range, (2, 4, 4, 4, 2))):
        code = bits[..., 128 * slice + 32 * part + 8 * c + 2 * i + odd].astype(np.uint32)
        for bit, place in enumerate(places[i]):
            wanted[..., 16 * slice + 4 * c + part] |= (code >> 3 - bit & 1) << place + 16 * odd
    words = layout.four_bit_words(jnp.asarray(bits), format)
    np.testing.assert_array_equal(words, wanted)
    np.testing.assert_array_equal(layout.codes_of_words(words, format), bits)


def test_scales_of_nvfp4():
    """All that e4m3 has."""
    codes = np.arange(127, dtype=np.uint8)
    scales = np.array(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32))
    words = layout.scale_words(jnp.asarray(np.append(scales, 0)), "nvfp4")
    stored = np.asarray(words)[:, None] >> np.array([0, 8, 16, 24], np.uint32) & 255
    exponent, mantissa = stored.ravel() >> 3, stored.ravel() & 7
    wanted = np.where(stored.ravel() > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 10.0), 0)
    np.testing.assert_array_equal(wanted, np.append(scales, 0))
    np.testing.assert_array_equal(layout.scales_of_words(words, "nvfp4"), np.append(scales, 0))


def test_scales_of_mxfp4():
    """Powers of two from 1 on downwards, in the exponent of a bfloat16."""
    scales = np.float32(2.0) ** -np.arange(126, dtype=np.float32)
    words = layout.scale_words(jnp.asarray(scales), "mxfp4")
    stored = (np.asarray(words)[:, None] >> np.array([0, 16], np.uint32) & 0xFFFF).ravel()
    np.testing.assert_array_equal(stored, 202 - np.arange(126) << 7)
    np.testing.assert_array_equal(layout.scales_of_words(words, "mxfp4"), scales)
    zeros = layout.scale_words(jnp.zeros(2), "mxfp4")
    assert not zeros.any() and not layout.scales_of_words(zeros, "mxfp4").any()


def test_scales_of_int4():
    scales = jnp.asarray([1.5, -3e38, 1e-38, 0], jnp.bfloat16)
    words = layout.scale_words(scales, "int4")
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint16)
    np.testing.assert_array_equal(np.asarray(words).view(np.uint16), bits)
    np.testing.assert_array_equal(layout.scales_of_words(words, "int4"), scales)


@pytest.mark.parametrize("rows_of_unit", [1, 2])
@pytest.mark.parametrize(("units", "blocks"), [(1, 1), (12, 4), (13, 4), (3, 8), (40, 3)])
def test_rows_with_scales(units, blocks, rows_of_unit):
    """Those of a block's slice follow its values, up to whole words of 16 bytes."""
    rows = rows_of_unit * units
    w, scales = (random_matrix(2, rows, k, dtype=np.uint32) for k in (48, 6))
    flat = layout.pack_rows(jnp.asarray(w), blocks, rows_of_unit, jnp.asarray(scales))
    for layer, got in enumerate(flat):
        wanted = []
        for block in rows_of_blocks(units, blocks):
            own = [unit + part * units for part in range(rows_of_unit) for unit in block]
            for slice in range(3 if own else 0):
                wanted += [*w[layer, own, 16 * slice : 16 * slice + 16].ravel()]
                wanted += [*scales[layer, own, 2 * slice : 2 * slice + 2].ravel()]
                wanted += [0] * (-len(wanted) % 4)
        np.testing.assert_array_equal(got, np.array(wanted, np.uint32))
    back = layout.unpack_scaled_rows(flat, rows, 48, blocks, rows_of_unit)
    for got, wanted in zip(back, (w, scales), strict=True):
        np.testing.assert_array_equal(got, wanted)
