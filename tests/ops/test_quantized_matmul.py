"""quantized_matmul, beside float64 products of what the weight stands for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_bit import FORMATS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import pack_weight, quantize, quantized_matmul

formats = pytest.mark.parametrize("name", FORMATS)
N, K = 24, 128


def weight(name, shape=(N, K), seed=0):
    w = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return quantize(w, name.split()[0], **FORMATS[name])


def normal(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_product(name, dtype, lead):
    x, w = normal(*lead, K, dtype=dtype), weight(name)
    exact = float64(w.dequantize())
    wanted = float64(x) @ exact.T
    got = quantized_matmul(x, w)
    assert (got.shape, got.dtype) == ((*lead, N), dtype)
    limit = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(float64(got), wanted, rtol=limit, atol=1e-4)
    single = quantized_matmul(x, w, preferred_element_type=jnp.float32)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, wanted, rtol=1e-5, atol=1e-4)


@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient(name, dtype):
    """Of x alone, of which the weight is the Jacobian."""
    x, w, dy = normal(5, K, dtype=dtype), weight(name), normal(5, N, seed=2)
    y, pullback = jax.vjp(functools.partial(quantized_matmul, w=w), x)
    (dx,) = pullback(dy.astype(y.dtype))
    assert (dx.shape, dx.dtype) == (x.shape, dtype)
    wanted = float64(dy.astype(y.dtype)) @ float64(w.dequantize())
    np.testing.assert_allclose(float64(dx), wanted, rtol=2**-8, atol=1e-4)


@formats
def test_packed(name):
    """The same weight in another order."""
    x, w = normal(5, K, dtype="bfloat16"), weight(name)
    packed = pack_weight(w)
    np.testing.assert_array_equal(
        float64(quantized_matmul(x, packed)), float64(quantized_matmul(x, w))
    )
    of_packed, wanted = (
        jax.grad(lambda x, w=w: quantized_matmul(x, w).astype(jnp.float32).sum())(x)
        for w in (packed, w)
    )
    np.testing.assert_array_equal(float64(of_packed), float64(wanted))


def test_what_is_kept_for_the_gradient():
    """Four bits of the weight, not what they stand for."""
    x, w = normal(4, K, dtype="bfloat16"), weight("nvfp4")
    _, pullback = jax.vjp(lambda x: quantized_matmul(x, w), x)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32)
    assert kept < N * K / 2


@formats
def test_transforms(name):
    x, w = normal(3, 5, K), weight(name)
    wanted = quantized_matmul(x, w)
    for run in (jax.vmap(quantized_matmul, (0, None)), jax.jit(quantized_matmul)):
        np.testing.assert_allclose(run(x, w), wanted, rtol=1e-5, atol=1e-5)
    many = jax.tree.map(lambda *a: jnp.stack(a), *(weight(name, seed=i) for i in range(3)))
    got = jax.vmap(quantized_matmul)(x, many)
    for i in range(3):
        np.testing.assert_allclose(
            got[i], quantized_matmul(x[i], weight(name, seed=i)), rtol=1e-5, atol=1e-5
        )


@formats
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_rows_of_the_weight_stay_where_they_are(name, kind, packed):
    mesh = jax.make_mesh((8,), ("x",), (kind,), devices=jax.devices("cpu"))
    x, w = normal(4, K), weight(name, (512, K))
    w = pack_weight(w) if packed else w

    def put(a):
        return jax.device_put(a, NamedSharding(mesh, P("x" if a.shape[0] > 1 else None)))

    with jax.set_mesh(mesh):
        sharded = jax.tree.map(put, w)
        text = jax.jit(quantized_matmul).lower(x, sharded).compile().as_text()
        got = jax.jit(quantized_matmul)(x, sharded)
    assert not [c for c in ("all-gather", "all-reduce") if c in text]
    assert got.sharding.spec[-1] == "x"
    np.testing.assert_allclose(got, quantized_matmul(x, w), rtol=1e-5, atol=1e-5)


def test_errors():
    x, w, integers = normal(5, K), weight("nvfp4"), weight("int4 with zero points")
    change, packed = dataclasses.replace, pack_weight(w)
    for wrong, message in (
        (w.values, "w is a .*, wanted a QuantizedArray or a PackedWeight"),
        (quantize(normal(N, K)), "w.values has dtype float8_e4m3fn, wanted float4_e2m1fn or int4"),
        (change(w, scale=w.scale[:, 1:]), r"w.scale has shape \(24, 7\), wanted \(24, 8\)"),
        (change(w, scale=w.scale[1:]), r"w.scale has shape \(23, 8\), wanted \(24, 8\)"),
        (change(w, scale=w.scale.astype(jnp.float32)), "w.scale has dtype float32, wanted float8"),
        (change(w, tensor_scale=None), "w.tensor_scale is None, wanted one"),
        (change(w, tensor_scale=w.tensor_scale[0]), r"w.tensor_scale is float32\[1\], wanted"),
        (change(w, zero_point=integers.zero_point), "w.zero_point is given, wanted None"),
        (change(integers, scale=integers.scale[:, :1].repeat(3, 1)), r"wanted \(24, 1 or 2 or 4\)"),
        (change(integers, scale=w.scale), "w.scale has dtype float8_e4m3fn, wanted bfloat16"),
        (change(integers, zero_point=integers.zero_point[1:]), r"w.zero_point is int4\[23, 2\]"),
        (change(integers, tensor_scale=w.tensor_scale), "w.tensor_scale is given, wanted None"),
        (weight("nvfp4", (2, N, K)), r"w has shape \(2, 24, 128\), wanted \(N, K\)"),
        (
            change(packed, data=packed.data[..., 1:]),
            r"w.data is uint32\[2, 1, 287\], wanted uint32\[2, 1, 288\]",
        ),
        (change(packed, data=packed.data.view(jnp.int32)), "w.data is int32"),
        (change(packed, row_scale=packed.row_scale[1:]), r"w.row_scale is float32\[31\], wanted"),
        (change(packed, tensor_scale=packed.row_scale), r"w.tensor_scale is float32\[32\], wanted"),
        (change(packed, rows=33), r"wanted uint32\[3, 1, 288\]"),
    ):
        with pytest.raises(ValueError, match=message):
            quantized_matmul(x, wrong)
    with pytest.raises(ValueError, match=r"x has shape \(5, 64\), wanted \(..., 128\)"):
        quantized_matmul(x[:, :64], w)
    with pytest.raises(ValueError, match="x has dtype int32"):
        quantized_matmul(jnp.ones((5, K), jnp.int32), w)
    with pytest.raises(ValueError, match="preferred_element_type is 'int8'"):
        quantized_matmul(x, w, preferred_element_type="int8")
    with pytest.raises(NotImplementedError, match="quantized_matmul with implementation 'cuda'"):
        quantized_matmul(x, w, implementation="cuda")
