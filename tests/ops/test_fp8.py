"""fp8_matmul: values and gradients of each recipe, on the path of the kernels and the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import E4M3, E5M2, RECIPES, assert_products, numpy_fp8_products, uneven
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkern import QuantizedWeight, fp8_matmul, quantize_weight
from jaxkern.testing import FP8_PRODUCT_LIMITS, random_normal, relative_error

pytestmark = pytest.mark.usefixtures("kernels")

implementations = pytest.mark.parametrize("implementation", [None, "xla"])
recipes = pytest.mark.parametrize("recipe", RECIPES)
quantized_or_not = pytest.mark.parametrize("quantized", [False, True], ids=["w", "quantized"])

SINGLE = jnp.float32


def products(x, w, dy, quantized_weight=None, **options):
    """y, dx and dw."""
    return _products(x, w, dy, quantized_weight, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=4)
def _products(x, w, dy, quantized_weight, options):
    matmul = functools.partial(fp8_matmul, quantized_weight=quantized_weight, **dict(options))
    y, pull = jax.vjp(matmul, x, w)
    return y, *pull(dy.astype(y.dtype))


def arrays(m, k, n, dtype="float32", seed=1):
    return uneven(seed, m, k, dtype=dtype), uneven(seed + 1, k, n), uneven(seed + 2, m, n)


# --- Values ---------------------------------------------------------------------------------------


@implementations
@recipes
@pytest.mark.parametrize("shape", [(3, 130, 70), (200, 256, 384), (1, 1, 1), (129, 40, 257)])
def test_products_of_what_numpy_quantises(implementation, recipe, shape):
    operands = arrays(*shape)
    got = products(*operands, recipe=recipe, implementation=implementation)
    assert_products(got, numpy_fp8_products(*operands, recipe))


@recipes
@pytest.mark.parametrize("gradient_format", [E4M3, E5M2])
def test_gradient_format(recipe, gradient_format):
    operands = arrays(40, 150, 60)
    got = products(*operands, recipe=recipe, gradient_format=gradient_format)
    assert_products(got, numpy_fp8_products(*operands, recipe, gradient_format))


@settings(max_examples=5, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 300)] * 3), recipe=st.sampled_from(list(RECIPES)))
def test_any_shape(sizes, recipe):
    operands = arrays(*sizes)
    assert_products(products(*operands, recipe=recipe), numpy_fp8_products(*operands, recipe))


@recipes
def test_products_before_quantisation(recipe):
    """Against the matrices themselves, in float64."""
    x, w, dy = random_normal(4, (200, 300), (300, 260), (200, 260), dtype="bfloat16")
    got = products(x, w, dy, recipe=recipe)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    gradient = RECIPES[recipe][2]
    limits = [FP8_PRODUCT_LIMITS[formats] for formats in ((E4M3, E4M3), *[(E4M3, gradient)] * 2)]
    for array, exact, limit in zip(got, (x @ w, dy @ w.T, x.T @ dy), limits, strict=True):
        assert limit / 1.25 < relative_error(array, exact) < limit


@recipes
@quantized_or_not
def test_leading_axes_are_tokens(recipe, quantized):
    x, w, dy = arrays(2 * 3 * 5, 150, 60)
    wanted = numpy_fp8_products(x, w, dy, recipe)
    options = {"quantized_weight": quantize_weight(w, recipe)} if quantized else {}
    y, dx, dw = products(
        x.reshape(2, 3, 5, 150), w, dy.reshape(2, 3, 5, 60), recipe=recipe, **options
    )
    assert (y.shape, dx.shape) == ((2, 3, 5, 60), (2, 3, 5, 150))
    assert_products((y.reshape(30, 60), dx.reshape(30, 150), dw), wanted)


@recipes
def test_constants_of_a_compiled_function(recipe):
    x, w, dy = arrays(40, 48, 40)
    got = jax.jit(lambda: products(x, w, dy, recipe=recipe))()
    assert_products(got, numpy_fp8_products(x, w, dy, recipe))


def test_a_vector():
    x, w, dy = arrays(1, 150, 60)
    y, dx, dw = products(x[0], w, dy[0])
    assert (y.shape, dx.shape) == ((60,), (150,))
    assert_products((y[None], dx[None], dw), numpy_fp8_products(x, w, dy, "row"))


@implementations
@recipes
@pytest.mark.parametrize("shape", [(0, 8, 256), (4, 0, 256), (4, 8, 0)])
def test_empty_axes(implementation, recipe, shape):
    m, k, n = shape
    x, w, dy = jnp.ones((2, m, k)), jnp.ones((k, n)), jnp.ones((2, m, n))
    got = products(x, w, dy, recipe=recipe, implementation=implementation)
    for array, like in zip(got, (dy, x, w), strict=True):
        assert array.shape == like.shape
        assert not array.any()


@recipes
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_not_lost(recipe, bad):
    """It reaches all that its block takes part in, and nothing else."""
    x, w, dy = arrays(8, 32, 16)
    x[3, 5] = bad
    y, dx, dw = (np.isnan(a) for a in products(x, w, dy, recipe=recipe))
    assert not dx.any()
    for lost, row in ((y, 3), (dw, 5)):
        assert lost[row].all()
        assert np.delete(lost, row, axis=0).all() == (recipe == "tensor")
        assert np.delete(lost, row, axis=0).any() == (recipe == "tensor")


@recipes
def test_zeros(recipe):
    """Have products of zero, whatever their scale; a few among others change nothing."""
    x, w, dy = arrays(40, 150, 60)
    y, dx, dw = products(0 * x, w, dy, recipe=recipe)
    assert not y.any() and dx.any() and not dw.any()
    y, dx, dw = products(x, 0 * w, dy, recipe=recipe)
    assert not y.any() and not dx.any() and dw.any()
    x[::3], x[:, ::2] = 0, 0
    assert_products(products(x, w, dy, recipe=recipe), numpy_fp8_products(x, w, dy, recipe))


@recipes
@pytest.mark.parametrize("exponents", [(-118, 100), (100, -118)], ids=str)
def test_very_small_and_very_large_operands(recipe, exponents):
    """At the smallest scale that there is, numbers still have all of their bits."""
    arrays = random_normal(6, (64, 160), (160, 48), (64, 48), dtype="float32")
    powers = np.ldexp(1.0, (*exponents, 0))
    x, w, dy = (np.asarray(a, np.float64) * p for a, p in zip(arrays, powers, strict=True))
    got = products(*(jnp.asarray(a, jnp.float32) for a in (x, w, dy)), recipe=recipe)
    gradient = RECIPES[recipe][2]
    for array, exact, format in zip(
        got, (x @ w, dy @ w.T, x.T @ dy), (E4M3, gradient, gradient), strict=True
    ):
        assert relative_error(array, exact) < FP8_PRODUCT_LIMITS[E4M3, format]


@recipes
def test_what_an_outlier_costs(recipe):
    """Its block, if others are a million times smaller; nothing, if a thousand times."""
    x, w, dy = (
        np.array(a) for a in random_normal(7, (8, 256), (256, 64), (8, 64), dtype="float32")
    )
    w[:128] = 0  # y is of the second block of columns only

    def errors(outlier):
        x[3, 5] = outlier
        y, exact = products(x, w, dy, recipe=recipe)[0], np.float64(x) @ w
        return [relative_error(y[i], exact[i]) for i in (2, 3)]  # of another row, and of its own

    limit = 1.1 * FP8_PRODUCT_LIMITS[E4M3, E4M3]  # a row is not many numbers
    assert max(errors(2.0**10)) < limit
    other, own = errors(2.0**22)
    assert (other < limit) == (recipe != "tensor") and (own < limit) == (recipe == "block")


# --- Dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensor", "block"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("w_dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(recipe, x_dtype, w_dtype):
    x, w, dy = random_normal(5, (24, 40), (40, 16), (24, 16), dtype=x_dtype)
    w = w.astype(w_dtype)
    got = products(x, w, dy, recipe=recipe)
    assert [a.dtype for a in got] == [x_dtype, x_dtype, w_dtype]
    assert_products(got, numpy_fp8_products(x, w, dy, recipe))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_preferred_element_type(dtype):
    x, w, dy = random_normal(6, (24, 40), (40, 16), (24, 16), dtype="bfloat16")
    got = products(x, w, dy, preferred_element_type=dtype)
    assert [a.dtype for a in got] == [dtype, "bfloat16", "bfloat16"]
    assert_products(got, numpy_fp8_products(x, w, dy, "row"))


@recipes
def test_gradients_of_float32_weights_are_not_rounded(recipe):
    """256 + 1 is no bfloat16."""
    x = jnp.zeros((2, 16), "bfloat16").at[:, 0].set(jnp.array([16, 1]))
    w, dy = jnp.ones((16, 8)), jnp.zeros((2, 8), "bfloat16").at[:, 0].set(jnp.array([16, 1]))
    _, _, dw = products(x, w, dy, recipe=recipe)
    assert dw.dtype == SINGLE and dw[0, 0] == 257


# --- Quantised weights ----------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("shape", [(3, 130, 70), (20, 256, 384), (20, 256, 100), (5, 100, 256)])
def test_a_quantised_weight_changes_no_bit(recipe, shape):
    x, w, dy = arrays(*shape)
    wanted = products(x, w, dy, recipe=recipe)
    weight = jax.jit(quantize_weight, static_argnums=1)(w, recipe)
    got = products(x, np.full_like(w, np.nan), dy, recipe=recipe, quantized_weight=weight)
    for array, same in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(array, same)


def test_a_weight_is_quantised_within_the_loss():
    """As accumulation of gradients does: once, and then used in a loop."""
    x, w, dy = arrays(8, 32, 16)

    def loss(w, hoisted):
        weight = quantize_weight(w, "row") if hoisted else None

        def step(total, _):
            return total + (dy * fp8_matmul(x, w, quantized_weight=weight)).sum(), None

        return jax.lax.scan(step, 0.0, None, length=3)[0]

    got, wanted = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(w, h) for h in (True, False))
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])
    assert np.abs(got[1]).max() > 0


def test_a_quantised_weight_has_no_gradient():
    x, w, _ = arrays(8, 32, 16)

    def loss(weight):
        return fp8_matmul(x, w, quantized_weight=weight).sum()

    grads = jax.grad(loss)(quantize_weight(w))
    assert isinstance(grads, QuantizedWeight)
    assert all(not np.asarray(leaf).astype(np.float32).any() for leaf in jax.tree.leaves(grads))


# --- Transforms -----------------------------------------------------------------------------------


def assert_like_examples(got, examples):
    for array, *wanted in zip(got, *examples, strict=True):
        wanted = np.stack(wanted)
        assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


@recipes
@quantized_or_not
@pytest.mark.parametrize("batched", ["x", "w", "dy", "x dy", "x w dy"])
def test_vmap(recipe, quantized, batched):
    """The examples have magnitudes of their own, which one scale for all would lose."""
    many = uneven(1, 3, 6, 130), uneven(2, 3, 130, 10), uneven(3, 3, 6, 10)
    is_batched = [name in batched.split() for name in ("x", "w", "dy")]
    operands = [a if is_it else a[0] for a, is_it in zip(many, is_batched, strict=True)]

    def run(x, w, dy):
        weight = quantize_weight(w, recipe) if quantized else None
        return products(x, w, dy, recipe=recipe, quantized_weight=weight)

    got = jax.vmap(run, [0 if is_it else None for is_it in is_batched])(*operands)
    examples = [
        run(*(a[i] if is_it else a for a, is_it in zip(operands, is_batched, strict=True)))
        for i in range(3)
    ]
    assert_like_examples(got, examples)


@recipes
@pytest.mark.parametrize("outer", [None, 0])
@pytest.mark.parametrize("inner", [None, 0])
def test_vmap_twice(recipe, inner, outer):
    """x over both axes, and w over either, both or none."""
    x, dy = uneven(1, 2, 3, 6, 130), uneven(2, 2, 3, 6, 10)
    batch = tuple(n for n, axis in ((2, outer), (3, inner)) if axis == 0)
    w = uneven(3, *batch, 130, 10)
    run = functools.partial(products, recipe=recipe)
    got = jax.vmap(jax.vmap(run, (0, inner, 0)), (0, outer, 0))(x, w, dy)
    whole = np.broadcast_to(
        np.expand_dims(w, [i for i, axis in enumerate((outer, inner)) if axis is None]),
        (2, 3, 130, 10),
    )
    examples = [run(x[i, j], whole[i, j], dy[i, j]) for i in range(2) for j in range(3)]
    assert_like_examples([a.reshape(6, *a.shape[2:]) for a in got], examples)


def test_several_cotangents_of_one_forward_pass():
    x, w, _ = arrays(6, 130, 10)
    dy = uneven(7, 3, 6, 10)
    _, pull = jax.vjp(fp8_matmul, x, w)
    assert_like_examples(jax.vmap(pull)(dy), [pull(d) for d in dy])


@implementations
def test_second_derivatives_raise(implementation):
    x, w, _ = arrays(4, 16, 8)

    def loss(w):
        return jnp.sin(fp8_matmul(x, w, implementation=implementation)).sum()

    message = "^fp8_matmul: it can be differentiated once, in reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        jax.grad(lambda w: jax.grad(loss)(w).sum())(w)


def mlp(params, x, recipe):
    matmul = jnp.matmul if recipe is None else functools.partial(fp8_matmul, recipe=recipe)
    hidden = jax.nn.gelu(matmul(x, params[0]))
    return matmul(hidden, params[1])


@functools.partial(jax.jit, static_argnums=1)
def fit(x, recipe):
    """Losses of Adam (Kingma and Ba 2015) on a teacher's outputs."""
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = (32, 64), (64, 16)
    teacher, student = (
        [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(pair, shapes, strict=True)]
        for pair in (keys[:2], keys[2:])
    )
    wanted = mlp(teacher, x, None)

    def loss(params):
        return jnp.square(mlp(params, x, recipe) - wanted).mean() / jnp.square(wanted).mean()

    def step(state, i):
        params, mean, square = state
        value, grads = jax.value_and_grad(loss)(params)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, grads)

        def update(p, m, s):
            unbiased = m / (1 - 0.9 ** (i + 1)), s / (1 - 0.99 ** (i + 1))
            return p - 0.01 * unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-8)

        return (jax.tree.map(update, params, mean, square), mean, square), value

    zeros = jax.tree.map(jnp.zeros_like, student)
    return jax.lax.scan(step, (student, zeros, zeros), jnp.arange(200))[1]


@recipes
def test_training_reaches_the_loss_of_float32(recipe):
    """But for the error of the products themselves, which does not vanish."""
    x = random_normal(8, (256, 32), dtype="float32")[0]
    wanted, got = fit(x, None), fit(x, recipe)
    assert wanted[-1] < 0.02 * wanted[0]
    noise = FP8_PRODUCT_LIMITS[E4M3, E4M3]
    assert got[-1] < wanted[-1] + 3 * noise**2
