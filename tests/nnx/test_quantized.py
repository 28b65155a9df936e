"""jaxkern.nnx.QuantizedLinear and quantize_model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkern import quantize
from jaxkern.models import Config, Transformer
from jaxkern.nnx import QuantizedLinear, QuantizedParam, quantize_model
from jaxkern.testing import random_normal, relative_error

K, N = 128, 40
FORMATS = {"nvfp4": {}, "mxfp4": {"search": True}, "int4": {"group_size": 64, "zero_point": True}}
formats = pytest.mark.parametrize("format", FORMATS)


def linear(**options):
    options = {"bias_init": nnx.initializers.normal(1.0), **options}
    return nnx.Linear(K, N, **options, rngs=nnx.Rngs(0))


def inputs(dtype="float32"):
    return random_normal(1, (2, 3, K), dtype=dtype)[0]


@formats
@pytest.mark.parametrize("use_bias", [True, False])
def test_result(format, use_bias):
    layer = linear(use_bias=use_bias)
    quantized = QuantizedLinear.of(layer, format, **FORMATS[format])
    w = quantize(layer.kernel[...].T, format, **FORMATS[format]).dequantize()
    x = inputs()
    wanted = x @ w.T + (layer.bias[...] if use_bias else 0)
    for run in (QuantizedLinear.__call__, nnx.jit(QuantizedLinear.__call__)):
        np.testing.assert_allclose(run(quantized, x), wanted, rtol=1e-5, atol=1e-5)
    assert relative_error(quantized(x), layer(x)) < 0.2
    assert (quantized.in_features, quantized.out_features) == (K, N)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("input_dtype", ["bfloat16", "float32"])
def test_dtypes(dtype, param_dtype, input_dtype):
    layer = linear(dtype=dtype, param_dtype=param_dtype)
    quantized, x = QuantizedLinear.of(layer), inputs(input_dtype)
    assert quantized(x).dtype == layer(x).dtype
    assert quantized(x, preferred_element_type=jnp.float32).dtype == jnp.float32


def test_variables():
    """The weight is no parameter, the bias is, and a state goes into a layer of its shape."""
    layer = QuantizedLinear.of(linear())
    parameters = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    assert [path for path, _ in parameters] == [("bias",)]
    constants = nnx.to_flat_state(nnx.state(layer, QuantizedParam))
    assert [path for path, _ in constants] == [("data",), ("row_scale",), ("tensor_scale",)]
    other = QuantizedLinear.of(nnx.Linear(K, N, rngs=nnx.Rngs(7)))
    assert relative_error(other(inputs()), layer(inputs())) > 0.5
    nnx.update(other, nnx.state(layer))
    np.testing.assert_array_equal(other(inputs()), layer(inputs()))


def test_gradients():
    """Of the inputs and of the bias."""
    layer, x = QuantizedLinear.of(linear()), inputs()
    w = layer.weight.dequantize()
    np.testing.assert_allclose(
        jax.grad(lambda x: layer(x).sum())(x), jnp.broadcast_to(w.sum(0), x.shape), atol=1e-5
    )
    gradient = nnx.grad(lambda layer: layer(x).sum())(layer)
    np.testing.assert_allclose(gradient["bias"][...], jnp.full(N, 6.0), rtol=1e-6)


CONFIG = Config(
    vocabulary=32, layers=2, width=64, heads=2, kv_heads=1, head_dim=32, hidden=64, context=16
)


def model():
    return Transformer(CONFIG, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def paths(model, kind):
    return {"/".join(map(str, path)) for path, x in nnx.iter_modules(model) if type(x) is kind}


def test_model():
    original, tokens = model(), jnp.arange(16)[None]
    before = original(tokens)
    rules = {
        "blocks/0/qkv": None,
        "blocks/.*/(qkv|out)": "mxfp4",
        "blocks/1/.*": {"format": "int4", "group_size": 32},
    }
    changed = quantize_model(original, rules)
    assert paths(changed, QuantizedLinear) == {
        "blocks/0/out",
        "blocks/1/qkv",
        "blocks/1/out",
        "blocks/1/gate_up",
        "blocks/1/down",
    }
    assert changed.blocks[1].qkv.format == "mxfp4" and changed.blocks[1].down.format == "int4"
    assert not paths(original, QuantizedLinear)
    np.testing.assert_array_equal(original(tokens), before)
    assert 0 < relative_error(changed(tokens), before) < 0.3


def test_head():
    changed = quantize_model(model(), {"head": "nvfp4"})
    assert isinstance(changed.head, QuantizedLinear)
    logits = changed(jnp.arange(16)[None])
    assert logits.dtype == jnp.float32
    assert relative_error(logits, model()(jnp.arange(16)[None])) < 0.2


def test_adapters_learn():
    """Low-rank ones beside frozen weights of four bits."""

    class Adapted(nnx.Module):
        def __init__(self, base, rngs):
            self.lora = nnx.LoRA(K, 4, N, base_module=base, rngs=rngs)

        def __call__(self, x):
            return self.lora(x)

    layer, target = linear(), nnx.Linear(K, N, rngs=nnx.Rngs(3))
    adapted = Adapted(QuantizedLinear.of(layer), nnx.Rngs(1))
    frozen = jax.tree.map(jnp.copy, nnx.state(adapted, QuantizedParam))
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)
    x = random_normal(1, (64, K), dtype="float32")[0]

    def loss(adapted):
        return jnp.square(adapted(x) - target(x)).mean()

    @nnx.jit
    def step(adapted, optimizer):
        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
        optimizer.update(adapted, gradient)
        return value

    losses = [float(step(adapted, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    after = nnx.state(adapted, QuantizedParam)
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_errors():
    change = functools.partial(quantize_model, model())
    with pytest.raises(ValueError, match="rules 'blocks/9/.*' match none of the linear layers"):
        change({"blocks/9/.*": "nvfp4"})
    with pytest.raises(ValueError, match="rules 'blocks/1/qkv' match none"):
        change({".*": "nvfp4", "blocks/1/qkv": "int4"})
    with pytest.raises(ValueError, match="x has 64 columns, wanted a multiple of 128 for 'int4'"):
        change({".*": "int4"})
    with pytest.raises(ValueError, match="blocks/./[a-z_]*: format is 'fp3'"):
        change({".*": "fp3"})
