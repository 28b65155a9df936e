"""jaxkern.nnx.linear.Fp8Linear against flax's own layer."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fp8 import RECIPES, assert_near
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkern import fp8_matmul
from jaxkern.nnx import Fp8Linear
from jaxkern.testing import FP8_PRODUCT_LIMITS, random_normal, relative_error

K, N = 48, 40
LIMIT = max(FP8_PRODUCT_LIMITS.values())

recipes = pytest.mark.parametrize("recipe", RECIPES)


def copied(recipe="row", **options):
    """flax's layer, and ours with its parameters."""
    options = {"bias_init": nnx.initializers.normal(1.0), **options}
    theirs = nnx.Linear(K, N, **options, rngs=nnx.Rngs(0))
    ours = Fp8Linear(K, N, recipe=recipe, **options, rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(theirs))
    return theirs, ours


def random(dtype="bfloat16"):
    return random_normal(1, (2, 8, K), dtype=dtype)[0]


def gradients(layer, x):
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x):
        def loss(state, x):
            out = nnx.merge(graph, state)(x).astype(jnp.float32)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

        return jax.grad(loss, (0, 1))(state, x)

    return run(state, x)


@recipes
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_checkpoint_of_flax_s_layer(recipe, param_dtype, dtype):
    theirs, ours = copied(recipe, param_dtype=jnp.dtype(param_dtype), dtype=dtype)
    x = random()
    got, wanted = nnx.jit(ours)(x), theirs(x)
    assert relative_error(got, wanted) > 0
    assert_near(got, wanted, LIMIT)
    assert_near(*(gradients(layer, x) for layer in (ours, theirs)), LIMIT)


@recipes
def test_is_the_product_and_the_bias(recipe):
    _, ours = copied(recipe, dtype=jnp.bfloat16)
    x = random()
    wanted = fp8_matmul(x, ours.kernel[...], recipe=recipe) + ours.bias[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(ours(x), wanted)


def test_gradients_of_a_float32_kernel_are_not_rounded():
    """Which flax's cast to the layer's dtype does."""
    theirs, ours = copied(dtype=jnp.bfloat16)

    def rounds(layer):
        grads = np.asarray(gradients(layer, random())[0].kernel[...])
        return (grads == grads.astype(jnp.bfloat16).astype(np.float32)).all()

    assert rounds(theirs) and not rounds(ours)


def test_options_reach_the_product():
    x = random()
    options = {"gradient_format": jnp.float8_e4m3fn, "implementation": ["xla"]}
    plain, other = (Fp8Linear(K, N, **kwargs, rngs=nnx.Rngs(0)) for kwargs in ({}, options))
    assert nnx.jit(other)(x).shape == (2, 8, N)
    got, wanted = (np.asarray(gradients(layer, x)[0].kernel[...]) for layer in (other, plain))
    assert not np.array_equal(got, wanted)
    half = Fp8Linear(K, N, preferred_element_type=jnp.float16, use_bias=False, rngs=nnx.Rngs(0))
    assert half(x).dtype == jnp.float16


def test_promote_dtype_is_called():
    def promote(arrays, *, dtype):
        x, kernel, bias = arrays
        return x.astype(dtype), (2 * kernel).astype(dtype), bias.astype(dtype)

    x = random()
    layer = Fp8Linear(K, N, promote_dtype=promote, dtype=jnp.float32, rngs=nnx.Rngs(0))
    wanted = fp8_matmul(x.astype(jnp.float32), 2 * layer.kernel[...])
    np.testing.assert_array_equal(layer(x), wanted)


def test_constructor_has_flax_s_names():
    parameters = inspect.signature(nnx.Linear.__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    ours = Fp8Linear(K, N, rngs=nnx.Rngs(0), **defaults)
    theirs = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    added = {"recipe", "gradient_format", "fast_accumulation", "implementation"}
    assert vars(ours).keys() - vars(theirs).keys() == added
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))


def test_out_sharding():
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Explicit,), devices=jax.devices("cpu")[:4])
    _, ours = copied()
    wanted = ours(random())
    replicated, spec = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), (None, None, "model")))
    nnx.update(ours, jax.device_put(nnx.state(ours), replicated))
    with jax.set_mesh(mesh):
        got = ours(jax.device_put(random(), replicated), out_sharding=spec)
    assert got.sharding.is_equivalent_to(spec, 3)
    np.testing.assert_array_equal(got, wanted)


def test_the_kernel_runs(kernels):
    _, ours = copied(dtype=jnp.bfloat16)
    traced = jax.jit(lambda x: ours(x)).trace(random())
    assert "jaxkern.scaled_matmul" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "highest"}, "Fp8Linear multiplies in FP8, got precision='highest'; wanted"),
        ({"dot_general": max}, "Fp8Linear multiplies in FP8, got dot_general=<built-in"),
        ({"recipe": "blocks"}, "recipe is 'blocks', wanted one of"),
        ({"fast_accumulation": True, "recipe": "block"}, "fast_accumulation is True, wanted False"),
        ({"implementation": "metal"}, "implementation is 'metal'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Fp8Linear(K, N, **options, rngs=nnx.Rngs(0))(random())
