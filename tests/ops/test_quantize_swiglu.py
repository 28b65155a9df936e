"""quantize_swiglu and quantize_swiglu_grad: quantize of what NumPy computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import BLOCKS, E4M3, E5M2, assert_same_fp8, numpy_quantize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import collectives, custom_call_lines, custom_calls, types

from jaxkern.ops.quantize_swiglu import quantize_swiglu, quantize_swiglu_grad

pytestmark = pytest.mark.usefixtures("kernels")

implementations = pytest.mark.parametrize("implementation", [None, "xla"])
scalings = pytest.mark.parametrize("scaling", list(BLOCKS))


def operands(*shape, dtype="bfloat16"):
    """gate, up and dh. Sigmoids of these gates are 0, 0.5 or 1, so that all else is exact."""
    rng = np.random.default_rng(sum(shape))
    gate = rng.choice([0.0, -128.0, 64.0, 96.0], shape)
    up, dh = (np.ldexp(rng.standard_normal(shape), rng.integers(-9, 9, shape)) for _ in range(2))
    return [jnp.asarray(x, dtype) for x in (gate, up, dh)]


def matrices(gate, up, dh):
    """h and the gradients of gate and up, in float64, rounded to the operands' dtype."""
    dtype = np.asarray(gate).dtype
    gate, up, dh = (np.asarray(x, np.float64) for x in (gate, up, dh))
    s = 1 / (1 + np.exp(-gate))
    s = np.where(s < 1e-30, 0.0, s)
    grads = dh * up * s * (1 + gate * (1 - s)), dh * gate * s
    return [x.astype(np.float32).astype(dtype) for x in (gate * s * up, *grads)]


def run_all(gate, up, dh, **options):
    """Each matrix's arrays."""
    return [
        quantize_swiglu(gate, up, **options),
        *quantize_swiglu_grad(gate, up, dh, **options),
    ]


def positive_zeros(values):
    """A product of zero has the sign that the formula's order gives it, which is not tested."""
    values = np.asarray(values)
    return np.where(values == 0, np.zeros((), values.dtype), values)


def check(arrays, matrices, format, scaling, orientation):
    for array, x in zip(arrays, matrices, strict=True):
        wanted = {"natural": [x], "transposed": [x.mT], "both": [x, x.mT]}[orientation]
        got = array if orientation == "both" else [array]
        for g, w in zip(got, wanted, strict=True):
            values, scale = numpy_quantize(w, format, scaling)
            assert_same_fp8(positive_zeros(g.values), positive_zeros(values))
            np.testing.assert_array_equal(g.scale, scale)


@implementations
@scalings
@pytest.mark.parametrize("orientation", ["natural", "transposed", "both"])
@pytest.mark.parametrize(("format", "dtype"), [(E4M3, "bfloat16"), (E5M2, "float32")])
def test_is_quantize_of_the_function(implementation, scaling, orientation, format, dtype):
    x = operands(2, 3, 130, dtype=dtype)
    options = {"scaling": scaling, "orientation": orientation, "implementation": implementation}
    got = run_all(*x, format=format, **options)
    check(got, matrices(*x), format, scaling, orientation)


def test_any_gate():
    """Of which sigmoids are rounded: a step of the format apart at a few elements."""
    rng = np.random.default_rng(1)
    x = [jnp.asarray(rng.standard_normal((64, 256)), jnp.float32) for _ in range(3)]
    for got, wanted in zip(run_all(*x, scaling="1x128"), matrices(*x), strict=True):
        values, scale = numpy_quantize(wanted, E4M3, "1x128")
        np.testing.assert_array_equal(got.scale, scale)
        steps = np.abs(np.asarray(got.values).view(np.int8) - values.view(np.int8).astype(int))
        assert steps.max() <= 1 and (steps > 0).mean() < 1e-3


@scalings
def test_vmap(scaling):
    x = operands(3, 5, 140)
    run = functools.partial(run_all, scaling=scaling, orientation="both")
    got = jax.vmap(run)(*x)
    check(got, matrices(*x), E4M3, scaling, "both")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("scaling", "orientation", "expected"),
    [
        ("1x128", "natural", set()),
        ("row", "both", {"all-gather"}),
        ("tensor", "both", {"all-reduce"}),
    ],
)
def test_sharded(kind, scaling, orientation, expected):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=jax.devices("cpu"))
    x = operands(64, 256)
    args = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in x]
    run = functools.partial(run_all, scaling=scaling, orientation=orientation)
    found, got = collectives(run, *args)
    assert found == expected
    check(got, matrices(*x), E4M3, scaling, orientation)


@pytest.mark.parametrize("scaling", ["row", "1x128", "128x128"])
def test_calls(scaling):
    gate, up, dh = operands(130, 300)
    options = {"scaling": scaling, "orientation": "both"}
    swiglu = functools.partial(quantize_swiglu, **options)
    grad = functools.partial(quantize_swiglu_grad, **options)
    assert custom_calls(swiglu, gate, up) == {"quantize_swiglu": 1}
    assert custom_calls(grad, gate, up, dh) == {"quantize_swiglu_grad": 1}
    lines = custom_call_lines(grad, gate, up, dh)
    found, results = types(lines["quantize_swiglu_grad"])
    assert found == ["130x300xbf16"] * 3
    assert results[:5] == results[5:]
    assert results[::2][:2] == ["130x300xf8E4M3FN", "300x130xf8E4M3FN"]


def test_a_tensor_is_made_in_memory_first():
    gate, up, dh = operands(130, 300)
    found = custom_calls(functools.partial(run_all, scaling="tensor"), gate, up, dh)
    assert found == {"quantize": 3}


WRONG = {
    "gate": ((jnp.zeros((2, 3), int), jnp.zeros((2, 3))), {}, "gate has dtype int32, wanted one"),
    "vector": ((jnp.zeros(3), jnp.zeros(3)), {}, r"gate has shape \(3,\), wanted at least two"),
    "up of another shape": (
        (jnp.zeros((2, 3)), jnp.zeros((3, 2))),
        {},
        r"up has shape \(3, 2\) and dtype float32, wanted gate's \(2, 3\) and float32",
    ),
    "up of another dtype": (
        (jnp.zeros((2, 3)), jnp.zeros((2, 3), "bfloat16")),
        {},
        r"up has shape \(2, 3\) and dtype bfloat16, wanted gate's \(2, 3\) and float32",
    ),
    "scaling": ((jnp.zeros((2, 3)),) * 2, {"scaling": "column"}, "scaling is 'column', wanted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    args, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        quantize_swiglu(*args, **options)


def test_no_derivative():
    with pytest.raises(NotImplementedError, match="^quantize_swiglu has no derivative"):
        jax.grad(lambda x: quantize_swiglu(x, x).dequantize().sum())(jnp.ones((2, 3)))
