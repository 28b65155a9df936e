"""The kernels of quantize to four bits against plain JAX on the same GPU, bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import quantize

pytestmark = pytest.mark.gpu

# cuda/tests/quantize_four_bit_test.cu has the other groups.
FORMATS = {
    "nvfp4": {},
    "mxfp4": {},
    "int4 of 32": {"group_size": 32},
    "int4 of 64 with zero points": {"group_size": 64, "zero_point": True},
    "int4 of 128 with zero points": {"group_size": 128, "zero_point": True},
}
formats = pytest.mark.parametrize("name", FORMATS)
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


def run(name, x, **options):
    quantized = functools.partial(quantize, format=name.split()[0], **FORMATS[name], **options)
    return jax.jit(quantized)(x)


def bits(x):
    if x.dtype in (jnp.int4, jnp.float4_e2m1fn):
        return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint4)).astype(np.uint8)
    # XLA's conversions of NaN to bfloat16 differ.
    return np.float32(x)


def check(name, x):
    got, wanted = (run(name, x, implementation=which) for which in ("cuda", "xla"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(bits(a), bits(b))


def normal(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


@formats
@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 5, 1152), (3, 40064)])
def test_values(name, dtype, shape):
    check(name, normal(shape, dtype))


@formats
@dtypes
def test_of_any_magnitude(name, dtype):
    """Each block and each row has another, subnormal ones among them; some elements are zeros, NaN
    or infinite."""
    random = np.random.default_rng(1)
    most = 14 if dtype == "float16" else 120
    x = random.standard_normal((200, 1024)).astype(np.float32)
    x = np.ldexp(x, random.integers(-most - 10, most - 3, (200, 32)).repeat(32, 1))
    x[random.random(x.shape) < 0.05] = 0.0
    x[random.random(x.shape) < 0.05] *= -0.0
    for bad in (np.nan, np.inf, -np.inf):
        x[random.random(x.shape) < 2e-4] = bad
    x[5] = 0.0
    check(name, jnp.asarray(x, dtype))


@formats
@dtypes
def test_ties(name, dtype):
    """Multiples of powers of two, and of such numbers as make ties in scales that are none."""
    steps = np.arange(-512, 512, dtype=np.float32) / 64
    x = np.stack([steps * factor for factor in (1, 1 / 2, 3 / 4, 4, 21, 53 / 2)])
    x[:, ::16] = np.float32([53 / 8, -6, 448, 3, 7, -7, 7 / 2, 13 / 2] * 8)
    check(name, jnp.asarray(np.stack([x * 2.0**power for power in (0, -9, 5)]), dtype))


@dtypes
def test_what_was_quantized_before(dtype):
    """Its elements are values, or between them, for the scales that it has now."""
    x = run("nvfp4", normal((64, 512), "float32")).dequantize(dtype)
    check("nvfp4", x)
    check("mxfp4", x)
    check("int4 of 32", x)


@formats
def test_vmap(name):
    x = normal((3, 4, 128), "bfloat16") * jnp.asarray([1, 8, 0.1], "bfloat16")[:, None, None]
    got = jax.vmap(functools.partial(run, name, implementation="cuda"))(x)
    for i in range(3):
        one = run(name, x[i], implementation="xla")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(bits(a[i]), bits(b))


@formats
def test_nothing_is_copied(name):
    """Values of four bits are in memory as XLA has them, and the kernels write them there."""
    x = normal((256, 512), "bfloat16")
    quantized = functools.partial(
        quantize, format=name.split()[0], **FORMATS[name], implementation="cuda"
    )
    text = jax.jit(quantized).lower(x).compile().as_text()
    values = "s4" if "int4" in name else "f4e2m1fn"
    made = [line for line in text.splitlines() if f"= {values}[256,512]" in line.split("(")[0]]
    assert made and all("bitcast" in line or "get-tuple-element" in line for line in made)
