"""What quantized_matmul with activation_format "fp8" becomes for CUDA, and on CPU devices by the
kernel's path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import attributes, custom_call_lines, custom_calls, exchanges, types

from jaxkern import pack_weight, quantize, quantized_matmul

pytestmark = pytest.mark.usefixtures("kernels")

FORMATS = {
    "nvfp4": ({}, 16, 288),
    "mxfp4": ({}, 32, 272),
    "int4": ({}, 128, 264),
    "int4 with zero points": ({"group_size": 64, "zero_point": True}, 64, 288),
}
formats = pytest.mark.parametrize("name", FORMATS)
N, K = 256, 512


def weight(name, *shape):
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    return pack_weight(quantize(jnp.asarray(w), name.split()[0], **FORMATS[name][0]))


def normal(*shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def run(x, w, **options):
    return quantized_matmul(x, w, activation_format="fp8", **options)


@formats
@pytest.mark.parametrize("dtype, wanted", [("bfloat16", "bf16"), ("float32", "f32")])
def test_calls(name, dtype, wanted):
    lines = custom_call_lines(run, normal(3, 4, K, dtype=dtype), weight(name, N, K))
    _, block, words = FORMATS[name]
    assert types(lines["quantize_permuted"]) == (
        [f"12x{K}x{wanted}"],
        [f"12x{K}xf8E4M3FN", "12xf32"],
    )
    operands, results = types(lines["quantized_matmul_fp8"])
    assert operands == [
        f"1x12x{K}xf8E4M3FN",
        "1x12xf32",
        f"1x{N // 16}x{K // 128}x{words}xui32",
        f"1x{N}xf32",
    ]
    assert results == [f"1x12x{N}x{wanted}"]
    assert attributes(lines["quantized_matmul_fp8"]) == {
        "format": f"{('nvfp4', 'mxfp4', 'int4').index(name.split()[0])} : i32",
        "block": f"{block} : i32",
        "zero_points": str("zero" in name).lower(),
    }


def test_number_of_calls():
    w = weight("nvfp4", N, K)
    both = {"quantize_permuted": 1, "quantized_matmul_fp8": 1}
    assert custom_calls(run, normal(K), w) == both
    assert custom_calls(run, normal(3000, K), w) == both
    assert custom_calls(run, normal(4, K), w.unpack()) == {}
    assert custom_calls(jax.vmap(run, (0, None)), normal(2, 4, K), w) == both
    many = weight("nvfp4", 2, N, K)
    assert custom_calls(jax.vmap(run), normal(2, 4, K), many) == both
    line = custom_call_lines(jax.vmap(run), normal(2, 4, K), many)["quantized_matmul_fp8"]
    assert types(line)[1] == [f"2x4x{N}xbf16"]
    line = custom_call_lines(jax.vmap(run, (None, 0)), normal(4, K), many)["quantized_matmul_fp8"]
    assert types(line)[1] == [f"2x4x{N}xbf16"]


@pytest.mark.parametrize("wanted", ["float32", "float16", None])
def test_results_of_the_kernel(wanted):
    x, w = normal(4, K), weight("nvfp4", N, K)
    line = custom_call_lines(lambda x, w: run(x, w, preferred_element_type=wanted), x, w)
    found = {"float32": "f32", "float16": "f16", None: "bf16"}[wanted]
    assert types(line["quantized_matmul_fp8"])[1] == [f"1x4x{N}x{found}"]


def close(got, wanted):
    np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=2**-7, atol=1e-3)


@formats
def test_on_other_platforms(name):
    """Ends in the reference, with the results of the plain path."""
    x, w = normal(5, K), weight(name, N - 6, K)
    close(run(x, w), run(x, w, implementation="xla"))
    xs, ws = normal(3, 5, K), weight(name, 3, N, K)
    got = jax.vmap(run)(xs, ws)
    for i in range(3):
        close(got[i], run(xs[i], jax.tree.map(lambda a, i=i: a[i], ws), implementation="xla"))


def test_columns_that_fill_no_tile():
    x, w = normal(5, K - 80), weight("nvfp4", N, K - 80)
    line = custom_call_lines(run, x, w)["quantize_permuted"]
    assert types(line) == ([f"5x{K - 80}xbf16"], [f"5x{K}xf8E4M3FN", "5xf32"])
    close(run(x, w), run(x, w, implementation="xla"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", ["rows of x", "N", "K"])
def test_sharded(kind, case):
    """Each device has tiles of its own. Over a sharded K sums are exchanged, and before, as rows
    have one scale, x."""
    mesh = jax.make_mesh((4,), ("x",), (kind,), devices=jax.devices("cpu")[:4])
    x, w = normal(8, K), weight("nvfp4", N, K)
    wanted = run(x, w)
    x_spec, w_spec, out = {
        "rows of x": (P("x"), P(), P("x")),
        "N": (P(), P("x"), P(None, "x")),
        "K": (P(None, "x"), P(None, "x"), P()),
    }[case]

    def put(a, spec):
        return jax.device_put(a, NamedSharding(mesh, spec))

    sharded = jax.tree.map(lambda a: put(a, w_spec if a.ndim == 3 else P()), w)
    with jax.set_mesh(mesh):
        found, got = exchanges(run, put(x, x_spec), sharded)
    # XLA for CPUs gathers float32.
    of_k = {f"all-reduce f32 {8 * N}": 1, f"all-gather f32 {8 * K}": 1}
    found = {name.replace("bf16", "f32"): count for name, count in found.items()}
    assert found == (of_k if case == "K" else {})
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
    close(got, wanted)


def test_other_platforms_are_refused():
    with pytest.raises(NotImplementedError, match="lowered for cpu, wanted cuda only"):
        run(normal(4, K), weight("nvfp4", N, K), implementation="cuda")
