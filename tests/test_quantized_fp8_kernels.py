"""The kernels of quantized_matmul with activation_format "fp8" beside float64 products of the same
bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import pack_weight, quantize, quantized_matmul
from jaxkern.ops.quantized_matmul_fp8 import weight_to_fp8
from jaxkern.testing import FOUR_BIT_TIMES_FP8_LIMITS, assert_close_to_reference, relative_error

pytestmark = pytest.mark.gpu

FORMATS = {
    "nvfp4": {},
    "mxfp4": {},
    "int4": {},
    "int4 of 64": {"group_size": 64, "zero_point": True},
    "int4 of 32": {"group_size": 32},
}
formats = pytest.mark.parametrize("name", FORMATS)
run = functools.partial(quantized_matmul, activation_format="fp8", implementation="cuda")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight(name, *shape, seed=0):
    return quantize(jnp.asarray(normal(seed, *shape)), name.split()[0], **FORMATS[name])


MANY = 257  # rows of x, from which on the weight is rounded too


def as_multiplied(w, rows):
    """float64: rounded, for many rows of x, but for integers in groups of 128; for others integers
    times their scale in bfloat16, which for a single row scales sums."""
    packed = pack_weight(w)
    if rows >= MANY and (packed.format, packed.block) != ("int4", 128):
        return np.float64(weight_to_fp8(w).dequantize())
    whole = w.dequantize()
    rounds = rows > 1 and w.values.dtype == jnp.int4
    return np.float64(whole.astype(jnp.bfloat16) if rounds else whole)


def assert_product(got, x, w):
    """Of x in e4m3 and the weight as multiplied: sums of 128 products of 8 bits have about 14."""
    axes = "...mk,...nk->...mn"
    x8, w8 = np.float64(quantize(x).dequantize()), as_multiplied(w, x.shape[-2])
    exact = np.einsum(axes, x8, w8)
    same = jnp.asarray(exact, x.dtype)
    atol = 2**-12 * float(np.einsum(axes, np.abs(x8), np.abs(w8)).max())
    assert_close_to_reference(got, exact, same, atol=atol)


@formats
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 16, 50, 130, 600])
@pytest.mark.parametrize("size", [(24, 128), (200, 1152), (1040, 4096), (4096, 512)])
def test_product(name, dtype, rows, size):
    x, w = jnp.asarray(normal(1, rows, size[1]), dtype), weight(name, *size)
    assert_product(jax.jit(run)(x, pack_weight(w)), x, w)


@pytest.mark.parametrize("name, columns", [("nvfp4", 112), ("mxfp4", 1056), ("int4 of 32", 416)])
def test_columns_that_fill_no_tile(name, columns):
    w = weight(name, 40, columns)
    for rows in (70, 400):
        x = jnp.asarray(normal(1, rows, columns), "bfloat16")
        assert_product(run(x, pack_weight(w)), x, w)


@formats
def test_fast_accumulation(name):
    """Tensor cores keep 14 bits of sums of all of K."""
    x, w = jnp.asarray(normal(1, 400, 4096), "bfloat16"), weight(name, 200, 4096)
    got = run(x, pack_weight(w), fast_accumulation=True)
    exact = np.float64(quantize(x).dequantize()) @ as_multiplied(w, 400).T
    assert relative_error(got, exact) < 5e-3


@formats
def test_error(name):
    """Beside float64 products of x and of what the weight stands for."""
    x, w = jnp.asarray(normal(1, 512, 4096), "bfloat16"), weight(name, 1024, 4096)
    packed = pack_weight(w)
    exact = np.float64(x) @ np.float64(w.dequantize()).T
    limit = FOUR_BIT_TIMES_FP8_LIMITS[packed.format, packed.block]
    assert relative_error(run(x, packed), exact) < limit


@formats
@pytest.mark.parametrize("rows", [4, 300, 400])
def test_what_is_not_finite_or_zero(name, rows):
    w = normal(2, 70, 256)
    w[3, 5], w[66, 200] = np.nan, np.inf
    w[4], w[7, 128:] = 0, 0
    quantized = quantize(jnp.asarray(w), name.split()[0], **FORMATS[name])
    x = jnp.asarray(normal(1, rows, 256), "bfloat16").at[2, 9].set(jnp.inf).at[1].set(0)
    got = np.float32(run(x, pack_weight(quantized)))
    bad = np.zeros_like(got, bool)
    bad[:, [3, 66]], bad[2] = True, True
    np.testing.assert_array_equal(np.isnan(got), bad)
    assert (got[[0, 3], 4] == 0).all() and (np.delete(got[1], [3, 66]) == 0).all()


@formats
@pytest.mark.parametrize("rows", [5, MANY])
def test_transforms(name, rows):
    x, w = jnp.asarray(normal(1, 3, rows, 256), "bfloat16"), weight(name, 3, 48, 256)
    packed = pack_weight(w)
    assert_product(jax.vmap(run)(x, packed), x, w)
    first = jax.tree.map(lambda a: a[0], w)
    assert_product(jax.vmap(run, (0, None))(x, pack_weight(first)), x, first)
    assert_product(jax.vmap(run, (None, 0))(x[0], packed), jnp.stack([x[0]] * 3), w)


@formats
def test_a_row_of_many_does_not_depend_on_others(name):
    """Nor on how many there are: that is a question of tiles."""
    x, w = jnp.asarray(normal(1, 1000, 512), "bfloat16"), pack_weight(weight(name, 4096, 512))
    whole = np.float32(run(x, w))
    for rows in (MANY, 600):
        np.testing.assert_array_equal(np.float32(run(x[:rows], w)), whole[:rows])


@formats
def test_the_same_twice(name):
    w = pack_weight(weight(name, 512, 4096))
    for rows in (100, 400):
        x = jnp.asarray(normal(1, rows, 4096), "bfloat16")
        first, second = (np.float32(jax.jit(run)(x, w)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
