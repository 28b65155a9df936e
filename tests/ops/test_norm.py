"""rms_norm: semantics of the public function, and the kernels on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from jaxkern.testing import assert_close_to_reference, poison_memory, random_normal

implementations = pytest.mark.parametrize("implementation", [None, "xla"])


@pytest.mark.usefixtures("kernels")
@implementations
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(implementation, dtype, scale_dtype):
    """The result has the dtype of x, and each gradient that of its operand."""
    x = random_normal(1, (2, 3, 40), dtype=dtype)[0]
    scale = random_normal(2, (40,), dtype=scale_dtype)[0]
    norm = functools.partial(jaxkern.rms_norm, implementation=implementation)
    y, pullback = jax.vjp(norm, x, scale)
    dx, dscale = pullback(y)
    assert (y.dtype, dx.dtype, dscale.dtype) == (dtype, dtype, scale_dtype)
    assert (y.shape, dx.shape, dscale.shape) == (x.shape, x.shape, scale.shape)
    wide = np.asarray(x, np.float64)
    wanted = (
        wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale, np.float64)
    )
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=eps, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@implementations
def test_no_scale_is_ones(implementation):
    x = random_normal(1, (4, 24), dtype="bfloat16")[0]
    norm = functools.partial(jaxkern.rms_norm, implementation=implementation)
    assert (norm(x) == norm(x, jnp.ones(24))).all()
    gradient = jax.grad(lambda x: norm(x).astype(jnp.float32).sum())(x)
    assert gradient.shape == x.shape


@implementations
def test_epsilon(implementation):
    norm = functools.partial(jaxkern.rms_norm, implementation=implementation)
    np.testing.assert_allclose(norm(jnp.ones((1, 4)), epsilon=3.0), np.full((1, 4), 0.5))
    np.testing.assert_allclose(norm(jnp.ones((1, 4)), epsilon=jnp.float32(3)), np.full((1, 4), 0.5))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", [None, "cuda", "xla"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (0,)])
def test_empty_axes(shape, implementation):
    """Answered without a kernel, so also by implementation="cuda" on a CPU."""
    x, scale = jnp.zeros(shape), jnp.ones(shape[-1:])
    norm = functools.partial(jaxkern.rms_norm, implementation=implementation)
    y, pullback = jax.vjp(norm, x, scale)
    dx, dscale = pullback(y)
    assert (y.shape, dx.shape, dscale.shape) == (shape, shape, scale.shape)
    assert not dscale.any()


def random_norm_case(seed):
    """A shape and dtypes: odd widths, one row, many rows, and widths beyond one thread block."""
    rng = np.random.default_rng(seed)
    lead = [(1,), (int(rng.integers(2, 50)),), (3, int(rng.integers(1, 400)))][rng.integers(3)]
    width = int(
        rng.choice([rng.integers(1, 130), 128 * rng.integers(1, 65), rng.integers(130, 9000)])
    )
    dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
    scale_dtype = dtype if rng.integers(2) else "float32"
    return (*lead, width), dtype, scale_dtype


def check_case(seed, implementation):
    shape, dtype, scale_dtype = random_norm_case(seed)
    x, dy = random_normal(seed, shape, shape, dtype=dtype)
    scale = random_normal(seed + 1, shape[-1:], dtype=scale_dtype)[0]

    def ours(x, scale, implementation=implementation):
        return jaxkern.rms_norm(x, scale, implementation=implementation)

    def same_dtype(x, scale):
        mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean + 1e-6).astype(x.dtype) * scale).astype(x.dtype)

    def everything(norm, x, scale, dy):
        y, pullback = jax.vjp(norm, x, scale)
        return (y, *pullback(dy))

    reference = functools.partial(ours, implementation="xla")
    wide = [a.astype(jnp.float32) for a in (x, scale, dy)]
    results = (
        jax.jit(functools.partial(everything, ours))(x, scale, dy),
        jax.jit(functools.partial(everything, reference))(*wide),
        jax.jit(functools.partial(everything, same_dtype))(x, scale, dy),
    )
    for name, got, ref32, same in zip(("y", "dx", "dscale"), *results, strict=True):
        largest = float(jnp.abs(ref32).max())
        atol = largest * {"bfloat16": 2e-3, "float16": 3e-4, "float32": 2e-6}[got.dtype.name]
        try:
            assert_close_to_reference(got, ref32, same, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name} of {shape} {dtype} {scale_dtype}: {error}") from error


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", range(6))
def test_random_case_on_the_path_of_the_kernel(seed):
    check_case(seed, None)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_random_case(seed):
    poison_memory(1 << 26)
    check_case(seed, "cuda")


@pytest.mark.gpu
def test_forward_is_bitwise_repeatable():
    x, scale = random_normal(1, (777, 1001), (1001,), dtype="bfloat16")
    first = jaxkern.rms_norm(x, scale, implementation="cuda")
    poison_memory(1 << 26)
    assert (jaxkern.rms_norm(x, scale, implementation="cuda") == first).all()
