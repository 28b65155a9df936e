"""jaxkern.nnx.mlp.Fp8MLP against flax's own layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fp8 import RECIPES, assert_near

from jaxkern.nnx.mlp import Fp8MLP
from jaxkern.ops.fp8_mlp import fp8_mlp
from jaxkern.testing import random_normal, relative_error

K, F = 48, 80
LIMIT = 0.15  # of three products, one after the other


class Flax(nnx.Module):
    """The layer as one writes it with flax."""

    def __init__(self, dtype, param_dtype, rngs):
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = nnx.RMSNorm(K, **options)
        self.gate, self.up = (nnx.Linear(K, F, use_bias=False, **options) for _ in range(2))
        self.down = nnx.Linear(F, K, use_bias=False, **options)

    def __call__(self, x):
        z = self.norm(x)
        return self.down(nnx.silu(self.gate(z)) * self.up(z))


def inputs(dtype="bfloat16"):
    return random_normal(1, (2, 8, K), dtype=dtype)[0]


def gradients(layer, x):
    def loss(layer, x):
        out = layer(x).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    return nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, x)


@functools.cache
def of_flax(dtype, param_dtype):
    """The layer, its output and its gradients."""
    layer = Flax(dtype, jnp.dtype(param_dtype), nnx.Rngs(0))
    return layer, layer(inputs()), gradients(layer, inputs())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), (None, "float32")]
)
def test_a_checkpoint_of_flax_s_layers(recipe, dtype, param_dtype):
    theirs, wanted, wanted_gradients = of_flax(dtype, param_dtype)
    options = {"dtype": dtype, "param_dtype": jnp.dtype(param_dtype), "rngs": nnx.Rngs(1)}
    ours = Fp8MLP(K, F, recipe=recipe, **options)
    nnx.update(ours, nnx.state(theirs))
    x = inputs()
    got = nnx.jit(ours)(x)
    assert relative_error(got, wanted) > 0
    assert_near(got, wanted, LIMIT)
    assert_near(gradients(ours, x), wanted_gradients, LIMIT)


def test_options_reach_the_products():
    x = inputs("float32")
    given = {"gradient_format": jnp.float8_e4m3fn, "recipe": "block", "implementation": ["xla"]}
    layer = Fp8MLP(K, F, epsilon=1.0, **given, rngs=nnx.Rngs(0))
    kernels = [part.kernel[...] for part in (layer.gate, layer.up, layer.down)]

    def plain(x, *kernels):
        return fp8_mlp(x, layer.norm.scale[...], *kernels, epsilon=1.0, **given)

    y, pull = jax.vjp(plain, x, *kernels)
    np.testing.assert_array_equal(nnx.jit(layer)(x), y)
    got = jax.vjp(lambda x: layer(x), x)[1](y)[0]
    assert relative_error(got, pull(y)[0]) < 1e-5


def test_without_the_norm():
    layer = Fp8MLP(K, F, use_norm=False, rngs=nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(layer))) == {"gate", "up", "down"}
    x = inputs("float32")
    kernels = [part.kernel[...] for part in (layer.gate, layer.up, layer.down)]
    np.testing.assert_array_equal(layer(x), fp8_mlp(x, None, *kernels))
