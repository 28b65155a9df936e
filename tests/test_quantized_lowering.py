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


@pytest.mark.parametrize("wanted, found", [("float32", "f32"), ("float16", "f32"), (None, "bf16")])
def test_results_of_the_kernel(wanted, found):
    """Are x's or float32, and rounded once to other types."""

    def run(x, w):
        return quantized_matmul(x, w, preferred_element_type=wanted)

    x, w = normal(4, K), weight("nvfp4", N, K)
    line = custom_call_lines(run, x, w)["quantized_matmul"]
    assert types(line)[1] == [f"1x4x{N}x{found}"]
    assert jax.eval_shape(run, x, w).dtype == (wanted or "bfloat16")


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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", ["rows of x", "N", "K"])
def test_sharded(kind, case):
    """Each device has tiles of its own; only sums over a sharded K are exchanged."""
    mesh = jax.make_mesh((4,), ("x",), (kind,), devices=jax.devices("cpu")[:4])
    x, w = normal(8, K), weight("nvfp4", N, K)
    wanted = quantized_matmul(x, w)
    x_spec, w_spec, out = {
        "rows of x": (P("x"), P(), P("x")),
        "N": (P(), P("x"), P(None, "x")),
        "K": (P(None, "x"), P(None, "x"), P()),
    }[case]

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    sharded = jax.tree.map(lambda a: put(a, w_spec if a.ndim == 3 else P()), w)
    with jax.set_mesh(mesh):
        found, got = exchanges(quantized_matmul, put(x, x_spec), sharded)
    assert found == ({f"all-reduce f32 {8 * N}": 1} if case == "K" else {})
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
    np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=2**-7, atol=1e-3)


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
