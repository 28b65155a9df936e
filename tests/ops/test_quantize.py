"""quantize: semantics of the public function, on the path of the kernel and on the reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import BLOCKS, E4M3, E5M2, assert_same_fp8, numpy_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkern import QuantizedArray, quantize
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

implementations = pytest.mark.parametrize("implementation", [None, "xla"])
scalings = pytest.mark.parametrize("scaling", list(BLOCKS))


def check(got, x, format, scaling):
    values, scale = numpy_quantize(x, format, scaling)
    assert_same_fp8(got.values, values)
    np.testing.assert_array_equal(got.scale, scale)


@implementations
@scalings
@pytest.mark.parametrize("format", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(3, 130), (2, 1, 129, 8)])
def test_orientations(implementation, scaling, format, shape):
    x = np.asarray(random_normal(1, shape, dtype="bfloat16")[0])
    run = functools.partial(quantize, scaling=scaling, implementation=implementation)
    natural, transposed = run(x, format, orientation="both")
    for got in (natural, run(x, format), run(x, format, orientation="natural")):
        check(got, x, format, scaling)
    for got in (transposed, run(x, format, orientation="transposed")):
        check(got, x.swapaxes(-1, -2), format, scaling)


@implementations
@scalings
@pytest.mark.parametrize("orientation", ["natural", "transposed"])
def test_a_constant_of_a_compiled_function(implementation, scaling, orientation):
    x = random_normal(1, (48, 40), dtype="float32")[0]
    run = functools.partial(
        quantize, scaling=scaling, orientation=orientation, implementation=implementation
    )
    check(jax.jit(lambda: run(x))(), x if orientation == "natural" else x.T, E4M3, scaling)


def test_defaults():
    x = random_normal(1, (4, 200), dtype="float32")[0]
    check(quantize(x), x, E4M3, "row")
    check(quantize(np.asarray(x).tolist()), x, E4M3, "row")


@scalings
@settings(max_examples=5, deadline=None)
@given(lead=st.lists(st.integers(0, 2), max_size=2), r=st.integers(0, 130), c=st.integers(0, 260))
def test_shapes(scaling, lead, r, c):
    """Of values and scale, empty axes included."""
    x = jax.ShapeDtypeStruct((*lead, r, c), "float16")
    run = functools.partial(quantize, scaling=scaling, orientation="both")
    arrays = jax.eval_shape(run, x)
    for got, rows, columns in zip(arrays, (r, c), (c, r), strict=True):
        high, wide = (-(-rows // 128), -(-columns // 128))
        wanted = {
            "tensor": (1, 1),
            "row": (rows, 1),
            "1x128": (rows, wide),
            "128x128": (high, wide),
        }
        assert got.shape == (*lead, rows, columns)
        assert got.scale.shape == (*lead, *wanted[scaling])


@implementations
@scalings
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 3, 4)])
def test_empty(implementation, scaling, shape):
    run = functools.partial(quantize, scaling=scaling, implementation=implementation)
    for got in run(jnp.zeros(shape), orientation="both"):
        assert got.dequantize().shape == got.shape
        assert (got.scale == 2.0**-126).all()


@implementations
@scalings
@pytest.mark.parametrize("orientation", ["natural", "both"])
def test_vmap(implementation, scaling, orientation):
    x = random_normal(2, (2, 3, 5, 140), dtype="float32")[0]
    run = functools.partial(
        quantize, scaling=scaling, orientation=orientation, implementation=implementation
    )
    got = jax.vmap(jax.vmap(run), in_axes=1, out_axes=1)(x)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(run(x)), strict=True):
        np.testing.assert_array_equal(*(np.asarray(array).view(np.uint8) for array in (g, w)))


@implementations
@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, lambda f: jax.grad(jax.jit(f))])
def test_no_derivative(implementation, transform):
    def loss(x):
        return quantize(x, implementation=implementation).dequantize().sum()

    with pytest.raises(NotImplementedError, match="^quantize has no derivative"):
        transform(loss)(jnp.ones((2, 3)))


@implementations
def test_what_is_not_differentiated_is_quantised(implementation):
    def loss(x):
        constant = quantize(jax.lax.stop_gradient(x), implementation=implementation)
        return (constant.dequantize() * x).sum()

    assert (jax.grad(loss)(jnp.ones((2, 3))) == 1).all()


def test_quantized_array():
    x = random_normal(3, (2, 130, 300), dtype="float32")[0]
    array = quantize(x, E5M2, scaling="128x128")
    assert isinstance(array, QuantizedArray)
    assert (array.shape, array.ndim) == ((2, 130, 300), 3)
    assert array.qvalue is array.values
    assert (array.qtype, array.zero_point) == (E5M2, None)
    assert array.dequantize().dtype == "float32"
    assert array.dequantize("bfloat16").dtype == "bfloat16"
    assert (array.dequantize("bfloat16") == array.dequantize().astype("bfloat16")).all()
    assert (jnp.abs(array.dequantize() - x) <= jnp.abs(x) * 2.0**-3).all()
    with pytest.raises(AttributeError):
        array.scale = None


def test_quantized_array_is_a_pytree():
    array = quantize(random_normal(4, (3, 2, 140), dtype="float32")[0], scaling="1x128")
    leaves, _ = jax.tree.flatten(array)
    assert [leaf.shape for leaf in leaves] == [(3, 2, 140), (3, 2, 2)]
    assert (jax.jit(lambda a: a.dequantize())(array) == array.dequantize()).all()
    got = jax.lax.map(lambda a: a.dequantize(), array)
    assert (got == array.dequantize()).all()


WRONG = {
    "scalar": ((jnp.zeros(()),), {}, r"x has shape \(\), wanted at least two axes"),
    "vector": ((jnp.zeros(4),), {}, r"x has shape \(4,\), wanted at least two axes"),
    "integers": ((jnp.zeros((2, 3), int),), {}, "x has dtype int32, wanted one of bfloat16, float"),
    "FP8": ((jnp.zeros((2, 3), E4M3),), {}, "x has dtype float8_e4m3fn, wanted one of bfloat16"),
    "string": (("x",), {}, "x is a str, wanted an array"),
    "format": (
        (jnp.zeros((2, 3)), "int8"),
        {},
        "format is 'int8', wanted one of float8_e4m3fn, fl",
    ),
    "no format": ((jnp.zeros((2, 3)), None), {}, "format is None, wanted one of float8_e4m3fn"),
    "not a dtype": ((jnp.zeros((2, 3)), "fp8"), {}, "format is 'fp8', wanted one of float8_e4m3fn"),
    "scaling": (
        (jnp.zeros((2, 3)),),
        {"scaling": "column"},
        "scaling is 'column', wanted one of 'tensor', 'row', '1x128', '128x128'",
    ),
    "scaling of a tuple": (
        (jnp.zeros((2, 3)),),
        {"scaling": (1, 128)},
        r"scaling is \(1, 128\), wanted one of",
    ),
    "orientation": (
        (jnp.zeros((2, 3)),),
        {"orientation": None},
        "orientation is None, wanted one of 'natural', 'transposed', 'both'",
    ),
    "implementation": (
        (jnp.zeros((2, 3)),),
        {"implementation": "triton"},
        "quantize: implementation is 'triton', wanted",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    args, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        quantize(*args, **options)


def test_float64_is_not_taken():
    with jax.enable_x64(), pytest.raises(ValueError, match="x has dtype float64, wanted"):
        quantize(jnp.zeros((2, 3), "float64"))


def test_the_kernel_is_not_for_a_cpu():
    with pytest.raises(NotImplementedError, match="quantize with implementation 'cuda'"):
        quantize(jnp.ones((2, 3)), implementation="cuda")
