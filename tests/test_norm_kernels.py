"""The CUDA kernels of rms_norm against float32: every path by width, dtype, and rows per block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from jaxkern.reference import norm as reference
from jaxkern.testing import assert_close_to_reference

pytestmark = pytest.mark.gpu

EPSILON = 1e-6


def draw(rows, width, dtype, scale_dtype):
    """x, scale and the cotangent dy."""
    rng = np.random.default_rng(rows * 1_000_003 + width)
    x, dy = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for _ in range(2))
    return x, jnp.asarray(1 + 0.3 * rng.normal(size=width), scale_dtype), dy


@jax.jit
def by_kernel(x, scale, dy):
    y, pullback = jax.vjp(
        lambda x, scale: jaxkern.rms_norm(x, scale, epsilon=EPSILON, implementation="cuda"),
        x,
        scale,
    )
    return y, *pullback(dy)


@functools.partial(jax.jit, static_argnames="dtype")
def plainly(x, scale, dy, dtype):
    """The same in jax.numpy: the mean of squares in float32, the products in `dtype`."""

    def rms_norm(x, scale):
        mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean + EPSILON).astype(dtype) * scale.astype(dtype)

    y, pullback = jax.vjp(rms_norm, x.astype(dtype), scale)
    return y, *pullback(dy.astype(dtype))


WIDTHS = (1, 2, 7, 33, 64, 136, 1000, 1024, 2048, 2049, 4099, 8192, 16384, 16392, 40000)


@pytest.mark.parametrize(
    "rows, width", [*((300, width) for width in WIDTHS), (1, 7), (1, 8192), (3, 64), (3, 2049)]
)
@pytest.mark.parametrize(
    "dtype, scale_dtype",
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("float16", "float32"),
    ],
)
def test_values_and_gradients(rows, width, dtype, scale_dtype):
    x, scale, dy = operands = draw(rows, width, dtype, scale_dtype)
    exact = plainly(*operands, dtype="float32")
    same_dtype = plainly(*operands, dtype=dtype)
    # dx is a difference of terms as large as rstd, which one small element makes large.
    rstd = float(reference.rms_norm(x, scale, epsilon=EPSILON)[1].max())
    atols = (1e-5, 1e-5 * max(1.0, rstd), 1e-5 * rows)
    for ours, want, error, atol in zip(by_kernel(*operands), exact, same_dtype, atols, strict=True):
        assert_close_to_reference(ours, want, error, atol=atol)


def test_residual_is_the_reference_s():
    x, scale, _ = draw(129, 1000, "bfloat16", "float32")
    call = jax.ffi.ffi_call(
        "jaxkern.rms_norm_fwd",
        [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)],
    )
    by_kernel(x, scale, x)  # registers the targets
    _, rstd = call(x, scale, epsilon=np.float32(EPSILON))
    _, want = reference.rms_norm(x, scale, epsilon=EPSILON)
    np.testing.assert_allclose(rstd, want, rtol=1e-5)


@pytest.mark.parametrize("width", [64, 1000, 8192])
def test_repeats_bitwise(width):
    operands = draw(1000, width, "bfloat16", "float32")
    for first, second in zip(by_kernel(*operands), by_kernel(*operands), strict=True):
        np.testing.assert_array_equal(first, second)


def test_handler_names_what_is_wrong():
    x, scale, dy = draw(4, 8, "bfloat16", "float32")
    by_kernel(x, scale, dy)  # registers the targets
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((4,), jnp.float32)]
    call = jax.ffi.ffi_call("jaxkern.rms_norm_fwd", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"scale has shape \[7\], wanted \[8\]"):
        call(x, scale[:7], epsilon=np.float32(EPSILON))[0].block_until_ready()
