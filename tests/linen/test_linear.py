"""jaxkern.linen.linear against flax's own Dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from fp8 import RECIPES, assert_near

from jaxkern import fp8_matmul
from jaxkern.linen import Fp8Dense, Fp8DotGeneral
from jaxkern.testing import FP8_PRODUCT_LIMITS, random_normal, relative_error

K, N = 48, 40
LIMIT = max(FP8_PRODUCT_LIMITS.values())

recipes = pytest.mark.parametrize("recipe", RECIPES)


def injected(recipe="row", **options):
    return nn.Dense(N, dot_general_cls=functools.partial(Fp8DotGeneral, recipe=recipe), **options)


def dense(recipe="row", **options):
    return Fp8Dense(N, recipe=recipe, **options)


both = pytest.mark.parametrize("layer", [injected, dense])


def random(dtype="bfloat16"):
    return random_normal(1, (2, 8, K), dtype=dtype)[0]


def results(layer, variables, x):
    def run(variables, x):
        def loss(variables, x):
            out = layer.apply(variables, x)
            weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return (out.astype(jnp.float32) * weight).sum(), out

        grads, out = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
        return out, grads

    return jax.jit(run)(variables, x)


@functools.cache
def of_flax(param_dtype, dtype):
    """Options of flax's layer, its parameters and its results."""
    options = {"param_dtype": jnp.dtype(param_dtype), "dtype": dtype}
    options["bias_init"] = nn.initializers.normal(1.0)
    layer = nn.Dense(N, **options)
    variables = layer.init(jax.random.key(0), random())
    return options, variables, results(layer, variables, random())


@both
@recipes
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_checkpoint_of_flax_s_layer(layer, recipe, param_dtype, dtype):
    options, variables, wanted = of_flax(param_dtype, dtype)
    x, ours = random(), layer(recipe, **options)
    mine = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(mine) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    got = results(ours, variables, x)
    assert_near(got, wanted, LIMIT)
    assert relative_error(got[0], wanted[0]) > 0


@both
@recipes
def test_is_the_product(layer, recipe):
    x, ours = random(), layer(recipe, use_bias=False, param_dtype=jnp.bfloat16)
    variables = ours.init(jax.random.key(0), x)
    wanted = fp8_matmul(x, variables["params"]["kernel"], recipe=recipe)
    np.testing.assert_array_equal(ours.apply(variables, x), wanted)


def test_gradients_of_a_float32_kernel_are_not_rounded():
    """Which flax's cast to the layer's dtype does."""
    x = random()
    variables = nn.Dense(N).init(jax.random.key(0), x)

    def rounds(layer):
        grads = results(layer(dtype=jnp.bfloat16), variables, x)[1][0]["params"]["kernel"]
        grads = np.asarray(grads)
        return (grads == grads.astype(jnp.bfloat16).astype(np.float32)).all()

    assert rounds(injected) and not rounds(dense)


def test_promote_dtype_is_called():
    def promote(x, kernel, bias, *, dtype):
        return x.astype(dtype), (2 * kernel).astype(dtype), bias

    x, layer = random(), Fp8Dense(N, promote_dtype=promote, dtype=jnp.float32, use_bias=False)
    variables = layer.init(jax.random.key(0), x)
    wanted = fp8_matmul(x.astype(jnp.float32), 2 * variables["params"]["kernel"])
    np.testing.assert_array_equal(layer.apply(variables, x), wanted)


def test_options_reach_the_product():
    x = random()
    variables = nn.Dense(N).init(jax.random.key(0), x)
    options = {"gradient_format": jnp.float8_e4m3fn, "implementation": ["xla"]}
    through = nn.Dense(N, dot_general_cls=functools.partial(Fp8DotGeneral, **options))
    got, same, other = (
        np.asarray(results(layer, variables, x)[1][0]["params"]["kernel"])
        for layer in (Fp8Dense(N, **options), through, Fp8Dense(N))
    )
    assert relative_error(got, same) < LIMIT
    assert relative_error(got, other) > 0.01 and relative_error(same, other) > 0.01


@both
def test_the_kernel_runs(kernels, layer):
    x, ours = random(), layer(dtype=jnp.bfloat16)
    variables = ours.init(jax.random.key(0), x)
    traced = jax.jit(ours.apply).trace(variables, x)
    assert "jaxkern.scaled_matmul" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shapes", "dimension_numbers"),
    [
        (((4, 8), (6, 8)), (((1,), (1,)), ((), ()))),
        (((8, 4), (8, 6)), (((0,), (0,)), ((), ()))),
        (((4, 8), (8, 2, 3)), (((1,), (0,)), ((), ()))),
        (((2, 4, 8), (2, 8, 6)), (((2,), (1,)), ((0,), (0,)))),
        (((4, 8), (4, 8)), (((0, 1), (0, 1)), ((), ()))),
    ],
)
def test_other_products_are_refused(shapes, dimension_numbers):
    operands = [jnp.zeros(shape) for shape in shapes]
    with pytest.raises(NotImplementedError, match="dimension_numbers .* wanted"):
        Fp8DotGeneral()(*operands, dimension_numbers)


def test_dense_general_with_one_axis_is_a_dense_layer():
    x = random()
    layer = nn.DenseGeneral(N, use_bias=False, dot_general_cls=Fp8DotGeneral)
    variables = layer.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    wanted = fp8_matmul(x, kernel, preferred_element_type=jnp.float32)
    assert relative_error(layer.apply(variables, x), wanted) < 1e-2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (dense(precision="highest"), "Fp8Dense multiplies in FP8, got precision='highest'; wanted"),
        (dense(dot_general=max), "Fp8Dense multiplies in FP8, got dot_general="),
        (dense(dot_general_cls=Fp8DotGeneral), "Fp8Dense multiplies in FP8, got dot_general="),
        (injected(precision="highest"), "fp8_dot_general multiplies in FP8, got precision="),
        (dense("blocks"), "recipe is 'blocks', wanted one of"),
        (injected("blocks"), "recipe is 'blocks', wanted one of"),
        (dense(implementation="metal"), "implementation is 'metal'"),
    ],
)
def test_bad_input(layer, message):
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), random())
