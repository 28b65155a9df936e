"""What quantized_matmul becomes for CUDA, and on CPU devices by the kernel's path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_bit import FORMATS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import attributes, custom_call_lines, custom_calls, exchanges, types

from jaxkern import pack_weight, quantize, quantized_matmul
from jaxkern.testing import relative_error

pytestmark = pytest.mark.usefixtures("kernels")

formats = pytest.mark.parametrize("name", FORMATS)
N, K = 256, 512
BLOCKS = {"nvfp4": 16, "mxfp4": 32, "int4": 32, "int4 with zero points": 64}
WORDS = {"nvfp4": 288, "mxfp4": 272, "int4": 288, "int4 with zero points": 288}


def weight(name, *shape):
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    return pack_weight(quantize(jnp.asarray(w), name.split()[0], **FORMATS[name]))


def normal(*shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


@formats
@pytest.mark.parametrize("dtype, wanted", [("bfloat16", "bf16"), ("float16", "f16")])
def test_call(name, dtype, wanted):
    line = custom_call_lines(quantized_matmul, normal(3, 4, K, dtype=dtype), weight(name, N, K))
    operands, results = types(line["quantized_matmul"])
    words = WORDS[name]
    assert operands == [f"1x12x{K}x{wanted}", f"1x{N // 16}x{K // 128}x{words}xui32", f"1x{N}xf32"]
    assert results == [f"1x12x{N}x{wanted}"]
    assert attributes(line["quantized_matmul"]) == {
        "format": f"{('nvfp4', 'mxfp4', 'int4').index(name.split()[0])} : i32",
        "block": f"{BLOCKS[name]} : i32",
        "zero_points": str("zero" in name).lower(),
    }


def test_calls():
    w = weight("nvfp4", N, K)
    assert custom_calls(quantized_matmul, normal(K), w) == {"quantized_matmul": 1}
    assert custom_calls(quantized_matmul, normal(3000, K), w) == {"quantized_matmul": 1}
    assert custom_calls(quantized_matmul, normal(4, K, dtype="float32"), w) == {}
    assert custom_calls(quantized_matmul, normal(4, K), w.unpack()) == {}
    over_x = jax.vmap(quantized_matmul, (0, None))
    assert custom_calls(over_x, normal(2, 4, K), w) == {"quantized_matmul": 1}
    many = weight("nvfp4", 2, N, K)
    line = custom_call_lines(jax.vmap(quantized_matmul), normal(2, 4, K), many)
    assert types(line["quantized_matmul"])[1] == [f"2x4x{N}xbf16"]


def gradient(x, w, dy, wanted=None):
    _, pullback = jax.vjp(lambda x: quantized_matmul(x, w, preferred_element_type=wanted), x)
    return pullback(dy)[0]


@formats
@pytest.mark.parametrize("dtype, wanted", [("bfloat16", "bf16"), ("float16", "f16")])
def test_gradient_call(name, dtype, wanted):
    x, dy = normal(3, 4, K, dtype=dtype), normal(3, 4, N, dtype=dtype)
    lines = custom_call_lines(gradient, x, weight(name, N, K), dy)
    operands, results = types(lines["quantized_matmul_grad"])
    data = f"1x{N // 16}x{K // 128}x{WORDS[name]}xui32"
    row_factor = f"1x{N if name == 'mxfp4' else 0}x{wanted}"
    assert operands == [f"1x12x{N}x{wanted}", data, "1xf32", row_factor]
    assert results == [f"1x12x{K}x{wanted}"]
    forward = custom_call_lines(quantized_matmul, x, weight(name, N, K))["quantized_matmul"]
    assert attributes(lines["quantized_matmul_grad"]) == attributes(forward)


@pytest.mark.parametrize(
    "dtype, wanted, kernel",
    [
        ("bfloat16", "float32", True),
        ("bfloat16", "float16", True),
        ("float16", "float32", False),
        ("float32", None, False),
    ],
)
def test_dtypes_of_gradients(dtype, wanted, kernel):
    x, w = normal(4, K, dtype=dtype), weight("nvfp4", N, K)
    dy = normal(4, N, dtype=wanted or dtype)
    calls = custom_calls(lambda x, dy: gradient(x, w, dy, wanted), x, dy)
    assert ("quantized_matmul_grad" in calls) is kernel
    assert jax.eval_shape(lambda x, dy: gradient(x, w, dy, wanted), x, dy).dtype == dtype


@pytest.mark.parametrize(
    "format, dtype, count",
    [("nvfp4", "bfloat16", 1), ("fp8", "bfloat16", 1), ("fp8", "float32", 0)],
)
def test_gradient_of_quantised_activations(format, dtype, count):
    """Is that without: neither x nor dy is quantised for it, nor for the gradient's gradient."""
    x, w, dy = normal(4, K, dtype=dtype), weight("nvfp4", N, K), normal(4, N, dtype=dtype)

    def run(x, dy, **options):
        return jax.vjp(lambda x: quantized_matmul(x, w, **options), x)[1](dy)[0]

    def quantised(x, dy):
        return run(x, dy, activation_format=format)

    assert custom_calls(quantised, x, dy).get("quantized_matmul_grad", 0) == count
    np.testing.assert_array_equal(np.float32(quantised(x, dy)), np.float32(run(x, dy)))
    again, wanted = (
        jax.grad(lambda dy, run=run: (run(x, dy).astype(jnp.float32) ** 2).sum())(dy)
        for run in (quantised, run)
    )
    np.testing.assert_array_equal(np.float32(again), np.float32(wanted))


