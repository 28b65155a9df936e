"""reference.rms_norm against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkern.reference import norm as reference
from jaxkern.testing import random_normal


def numpy_rms_norm(x, scale, epsilon):
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    rstd = 1 / np.sqrt((x**2).mean(-1) + epsilon)
    return x * rstd[..., None] * scale, rstd


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3, 33)])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_values(shape, epsilon):
    x, scale = random_normal(1, shape, shape[-1:], dtype="float32")
    got = reference.rms_norm(x, scale, epsilon=epsilon)
    for g, w in zip(got, numpy_rms_norm(x, scale, epsilon), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5)


def test_low_precision_is_computed_in_float32():
    x, scale = random_normal(1, (4, 96), (96,), dtype="bfloat16")
    y, rstd = reference.rms_norm(x, scale, epsilon=1e-6)
    wide, _ = reference.rms_norm(x.astype("float32"), scale, epsilon=1e-6)
    assert (y.dtype, rstd.dtype) == ("bfloat16", "float32")
    assert (y == wide.astype("bfloat16")).all()


def test_float64():
    with jax.enable_x64():
        x, scale = random_normal(1, (4, 96), (96,), dtype="float64")
        y, _ = reference.rms_norm(x, scale, epsilon=1e-6)
    assert y.dtype == "float64"
    np.testing.assert_allclose(y, numpy_rms_norm(x, scale, 1e-6)[0], rtol=1e-13)


def test_zeros_are_not_divided_by():
    y, rstd = reference.rms_norm(jnp.zeros((2, 3)), jnp.ones(3), epsilon=1e-6)
    assert not y.any()
    np.testing.assert_allclose(rstd, 1e3, rtol=1e-6)


def test_derivatives_of_any_order():
    x, scale = random_normal(1, (3, 5), (5,), dtype="float32")
    norm = jax.jit(lambda *operands: reference.rms_norm(*operands, epsilon=0.1))
    check_grads(norm, (x, scale), order=2, atol=0.02, rtol=0.02)
