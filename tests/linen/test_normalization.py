"""jaxkern.linen.RMSNorm against flax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxkern.linen

SHAPE = (2, 5, 24)


def random(dtype=jnp.float32):
    return (5 * jax.random.normal(jax.random.key(3), SHAPE)).astype(dtype)


def results(layer, variables, x, **call):
    def run(variables, x):
        def loss(variables, x):
            out = layer.apply(variables, x, **call)
            weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
        return out, grads

    return jax.tree.leaves(jax.jit(run)(variables, x))


def assert_same(x, options, **call):
    options = {"scale_init": nn.initializers.normal(1.0), **options}
    theirs, ours = nn.RMSNorm(**options), jaxkern.linen.RMSNorm(**options)
    variables = theirs.init(jax.random.key(0), x)
    mine = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(mine) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    got, want = (results(layer, variables, x, **call) for layer in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        eps = 1e-5 if b.dtype == jnp.float32 else 2 * float(jnp.finfo(b.dtype).eps)
        eps = max(eps, 2 * float(jnp.finfo(options.get("dtype") or x.dtype).eps))
        b = np.float64(b)
        np.testing.assert_allclose(np.float64(a), b, atol=eps * max(1, np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(x_dtype, dtype, param_dtype):
    assert_same(random(x_dtype), {"dtype": dtype, "param_dtype": param_dtype})


@pytest.mark.parametrize(
    "options",
    [
        {"use_scale": False},
        {"epsilon": 0.5},
        {"reduction_axes": (1, 2)},
        {"reduction_axes": 1, "feature_axes": 1},
        {"feature_axes": (1, 2)},
        {"force_float32_reductions": False},
    ],
    ids=str,
)
def test_options(options):
    assert_same(random(), options)


def test_a_mask_counts_some_elements():
    assert_same(random(), {}, mask=np.random.default_rng(0).random(SHAPE) < 0.5)


def test_an_axis_name_averages_over_devices():
    x = random()
    theirs, ours = (library.RMSNorm(axis_name="i") for library in (nn, jaxkern.linen))
    variables = nn.RMSNorm().init(jax.random.key(0), x[0])
    want, got = (
        jax.vmap(lambda x, layer=layer: layer.apply(variables, x), axis_name="i")(x)
        for layer in (theirs, ours)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not np.allclose(got, nn.RMSNorm().apply(variables, x), atol=1e-2)


def test_the_kernel_runs(kernels):
    layer, x = jaxkern.linen.RMSNorm(dtype=jnp.bfloat16), random()
    variables = layer.init(jax.random.key(0), x)
    traced = jax.jit(layer.apply).trace(variables, x)
    assert "jaxkern.rms_norm_fwd" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"implementation": "metal"}, {}, ValueError, "implementation.*'metal'"),
        (
            {"implementation": "cuda", "reduction_axes": (0, 1)},
            {},
            NotImplementedError,
            r"got reduction_axes=\(0, 1\); wanted the last axis",
        ),
        (
            {"implementation": "cuda", "force_float32_reductions": False},
            {},
            NotImplementedError,
            "force_float32_reductions=False",
        ),
        ({"implementation": ("cuda",)}, {"mask": True}, NotImplementedError, "a mask"),
    ],
)
def test_bad_input(options, call, error, message):
    layer = jaxkern.linen.RMSNorm(**options)
    with pytest.raises(error, match=message):
        layer.init_with_output(jax.random.key(0), random(), **call)
