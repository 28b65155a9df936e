"""Scales in Blackwell's order, and products of two operands in NVFP4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import _dispatch, blackwell_scales, pack_weight, quantize, quantized_matmul
from jaxkern.ops import quantized_matmul as module

K, N = 256, 48


def normal(*shape, seed=1, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("shape", [(128, 64), (1, 64), (300, 160), (2, 130, 320)])
@pytest.mark.parametrize("format, block", [("nvfp4", 16), ("mxfp4", 32)])
def test_scales(shape, format, block):
    """One after the other, by the formula."""
    x = quantize(normal(*shape), format)
    got = blackwell_scales(x)
    *lead, rows, columns = shape
    blocks = columns // block
    assert got.shape == (*lead, -(-rows // 128), -(-blocks // 4), 512)
    assert got.dtype == x.scale.dtype
    np.testing.assert_array_equal(np.float32(jax.jit(blackwell_scales)(x)), np.float32(got))
    wanted = np.asarray(x.scale).view(np.uint8)
    found = np.asarray(got).view(np.uint8)
    seen = np.zeros(found.shape, bool)
    for index in np.ndindex(wanted.shape):
        *rest, r, k = index
        place = (*rest, r // 128, k // 4, 16 * (r % 32) + 4 * (r % 128 // 32) + k % 4)
        assert found[place] == wanted[index]
        seen[place] = True
    assert (found[~seen] == 0).all()


def test_errors_of_scales():
    with pytest.raises(ValueError, match="x has values of int4 and scales of bfloat16"):
        blackwell_scales(quantize(normal(8, 128), "int4"))
    with pytest.raises(ValueError, match="x has values of float8_e4m3fn"):
        blackwell_scales(quantize(normal(8, 128)))


def exact(x, w):
    """What both stand for, multiplied in float64."""
    quantized = quantize(jnp.atleast_2d(x), "nvfp4")
    return np.float64(quantized.dequantize()) @ np.float64(w.dequantize()).T


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("packed", [False, True])
def test_product(lead, dtype, packed):
    x, w = normal(*lead, K, dtype=dtype), quantize(normal(N, K, seed=2), "nvfp4")
    weight = pack_weight(w) if packed else w
    got = quantized_matmul(x, weight, activation_format="nvfp4")
    assert (got.shape, got.dtype) == ((*lead, N), dtype)
    wanted = exact(x, w).reshape(*lead, N)
    limit = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(np.float64(got), wanted, rtol=limit, atol=1e-4)


def test_gradient():
    """That of x without."""
    x, w = normal(5, K), pack_weight(quantize(normal(N, K, seed=2), "nvfp4"))
    dy = normal(5, N, seed=3)
    pullbacks = [
        jax.vjp(lambda x, f=f: quantized_matmul(x, w, activation_format=f), x)[1]
        for f in ("nvfp4", None)
    ]
    np.testing.assert_array_equal(*(pullback(dy)[0] for pullback in pullbacks))


@pytest.mark.parametrize("packed", [False, True])
def test_blackwell_takes_both_as_they_are(monkeypatch, packed):
    """By a stand-in for the product, which cuDNN has on these GPUs."""
    calls = []

    def scaled_matmul(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type):
        calls.append([a.dtype.name for a in (lhs, rhs, lhs_scales, rhs_scales)])
        lhs, rhs = (
            a.astype(jnp.float32) * jnp.repeat(s.astype(jnp.float32), 16, -1)
            for a, s in ((lhs, lhs_scales), (rhs, rhs_scales))
        )
        out = jnp.einsum("bmk,bnk->bmn", lhs, rhs, precision="highest")
        return out.astype(preferred_element_type)

    monkeypatch.setattr(_dispatch, "has_blackwell", lambda: True)
    monkeypatch.setattr(module.jax.nn, "scaled_matmul", scaled_matmul)
    x, w = normal(2, 3, K, dtype="bfloat16"), quantize(normal(N, K, seed=2), "nvfp4")
    weight = pack_weight(w) if packed else w
    config = module.Config(np.dtype("float32"), x.dtype, False, True, "nvfp4")

    def run(x, weight):
        return module._of_nvfp4(config, x, weight)

    wanted = exact(x, w).reshape(2, 3, N)
    np.testing.assert_allclose(jax.jit(run)(x, weight), wanted, rtol=1e-5, atol=1e-4)
    # That was a CPU's, but both have been traced; and by the stand-in:
    assert calls == [["float4_e2m1fn"] * 2 + ["float8_e4m3fn"] * 2]
    got = module._native(quantize(x, "nvfp4"), weight)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_errors():
    x, w = normal(5, K), quantize(normal(N, K), "mxfp4")
    with pytest.raises(ValueError, match="activation_format is 'int8', wanted None, 'fp8' or "):
        quantized_matmul(x, w, activation_format="int8")
    for weight in (w, pack_weight(w)):
        with pytest.raises(ValueError, match="'nvfp4', wanted None or 'fp8' for a w of"):
            quantized_matmul(x, weight, activation_format="nvfp4")
