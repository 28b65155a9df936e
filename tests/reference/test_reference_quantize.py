"""reference.quantize, bit for bit against its definition in float64 NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8 import BLOCKS, E4M3, E5M2, assert_same_fp8, numpy_quantize, numpy_spread
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkern.reference import quantize as reference

formats = pytest.mark.parametrize("format", [E4M3, E5M2])
scalings = pytest.mark.parametrize("scaling", list(BLOCKS))


def check(x, format, scaling):
    values, scale = jax.jit(lambda x: reference.quantize(x, jnp.dtype(format), scaling=scaling))(x)
    wanted = numpy_quantize(x, format, scaling)
    assert_same_fp8(values, wanted[0])
    assert scale.dtype == "float32"
    np.testing.assert_array_equal(scale, wanted[1])


def numbers(seed, shape, dtype="float32"):
    """Of magnitudes from far below to far above 1."""
    rng = np.random.default_rng(seed)
    spread = rng.integers(-8, 9, shape) if dtype == "float16" else rng.integers(-30, 30, shape)
    return np.ldexp(rng.standard_normal(shape), spread).astype(ml_dtypes.finfo(dtype).dtype)


@formats
@scalings
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 5), (130, 300), (2, 2, 129, 128)])
def test_values_and_scales(format, scaling, dtype, shape):
    check(numbers(1, shape, dtype), format, scaling)


@formats
@scalings
@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 260), columns=st.integers(1, 260), seed=st.integers(0, 99))
def test_any_shape(format, scaling, rows, columns, seed):
    check(numbers(seed, (rows, columns)), format, scaling)


@formats
def test_every_scale_and_its_edge(format):
    """amax of exactly 1.75 * 2^n, which still fits, and of its neighbours, for all n."""
    edge = np.ldexp(np.float32(1.75), np.arange(-149, 128)).astype(np.float32)
    amax = np.concatenate([edge, *(np.nextafter(edge, np.float32(side)) for side in (0, np.inf))])
    check(amax[:, None] * np.array([[1, -0.5, 0.3]], np.float32), format, "row")


@formats
def test_ties_go_to_even(format):
    values = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, format)).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([values, middle, *near])[None]
    check(x, format, "tensor")
    assert reference.scale_of(x, jnp.dtype(format), scaling="tensor") == 1


@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_subnormal_numbers_are_not_flushed(format, dtype):
    smallest = ml_dtypes.finfo(dtype).smallest_subnormal
    rng = np.random.default_rng(2)
    x = (rng.integers(-128, 128, (16, 40)) * np.float64(smallest)).astype(smallest.dtype)
    x[8:] *= 2.0 ** (2 * np.arange(8)[:, None]).astype(x.dtype)
    check(x, format, "row")
    check(x, format, "tensor")
    values, _ = reference.quantize(x[:8], jnp.dtype(format), scaling="row")
    assert np.asarray(values).astype(np.float32).any() == (format == E5M2 or dtype != "float32")


@formats
@scalings
def test_zeros(format, scaling):
    x = np.array([[0.0, -0.0] * 70] * 3, np.float32)
    check(x, format, scaling)
    _, scale = reference.quantize(x, jnp.dtype(format), scaling=scaling)
    assert (scale == 2.0**-126).all()


@formats
@scalings
def test_one_huge_number(format, scaling):
    x = numbers(3, (140, 270))
    x[131, 200] = np.finfo(np.float32).max
    check(x, format, scaling)


@formats
@scalings
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_block_with_a_number_that_is_not_finite_is_nan(format, scaling, bad):
    x = numbers(4, (140, 270))
    x[3, 5] = bad
    check(x, format, scaling)
    values, scale = reference.quantize(x, jnp.dtype(format), scaling=scaling)
    affected = np.isnan(np.asarray(values).astype(np.float32))
    assert affected.sum() == np.prod([size or x.shape[i] for i, size in enumerate(BLOCKS[scaling])])
    assert np.isnan(scale).sum() == 1


@formats
def test_blocks_of_the_transpose(format):
    """What a power of two is for: 128x128 values of x^T are those of x."""
    x = numbers(5, (200, 300))
    values, scale = reference.quantize(x, jnp.dtype(format), scaling="128x128")
    values_t, scale_t = reference.quantize(x.T, jnp.dtype(format), scaling="128x128")
    assert_same_fp8(values.T, values_t)
    np.testing.assert_array_equal(scale.T, scale_t)


@pytest.mark.parametrize(
    "scale", [(1, 1), (5, 1), (1, 3), (5, 3), (200, 1), (200, 3), (2, 1), (2, 3)]
)
def test_dequantize(scale):
    """Any of the scales of 200 rows (or 5) and 300 columns."""
    rows = 5 if scale[0] == 5 else 200
    values = numbers(6, (4, rows, 300)).astype(ml_dtypes.float8_e5m2)
    scale = np.random.default_rng(7).uniform(1, 2, (4, *scale)).astype(np.float32)
    wanted = values.astype(np.float64) * numpy_spread(scale, values.shape)
    np.testing.assert_allclose(reference.dequantize(values, scale), wanted, rtol=1e-7)


def test_the_error_is_half_a_unit_in_the_last_place():
    """Of every element that is not subnormal in the format."""
    x = np.random.default_rng(8).standard_normal((256, 256)).astype(np.float32)
    for format, bits, smallest in ((jnp.float8_e4m3fn, 3, -6), (jnp.float8_e5m2, 2, -14)):
        values, scale = reference.quantize(x, format, scaling="row")
        normal = np.abs(x) >= np.ldexp(np.asarray(scale), smallest)
        error = np.abs(reference.dequantize(values, scale) - x)
        assert normal.mean() > 0.99
        assert (error <= np.abs(x) * 2.0 ** -(bits + 1))[normal].all()
