"""The kernels of weights of four bits against float64, and the plain path on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_bit import FORMATS

from jaxkern import pack_weight, quantize, quantized_matmul
from jaxkern.testing import assert_close_to_reference

pytestmark = pytest.mark.gpu

formats = pytest.mark.parametrize("name", FORMATS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight(name, *shape, seed=0):
    return quantize(jnp.asarray(normal(seed, *shape)), name.split()[0], **FORMATS[name])


def assert_product(got, x, w):
    """Beside x w^T in float32, and in x's dtype with a weight of that dtype."""
    axes = "...mk,...nk->...mn"
    exact = np.einsum(axes, np.float64(x), np.float64(w.dequantize()))
    same = jnp.einsum(axes, x, w.dequantize(x.dtype), preferred_element_type=jnp.float32)
    assert_close_to_reference(got, exact, same.astype(x.dtype), atol=1e-3)


@formats
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 25, 32, 50, 130, 600])
@pytest.mark.parametrize("size", [(24, 128), (200, 1088), (1040, 4096), (4096, 512)])
def test_product(name, dtype, rows, size):
    x, w = jnp.asarray(normal(1, rows, size[1]), dtype), weight(name, *size)
    run = jax.jit(lambda x, w: quantized_matmul(x, w, implementation="cuda"))
    assert_product(run(x, pack_weight(w)), x, w)


@formats
@pytest.mark.parametrize("columns", [16, 112, 1072])
def test_columns_that_fill_no_tile(name, columns):
    block = {"nvfp4": 16, "mxfp4": 32, "int4": 32}.get(name, 64)
    columns = -(-columns // block) * block
    x, w = jnp.asarray(normal(1, 3, columns), "bfloat16"), weight(name, 40, columns)
    assert_product(quantized_matmul(x, pack_weight(w), implementation="cuda"), x, w)


@formats
@pytest.mark.parametrize("rows", [5, 50])
def test_float32_results(name, rows):
    """Sums are float32: beside their terms the errors are of float32, or of rounded integers."""
    x, w = jnp.asarray(normal(1, rows, 2048), "bfloat16"), weight(name, 96, 2048)
    got = quantized_matmul(
        x, pack_weight(w), preferred_element_type=jnp.float32, implementation="cuda"
    )
    x, exact = np.float64(x), np.float64(w.dequantize())
    terms = np.abs(x) @ np.abs(exact).T
    limit = 2**-9 if name.startswith("int4") else 2**-20
    assert got.dtype == jnp.float32
    assert (np.abs(np.float64(got) - x @ exact.T) <= limit * terms).all()


@formats
@pytest.mark.parametrize("rows", [4, 40])
def test_what_is_not_finite_or_zero(name, rows):
    w = normal(2, 70, 256)
    w[3, 5], w[66, 200] = np.nan, np.inf
    w[4], w[7, 128:] = 0, 0
    quantized = quantize(jnp.asarray(w), name.split()[0], **FORMATS[name])
    x = jnp.asarray(normal(1, rows, 256), "bfloat16")
    got = np.float32(quantized_matmul(x, pack_weight(quantized), implementation="cuda"))
    bad = np.isnan(got)
    assert bad[:, [3, 66]].all() and bad.sum() == 2 * rows
    assert (got[:, 4] == 0).all()


def test_a_scale_of_zero():
    w = weight("nvfp4", 16, 128)
    w = dataclasses.replace(w, scale=w.scale.at[:, 2].set(0))
    x = jnp.asarray(normal(1, 4, 128), "bfloat16")
    assert_product(quantized_matmul(x, pack_weight(w), implementation="cuda"), x, w)


@pytest.mark.parametrize("rows", [3, 40])
def test_infinite_and_small_activations(rows):
    """As float32 would have them: nothing is scaled out of bfloat16's range."""
    w = pack_weight(weight("nvfp4", 16, 128))
    x = jnp.asarray(normal(1, rows, 128), "bfloat16")
    wanted = np.float32(quantized_matmul(x, w, implementation="cuda"))
    for factor in (2.0**-100, 2.0**100):
        scaled = quantized_matmul(x * factor, w, implementation="cuda")
        np.testing.assert_array_equal(np.float32(scaled), wanted * np.float32(factor))
    infinite = np.float32(quantized_matmul(x.at[1, 0].set(jnp.inf), w, implementation="cuda"))
    assert not np.isfinite(infinite[1]).any()
    np.testing.assert_array_equal(infinite[0::2], wanted[0::2])


@formats
def test_transforms(name):
    x, w = jnp.asarray(normal(1, 3, 5, 256), "bfloat16"), weight(name, 3, 48, 256)
    packed = pack_weight(w)

    def run(x, w):
        return quantized_matmul(x, w, implementation="cuda")

    assert_product(jax.vmap(run)(x, packed), x, w)
    first = jax.tree.map(lambda a: a[0], w)
    assert_product(run(x, pack_weight(first)), x, first)
    many = jnp.asarray(normal(2, 9, 5, 256), "bfloat16")
    assert_product(jax.vmap(run, (0, None))(many, pack_weight(first)), many, first)
    assert_product(jax.vmap(run, (None, 0))(x[0], packed), jnp.stack([x[0]] * 3), w)


@functools.partial(jax.jit, static_argnames="wanted")
def gradient(w, dy, like, wanted=None):
    """Of x, which has the dtype of `like`."""
    x = jnp.zeros((*dy.shape[:-1], w.shape[-1]), like.dtype)
    options = {"preferred_element_type": wanted, "implementation": "cuda"}
    return jax.vjp(lambda x: quantized_matmul(x, w, **options), x)[1](dy)[0]


def assert_gradient(got, dy, w):
    """As assert_product, of dy w."""
    exact = np.einsum("...mn,...nk->...mk", np.float64(dy), np.float64(w.dequantize()))
    same = jnp.einsum(
        "...mn,...nk->...mk", dy, w.dequantize(got.dtype), preferred_element_type=jnp.float32
    )
    assert_close_to_reference(got, exact, same.astype(got.dtype), atol=1e-3)


@formats
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 7, 33, 130, 600])
@pytest.mark.parametrize("size", [(24, 128), (200, 1088), (1040, 4096), (4096, 576)])
def test_gradient(name, dtype, rows, size):
    w, dy = weight(name, *size), jnp.asarray(normal(2, rows, size[0]), dtype)
    assert_gradient(gradient(pack_weight(w), dy, dy), dy, w)