def test_gradients_of_gradients():
    """Of g = (dy x w^T) w, which is a product and a gradient, by both again."""
    w, x, dy = weight("nvfp4", N, K), normal(4, K), normal(4, N)

    def loss(x):
        g = gradient(x, w, dy * quantized_matmul(x, w))
        return (g.astype(jnp.float32) ** 2).sum() / 2

    assert custom_calls(jax.grad(loss), x) == {"quantized_matmul": 2, "quantized_matmul_grad": 2}
    exact, x64, dy64 = (np.float64(a) for a in (w.dequantize(), x, dy))
    wanted = (dy64 * ((dy64 * (x64 @ exact.T)) @ exact @ exact.T)) @ exact
    assert relative_error(jax.grad(loss)(x), wanted) < 1e-2


@pytest.mark.parametrize("wanted, found", [("float32", "f32"), ("float16", "f32"), (None, "bf16")])
def test_results_of_the_kernel(wanted, found):
    """Are x's or float32, and rounded once to other types."""

    def run(x, w):
        return quantized_matmul(x, w, preferred_element_type=wanted)

    x, w = normal(4, K), weight("nvfp4", N, K)
    line = custom_call_lines(run, x, w)["quantized_matmul"]
    assert types(line)[1] == [f"1x4x{N}x{found}"]
    assert jax.eval_shape(run, x, w).dtype == (wanted or "bfloat16")


def test_gradients_are_where_x_is():
    """On a mesh with Explicit axes, whatever is split by the weight."""
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,), devices=jax.devices("cpu")[:4])
    w, dy = weight("nvfp4", N, K), normal(8, N)
    wanted = gradient(normal(8, K), w, dy)
    for w_spec in (P("x"), P(None, "x")):
        for spec in (P(), P("x"), P(None, "x")):
            with jax.set_mesh(mesh):
                sharded = jax.tree.map(
                    lambda a, s=w_spec: jax.device_put(a, s if a.ndim == 3 else P()), w
                )
                x = jax.device_put(normal(8, K), spec)
                y, pullback = jax.vjp(lambda x, w=sharded: quantized_matmul(x, w), x)
                (got,) = pullback(jax.sharding.reshard(dy, jax.typeof(y).sharding))
            assert jax.typeof(got) == jax.typeof(x)
            np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=2**-7, atol=1e-3)


def test_vmapped_gradients():
    def lines(w, axis):
        def run(x, w, dy):
            return jax.vmap(gradient, (0, axis, 0))(x, w, dy)

        line = custom_call_lines(run, normal(2, 4, K), w, normal(2, 4, N))
        return types(line["quantized_matmul_grad"])

    operands, results = lines(weight("mxfp4", N, K), None)
    assert (operands[0], operands[2:], results) == (
        f"1x8x{N}xbf16",
        ["1xf32", f"1x{N}xbf16"],
        [f"1x8x{K}xbf16"],
    )
    operands, results = lines(weight("mxfp4", 2, N, K), 0)
    assert (operands[0], operands[2:], results) == (
        f"2x4x{N}xbf16",
        ["2xf32", f"2x{N}xbf16"],
        [f"2x4x{K}xbf16"],
    )


