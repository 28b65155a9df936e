"""Tensors of more than 2^31 elements: their far end against a small call."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern

pytestmark = pytest.mark.gpu

NEEDED = 80 * 10**9  # bytes, for operands, results, cotangents and workspaces


@pytest.fixture(autouse=True)
def memory(device):
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("needs the GPU for itself: run this file without xdist")
    limit = jax.devices("cuda")[0].memory_stats()["bytes_limit"]
    if limit < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of GPU memory, JAX may take {limit / 1e9:.0f}")


@functools.partial(jax.jit, static_argnums=0)
def normal(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]


def gradients(query, key, value, dout, **options):
    """out, dquery, dkey, dvalue."""

    @jax.jit
    def run(query, key, value, dout):
        attend = functools.partial(jaxkern.dot_product_attention, **options, implementation="cuda")
        out, pullback = jax.vjp(attend, query, key, value)
        return out, *pullback(dout)

    return run(query, key, value, dout)


def assert_close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        assert w.any()
        np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-2 * np.abs(w).max())


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_sequences(deterministic):
    """The last one begins at element 2^31 of every operand."""
    shape = (129, 1024, 128, 128)
    arrays = normal((shape,) * 4)
    options = {"is_causal": True, "deterministic": deterministic}
    large = [x[-1:] for x in gradients(*arrays, **options)]
    assert_close(large, gradients(*(x[-1:] for x in arrays), **options))


def test_one_long_sequence():
    """Many query heads on one key head; windows, so that the last keys are of the last queries."""
    length, window, last = (1 << 17) + 192, 128, 256
    query, key = (1, length, 128, 128), (1, length, 1, 128)
    arrays = normal((query, key, key, query))
    large = gradients(*arrays, local_window_size=(window, 0))
    q, k, v, dout = arrays
    small = gradients(
        q[:, -last:],
        k[:, -last - window :],
        v[:, -last - window :],
        dout[:, -last:],
        local_window_size=(window, 0),
        alignment="bottom_right",
    )
    assert_close([x[:, -last:] for x in large], [x[:, -last:] for x in small])
