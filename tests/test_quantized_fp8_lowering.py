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
    "int4 of 32": ({"group_size": 32}, 32, 288),
    "int4 with zero points": ({"group_size": 64, "zero_point": True}, 64, 288),
}
formats = pytest.mark.parametrize("name", FORMATS)
N, K = 256, 512
MANY = 260  # rows of x: so many that FP8 tensor cores multiply


def weight(name, *shape):
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    return pack_weight(quantize(jnp.asarray(w), name.split()[0], **FORMATS[name][0]))


def normal(*shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def run(x, w, **options):
    return quantized_matmul(x, w, activation_format="fp8", **options)


def attributes_of_weight(name):
    return {
        "format": f"{('nvfp4', 'mxfp4', 'int4').index(name.split()[0])} : i32",
        "block": f"{FORMATS[name][1]} : i32",
        "zero_points": str("zero" in name).lower(),
    }


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int4"])
@pytest.mark.parametrize("dtype, wanted", [("bfloat16", "bf16"), ("float32", "f32")])
def test_calls_of_many_rows(name, dtype, wanted):
    lines = custom_call_lines(run, normal(3, MANY, K, dtype=dtype), weight(name, N, K))
    operands, results = types(lines["quantize"])
    rows = 3 * MANY
    assert (operands[0], results[:2]) == (
        f"{rows}x{K}x{wanted}",
        [f"{rows}x{K}xf8E4M3FN", f"{rows}xf32"],
    )
    assert types(lines["weight_to_fp8"]) == (
        [f"1x{N // 16}x{K // 128}x{FORMATS[name][2]}xui32", f"1x{N}xf32"],
        [f"1x{N}x{K}xf8E4M3FN", f"1x{N}xf32"],
    )
    assert attributes(lines["weight_to_fp8"]) == attributes_of_weight(name)
    assert types(lines["scaled_matmul"]) == (
        [f"1x{rows}x{K}xf8E4M3FN", f"1x{N}x{K}xf8E4M3FN", f"1x{rows}xf32", f"1x{N}xf32", "0xf32"],
        [f"1x{rows}x{N}x{wanted}"],
    )
    assert attributes(lines["scaled_matmul"]) == {
        "lhs_scaling": "1 : i32",
        "rhs_scaling": "1 : i32",
        "fast_accumulation": "false",
    }


@pytest.mark.parametrize("name, rows", [*((name, 4) for name in FORMATS), ("int4", MANY)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_calls_of_the_weight_as_it_is(name, rows, dtype):
    """Few rows, and any number with integers in groups of 128, which e4m3 would not hold."""
    lines = custom_call_lines(run, normal(3, rows, K, dtype=dtype), weight(name, N, K))
    assert lines.keys() == {"quantize", "quantized_matmul"}
    operands, results = types(lines["quantized_matmul"])
    assert (operands[0], results) == (f"1x{3 * rows}x{K}xbf16", [f"1x{3 * rows}x{N}xf32"])
    assert attributes(lines["quantized_matmul"]) == attributes_of_weight(name)


def test_number_of_calls():
    w = weight("nvfp4", N, K)
    few = {"quantize": 1, "quantized_matmul": 1}
    many = {"quantize": 1, "weight_to_fp8": 1, "scaled_matmul": 1}
    assert custom_calls(run, normal(K), w) == few
    assert custom_calls(run, normal(256, K), w) == few
    assert custom_calls(run, normal(257, K), w) == many
    assert custom_calls(run, normal(MANY, K), w.unpack()) == {}
    ws = weight("nvfp4", 2, N, K)
    for rows, wanted in ((4, few), (MANY, many)):
        x = normal(2, rows, K)
        assert custom_calls(jax.vmap(run, (0, None)), x, w) == wanted
        assert custom_calls(jax.vmap(run), x, ws) == wanted
        for args, axes in (((x, ws), 0), ((x[0], ws), (None, 0))):
            lines = custom_call_lines(jax.vmap(run, axes), *args)
            line = lines.get("scaled_matmul") or lines["quantized_matmul"]
            assert types(line)[1] == [f"2x{rows}x{N}x{'f32' if rows == 4 else 'bf16'}"]


@pytest.mark.parametrize("wanted", ["float32", "float16", None])
def test_results_of_the_kernel(wanted):
    x, w = normal(MANY, K), weight("nvfp4", N, K)
    line = custom_call_lines(lambda x, w: run(x, w, preferred_element_type=wanted), x, w)
    found = {"float32": "f32", "float16": "f16", None: "bf16"}[wanted]
    assert types(line["scaled_matmul"])[1] == [f"1x{MANY}x{N}x{found}"]


def test_fast_accumulation():
    x, w = normal(MANY, K), weight("nvfp4", N, K)
    lines = custom_call_lines(lambda x, w: run(x, w, fast_accumulation=True), x, w)
    assert attributes(lines["scaled_matmul"])["fast_accumulation"] == "true"


def close(got, wanted):
    np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=2**-7, atol=1e-3)


@formats
@pytest.mark.parametrize("rows", [5, MANY])
def test_on_other_platforms(name, rows):
    """Ends in the reference, with the results of the plain path."""
    x, w = normal(rows, K), weight(name, N - 6, K)
    close(run(x, w), run(x, w, implementation="xla"))
    xs, ws = normal(3, rows, K), weight(name, 3, N, K)
    got = jax.vmap(run)(xs, ws)
    for i in range(3):
        close(got[i], run(xs[i], jax.tree.map(lambda a, i=i: a[i], ws), implementation="xla"))


def test_columns_that_fill_no_tile():
    x, w = normal(MANY, K - 80), weight("nvfp4", N, K - 80)
    lines = custom_call_lines(run, x, w)
    assert types(lines["quantize"])[1][0] == f"{MANY}x{K - 80}xf8E4M3FN"
    assert types(lines["scaled_matmul"])[0][:2] == [f"1x{MANY}x{K}xf8E4M3FN", f"1x{N}x{K}xf8E4M3FN"]
    close(run(x, w), run(x, w, implementation="xla"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", ["rows of x", "N", "K"])
@pytest.mark.parametrize("rows", [8, MANY])
def test_sharded(kind, case, rows):
    """Each device has tiles of its own. Over a sharded K sums are exchanged, and before, as rows
    have one scale, x."""
    mesh = jax.make_mesh((4,), ("x",), (kind,), devices=jax.devices("cpu")[:4])
    x, w = normal(rows, K), weight("nvfp4", N, K)
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
    of_k = {f"all-reduce f32 {rows * N}": 1, f"all-gather f32 {rows * K}": 1}
    found = {name.replace("bf16", "f32"): count for name, count in found.items()}
    assert found == (of_k if case == "K" else {})
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out), 2)
    close(got, wanted)


def test_other_platforms_are_refused():
    with pytest.raises(NotImplementedError, match="lowered for cpu, wanted cuda only"):
        run(normal(4, K), weight("nvfp4", N, K), implementation="cuda")
