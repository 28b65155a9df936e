"""quantize_rms_norm: quantize of what NumPy computes, and rstd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import BLOCKS, E4M3, E5M2, assert_same_fp8, numpy_quantize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import attributes, collectives, custom_call_lines, custom_calls, types

from jaxkern.ops.quantize_rms_norm import quantize_rms_norm

pytestmark = pytest.mark.usefixtures("kernels")

EPSILON = 0.5

implementations = pytest.mark.parametrize("implementation", [None, "xla"])
scalings = pytest.mark.parametrize("scaling", list(BLOCKS))
orientations = pytest.mark.parametrize("orientation", ["natural", "transposed", "both"])


def operands(*shape, dtype="bfloat16"):
    """x and a scale."""
    rng = np.random.default_rng(sum(shape))
    x = np.ldexp(rng.standard_normal(shape), rng.integers(-9, 9, shape))
    scale = rng.uniform(0.5, 2, shape[-1]).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(scale)


def powers(*shape):
    """rstd: powers of two, so that nothing but z's last step is rounded."""
    rng = np.random.default_rng(sum(shape) + 1)
    return jnp.asarray(np.ldexp(1.0, rng.integers(-5, 5, shape)), jnp.float32)


def product(x, scale, rstd):
    """z: x * rstd * scale, two products of float32, rounded to x's dtype."""
    single = np.asarray(x, np.float32) * np.asarray(rstd)[..., None] * np.asarray(scale, np.float32)
    return single.astype(np.asarray(x).dtype)


def check_rstd(rstd, x, epsilon=EPSILON):
    mean = (np.asarray(x, np.float64) ** 2).mean(-1)
    np.testing.assert_allclose(rstd, 1 / np.sqrt(mean + epsilon), rtol=1e-6)


def check(array, z, format, scaling, orientation):
    wanted = {"natural": [z], "transposed": [z.mT], "both": [z, z.mT]}[orientation]
    found = array if orientation == "both" else [array]
    for g, w in zip(found, wanted, strict=True):
        values, scale = numpy_quantize(w, format, scaling)
        assert_same_fp8(g.values, values)
        np.testing.assert_array_equal(g.scale, scale)


@implementations
@scalings
@orientations
@pytest.mark.parametrize(("format", "dtype"), [(E4M3, "bfloat16"), (E5M2, "float32")])
def test_is_quantize_of_the_product(implementation, scaling, orientation, format, dtype):
    """Of rstd as it is computed, and of one that is given."""
    x, scale = operands(2, 3, 130, dtype=dtype)
    options = {"scaling": scaling, "orientation": orientation, "implementation": implementation}
    got, rstd = quantize_rms_norm(x, scale, format, epsilon=EPSILON, **options)
    check_rstd(rstd, x)
    check(got, product(x, scale, rstd), format, scaling, orientation)
    given = powers(2, 3)
    got, rstd = quantize_rms_norm(x, scale, format, rstd=given, **options)
    np.testing.assert_array_equal(rstd, given)
    check(got, product(x, scale, given), format, scaling, orientation)


def test_without_a_scale_and_with_one_of_bfloat16():
    x, scale = operands(5, 130, dtype="float16")
    rstd = powers(5)
    got, _ = quantize_rms_norm(x, rstd=rstd)
    check(got, product(x, np.ones(130), rstd), E4M3, "row", "natural")
    got, _ = quantize_rms_norm(x, scale.astype("bfloat16"), rstd=rstd)
    check(got, product(x, scale.astype("bfloat16"), rstd), E4M3, "row", "natural")


@scalings
@pytest.mark.parametrize("own_scales", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_vmap(scaling, own_scales, given):
    x, scale = operands(3, 2, 5, 140)
    scales = jnp.stack([scale, 2 * scale, scale[::-1]])
    rstd = powers(3, 2, 5)

    def run(x, scale, rstd):
        options = {"rstd": rstd} if given else {"epsilon": EPSILON}
        return quantize_rms_norm(x, scale, scaling=scaling, orientation="both", **options)

    axes = (0, 0 if own_scales else None, 0)
    got, found = jax.vmap(jax.vmap(run, (0, None, 0)), axes)(
        x, scales if own_scales else scale, rstd
    )
    if not given:
        check_rstd(found, x)
    z = product(x, scales[:, None, None] if own_scales else scale, found)
    check(got, z, E4M3, scaling, "both")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("scaling", "orientation", "expected"),
    [
        ("row", "natural", set()),
        ("1x128", "natural", set()),
        ("row", "both", {"all-gather"}),
        ("tensor", "both", {"all-reduce"}),
    ],
)
def test_sharded(kind, scaling, orientation, expected):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=jax.devices("cpu"))
    x, scale = operands(64, 256)
    args = (
        jax.device_put(x, NamedSharding(mesh, P("data"))),
        jax.device_put(scale, NamedSharding(mesh, P())),
    )
    run = functools.partial(
        quantize_rms_norm, epsilon=EPSILON, scaling=scaling, orientation=orientation
    )
    found, (got, rstd) = collectives(run, *args)
    assert found == expected
    check_rstd(rstd, x)
    check(got, product(x, scale, rstd), E4M3, scaling, orientation)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("scaling", ["row", "1x128", "128x128"])
