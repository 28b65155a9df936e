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


SCALES = [  # of lhs and rhs
    ("tensor", "tensor"),
    ("tensor", "row"),
    ("row", "tensor"),
    ("row", "row"),
    ("1x128", "128x128"),
    ("1x128", "1x128"),
]


def scale_shape(scaling, rows, columns):
    high, wide = BLOCKS[scaling]
    return -(-rows // (high or rows)), -(-columns // (wide or columns))


def random_operands(seed, m, n, k, lhs_scaling, rhs_scaling, formats=(E4M3, E5M2), batch=()):
    """lhs, rhs and their scales, which are any numbers here, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    lhs, rhs = (
        rng.standard_normal((*batch, rows, k)).astype(getattr(ml_dtypes, format))
        for rows, format in zip((m, n), formats, strict=True)
    )
    lhs_scale, rhs_scale = (
        rng.uniform(0.5, 3, (*batch, *scale_shape(scaling, rows, k))).astype(np.float32)
        for rows, scaling in ((m, lhs_scaling), (n, rhs_scaling))
    )
    return lhs, rhs, lhs_scale, rhs_scale


def numpy_scaled_matmul(lhs, rhs, lhs_scale, rhs_scale, bias=None):
    """The product in float64, and the sum of the absolute values of its terms."""
    lhs, rhs = (
        np.asarray(x).astype(np.float64) * numpy_spread(scale, x.shape)
        for x, scale in ((lhs, lhs_scale), (rhs, rhs_scale))
    )
    bias = np.zeros(rhs.shape[-2]) if bias is None else np.asarray(bias, np.float64)
    out = lhs @ rhs.swapaxes(-1, -2) + bias
    return out, np.abs(lhs) @ np.abs(rhs).swapaxes(-1, -2) + np.abs(bias)
