"""jaxkern.nnx.RMSNorm against flax's own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxkern.nnx
from jaxkern.testing import assert_close_to_reference

SHAPE = (2, 5, 24)


def copied(**options):
    """flax's layer, ours with its scale, and both with float32 arithmetic."""
    options = {"num_features": SHAPE[-1], "scale_init": nnx.initializers.normal(1.0), **options}
    theirs = nnx.RMSNorm(**options, rngs=nnx.Rngs(0))
    ours = jaxkern.nnx.RMSNorm(**options, rngs=nnx.Rngs(1))
    exact = nnx.RMSNorm(**{**options, "dtype": jnp.float32}, rngs=nnx.Rngs(2))
    for copy in (ours, exact):
        nnx.update(copy, nnx.state(theirs))
    return theirs, ours, exact


def results(layer, x, **call):
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x):
        def loss(state, x):
            out = nnx.merge(graph, state)(x, **call)
            weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)
        return out, grads

    return jax.tree.leaves(run(state, x))


def assert_same(layers, x, **call):
    got, want, exact = (results(layer, x, **call) for layer in (layers[1], layers[0], layers[2]))
    assert len(got) == len(want)
    for x, y, z in zip(got, want, exact, strict=True):
        assert x.shape == y.shape
        single = x.dtype == y.dtype == jnp.float32 == layers[1].dtype
        slack = 1e-5 if single else float(jnp.finfo(jnp.bfloat16).eps)
        assert_close_to_reference(x, z, y, atol=slack * max(1, jnp.abs(z).max()))


def random(dtype=jnp.float32, shape=SHAPE):
    return (5 * jax.random.normal(jax.random.key(3), shape)).astype(dtype)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(x_dtype, dtype, param_dtype):
    assert_same(copied(dtype=dtype, param_dtype=param_dtype), random(x_dtype))


def test_integers():
    theirs, ours, _ = copied()
    x = random(jnp.int32)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_scale": False},
        {"epsilon": 0.5},
        {"use_fast_variance": False},
        {"reduction_axes": 2, "feature_axes": (-1,)},
        {"reduction_axes": (1, 2)},
        {"reduction_axes": 1},
        {"num_features": 5, "reduction_axes": 1, "feature_axes": 1},
    ],
    ids=str,
)
def test_options(options):
    assert_same(copied(dtype=jnp.float32, **options), random())


def test_promote_dtype_is_called():
    def promote(arrays, *, dtype):
        x, scale = arrays
        return (x + 1).astype(dtype), (2 * scale).astype(dtype)

    assert_same(copied(dtype=jnp.float32, promote_dtype=promote), random(jnp.bfloat16))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 1, 3, 24)])
def test_shapes(shape):
    theirs, ours, _ = copied()
    x = random(shape=shape)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


def test_a_mask_counts_some_elements():
    mask = np.random.default_rng(0).random(SHAPE) < 0.5
    assert_same(copied(dtype=jnp.float32), random(), mask=mask)


def test_an_axis_name_averages_over_devices():
    theirs, ours, _ = copied(axis_name="i", num_features=3)
    x = random(shape=(4, 5, 3))
    want, got = (jax.vmap(layer, axis_name="i")(x) for layer in (theirs, ours))
    np.testing.assert_allclose(got, want, atol=1e-5)
    _, alone, _ = copied(num_features=3)
    assert not np.allclose(got, alone(x), atol=1e-2)


def test_complex_numbers_take_flax_s_path():
    theirs, ours, _ = copied(use_scale=False)
    x = random() + 1j * random()[::-1]
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


def test_constructor_has_flax_s_names():
    parameters = inspect.signature(nnx.RMSNorm.__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    ours = jaxkern.nnx.RMSNorm(num_features=4, rngs=nnx.Rngs(0), **defaults)
    theirs = nnx.RMSNorm(num_features=4, rngs=nnx.Rngs(0))
    assert vars(ours).keys() - vars(theirs).keys() == {"implementation"}
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))


def test_a_sharded_scale():
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("model"))
    theirs, ours, _ = copied()
    want = theirs(random())
    nnx.update(ours, jax.device_put(nnx.state(ours), sharding))
    np.testing.assert_allclose(nnx.jit(ours)(random()), want, atol=1e-5)


def test_the_kernel_runs(kernels):
    _, ours, _ = copied(dtype=jnp.bfloat16)
    traced = jax.jit(lambda x: ours(x)).trace(random())
    assert "jaxkern.rms_norm_fwd" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"num_features": 7}, {}, ValueError, r"\(7,\).*\(24,\)"),
        ({"implementation": "metal"}, {}, ValueError, "implementation.*'metal'"),
        (
            {"implementation": "cuda", "reduction_axes": (0, 1)},
            {},
            NotImplementedError,
            r"got reduction_axes=\(0, 1\); wanted the last axis",
        ),
        ({"implementation": "cuda", "axis_name": "i"}, {}, NotImplementedError, "axis_name='i'"),
        ({"implementation": ["cuda"]}, {"mask": True}, NotImplementedError, "a mask"),
    ],
)
def test_bad_input(options, call, error, message):
    ours = jaxkern.nnx.RMSNorm(**{"num_features": 24, **options}, rngs=nnx.Rngs(0))
    with pytest.raises(error, match=message):
        ours(random(), **call)