def test_calls(scaling, given):
    x, scale = operands(130, 300)
    rstd = powers(130) if given else None

    def run(x, scale):
        options = {"scaling": scaling, "orientation": "both", "epsilon": EPSILON}
        return quantize_rms_norm(x, scale.astype("bfloat16"), rstd=rstd, **options)

    assert custom_calls(run, x, scale) == {"quantize_rms_norm": 1}
    line = custom_call_lines(run, x, scale)["quantize_rms_norm"]
    found, results = types(line)
    ends = ["130xf32", "0xf32"] if given else ["0xf32", "130xf32"]
    assert found == ["130x300xbf16", "300xf32", ends[0]]
    words = 430 if scaling == "row" else 0 if given else 3
    values = "130x300xf8E4M3FN", "300x130xf8E4M3FN"
    assert results[::2] == [*values, f"{words}xi32"]
    assert results[-1] == ends[1]
    assert attributes(line)["epsilon"] == ("0.000000e+00 : f32" if given else "5.000000e-01 : f32")


def test_calls_of_a_batch():
    """All rows that share a scale are one matrix where they can be; else there is a loop."""
    x, scale = operands(2, 3, 5, 256)

    def shape(function, *args):
        line = custom_call_lines(function, *args)["quantize_rms_norm"]
        return types(line)[0][0]

    assert shape(quantize_rms_norm, x, scale) == "30x256xbf16"
    assert shape(jax.vmap(quantize_rms_norm, (0, None)), x, scale) == "30x256xbf16"
    assert shape(jax.vmap(quantize_rms_norm), x, jnp.stack([scale] * 2)) == "15x256xbf16"
    transposed = functools.partial(quantize_rms_norm, orientation="transposed")
    assert shape(transposed, x, scale) == "5x256xbf16"


def test_a_tensor_is_made_in_memory_first():
    run = functools.partial(quantize_rms_norm, scaling="tensor")
    assert custom_calls(run, *operands(130, 300)) == {"quantize": 1}


def test_no_rows_and_no_derivative():
    got, rstd = quantize_rms_norm(jnp.ones((0, 3)))
    assert (got.values.shape, rstd.shape) == ((0, 3), (0,))
    with pytest.raises(NotImplementedError, match="^quantize_rms_norm has no derivative"):
        jax.grad(lambda x: quantize_rms_norm(x)[1].sum())(jnp.ones((2, 3)))


WRONG = {
    "x": ({"x": jnp.zeros((2, 3), int)}, "x has dtype int32, wanted one of bfloat16"),
    "vector": ({"x": jnp.zeros(3)}, r"x has shape \(3,\), wanted at least two axes"),
    "scale": ({"scale": jnp.zeros(2)}, r"scale has shape \(2,\), wanted x's last axis \(3,\)"),
    "scale's dtype": ({"scale": jnp.zeros(3, int)}, "scale has dtype int32, wanted one of"),
    "epsilon": ({"epsilon": 0.0}, "epsilon is 0.0, wanted a positive float32"),
    "epsilon in an array": ({"epsilon": jnp.ones(())}, "epsilon is an array, wanted a Python"),
    "rstd": (
        {"rstd": jnp.zeros((2, 1))},
        r"rstd has shape \(2, 1\) and dtype float32, wanted \(2,\), one for each row of x, and",
    ),
    "rstd's dtype": (
        {"rstd": jnp.zeros(2, "bfloat16")},
        r"rstd has shape \(2,\) and dtype bfloat16, wanted \(2,\), one for each row of x, and",
    ),
    "scaling": ({"scaling": "column"}, "scaling is 'column', wanted"),
    "format": ({"format": "int8"}, "format is 'int8', wanted one of float8_e4m3fn"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        quantize_rms_norm(**({"x": jnp.zeros((2, 3))} | options))
