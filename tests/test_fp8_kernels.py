"""The CUDA kernels of quantize and scaled_matmul against NumPy: bits of one, sums of the other."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8 import (
    E4M3,
    E5M2,
    SCALES,
    assert_same_fp8,
    numpy_quantize,
    numpy_scaled_matmul,
    numpy_spread,
    random_operands,
)

from jaxkern import quantize, scaled_matmul

pytestmark = pytest.mark.gpu

SHAPES = [(128, 128), (256, 384), (1, 1), (3, 5), (130, 200), (257, 1000), (64, 16), (3, 40000)]


def draw(rows, columns, dtype):
    """Normal numbers of all sizes, with zeros, an outlier, a NaN and an infinity here and there."""
    rng = np.random.default_rng(rows * 1_000_003 + columns)
    x = rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-12, 12, (rows, 1))
    x[rng.random(x.shape) < 0.1] = 0.0
    x[0] = 0.0
    for value in (6e4, np.nan, np.inf, 1e-7):
        x[rng.integers(rows), rng.integers(columns)] = value
    return x.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("orientation", ["natural", "transposed", "both"])
@pytest.mark.parametrize("scaling", ["tensor", "row", "1x128", "128x128"])
@pytest.mark.parametrize(
    "dtype, format", [("bfloat16", E4M3), ("float32", E5M2), ("float16", E4M3)]
)
def test_quantize(rows, columns, orientation, scaling, dtype, format):
    x = draw(rows, columns, dtype)
    run = functools.partial(
        quantize, format=format, scaling=scaling, orientation=orientation, implementation="cuda"
    )
    got = jax.jit(run)(jnp.asarray(x))
    matrices = {"natural": [x], "transposed": [x.T], "both": [x, x.T]}[orientation]
    for array, matrix in zip(got if orientation == "both" else [got], matrices, strict=True):
        values, scale = numpy_quantize(matrix, format, scaling)
        np.testing.assert_array_equal(array.scale, scale)
        assert_same_fp8(array.values, values)


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_reference_quantizes(format):
    """What a compiler that may keep more precision would like to leave out."""
    x = draw(64, 300, "float32")[1:]

    @jax.jit
    def there_and_back(x):
        return quantize(x, format, scaling="1x128", implementation="xla").dequantize(jnp.float32)

    values, scale = numpy_quantize(x, format, "1x128")
    wanted = values.astype(np.float32) * numpy_spread(scale, x.shape).astype(np.float32)
    np.testing.assert_array_equal(there_and_back(x), wanted)


@jax.jit
def _both(x):
    return quantize(x, scaling="1x128", orientation="both", implementation="cuda")


def test_quantize_of_several_matrices():
    x = np.stack([draw(70, 300, "bfloat16"), draw(70, 300, "bfloat16")[::-1]])
    for array, matrix in zip(_both(jnp.asarray(x)), (x, x.swapaxes(1, 2)), strict=True):
        values, scale = numpy_quantize(matrix, E4M3, "1x128")
        np.testing.assert_array_equal(array.scale, scale)
        assert_same_fp8(array.values, values)


# What tensor cores lose: the sum of an instruction, of 32 products, keeps about 14 bits, of which
# one is allowed for. Promoted sums have four instructions each, fast ones all of them.
def tensor_core_error(k, fast):
    return (-(-k // 32) if fast else 4) * 2.0**-13


def check_product(out, exact, terms, k, fast):
    rounding = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-10}[out.dtype.name]
    error = np.abs(np.asarray(out, np.float64) - exact)
    allowed = tensor_core_error(k, fast) * terms + rounding * np.abs(exact)
    assert (error <= allowed).all(), (error / allowed).max()


SIZES = [  # few rows of lhs, and many, in tiles that are whole and not
    (1, 8, 16),
    (1, 1000, 4096),
    (16, 256, 512),
    (17, 100, 300),
    (64, 384, 2048),
    (100, 264, 2048),
    (128, 136, 144),
    (129, 136, 144),
    (256, 256, 128),
    (500, 700, 1000),
]


@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("lhs_scaling, rhs_scaling", SCALES)
@pytest.mark.parametrize(
    "formats, dtype, has_bias",
    [
        ((E4M3, E4M3), "bfloat16", True),
        ((E4M3, E4M3), "float32", False),
        ((E5M2, E4M3), "float16", False),
        ((E4M3, E5M2), "float32", True),
        ((E5M2, E5M2), "bfloat16", False),
    ],
)
def test_scaled_matmul(m, n, k, lhs_scaling, rhs_scaling, formats, dtype, has_bias):
    operands = random_operands(m + n + k, m, n, k, lhs_scaling, rhs_scaling, formats)
    bias = np.linspace(-3, 3, n, dtype=np.float32) if has_bias else None
    exact, terms = numpy_scaled_matmul(*operands, bias)
    for fast in (False, True):
        if fast and lhs_scaling == "1x128" and k > 128:
            continue
        run = functools.partial(
            scaled_matmul,
            preferred_element_type=dtype,
            bias=bias,
            fast_accumulation=fast,
            implementation="cuda",
        )
        check_product(jax.jit(run)(*operands), exact, terms, k, fast)


@pytest.mark.parametrize("m", [5, 300])
@pytest.mark.parametrize("lhs_scaling, rhs_scaling", SCALES)
def test_scaled_matmul_of_several_matrices(m, lhs_scaling, rhs_scaling):
    operands = random_operands(m, m, 200, 400, lhs_scaling, rhs_scaling, batch=(3,))
    exact, terms = numpy_scaled_matmul(*operands)
    out = jax.jit(functools.partial(scaled_matmul, implementation="cuda"))(*operands)
    check_product(out, exact, terms, 400, fast=False)


@pytest.mark.parametrize("m", [64, 256])
@pytest.mark.parametrize("lhs_scaling, rhs_scaling", SCALES)
def test_promotion_keeps_long_sums(m, lhs_scaling, rhs_scaling):
    """Of positive terms, of which tensor cores alone lose more and more."""
    k = 65536
    operands = [np.abs(x) for x in random_operands(m, m, 128, k, lhs_scaling, rhs_scaling)]
    exact, _ = numpy_scaled_matmul(*operands)
    out = jax.jit(functools.partial(scaled_matmul, implementation="cuda"))(*operands)
    assert np.abs(np.asarray(out, np.float64) / exact - 1).max() < 4 * 2.0**-13


@pytest.mark.parametrize("m", [5, 300])
@pytest.mark.parametrize("lhs_scaling, rhs_scaling", SCALES)
def test_scales_at_the_ends(m, lhs_scaling, rhs_scaling):
    """From the smallest one that quantize gives; NaN stays in the rows of its block."""
    lhs, rhs, lhs_scale, rhs_scale = random_operands(m, m, 200, 400, lhs_scaling, rhs_scaling)
    run = jax.jit(functools.partial(scaled_matmul, implementation="cuda"))
    operands = lhs, rhs, np.ldexp(lhs_scale, -126), np.ldexp(rhs_scale, 100)
    check_product(run(*operands), *numpy_scaled_matmul(*operands), 400, fast=False)
    bad = np.zeros(m, bool)
    bad[3 if lhs_scaling != "tensor" else slice(None)] = True
    lhs_scale[3 if lhs_scaling != "tensor" else 0, -1] = np.nan
    out = np.isnan(run(lhs, rhs, lhs_scale, rhs_scale))
    np.testing.assert_array_equal(out, np.broadcast_to(bad[:, None], out.shape))


def test_results_repeat():
    for m in (8, 300):
        operands = random_operands(m, m, 1000, 4000, "1x128", "128x128")
        run = jax.jit(functools.partial(scaled_matmul, implementation="cuda"))
        np.testing.assert_array_equal(run(*operands), run(*operands))
