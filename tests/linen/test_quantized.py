"""jaxkern.linen.QuantizedDense, quantize_variables and quantized_dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxkern import quantize
from jaxkern.linen import QuantizedDense, quantize_variables, quantized_dense
from jaxkern.testing import random_normal, relative_error

K, N = 128, 40
FORMATS = {"nvfp4": {}, "mxfp4": {"search": True}, "int4": {"group_size": 64, "zero_point": True}}
formats = pytest.mark.parametrize("format", FORMATS)


def inputs(dtype="float32"):
    return random_normal(1, (2, 3, K), dtype=dtype)[0]


def dense(**options):
    layer = nn.Dense(N, bias_init=nn.initializers.normal(1.0), **options)
    return layer, layer.init(jax.random.key(0), inputs())


@formats
@pytest.mark.parametrize("use_bias", [True, False])
def test_result(format, use_bias):
    layer, variables = dense(use_bias=use_bias)
    kernel = variables["params"]["kernel"]
    w = quantize(kernel.T, format, **FORMATS[format]).dequantize()
    wanted = inputs() @ w.T + (variables["params"]["bias"] if use_bias else 0)
    packed = quantize_variables(variables, {"": {"format": format, **FORMATS[format]}})
    assert set(packed["params"]) == ({"bias"} if use_bias else set())
    quantized = QuantizedDense(N, use_bias=use_bias, format=format)
    for run in (quantized.apply, jax.jit(quantized.apply)):
        np.testing.assert_allclose(run(packed, inputs()), wanted, rtol=1e-5, atol=1e-5)
    with nn.intercept_methods(quantized_dense()):
        np.testing.assert_allclose(layer.apply(packed, inputs()), wanted, rtol=1e-5, atol=1e-5)
    assert relative_error(quantized.apply(packed, inputs()), layer.apply(variables, inputs())) < 0.2


@formats
def test_init(format):
    """Quantises what the kernel's initializer gives."""
    layer = QuantizedDense(N, format=format, options=FORMATS[format])
    variables = layer.init(jax.random.key(3), inputs())
    assert set(variables["params"]) == {"bias"}
    weight = variables["quantized"]["weight"]
    assert (weight.shape, weight.format) == ((N, K), format)
    w = weight.dequantize()
    assert 0.5 < float(jnp.std(w)) * K**0.5 < 2
    np.testing.assert_allclose(
        layer.apply(variables, inputs()), inputs() @ w.T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("input_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_dtypes(dtype, param_dtype, input_dtype, use_bias):
    options = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": use_bias}
    layer, variables = dense(**options)
    x, packed = inputs(input_dtype), quantize_variables(variables, {"": "nvfp4"})
    wanted = layer.apply(variables, x).dtype
    assert QuantizedDense(N, **options).apply(packed, x).dtype == wanted
    with nn.intercept_methods(quantized_dense()):
        assert layer.apply(packed, x).dtype == wanted


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(K, name=f"down_{i}")(nn.silu(nn.Dense(64, name=f"up_{i}")(x)))
        return nn.Dense(8, name="head", use_bias=False)(x)


def test_model():
    """Layers by their paths; gradients reach the biases and the layers that are left."""
    x, model = inputs(), Model()
    variables = model.init(jax.random.key(0), x)
    rules = {"up_0": None, "(up|down)_.": "mxfp4", "head": {"format": "int4", "group_size": 32}}
    packed = quantize_variables(variables, rules)
    assert set(packed["quantized"]) == {"up_1", "down_0", "down_1", "head"}
    assert set(packed["params"]) == {"up_0", "up_1", "down_0", "down_1"}
    assert "kernel" in packed["params"]["up_0"] and "kernel" not in packed["params"]["up_1"]

    def loss(params):
        with nn.intercept_methods(quantized_dense()):
            return jnp.square(model.apply({**packed, "params": params}, x)).sum()

    with nn.intercept_methods(quantized_dense()):
        got = model.apply(packed, x)
    assert 0 < relative_error(got, model.apply(variables, x)) < 0.3
    gradients = jax.jit(jax.grad(loss))(packed["params"])
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


def test_errors():
    x, model = inputs(), Model()
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="rules 'tail' match none of the linear layers .*up_0"):
        quantize_variables(variables, {"tail": "nvfp4"})
    with pytest.raises(ValueError, match="down_0: x has 64 columns, wanted a multiple of 128"):
        quantize_variables(variables, {"down_0": {"format": "int4", "group_size": 128}})
    layer = QuantizedDense(N, precision="highest")
    with pytest.raises(ValueError, match="precision='highest'"):
        layer.init(jax.random.key(0), x)
