"""Rotary embeddings: the published formulas, in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.models import Config, RopeScaling
from jaxkern.reference.rotary import frequencies, rotate
from jaxkern.testing import random_normal

SIZES = {"vocabulary": 8, "layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "hidden": 8}


def config(**options):
    return Config(**SIZES, context=1 << 17, **options)


@pytest.mark.parametrize("head_dim, theta", [(64, 1e4), (128, 5e5), (6, 1e6)])
def test_frequencies_fall_geometrically(head_dim, theta):
    got = frequencies(config(head_dim=head_dim, rope_theta=theta))
    wanted = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-7)


@pytest.mark.parametrize(
    "head_dim, factor, low, high, original",
    [(64, 32.0, 1.0, 4.0, 8192), (128, 8.0, 1.0, 4.0, 8192), (16, 4.0, 1.5, 3.0, 64)],
)
def test_scaled_frequencies(head_dim, factor, low, high, original):
    """By wavelength, pair by pair, as transformers' _compute_llama3_parameters is written."""
    scaling = RopeScaling(factor, low, high, original)
    got = frequencies(config(head_dim=head_dim, rope_theta=5e5, rope_scaling=scaling))
    wanted, kinds = [], set()
    for i in range(head_dim // 2):
        frequency = 5e5 ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            kinds.add("short")
        elif wavelength > original / low:
            kinds.add("long")
            frequency /= factor
        else:
            kinds.add("medium")
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        wanted.append(frequency)
    assert kinds == {"short", "medium", "long"}
    np.testing.assert_allclose(got, wanted, rtol=1e-7)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation(dtype, batched):
    (x,) = random_normal(0, (2, 5, 3, 8), dtype=dtype)
    positions = np.array([[0, 1, 2, 7, 1000], [3, 0, 0, 1, 9]]) if batched else np.arange(5)
    speed = frequencies(config(head_dim=8))
    got = rotate(x, jnp.asarray(positions), speed)
    assert got.dtype == dtype and got.shape == x.shape
    angle = np.broadcast_to(positions, (2, 5))[..., None] * speed.astype(np.float64)
    x = np.asarray(x, np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, :, None]
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    limit = 1e-4 if dtype == jnp.float32 else 2.0**-8 * 4
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=limit)


def test_products_depend_on_distances_alone():
    query, key = random_normal(1, (1, 1, 1, 16), (1, 1, 1, 16), dtype=jnp.float32)
    speed = frequencies(config(head_dim=16))

    def product(i, j):
        turned = [rotate(x, jnp.array([p]), speed) for x, p in ((query, i), (key, j))]
        return float(jnp.vdot(*turned))

    assert product(3, 1) == pytest.approx(product(103, 101), rel=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), rel=1e-2)