@formats
def test_gradient_of_float32_results(name):
    """Takes what comes back in bfloat16."""
    w, dy = weight(name, 200, 512), jnp.asarray(normal(2, 50, 200))
    got = gradient(pack_weight(w), dy, jnp.zeros((), "bfloat16"), "float32")
    assert got.dtype == jnp.bfloat16
    assert_gradient(got, dy, w)


def test_gradient_by_rows_of_all_sizes():
    """Rows whose scales are far apart, in both types."""
    w = normal(3, 200, 256) * np.exp2(np.arange(200) % 21 - 10)[:, None]
    for dtype in ("bfloat16", "float16"):
        quantized = quantize(jnp.asarray(w, "float32"), "mxfp4")
        dy = jnp.asarray(normal(2, 50, 200) / 8, dtype)
        assert_gradient(gradient(pack_weight(quantized), dy, dy), dy, quantized)


@formats
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_what_is_not_finite(name, dtype):
    """NaN is in the columns of its block alone, in all rows of dx, of one matrix of two."""
    w = normal(2, 2, 70, 256)
    w[1, 3, 5], w[1, 69, 200] = np.nan, np.nan
    quantized = quantize(jnp.asarray(w), name.split()[0], **FORMATS[name])
    dy = jnp.asarray(normal(1, 2, 40, 70), dtype).at[..., 3].set(0)
    got = jax.vmap(lambda w, dy: gradient(w, dy, dy))(pack_weight(quantized), dy)
    wanted = np.einsum("bmn,bnk->bmk", np.float64(dy), np.float64(quantized.dequantize()))
    assert np.isnan(wanted).any() and not np.isnan(wanted).all()
    np.testing.assert_array_equal(np.isnan(np.float32(got)), np.isnan(wanted))


@formats
def test_transformed_gradients(name):
    w, dy = weight(name, 3, 48, 256), jnp.asarray(normal(1, 3, 5, 48), "bfloat16")
    packed, first = pack_weight(w), jax.tree.map(lambda a: a[0], w)
    run = functools.partial(gradient, like=dy)
    assert_gradient(jax.vmap(run)(packed, dy), dy, w)
    assert_gradient(run(pack_weight(first), dy), dy, first)
    assert_gradient(jax.vmap(run, (None, 0))(pack_weight(first), dy), dy, first)


@formats
@pytest.mark.parametrize("rows", [16, 100])
def test_the_same_twice(name, rows):
    x, w = jnp.asarray(normal(1, rows, 4096), "bfloat16"), pack_weight(weight(name, 512, 4096))
    run = jax.jit(lambda x, w: quantized_matmul(x, w, implementation="cuda"))
    np.testing.assert_array_equal(np.float32(run(x, w)), np.float32(run(x, w)))


@formats
def test_quantises_and_packs_as_a_cpu_does(name):
    """XLA for GPUs and for CPUs, whose bits are those of float64 by other tests."""

    @jax.jit
    def run(x):
        packed = pack_weight(quantize(x, name.split()[0], **FORMATS[name]))
        return packed, packed.unpack(), packed.dequantize()

    x = normal(3, 70, 512)
    x[3, 5], x[4] = np.nan, 0
    results = []
    for platform in ("cuda", "cpu"):
        with jax.default_device(jax.devices(platform)[0]):
            results.append(jax.tree.leaves(run(jnp.asarray(x))))
    for gpu, cpu in zip(*results, strict=True):
        assert gpu.dtype == cpu.dtype
        np.testing.assert_array_equal(
            *(np.float32(a) if a.dtype.itemsize < 4 else np.asarray(a) for a in (gpu, cpu))
        )
