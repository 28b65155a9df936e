"""FP8 in NumPy: quantisation and products by their definition, in float64."""

import itertools

import jax
import ml_dtypes
import numpy as np

from jaxkern.testing import relative_error

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCKS = {"tensor": (None, None), "row": (1, None), "1x128": (1, 128), "128x128": (128, 128)}


def numpy_quantize(x, format, scaling):
    """values and float32 scale of x [..., R, C]."""
    x = np.asarray(x).astype(np.float64)
    *lead, rows, columns = x.shape
    high, wide = (step or size for step, size in zip(BLOCKS[scaling], (rows, columns), strict=True))
    down, across = -(-rows // high), -(-columns // wide)
    whole = np.zeros((*lead, down * high, across * wide))
    whole[..., :rows, :columns] = np.abs(x)
    amax = whole.reshape(*lead, down, high, across, wide).max((-3, -1))
    scale = numpy_scale(amax, LARGEST[format])
    values = (x / numpy_spread(scale, x.shape)).astype(getattr(ml_dtypes, format))
    return values, scale.astype(np.float32)


def numpy_scale(amax, largest):
    """The smallest powers of two from 2^-126 on that bring amax into range; NaN where none does."""
    powers = np.ldexp(1.0, np.arange(-126, 128))
    return np.append(powers, np.nan)[np.searchsorted(largest * powers, amax)]


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


RECIPES = {  # scaling of activations and gradients, scaling of weights, format of gradients
    "tensor": ("tensor", "tensor", E5M2),
    "row": ("row", "row", E5M2),
    "block": ("1x128", "128x128", E4M3),
}


def numpy_fp8_products(x, w, dy, recipe, gradient_format=None, shards=(1, 1, 1)):
    """y, dx and dw of x [M, K], w [K, N] and dy [M, N], as numpy_scaled_matmul has a product.

    `shards` of M, K and N have scales of their own.
    """
    sizes = *x.shape, w.shape[1]
    cuts = [np.array_split(np.arange(size), n) for size, n in zip(sizes, shards, strict=True)]
    totals = [[np.zeros(a.shape), np.zeros(a.shape)] for a in (dy, x, w)]
    for m, k, n in itertools.product(*cuts):
        shard = (np.asarray(a)[np.ix_(*cut)] for a, cut in ((x, (m, k)), (w, (k, n)), (dy, (m, n))))
        products = _fp8_products(*shard, recipe, gradient_format)
        for total, product, cut in zip(totals, products, ((m, n), (m, k), (k, n)), strict=True):
            for part, share in zip(total, product, strict=True):
                part[np.ix_(*cut)] += share
    return totals


def _fp8_products(x, w, dy, recipe, gradient_format):
    activation, weight, default = RECIPES[recipe]
    gradient = gradient_format or default

    def product(lhs, rhs):
        lhs, rhs = numpy_quantize(*lhs), numpy_quantize(*rhs)
        return numpy_scaled_matmul(lhs[0], rhs[0], lhs[1], rhs[1])

    return (
        product((x, E4M3, activation), (w.T, E4M3, weight)),
        product((dy, gradient, activation), (w, E4M3, weight)),
        product((x.T, E4M3, activation), (dy.T, gradient, activation)),
    )


def uneven(seed, *shape, dtype="float32"):
    """Normal numbers in rows and columns of very different sizes, which tell scalings apart."""
    rng = np.random.default_rng(seed)
    exponents = sum(
        rng.integers(-6, 6, [size if i == axis else 1 for i in range(len(shape))])
        for axis, size in enumerate(shape)
    )
    numbers = np.ldexp(rng.standard_normal(shape), exponents).astype(np.float32)
    return numbers.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


def assert_products(got, wanted, atol=1e-5):
    """Each array against its product, but for float32 sums in another order and its own dtype."""
    eps = {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
    for array, (product, size) in zip(got, wanted, strict=True):
        assert array.shape == product.shape
        error = np.abs(np.asarray(array).astype(np.float64) - product)
        allowed = atol * size + eps[array.dtype.name] * np.abs(product)
        assert (error <= allowed).all(), (error / np.maximum(allowed, 1e-30)).max()


def assert_near(got, wanted, limit):
    """The same trees of arrays, but for relative errors below `limit` of their norms."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert relative_error(g, w) < limit
