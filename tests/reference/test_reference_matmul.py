"""reference.scaled_matmul against float64 NumPy."""

import functools

import jax
import numpy as np
import pytest
from fp8 import E4M3, E5M2, SCALES, numpy_scaled_matmul, random_operands

from jaxkern.reference import matmul as reference


def check(operands, dtype="float32", bias=None):
    matmul = jax.jit(functools.partial(reference.scaled_matmul, dtype=dtype))
    got = matmul(*operands, bias)
    wanted, size = numpy_scaled_matmul(*operands, bias)
    assert (got.dtype, got.shape) == (dtype, wanted.shape)
    # Sums of float32 lose to cancellation, so the terms' sizes count; then the result is rounded.
    eps = {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    error = np.abs(np.asarray(got).astype(np.float64) - wanted)
    assert (error <= 1e-6 * size + eps * np.abs(wanted)).all()


@pytest.mark.parametrize("scalings", SCALES, ids="-".join)
@pytest.mark.parametrize("shape", [(5, 7, 300), (130, 200, 257), (1, 1, 1), (4, 129, 128)])
def test_scales(scalings, shape):
    check(random_operands(1, *shape, *scalings))
    check(random_operands(1, *shape, *scalings, batch=(3,)))


@pytest.mark.parametrize("lhs_format", [E4M3, E5M2])
@pytest.mark.parametrize("rhs_format", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_formats_results_and_bias(lhs_format, rhs_format, dtype, with_bias):
    formats = lhs_format, rhs_format
    operands = random_operands(2, 33, 40, 140, "1x128", "128x128", formats=formats)
    bias = np.random.default_rng(3).standard_normal(40).astype(np.float32)
    check(operands, dtype, bias if with_bias else None)


def test_bias_is_added_before_rounding():
    """In bfloat16, 256 + 1 is 256; the exact sum 256 + 1 - 256 is 1."""
    lhs, rhs, lhs_scale, rhs_scale = random_operands(4, 1, 1, 2, "tensor", "tensor")
    lhs, rhs = np.array([[256, 1]], lhs.dtype), np.ones((1, 2), rhs.dtype)
    lhs_scale = rhs_scale = np.ones((1, 1), np.float32)
    bias = np.array([-256], np.float32)
    assert reference.scaled_matmul(lhs, rhs, lhs_scale, rhs_scale, bias, dtype="bfloat16") == 1


@pytest.mark.parametrize("scalings", [("row", "tensor"), ("1x128", "128x128")], ids="-".join)
def test_long_sums(scalings):
    check(random_operands(5, 8, 8, 65536, *scalings))


def test_a_scale_that_is_nan_marks_its_row():
    lhs, rhs, lhs_scale, rhs_scale = random_operands(6, 4, 5, 32, "row", "tensor")
    lhs_scale[2] = np.nan
    out = reference.scaled_matmul(lhs, rhs, lhs_scale, rhs_scale, dtype="float32")
    assert (np.isnan(out).all(1) == [False, False, True, False]).all()