@formats
def test_gradient_on_other_platforms(name):
    """Ends in the reference too."""
    x, w, dy = normal(3, 5, K - 64), weight(name, 3, N - 6, K - 64), normal(3, 5, N - 6)
    got = jax.vmap(gradient)(x, w, dy)
    wanted = np.einsum("bmn,bnk->bmk", np.float64(dy), np.float64(w.dequantize()))
    np.testing.assert_allclose(np.float64(got), wanted, rtol=2**-8, atol=1e-4)
    first = jax.tree.map(lambda a: a[0], w)
    got = jax.vmap(gradient, (0, None, 0))(x, first, dy)
    wanted = np.float64(dy) @ np.float64(first.dequantize())
    np.testing.assert_allclose(np.float64(got), wanted, rtol=2**-8, atol=1e-4)


@formats
def test_on_other_platforms(name):
    """Ends in the reference, with the results of the plain path."""
    x, w = normal(5, K), weight(name, N - 6, K - 64)
    x = x[:, : K - 64]
    plain = quantized_matmul(x, w, implementation="xla")
    np.testing.assert_array_equal(np.float32(quantized_matmul(x, w)), np.float32(plain))
    xs, ws = normal(3, 5, K), weight(name, 3, N, K)
    got = jax.vmap(quantized_matmul)(xs, ws)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], ws)
        np.testing.assert_array_equal(
            np.float32(got[i]), np.float32(quantized_matmul(xs[i], one, implementation="xla"))
        )


kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
SPECS = {  # of x, w and the result
    "rows of x": (P("x"), P(), P("x")),
    "N": (P(), P("x"), P(None, "x")),
    "K": (P(None, "x"), P(None, "x"), P()),
}
GRADIENT_SPECS = SPECS | {
    "N": (P(None, "x"), P("x"), P()),
    "K": (P(), P(None, "x"), P(None, "x")),
}


def check_sharded(kind, run, x, w, specs, exchanged):
    """run(x, w) on 4 devices: what they exchange, and the result."""
    mesh = jax.make_mesh((4,), ("x",), (kind,), devices=jax.devices("cpu")[:4])
    wanted, (x_spec, w_spec, out) = run(x, w), specs

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    sharded = jax.tree.map(lambda a: put(a, w_spec if a.ndim == 3 else P()), w)
    with jax.set_mesh(mesh):
        found, got = exchanges(run, put(x, x_spec), sharded)
    assert found == exchanged
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
    np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=2**-7, atol=1e-3)


@kinds
@pytest.mark.parametrize("case", SPECS)
def test_sharded(kind, case):
    """Each device has tiles of its own; only sums over a sharded K are exchanged."""
    exchanged = {f"all-reduce f32 {8 * N}": 1} if case == "K" else {}
    x, w = normal(8, K), weight("nvfp4", N, K)
    check_sharded(kind, quantized_matmul, x, w, SPECS[case], exchanged)


@kinds
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("case", GRADIENT_SPECS)
def test_sharded_gradient(kind, case, name):
    """The same, of sums over a sharded N."""

    def run(dy, w):
        x = jnp.zeros((8, K), dy.dtype)
        if jax.sharding.get_abstract_mesh().explicit_axes:
            x = jax.sharding.reshard(x, GRADIENT_SPECS[case][2])
        return gradient(x, w, dy)

    exchanged = {f"all-reduce f32 {8 * K}": 1} if case == "N" else {}
    check_sharded(kind, run, normal(8, N), weight(name, N, K), GRADIENT_SPECS[case], exchanged)


def test_errors():
    x, w = normal(4, K), weight("nvfp4", N, K)
    for wrong, message in (
        ((x, w.unpack()), "w is a QuantizedArray, wanted what pack_weight makes of it"),
        ((x.astype("float32"), w), "x has dtype float32, wanted bfloat16 or float16"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            quantized_matmul(*wrong, implementation="cuda")
    with pytest.raises(NotImplementedError, match="lowered for cpu, wanted cuda only"):
        quantized_matmul(x, w, implementation="cuda")
