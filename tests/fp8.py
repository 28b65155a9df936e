"""FP8 in NumPy: quantisation and products by their definition, in float64, a block at a time."""

import ml_dtypes
import numpy as np

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCKS = {"tensor": (None, None), "row": (1, None), "1x128": (1, 128), "128x128": (128, 128)}


def numpy_quantize(x, format, scaling):
    """values and float32 scale of x [..., R, C]."""
    x = np.asarray(x).astype(np.float64)
    high, wide = (step or size for step, size in zip(BLOCKS[scaling], x.shape[-2:], strict=True))
    starts = [range(0, size, step) for size, step in zip(x.shape[-2:], (high, wide), strict=True)]
    values = np.empty(x.shape, getattr(ml_dtypes, format))
    scale = np.empty((*x.shape[:-2], *map(len, starts)), np.float32)
    for lead in np.ndindex(x.shape[:-2]):
        for i, row in enumerate(starts[0]):
            for j, column in enumerate(starts[1]):
                where = (*lead, slice(row, row + high), slice(column, column + wide))
                unit = numpy_scale(np.abs(x[where]).max(), LARGEST[format])
                scale[(*lead, i, j)] = unit
                values[where] = (x[where] / unit).astype(values.dtype)
    return values, scale


def numpy_scale(amax, largest):
    """The smallest power of two from 2^-126 on that brings amax into range; NaN if none does."""
    if not np.isfinite(amax):
        return np.nan
    exponent = max(-126, int(np.frexp(amax)[1]) - 20) if amax else -126
    while amax > np.ldexp(largest, exponent):
        exponent += 1
    return np.ldexp(1.0, exponent)


def numpy_spread(scale, shape):
    """The scale of each element, by indexing."""
    rows, columns = (
        np.arange(size) * (count > 1) // (128 if count < size else 1)
        for size, count in zip(shape[-2:], scale.shape[-2:], strict=True)
    )
    return np.asarray(scale, np.float64)[..., rows[:, None], columns]


def assert_same_fp8(got, wanted):
    """The same bits, but any NaN for a NaN."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    nan = np.isnan(wanted.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    bits = [np.where(nan, 0, array.view(np.uint8)) for array in (got, wanted)]
    np.testing.assert_array_equal(*bits)
